"""Exact-match cache of answers: base.py says what it is, key.py what makes requests the same, flight.py waits for one of many."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_router.cache.base import Cache, CacheSettings


def open_cache(
    settings: CacheSettings,
    workers: int,
    on_failure: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Cache | None:
    """The cache that is configured, for one of `workers` processes; None if there is to be none.

    Use it on one event loop, and `aclose` it there.

    Args:
        on_failure: told once, in a sentence, when a shared cache goes away.
        clock: monotonic seconds.

    Raises: ConfigError for a URL that is none.
    """
    if not settings.enabled:
        return None
    if settings.url:
        from llm_router.cache.redis import RedisCache

        return RedisCache(
            settings.url, max_entry_bytes=settings.max_entry_bytes, ttl_s=settings.ttl_s, on_failure=on_failure
        )
    from llm_router.cache.memory import MemoryCache

    return MemoryCache(
        max_bytes=settings.max_bytes // max(1, workers),
        max_entry_bytes=settings.max_entry_bytes,
        ttl_s=settings.ttl_s,
        clock=clock,
    )
