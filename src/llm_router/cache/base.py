"""What the router needs of a cache of answers, and what an answer in it is.

Not for: deciding which answers may be kept (key.py) or keeping them (memory.py, redis.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import msgspec


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and where answers are kept.

    Args:
        enabled: False keeps none; then `x-llm-router-cache` is ignored.
        url: `redis://…` or `rediss://…` of a Redis or Valkey that workers and machines share; empty: in each worker's
            memory.
        max_bytes: of memory, in the whole router: workers divide it among them.
        max_entry_bytes: a larger answer is not kept.
        ttl_s: how long an answer is kept.
        per_key: whether keys share answers (False), or each has its own.
    """

    enabled: bool = True
    url: str = ""
    max_bytes: int = 64 * 1024 * 1024
    max_entry_bytes: int = 1024 * 1024
    ttl_s: float = 3600.0
    per_key: bool = False

    def __repr__(self) -> str:
        where = "redis" if self.url else f"memory, {self.max_bytes} bytes"
        return f"CacheSettings({where if self.enabled else 'off'})"


class Cached(msgspec.Struct, frozen=True):
    """A whole successful answer, as callers get it.

    Args:
        content_type: of the reply.
        body: all of it; of a stream: its events, [DONE] included.
        stream: whether it is replayed as a stream.
        backend: that gave it.
    """

    content_type: bytes
    body: bytes
    stream: bool
    backend: str


class CacheStatistics(NamedTuple):
    """`size_bytes` counts keys, bodies and an estimate of the bookkeeping.

    Of a shared cache only what waits to be written counts in `entries` and `size_bytes`: what it holds is not one worker's
    to count. `failures` are lookups and answers that were lost because it was away or refused them.
    """

    entries: int
    size_bytes: int
    evicted: int
    failures: int


class Cache(Protocol):
    """Keeps answers. Never raises: a cache that is away has nothing, and says so once."""

    @property
    def type(self) -> Literal["response", "redis"]:
        """The value of the label `cache_type`."""

    async def get(self, key: bytes) -> Cached | None:
        """The answer for a key; None if there is none."""

    def put(self, key: bytes, answer: Cached) -> None:
        """Keep an answer, in the background if that takes time."""

    async def settled(self, key: bytes) -> None:
        """Wait until what was put for a key is where it is kept, or lost; at once if nothing is on its way."""

    async def delete(self, key: bytes) -> None:
        """Forget the answer for a key, if there is one and the cache can be reached."""

    @property
    def problem(self) -> str:
        """What keeps it from working now, in a sentence without secrets; empty if nothing does."""

    def statistics(self) -> CacheStatistics: ...

    async def aclose(self) -> None: ...
