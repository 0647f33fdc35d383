"""Traces made of records: which spans there are, where they begin and end, and what they tell."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.tracing.spans import TEXT_CHARS, Server, trace_of
from llm_router.observe.tracing.trace import Span, Trace
from llm_router.signals import OTHER, Attempt, RequestRecord

TRACE, ROOT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OFFSET = 1_700_000_000.0
SERVERS = {"azure-1": Server("azure", "example.openai.azure.com", 443)}


def begun(route: str = "/v1/chat/completions", method: str = "POST", **fields: Any) -> RequestRecord:
    record = RequestRecord(method, route, "req-1", 100.0)
    record.trace_id, record.span_id, record.kept = TRACE, ROOT, "sampled"
    record.path = route
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def inference(**fields: Any) -> RequestRecord:
    """A plain chat that went well: 100.000 to 100.500."""
    record = begun(
        is_inference=True, model="gpt", strategy="balanced", reason="only-deployment", status=200, outcome="success",
        begun_at=100.0001, identified_at=100.001, allowed_at=100.002, looked_up_at=100.003, cache_type="memory",
        queued_at=100.004, slot_at=100.104, routed_at=100.105, input_tokens=7, output_tokens=3, usage_source="provider",
    )  # fmt: skip
    record.attempts.append(attempt(100.106, 100.4))
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def attempt(
    start: float, end: float, *, backend: str = "azure-1", outcome: str = "success", status: int = 200, id: str = "a"
) -> Attempt:
    made = Attempt(backend, start, id * 16, "gpt-4o")
    made.ended_at, made.outcome, made.status = end, outcome, status
    return made


def made(record: RequestRecord, ended_at: float = 100.5, **options: Any) -> Trace:
    return trace_of(record, ended_at, wall_offset_s=OFFSET, process="worker-0", servers=SERVERS, **options)


def times(trace: Trace) -> list[tuple[str, float, float]]:
    """Name, begin and end of each span, in milliseconds since the request began."""
    return [
        (span.name, (span.start_ns - trace.start_ns) / 1e6, (span.end_ns - trace.start_ns) / 1e6)
        for span in trace.spans
    ]


def span(trace: Trace, name: str) -> Span:
    (found,) = [span for span in trace.spans if span.name == name]
    return found


def test_an_inference_has_a_span_for_each_step_in_order() -> None:
    trace = made(inference())
    assert times(trace) == [
        ("POST /v1/chat/completions", 0.0, 500.0),
        ("auth", 0.1, 1.0),
        ("limits", 1.0, 2.0),
        ("cache", 2.0, 3.0),
        ("queue", 4.0, 104.0),
        ("route", 104.0, 105.0),
        ("chat gpt-4o", 106.0, 400.0),
    ]
    assert trace.start_ns == 1_700_000_100 * 10**9
    assert trace.duration_s == 0.5
    root, *steps = trace.spans
    assert (root.kind, root.span_id, root.parent_id, root.error) == ("server", ROOT, "", "")
    assert {step.parent_id for step in steps} == {ROOT}
    assert [step.kind for step in steps] == ["internal"] * 5 + ["client"]
    assert steps[-1].span_id == "a" * 16
    assert len({each.span_id for each in trace.spans}) == len(trace.spans)
    assert all(re.fullmatch("[0-9a-f]{16}", each.span_id) for each in trace.spans)


def test_only_steps_that_happened_have_spans() -> None:
    record = begun("/health/live", "GET", status=200, outcome="success")
    assert times(made(record)) == [("GET /health/live", 0.0, 500.0)]
    unhindered = inference(looked_up_at=0.0, slot_at=100.004, allowed_at=0.0)
    assert [each.name for each in made(unhindered).spans[1:]] == ["auth", "route", "chat gpt-4o"]
    slow_upload = inference(begun_at=100.0009 + 0.0001)
    assert times(made(slow_upload))[1] == ("receive", 0.0, 1.0)


def test_a_stream_has_the_wait_for_its_first_token_and_the_rest_under_the_attempt() -> None:
    trace = made(inference(first_token_at=100.2))
    assert times(trace)[-3:] == [
        ("chat gpt-4o", 106.0, 400.0),
        ("first token", 106.0, 200.0),
        ("stream", 200.0, 400.0),
    ]
    assert {each.parent_id for each in trace.spans[-2:]} == {"a" * 16}
    attributes = span(trace, "chat gpt-4o").attributes
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["gen_ai.response.time_to_first_chunk"] == 0.094


def test_every_attempt_has_a_client_span_with_its_own_id_and_error() -> None:
    record = inference(retry_reasons=(("gpt", "timeout"),), fallback_reasons=(("gpt", "overloaded"),))
    record.attempts[:] = [
        attempt(100.106, 100.15, backend="b1", outcome="network", status=0, id="1"),
        attempt(100.16, 100.2, backend="b2", outcome="provider", status=503, id="2"),
        attempt(100.21, 100.4, id="3"),
    ]
    trace = made(record)
    first, second, third = [each for each in trace.spans if each.kind == "client"]
    assert [each.span_id[0] for each in (first, second, third)] == ["1", "2", "3"]
    assert (first.error, first.attributes["error.type"]) == ("network", "network")
    assert (second.error, second.attributes["error.type"]) == ("503", "503")
    assert third.error == ""
    assert "error.type" not in third.attributes
    assert [each.attributes["llm_router.attempt"] for each in (first, second, third)] == [1, 2, 3]
    root = trace.spans[0].attributes
    assert root["llm_router.attempts"] == 3
    assert root["llm_router.retries"] == "gpt: timeout"
    assert root["llm_router.fallbacks"] == "gpt: overloaded"
    assert trace.backend == "azure-1"
    assert "gen_ai.usage.input_tokens" not in first.attributes  # tokens are counted once, where they were used
    assert third.attributes["gen_ai.usage.input_tokens"] == 7


def test_attributes_follow_the_conventions() -> None:
    record = inference(
        query="api-version=1",
        client="10.0.0.1:5000",
        key="team-a",
        headers={
            b"host": b"router:3006",
            b"user-agent": b"OpenAI/Python 1.0",
            b"authorization": b"Bearer s3cret-s3cret",
        },
        cached_tokens=2,
        reasoning_tokens=1,
        cost_usd=0.25,
        cost_status="exact",
    )
    trace = made(record, scheme="https")
    assert trace.spans[0].attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.scheme": "https",
        "url.path": "/v1/chat/completions",
        "url.query": "api-version=1",
        "http.response.status_code": 200,
        "client.address": "10.0.0.1",
        "client.port": 5000,
        "server.address": "router",
        "server.port": 3006,
        "user_agent.original": "OpenAI/Python 1.0",
        "llm_router.request_id": "req-1",
        "llm_router.process": "worker-0",
        "llm_router.kept": "sampled",
        "llm_router.key": "team-a",
        "llm_router.model": "gpt",
        "llm_router.strategy": "balanced",
        "llm_router.outcome": "success",
        "llm_router.cached": False,
        "llm_router.attempts": 1,
        "llm_router.reason": "only-deployment",
        "llm_router.backend": "azure-1",
        "llm_router.cost_usd": 0.25,
    }
    assert span(trace, "chat gpt-4o").attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "azure.ai.openai",
        "gen_ai.request.model": "gpt-4o",
        "llm_router.backend": "azure-1",
        "llm_router.attempt": 1,
        "llm_router.outcome": "success",
        "server.address": "example.openai.azure.com",
        "server.port": 443,
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "llm_router.usage_source": "provider",
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 1,
    }
    assert span(trace, "cache").attributes == {"llm_router.cache": "memory", "llm_router.cached": False}
    assert span(trace, "route").attributes == {
        "llm_router.strategy": "balanced",
        "llm_router.reason": "only-deployment",
    }
    assert (trace.model, trace.key, trace.status, trace.outcome, trace.process) == (
        "gpt", "team-a", 200, "success", "worker-0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("route", "name"),
    [
        ("/v1/chat/completions", "chat gpt-4o"),
        ("/v1/messages", "chat gpt-4o"),
        ("/api/generate", "chat gpt-4o"),
        ("/v1/completions", "text_completion gpt-4o"),
        ("/v1/embeddings", "embeddings gpt-4o"),
    ],
)
def test_the_operation_follows_from_the_route(route: str, name: str) -> None:
    record = inference()
    record.route = route
    assert made(record).spans[-1].name == name


def test_a_method_or_route_that_is_none_does_not_become_a_name() -> None:
    trace = made(begun(OTHER, "BREW", status=404, error_type="not_found", path="/teapot"))
    root = trace.spans[0]
    assert root.name == "HTTP"
    assert root.attributes["http.request.method"] == "_OTHER"
    assert root.attributes["http.request.method_original"] == "BREW"
    assert "http.route" not in root.attributes
    assert trace.method == "_OTHER"


def test_a_cached_answer_has_no_attempt_and_no_tokens() -> None:
    record = inference(cached=True, queued_at=0.0, slot_at=0.0, routed_at=0.0)
    record.attempts.clear()
    trace = made(record)
    assert [each.name for each in trace.spans[1:]] == ["auth", "limits", "cache"]
    assert span(trace, "cache").attributes["llm_router.cached"] is True
    assert not any(name.startswith("gen_ai") for each in trace.spans for name in each.attributes)


def test_a_refusal_by_a_limit_shows_where_it_ended_and_which_limit_it_was() -> None:
    record = begun(
        is_inference=True, status=429, error_type="limit", error="key 'a': 5 requests a minute", identified_at=100.001,
        limit_hit=("key", "requests_per_minute"), begun_at=100.0,
    )  # fmt: skip
    trace = made(record)
    assert times(trace)[1:] == [("auth", 0.0, 1.0), ("limits", 1.0, 500.0)]
    limits = span(trace, "limits")
    assert limits.error == "key 'a': 5 requests a minute"
    assert limits.attributes == {"llm_router.limit.scope": "key", "llm_router.limit.name": "requests_per_minute"}
    assert trace.spans[0].error == limits.error
    assert trace.spans[0].attributes["error.type"] == "limit"


def test_a_refused_key_shows_the_step_in_which_it_was_refused() -> None:
    record = begun(status=401, error_type="unauthorized", error="unknown key", begun_at=100.0)
    assert times(made(record))[1:] == [("auth", 0.0, 500.0)]
    assert span(made(record), "auth").error == "unknown key"


def test_a_turn_that_never_came_is_a_failed_wait() -> None:
    record = inference(
        slot_at=0.0, routed_at=0.0, status=408, error_type="queue_timeout", outcome="error", error="late"
    )
    record.attempts.clear()
    trace = made(record)
    assert times(trace)[-1] == ("queue", 4.0, 500.0)
    assert span(trace, "queue").error == "late"


def test_waits_that_were_given_up_lie_where_nothing_else_happened() -> None:
    """Only how long they took is known: before the attempts, or between those of two other models."""
    before = inference(waits=(("busy", 0.05),), queued_at=100.053, slot_at=100.104)
    assert times(made(before))[4:6] == [("queue", 3.0, 53.0), ("queue", 53.0, 104.0)]
    between = inference(waits=(("busy", 0.05),), queued_at=100.2, slot_at=100.2, routed_at=100.005)
    between.attempts[:] = [attempt(100.006, 100.1, outcome="provider", id="1"), attempt(100.2, 100.4, id="2")]
    found = [each for each in times(made(between)) if each[0] == "queue"]
    assert found == [("queue", 100.0, 150.0)]
    assert span(made(between), "queue").attributes == {"llm_router.model": "busy"}


def test_a_stream_that_broke_is_an_error_of_request_and_attempt() -> None:
    record = inference(
        outcome="error", error_type="unreachable", error="backend 'azure-1' went away", first_token_at=100.2
    )
    record.attempts[0].outcome = "network"
    trace = made(record)
    assert trace.spans[0].error == "backend 'azure-1' went away"
    client = span(trace, "chat gpt-4o")
    assert client.error == "backend 'azure-1' went away"
    assert client.attributes["error.type"] == "unreachable"


def test_a_client_that_left_is_no_error_of_the_attempt() -> None:
    record = inference(status=499, outcome="cancelled", error_type="client_gone")
    record.attempts[0].outcome, record.attempts[0].ended_at = "", 0.0
    trace = made(record)
    client = span(trace, "chat gpt-4o")
    assert (client.error, client.attributes["llm_router.outcome"]) == ("", "cancelled")
    assert client.end_ns == trace.end_ns
    assert trace.spans[0].error == "client_gone"


SECRETS = ["sk-ant-api03-abcdefghijklmnop", "AIzaSyA1234567890abcdefghij", "hunter2hunter2"]


def test_no_secret_of_a_caller_or_backend_gets_into_a_trace() -> None:
    one, two, three = SECRETS
    record = inference(
        path=f"/v1/chat/completions/{one}",
        query=f"api_key={three}&key={two}",
        headers={b"authorization": f"Bearer {one}".encode(), b"user-agent": f"x {one}".encode(), b"cookie": three.encode()},
        error_type="rejected",
        error=f"it said: Incorrect API key provided: {one}",
        outcome="error",
        request_body=f'{{"messages":[{{"role":"user","content":"my key is {one}, password={three}"}}]}}'.encode(),
        response_body=f'{{"choices":[{{"message":{{"content":"your key is {two}"}}}}]}}'.encode(),
    )  # fmt: skip
    record.attempts[0].outcome = "caller"
    trace = made(record, content=True)
    shown = msgspec.json.encode(trace).decode()
    assert "gen_ai.input.messages" in shown
    for secret in SECRETS:
        assert secret not in shown


def test_texts_are_bounded_and_can_be_printed() -> None:
    record = inference(path="/" + "x" * 50_000, error="\x1b[31mred\n" + "y" * 50_000, error_type="internal", status=500)
    root = made(record).spans[0]
    assert len(str(root.attributes["url.path"])) < TEXT_CHARS + 100
    assert len(root.error) < TEXT_CHARS + 100
    assert "\x1b" not in root.error


def test_content_is_there_only_where_it_is_asked_for() -> None:
    record = inference(request_body=b'{"messages":[{"role":"user","content":"hi"}]}', response_body=b"")
    assert "gen_ai.input.messages" not in span(made(record), "chat gpt-4o").attributes
    asked = span(made(record, content=True), "chat gpt-4o").attributes["gen_ai.input.messages"]
    assert asked == '[{"role":"user","parts":[{"type":"text","content":"hi"}]}]'
    record.request_body = None
    assert "gen_ai.input.messages" not in span(made(record, content=True), "chat gpt-4o").attributes


def test_the_same_record_gives_the_same_trace() -> None:
    record = inference(first_token_at=100.2)
    assert made(record) == made(record)


@pytest.mark.parametrize(
    ("client", "address", "port"),
    [
        ("10.0.0.1:5000", "10.0.0.1", 5000),
        ("::1:5000", "::1", 5000),
        ("[::1]:5000", "::1", 5000),
        ("[::1]", "::1", None),
        ("unix", "unix", None),
    ],
)
def test_addresses_of_clients(client: str, address: str, port: int | None) -> None:
    attributes = made(begun(client=client)).spans[0].attributes
    assert (attributes["client.address"], attributes.get("client.port")) == (address, port)


INSTANT = st.one_of(st.just(0.0), st.floats(50.0, 150.0))
INSTANTS = (
    "begun_at", "identified_at", "allowed_at", "looked_up_at", "routed_at", "queued_at", "slot_at", "first_token_at",
)  # fmt: skip


@given(
    st.fixed_dictionaries(dict.fromkeys(INSTANTS, INSTANT)),
    st.lists(st.tuples(INSTANT, INSTANT), max_size=4),
    st.lists(st.tuples(st.just("m"), st.floats(0.0, 100.0)), max_size=3),
    INSTANT,
)
def test_whatever_the_instants_are_spans_lie_within_their_request_and_in_order(
    instants: dict[str, float], attempts: list[tuple[float, float]], waits: list[tuple[str, float]], ended_at: float
) -> None:
    record = inference(**instants, waits=tuple(waits))
    record.attempts[:] = [attempt(start, end, id="") for start, end in attempts]
    trace = made(record, ended_at)
    root, *steps = trace.spans
    assert root.start_ns <= root.end_ns
    for step in steps:
        assert root.start_ns <= step.start_ns <= step.end_ns <= root.end_ns
    assert [step.start_ns for step in steps] == sorted(step.start_ns for step in steps)
    assert len({each.span_id for each in trace.spans}) == len(trace.spans)
    ids = {each.span_id for each in trace.spans}
    assert all(step.parent_id in ids for step in steps)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(trace), type=Trace) == trace
