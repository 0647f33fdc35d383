"""The small load generator: what it sends, and that its figures are right."""

from __future__ import annotations

from typing import Any

import pytest

from llm_router.cli.bench import Sample, measure, quantile, report
from llm_router.testing import ScriptedBackend, json_reply
from support.aio import run

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}}


def samples(backend: ScriptedBackend, body: dict[str, Any], requests: int = 6, concurrency: int = 2) -> list[Sample]:
    return run(measure(backend.url, body, requests=requests, concurrency=concurrency, api_key="k"))


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
def test_every_request_is_sent_and_its_tokens_counted(body: dict[str, Any]) -> None:
    """Over as many connections as requests at a time."""
    with ScriptedBackend() as backend:
        seen = samples(backend, body)
        assert len(backend.requests) == 6
        assert len(backend.connections) <= 2
        assert backend.requests[0].headers["authorization"] == "Bearer k"
    assert [sample.error for sample in seen] == [""] * 6
    assert {sample.output_tokens for sample in seen} == {6}
    assert all(0 < sample.first_s <= sample.total_s for sample in seen)


def test_the_first_token_of_a_stream_comes_before_its_end() -> None:
    """Paced events show it."""
    with ScriptedBackend(pace_s=0.02) as backend:
        (sample,) = samples(backend, STREAM, requests=1)
    assert sample.first_s < sample.total_s - 0.04


def test_failures_are_counted_by_what_was_said() -> None:
    """Status and message, or that nobody answers."""
    with ScriptedBackend() as backend:
        backend.always(json_reply({"error": {"message": "busy"}}, 503))
        assert {sample.error for sample in samples(backend, BODY)} == {"status 503: busy"}
        url = backend.url
    (sample,) = run(measure(url, BODY, requests=1, concurrency=1, api_key=""))
    assert "connect" in sample.error


def test_the_report_holds_the_figures() -> None:
    """Of the requests that succeeded; failures with their number."""
    good = [Sample(total_s=0.01 * n, first_s=0.001 * n, output_tokens=5) for n in range(1, 101)]
    lines = report([*good, Sample(0.0, error="status 503: busy")], 2.0, stream=True)
    assert lines == [
        "101 requests in 2.00 s, 1 failed",
        "requests/s                  50.0",
        "latency p50                500.0 ms",
        "latency p99                990.0 ms",
        "first token p50             50.0 ms",
        "first token p99             99.0 ms",
        "output tokens/s            250.0",
        "1 x status 503: busy",
    ]


def test_quantiles_are_values_that_were_seen() -> None:
    """The smallest that the share does not exceed."""
    values = [1.0, 2.0, 3.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1.0, 1.0, 2.0, 3.0, 4.0, 4.0]
