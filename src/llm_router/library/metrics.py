"""`MetricsCollector`: the router's metric families, and one's own, for a program that is not our gateway.

The twelve things of the monitoring examples are methods (`http_request`, `inference_complete`, ...) and can be told by
name (`emit("http_request", {...})`, durations in milliseconds as there). Values lie in a segment of this object's own;
those of a router that it belongs to are added when they are read, so nothing is counted twice.
Not for: the gateway, which writes its record once (instruments.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import RLock
from typing import Any, Final, TypeVar

import msgspec

from llm_router import __version__, families
from llm_router.app import Inside
from llm_router.gateway.generate import snake_name
from llm_router.library.asgi import App, RouteOf, Teller, Watched
from llm_router.library.custom import BUCKETS, MAX_SERIES, Counter, Custom, Gauge, Histogram, family_of
from llm_router.library.host import Host
from llm_router.models.registry import size_category
from llm_router.observe.metrics.exposition import CONTENT_TYPE_OPENMETRICS, CONTENT_TYPE_TEXT, Collector, Renderer
from llm_router.observe.metrics.slots import Collected, Reader, Segment, Writer
from llm_router.signals import OTHER, Family, Reading, RequestRecord

C = TypeVar("C", bound=Custom)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CALL"})
_TAKEN: Final = frozenset(family.name for family in families.FAMILIES) | {view.name for view in families.GUIDE_VIEWS}


class MetricsCollector:
    """Counts, and shows what was counted. Safe across threads.

    Args:
        enabled: off, nothing is kept or shown, and `middleware` returns the application as it is.
        guide_names: whether the unprefixed names of the monitoring guide are shown, too.
        inside: of a router that counts by itself; its values are shown with these.
        host: reads what process and machine use; None: that is not shown.
        wall: Unix seconds.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        guide_names: bool = True,
        inside: Inside | None = None,
        host: Host | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.enabled = enabled
        self._inside = inside
        self._host = host
        self._wall = wall
        self._lock = RLock()
        self._reading = RLock()
        self._writer: Writer | None = None
        self._families: tuple[Family, ...] = families.FAMILIES
        self._customs: dict[str, Custom] = {}
        self._renderer = Renderer(
            families.GUIDE_VIEWS if guide_names else (), on_collector_error=self._collector_failed
        )
        self._levels: list[Callable[[], Iterable[Reading]]] = [] if inside is None else [inside.levels]
        self._segments: list[Segment] = []
        if enabled:
            segment = Segment.private("application")
            self._writer = Writer(segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
            self._segments = [segment, *(() if inside is None else (inside.writer.segment,))]
        self._reader = Reader(self._segments, self._families)

    def __repr__(self) -> str:
        return f"<MetricsCollector {'on' if self.enabled else 'off'}, {len(self._customs)} metrics of one's own>"

    # -- the twelve ------------------------------------------------------------------------------------

    def http_request(self, method: str, route: str, status_code: int | str, duration_s: float) -> None:
        """A request ended. `route` is a template like `/items/{id}`, never a path with values in it."""
        duration_s = _amount("duration_s", duration_s)
        labels = (method if method in _METHODS else OTHER, route or OTHER, _status(status_code))
        if (writer := self._writer) is not None:
            with self._lock:
                writer.counter(families.HTTP_REQUESTS, *labels).inc()
                writer.histogram(families.HTTP_REQUEST_DURATION, *labels).observe(duration_s)

    def inference_complete(
        self,
        model: str,
        strategy: str,
        *,
        duration_s: float,
        tokens: int = 0,
        cached: bool = False,
        status: str = "success",
    ) -> None:
        """An inference ended. One that the cache answered counts as such and nowhere else: it has no duration.

        Args:
            tokens: generated.
            status: success, error or cancelled.
        """
        duration_s, tokens_made = _amount("duration_s", duration_s), _amount("tokens", tokens)
        if status not in families.INFERENCE_STATUSES:
            raise ValueError(f"status is {status!r}; it is one of {', '.join(families.INFERENCE_STATUSES)}")
        if (writer := self._writer) is None:
            return
        with self._lock:
            writer.counter(families.INFERENCE, model, strategy, status, "true" if cached else "false").inc()
            if cached:
                return
            writer.histogram(families.INFERENCE_DURATION, model, strategy).observe(duration_s)
            writer.counter(families.TOKENS_GENERATED, model, strategy).inc(tokens_made)
            if duration_s > 0 and tokens_made:
                writer.histogram(families.TOKENS_PER_SECOND_FAMILY, model).observe(tokens_made / duration_s)

    def model_loaded(self, model: str, format: str, *, size_bytes: float, duration_s: float) -> None:
        """A model was loaded: it is one more of its size category."""
        size_bytes, duration_s = _amount("size_bytes", size_bytes), _amount("duration_s", duration_s)
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(families.MODELS_LOADED, format, size_category(int(size_bytes))).inc()
                writer.histogram(families.MODEL_LOAD_DURATION, model, format).observe(duration_s)
                writer.gauge(families.MODEL_MEMORY, model, format).set(size_bytes)

    def model_unloaded(self, format: str, *, size_bytes: float, model: str = "") -> None:
        """A model was unloaded. With its name, the series of its memory leaves with it."""
        size_bytes = _amount("size_bytes", size_bytes)
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(families.MODELS_LOADED, format, size_category(int(size_bytes))).dec()
                if model:
                    writer.gauge(families.MODEL_MEMORY, model, format).remove()

    def cache_hit(self, cache_type: str = "response") -> None:
        """A cache had the answer."""
        self._count(families.CACHE_HITS, cache_type)

    def cache_miss(self, cache_type: str = "response") -> None:
        """A cache did not have the answer."""
        self._count(families.CACHE_MISSES, cache_type)

    def cache_size_update(self, cache_type: str, size_bytes: float) -> None:
        """A cache holds so many bytes."""
        self._set(families.CACHE_SIZE, _amount("size_bytes", size_bytes), cache_type)

    def connection_open(self, type: str = "client", protocol: str = "http") -> None:
        """A connection was opened."""
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(families.ACTIVE_CONNECTIONS, type, protocol).inc()

    def connection_close(self, type: str = "client", protocol: str = "http", *, duration_s: float) -> None:
        """A connection was closed after so long."""
        duration_s = _amount("duration_s", duration_s)
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(families.ACTIVE_CONNECTIONS, type, protocol).dec()
                writer.histogram(families.CONNECTION_DURATION, type, protocol).observe(duration_s)

    def error(self, type: str, component: str = "application", severity: str = "error") -> None:
        """Something failed. All three are words of a short list of yours."""
        self._count(families.ERRORS, type, component, severity)

    def queue_size_change(self, queue_type: str, size: float) -> None:
        """So many wait in a queue."""
        self._set(families.QUEUE_SIZE, _amount("size", size), queue_type)

    def queue_processed(self, queue_type: str, duration_s: float) -> None:
        """Something was taken from a queue and done, which took so long."""
        duration_s = _amount("duration_s", duration_s)
        if (writer := self._writer) is not None:
            with self._lock:
                writer.histogram(families.QUEUE_PROCESSING, queue_type).observe(duration_s)

    def emit(self, event: str, data: Mapping[str, Any] | str | None = None) -> None:
        """Tell one of the twelve by name, with the keys of the monitoring examples (camelCase or snake_case).

        `duration` and `processingTime` are milliseconds, `size` is bytes or a number of things, as there.

        Raises: ValueError for an event, or a key, that there is not; or a value that cannot be counted.
        """
        tell = _EVENTS.get(event)
        if tell is None:
            raise ValueError(f"there is no event {event!r}; there are {', '.join(_EVENTS)}")
        told = _Told(event, {"cache_type": data} if isinstance(data, str) else data or {})
        tell(self, told)

    # -- one's own ---------------------------------------------------------------------------------------

    def counter(
        self, name: str, help: str = "", labels: Sequence[str] = (), *, max_series: int = MAX_SERIES
    ) -> Counter:
        """A counter of one's own, the same one for the same name; its name gets `_total` if it does not end so.

        Raises: ValueError for a name, label or shape that cannot be used, or one that is taken.
        """
        return self._custom(Counter, family_of("counter", name, help, labels, (), max_series))

    def gauge(self, name: str, help: str = "", labels: Sequence[str] = (), *, max_series: int = MAX_SERIES) -> Gauge:
        """A gauge of one's own, as `counter`."""
        return self._custom(Gauge, family_of("gauge", name, help, labels, (), max_series))

    def histogram(
        self,
        name: str,
        help: str = "",
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = BUCKETS,
        max_series: int = MAX_SERIES,
    ) -> Histogram:
        """A histogram of one's own, as `counter`. `buckets` are upper bounds, ascending; +Inf is always there."""
        return self._custom(Histogram, family_of("histogram", name, help, labels, buckets, max_series))

    def register(self, collector: Collector) -> None:
        """Show the families of a prometheus_client collector, or of a whole registry, too.

        One that raises costs its own families only, and counts in `llm_router_errors_total{type="render"}`.
        """
        with self._reading:
            self._renderer.register(collector)

    def unregister(self, collector: Collector) -> None:
        """Show them no longer. Raises: ValueError if they were not."""
        with self._reading:
            self._renderer.unregister(collector)

    def show(self, levels: Callable[[], Iterable[Reading]]) -> None:
        """Show levels that live elsewhere, too: asked for at each look, by whoever looks. Twice does nothing."""
        if levels not in self._levels:
            self._levels.append(levels)

    # -- ASGI --------------------------------------------------------------------------------------------

    def middleware(self, app: App, *, route_of: RouteOf | None = None) -> App:
        """`app` with its HTTP requests counted by route template; `app.add_middleware(metrics.middleware)` works.

        Args:
            route_of: what a request is counted under, for frameworks other than Starlette and FastAPI.
        """
        return Watched(app, _Counting(self), route_of=route_of) if self.enabled else app

    # -- showing -----------------------------------------------------------------------------------------

    content_type: Final = CONTENT_TYPE_TEXT
    """Of `get_metrics()`; that of OpenMetrics is `openmetrics_content_type`."""

    openmetrics_content_type: Final = CONTENT_TYPE_OPENMETRICS

    def get_metrics(self, *, openmetrics: bool = False) -> str:
        """Everything in the text format of Prometheus, or in OpenMetrics."""
        return self(openmetrics=openmetrics).decode()

    def get_metrics_json(self) -> list[dict[str, Any]]:
        """The same as JSON: `[{name, help, type, aggregator, values: [{labels, value}]}]`."""
        document: list[dict[str, Any]] = msgspec.json.decode(self.render_json())
        return document

    def __call__(self, *, openmetrics: bool = False) -> bytes:
        """As `get_metrics`, encoded: what `LLMRouter.metrics()` gives."""
        if not self.enabled:
            return b"# EOF\n" if openmetrics else b""
        with self._reading:
            return self._renderer.render(self._collect(), openmetrics=openmetrics)

    def render_json(self) -> bytes:
        """As `get_metrics_json`, encoded."""
        if not self.enabled:
            return b"[]"
        with self._reading:
            return self._renderer.render_json(self._collect())

    def collected(self) -> Collected:
        """All values now, as records, those of the guide's names included."""
        if not self.enabled:
            return Collected([])
        with self._reading:
            collected = self._collect()
            return Collected([*collected.families, *self._renderer.views(collected)])

    def reset(self) -> None:
        """Set everything that was counted back to 0, for tests; levels that a router itself keeps stay."""
        if self._writer is not None:
            with self._lock:
                self._writer.reset(levels=True)
                if self._inside is not None:
                    self._inside.writer.reset(levels=False)

    # -- inside ------------------------------------------------------------------------------------------

    def _collect(self) -> Collected:
        readings: list[Reading] = [Reading(families.BUILD_INFO, (__version__,), 1.0)]
        if self._host is not None:
            readings += self._host.readings()
        for levels in self._levels:
            readings += levels()
        return self._reader.collect(readings)

    def _custom(self, kind: type[C], family: Family) -> C:
        with self._lock:
            known = self._customs.get(family.name)
            if known is not None:
                if known.family != family:
                    raise ValueError(f"{family.name} is there already, with another type, help, labels or buckets")
                assert isinstance(known, kind), "its family has the same type"
                return known
            if family.name in _TAKEN:
                raise ValueError(f"{family.name} is a family of the router's; choose another name")
            if self._writer is not None:
                self._writer.declare(family)
                self._families = (*self._families, family)
                self._reader = Reader(self._segments, self._families)  # who reads now goes on with the former
            custom = kind(family, self._writer, self._lock)
            self._customs[family.name] = custom
            return custom

    def _count(self, family: Family, *labels: str) -> None:
        if (writer := self._writer) is not None:
            with self._lock:
                writer.counter(family, *labels).inc()

    def _set(self, family: Family, value: float, *labels: str) -> None:
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(family, *labels).set(value)

    def in_flight(self, change: float) -> None:
        """So many requests more, or less, are being served; `middleware` tells."""
        if (writer := self._writer) is not None:
            with self._lock:
                writer.gauge(families.REQUESTS_IN_FLIGHT).inc(change)

    def health_checked(self, check: str, seconds: float) -> None:
        """A health check ran for so long; a `HealthChecker` tells."""
        if (writer := self._writer) is not None:
            with self._lock:
                writer.histogram(families.HEALTH_CHECK_DURATION, check).observe(seconds)

    def health_turned(self, check: str) -> None:
        """A health check changed between healthy and not; a `HealthChecker` tells."""
        self._count(families.HEALTH_CHECK_TRANSITIONS, check)

    @property
    def has_router(self) -> bool:
        """Whether a router's values are shown with these."""
        return self._inside is not None

    def _collector_failed(self, error: Exception) -> None:
        self.error("render", *families.ERROR_KINDS["render"])


class _Counting(Teller):
    """Counts what a middleware saw, but for what the router inside the application has counted already."""

    def __init__(self, metrics: MetricsCollector) -> None:
        self._metrics = metrics

    def begin(self) -> None:
        self._metrics.in_flight(1.0)

    def counted(self) -> None:
        if self._metrics.has_router:
            self._metrics.in_flight(-1.0)

    def finish(self, record: RequestRecord, now: float, *, is_counted: bool) -> None:
        if not (is_counted and self._metrics.has_router):
            self._metrics.in_flight(-1.0)
            self._metrics.http_request(record.method, record.route, record.status, now - record.started_at)


def _amount(name: str, value: object) -> float:
    """A number from 0. Raises: ValueError, naming it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; it is a number from 0")
    return float(value)


def _status(code: int | str) -> str:
    text = str(code)
    return text if len(text) == 3 and text.isascii() and text.isdecimal() and "100" <= text <= "599" else OTHER


# -- events by name -----------------------------------------------------------------------------------


class _Told:
    """The data of an event, by names in either case."""

    def __init__(self, event: str, data: object) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"the data of {event} are {type(data).__name__}; they are a mapping")
        self._event = event
        self._data = {snake_name(str(name)): value for name, value in data.items()}

    def text(self, name: str, usual: str | None = None) -> str:
        return str(self._of(name, usual))

    def number(self, name: str, usual: float | None = None) -> float:
        return _amount(f"{name} of {self._event}", self._of(name, usual))

    def seconds(self, name: str) -> float:
        return self.number(name) / 1000

    def flag(self, name: str) -> bool:
        return self._data.get(name) in (True, "true")

    def _of(self, name: str, usual: Any) -> Any:
        value = self._data.get(name, usual)
        if value is None:
            raise ValueError(f"{self._event} needs {name!r}; given were {', '.join(self._data) or 'none'}")
        return value


_EVENTS: Final[Mapping[str, Callable[[MetricsCollector, _Told], None]]] = {
    "http_request": lambda m, d: m.http_request(
        d.text("method"), d.text("route"), d.text("status_code"), d.seconds("duration")
    ),
    "inference_complete": lambda m, d: m.inference_complete(
        d.text("model"),
        d.text("strategy", OTHER),
        duration_s=d.seconds("duration"),
        tokens=int(d.number("tokens", 0)),
        cached=d.flag("cached"),
        status=d.text("status", "success"),
    ),
    "model_loaded": lambda m, d: m.model_loaded(
        d.text("model"), d.text("format"), size_bytes=d.number("size"), duration_s=d.seconds("duration")
    ),
    "model_unloaded": lambda m, d: m.model_unloaded(
        d.text("format"), size_bytes=d.number("size"), model=d.text("model", "")
    ),
    "cache_hit": lambda m, d: m.cache_hit(d.text("cache_type", "response")),
    "cache_miss": lambda m, d: m.cache_miss(d.text("cache_type", "response")),
    "cache_size_update": lambda m, d: m.cache_size_update(d.text("cache_type"), d.number("size")),
    "connection_open": lambda m, d: m.connection_open(d.text("type"), d.text("protocol")),
    "connection_close": lambda m, d: m.connection_close(
        d.text("type"), d.text("protocol"), duration_s=d.seconds("duration")
    ),
    "error": lambda m, d: m.error(d.text("type"), d.text("component", "application"), d.text("severity", "error")),
    "queue_size_change": lambda m, d: m.queue_size_change(d.text("queue_type"), d.number("size")),
    "queue_processed": lambda m, d: m.queue_processed(d.text("queue_type"), d.seconds("processing_time")),
}
