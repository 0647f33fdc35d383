"""Export to a collector: what is sent, when it is sent again, and what is lost and counted."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from llm_router.errors import ConfigError
from llm_router.observe.tracing.otlp import OtlpExporter, encode
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.trace import Span, Trace
from llm_router.signals import Kept
from llm_router.testing import FakeClock
from support.aio import run
from support.collector import Collector, Said, running
from support.net import free_port
from support.wait import until

TRACE, ROOT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def trace(name: str = "POST /x", *, kept: Kept = "error", spans: int = 1, **fields: Any) -> Trace:
    made = [
        Span(name=name if not number else f"{name} {number}", span_id=f"{number + 1:016x}", parent_id="" if not number else ROOT,
             kind="internal" if number else "server", start_ns=1, end_ns=2)
        for number in range(spans)
    ]  # fmt: skip
    return msgspec.structs.replace(Trace(trace_id=TRACE, request_id="r", kept=kept, spans=tuple(made)), **fields)


class Waits:
    """In place of waiting: notes how long it would have been, and moves the clock by it."""

    def __init__(self, clock: FakeClock) -> None:
        self.seconds: list[float] = []
        self._clock = clock

    def __call__(self, event: threading.Event, seconds: float) -> bool:
        if seconds != 1.0 or event.is_set():  # the wait for a whole batch is not what tests ask for
            self.seconds.append(seconds)
            self._clock.advance(seconds)
        return event.is_set()


class Exporting:
    """An exporter at work."""

    def __init__(self, endpoint: str, **settings: Any) -> None:
        self.clock = FakeClock()
        self.waits = Waits(self.clock)
        self.exporter = OtlpExporter(
            TracingSettings(endpoint=endpoint, **settings),
            version="1.2.3",
            environment="test",
            hostname="box",
            rng=random.Random(1),
            clock=self.clock,
            wall=lambda: 1_700_000_000.0,
            wait=self.waits,
        )

    @property
    def lost(self) -> dict[str, int]:
        """Spans by reason."""
        return {reason: spans for reason, spans in self.exporter.statistics().dropped.items() if spans}

    def settled(self) -> None:
        """Nothing waits any more."""
        until(lambda: not self.exporter.statistics().waiting, what="the export")


@contextmanager
def exporting(endpoint: str, **settings: Any) -> Iterator[Exporting]:
    made = Exporting(endpoint, **settings)
    made.exporter.start()
    try:
        yield made
    finally:
        made.exporter.close(5.0)
        assert not made.exporter.thread.is_alive()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running() as made:
        yield made


def test_a_trace_arrives_with_resource_scope_and_the_configured_headers(collector: Collector) -> None:
    settings = {"headers": {"x-api-key": "s3cret"}, "service_name": "shop", "resource": {"team": "a"}}
    with exporting(collector.url, **settings) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert at_work.exporter.statistics() == (0, 1, {"queue-full": 0, "export-failed": 0, "export-refused": 0}, "")
    (export,) = collector.exports
    assert export.path == "/v1/traces"
    assert export.headers["x-api-key"] == "s3cret"
    assert export.headers["content-type"] == "application/json"
    assert export.headers["user-agent"] == "llm-runner-router/1.2.3"
    (resource,) = export.document["resourceSpans"]
    attributes = {pair["key"]: pair["value"]["stringValue"] for pair in resource["resource"]["attributes"]}
    assert attributes == {
        "telemetry.sdk.name": "llm_router",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": "1.2.3",
        "service.version": "1.2.3",
        "deployment.environment.name": "test",
        "host.name": "box",
        "team": "a",
        "service.name": "shop",
    }
    assert resource["scopeSpans"][0]["scope"] == {"name": "llm_router", "version": "1.2.3"}
    assert "s3cret" not in repr(at_work.exporter)


def test_spans_are_encoded_as_the_protocol_says() -> None:
    root = Span(
        name="POST /x", span_id=ROOT, parent_id="1" * 16, kind="server", start_ns=1_700_000_000_000_000_001, end_ns=2,
        error="gone", attributes={"text": "a", "whole": 5, "real": 0.5, "yes": True, "endless": float("inf")},
    )  # fmt: skip
    child = Span(name="chat m", span_id="2" * 16, parent_id=ROOT, kind="client", start_ns=1, end_ns=2)
    whole = Trace(
        trace_id=TRACE,
        request_id="r",
        kept="sampled",
        parent_id="1" * 16,
        tracestate="a=1",
        status=502,
        spans=(root, child),
    )
    first, second = json.loads(encode([whole], {}, {}))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert first == {
        "traceId": TRACE,
        "spanId": ROOT,
        "parentSpanId": "1" * 16,
        "traceState": "a=1",
        "flags": 0x301,
        "name": "POST /x",
        "kind": 2,
        "startTimeUnixNano": "1700000000000000001",
        "endTimeUnixNano": "2",
        "attributes": [
            {"key": "text", "value": {"stringValue": "a"}},
            {"key": "whole", "value": {"intValue": "5"}},
            {"key": "real", "value": {"doubleValue": 0.5}},
            {"key": "yes", "value": {"boolValue": True}},
            {"key": "endless", "value": {"doubleValue": "inf"}},
        ],
        "status": {"code": 2, "message": "gone"},
    }
    assert (second["kind"], second["flags"], second["parentSpanId"]) == (3, 0x101, ROOT)
    assert "status" not in second


def test_what_a_caller_did_wrong_is_no_error_of_the_server() -> None:
    refused = trace(status=404)
    failed = msgspec.structs.replace(refused.spans[0], error="there is no such model")
    (span,) = json.loads(encode([msgspec.structs.replace(refused, spans=(failed,))], {}, {}))["resourceSpans"][0][
        "scopeSpans"
    ][0]["spans"]
    assert "status" not in span
    assert span["flags"] == 0x100


def test_what_is_kept_for_being_recent_stays_here(collector: Collector) -> None:
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace("stays", kept="recent"))
        at_work.exporter.submit(trace("goes"))
    assert collector.names == ["goes"]


def test_one_connection_serves_all_batches_and_a_batch_is_bounded(collector: Collector) -> None:
    with exporting(collector.url, batch=4) as at_work:
        for number in range(6):
            at_work.exporter.submit(trace(f"t{number}", spans=3))
        at_work.exporter.submit(trace("large", spans=9))
        at_work.settled()
    assert [len(export.spans) for export in collector.exports] == [3] * 6 + [9]
    assert collector.connections == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504, 0])
def test_what_may_pass_is_tried_again_later_each_time(
    collector: Collector, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.WARNING, logger="llm_router")
    collector.answers.extend([Said(status, body=b"busy")] * 3)
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        waits = at_work.waits.seconds
        assert len(waits) == 3
        assert all(low <= wait <= 2 * low for wait, low in zip(waits, (0.5, 1.0, 2.0), strict=True))
        assert at_work.exporter.statistics().sent == 1
        assert at_work.exporter.statistics().problem == ""
        assert at_work.lost == {}
    assert collector.names == ["POST /x"] * 4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # once that it fails, once that it goes again
    assert "do not reach" in lines[0]
    assert "again" in lines[1]


@pytest.mark.parametrize(("said", "seconds"), [("7", 7.0), ("Tue, 14 Nov 2023 22:13:29 GMT", 9.0), ("0", 0.0)])
def test_a_collector_that_says_when_to_come_back_is_asked_then(collector: Collector, said: str, seconds: float) -> None:
    collector.answers.append(Said(429, {"retry-after": said}))
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert at_work.waits.seconds == [seconds]


def test_a_batch_is_given_up_after_a_minute_and_the_next_one_goes(collector: Collector) -> None:
    collector.answers.extend([Said(503)] * 50)
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace(spans=3))
        at_work.settled()
        assert at_work.lost == {"export-failed": 3}
        assert sum(at_work.waits.seconds) <= 60
        assert max(at_work.waits.seconds) <= 30
        assert at_work.exporter.statistics().problem.startswith("it answered 503")
        collector.answers.clear()
        at_work.exporter.submit(trace("next"))
        at_work.settled()
        assert at_work.exporter.statistics().problem == ""
    assert collector.names[-1] == "next"


def test_a_wait_of_hours_is_not_begun(collector: Collector) -> None:
    collector.answers.append(Said(503, {"retry-after": "7200"}))
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert at_work.lost == {"export-failed": 1}
        assert at_work.waits.seconds == []


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 301])
def test_what_will_not_pass_is_refused_at_once_and_said(
    collector: Collector, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.WARNING, logger="llm_router")
    collector.answers.append(Said(status, body=b"key sk-abcdefghijklmnop is wrong\x1b[2J"))
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace(spans=2))
        at_work.settled()
        assert at_work.lost == {"export-refused": 2}
        assert at_work.waits.seconds == []
    (line,) = (record.getMessage() for record in caplog.records)
    assert str(status) in line
    assert "sk-abc" not in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("status", "body"), [(401, b"no: %s"), (200, b'{"partialSuccess":{"rejectedSpans":1,"errorMessage":"no: %s"}}')]
)
def test_what_a_collector_quotes_of_our_credentials_is_not_said(
    collector: Collector, caplog: pytest.LogCaptureFixture, status: int, body: bytes
) -> None:
    """Of the headers, and of the address."""
    caplog.set_level(logging.WARNING, logger="llm_router")
    collector.answers.append(Said(status, body=body % b"Bearer plain-words-1, plain-words-1, ?key=plain-words-2"))
    endpoint = f"{collector.url}?key=plain-words-2"
    with exporting(endpoint, headers={"authorization": "Bearer plain-words-1", "x-team": "a"}) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert "plain-words" not in at_work.exporter.statistics().problem
    assert "no: " in caplog.text
    assert "plain-words" not in caplog.text


def test_what_a_collector_rejects_of_a_batch_is_counted_and_not_sent_again(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="llm_router")
    collector.answers.append(Said(200, body=b'{"partialSuccess":{"rejectedSpans":"2","errorMessage":"too old"}}'))
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace(spans=3))
        at_work.settled()
        assert at_work.lost == {"export-refused": 2}
        assert at_work.exporter.statistics().sent == 1
    assert len(collector.exports) == 1
    assert "too old" in caplog.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"partialSuccess":null}', b'{"partialSuccess":{}}', b"\x00\x01", b'{"partialSuccess":7}', b"[]"],
)
def test_any_other_200_took_everything(collector: Collector, body: bytes) -> None:
    collector.answers.append(Said(200, body=body))
    with exporting(collector.url) as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert at_work.lost == {}
        assert at_work.exporter.statistics().sent == 1


def test_a_connection_that_was_closed_while_idle_is_opened_again_without_a_wait(collector: Collector) -> None:
    with exporting(collector.url) as at_work:
        collector.answers.append(Said(200, {"connection": "close"}))
        at_work.exporter.submit(trace("one"))
        at_work.settled()
        at_work.exporter.submit(trace("two"))
        at_work.settled()
        collector.answers.append(Said(0))  # the kept connection is cut, the next one answers
        at_work.exporter.submit(trace("three"))
        at_work.settled()
        assert at_work.waits.seconds == []
        assert at_work.lost == {}
    assert collector.names == ["one", "two", "three", "three"]


def test_nobody_waits_for_a_full_queue(collector: Collector) -> None:
    held = threading.Event()
    collector.answers.append(Said(200, held=held))
    with exporting(collector.url, batch=2, queue_spans=4) as at_work:
        at_work.exporter.submit(trace(spans=2))
        until(lambda: collector.exports, what="the first batch")
        for _ in range(3):
            at_work.exporter.submit(trace(spans=2))
        assert at_work.lost == {"queue-full": 2}
        assert at_work.exporter.statistics().waiting == 6
        held.set()
        at_work.settled()
        assert at_work.exporter.statistics().sent == 6


def test_what_waits_is_sent_at_the_end(collector: Collector) -> None:
    at_work = Exporting(collector.url, batch=2)
    for number in range(5):
        at_work.exporter.submit(trace(f"t{number}"))
    at_work.exporter.start()
    run(at_work.exporter.aclose(5.0))
    assert sorted(collector.names) == ["t0", "t1", "t2", "t3", "t4"]
    assert at_work.lost == {}
    at_work.exporter.submit(trace())
    assert at_work.lost == {"queue-full": 1}


def test_the_end_does_not_wait_for_a_collector_that_does_not_answer(collector: Collector) -> None:
    held = threading.Event()
    collector.answers.append(Said(200, held=held))
    at_work = Exporting(collector.url, batch=1)
    at_work.exporter.start()
    try:
        at_work.exporter.submit(trace(spans=2))
        until(lambda: collector.exports, what="the batch")
        at_work.exporter.submit(trace(spans=3))
        at_work.exporter.close(0.05)
        assert at_work.lost == {"export-failed": 5}
        assert at_work.exporter.statistics().waiting == 0
        until(lambda: not at_work.exporter.thread.is_alive(), what="the end of the thread")
        assert at_work.exporter.statistics().sent == 0
    finally:
        held.set()


def test_an_exporter_that_never_started_counts_what_it_holds() -> None:
    at_work = Exporting("http://127.0.0.1:1/v1/traces")
    at_work.exporter.submit(trace(spans=2))
    at_work.exporter.close()
    assert at_work.lost == {"export-failed": 2}


def test_a_collector_that_is_not_there_or_no_http_server_is_named() -> None:
    port = free_port()
    with exporting(f"http://127.0.0.1:{port}/v1/traces") as at_work:
        at_work.exporter.submit(trace())
        at_work.settled()
        assert at_work.exporter.statistics().problem == "no connection (Connection refused)"
        assert at_work.lost == {"export-failed": 1}


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "ftp://c/", "http://", "http://c:70000", "http://[::1"])
def test_an_endpoint_that_is_none_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Exporting(endpoint)
    assert caught.value.key == "tracing.endpoint"
