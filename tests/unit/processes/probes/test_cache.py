"""The probe of a cache: what works passes, whatever does not is told, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from llm_router.cache.base import Cached, CacheStatistics
from llm_router.cache.memory import MemoryCache
from llm_router.cache.redis import RedisCache
from llm_router.processes.probes.cache import answer_probe, probe_cache
from llm_router.testing import FakeClock
from support.aio import run, until
from support.redis import RedisServer


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def memory(*, max_bytes: int = 10_000, max_entry_bytes: int = 1000) -> MemoryCache:
    return MemoryCache(max_bytes=max_bytes, max_entry_bytes=max_entry_bytes, ttl_s=60.0, clock=time.monotonic)


def redis(url: str, told: list[str]) -> RedisCache:
    return RedisCache(url, max_entry_bytes=1000, ttl_s=60.0, on_failure=told.append, timeout_s=0.3, retry_s=0.02)


class Broken:
    """A cache that works, but for what a test breaks."""

    type: Literal["response"] = "response"
    problem = ""

    def __init__(self, how: str) -> None:
        self.how = how
        self.kept: dict[bytes, Cached] = {}

    async def get(self, key: bytes) -> Cached | None:
        if self.how == "hangs":
            await asyncio.get_running_loop().create_future()
        if self.how == "raises":
            raise RuntimeError("the secret is 42")
        found = self.kept.get(key)
        if found is not None and self.how == "mixes up":
            return Cached(b"", b"of somebody else", False, "b")
        return found

    def put(self, key: bytes, answer: Cached) -> None:
        if self.how != "loses":
            self.kept[key] = answer

    async def settled(self, key: bytes) -> None: ...

    async def delete(self, key: bytes) -> None:
        if self.how != "keeps":
            self.kept.pop(key, None)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(len(self.kept), 0, 0, 0)

    async def aclose(self) -> None: ...


def test_a_cache_in_memory_that_works() -> None:
    """No problem, and as full as before."""

    async def scene() -> None:
        cache = memory()
        assert (await probe_cache(cache)).problem == ""
        assert cache.statistics() == CacheStatistics(0, 0, 0, 0)

    run(scene())


def test_it_is_timed_by_the_clock() -> None:
    """Seconds from beginning to end."""

    async def scene() -> None:
        clock = FakeClock()
        cache = Broken("")

        async def settled(key: bytes) -> None:
            clock.advance(0.25)

        cache.settled = settled  # type: ignore[method-assign]
        assert (await probe_cache(cache, clock=clock)).seconds == 0.25

    run(scene())


@pytest.mark.parametrize(
    ("how", "problem"),
    (
        ("loses", "what was put into it was not there"),
        ("mixes up", "it gave back something other than what was put into it"),
        ("keeps", "what was deleted was still there"),
        ("hangs", "it did not finish within 0.05 s"),
        ("raises", "it failed: RuntimeError"),
    ),
)
def test_what_is_broken_is_told(how: str, problem: str) -> None:
    """In words, and never as an exception."""
    assert run(probe_cache(Broken(how), timeout_s=0.05)).problem == problem


def test_a_cache_too_small_for_anything_does_not_work() -> None:
    """Its size is a mistake that no request would ever tell."""
    assert "was not there" in run(probe_cache(memory(max_bytes=10))).problem


def test_without_a_cache_there_is_nothing_to_fail() -> None:
    """A worker whose cache was just turned off answers all the same."""
    answer = run(answer_probe(7, None))
    assert (answer.number, answer.problem) == (7, "")


def test_a_worker_answers_with_the_number() -> None:
    """Control tells late answers by it."""
    assert run(answer_probe(8, Broken("loses"))).problem == "what was put into it was not there"


# -- a real Redis -----------------------------------------------------------------------------------------


def test_a_redis_that_works_keeps_nothing(server: RedisServer) -> None:
    """The answer really went there, and is deleted."""
    told: list[str] = []

    async def scene() -> None:
        cache = redis(server.url, told)
        assert (await probe_cache(cache)).problem == ""
        assert await cache._client.dbsize() == 0
        commands = await cache._client.info("commandstats")
        assert {"cmdstat_set", "cmdstat_get", "cmdstat_del"} <= commands.keys()
        await cache.aclose()

    run(scene())
    assert told == []


def test_a_redis_that_left_and_came_back() -> None:
    """Away: the outage is the problem, with its address; back: there is none."""
    told: list[str] = []

    async def scene() -> None:
        cache = redis(own.url, told)
        assert (await probe_cache(cache)).problem == ""
        own.kill()
        problem = ""
        for _ in range(2):
            problem = (await probe_cache(cache)).problem
            assert problem.startswith(f"the cache at 127.0.0.1:{own.port}/0 does not answer")
        assert cache.problem == problem
        own.start()
        await until(lambda: not cache.problem, what="its being back")
        assert (await probe_cache(cache)).problem == ""
        await cache.aclose()

    with RedisServer() as own:
        run(scene())
    assert len(told) == 1


def test_a_frozen_redis_does_not_hold_the_probe_up() -> None:
    """Its own timeouts bound it."""
    told: list[str] = []

    async def scene() -> None:
        cache = redis(own.url, told)
        assert (await probe_cache(cache)).problem == ""
        own.freeze()
        assert "does not answer (nothing within 0.3 s)" in (await probe_cache(cache)).problem
        own.thaw()
        await cache.aclose()

    with RedisServer() as own:
        run(scene())


@pytest.mark.parametrize(("forbidden", "problem"), (("del", "deletes no"), ("set", "keeps no"), ("get", "looks up no")))
def test_a_user_of_redis_who_may_not_do_it_all(server: RedisServer, forbidden: str, problem: str) -> None:
    """What Redis refuses is named, without the password."""
    told: list[str] = []

    async def scene() -> None:
        plain = redis(server.url, [])
        allowed = [f"+{command}" for command in ("set", "get", "del", "client", "ping") if command != forbidden]
        await plain._client.acl_setuser(
            forbidden, enabled=True, reset=True, passwords=["+s3cret"], keys=["*"], commands=allowed
        )
        cache = redis(f"redis://{forbidden}:s3cret@127.0.0.1:{server.port}", told)
        found = (await probe_cache(cache)).problem
        assert f"{problem} answers" in found
        assert "s3cret" not in found
        await plain._client.acl_setuser(forbidden, commands=["+@all"])
        assert (await probe_cache(cache)).problem == ""
        assert cache.problem == ""
        await cache.aclose()
        await plain.aclose()

    run(scene())
    assert len(told) == 1
