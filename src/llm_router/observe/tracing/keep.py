"""Which traces are kept, decided when a request has ended and everything about it is known.

In this order: the caller or the head sampler wanted it; it failed by a fault of ours or a backend's; it was slow; nothing like
it was seen lately; or nothing else, and then a few of each route and model for /debug/requests. What a caller did wrong is no fault
here: it is kept as the first of its kind, or as one of the few.

Everything but what is sampled is bounded in number, because an outage or a hostile caller must not turn tracing into load.
Not for: making traces (spans.py) or holding them (store.py).
"""

from __future__ import annotations

import math
from typing import Final

from llm_router.observe.tracing.settings import TracingSettings
from llm_router.signals import Kept, RequestRecord

FIRST_AGAIN_S: Final = 600.0
"""What was not seen for so long is new again."""

MAX_KINDS: Final = 1000
"""Kinds of requests that are remembered: routes, models, backends and classes of status are all few."""

FAULTS_PER_S: Final = 10.0
"""Of each route and model. A trace costs a worker about as much as a request: in an outage, some tell it all."""

_RECENT_BURST: Final = 10.0
_FAULTS_BURST: Final = 100.0
"""How many may come at once before the rate counts: what somebody tries by hand, and the first of an outage."""


_PROBES: Final = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Routes that machines ask all day: their traces would be all that is seen of recent requests."""


class _Rate:
    """So many a second on average, `burst` at once: a bucket that is kept as the instant at which it is full again."""

    __slots__ = ("_burst_s", "_full_at", "_interval_s")

    def __init__(self, per_s: float, burst: float) -> None:
        self._interval_s = 1.0 / per_s if per_s > 0 else math.inf
        self._burst_s = (burst - 1.0) * self._interval_s if per_s > 0 else -1.0
        self._full_at = 0.0 if per_s > 0 else math.inf  # nothing is ever allowed

    def take(self, now: float) -> bool:
        """Whether one more is allowed at `now`, which then counts."""
        full_at = self._full_at
        if full_at <= now:
            full_at = now
        elif full_at - now > self._burst_s:
            return False
        self._full_at = full_at + self._interval_s
        return True


class _Rates:
    """Of one route and model."""

    __slots__ = ("faults", "recent", "slow")

    def __init__(self, recent_per_s: float) -> None:
        self.recent = _Rate(recent_per_s, _RECENT_BURST)
        self.faults = _Rate(FAULTS_PER_S, _FAULTS_BURST)
        self.slow = _Rate(FAULTS_PER_S, _FAULTS_BURST)


class _Kind:
    """Requests of one route, model, backend and class of status."""

    __slots__ = ("rates", "seen_at")

    def __init__(self, rates: _Rates, seen_at: float) -> None:
        self.rates = rates
        self.seen_at = seen_at


class Keep:
    """Says of each finished request why its trace is kept. Belongs to one thread; holds at most `MAX_KINDS` kinds."""

    def __init__(self, settings: TracingSettings) -> None:
        self._kinds: dict[tuple[str, str, str, int], _Kind]
        self._rates: dict[tuple[str, str], _Rates]
        self._forget_at = 0.0
        self.passed_over = 0
        """Traces of failed and slow requests that were not kept, because there were too many of them."""
        self._recent_per_s = -1.0
        self.apply(settings)

    def __repr__(self) -> str:
        return f"<Keep {len(self._kinds)} kinds>"

    def apply(self, settings: TracingSettings) -> None:
        """Use these from the next request on. What was seen lately is forgotten only where the rates change."""
        self._enabled = settings.enabled
        self._slow_s = settings.slow_s
        if settings.recent_per_s != self._recent_per_s:
            self._recent_per_s = settings.recent_per_s
            self._kinds = {}
            self._rates = {}
            self._others = _Rates(settings.recent_per_s)

    def reason(self, record: RequestRecord, now: float) -> Kept:
        """Why the trace of a request that ended at monotonic instant `now` is kept; empty if it is not.

        To be asked once of each request. Requests that began outside a trace are never kept.
        """
        if not record.span_id or not self._enabled:
            return ""
        status = record.status
        attempts = record.attempts
        key = (record.route, record.model, attempts[-1].backend if attempts else "", status // 100)
        kind = self._kinds.get(key)
        if kind is None:
            rates, is_first = self._meet(key, now)
        else:
            rates = kind.rates
            is_first = now - kind.seen_at > FIRST_AGAIN_S
            kind.seen_at = now
        if record.is_sampled:
            return "sampled"
        is_worth_it = False
        if record.error_type and not 400 <= status < 500:
            if rates.faults.take(now):
                return "error"
            is_worth_it = True
        if now - record.started_at >= self._slow_s:
            if rates.slow.take(now):
                return "slow"
            is_worth_it = True
        if is_first:
            return "first"
        if record.route not in _PROBES and rates.recent.take(now):
            return "recent"
        self.passed_over += is_worth_it
        return ""

    def _meet(self, key: tuple[str, str, str, int], now: float) -> tuple[_Rates, bool]:
        """Remember a kind that is not known. Beyond the bound nothing is new, and all share one rate."""
        if len(self._kinds) >= MAX_KINDS:
            self._forget(now)
            if len(self._kinds) >= MAX_KINDS:
                return self._others, False
        pair = key[:2]
        rates = self._rates.get(pair)
        if rates is None:
            rates = self._rates[pair] = _Rates(self._recent_per_s)
        self._kinds[key] = _Kind(rates, now)
        return rates, True

    def _forget(self, now: float) -> None:
        """Let go of what was not seen lately, looking for it now and then only."""
        if now < self._forget_at:
            return
        self._forget_at = now + 1.0
        self._kinds = {key: kind for key, kind in self._kinds.items() if now - kind.seen_at <= FIRST_AGAIN_S}
        pairs = {key[:2] for key in self._kinds}
        self._rates = {pair: rates for pair, rates in self._rates.items() if pair in pairs}
