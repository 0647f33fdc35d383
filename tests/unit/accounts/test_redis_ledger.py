"""Routers that share Redis share their limits; without it each goes on alone, and says so."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llm_router.accounts.ledger import Ask, Grant, period_end, period_of
from llm_router.accounts.limits import Limits
from llm_router.accounts.redis_ledger import RedisLedger
from support.aio import run, until
from support.limits import KEY, clock
from support.redis import RedisServer

LIMITS = {KEY: Limits(requests_per_minute=32, concurrency=4, usd_per_day=1.0, usd_per_month=20.0)}


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@asynccontextmanager
async def ledger(server: RedisServer, prefix: str = "", **options: Any) -> AsyncIterator[RedisLedger]:
    options = {"probe_s": 0.02, "name": "one", **options}
    made = RedisLedger(server.url, prefix=prefix or f"{{{uuid.uuid4().hex}}}:", **options)
    made.update(LIMITS)
    try:
        yield made
    finally:
        await made.aclose()


async def ask(ledger: RedisLedger, kind: str, borrower: str = "w", **fields: Any) -> Grant:
    (grant,) = await ledger.lend(borrower, (Ask(KEY.scope, KEY.name, kind, **fields),))
    return grant


def test_two_routers_never_lend_more_than_the_limit(shared_redis: RedisServer) -> None:
    """Both ask at once, as fast as they can."""

    async def story() -> None:
        async with ledger(shared_redis, "{a}:", name="one") as one, ledger(shared_redis, "{a}:", name="two") as two:
            grants = await asyncio.gather(
                *(ask(router, "requests_per_minute", want=3, need=3) for router in (one, two) for _ in range(8))
            )
            assert one.is_available
            assert two.is_available
            assert sum(grant.units for grant in grants) == 32
            for router in (one, two):
                assert (await ask(router, "requests_per_minute", want=1)).units == 0
            assert two.remaining(KEY, "requests_per_minute") == 0

    run(story())


def test_the_servers_clock_knows_the_calendar(shared_redis: RedisServer) -> None:
    """Day and month come from Redis's own time, and agree with ours."""

    async def story() -> None:
        async with ledger(shared_redis) as one:
            for kind in ("usd_per_day", "usd_per_month"):
                grant = await ask(one, kind, want=1000)
                period = period_of(kind, time.time())
                assert grant.slot == grant.used_slot == period
                assert grant.reset_s == pytest.approx(period_end(kind, period) - time.time(), abs=5.0)

    run(story())


def test_months_are_as_long_as_they_are(shared_redis: RedisServer) -> None:
    """Every month of years with and without a leap day begins and ends where the calendar says."""

    async def story() -> None:
        now = clock()
        async with ledger(shared_redis, now=now, wall=now) as one:
            for month in range(2023 * 12, 2025 * 12 + 3):
                now.now = period_end("usd_per_month", month) - 0.5
                grant = await ask(one, "usd_per_month", want=1)
                assert (grant.slot, grant.reset_s) == (month, 0.5)

    run(story())


def test_only_one_router_says_what_usage_rows_know(shared_redis: RedisServer) -> None:
    """Who opened the account rebuilds it; a second router that reads the same rows adds nothing."""

    async def story() -> None:
        async with ledger(shared_redis, "{b}:") as one:
            one.charge(KEY, "usd_per_day", 300_000, time.time())
            assert one.remaining(KEY, "usd_per_day") == 700_000
            assert (await ask(one, "usd_per_day")).remaining == 700_000
        async with ledger(shared_redis, "{b}:", name="two") as two:
            two.charge(KEY, "usd_per_day", 300_000, time.time())
            assert (await ask(two, "usd_per_day")).remaining == 700_000

    run(story())


def test_a_month_of_usage_rows_is_told_before_anything_is_lent(shared_redis: RedisServer) -> None:
    """However many there are, in calls that are short enough."""

    async def story() -> None:
        async with ledger(shared_redis) as one:
            for _ in range(5000):
                one.charge(KEY, "usd_per_month", 1000, time.time())
            assert (await ask(one, "usd_per_month")).remaining == 15_000_000

    run(story())


def test_a_router_that_falls_silent_frees_what_it_had_in_flight(shared_redis: RedisServer) -> None:
    """Nobody said goodbye for it; after half a minute its places are free."""

    async def story() -> None:
        now = clock()
        options = {"now": now, "clock": now, "wall": now}
        async with (
            ledger(shared_redis, "{c}:", name="one", **options) as one,
            ledger(shared_redis, "{c}:", name="two", **options) as two,
        ):
            await ask(one, "concurrency", want=4, need=4)
            now.advance(30.0)
            assert (await ask(two, "concurrency", want=1)).units == 0
            now.advance(0.5)
            assert (await ask(two, "concurrency", want=1)).units == 1

    run(story())


def test_a_borrower_that_leaves_frees_its_places_without_another_ask(shared_redis: RedisServer) -> None:
    """The other router finds them free though the first asks nothing more."""

    async def story() -> None:
        async with ledger(shared_redis, "{d}:", name="one") as one, ledger(shared_redis, "{d}:", name="two") as two:
            await ask(one, "concurrency", "w1", want=4, need=4)
            one.left("w1")
            units = 0
            async with asyncio.timeout(10):
                while not units:
                    units = (await ask(two, "concurrency", want=1)).units

    run(story())


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_without_redis_it_counts_alone_from_what_it_knew_and_says_so(own_redis: RedisServer, how: str) -> None:
    """One warning; no more than what was left is lent; when Redis is back it learns what was used."""
    news: list[str] = []

    async def story() -> None:
        async with ledger(
            own_redis,
            on_unavailable=lambda reason: news.append(f"away {reason}"),
            on_available=lambda: news.append("back"),
        ) as one:
            first = await ask(one, "requests_per_minute", want=20, need=20)
            getattr(own_redis, how)()
            async with asyncio.timeout(2):
                alone = await ask(one, "requests_per_minute", want=20, need=5, least=1)
            assert alone.epoch != first.epoch
            assert alone.units == 5
            assert one.remaining(KEY, "requests_per_minute") == 7
            assert not one.is_available
            assert len(news) == 1
            assert news[0].startswith("away ")
            assert (await ask(one, "requests_per_minute", "v", want=9, need=9, least=8)).units == 0
            own_redis.start() if how == "kill" else own_redis.thaw()
            await until(lambda: one.is_available, what="Redis counting again")
            assert news[1:] == ["back"]
            again = await ask(one, "requests_per_minute", held=0, epoch=alone.epoch)
            if how == "kill":
                assert again.remaining == 32 - 5  # it forgot the first twenty
            else:  # it may count the ask that it did not answer as well
                assert 32 - 20 - 5 - 5 <= again.remaining <= 32 - 20 - 5
            assert (again.epoch == first.epoch) == (how == "freeze")

    run(story())


def test_a_redis_that_was_never_there_is_one_warning_and_no_failure() -> None:
    """A router starts without it; the address and its password are nowhere shown."""
    news: list[str] = []

    async def story() -> None:
        one = RedisLedger("redis://:hush@127.0.0.1:1/0", on_unavailable=news.append)
        one.update(LIMITS)
        one.charge(KEY, "requests_per_minute", 30, time.time())
        grants = [await ask(one, "requests_per_minute", want=1, need=1) for _ in range(3)]
        assert [grant.units for grant in grants] == [1, 1, 0]
        assert "hush" not in repr(one)
        await one.aclose()

    run(story())
    (reason,) = news
    assert "hush" not in reason
