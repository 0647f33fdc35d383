"""What a request leaves behind: the trace it belongs to, where its time went, and what came and went over the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from llm_router.accounts.limits import Limits, Subject
from llm_router.cache.base import CacheSettings
from llm_router.signals import RequestRecord
from llm_router.testing import ScriptedBackend, json_reply, reply
from support.gateway import Gateway, table

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as server:
        yield server


def told(backend: ScriptedBackend) -> list[tuple[str, str]]:
    """traceparent and tracestate of every request that the backend got."""
    return [
        (request.headers.get("traceparent", ""), request.headers.get("tracestate", "")) for request in backend.requests
    ]


def test_a_request_without_a_trace_begins_one_and_tells_the_backend(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url), traces=1.0) as gateway:
        gateway.chat()
        record = gateway.record()
    assert re.fullmatch("[0-9a-f]{32}", record.trace_id)
    assert re.fullmatch("[0-9a-f]{16}", record.span_id)
    assert (record.parent_id, record.is_sampled, record.has_bad_trace) == ("", True, False)
    span = record.attempts[0].span_id
    assert span not in ("", record.span_id)
    assert told(backend) == [(f"00-{record.trace_id}-{span}-01", "")]


def test_a_callers_trace_goes_on(backend: ScriptedBackend) -> None:
    """Its decision to sample too, whatever our own ratio is; the backend's parent is the attempt, not the caller."""
    with Gateway(table(backend.base_url)) as gateway:
        gateway.chat(headers={"traceparent": TRACEPARENT, "tracestate": "vendor=1, other=2"})
        record = gateway.record()
    assert (record.trace_id, record.parent_id, record.is_sampled) == (TRACE, PARENT, True)
    assert told(backend) == [(f"00-{TRACE}-{record.attempts[0].span_id}-01", "vendor=1,other=2")]


def test_what_is_no_traceparent_begins_a_new_trace(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        gateway.chat(headers={"traceparent": TRACEPARENT.upper(), "tracestate": "vendor=1"})
        record = gateway.record()
    assert record.has_bad_trace
    assert record.trace_id not in ("", TRACE)
    assert told(backend)[0][0].split("-")[1] == record.trace_id
    assert told(backend)[0][1] == ""


def test_without_tracing_a_callers_trace_passes_as_it_came(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url), traces=-1.0) as gateway:
        gateway.chat(headers={"traceparent": TRACEPARENT, "tracestate": "vendor=1"})
        gateway.chat(headers={"traceparent": "nonsense"})
        gateway.chat()
        records = gateway.records(3)
    assert told(backend) == [(TRACEPARENT, "vendor=1"), ("", ""), ("", "")]
    assert [record.span_id for record in records] == ["", "", ""]


def test_every_attempt_is_a_span_of_its_own(backend: ScriptedBackend) -> None:
    with ScriptedBackend() as broken:
        broken.always(reply(b"{}", 500))
        with Gateway(table(broken.base_url, backend.base_url), traces=1.0) as gateway:
            gateway.chat()
            record = gateway.record()
        first, second = record.attempts
    assert first.span_id != second.span_id
    assert (first.status, second.status) == (500, 200)
    assert (first.upstream_model, second.upstream_model) == ("scripted", "scripted")
    assert [parent.split("-")[2] for parent, _ in told(broken) + told(backend)] == [first.span_id, second.span_id]


def steps(record: RequestRecord) -> list[float]:
    """The instants of a request in the order in which they should be; those that it did not come to are left out."""
    attempt = record.attempts[0]
    instants = [
        record.started_at,
        record.begun_at,
        record.identified_at,
        record.allowed_at,
        record.looked_up_at,
        record.queued_at,
        record.slot_at,
        record.routed_at,
        attempt.started_at,
        record.first_token_at,
        attempt.ended_at,
    ]
    return [instant for instant in instants if instant]


def test_the_steps_of_a_request_have_their_instants_in_order(backend: ScriptedBackend) -> None:
    with Gateway(
        table(backend.base_url),
        keys={"sk-one": "one"},
        limits={Subject("key", "key-one"): Limits(requests_per_minute=100)},
        cache=CacheSettings(enabled=True),
    ) as gateway:
        gateway.chat(headers={"authorization": "Bearer sk-one"}, temperature=0)
        record = gateway.record()
    assert len(steps(record)) == 10  # all but the first token of a stream
    assert steps(record) == sorted(steps(record))


def test_server_timing_is_told_to_who_asks(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        asked = gateway.chat(headers={"x-llm-router-timing": "on"})
        other = gateway.chat()
        wrong = gateway.chat("nobody", headers={"x-llm-router-timing": "on"})
    timing = dict(part.split(";dur=") for part in asked.headers["server-timing"].split(", "))
    assert list(timing) == ["receive", "auth", "queue", "route", "upstream", "total"]
    assert 0 < float(timing["upstream"]) < float(timing["total"])
    assert "server-timing" not in other.headers
    assert wrong.headers["server-timing"].startswith("receive;dur=")


def test_a_record_tells_what_came_and_what_went(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        answer = gateway.request(
            "POST",
            "/v1/chat/completions?debug=1",
            {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
            user_agent="tests/1",
        )
        record = gateway.record()
    assert (record.method, record.path, record.query) == ("POST", "/v1/chat/completions", "debug=1")
    assert record.headers[b"user-agent"] == b"tests/1"
    assert record.client.startswith("127.0.0.1:")
    assert (record.response_type, record.response_bytes) == (b"application/json", len(answer.body))
    assert (record.request_body, record.response_body) == (None, None)


def test_a_stream_counts_every_byte_that_went(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        answer = gateway.chat(stream=True)
        record = gateway.record()
    assert record.response_type.startswith(b"text/event-stream")
    assert record.response_bytes == len(answer.body)


def test_errors_say_in_the_record_what_callers_read(backend: ScriptedBackend) -> None:
    """One of ours, one of the backend's, and one that never became a request."""
    backend.always(json_reply({"error": {"message": "no such tool"}}, 400))
    with Gateway(table(backend.base_url)) as gateway:
        unknown = gateway.chat("nobody")
        refused = gateway.chat()
        malformed = gateway.request("POST", "/v1/chat/completions", b"{}", transfer_encoding="nonsense")
        records = gateway.records(3)
    assert records[0].error == unknown.json()["error"]["message"]
    assert records[0].response_bytes == len(unknown.body)
    assert records[1].error == "no such tool" == refused.json()["error"]["message"]
    assert records[2].error == malformed.json()["error"]["message"]
    assert records[2].client.startswith("127.0.0.1:")


@pytest.mark.parametrize("stream", [False, True])
def test_content_is_kept_only_where_it_is_wanted(backend: ScriptedBackend, stream: bool) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        gateway.chat(stream=stream)
        gateway.call(lambda: gateway.core.keep_content(True))
        answer = gateway.chat(stream=stream)
        before, after = gateway.records(2)
    assert (before.request_body, before.response_body) == (None, None)
    assert after.request_body is not None
    assert b"one two three" in after.request_body
    assert bytes(after.response_body or b"") == answer.body
