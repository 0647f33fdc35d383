"""Our exporter with a real collector: rotel, whose log shows every span as it understood it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_router.observe.tracing import names
from llm_router.observe.tracing.otlp import OtlpExporter
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.spans import Server, trace_of
from llm_router.observe.tracing.trace import Trace
from llm_router.signals import Attempt, RequestRecord
from support.net import free_port
from support.rotel import collecting
from support.wait import until

TRACE, ROOT, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "b7ad6b7169203331"


def made() -> Trace:
    """A stream that came after a failed attempt."""
    record = RequestRecord("POST", "/v1/chat/completions", "req-1", 100.0)
    record.trace_id, record.span_id, record.parent_id, record.kept = TRACE, ROOT, PARENT, "error"
    record.tracestate = "congo=t61rcWkgMzE"
    record.path = "/v1/chat/completions"
    record.is_inference, record.status, record.model = True, 200, "gpt"
    record.outcome, record.error_type, record.error = (
        "error",
        "unreachable",
        "backend 'b' went away: ünïcode \"quoted\"",
    )
    record.begun_at, record.identified_at, record.queued_at, record.slot_at, record.routed_at = (
        100.0,
        100.1,
        100.1,
        100.2,
        100.21,
    )
    record.first_token_at, record.input_tokens, record.output_tokens, record.usage_source = 100.5, 7, 3, "partial"
    for backend, start, end, outcome, status in (
        ("a", 100.21, 100.3, "provider", 503),
        ("b", 100.3, 101.0, "network", 200),
    ):
        attempt = Attempt(backend, start, backend * 16, "gpt-4o")
        attempt.ended_at, attempt.outcome, attempt.status = end, outcome, status
        record.attempts.append(attempt)
    servers = {"b": Server("azure", "example.openai.azure.com", 443)}
    return trace_of(record, 101.0, wall_offset_s=1_700_000_000.0, process="worker-0", servers=servers)


def exporter(url: str) -> OtlpExporter:
    settings = TracingSettings(endpoint=url, resource={"team": "a"})
    return OtlpExporter(settings, version="1.2.3")


def test_a_real_collector_understands_every_span(tmp_path: Path) -> None:
    trace = made()
    with collecting(tmp_path, free_port()) as rotel:
        exporting = exporter(rotel.url)
        exporting.start()
        exporting.submit(trace)
        exporting.close(10.0)
        assert not any(exporting.statistics().dropped.values())
        assert exporting.statistics().sent == len(trace.spans)
        root = rotel.span("POST /v1/chat/completions")
        assert f"Trace ID       : {TRACE}" in root
        assert f"Parent ID      : {PARENT}" in root
        assert f"ID             : {ROOT}" in root
        assert "SPAN_KIND_SERVER" in root
        assert "Start time: 1700000100000000000" in root
        assert "End time: 1700000101000000000" in root
        assert "STATUS_CODE_ERROR" in root
        assert "backend 'b' went away: ünïcode \"quoted\"" in root
        assert "http.response.status_code: Int(200)" in root
        client = rotel.text()[rotel.text().index(f"ID             : {'b' * 16}") :]
        assert f"Name           : chat gpt-4o\n    Kind           : {'SPAN_KIND_CLIENT'}" in client
        assert "gen_ai.provider.name: Str(azure.ai.openai)" in client
        assert "gen_ai.request.stream: Bool(true)" in client
        assert "gen_ai.response.time_to_first_chunk: Double(0.2)" in client
        assert "gen_ai.usage.input_tokens: Int(7)" in client
        for name in ("queue", "route", "first token", "stream"):
            assert "SPAN_KIND_INTERNAL" in rotel.span(name)
        text = rotel.text()
        assert "service.name: Str(llm-router)" in text
        assert "team: Str(a)" in text
        assert f"ScopeSpans SchemaURL: {names.SCHEMA_URL}" in text
        assert text.count("    Trace ID       : ") == len(trace.spans)


@pytest.mark.slow
def test_traces_of_an_outage_arrive_when_the_collector_is_back(tmp_path: Path) -> None:
    port = free_port()
    exporting = exporter(f"http://127.0.0.1:{port}/v1/traces")
    exporting.start()
    try:
        exporting.submit(made())
        until(lambda: exporting.statistics().problem, what="the first failure")
        with collecting(tmp_path, port) as rotel:
            until(lambda: exporting.statistics().sent, timeout_s=30.0, what="the second attempt")
            rotel.span("POST /v1/chat/completions")
    finally:
        exporting.close(5.0)
    assert not any(exporting.statistics().dropped.values())
    assert exporting.statistics().problem == ""
