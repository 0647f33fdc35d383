"""The check `cache_functionality` where there are no workers: the cache is in this process (library mode).

Not for: the router of several processes (worker_caches.py).
"""

from __future__ import annotations

from collections.abc import Callable

from llm_router.cache.base import Cache
from llm_router.observe.health.checks import Check, failed, passed
from llm_router.processes.probes.cache import probe_cache


class OwnCache:
    """Probes one cache. Of its event loop.

    Args:
        cache: that of now; None where it is off.
    """

    def __init__(self, cache: Callable[[], Cache | None]) -> None:
        self._cache = cache

    async def check(self) -> Check:
        """Put, get and delete something now."""
        cache = self._cache()
        if cache is None:
            return passed("The cache is off: there is nothing to check", value=0.0, threshold=0.0, unit="caches")
        problem, seconds = await probe_cache(cache)
        if problem:
            return failed(f"The cache does not work: {problem}", unit="caches")
        return passed("Cache functionality verified", details={"slowest_ms": round(seconds * 1000, 3)}, unit="caches")
