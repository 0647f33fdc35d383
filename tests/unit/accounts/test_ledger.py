"""What the ledger in memory does beyond what every ledger promises (tests/contract/test_ledgers.py)."""

from __future__ import annotations

import asyncio

from llm_router.accounts.ledger import Ask, MemoryLedger, limit_of
from llm_router.accounts.limits import Limits
from llm_router.testing import FakeClock
from support.aio import run
from support.limits import KEY, clock


def places(held: int = 0, want: int = 0) -> tuple[Ask, ...]:
    return (Ask("key", "k1", "concurrency", want=want, need=want, held=held, epoch="before"),)


def test_a_new_ledger_lends_nothing_before_it_has_heard_of_every_borrower() -> None:
    """What one still has in flight from before counts, though another asks first."""

    async def story() -> None:
        ledger = MemoryLedger(borrowers=3)
        ledger.update({KEY: Limits(concurrency=4)})
        first = asyncio.ensure_future(ledger.lend("a", places(want=3)))
        second = asyncio.ensure_future(ledger.lend("b", places(held=1, want=1)))
        await asyncio.sleep(0)
        assert not first.done()
        await ledger.lend("c", places(held=2))
        assert (await first)[0].units == 1
        assert (await second)[0].units == 0

    run(story())


def test_a_borrower_that_does_not_come_is_not_waited_for_long() -> None:
    """After half a second those who are there are served."""

    async def story() -> None:
        ledger = MemoryLedger(borrowers=2)
        ledger.update({KEY: Limits(concurrency=4)})
        assert (await ledger.lend("a", places(want=3)))[0].units == 3
        assert (await asyncio.wait_for(ledger.lend("a", places(held=3, want=1)), 0.1))[0].units == 1

    run(story())


def test_a_wall_clock_that_is_put_back_gives_no_money_back() -> None:
    """Yesterday's budget does not open again."""
    wall = FakeClock(1_700_000_000.0)
    ledger = MemoryLedger(clock=clock(), wall=wall)
    ledger.update({KEY: Limits(usd_per_day=1.0)})
    ledger.charge(KEY, "usd_per_day", 900_000, wall())
    wall.now -= 86_400
    assert ledger.remaining(KEY, "usd_per_day") == 100_000


def test_a_limit_is_counted_in_units() -> None:
    """Money in millionths of a dollar; the smallest budget is not the absence of one."""
    limits = Limits(usd_per_day=0.25, usd_per_month=1e-9, tokens_per_day=7)
    assert [limit_of(limits, kind) for kind in ("usd_per_day", "usd_per_month", "tokens_per_day", "concurrency")] == [
        250_000,
        1,
        7,
        0,
    ]


def test_an_account_needs_no_more_memory_than_its_window_has_slots() -> None:
    """However long it is used."""
    now = clock()
    ledger = MemoryLedger(clock=now, wall=now)
    ledger.update({KEY: Limits(requests_per_minute=1_000_000)})
    for _ in range(2000):
        now.advance(0.25)
        ledger.lend_now("a", (Ask("key", "k1", "requests_per_minute", want=1),))
    (book,) = ledger._accounts.values()
    assert len(book._slots) <= (60 + 15) / 0.5 + 2  # type: ignore[union-attr]
