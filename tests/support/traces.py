"""Traces for tests: as many as are wanted, each with what the test says and usual values for the rest."""

from __future__ import annotations

import itertools

from llm_router.observe.tracing.trace import Span, SpanKind, Trace, Value
from llm_router.signals import Kept, Outcome

MS = 1_000_000
SECOND = 1_000_000_000
_NUMBERS = itertools.count(1)


def span(
    name: str,
    start_ms: float = 0.0,
    end_ms: float = 0.0,
    *,
    id: str = "",
    parent: str = "",
    of_s: float = 0.0,
    error: str = "",
    kind: SpanKind = "internal",
    attributes: dict[str, Value] | None = None,
) -> Span:
    """A step from `start_ms` to `end_ms` of a request that began at `of_s`, Unix seconds."""
    return Span(
        name=name,
        span_id=id or f"{next(_NUMBERS):016x}",
        parent_id=parent,
        kind=kind,
        start_ns=round(of_s * SECOND + start_ms * MS),
        end_ns=round(of_s * SECOND + end_ms * MS),
        error=error,
        attributes=attributes or {},
    )


def trace(
    *,
    end_s: float = 1000.0,
    seconds: float = 0.25,
    route: str = "/v1/chat/completions",
    model: str = "small",
    request_id: str = "",
    trace_id: str = "",
    status: int = 200,
    error_type: str = "",
    error: str = "",
    outcome: Outcome | None = None,
    kept: Kept = "sampled",
    steps: tuple[Span, ...] = (),
) -> Trace:
    """A request that ended at `end_s` after `seconds`; without a `trace_id` it is in a trace of its own."""
    number = next(_NUMBERS)
    start_ns, end_ns = round((end_s - seconds) * SECOND), round(end_s * SECOND)
    request = Span(
        name=f"POST {route}",
        span_id=f"{number:016x}",
        parent_id="",
        kind="server",
        start_ns=start_ns,
        end_ns=end_ns,
        error=error,
    )
    return Trace(
        trace_id=trace_id or f"{number:08x}".ljust(32, "e"),
        request_id=request_id or f"req-{number}",
        kept=kept,
        process="worker-0",
        method="POST",
        route=route,
        model=model,
        backend="near",
        key="app",
        status=status,
        outcome=outcome or ("error" if error_type else "success"),
        error_type=error_type,
        start_ns=start_ns,
        end_ns=end_ns,
        spans=(request, *steps),
    )
