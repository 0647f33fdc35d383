"""What the router tells the world: the shape of a metric family, the record of a request, and who receives it.

The request path fills one `RequestRecord` per request and hands it over once, when the request ends,
whatever way it ends. It does not know what becomes of it: metrics, logs, spans and usage rows are made
by whoever implements `Recorder`. Not for: declaring families (families.py) or storing values (observe).
Standard library only: the supervisor imports it.
"""

from __future__ import annotations

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
CostStatus = Literal["", "exact", "estimated"]
"""Whether price and usage are both known for sure; empty when there is no price."""


class Attempt:
    """One try at one backend. `outcome` is `success`, `cancelled` or a fault domain; times are monotonic seconds."""

    __slots__ = ("backend", "ended_at", "outcome", "started_at")

    def __init__(self, backend: str, started_at: float) -> None:
        self.backend = backend
        self.started_at = started_at
        self.ended_at = 0.0
        self.outcome = ""


class RequestRecord:
    """Everything that is measured about one HTTP request; plain attributes, filled as the request goes on.

    Owned by the one task that serves the request. `is_inference` decides whether the inference families
    are written. Times are monotonic seconds. `gaps_s` holds the seconds between consecutive content
    chunks of a stream. `key` and `key_id` are name and id of the caller's key, empty without one. `queued_at` is when it came to the
    queue of the model that it was last sent to, `slot_at` when its turn came, 0 if it never did; `waits` has the queues that it left for a fallback. `cache_type`
    is the cache that was asked, empty if none was; `cached` says whether it answered. `error_type` is a key of `families.ERROR_KINDS`, empty for success.
    """

    __slots__ = (
        "attempts",
        "cache_type",
        "cached",
        "cached_tokens",
        "cost_status",
        "cost_usd",
        "error_type",
        "fallback_reasons",
        "finished",
        "first_token_at",
        "gaps_s",
        "input_tokens",
        "is_inference",
        "key",
        "key_id",
        "limit_hit",
        "method",
        "model",
        "outcome",
        "output_tokens",
        "queued_at",
        "reason",
        "reasoning_tokens",
        "request_id",
        "retry_reasons",
        "route",
        "slot_at",
        "started_at",
        "status",
        "strategy",
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


class NoRecorder:
    """Records nothing: for probes, and for tests that do not look."""

    def begin(self) -> None: ...

    def finish(self, record: RequestRecord, now: float) -> None:
        record.finished = True

    def gaps(self, record: RequestRecord) -> None: ...

    def connection_opened(self, type: str, protocol: str) -> None: ...

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None: ...

    def error(self, type: str) -> None: ...
