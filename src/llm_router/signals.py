"""What the router tells the world: the shape of a metric family, the record of a request, and who receives it.

The request path fills one `RequestRecord` per request and hands it over once, when the request ends,
whatever way it ends. It does not know what becomes of it: metrics, logs, spans and usage rows are made
by whoever implements `Recorder`. Not for: declaring families (families.py) or storing values (observe).
Standard library only: the supervisor imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal, NamedTuple, Protocol

MetricType = Literal["counter", "gauge", "histogram"]

OTHER = "__other__"
"""The label value that stands for everything beyond a cardinality cap, and for unknown models and routes."""


class Family(NamedTuple):
    """One metric family. `name` is the full exported name (counters end in `_total`).

    `buckets` are upper bounds without +Inf, ascending; empty unless a histogram. `cap` bounds the
    label sets that one process may create; the next one is counted under `__other__`.
    """

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    unit: str = ""
    cap: int = 1000


class View(NamedTuple):
    """A second name for the values of a family: `labels` maps each label of the view to one of the source.

    Rows of the source that fall together are summed; `scale` multiplies values (ratio -> percent).
    `where` keeps only rows of the source with these label values.
    """

    name: str
    source: Family
    labels: tuple[tuple[str, str], ...]
    help: str
    scale: float = 1.0
    where: tuple[tuple[str, str], ...] = ()


class Reading(NamedTuple):
    """A value computed at the moment of reading: levels and states that live elsewhere."""

    family: Family
    labels: tuple[str, ...]
    value: float


Outcome = Literal["success", "error", "cancelled"]
UsageSource = Literal["provider", "estimated", "partial", "none"]
Kept = Literal["", "sampled", "error", "slow", "first", "recent"]
"""Why a request's trace is kept. `recent` ones are shown by /debug/requests and not exported."""

CostStatus = Literal["", "exact", "estimated"]
"""Whether price and usage are both known for sure; empty when there is no price."""


class Attempt:
    """One try at one backend. `outcome` is `success`, `cancelled` or a fault domain; times are monotonic seconds.

    `span_id` is what the backend was told as its parent (16 hex digits, empty outside a trace), `upstream_model` the name by
    which it knows the model; `status` is the HTTP status of its reply, 0 if there was none.
    """

    __slots__ = ("backend", "ended_at", "outcome", "span_id", "started_at", "status", "upstream_model")

    def __init__(self, backend: str, started_at: float, span_id: str = "", upstream_model: str = "") -> None:
        self.backend = backend
        self.started_at = started_at
        self.ended_at = 0.0
        self.outcome = ""
        self.span_id = span_id
        self.upstream_model = upstream_model
        self.status = 0


NO_HEADERS: Mapping[bytes, bytes] = {}
"""Of a record that comes from no HTTP request."""


class RequestRecord:
    """Everything that is measured about one HTTP request; plain attributes, filled as the request goes on.

    Owned by the one task that serves the request. `is_inference` decides whether the inference families
    are written. Times are monotonic seconds. `gaps_s` holds the seconds between consecutive content
    chunks of a stream. `key` and `key_id` are name and id of the caller's key, empty without one. `queued_at` is when it came to the
    queue of the model that it was last sent to, `slot_at` when its turn came, 0 if it never did; `waits` has the queues that it left for a fallback. `cache_type`
    is the cache that was asked, empty if none was; `cached` says whether it answered. `error_type` is a key of `families.ERROR_KINDS`, empty for success;
    `error` says it in words, without secrets of ours.

    Of the request: `path` and `query` as they came, `headers` by lower-case names (with the caller's credentials: whoever
    shows any of them takes those it knows to be harmless), `client` as `ip:port`. Of the reply: `response_type` and
    `response_bytes` of its body. `request_body` and `response_body` are there only where the operator asked for content.

    Of the trace: `trace_id` (32 hex digits), `span_id` (16) of the request itself and `parent_id` of the caller's span, empty
    if it has none; `is_sampled` as the caller or the head sampler decided; `has_bad_trace` if the caller sent a traceparent
    that is none. `kept` is why the whole trace is kept, empty if it is not; whoever records decides that at the end.

    Instants on the way, 0 if it did not come there: `begun_at` (the whole request had arrived), `identified_at` (its key was
    looked up), `allowed_at` (limits let it pass), `looked_up_at` (the cache had been asked), `routed_at` (a backend was
    chosen for the first time).
    """

    __slots__ = (
        "allowed_at",
        "attempts",
        "begun_at",
        "cache_type",
        "cached",
        "cached_tokens",
        "client",
        "cost_status",
        "cost_usd",
        "error",
        "error_type",
        "fallback_reasons",
        "finished",
        "first_token_at",
        "gaps_s",
        "has_bad_trace",
        "headers",
        "identified_at",
        "input_tokens",
        "is_inference",
        "is_sampled",
        "kept",
        "key",
        "key_id",
        "limit_hit",
        "looked_up_at",
        "method",
        "model",
        "outcome",
        "output_tokens",
        "parent_id",
        "path",
        "query",
        "queued_at",
        "reason",
        "reasoning_tokens",
        "request_body",
        "request_id",
        "response_body",
        "response_bytes",
        "response_type",
        "retry_reasons",
        "route",
        "routed_at",
        "slot_at",
        "span_id",
        "started_at",
        "status",
        "strategy",
        "trace_id",
        "tracestate",
        "usage_source",
        "waits",
    )

    def __init__(self, method: str, route: str, request_id: str, started_at: float) -> None:
        self.method = method
        self.route = route
        self.request_id = request_id
        self.started_at = started_at
        self.status = 0
        self.finished = False
        self.is_inference = False
        self.model = OTHER
        self.strategy = OTHER
        self.reason = ""
        self.outcome: Outcome = "error"
        self.error_type = ""
        self.cached = False
        self.attempts: list[Attempt] = []
        self.retry_reasons: tuple[tuple[str, str], ...] = ()  # (model asked again, reason)
        self.fallback_reasons: tuple[tuple[str, str], ...] = ()  # (model fallen back from, reason)
        self.input_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.usage_source: UsageSource = "none"
        self.cost_usd = 0.0
        self.cost_status: CostStatus = ""
        self.key = ""
        self.key_id = ""
        self.limit_hit: tuple[str, str] | None = None  # (scope, limit) that refused it
        self.cache_type = ""
        self.queued_at = 0.0
        self.slot_at = 0.0
        self.waits: tuple[tuple[str, float], ...] = ()  # (model given up waiting for, seconds)
        self.first_token_at = 0.0
        self.gaps_s: list[float] | None = None
        self.error = ""
        self.path = ""
        self.query = ""
        self.headers = NO_HEADERS
        self.client = ""
        self.response_type = b""
        self.response_bytes = 0
        self.request_body: bytes | None = None
        self.response_body: bytes | bytearray | None = None
        self.trace_id = ""
        self.span_id = ""
        self.parent_id = ""
        self.tracestate = ""
        self.is_sampled = False
        self.has_bad_trace = False
        self.kept: Kept = ""
        self.begun_at = 0.0
        self.identified_at = 0.0
        self.allowed_at = 0.0
        self.looked_up_at = 0.0
        self.routed_at = 0.0


CURRENT: ContextVar[RequestRecord | None] = ContextVar("llm_router_request", default=None)
"""The request that the running task serves: log lines written meanwhile name it."""


class Recorder(Protocol):
    """Receives what happened. Every method is synchronous, does not block and does not raise."""

    def begin(self) -> None:
        """A request began: it is in flight until `finish`."""

    def finish(self, record: RequestRecord, now: float) -> None:
        """The request ended at monotonic instant `now`. Called exactly once per `begin`."""

    def gaps(self, record: RequestRecord) -> None:
        """Take `record.gaps_s` and empty it: called now and then by long streams so that it stays small."""

    def connection_opened(self, type: str, protocol: str) -> None:
        """A connection of `type` client or upstream began to speak `protocol` (http, sse, websocket)."""

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None:
        """The counterpart of `connection_opened`."""

    def error(self, type: str) -> None:
        """Something failed that belongs to no request; `type` is a key of `families.ERROR_KINDS`."""


class Around:
    """Around another recorder, to which it passes on everything but `finish`: that is for subclasses, and calls `inner`."""

    def __init__(self, inner: Recorder) -> None:
        self._finish = inner.finish
        # Bound here, as a method in between would cost every request and every chunk some of its time.
        self.begin = inner.begin
        self.gaps = inner.gaps
        self.connection_opened = inner.connection_opened
        self.connection_closed = inner.connection_closed
        self.error = inner.error


class NoRecorder:
    """Records nothing: for probes, and for tests that do not look."""

    def begin(self) -> None: ...

    def finish(self, record: RequestRecord, now: float) -> None:
        record.finished = True

    def gaps(self, record: RequestRecord) -> None: ...

    def connection_opened(self, type: str, protocol: str) -> None: ...

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None: ...

    def error(self, type: str) -> None: ...
