"""What goes on inside, for whoever looks for a fault: state, kept requests with their timelines, models in figures.

Read-only, bounded, without secrets: of the environment nothing but versions, and texts are redacted here once more.
Not for: making or keeping traces (observe/tracing) or profiles (profile.py).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router import families
from llm_router.admin.application import json_response, read_query
from llm_router.admin.models import LocalModel
from llm_router.errors import InvalidRequest, ModelNotFound
from llm_router.observe.health.state import ModelState
from llm_router.observe.logs.redact import clean, redact_keys
from llm_router.observe.metrics.quantiles import quantile
from llm_router.observe.metrics.slots import Collected
from llm_router.observe.timestamp import timestamp
from llm_router.observe.tracing.store import LEAST_PREFIX, SHOWS, Ambiguous, GroupSummary, TraceStore
from llm_router.observe.tracing.trace import Span, Trace
from llm_router.signals import Family

_USUAL_LIMIT: Final = 50
_MOST_LISTED: Final = 200
_MOST_WHOLE: Final = 20  # requests of one trace; an agent may have thousands in it
_MOST_STEPS: Final = 30  # of a request in a list
_MOST_GROUPS: Final = 100
_MOST_MODELS: Final = 500
_MOST_IDS: Final = 5  # that an ambiguous beginning is answered with
_MOST_SHOWN: Final = 128  # characters of what somebody sent us
_DIGITS: Final = 6  # microseconds

_QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))
_HISTOGRAMS: Final = (
    ("duration_s", families.INFERENCE_DURATION),
    ("queue_wait_s", families.QUEUE_WAIT),
    ("time_to_first_token_s", families.TIME_TO_FIRST_TOKEN),
    ("inter_token_s", families.INTER_TOKEN),
    ("tokens_per_second", families.TOKENS_PER_SECOND_FAMILY),
)
_TOKENS: Final = (
    ("input", families.TOKENS_PROMPT),
    ("output", families.TOKENS_GENERATED),
    ("cached", families.TOKENS_CACHED),
    ("reasoning", families.TOKENS_REASONING),
)
_COUNTS: Final = ("total", *families.INFERENCE_STATUSES, "cached")
_NONE: Final = (0.0,)  # the value of a counter without a row
_PACKAGES: Final = (
    "alembic", "genai-prices", "httptools", "msgspec", "redis", "sqlalchemy", "starlette", "uvicorn", "uvloop", "xllamacpp",
)  # fmt: skip
_RUNNER: Final = "runner-"  # begins the names of processes that run models


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the router stands, in names and words.

    Args:
        state: as at `/health/ready`.
        models: name to what it is doing, as `ModelState.state`.
        workers: name to whether it is up.
        backends: name to whether it answers; None if that is not known.
        strategy: how a deployment is chosen where nobody says otherwise.
        engine: what runs local models, empty if there are none.
        environment: the operator's word for what the router is used for.
    """

    state: str
    initialized: bool
    ready: bool
    models: Mapping[str, str] = {}
    workers: Mapping[str, bool] = {}
    backends: Mapping[str, bool | None] = {}
    strategy: str = ""
    engine: str = ""
    environment: str = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model beside its metrics.

    Args:
        load_s: seconds its last load took; None for a remote one, or before.
        memory_bytes: resident memory of its runner; None if it has none.
        error: why it cannot serve, empty if it can.
    """

    name: str
    state: str
    load_s: float | None = None
    memory_bytes: int | None = None
    restarts: int = 0
    error: str = ""


class DebugSource(Protocol):
    """Whoever knows the router."""

    def status(self) -> RouterStatus:
        """How it stands now."""

    def health_document(self) -> Mapping[str, Any] | None:
        """The newest health report as `/health` shows it; None if health is off."""

    def collected(self) -> Collected:
        """All metrics now."""

    async def model_facts(self) -> Sequence[ModelFacts]:
        """Every model that can be asked for, and every local one that is more than a file."""


def model_facts(states: Iterable[ModelState], local: Iterable[LocalModel]) -> list[ModelFacts]:
    """What health and the models folder say, together, by name."""
    runners = {model.name: model for model in local if model.state != "available"}
    found = {}
    for state in states:
        runner = runners.pop(state.name, None)
        found[state.name] = ModelFacts(
            name=state.name,
            state=state.state,
            load_s=runner.load_s if runner else None,
            memory_bytes=runner.memory_bytes if runner else None,
            restarts=runner.restarts if runner else 0,
            error=state.error or (runner.error if runner else ""),
        )
    for name, runner in runners.items():
        found[name] = ModelFacts(
            name=name,
            state=runner.state,
            load_s=runner.load_s,
            memory_bytes=runner.memory_bytes,
            restarts=runner.restarts,
            error=runner.error,
        )
    return [found[name] for name in sorted(found)]


def routes(
    source: DebugSource,
    *,
    traces: Callable[[], TraceStore | None],
    version: str,
    now: Callable[[], float],
    metrics_enabled: bool = True,
) -> list[Route]:
    """The endpoints `/debug`, `/debug/requests`, `/debug/requests/{id}` and `/debug/models`.

    Args:
        traces: those that are kept; None while tracing is off.
        now: Unix time in seconds.
        metrics_enabled: whether requests are counted.
    """
    build: dict[str, Any] = {}

    async def show(request: Request) -> Response:
        read_query(request, ())
        if not build:
            build.update(await asyncio.to_thread(_build))
        status, collected, store = source.status(), source.collected(), traces()
        document = msgspec.structs.asdict(status)
        del document["environment"]
        loaded = sum(state == "loaded" for state in status.models.values())
        return json_response(
            {
                "status": document | {"models_loaded": loaded},
                "health": _cleaned(source.health_document()),
                "metrics": len(collected.families) if metrics_enabled else None,
                "series": collected.series if metrics_enabled else None,
                "traces": None if store is None else store.statistics()._asdict(),
                "environment": {
                    "version": version,
                    **build,
                    "uptime": _uptime(collected, now()),
                    "memory": _memory(collected),
                    "env": status.environment,
                },
            }
        )

    async def list_requests(request: Request) -> Response:
        wanted = read_query(request, ("route", "model", "show", "limit"))
        store = _store(traces())
        show = wanted.get("show", "recent")
        if show not in SHOWS:
            raise _bad("show", show, f"there are {', '.join(SHOWS)}")
        limit = _limit(wanted.get("limit"))
        found = store.select(show, route=wanted.get("route"), model=wanted.get("model"), limit=limit)
        groups = sorted(store.groups(), key=lambda group: group.newest_ns, reverse=True)
        return json_response(
            {
                "show": show,
                "requests": [_listed(trace) for trace in found],
                "groups": [_group(group) for group in groups[:_MOST_GROUPS]],
                "kept": store.statistics()._asdict(),
            }
        )

    async def show_request(request: Request) -> Response:
        read_query(request, ())
        store, id = _store(traces()), request.path_params["id"]
        try:
            found = store.find(id, limit=_MOST_WHOLE)
        except Ambiguous as error:
            ids = ", ".join(_id(id) for id in error.ids[:_MOST_IDS])
            raise InvalidRequest(
                f"{len(error.ids)} ids of different traces begin with {_id(id)!r}, like {ids}; write more of it",
                code="ambiguous_id",
                param="id",
            ) from None
        if not found:
            raise InvalidRequest(
                f"no request with the id {_id(id)!r} is kept: not every request is, and only for a while; "
                f"GET /debug/requests lists those that are (the first {LEAST_PREFIX} characters of an id are enough)",
                status=404,
                code="request_not_found",
                param="id",
            )
        return json_response({"requests": [_whole(trace) for trace in found]})

    async def show_models(request: Request) -> Response:
        name = read_query(request, ("model",)).get("model")
        facts = await source.model_facts()
        collected = source.collected()
        documents = _models(facts, collected)
        if name is not None:
            documents = [document for document in documents if document["name"] == name]
            if not documents:
                raise ModelNotFound(f"there is no model {name[:_MOST_SHOWN]!r}; GET /debug/models shows every one")
        started = _started(collected)
        since = None if started is None else timestamp(started)
        return json_response({"since": since, "models": documents[:_MOST_MODELS], "total": len(documents)})

    return [
        Route("/debug", show, methods=["GET"]),
        Route("/debug/requests", list_requests, methods=["GET"]),
        Route("/debug/requests/{id}", show_request, methods=["GET"]),
        Route("/debug/models", show_models, methods=["GET"]),
    ]


def _store(store: TraceStore | None) -> TraceStore:
    if store is None:
        raise InvalidRequest("no request is traced here; set tracing.enabled: true", status=404, code="not_found")
    return store


def _limit(text: str | None) -> int:
    if text is None:
        return _USUAL_LIMIT
    # Not only digits: int() takes Thai ones, and refuses a million of them in its own words.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text)):
        raise _bad("limit", text, f"write a number from 1 to {_MOST_LISTED}")
    return min(int(text), _MOST_LISTED)


def _bad(name: str, value: str, way_out: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name}={value[:_MOST_SHOWN]!r} cannot be had; {way_out}", code="invalid_parameter", param=name
    )


# -- requests -------------------------------------------------------------------------------------------


def _listed(trace: Trace) -> dict[str, Any]:
    """A request in a list: its timeline without details."""
    return _head(trace) | {"steps": [_step(span, trace.start_ns) for span in trace.spans[1 : 1 + _MOST_STEPS]]}


def _whole(trace: Trace) -> dict[str, Any]:
    return _head(trace) | {
        "parent_id": trace.parent_id,
        "tracestate": redact_keys(trace.tracestate),
        "spans": [
            {"span_id": span.span_id, "parent_id": span.parent_id, "kind": span.kind}
            | _step(span, trace.start_ns)
            | {"attributes": _cleaned(span.attributes)}
            for span in trace.spans
        ],
    }


def _head(trace: Trace) -> dict[str, Any]:
    return {
        "request_id": _id(trace.request_id),
        "trace_id": trace.trace_id,
        "time": timestamp(trace.start_ns / 1e9),
        "duration_s": _seconds(trace.end_ns - trace.start_ns),
        "method": trace.method,
        "route": trace.route,
        "status": trace.status,
        "outcome": trace.outcome,
        "error_type": trace.error_type,
        "error": clean(trace.spans[0].error) if trace.spans else "",
        "model": trace.model,
        "backend": trace.backend,
        "key": trace.key,
        "process": trace.process,
        "kept": trace.kept,
    }


def _step(span: Span, start_ns: int) -> dict[str, Any]:
    return {
        "name": span.name,
        "start_s": _seconds(span.start_ns - start_ns),
        "duration_s": _seconds(span.end_ns - span.start_ns),
        "error": clean(span.error),
    }


def _group(summary: GroupSummary) -> dict[str, Any]:
    return {
        "route": summary.group.route,
        "model": summary.group.model,
        "kept": summary.traces,
        "failed": summary.failed,
        "newest": timestamp(summary.newest_ns / 1e9),
        "slowest_s": _seconds(summary.slowest_ns),
    }


def _seconds(ns: int) -> float:
    return round(ns / 1e9, _DIGITS)


def _id(text: str) -> str:
    """An id that a caller chose, or was looking for."""
    return redact_keys(text[:_MOST_SHOWN])


def _cleaned(value: Any) -> Any:
    """A document without secrets in its texts."""
    if isinstance(value, str):
        return clean(value, keep_lines=True)
    if isinstance(value, Mapping):
        return {name: _cleaned(inner) for name, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# -- models ---------------------------------------------------------------------------------------------


def _models(facts: Sequence[ModelFacts], collected: Collected) -> list[dict[str, Any]]:
    """Every model, by name; those that only the metrics still know are `gone`."""
    histograms = {title: _by_model(collected, family) for title, family in _HISTOGRAMS}
    tokens = {title: _by_model(collected, family) for title, family in _TOKENS}
    costs = _by_model(collected, families.COST)
    retries = _by_model(collected, families.RETRIES)
    fallbacks = _by_model(collected, families.FALLBACKS)
    counts = _requests(collected)
    known = {model.name: model for model in facts}
    for name in counts:
        known.setdefault(name, ModelFacts(name=name, state="gone"))
    return [
        {
            "name": name,
            "state": model.state,
            "error": clean(model.error),
            "load_s": model.load_s,
            "memory_bytes": model.memory_bytes,
            "restarts": model.restarts,
            "requests": counts.get(name) or dict.fromkeys(_COUNTS, 0),
            "retries": int(retries.get(name, _NONE)[0]),
            "fallbacks": int(fallbacks.get(name, _NONE)[0]),
            "tokens": {title: int(values.get(name, _NONE)[0]) for title, values in tokens.items()},
            "cost_usd": round(costs.get(name, _NONE)[0], 9),
            **{title: _distribution(family, histograms[title].get(name)) for title, family in _HISTOGRAMS},
        }
        for name, model in sorted(known.items())
    ]


def _by_model(collected: Collected, family: Family) -> dict[str, list[float]]:
    """The values of a family's rows, summed by model."""
    position = family.labels.index("model")
    found: dict[str, list[float]] = {}
    for row in collected.rows(family):
        name = row.labels[position]
        before = found.get(name)
        found[name] = list(row.values) if before is None else [a + b for a, b in zip(before, row.values, strict=True)]
    return found


def _requests(collected: Collected) -> dict[str, dict[str, int]]:
    """How many inferences there were of each model, and how they ended."""
    found: dict[str, dict[str, int]] = {}
    for row in collected.rows(families.INFERENCE):
        model, _, status, cached = row.labels
        counts = found.setdefault(model, dict.fromkeys(_COUNTS, 0))
        number = int(row.values[0])
        counts["total"] += number
        if status in counts:  # not __other__
            counts[status] += number
        if cached == "true":
            counts["cached"] += number
    return found


def _distribution(family: Family, values: Sequence[float] | None) -> dict[str, float | int | None]:
    """How many observations there were, their mean and their quantiles; None where there were none."""
    counts, total = (values[:-1], values[-1]) if values else ((), 0.0)
    number = sum(counts)
    return {
        "count": int(number),
        "mean": round(total / number, _DIGITS) if number else None,
        **{name: _known(quantile(q, family.buckets, counts)) for name, q in _QUANTILES},
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, _DIGITS)


# -- the process ----------------------------------------------------------------------------------------


def _started(collected: Collected) -> float | None:
    """When the oldest of our processes began, which is the supervisor; Unix seconds."""
    return min((row.values[0] for row in collected.rows(families.PROCESS_START)), default=None)


def _uptime(collected: Collected, now: float) -> float | None:
    started = _started(collected)
    return None if started is None else round(max(0.0, now - started), 3)


def _memory(collected: Collected) -> dict[str, Any]:
    """Bytes: resident and private of our processes, resident of those that run models, and resident of each."""
    rss = {row.labels[0]: int(row.values[0]) for row in collected.rows(families.PROCESS_RESIDENT)}
    heap = {row.labels[0]: int(row.values[0]) for row in collected.rows(families.PROCESS_HEAP)}
    return {
        "rss": sum(size for name, size in rss.items() if not name.startswith(_RUNNER)),
        "used": sum(size for name, size in heap.items() if not name.startswith(_RUNNER)),
        "external": sum(size for name, size in rss.items() if name.startswith(_RUNNER)),
        "processes": rss,
    }


def _build() -> dict[str, Any]:
    """What we run on, which does not change; reads files."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return {"python_version": platform.python_version(), "platform": platform.platform(), "packages": packages}
