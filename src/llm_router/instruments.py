"""The one place where the request path's metrics are written: one call per request, when it ends.

Children are bound once and are then indices into shared memory; the label values come from closed lists,
configured names or route templates, never from a caller's text. Not for: declaring families (families.py),
deciding what happened (gateway, routing) or storing values (observe.metrics).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Final, get_args

from llm_router import families
from llm_router.observe.metrics.slots import Histogram, Writer
from llm_router.signals import OTHER, Kept, RequestRecord

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_EXEMPLAR_EVERY_S = 1.0
"""An example of each bucket is renewed at most this often: it costs ten times as much as counting."""


_KEPT: Final = tuple(reason for reason in get_args(Kept) if reason)
_EXPORTED: Final = frozenset(_KEPT) - {"recent"}


class _Http:
    """Children for one (method, route, status)."""

    __slots__ = ("duration", "exemplar_at", "total")

    def __init__(self, writer: Writer, method: str, route: str, status: int) -> None:
        labels = (method, route, str(status) if 100 <= status <= 599 else OTHER)
        self.total = writer.counter(families.HTTP_REQUESTS, *labels).index
        self.duration = writer.histogram(families.HTTP_REQUEST_DURATION, *labels)
        self.exemplar_at = 0.0


class _Inference:
    """Children for one (model, strategy)."""

    __slots__ = (
        "cached",
        "cached_tokens",
        "costs",
        "duration",
        "exemplar_at",
        "first_token",
        "gap",
        "generated",
        "processing",
        "prompt",
        "rate",
        "reasoning",
        "statuses",
        "wait",
    )

    def __init__(self, writer: Writer, model: str, strategy: str) -> None:
        self.statuses = {
            status: writer.counter(families.INFERENCE, model, strategy, status, "false").index
            for status in families.INFERENCE_STATUSES
        }
        self.cached = writer.counter(families.INFERENCE, model, strategy, "success", "true").index
        self.costs = {status: writer.counter(families.COST, model, status).index for status in families.COST_STATUSES}
        self.cached_tokens = writer.counter(families.TOKENS_CACHED, model, strategy).index
        self.reasoning = writer.counter(families.TOKENS_REASONING, model, strategy).index
        self.wait = writer.histogram(families.QUEUE_WAIT, model)
        self.processing = writer.histogram(families.QUEUE_PROCESSING, model)
        self.duration = writer.histogram(families.INFERENCE_DURATION, model, strategy)
        self.generated = writer.counter(families.TOKENS_GENERATED, model, strategy).index
        self.prompt = writer.counter(families.TOKENS_PROMPT, model, strategy).index
        self.rate = writer.histogram(families.TOKENS_PER_SECOND_FAMILY, model)
        self.first_token = writer.histogram(families.TIME_TO_FIRST_TOKEN, model)
        self.gap = writer.histogram(families.INTER_TOKEN, model)
        self.exemplar_at = 0.0


class Instruments:
    """Implements `signals.Recorder` over a segment of metric slots. Belongs to the thread that made it.

    Histograms have an example of a request whose trace is exported, each bucket at most once a second; where there are
    no traces, of any request.

    Args:
        writer: of this process's segment.
        wall: Unix seconds, for exemplars.
    """

    def __init__(self, writer: Writer, wall: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._values = writer.values
        self._wall = wall
        self._sample: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._kept = {reason: writer.counter(families.TRACES_KEPT, reason).index for reason in _KEPT}
        self._bad_traces = writer.counter(families.TRACE_CONTEXT_INVALID).index
        self._http: dict[tuple[str, str, int], _Http] = {}
        self._inference: dict[tuple[str, str], _Inference] = {}
        self._decisions: dict[tuple[str, str, str], int] = {}
        self._attempts: dict[tuple[str, str], int] = {}
        self._keys: dict[str, tuple[int, int]] = {}
        self._overhead = writer.histogram(families.OVERHEAD)
        self._caches = {
            type: (
                writer.counter(families.CACHE_HITS, type).index,
                writer.counter(families.CACHE_MISSES, type).index,
            )
            for type in families.CACHE_TYPES
        }
        lost = writer.inherited(families.REQUESTS_IN_FLIGHT).get((), 0.0)
        self._in_flight = writer.gauge(families.REQUESTS_IN_FLIGHT).index
        self._usage = {s: writer.counter(families.USAGE_RECORDS, s).index for s in families.USAGE_SOURCES}
        self._errors = {
            kind: writer.counter(families.ERRORS, kind, component, severity).index
            for kind, (component, severity) in families.ERROR_KINDS.items()
        }
        self._open = {
            (type, protocol): writer.gauge(families.ACTIVE_CONNECTIONS, type, protocol).index
            for type in families.CONNECTION_TYPES
            for protocol in families.CONNECTION_PROTOCOLS
        }
        self._connection_s = {
            key: writer.histogram(families.CONNECTION_DURATION, *key)
            for key in self._open
            if key[1] != "websocket"  # nothing speaks it yet
        }
        if lost > 0:  # the worker whose segment this was died with these requests in hand
            self._values[self._errors["worker_lost"]] += lost

    def admit(self, models: Iterable[tuple[str, str]]) -> None:
        """Have the label sets of these (model, strategy) pairs exist, at 0, before the first request."""
        for model, strategy in models:
            self._of(model, strategy)

    def sample(self, every: Mapping[str, int]) -> None:
        """Observe only one in `every[route]` requests in histograms, from now on; counters stay exact."""
        sample = {route: n for route, n in every.items() if n > 1}
        if sample != self._sample:  # else every snapshot would begin to count anew, and one in n be more
            self._sample = sample
            self._seen = dict.fromkeys(sample, 0)

    def begin(self) -> None:
        self._values[self._in_flight] += 1.0

    def finish(self, record: RequestRecord, now: float) -> None:
        if record.finished:
            return
        record.finished = True
        values = self._values
        values[self._in_flight] -= 1.0
        total_s = now - record.started_at
        key = (record.method, record.route, record.status)
        http = self._http.get(key)
        if http is None:
            http = self._new_http(*key)
        values[http.total] += 1.0
        observes = not self._sample or self._is_its_turn(record.route)
        if observes:
            duration = http.duration
            if record.kept in _EXPORTED and now - http.exemplar_at >= _EXEMPLAR_EVERY_S:
                http.exemplar_at = now
                duration.observe_with_exemplar(total_s, _example(record), self._wall())
            else:
                values[duration.base + bisect_left(duration.bounds, total_s)] += 1.0
                values[duration.sum_index] += total_s
        if record.error_type:
            values[self._errors[record.error_type]] += 1.0
        if record.kept:
            values[self._kept[record.kept]] += 1.0
        if record.has_bad_trace:
            values[self._bad_traces] += 1.0
        if record.is_inference:
            self._finish_inference(record, now, total_s, observes)

    def _is_its_turn(self, route: str) -> bool:
        """Whether histograms observe this request of a route that is sampled."""
        every = self._sample.get(route)
        if every is None:
            return True
        seen = self._seen[route]
        self._seen[route] = seen + 1
        return seen % every == 0

    def _new_http(self, method: str, route: str, status: int) -> _Http:
        """A method that HTTP does not know is not remembered: under an ASGI server callers may send any word."""
        key = (method if method in _METHODS else OTHER, route, status)
        http = self._http.get(key)
        if http is None:
            http = self._http[key] = _Http(self._writer, *key)
        return http

    def _finish_inference(self, record: RequestRecord, now: float, total_s: float, observes: bool) -> None:
        values = self._values
        model = record.model
        strategy = record.strategy
        children = self._inference.get((model, strategy)) or self._of(model, strategy)
        if record.key:
            self._count_key(record)
        if record.cache_type:
            hits, misses = self._caches[record.cache_type]
            values[hits if record.cached else misses] += 1.0
        if record.cached:
            values[children.cached] += 1.0
            return
        if record.limit_hit is not None:
            self._writer.counter(families.RATE_LIMIT_HITS, *record.limit_hit).inc()
        values[children.statuses[record.outcome]] += 1.0
        if record.queued_at and observes:
            wait, processing = children.wait, children.processing
            slot_at = record.slot_at or now
            wait_s = slot_at - record.queued_at
            values[wait.base + bisect_left(wait.bounds, wait_s)] += 1.0
            values[wait.sum_index] += wait_s
            if record.slot_at:
                processing_s = now - slot_at
                values[processing.base + bisect_left(processing.bounds, processing_s)] += 1.0
                values[processing.sum_index] += processing_s
        upstream_s = 0.0
        for attempt in record.attempts:
            upstream_s += (attempt.ended_at or now) - attempt.started_at
            outcome = (attempt.backend, attempt.outcome or "cancelled")
            index = self._attempts.get(outcome)
            if index is None:
                index = self._attempts[outcome] = self._writer.counter(families.ATTEMPTS, *outcome).index
            values[index] += 1.0
        if record.reason:
            decision = (strategy, model, record.reason)
            index = self._decisions.get(decision)
            if index is None:
                index = self._decisions[decision] = self._writer.counter(families.ROUTING_DECISIONS, *decision).index
            values[index] += 1.0
        if record.retry_reasons or record.fallback_reasons:
            self._repeated(record)
        if record.attempts and observes:
            overhead_s = total_s - upstream_s
            overhead = self._overhead
            values[overhead.base + bisect_left(overhead.bounds, overhead_s)] += 1.0
            values[overhead.sum_index] += overhead_s
        values[self._usage[record.usage_source]] += 1.0
        if observes:
            self._observe(children, record, now, total_s)
        values[children.prompt] += record.input_tokens
        if record.cost_status:
            values[children.costs[record.cost_status]] += record.cost_usd
        if record.cached_tokens:
            values[children.cached_tokens] += record.cached_tokens
        if record.reasoning_tokens:
            values[children.reasoning] += record.reasoning_tokens
        tokens = record.output_tokens
        if tokens:
            values[children.generated] += tokens

    def _observe(self, children: _Inference, record: RequestRecord, now: float, total_s: float) -> None:
        values = self._values
        duration, first_token = children.duration, children.first_token
        first_token_s = record.first_token_at - record.started_at if record.first_token_at else -1.0
        if (record.kept in _EXPORTED or not record.span_id) and now - children.exemplar_at >= _EXEMPLAR_EVERY_S:
            children.exemplar_at = now
            example, wall = _example(record), self._wall()
            duration.observe_with_exemplar(total_s, example, wall)
            if first_token_s >= 0:
                first_token.observe_with_exemplar(first_token_s, example, wall)
        else:
            values[duration.base + bisect_left(duration.bounds, total_s)] += 1.0
            values[duration.sum_index] += total_s
            if first_token_s >= 0:
                first_token.observe(first_token_s)
        if record.output_tokens and total_s > 0:
            children.rate.observe(record.output_tokens / total_s)
        if record.gaps_s and first_token_s >= 0:
            _observe_all(children.gap, record.gaps_s)

    def _count_key(self, record: RequestRecord) -> None:
        children = self._keys.get(record.key)
        if children is None:
            children = self._keys[record.key] = (
                self._writer.counter(families.API_KEY_REQUESTS, record.key).index,
                self._writer.counter(families.API_KEY_TOKENS, record.key).index,
            )
        requests, tokens = children
        self._values[requests] += 1.0
        self._values[tokens] += record.input_tokens + record.output_tokens

    def _repeated(self, record: RequestRecord) -> None:
        for model, reason in record.retry_reasons:
            self._writer.counter(families.RETRIES, model, reason).inc()
        for model, reason in record.fallback_reasons:
            self._writer.counter(families.FALLBACKS, model, reason).inc()
        for model, wait_s in record.waits:
            self._writer.histogram(families.QUEUE_WAIT, model).observe(wait_s)

    def gaps(self, record: RequestRecord) -> None:
        if record.gaps_s:
            _observe_all(self._of(record.model, record.strategy).gap, record.gaps_s)
            record.gaps_s.clear()

    def connection_opened(self, type: str, protocol: str) -> None:
        self._values[self._open[type, protocol]] += 1.0

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None:
        self._values[self._open[type, protocol]] -= 1.0
        self._connection_s[type, protocol].observe(duration_s)

    def error(self, type: str) -> None:
        self._values[self._errors[type]] += 1.0

    def _of(self, model: str, strategy: str) -> _Inference:
        children = self._inference.get((model, strategy))
        if children is None:
            children = self._inference[model, strategy] = _Inference(self._writer, model, strategy)
        return children


def _example(record: RequestRecord) -> str:
    """The labels of an exemplar; those that do not fit into what OpenMetrics allows are left out by who keeps it."""
    if record.kept:
        return f'trace_id="{record.trace_id}",span_id="{record.span_id}"'
    return f'request_id="{record.request_id}"'


def _observe_all(histogram: Histogram, values: list[float]) -> None:
    for value in values:
        histogram.observe(value)
