"""Traces of the running program: from a caller's header to the backend, the collector, `/debug` and the command line.

One program with two workers and a real collector serves most tests; each has models of its own. Where something is
said of one worker, all requests go over one connection. A program of its own has what is killed, away or switched off.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser

from llm_router.testing import Gate, Hold, Pause, ScriptedBackend, json_reply
from support.aio import run
from support.ask import send
from support.callers import Administrator, Reply, chat, crowd, request
from support.collector import Said, running
from support.debugging import Debug, command, line_of, lines
from support.net import free_port
from support.rotel import Rotel, collecting
from support.serving import Serving, remote_config
from support.wait import until

pytestmark = pytest.mark.slow

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SLOW_S = 0.2
TRACING = "sample_ratio: 0, slow: 200ms, recent_per_s: 0"
OK = json_reply({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 6}})
BROKEN = json_reply({"error": {"message": "oops"}}, 500)
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-(0[01])").fullmatch
EXPORTED = frozenset(("sampled", "error", "slow", "first"))

CONFIG = """
backends:
  - {name: plain, url: "%(plain)s"}
  - {name: frail, url: "%(frail)s"}
  - {name: held, url: "%(held)s"}
models:
  - {name: m, deployments: [{backend: plain, model: scripted}]}
  - {name: through, deployments: [{backend: plain, model: scripted}]}
  - {name: usual, deployments: [{backend: plain, model: scripted}]}
  - {name: listed, deployments: [{backend: plain, model: scripted}]}
  - {name: told, deployments: [{backend: plain, model: scripted}]}
  - {name: retried, deployments: [{backend: frail, model: scripted}], fallbacks: [m]}
  - {name: broken, deployments: [{backend: frail, model: scripted}]}
  - {name: slow, deployments: [{backend: held, model: scripted}]}
  - {name: queued, deployments: [{backend: held, model: scripted}], queue: {slots: 2, max_waiting: 20}}
%(models)s
routing:
  retry: {attempts: 2, backoff: 1ms}
  breaker: {enabled: false}
cache: {enabled: true}
tracing: {%(tracing)s}
"""


class World(NamedTuple):
    serving: Serving
    debug: Debug
    rotel: Rotel
    plain: ScriptedBackend
    frail: ScriptedBackend
    held: ScriptedBackend

    def chat(self, model: str, **more: Any) -> Reply:
        return chat(self.serving.port, model=model, **more)

    def kept(self) -> dict[str, float]:
        """How many traces were kept so far, by why."""
        scrape = self.serving.scrape()
        return {reason: scrape.total("llm_router_traces_kept_total", reason=reason) for reason in (*EXPORTED, "recent")}

    @contextlib.contextmanager
    def configured(self, tracing: str, *, model: str) -> Iterator[http.client.HTTPConnection]:
        """A connection to a worker that has these settings, and a further model; it ends with the block, as they do."""
        spec = f"  - {{name: {model}, deployments: [{{backend: plain, model: scripted}}]}}"
        try:
            self._reload(tracing, spec)
            with one_worker(self.serving.port) as connection:
                until(lambda: self.chat(model, connection=connection).status == 200, what="a worker with the settings")
                yield connection
        finally:
            self._reload(TRACING, "")

    def _reload(self, tracing: str, models: str) -> None:
        urls = {"plain": self.plain.base_url, "frail": self.frail.base_url, "held": self.held.base_url}
        config = CONFIG % {**urls, "models": models, "tracing": tracing}
        (self.serving.folder / "llm-router.yaml").write_text(config)
        Administrator(self.serving).ask("POST", "/admin/reload")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("traces")
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(ScriptedBackend()) for name in ("plain", "frail", "held")}
        rotel = stack.enter_context(collecting(folder, free_port()))
        urls = {name: server.base_url for name, server in servers.items()}
        config = CONFIG % {**urls, "models": "", "tracing": TRACING}
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": rotel.url.removesuffix("/v1/traces"),
            "OTEL_SERVICE_NAME": "a-shop",
            "OTEL_RESOURCE_ATTRIBUTES": "team=checkout,rack=7",
        }
        serving = stack.enter_context(Serving(folder, config, "--workers", "2", env=env))
        yield World(serving, Debug(serving), rotel, **servers)


@contextlib.contextmanager
def one_worker(port: int) -> Iterator[http.client.HTTPConnection]:
    """A connection: all its requests are served by the same worker."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        yield connection
    finally:
        connection.close()


def from_caller(trace_id: str, *, sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{PARENT}-{'01' if sampled else '00'}"}


def told(backend: ScriptedBackend, request_id: str) -> list[tuple[str, str, str]]:
    """Trace, parent span and flags that a backend was told with each attempt of a request."""
    seen = [request.headers for request in backend.requests if request.headers.get("x-request-id") == request_id]
    found = [TRACEPARENT(headers["traceparent"]) for headers in seen]
    return [(match[1], match[2], match[3]) for match in found if match is not None]


def named(trace: Any, name: str) -> list[Any]:
    """The spans of a trace with that name."""
    return [span for span in trace["spans"] if span["name"] == name]


# -- in and out ----------------------------------------------------------------------------------------------


def test_a_callers_trace_goes_through_to_backend_and_collector(world: World) -> None:
    """The server's span is the caller's child, the backend's parent is the attempt's span, and tracestate travels on."""
    state = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"
    reply = world.chat("through", headers={**from_caller(TRACE), "tracestate": state})
    assert reply.status == 200
    ((trace_id, attempt_span, flags),) = told(world.plain, reply.headers["x-request-id"])
    assert (trace_id, flags) == (TRACE, "01")
    assert world.plain.requests[-1].headers["tracestate"] == state
    kept = world.debug.trace(TRACE)
    assert (kept["parent_id"], kept["tracestate"], kept["kept"]) == (PARENT, state, "sampled")
    root, *steps = kept["spans"]
    assert (root["kind"], root["parent_id"], root["name"]) == ("server", PARENT, "POST /v1/chat/completions")
    assert len({PARENT, attempt_span, root["span_id"]}) == 3
    (client,) = (span for span in steps if span["kind"] == "client")
    assert (client["span_id"], client["parent_id"]) == (attempt_span, root["span_id"])
    assert client["attributes"].items() >= {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "scripted",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
    }.items()  # fmt: skip
    assert all(span["parent_id"] == root["span_id"] for span in steps)
    shown = world.rotel.span("POST /v1/chat/completions", TRACE)
    assert f"Parent ID      : {PARENT}\n" in shown
    assert f"ID             : {root['span_id']}\n" in shown
    assert f"TraceState     : {state}\n" in shown
    assert f"ID             : {attempt_span}\n" in world.rotel.span("chat scripted", TRACE)
    assert len(world.rotel.of_trace(TRACE)) == len(kept["spans"])
    for attribute in ("service.name: Str(a-shop)", "team: Str(checkout)", "rack: Str(7)"):
        assert attribute in world.rotel.text(), "OTEL_* variables describe the service"


def test_each_attempt_is_a_parent_of_its_own(world: World) -> None:
    """A retry and a fallback: three backends' spans in one trace, each below the attempt that it was."""
    world.frail.script(BROKEN)
    world.frail.script(BROKEN)
    reply = world.chat("retried")
    id = reply.headers["x-request-id"]
    assert (reply.status, reply.headers["x-llm-router-attempts"]) == (200, "3")
    parents = told(world.frail, id) + told(world.plain, id)
    assert len(parents) == len({span for _, span, _ in parents}) == 3
    assert len({trace_id for trace_id, _, _ in parents}) == 1
    kept = world.debug.trace(id)
    assert kept["trace_id"] == parents[0][0]
    clients = [span for span in kept["spans"] if span["kind"] == "client"]
    assert [span["span_id"] for span in clients] == [span for _, span, _ in parents]
    assert [bool(span["error"]) for span in clients] == [True, True, False]


def test_a_caller_that_does_not_sample_is_followed(world: World) -> None:
    with one_worker(world.serving.port) as connection:
        assert world.chat("told", connection=connection).status == 200  # the first of its kind is kept
        trace_id = "a" * 32
        reply = world.chat("told", connection=connection, headers=from_caller(trace_id, sampled=False))
        ((seen, _, flags),) = told(world.plain, reply.headers["x-request-id"])
        assert (seen, flags) == (trace_id, "00")
        after = world.chat("told", connection=connection, headers=from_caller("b" * 32))
    world.debug.trace(after.headers["x-request-id"])
    assert not world.debug.is_kept(trace_id)


def test_what_is_no_traceparent_begins_a_trace_and_never_travels_on(world: World) -> None:
    bad = [
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        "nonsense",
        "",
    ]
    before = world.serving.scrape().total("llm_router_trace_context_invalid_total")
    traces = set()
    for value in bad:
        reply = world.chat("m", headers={"traceparent": value, "tracestate": "a=b"})
        assert reply.status == 200
        ((trace_id, parent, _),) = told(world.plain, reply.headers["x-request-id"])
        assert PARENT not in parent
        assert "tracestate" not in world.plain.requests[-1].headers
        traces.add(trace_id)
    assert len(traces) == len(bad)
    assert TRACE not in traces
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"traceparent: 00-{TRACE}-{PARENT}-01\r\ntraceparent: 00-{'c' * 32}-{PARENT}-01\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    assert run(send(("127.0.0.1", world.serving.port), head.encode() + body)).status == 200
    ((trace_id, _, _),) = told(world.plain, world.plain.requests[-1].headers["x-request-id"])
    assert trace_id not in (TRACE, "c" * 32), "one that is there twice is none"
    after = world.serving.scrape().total("llm_router_trace_context_invalid_total")
    assert after - before == len(bad) + 1
    # A tracestate that is none is left out, and the traceparent is believed nevertheless.
    reply = world.chat("m", headers={**from_caller("d" * 32), "tracestate": "no list"})
    assert told(world.plain, reply.headers["x-request-id"])[0][0] == "d" * 32
    assert "tracestate" not in world.plain.requests[-1].headers
    assert world.serving.scrape().total("llm_router_trace_context_invalid_total") == after


# -- what is kept --------------------------------------------------------------------------------------------


def test_errors_slow_and_first_ones_are_kept_and_counted_and_usual_ones_are_not(world: World) -> None:
    world.held.script(Pause(SLOW_S + 0.05), OK)
    world.frail.script(BROKEN)
    world.frail.script(BROKEN)
    before = world.kept()
    with one_worker(world.serving.port) as connection:
        usual = [world.chat("usual", connection=connection, headers={"x-request-id": f"usual-{n}"}) for n in range(6)]
        broken = world.chat("broken", connection=connection, headers={"x-request-id": "broken-1"})
        slow = world.chat("slow", connection=connection, headers={"x-request-id": "slow-1"})
        unknown = [
            request(world.serving.port, "GET", "/v1/no", connection=connection, headers={"x-request-id": f"no-{n}"})
            for n in range(3)
        ]
    assert [reply.status for reply in (*usual, broken, slow, *unknown)] == [*[200] * 6, 500, 200, *[404] * 3]
    after = world.kept()
    assert {reason: after[reason] - before[reason] for reason in after} == {
        "sampled": 0,
        "error": 1,
        "slow": 1,
        "first": 2,
        "recent": 0,
    }
    assert world.debug.trace("slow-1")["kept"] == "slow"
    kept = world.debug.trace("broken-1")
    assert (kept["kept"], kept["outcome"], kept["error_type"]) == ("error", "error", "inference_error")
    assert "oops" in kept["error"]
    assert world.debug.trace("usual-0")["kept"] == world.debug.trace("no-0")["kept"] == "first"
    assert not any(world.debug.is_kept(id) for id in ("usual-1", "usual-5", "no-1", "no-2"))
    assert "STATUS_CODE_ERROR" in world.rotel.span("POST /v1/chat/completions", kept["trace_id"])


def test_a_share_of_requests_is_sampled_by_their_trace_ids(world: World) -> None:
    """Every decision is that of the consistent sampler; the backend is told it, and what is sampled is kept."""
    count = 300
    with world.configured(f"{TRACING[len('sample_ratio: 0, ') :]}, sample_ratio: 0.3", model="sampled") as connection:
        before = world.kept()
        for number in range(count):
            headers = {"x-request-id": f"share-{number}"}
            assert world.chat("sampled", connection=connection, headers=headers).status == 200
        kept = world.kept()["sampled"] - before["sampled"]
    parents = [parent for number in range(count) for parent in told(world.plain, f"share-{number}")]
    assert len(parents) == count
    threshold = round((1 - 0.3) * (1 << 56))
    assert all((flags == "01") == (int(trace_id[-14:], 16) >= threshold) for trace_id, _, flags in parents)
    sampled = [trace_id for trace_id, _, flags in parents if flags == "01"]
    assert kept == len(sampled)
    assert 30 < kept < 150, "six sigma is 48"
    for trace_id in sampled:
        world.debug.trace(trace_id)
    until(lambda: all(world.rotel.of_trace(trace_id) for trace_id in sampled[-3:]), what="the export")


def test_a_few_recent_ones_are_kept_to_look_at_and_not_exported(world: World) -> None:
    with world.configured("sample_ratio: 0, recent_per_s: 0.1", model="lately") as connection:
        for number in range(30):
            world.chat("lately", connection=connection, headers={"x-request-id": f"lately-{number}"})
        last = world.chat("lately", connection=connection, headers=from_caller("e" * 32))
        world.debug.trace(last.headers["x-request-id"])
        world.rotel.span("chat scripted", "e" * 32)
        found = world.debug.listed(model="lately", limit=200)
    recent = [trace for trace in found if trace["kept"] == "recent"]
    assert 9 <= len(recent) <= 11, "a burst of ten, and a tenth more each second"
    assert not any(world.rotel.of_trace(trace["trace_id"]) for trace in recent)


def test_prompts_and_answers_are_in_traces_only_by_wish(world: World) -> None:
    """Not by default; by a reload; and even then without what is a secret."""
    secret = "sk-ant-api03-abcdefghijklmnopqrstuvwxyz0123456789"
    text = f"the planted question {secret}"
    with one_worker(world.serving.port) as connection:
        plain = world.chat("m", text=text, connection=connection, headers=from_caller("1" * 32))
    assert plain.status == 200
    shown = json.dumps(world.debug.trace("1" * 32))
    assert "planted" not in shown
    assert "scripted backend" not in shown
    with world.configured(f"{TRACING}, content: true", model="open") as connection:
        world.chat("open", text=text, connection=connection, headers=from_caller("2" * 32))
        world.chat("open", text=text, connection=connection, headers=from_caller("3" * 32), stream=True)
        for trace_id in ("2" * 32, "3" * 32):
            (client,) = named(world.debug.trace(trace_id), "chat scripted")
            assert "the planted question" in client["attributes"]["gen_ai.input.messages"]
            assert "Hello from the scripted backend." in client["attributes"]["gen_ai.output.messages"]
            assert "the planted question" in world.rotel.span("chat scripted", trace_id)
    assert "planted" not in world.rotel.span("chat scripted", "1" * 32)
    assert secret not in world.rotel.text()
    assert secret.encode() not in world.debug.reply("/requests", limit=200).body


# -- looking at them -----------------------------------------------------------------------------------------


def steps_of(reply: Reply) -> dict[str, float]:
    """Of Server-Timing: milliseconds by step."""
    parts = [part.split(";dur=") for part in reply.headers["server-timing"].split(", ")]
    return {name: float(milliseconds) for name, milliseconds in parts}


def test_server_timing_is_in_the_reply_of_whoever_asks(world: World) -> None:
    on = {"x-llm-router-timing": "on"}
    world.held.script(Pause(0.1), OK)
    began_at = time.monotonic()
    steps = steps_of(world.chat("queued", headers=on))
    took_ms = (time.monotonic() - began_at) * 1000
    assert steps.keys() >= {"auth", "queue", "route", "upstream", "total"}
    assert 100 <= steps["upstream"] <= steps["total"] <= took_ms
    assert sum(ms for name, ms in steps.items() if name != "total") <= steps["total"] + 0.01
    streamed = steps_of(world.chat("m", headers=on, stream=True))
    assert 0 < streamed["first-token"] <= streamed["total"]
    assert "server-timing" in world.chat("nobody", headers=on).headers
    with one_worker(world.serving.port) as connection:  # whose memory is the cache
        world.chat("m", temperature=0, connection=connection)
        cached = world.chat("m", temperature=0, headers={**on, **from_caller("cace" * 8)}, connection=connection)
    assert cached.headers["x-llm-router-cached"] == "true"
    assert steps_of(cached).keys().isdisjoint({"upstream", "queue", "route"})
    root, *steps = world.debug.trace("cace" * 8)["spans"]
    assert root["attributes"]["llm_router.cached"]
    assert "client" not in {step["kind"] for step in steps}
    for headers in ({}, {"x-llm-router-timing": "off"}):
        assert "server-timing" not in world.chat("m", headers=headers).headers


def test_a_timeline_has_the_steps_that_happened(world: World) -> None:
    """A wait for a slot, and a stream: within the request, in order, and of about the length that they had."""
    gate = Gate()
    world.held.always(Hold(gate), OK)
    try:

        def ask(number: int) -> int:
            if number < 8:
                return world.chat("queued", headers=from_caller(f"{number + 1:032x}")).status
            until(lambda: world.serving.scrape().total("llm_router_queue_size", queue_type="queued"), what="a queue")
            gate.open()
            return 200

        assert set(crowd(9, ask)) == {200}
        assert world.chat("m", stream=True, headers=from_caller("f" * 32)).status == 200
    finally:
        world.held.always()
    waited = [trace for trace in (world.debug.trace(f"{number + 1:032x}") for number in range(8)) if _waited(trace)]
    assert waited, "somebody waited for a slot"
    streamed = world.debug.trace("f" * 32)
    assert [span["name"] for span in streamed["spans"][1:]][:2] == ["auth", "route"], "it cannot come from the cache"
    (client,) = (span for span in streamed["spans"] if span["kind"] == "client")
    for name in ("first token", "stream"):
        assert named(streamed, name)[0]["parent_id"] == client["span_id"]
    for trace in (*waited, streamed):
        starts = [span["start_s"] for span in trace["spans"]]
        assert starts == sorted(starts)
        assert all(0 <= span["start_s"] + span["duration_s"] <= trace["duration_s"] + 2e-6 for span in trace["spans"])


def _waited(trace: Any) -> bool:
    return any(span["duration_s"] > 0.001 for span in named(trace, "queue"))


def test_requests_are_listed_by_route_and_model_newest_slowest_and_failed(world: World) -> None:
    """At `/debug/requests` of both ports."""
    world.frail.script(json_reply({"error": {"message": "no such thing"}}, 400))
    numbers = iter(range(100))

    def ask(path: str = "/v1/chat/completions", **body: Any) -> str:
        id = f"listed-{next(numbers)}"
        headers = {"x-request-id": id, **from_caller(f"{id:a<32}".encode().hex()[:32])}
        request(world.serving.port, "POST", path, body, headers=headers)
        world.debug.trace(id)
        return id

    messages = [{"role": "user", "content": "hi"}]
    first = ask(model="listed", messages=messages)
    claude = ask("/v1/messages", model="listed", messages=messages, max_tokens=9)
    generated = ask("/api/generate", prompt="hi", options={"model": "listed"})
    last = ask(model="listed", messages=messages)
    failed = ask(model="broken", messages=messages)
    unknown = ask(model="nobody", messages=messages)

    def ids(**query: str | float) -> list[str]:
        return [trace["request_id"] for trace in world.debug.listed(**query)]

    assert ids(model="listed") == [last, generated, claude, first]
    assert ids(model="listed", limit=2) == [last, generated]
    assert ids(model="listed", route="/v1/messages") == [claude]
    assert ids(model="listed", route="/api/generate") == [generated]
    assert set(ids(model="listed", show="failed")) == set()
    assert ids(show="failed", limit=2) == [unknown, failed]
    slowest = world.debug.listed(show="slowest", limit=200)
    durations = [trace["duration_s"] for trace in slowest]
    assert durations == sorted(durations, reverse=True)
    groups = {(group["route"], group["model"]): group for group in world.debug.get("/requests")["groups"]}
    group = groups["/v1/chat/completions", "listed"]
    assert (group["kept"], group["failed"]) == (2, 0)
    assert request(world.serving.port, "GET", "/debug/requests?model=listed&limit=1").json()["requests"][0]["steps"]
    for query, code in ({"show": "newest"}, "invalid_parameter"), ({"limit": "0"}, "invalid_parameter"), ({"modle": "m"}, "unknown_parameter"):  # fmt: skip
        refused = world.debug.reply("/requests", **query)
        assert (refused.status, refused.json()["error"]["code"]) == (400, code)


def test_a_request_is_found_by_either_id_or_its_beginning(world: World) -> None:
    ids = ["found-by-a-caller-1", "found-by-a-caller-2"]
    for number, id in enumerate(ids):
        world.chat("m", headers={"x-request-id": id, **from_caller(f"{number}badcafe" * 4)})
    whole = world.debug.trace(ids[0])
    for id in ("0badcafe" * 4, "0badcaf", ids[0]):
        assert world.debug.get(f"/requests/{id}")["requests"] == [whole]
    world.debug.trace(ids[1])
    ambiguous = world.debug.reply("/requests/found-by-a")
    assert (ambiguous.status, ambiguous.json()["error"]["code"]) == (400, "ambiguous_id")
    gone = world.debug.reply(f"/requests/{'9' * 32}")
    assert (gone.status, gone.json()["error"]["code"]) == (404, "request_not_found")
    # Two requests of one trace, as an agent's are.
    for number in range(2):
        world.chat("m", headers={"x-request-id": f"agent-{number}", **from_caller("abad1dea" * 4)})
        world.debug.trace(f"agent-{number}")
    both = world.debug.get(f"/requests/{'abad1dea' * 4}")["requests"]
    assert {trace["request_id"] for trace in both} == {"agent-0", "agent-1"}


def test_the_command_line_draws_a_trace_and_lists_them(world: World) -> None:
    id = "drawn-1"
    world.chat("m", stream=True, headers={"x-request-id": id, **from_caller("5eed" * 8)})
    trace = world.debug.trace(id)
    drawn = command(world.serving, "trace", "5eed5eed")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    head, facts, _, *rows = drawn.stdout.splitlines()
    assert head.startswith("POST /v1/chat/completions  200")
    assert all(text in facts for text in ("5eed" * 8, id, trace["process"], "kept: sampled"))
    assert rows[0].startswith("POST /v1/chat/completions  ")
    for step in ("  auth ", "  route ", "  chat scripted at plain ", "    first token ", "    stream "):
        assert any(row.startswith(step) for row in rows), step
    listed = command(world.serving, "trace", "--model", "m", "--limit", "1")
    assert "5eed5eed5eed" in listed.stdout
    whole = command(world.serving, "trace", id, "--json")
    assert json.loads(whole.stdout) == {"requests": [trace]}
    unknown = command(world.serving, "trace", "no-such-request")
    assert unknown.returncode == 1
    assert "no-such-request" in unknown.stderr


def test_exemplars_point_to_kept_traces(world: World) -> None:
    """Each one in OpenMetrics: the trace is there, took as long as it says, and fits into the bucket."""
    world.chat("m", stream=True, headers=from_caller("ace0" * 8))
    world.debug.trace("ace0" * 8)
    text = world.serving.get("/metrics", accept="application/openmetrics-text").decode()
    openmetrics_families: Any = openmetrics_parser.text_string_to_metric_families  # without annotations
    found = [
        (sample, sample.exemplar)
        for family in openmetrics_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    names = {sample.name for sample, _ in found}
    assert names >= {
        "llm_router_http_request_duration_seconds_bucket",
        "llm_router_inference_duration_seconds_bucket",
        "llm_router_time_to_first_token_seconds_bucket",
    }
    checked = 0
    for sample, exemplar in found:
        (request,) = (
            request
            for request in world.debug.get(f"/requests/{exemplar.labels['trace_id']}")["requests"]
            if request["spans"][0]["span_id"] == exemplar.labels["span_id"]
        )
        assert request["kept"] in EXPORTED
        assert exemplar.value <= float(sample.labels["le"])
        if "inference_duration" in sample.name:
            assert request["model"] == sample.labels["model"]
            assert request["duration_s"] == pytest.approx(exemplar.value, abs=2e-6)
            checked += 1
    assert checked
    assert " # {" not in world.serving.get("/metrics").decode()


def test_every_log_line_of_a_request_has_its_trace(world: World) -> None:
    """In the access, application and error logs; and `llm-router logs --trace` finds them."""
    world.frail.script(BROKEN)
    world.frail.script(BROKEN)
    world.chat("broken", headers={"x-request-id": "logged-1", **from_caller("10c5" * 8)})
    trace = world.debug.trace("logged-1")
    for file in ("access", "application", "error"):
        line = line_of(world.serving, file, "logged-1")
        assert (line["trace.id"], line["span.id"]) == ("10c5" * 8, trace["spans"][0]["span_id"]), file
    # Also of requests whose trace is not kept.
    with one_worker(world.serving.port) as connection:
        for number in range(2):
            world.chat("m", connection=connection, headers={"x-request-id": f"unkept-{number}"})
    line = line_of(world.serving, "access", "unkept-1")
    assert line["trace.id"] == told(world.plain, "unkept-1")[0][0]
    shown = command(world.serving, "logs", "--trace", "10c5" * 8, "--json")
    assert shown.returncode == 0, shown.stderr
    assert {json.loads(line)["request_id"] for line in shown.stdout.splitlines()} == {"logged-1"}


# -- collectors and processes that go away ---------------------------------------------------------------------


def test_without_its_collector_it_serves_on_and_every_lost_span_is_counted(tmp_path: Path) -> None:
    """More spans than may wait; then the collector comes, and what it gets and what was lost is all there was."""
    port = free_port()
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_TRACES_SAMPLER": "always_on",
        "OTEL_BSP_MAX_QUEUE_SIZE": "60",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "20",
    }
    with ScriptedBackend() as backend, Serving(tmp_path, remote_config(backend.base_url), "--workers", "2", env=env) as serving:  # fmt: skip
        debug = Debug(serving)
        replies = crowd(40, lambda n: chat(serving.port, headers={"x-request-id": f"away-{n}"}))
        assert {reply.status for reply in replies} == {200}
        for number in range(40):
            debug.trace(f"away-{number}")

        def said(words: str) -> int:
            return sum(words in line["message"] for line in lines(serving, "application"))

        def dropped() -> float:
            return serving.scrape().total("llm_router_spans_dropped_total")

        def kept() -> int:
            found = debug.listed(limit=200)
            assert len(found) == serving.scrape().total("llm_router_traces_kept_total")
            return sum(1 + len(trace["steps"]) for trace in found)

        until(lambda: said("do not reach the collector"), what="a line about it")
        until(lambda: dropped() > 0)
        assert serving.scrape().total("llm_router_spans_dropped_total", reason="queue-full") == dropped()
        assert serving.scrape().total("llm_router_internal_queue_size", queue="span") > 0
        with collecting(tmp_path, port) as rotel:
            until(lambda: len(rotel.spans()) + dropped() == kept(), what="the rest at the collector")
            assert len(rotel.spans()) >= 40, "what waited came"
            until(lambda: said("reach the collector 127") and said("again"), what="a line about its return")
        assert said("do not reach the collector") <= 2, "said once, not with each attempt"


def test_killed_processes_cost_no_request_and_no_other_trace(tmp_path: Path) -> None:
    """A worker that dies leaves its traces behind; a control that dies forgets them, and is told the newer ones."""
    with contextlib.ExitStack() as stack:
        rotel = stack.enter_context(collecting(tmp_path, free_port()))
        backend = stack.enter_context(ScriptedBackend())
        config = remote_config(backend.base_url, extra=f"tracing: {{endpoint: '{rotel.url}'}}")
        serving = stack.enter_context(Serving(tmp_path, config, "--workers", "2"))
        debug = Debug(serving)

        def ask(number: int) -> Any:
            reply = chat(serving.port, headers=from_caller(f"{number:032x}"))
            assert reply.status == 200
            return debug.trace(f"{number:032x}")

        first = ask(1)
        number = int(first["process"].removeprefix("worker-"))
        pid = serving.signal(f"worker-{number}", signal.SIGKILL)
        until(lambda: len(serving.children()) == 3 and pid not in serving.children().values(), what="its successor")
        assert debug.trace(f"{1:032x}") == first
        processes = {ask(number)["process"] for number in range(2, 22)}
        assert first["process"] in processes or len(processes) == 1

        before = serving.signal("control", signal.SIGKILL)
        # Gone, with all its threads: what it was told before that is gone with it. A zombie still takes something.
        until(lambda: not psutil.pid_exists(before), what="its end")
        while_away = range(100, 120)
        for number in while_away:
            assert chat(serving.port, headers=from_caller(f"{number:032x}")).status == 200
        until(lambda: serving.children().get("control", before) != before, what="another control")
        until(lambda: serving.status("/health", monitoring=True) == 200, what="its answer")
        after = ask(200)
        assert after["kept"] == "sampled"
        assert not debug.is_kept(f"{1:032x}"), "traces live in control's memory"
        rotel.span("chat scripted", f"{200:032x}")

        def lost() -> int:
            """Spans of requests that ended while there was no control to be told."""
            return sum(len(after["spans"]) for number in while_away if not debug.is_kept(f"{number:032x}"))

        def dropped() -> float:
            return serving.scrape().total("llm_router_spans_dropped_total", reason="queue-full")

        until(lambda: lost() == dropped(), what="each of them kept or counted")


def test_what_a_collector_refuses_is_counted_and_the_end_sends_what_is_left(tmp_path: Path) -> None:
    """Its headers and address are the environment's; a sampled request just before the end is exported too."""
    secret = "a-secret-of-the-collector"
    with running() as collector, ScriptedBackend() as backend:
        env = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{collector.port}/custom/path",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{secret},x-tenant=a",
            "OTEL_TRACES_SAMPLER": "always_off",
            "OTEL_SERVICE_NAME": "a-shop",
        }
        collector.answers.append(Said(400, body=b"no"))
        with Serving(tmp_path, remote_config(backend.base_url), "--workers", "2", env=env) as serving:
            debug = Debug(serving)
            until(lambda: collector.exports, what="the first export")
            until(
                lambda: serving.scrape().total("llm_router_spans_dropped_total", reason="export-refused"),
                what="the count of what it refused",
            )
            sampled = chat(serving.port, headers=from_caller(TRACE))
            ((_, _, flags),) = told(backend, sampled.headers["x-request-id"])
            assert flags == "01", "a caller that decided is followed"
            unasked = chat(serving.port)
            ((_, _, flags),) = told(backend, unasked.headers["x-request-id"])
            assert flags == "00"
            until(lambda: f"{TRACE}" in json.dumps([export.document for export in collector.exports]))
            export = collector.exports[-1]
            assert export.path == "/custom/path"
            assert export.headers.items() >= {"authorization": f"Bearer {secret}", "x-tenant": "a"}.items()
            attributes = export.document["resourceSpans"][0]["resource"]["attributes"]
            assert {"key": "service.name", "value": {"stringValue": "a-shop"}} in attributes
            assert secret not in serving.log + json.dumps(debug.get()) + json.dumps(debug.get("/requests"))
            last = "1a57" * 8
            assert request(serving.port, "GET", "/v1/models", headers=from_caller(last)).status == 200
            serving.process.terminate()
            serving.process.wait(20)
        assert last in json.dumps([export.document for export in collector.exports])


def test_switched_off_it_begins_no_trace_and_passes_on_a_callers(tmp_path: Path) -> None:
    with ScriptedBackend() as backend:
        env = {"OTEL_SDK_DISABLED": "true"}
        with Serving(tmp_path, remote_config(backend.base_url), "--workers", "2", env=env) as serving:
            debug = Debug(serving)

            def passed(**headers: str) -> Mapping[str, str]:
                assert chat(serving.port, headers=headers).status == 200
                return {name: value for name, value in backend.requests[-1].headers.items() if name.startswith("trace")}

            valid = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
            assert passed(**valid) == valid
            assert passed() == passed(traceparent="nonsense", tracestate="a=b") == {}
            listed = debug.reply("/requests")
            assert (listed.status, "tracing.enabled" in listed.json()["error"]["message"]) == (404, True)
            assert debug.get()["traces"] is None
            assert serving.scrape().total("llm_router_traces_kept_total") == 0
            text = serving.get("/metrics", accept="application/openmetrics-text").decode()
            assert 'request_id="' in text, "exemplars have request ids instead"
            assert 'trace_id="' not in text
            refused = command(serving, "trace")
            assert (refused.returncode, "tracing.enabled" in refused.stderr) == (1, True)
