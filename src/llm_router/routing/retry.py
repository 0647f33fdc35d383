"""How often failed attempts may be repeated: a budget over a sliding window, and the wait between tries.

Pure state over a clock. Not for: deciding what is retryable (errors.py says that) or acting (router.py).
"""

from __future__ import annotations

import random

from llm_router.routing.table import RetrySpec

_WINDOW_S = 10.0
_BUCKETS = 10


class RetryBudget:
    """Bounds retries to a share of recent requests, so that a failing backend does not get a storm on top.

    Requests and retries are counted in one-second buckets over the last 10 s. Source: the retry budget of
    Finagle, which gRPC and Envoy took up.
    """

    def __init__(self, spec: RetrySpec) -> None:
        self._ratio = spec.budget_ratio
        self._minimum = spec.budget_min
        self._requests = [0] * _BUCKETS
        self._retries = [0] * _BUCKETS
        self._second = 0

    def _advance(self, now: float) -> int:
        second = int(now)
        behind = second - self._second
        if behind > 0:
            for step in range(min(behind, _BUCKETS)):
                self._requests[(second - step) % _BUCKETS] = 0
                self._retries[(second - step) % _BUCKETS] = 0
            self._second = second
        return self._second % _BUCKETS

    def request(self, now: float) -> None:
        """A request began at monotonic second `now`."""
        self._requests[self._advance(now)] += 1

    def spend(self, now: float) -> bool:
        """Whether one more retry is allowed now; counts it if so."""
        bucket = self._advance(now)
        if sum(self._retries) >= self._minimum + self._ratio * sum(self._requests):
            return False
        self._retries[bucket] += 1
        return True

    def __repr__(self) -> str:
        return f"RetryBudget(requests={sum(self._requests)}, retries={sum(self._retries)})"


def backoff_s(spec: RetrySpec, retry: int, rng: random.Random) -> float:
    """Seconds to wait before retry number `retry` (1 for the first): full jitter over a doubling bound.

    Source: "Exponential Backoff And Jitter", AWS architecture blog, 2015: full jitter needs the fewest calls.
    """
    bound: float = min(spec.backoff_max_s, spec.backoff_s * 2.0 ** (retry - 1))
    return rng.random() * bound
