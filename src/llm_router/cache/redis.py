"""Answers in a Redis or Valkey that workers and machines share. What it costs a request is bounded, also when it is away.

A lookup takes at most `timeout_s`. Answers are written in the background, in batches. When it does not answer, that is told
once, nothing is looked up or kept, and a PING a second finds out when it is back: no request waits for that.

An entry is named `llm-router:answer:1:<key in hexadecimal>`; its value is a 16-byte BLAKE2b over the rest, keyed by the
entry's key, then the answer in msgpack. What does not match (cut, changed, written by others, copied to another name) is
no answer. That finds accidents, not attackers: who can write into this Redis decides what callers get.

How much is kept is for Redis to bound: `maxmemory` with `maxmemory-policy allkeys-lru`. Imported only where a Redis is
configured. Not for: limits between machines (accounts/redis_ledger.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, Literal

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llm_router.cache.base import Cached, CacheStatistics
from llm_router.chat import NOT_JSON
from llm_router.errors import ConfigError

_log = logging.getLogger("llm_router.cache")

TIMEOUT_S: Final = 0.5
"""A lookup on the same network takes a millisecond. Whoever waits for a model's answer hardly notices half a second, once."""

RETRY_S: Final = 1.0
CONNECTIONS: Final = 16
"""Of one worker. A lookup holds one for a fraction of a millisecond, so that these are thousands a second."""

MOST_LOOKUPS: Final = 256
"""At once; further requests go without, instead of waiting for each other until Redis seems to be away."""

MOST_WAITING_BYTES: Final = 16 * 1024 * 1024
"""Answers that wait to be written; the next one is not kept."""

_NO_LOOKUPS: Final = "looks up no answers"
_NO_WRITES: Final = "keeps no answers"
_NO_DELETIONS: Final = "deletes no answers"

_PREFIX = "llm-router:answer:1:"
_DIGEST_BYTES = 16
_BATCH_ENTRIES = 32
_BATCH_BYTES = 1024 * 1024  # a batch has to be written within the timeout, also over 100 Mbit/s

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Cached).decode


class RedisCache:
    """See `Cache`. Of one event loop.

    Args:
        url: `redis://` or `rediss://`, with user, password and database.
        max_entry_bytes: a larger body is not kept.
        ttl_s: how long an answer is kept.
        on_failure: told in a sentence without secrets when Redis goes away, or refuses reads or writes: once each time.
        timeout_s: for one lookup, one batch of writes, one connection.
        retry_s: between two tries to find out whether it is back.

    Raises: ConfigError for a URL that is none; no connection is made yet.
    """

    type: Literal["redis"] = "redis"

    def __init__(
        self,
        url: str,
        *,
        max_entry_bytes: int,
        ttl_s: float,
        on_failure: Callable[[str], None],
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
    ) -> None:
        pool = _pool(url, timeout_s)
        self._client: Redis = Redis.from_pool(pool)
        self._where = _shown(pool.connection_kwargs)
        self._max_entry_bytes = max_entry_bytes
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._on_failure = on_failure
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._waiting: dict[bytes, Cached] = {}  # also while they are being written: what was put is there
        self._waiting_bytes = 0
        self._lookups = 0
        self._away = False
        self._outages = 0
        self._refused: dict[str, str] = {}  # what it refuses, and how that was told
        self._outage = ""
        self._batch_end: asyncio.Future[None] | None = None
        self._failures = 0
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "away" if self._away else "there"
        return f"<RedisCache {self._where}, {state}, {len(self._waiting)} answers to write, {self._failures} failures>"

    async def get(self, key: bytes) -> Cached | None:
        """The answer for a key; None if there is none, or Redis does not answer in time.

        Cancelled, it leaves nothing behind: a connection on which a reply was awaited is closed.
        """
        waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting
        if self._away:
            return None
        if self._lookups >= MOST_LOOKUPS:
            self._failures += 1
            return None
        outages = self._outages
        self._lookups += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                value = await self._client.get(_PREFIX + key.hex())
        except ResponseError as error:
            self._failures += 1
            if not str(error).startswith("WRONGTYPE"):
                self._tell_refused(_NO_LOOKUPS, error)
            return None
        except Exception as error:  # whatever a client library may raise: a cache costs nobody an answer
            self._lose(error, outages)
            return None
        finally:
            self._lookups -= 1
        self._refused.pop(_NO_LOOKUPS, None)
        if value is None:
            return None
        answer = _unpack(key, value)
        if answer is None:
            self._failures += 1
        return answer

    def put(self, key: bytes, answer: Cached) -> None:
        """Have an answer kept. What comes faster than Redis takes it, and what comes while it is away, is not."""
        size_bytes = len(answer.body)
        if self._away or self._closed or size_bytes > self._max_entry_bytes:
            return
        before = self._waiting.pop(key, None)
        if before is not None:
            self._waiting_bytes -= len(before.body)
        if self._waiting_bytes + size_bytes > MOST_WAITING_BYTES:
            self._failures += 1
            return
        self._waiting[key] = answer
        self._waiting_bytes += size_bytes
        self._start()

    async def settled(self, key: bytes) -> None:
        """Wait until an answer that was put is written, refused, or lost because Redis went away or this was closed."""
        while key in self._waiting and not self._closed:
            if self._batch_end is None:
                self._batch_end = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._batch_end)

    async def delete(self, key: bytes) -> None:
        """Delete the answer for a key, also one that waits to be written. Does nothing while Redis is away."""
        await self.settled(key)  # a deletion on another connection could overtake it
        if self._away:
            return
        outages = self._outages
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.delete(_PREFIX + key.hex())
        except ResponseError as error:
            self._failures += 1
            self._tell_refused(_NO_DELETIONS, error)
        except Exception as error:
            self._lose(error, outages)
        else:
            self._refused.pop(_NO_DELETIONS, None)

    @property
    def problem(self) -> str:
        """Why nothing is looked up or kept now, or what Redis refused when it was last asked for it."""
        return self._outage if self._away else next(iter(self._refused.values()), "")

    def statistics(self) -> CacheStatistics:
        """Of what waits to be written: how much Redis holds is shared by many, and its own metrics tell.

        `failures` counts lookups and answers that were lost: no reply in time, a refusal, an entry that is none of ours,
        too much at once.
        """
        return CacheStatistics(len(self._waiting), self._waiting_bytes, 0, self._failures)

    async def aclose(self) -> None:
        """Write what waits, if that takes no longer than the timeout, and close the connections."""
        self._closed = True
        task = self._task
        if task is not None:
            if not self._away:
                await asyncio.wait({task}, timeout=self._timeout_s)
            task.cancel()
            await asyncio.wait({task})
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._timeout_s):
                await self._client.aclose()

    # -- in the background ----------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="cache writer")

    async def _work(self) -> None:
        """Writes while something waits, and calls while Redis is away; ends when there is nothing to do."""
        try:
            while self._away or self._waiting:
                if self._away:
                    await asyncio.sleep(self._retry_s)
                    await self._call()
                else:
                    await self._write()
                self._tell_settled()
        finally:
            self._task = None
            self._tell_settled()

    def _tell_settled(self) -> None:
        """A batch has ended, well or not: whoever waits for one of its answers may look."""
        end, self._batch_end = self._batch_end, None
        if end is not None and not end.done():
            end.set_result(None)

    async def _call(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.ping()
        except ResponseError:
            pass  # a user who may not ping: it is there
        except Exception:
            return  # it is away as before, which was told
        self._away = False
        _log.info("the cache at %s answers again", self._where)

    async def _write(self) -> None:
        batch: list[tuple[bytes, Cached]] = []
        size_bytes = 0
        for key, answer in islice(self._waiting.items(), _BATCH_ENTRIES):
            size_bytes += len(answer.body)
            if batch and size_bytes > _BATCH_BYTES:
                break
            batch.append((key, answer))
        outages = self._outages
        try:
            async with asyncio.timeout(self._timeout_s), self._client.pipeline(transaction=False) as pipeline:
                for key, answer in batch:
                    pipeline.set(_PREFIX + key.hex(), _pack(key, answer), px=self._ttl_ms)
                results = await pipeline.execute(raise_on_error=False)
        except Exception as error:
            self._lose(error, outages)
            return
        for (key, answer), result in zip(batch, results, strict=True):
            if self._waiting.get(key) is answer:
                del self._waiting[key]
                self._waiting_bytes -= len(answer.body)
            if isinstance(result, Exception):
                self._failures += 1
                self._tell_refused(_NO_WRITES, result)
            else:
                self._refused.pop(_NO_WRITES, None)

    # -- when it fails --------------------------------------------------------------------------------------

    def _lose(self, error: Exception, outages: int) -> None:
        """It does not answer. `outages` is the count from before the try: many fail at once, one tells."""
        self._failures += 1
        if self._away or outages != self._outages:
            return
        self._away = True
        self._outages += 1
        self._failures += len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._start()
        self._outage = (
            f"the cache at {self._where} does not answer ({self._reason(error)}): "
            "until it does, no answer is looked up or kept"
        )
        self._on_failure(self._outage)

    def _tell_refused(self, what: str, error: Exception) -> None:
        is_new = what not in self._refused
        self._refused[what] = problem = f"the cache at {self._where} {what}: {error}"
        if is_new:
            self._on_failure(problem)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | RedisTimeoutError):
            return f"nothing within {self._timeout_s:g} s"
        return str(error) or type(error).__name__


def _pool(url: str, timeout_s: float) -> BlockingConnectionPool:
    options: dict[str, Any] = {
        "max_connections": CONNECTIONS,
        "timeout": timeout_s,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # Once more at once: a connection that Redis closed while it was idle is found out by using it.
        "retry": Retry(NoBackoff(), 1),
        "protocol": 2,  # one round trip less to connect; nothing of RESP3 is used
        "decode_responses": False,
    }
    try:
        pool = BlockingConnectionPool(**{**parse_url(url), **options})
        pool.connection_class(**pool.connection_kwargs)  # raises for an option that is none, instead of at a lookup
    except (ValueError, TypeError, RedisError):
        # Not in its words, which may hold a part of the password.
        raise ConfigError(
            "cache.url",
            "is no URL of a Redis: write redis://[user:password@]host[:port][/database], or rediss:// for TLS, "
            "with special characters percent-encoded",
        ) from None
    return pool


def _shown(options: dict[str, Any]) -> str:
    """Where it is, without user and password."""
    where = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"{where}/{options.get('db', 0)}"


def _digest(key: bytes, payload: bytes | memoryview) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST_BYTES, key=key[:64]).digest()


def _pack(key: bytes, answer: Cached) -> bytes:
    payload = _encode(answer)
    return _digest(key, payload) + payload


def _unpack(key: bytes, value: bytes | str) -> Cached | None:
    assert isinstance(value, bytes), "decode_responses is off"
    payload = memoryview(value)[_DIGEST_BYTES:]
    if value[:_DIGEST_BYTES] != _digest(key, payload):
        return None
    try:
        return _decode(payload)
    except NOT_JSON:
        return None  # written by a version whose answers look otherwise
