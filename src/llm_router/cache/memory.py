"""Answers in this process's memory: bounded in bytes; what is too old goes first, then what was not asked for longest.

Not for: sharing answers between workers or machines (redis.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from llm_router.cache.base import Cached, CacheStatistics

ENTRY_BYTES: Final = 530
"""What an entry takes beside its body and content type: the key, the objects, its places in two dicts. By tracemalloc on
CPython 3.11 it is 440 to 530 bytes, according to how full the dicts are."""


class _Entry(NamedTuple):
    answer: Cached
    size_bytes: int
    kept_at: float


class MemoryCache:
    """See `Cache`. Of one event loop; `get` never waits.

    Args:
        max_bytes: for all answers.
        max_entry_bytes: a larger body is not kept.
        ttl_s: how long an answer is kept.
        clock: monotonic seconds.
    """

    type: Literal["response"] = "response"

    def __init__(self, *, max_bytes: int, max_entry_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_entry_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._by_age: OrderedDict[bytes, _Entry] = OrderedDict()  # the oldest answer first; a dict is slow to find that
        self._by_use: OrderedDict[bytes, None] = OrderedDict()  # what was not asked for longest first
        self._size_bytes = 0
        self._evicted = 0

    def __repr__(self) -> str:
        return f"<MemoryCache {len(self._by_age)} answers, {self._size_bytes} of {self._max_bytes} bytes>"

    async def get(self, key: bytes) -> Cached | None:
        """The answer for a key; None if there is none that is young enough."""
        entry = self._by_age.get(key)
        if entry is None:
            return None
        if self._clock() - entry.kept_at >= self._ttl_s:
            self._drop(key)
            return None
        self._by_use.move_to_end(key)
        return entry.answer

    def put(self, key: bytes, answer: Cached) -> None:
        """Keep an answer, in place of one that is there for the key."""
        now = self._clock()
        if key in self._by_age:
            self._drop(key)
        self._drop_old(now)
        size_bytes = len(answer.body) + len(answer.content_type) + ENTRY_BYTES
        if len(answer.body) > self._max_entry_bytes or size_bytes > self._max_bytes:
            return
        while self._size_bytes + size_bytes > self._max_bytes:
            self._drop(next(iter(self._by_use)))
            self._evicted += 1
        self._by_age[key] = _Entry(answer, size_bytes, now)
        self._by_use[key] = None
        self._size_bytes += size_bytes

    async def settled(self, key: bytes) -> None:
        """Nothing is ever on its way here."""

    async def delete(self, key: bytes) -> None:
        """Forget the answer for a key; it does not count as evicted."""
        if key in self._by_age:
            self._drop(key)

    @property
    def problem(self) -> str:
        """Nothing keeps memory from working."""
        return ""

    def _drop_old(self, now: float) -> None:
        while self._by_age:
            key, entry = next(iter(self._by_age.items()))
            if now - entry.kept_at < self._ttl_s:
                break
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        self._size_bytes -= self._by_age.pop(key).size_bytes
        del self._by_use[key]

    def statistics(self) -> CacheStatistics:
        """`evicted` counts answers that made room for others; those that grew too old are not in it."""
        return CacheStatistics(len(self._by_age), self._size_bytes, self._evicted, 0)

    async def aclose(self) -> None:
        """Forget everything."""
        self._by_age.clear()
        self._by_use.clear()
        self._size_bytes = 0
