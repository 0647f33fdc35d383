"""Whether a cache of answers works: something is put into it, got back and deleted.

Workers do it when control asks them to (worker_caches.py), library mode for itself. Small: workers import it.
Not for: how well it works (the metrics of the cache tell).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from llm_router.cache.base import Cache, Cached
from llm_router.processes.snapshot import CacheProbed

TIMEOUT_S: Final = 2.0
"""For all three steps. Each step of a Redis has a timeout of half a second of its own."""

_KEY_BYTES = 32  # as of every other answer's key


class Probed(NamedTuple):
    """`problem` is empty if the cache gave back what was put into it, and forgot it."""

    problem: str
    seconds: float


async def probe_cache(
    cache: Cache, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic
) -> Probed:
    """Put, get and delete an answer under a key that no request can have. Never raises but when cancelled.

    A full cache in memory gives up the answer that was not asked for longest to make room, as for any other.
    """
    begin = clock()
    try:
        async with asyncio.timeout(timeout_s):
            problem = await _there_and_back(cache)
    except TimeoutError:
        problem = f"it did not finish within {timeout_s:g} s"
    except Exception as error:
        problem = f"it failed: {type(error).__name__}"  # without its words, which may hold what is in the cache
    return Probed(problem and (cache.problem or problem), clock() - begin)


async def answer_probe(number: int, cache: Cache | None) -> CacheProbed:
    """A worker's answer to the `CacheProbe` of that number. Where no cache is configured, none can fail."""
    if cache is None:
        return CacheProbed(number, "", 0.0)
    return CacheProbed(number, *await probe_cache(cache))


async def _there_and_back(cache: Cache) -> str:
    key = secrets.token_bytes(_KEY_BYTES)
    kept = Cached(b"", key[:8], False, "health-check")  # small: the bound of an entry may be
    cache.put(key, kept)
    await cache.settled(key)
    found = await cache.get(key)
    await cache.delete(key)
    if found is None:
        return "what was put into it was not there"
    if found != kept:
        return "it gave back something other than what was put into it"
    if await cache.get(key) is not None:
        return "what was deleted was still there"
    return ""
