"""`/debug` and below: what is shown of the router, of kept requests and of models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import pytest

from llm_router import families
from llm_router.admin import debug
from llm_router.admin.application import Entry
from llm_router.admin.debug import ModelFacts, RouterStatus
from llm_router.admin.models import LocalModel
from llm_router.observe.health.state import ModelState
from llm_router.observe.metrics.slots import Collected, Reader, Segment, Writer
from llm_router.observe.tracing.store import TraceStore
from llm_router.signals import Reading
from llm_router.testing import FakeClock
from support.admin import asked
from support.traces import span, trace

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
SECRET = "sk-llmr-" + "x" * 43


class Source:
    """A router with one model, whose metrics the test writes."""

    def __init__(self) -> None:
        self.segment = Segment.private()
        self.writer = Writer(self.segment, families.FAMILIES)
        self.readings: list[Reading] = []
        self.health: Mapping[str, Any] | None = {"status": "healthy", "checks": {}}
        self.facts: list[ModelFacts] = [ModelFacts(name="small", state="loaded")]
        self.traces: TraceStore | None = TraceStore(100, wall=FakeClock(NOW))
        self.metrics_enabled = True

    def status(self) -> RouterStatus:
        return RouterStatus(
            state="ready",
            initialized=True,
            ready=True,
            models={"small": "loaded", "far": "down"},
            workers={"worker-0": True},
            backends={"near": True, "far": None},
            strategy="balanced",
            engine="llama.cpp",
            environment="staging",
        )

    def health_document(self) -> Mapping[str, Any] | None:
        return self.health

    def collected(self) -> Collected:
        return Reader([self.segment], families.FAMILIES).collect(self.readings)

    async def model_facts(self) -> Sequence[ModelFacts]:
        return self.facts

    def get(
        self, path: str, parameters: Mapping[str, str] | None = None, *, entry: Entry = Entry.CLI
    ) -> tuple[int, Any]:
        """Status and JSON of the reply."""
        answer = asked(
            debug.routes(
                self,
                traces=lambda: self.traces,
                version="1.2.3",
                now=lambda: NOW,
                metrics_enabled=self.metrics_enabled,
            ),
            "GET",
            path,
            urlencode(parameters or {}),
            entry=entry,
            closed={Entry.MONITORING: frozenset({"admin"})},
        )
        return answer.status, answer.json()

    @property
    def store(self) -> TraceStore:
        assert self.traces is not None
        return self.traces


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.mark.parametrize("path", ["/debug", "/debug/requests", "/debug/requests/abcd", "/debug/models"])
def test_they_are_for_administrators(source: Source, path: str) -> None:
    """Once there is a key of that scope."""
    assert source.get(path, entry=Entry.MONITORING)[0] == 401


# -- /debug ---------------------------------------------------------------------------------------------


def test_the_page_of_the_router(source: Source) -> None:
    """State, health, how many metrics there are, and what it runs on."""
    source.readings = [
        Reading(families.PROCESS_START, ("supervisor",), NOW - 60.0),
        Reading(families.PROCESS_START, ("worker-0",), NOW - 59.0),
        Reading(families.PROCESS_RESIDENT, ("worker-0",), 30e6),
        Reading(families.PROCESS_RESIDENT, ("supervisor",), 10e6),
        Reading(families.PROCESS_RESIDENT, ("runner-small",), 200e6),
        Reading(families.PROCESS_HEAP, ("worker-0",), 20e6),
    ]
    source.store.add(trace())
    status, reply = source.get("/debug")
    assert status == 200
    assert reply["status"] == {
        "state": "ready",
        "initialized": True,
        "ready": True,
        "models": {"small": "loaded", "far": "down"},
        "workers": {"worker-0": True},
        "backends": {"near": True, "far": None},
        "strategy": "balanced",
        "engine": "llama.cpp",
        "models_loaded": 1,
    }
    assert reply["health"] == source.health
    assert (reply["metrics"], reply["series"]) == (len(families.FAMILIES), 6)
    assert (reply["traces"]["traces"], reply["traces"]["traces_limit"]) == (1, 100)
    environment = reply["environment"]
    assert (environment["version"], environment["env"], environment["uptime"]) == ("1.2.3", "staging", 60.0)
    assert environment["python_version"].startswith("3.")
    assert environment["platform"]
    assert "msgspec" in environment["packages"]
    assert environment["memory"] == {
        "rss": 40_000_000,
        "used": 20_000_000,
        "external": 200_000_000,
        "processes": {"worker-0": 30_000_000, "supervisor": 10_000_000, "runner-small": 200_000_000},
    }


def test_what_is_off_is_null(source: Source) -> None:
    """Health, traces and metrics; and what the machine does not tell."""
    source.health = source.traces = None
    source.metrics_enabled = False
    _, reply = source.get("/debug")
    assert (reply["metrics"], reply["series"]) == (None, None)
    assert (reply["health"], reply["traces"], reply["environment"]["uptime"]) == (None, None, None)


def test_no_variable_of_the_environment_is_shown(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its name nor its value; and health's messages go through the redaction."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    source.health = {
        "checks": {"external": {"message": f"401 for {SECRET}", "details": [{"url": f"http://u:{SECRET}@h"}]}}
    }
    _, reply = source.get("/debug")
    assert SECRET not in json.dumps(reply)
    assert "OPENAI" not in json.dumps(reply)


# -- /debug/requests ------------------------------------------------------------------------------------


def test_requests_are_listed_with_their_timelines(source: Source) -> None:
    """Seconds from the beginning of the request, which has no entry of its own among its steps."""
    start = NOW - 0.25
    kept = trace(
        end_s=NOW,
        status=502,
        error_type="unreachable",
        error="near: connection refused",
        steps=(
            span("queue", 10, 20, of_s=start),
            span("near", 20, 240, of_s=start, error="connection refused", attributes={"server.port": 80.0}),
        ),
    )
    source.store.add(kept)
    status, reply = source.get("/debug/requests")
    assert status == 200
    assert reply["show"] == "recent"
    assert reply["requests"] == [
        {
            "request_id": kept.request_id,
            "trace_id": kept.trace_id,
            "time": "2026-09-21T14:13:19.750Z",
            "duration_s": 0.25,
            "method": "POST",
            "route": "/v1/chat/completions",
            "status": 502,
            "outcome": "error",
            "error_type": "unreachable",
            "error": "near: connection refused",
            "model": "small",
            "backend": "near",
            "key": "app",
            "process": "worker-0",
            "kept": "sampled",
            "steps": [
                {"name": "queue", "start_s": 0.01, "duration_s": 0.01, "error": ""},
                {"name": "near", "start_s": 0.02, "duration_s": 0.22, "error": "connection refused"},
            ],
        }
    ]
    assert reply["groups"] == [
        {
            "route": "/v1/chat/completions",
            "model": "small",
            "kept": 1,
            "failed": 1,
            "newest": "2026-09-21T14:13:20.000Z",
            "slowest_s": 0.25,
        }
    ]
    assert reply["kept"]["traces"] == 1


def test_lists_are_chosen_and_bounded(source: Source) -> None:
    """Fifty unless somebody asks for more, two hundred at most."""
    source.traces = TraceStore(1000, wall=FakeClock(NOW))
    for n in range(300):
        source.store.add(trace(end_s=NOW - 300 + n, seconds=1 + n % 7, model=f"m{n % 2}", request_id=f"r{n}"))
    source.store.add(trace(end_s=NOW - 500, error_type="internal", request_id="broken", route="/api/generate"))

    def shown(**parameters: str) -> list[str]:
        return [one["request_id"] for one in source.get("/debug/requests", parameters)[1]["requests"]]

    assert len(shown()) == 50
    assert len(shown(limit="1000")) == 200
    assert shown(limit="2") == ["r299", "r298"]
    assert shown(limit="2", model="m0") == ["r298", "r296"]
    assert shown(show="failed") == ["broken"]
    assert shown(route="/api/generate") == ["broken"]
    assert shown(show="failed", model="m0") == []
    slowest = source.get("/debug/requests", {"show": "slowest", "limit": "5"})[1]["requests"]
    assert [one["duration_s"] for one in slowest] == [7.0] * 5
    assert [group["model"] for group in source.get("/debug/requests")[1]["groups"]] == ["m1", "m0", "small"]


@pytest.mark.parametrize(
    ("parameters", "code", "param", "problem"),
    [
        ({"show": "best"}, "invalid_parameter", "show", "there are recent, slowest, failed"),
        ({"limit": "0"}, "invalid_parameter", "limit", "write a number from 1 to 200"),
        ({"limit": "-1"}, "invalid_parameter", "limit", "limit='-1' cannot be had"),
        ({"limit": "๑"}, "invalid_parameter", "limit", "write a number"),
        ({"limit": "9" * 5000}, "invalid_parameter", "limit", "write a number"),
        ({"status": "500"}, "unknown_parameter", "status", "there are route, model, show, limit"),
    ],
)
def test_what_cannot_be_understood_is_refused(
    source: Source, parameters: dict[str, str], code: str, param: str, problem: str
) -> None:
    """With the parameter at fault and what to write."""
    status, reply = source.get("/debug/requests", parameters)
    error = reply["error"]
    assert (status, error["code"], error["param"]) == (400, code, param)
    assert problem in error["message"]
    assert len(error["message"]) < 400


def test_a_request_is_shown_whole(source: Source) -> None:
    """Every span with its place in the tree and its attributes."""
    child = span(
        "near", 20, 240, of_s=NOW - 0.25, id="c" * 16, parent="b" * 16, attributes={"server.port": 80, "ok": True}
    )
    kept = trace(end_s=NOW, steps=(child,))
    source.store.add(kept)
    for id in (kept.trace_id, kept.request_id, kept.trace_id[:8]):
        status, reply = source.get(f"/debug/requests/{id}")
        (found,) = reply["requests"]
        assert (status, found["trace_id"], found["parent_id"], found["tracestate"]) == (200, kept.trace_id, "", "")
        assert "steps" not in found
        assert [one["name"] for one in found["spans"]] == ["POST /v1/chat/completions", "near"]
        assert found["spans"][1] == {
            "span_id": "c" * 16,
            "parent_id": "b" * 16,
            "kind": "internal",
            "name": "near",
            "start_s": 0.02,
            "duration_s": 0.22,
            "error": "",
            "attributes": {"server.port": 80, "ok": True},
        }


def test_a_trace_shows_its_newest_requests(source: Source) -> None:
    """Twenty of them: an agent's may have thousands."""
    source.traces = TraceStore(1000, wall=FakeClock(NOW))
    for n in range(30):
        source.store.add(trace(trace_id="a" * 32, request_id=f"r{n}", end_s=NOW - 30 + n))
    _, reply = source.get("/debug/requests/" + "a" * 32)
    assert [one["request_id"] for one in reply["requests"]] == [f"r{n}" for n in range(29, 9, -1)]


def test_ids_that_lead_nowhere_say_what_to_do(source: Source) -> None:
    """Unknown, or the beginning of several."""
    for n in range(7):
        source.store.add(trace(trace_id=f"abcd{n}".ljust(32, "0"), end_s=NOW - n))
    status, reply = source.get("/debug/requests/nothing")
    assert (status, reply["error"]["code"]) == (404, "request_not_found")
    assert "'nothing'" in reply["error"]["message"]
    assert "GET /debug/requests lists" in reply["error"]["message"]
    status, reply = source.get("/debug/requests/abcd")
    assert (status, reply["error"]["code"]) == (400, "ambiguous_id")
    assert "7 ids of different traces begin with 'abcd', like abcd00" in reply["error"]["message"]
    assert reply["error"]["message"].count("abcd") == 6
    assert len(source.get("/debug/requests/" + "z" * 5000)[1]["error"]["message"]) < 500


def test_without_tracing_the_error_says_how_to_have_it(source: Source) -> None:
    """Not an empty list, which would be taken for quiet."""
    source.traces = None
    for path in ("/debug/requests", "/debug/requests/abcd"):
        status, reply = source.get(path)
        assert (status, reply["error"]["code"]) == (404, "not_found")
        assert "tracing.enabled: true" in reply["error"]["message"]


def test_secrets_in_traces_are_not_shown(source: Source) -> None:
    """Wherever a request could carry one, even if whoever made the trace had let it through."""
    kept = trace(
        request_id=SECRET,
        error=f"backend said: {SECRET}",
        error_type="rejected",
        steps=(span("near", error=f"Bearer {SECRET}", attributes={"http.request.body": f'{{"api_key": "{SECRET}"}}'}),),
    )
    source.store.add(kept)
    for path in ("/debug/requests", f"/debug/requests/{kept.trace_id}", f"/debug/requests/{SECRET}x"):
        assert SECRET not in json.dumps(source.get(path)[1]), path


# -- /debug/models --------------------------------------------------------------------------------------


def test_models_in_figures(source: Source) -> None:
    """Counts, sums and percentiles over all strategies; what the folder knows beside them."""
    source.facts = [
        ModelFacts(name="small", state="loaded", load_s=0.4, memory_bytes=200_000_000, restarts=1),
        ModelFacts(name="far", state="down", error=f"no backend of it is up {SECRET}"),
    ]
    source.readings = [Reading(families.PROCESS_START, ("supervisor",), NOW - 60.0)]
    writer = source.writer
    for strategy, ended, cached, number in (
        ("balanced", "success", "false", 5),
        ("random", "success", "true", 2),
        ("random", "error", "false", 1),
        ("random", "cancelled", "false", 1),
    ):
        writer.counter(families.INFERENCE, "small", strategy, ended, cached).inc(number)
    for strategy, seconds in (("balanced", 0.2), ("balanced", 0.3), ("random", 0.7), ("random", 500.0)):
        writer.histogram(families.INFERENCE_DURATION, "small", strategy).observe(seconds)
    writer.histogram(families.QUEUE_WAIT, "small").observe(0.05)
    writer.counter(families.TOKENS_PROMPT, "small", "balanced").inc(100)
    writer.counter(families.TOKENS_GENERATED, "small", "random").inc(40)
    writer.counter(families.COST, "small", "exact").inc(0.1 + 0.2)
    writer.counter(families.RETRIES, "small", "timeout").inc(3)
    writer.counter(families.INFERENCE, "__other__", "__other__", "error", "false").inc(4)
    status, reply = source.get("/debug/models")
    assert (status, reply["since"], reply["total"]) == (200, "2026-09-21T14:12:20.000Z", 3)
    gone, far, small = reply["models"]
    empty = {"count": 0, "mean": None, "p50": None, "p90": None, "p95": None, "p99": None}
    assert small == {
        "name": "small",
        "state": "loaded",
        "error": "",
        "load_s": 0.4,
        "memory_bytes": 200_000_000,
        "restarts": 1,
        "requests": {"total": 9, "success": 7, "error": 1, "cancelled": 1, "cached": 2},
        "retries": 3,
        "fallbacks": 0,
        "tokens": {"input": 100, "output": 40, "cached": 0, "reasoning": 0},
        "cost_usd": 0.3,
        "duration_s": {"count": 4, "mean": 125.3, "p50": 0.5, "p90": 120.0, "p95": 120.0, "p99": 120.0},
        "queue_wait_s": {"count": 1, "mean": 0.05, "p50": 0.055, "p90": 0.091, "p95": 0.0955, "p99": 0.0991},
        "time_to_first_token_s": empty,
        "inter_token_s": empty,
        "tokens_per_second": empty,
    }
    assert (far["name"], far["state"], far["duration_s"], far["load_s"]) == ("far", "down", empty, None)
    assert SECRET not in far["error"]
    assert (gone["name"], gone["state"], gone["requests"]["error"]) == ("__other__", "gone", 4)


def test_one_model_can_be_asked_for(source: Source) -> None:
    """One that is not there is said so."""
    source.facts += [ModelFacts(name="org/large", state="loading")]
    _, reply = source.get("/debug/models", {"model": "org/large"})
    assert [model["name"] for model in reply["models"]] == ["org/large"]
    status, reply = source.get("/debug/models", {"model": "nobody"})
    assert (status, reply["error"]["code"]) == (404, "model_not_found")
    assert "there is no model 'nobody'" in reply["error"]["message"]
    assert source.get("/debug/models", {"name": "x"})[0] == 400


def test_many_models_are_cut(source: Source) -> None:
    """How many there are is said."""
    source.facts = [ModelFacts(name=f"m{n:04}", state="down") for n in range(700)]
    _, reply = source.get("/debug/models")
    assert (len(reply["models"]), reply["total"]) == (500, 700)


def test_facts_join_what_health_and_the_folder_know() -> None:
    """Remote models have no runner; files that nobody loaded are no models."""

    def local(name: str, state: Any, **more: Any) -> LocalModel:
        return LocalModel(
            name=name, file=f"{name}.gguf", size_bytes=9, format="gguf", size_category="small", state=state, **more
        )

    facts = debug.model_facts(
        [ModelState(name="here", state="loaded"), ModelState(name="far", state="down", error="no backend of it is up")],
        [
            local("here", "loaded", load_s=1.5, memory_bytes=100, restarts=2),
            local("file", "available"),
            local("bad", "failed", error="no GGUF"),
        ],
    )
    assert facts == [
        ModelFacts(name="bad", state="failed", error="no GGUF"),
        ModelFacts(name="far", state="down", error="no backend of it is up"),
        ModelFacts(name="here", state="loaded", load_s=1.5, memory_bytes=100, restarts=2),
    ]
