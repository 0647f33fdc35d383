"""One request's trace as it is kept, shown and exported: a span for the request, and one for each step of it.

Not for: making it (spans.py), deciding whether it is kept (keep.py) or any wire format (otlp.py).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llm_router.signals import Kept

SpanKind = Literal["server", "client", "internal"]
Value = str | int | float | bool


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Instants are Unix nanoseconds; `error` says in words what went wrong, empty if nothing did."""

    name: str
    span_id: str
    parent_id: str
    kind: SpanKind
    start_ns: int
    end_ns: int
    error: str = ""
    attributes: dict[str, Value] = {}


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `spans[0]` is the request itself; the others follow in the order of their beginnings.

    Args:
        kept: why; `recent` ones are not exported.
        parent_id: the caller's span, empty if it has none.
        process: that served it, like `worker-0`.
        outcome, error_type: as in `signals.RequestRecord`.
    """

    trace_id: str
    request_id: str
    kept: Kept
    parent_id: str = ""
    tracestate: str = ""
    process: str = ""
    method: str = ""
    route: str = ""
    model: str = ""
    backend: str = ""
    key: str = ""
    status: int = 0
    outcome: str = ""
    error_type: str = ""
    start_ns: int = 0
    end_ns: int = 0
    spans: tuple[Span, ...] = ()

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9
