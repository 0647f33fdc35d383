"""A shared Redis that goes away, hangs, refuses or holds rubbish costs nobody an answer, and is told of once."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from llm_router.cache import open_cache
from llm_router.cache.base import Cached, CacheSettings
from llm_router.cache.memory import MemoryCache
from llm_router.cache.redis import _PREFIX, MOST_LOOKUPS, MOST_WAITING_BYTES, RedisCache, _digest
from llm_router.errors import ConfigError
from support.aio import run, until
from support.net import free_port
from support.redis import RedisServer

KEY = bytes(range(32))
ANSWER = Cached(b"text/event-stream", b"data: [DONE]\n\n", True, "b")
TIMEOUT_S = 0.2  # where it matters
UNTIL_IT_DOES = "until it does, no answer is looked up or kept"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@contextlib.asynccontextmanager
async def opened(url: str, told: list[str] | None = None, **options: Any) -> AsyncIterator[RedisCache]:
    """A cache that soon notices when Redis is back."""
    options = {"max_entry_bytes": 2**24, "ttl_s": 60.0, "timeout_s": 5.0, "retry_s": 0.02, **options}
    cache = RedisCache(url, on_failure=(told if told is not None else []).append, **options)
    try:
        yield cache
    finally:
        await cache.aclose()


async def keep(cache: RedisCache, key: bytes = KEY, answer: Cached = ANSWER) -> None:
    cache.put(key, answer)
    await until(lambda: not cache._waiting, what="the end of writing")


async def is_back(cache: RedisCache) -> None:
    await until(lambda: not cache._away, what="its coming back")


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(url, protocol=2) as plain:
        yield plain


# -- sharing ----------------------------------------------------------------------------------------------


def test_two_routers_share_answers(server: RedisServer) -> None:
    """What one has asked, the other need not."""

    async def play() -> None:
        async with opened(server.url) as first, opened(server.url) as second:
            await keep(first)
            assert await second.get(KEY) == ANSWER
            await keep(second, KEY, Cached(b"", b"newer", False, "c"))
            assert (await first.get(KEY) or ANSWER).body == b"newer"

    run(play())


def test_entries_leave_by_themselves(server: RedisServer) -> None:
    """Redis is told how long each is good for, to the millisecond."""

    async def play() -> None:
        async with opened(server.url, ttl_s=7.5) as cache, client(server.url) as plain:
            await keep(cache)
            assert await plain.keys() == [_PREFIX.encode() + KEY.hex().encode()]
            assert 5000 < await plain.pttl(_PREFIX + KEY.hex()) <= 7500

    run(play())


def test_closing_writes_what_waits(server: RedisServer) -> None:
    """A router that restarts loses nothing."""

    async def play() -> None:
        async with opened(server.url) as cache:
            for number in range(100):
                cache.put(number.to_bytes(32, "big"), ANSWER)
        cache.put(KEY, ANSWER)
        async with opened(server.url) as cache:
            for number in range(100):
                assert await cache.get(number.to_bytes(32, "big")) == ANSWER
            assert await cache.get(KEY) is None

    run(play())


def test_user_password_and_database_are_used() -> None:
    """As the URL says; with a wrong password it is as if it were away, and the password is not told."""

    async def play() -> None:
        url = f"redis://default:s3cret%2Fword@127.0.0.1:{guarded.port}/3"
        told: list[str] = []
        async with opened(url, told) as cache, client(url) as plain:
            await keep(cache)
            assert await cache.get(KEY) == ANSWER
            assert await plain.dbsize() == 1
            assert "s3cret" not in repr(cache)
        assert told == []
        async with opened(url.replace("s3cret", "wr0ng"), told) as cache:
            assert await cache.get(KEY) is None
            await asyncio.sleep(0.1)  # several calls, all refused
            assert await cache.get(KEY) is None
        assert len(told) == 1
        assert "password" in told[0]
        assert "wr0ng" not in told[0]
        assert f"127.0.0.1:{guarded.port}/3 does not answer" in told[0]

    with RedisServer("--requirepass", "s3cret/word") as guarded:
        run(play())


# -- going away and coming back ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ("kill", "stop"))
def test_killed_while_in_use(server: RedisServer, how: str) -> None:
    """Requests go on without, one message tells it, and it is used again when it is back."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache:
            await keep(cache)
            lookups = [asyncio.create_task(cache.get(KEY)) for _ in range(20)]
            await asyncio.sleep(0)
            getattr(server, how)()
            for got in await asyncio.gather(*lookups):
                assert got in {ANSWER, None}
            for _ in range(5):
                assert await cache.get(KEY) is None
                cache.put(KEY, ANSWER)
            assert cache.statistics().entries == 0
            assert len(told) == 1
            assert told[0].startswith(f"the cache at 127.0.0.1:{server.port}/0 does not answer (")
            assert told[0].endswith(f"): {UNTIL_IT_DOES}")
            await asyncio.sleep(0.1)  # several calls in vain
            assert len(told) == 1
            server.start()
            await is_back(cache)
            await keep(cache)
            assert await cache.get(KEY) == ANSWER
            assert len(told) == 1
            server.kill()
            assert await cache.get(KEY) is None
            assert len(told) == 2

    run(play())


def test_killed_while_it_writes(server: RedisServer) -> None:
    """What waits is dropped, not kept for a Redis that may never come."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache:
            await keep(cache)
            server.kill()
            for number in range(50):
                cache.put(number.to_bytes(32, "big"), ANSWER)
            await until(lambda: cache._away, what="its being found away")
            assert cache.statistics()[:3] == (0, 0, 0)
            assert cache.statistics().failures == 51  # the batch, and each answer
            server.start()
            await is_back(cache)
            assert await cache.get(KEY) is None
        assert len(told) == 1

    run(play())


def test_frozen_it_costs_the_timeout_once(server: RedisServer) -> None:
    """Whoever asks at that moment waits so long, nobody afterwards."""
    told: list[str] = []

    async def play() -> None:
        clock = asyncio.get_running_loop().time
        async with opened(server.url, told, timeout_s=TIMEOUT_S) as cache:
            await keep(cache)
            server.freeze()
            started_at = clock()
            assert await asyncio.gather(*(cache.get(KEY) for _ in range(100))) == [None] * 100
            assert TIMEOUT_S * 0.9 <= clock() - started_at < TIMEOUT_S * 20
            with pytest.raises(StopIteration) as caught:
                cache.get(KEY).send(None)  # ends without having waited for anything
            assert caught.value.value is None
            server.thaw()
            await is_back(cache)
        assert told == [
            f"the cache at 127.0.0.1:{server.port}/0 does not answer (nothing within 0.2 s): {UNTIL_IT_DOES}"
        ]

    run(play())


def test_too_many_lookups_at_once_go_without(server: RedisServer) -> None:
    """They are not the reason to take Redis for away."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache:
            await keep(cache)
            found = await asyncio.gather(*(cache.get(KEY) for _ in range(MOST_LOOKUPS + 10)))
            assert found == [ANSWER] * MOST_LOOKUPS + [None] * 10
            assert cache.statistics().failures == 10
            assert await cache.get(KEY) == ANSWER
        assert told == []

    run(play())


def test_away_from_the_beginning() -> None:
    """It starts without, and closes without waiting."""
    told: list[str] = []

    async def play() -> None:
        async with opened(f"redis://127.0.0.1:{free_port()}", told) as cache:
            cache.put(KEY, ANSWER)
            await until(lambda: cache._away, what="its being found away")
            assert await cache.get(KEY) is None
            assert "away" in repr(cache)
        assert len(told) == 1

    run(play())


def test_a_restart_between_two_requests_goes_unnoticed(server: RedisServer) -> None:
    """The connections that are lost are found out by using them."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache:
            await keep(cache)
            server.stop()
            server.start()
            assert await cache.get(KEY) is None
            await keep(cache)
            assert await cache.get(KEY) == ANSWER
            assert cache.statistics().failures == 0
        assert told == []

    run(play())


def test_more_than_redis_takes_is_not_kept(server: RedisServer) -> None:
    """What waits is bounded in bytes."""

    async def play() -> None:
        async with opened(server.url, timeout_s=5.0) as cache:
            large = Cached(b"", bytes(MOST_WAITING_BYTES // 4), False, "b")
            for number in range(6):
                cache.put(bytes([number]) * 32, large)
            assert cache.statistics() == (4, MOST_WAITING_BYTES, 0, 2)
            cache.put(bytes(32), ANSWER)  # smaller than the one that it takes the place of
            await until(lambda: not cache._waiting, what="the end of writing")
            assert cache.statistics() == (0, 0, 0, 2)
            assert await cache.get(bytes(32)) == ANSWER
            assert await cache.get(bytes([3]) * 32) == large
            assert await cache.get(bytes([4]) * 32) is None

    run(play())


# -- refusals and rubbish ---------------------------------------------------------------------------------


def test_a_full_redis_is_told_of_once_and_still_read(server: RedisServer) -> None:
    """Without an eviction policy it refuses to write."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache, client(server.url) as plain:
            await keep(cache)
            await plain.config_set("maxmemory-policy", "noeviction")
            await plain.config_set("maxmemory", "1")
            for number in range(3):
                await keep(cache, bytes([number]) * 32)
                assert await cache.get(KEY) == ANSWER
            refusal = "command not allowed when used memory > 'maxmemory'."
            assert told == [f"the cache at 127.0.0.1:{server.port}/0 keeps no answers: {refusal}"]
            assert cache.statistics().failures == 3
            await plain.config_set("maxmemory", "0")
            await keep(cache, b"x" * 32)
            assert await cache.get(b"x" * 32) == ANSWER
            await plain.config_set("maxmemory", "1")
            await keep(cache, b"y" * 32)
            assert len(told) == 2

    run(play())


def test_a_user_who_may_not_read_is_told_of_once(server: RedisServer) -> None:
    """Redis answers, so it is not away; but what it says is no."""
    told: list[str] = []

    async def play() -> None:
        async with client(server.url) as plain:
            await plain.acl_setuser("w", enabled=True, passwords=["+p"], keys=["*"], commands=["+set", "+client"])
        async with opened(f"redis://w:p@127.0.0.1:{server.port}", told) as cache:
            for _ in range(3):
                assert await cache.get(KEY) is None
                await keep(cache)
            assert not cache._away
        assert len(told) == 1
        assert "looks up no answers" in told[0]

    run(play())


def rubbish(good: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "short": good[:10],
        "digest only": good[:16],
        "cut": good[:-1],
        "longer": good + b"\0",
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        "text": b"hello",
        "binary": bytes(range(256)) * 10,
        "all zero": bytes(len(good)),
    }


def test_rubbish_is_no_answer(server: RedisServer) -> None:
    """Cut, changed or foreign entries, entries of another type, and good ones under another name."""
    told: list[str] = []

    async def play() -> None:
        async with opened(server.url, told) as cache, client(server.url) as plain:
            await keep(cache)
            name = _PREFIX + KEY.hex()
            good = await plain.get(name)
            assert isinstance(good, bytes)
            kinds = rubbish(good)
            for kind, value in kinds.items():
                await plain.set(name, value)
                assert await cache.get(KEY) is None, kind
            other = KEY[::-1]
            await plain.set(_PREFIX + other.hex(), good)
            assert await cache.get(other) is None
            await plain.delete(name)
            await plain.sadd(name, "a", "b")
            assert await cache.get(KEY) is None
            assert cache.statistics().failures == len(kinds) + 2
            await keep(cache)  # it takes the place of the rubbish
            assert await cache.get(KEY) == ANSWER
        assert told == []

    run(play())


def test_answers_of_another_version_are_none(server: RedisServer) -> None:
    """The digest is right, but the answer lacks a field."""

    async def play() -> None:
        async with opened(server.url) as cache, client(server.url) as plain:
            payload = msgspec.msgpack.encode({"content_type": b"", "body": b"old"})
            await plain.set(_PREFIX + KEY.hex(), _digest(KEY, payload) + payload)
            assert await cache.get(KEY) is None

    run(play())


# -- what is configured -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    (
        "http://127.0.0.1",
        "redis://u:pa/ss@127.0.0.1:6379",
        "redis://127.0.0.1:99999",
        "redis://127.0.0.1?socket_timeout=secret",
        "redis://127.0.0.1?nonsense=secret",
    ),
)
def test_a_wrong_url_is_refused(url: str) -> None:
    """With the key and the way out, without what may be secret in it."""
    with pytest.raises(ConfigError, match=r"cache\.url: is no URL of a Redis: write redis://") as caught:
        RedisCache(url, max_entry_bytes=1, ttl_s=1.0, on_failure=print)
    assert "ss@" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_which_cache_is_opened() -> None:
    """By the settings; workers divide the memory."""

    async def play() -> None:
        assert open_cache(CacheSettings(enabled=False, url="redis://127.0.0.1"), 1, print) is None
        kept = open_cache(CacheSettings(max_bytes=1000), 4, print)
        assert isinstance(kept, MemoryCache)
        assert kept._max_bytes == 250
        shared = open_cache(CacheSettings(url="redis://127.0.0.1"), 4, print)
        assert isinstance(shared, RedisCache)
        await shared.aclose()

    run(play())


def test_redis_is_imported_only_where_it_is_used() -> None:
    """A worker with a cache in memory stays small."""
    program = (
        "import sys, llm_router.cache as cache; from llm_router.cache.base import CacheSettings; "
        "cache.open_cache(CacheSettings(), 1, print); assert 'redis' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
