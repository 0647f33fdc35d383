"""What every ledger promises, of the one in memory and the one in a real Redis alike."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.accounts.ledger import (
    BUDGETS,
    MICRO,
    WINDOWS,
    Ask,
    Grant,
    Ledger,
    MemoryLedger,
    lease_of,
    period_end,
    period_of,
)
from llm_router.accounts.limits import KINDS, Limits, Subject
from llm_router.accounts.redis_ledger import RedisLedger
from llm_router.testing import FakeClock
from support.aio import run
from support.fuzz import examples
from support.limits import GLOBAL, KEY, MODEL, clock
from support.redis import RedisServer


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def ledger_of(request: pytest.FixtureRequest) -> Callable[[FakeClock], Ledger]:
    """Makes an empty ledger that goes by a clock."""
    if request.param == "memory":
        return lambda now: MemoryLedger(clock=now, wall=now)
    url = request.getfixturevalue("redis").url
    return lambda now: in_redis(url, now)


def in_redis(url: str, now: FakeClock | None, prefix: str = "", **options: object) -> RedisLedger:
    times = {} if now is None else {"clock": now, "wall": now, "now": now}
    return RedisLedger(url, name="m1", prefix=prefix or f"{{{uuid.uuid4().hex}}}:", **times, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def closing(ledger: Ledger) -> AsyncIterator[Ledger]:
    try:
        yield ledger
    finally:
        await ledger.aclose()


def tell(
    ledger_of: Callable[[FakeClock], Ledger], story: Callable[[Ledger, FakeClock], Awaitable[None]], **limits: float
) -> None:
    """Runs a story with a ledger in which the key has these limits."""

    async def told() -> None:
        now = clock()
        async with closing(ledger_of(now)) as ledger:
            ledger.update({KEY: Limits(**limits)})  # type: ignore[arg-type]
            await story(ledger, now)

    run(told())


async def ask(ledger: Ledger, kind: str, borrower: str = "a", subject: Subject = KEY, **fields: object) -> Grant:
    (grant,) = await ledger.lend(borrower, (Ask(subject.scope, subject.name, kind, **fields),))  # type: ignore[arg-type]
    return grant


@pytest.mark.parametrize("kind", KINDS)
def test_lends_a_lease_at_once_and_more_only_if_needed(ledger_of: Callable[[FakeClock], Ledger], kind: str) -> None:
    """However much is wanted, at most a sixteenth is lent, or what waiting requests need."""
    scale = MICRO if kind in BUDGETS else 1

    async def story(ledger: Ledger, now: FakeClock) -> None:
        first = await ask(ledger, kind, want=1000 * scale)
        assert first.units == lease_of(160 * scale) == 10 * scale
        assert first.remaining == 150 * scale == ledger.remaining(KEY, kind)
        second = await ask(ledger, kind, "b", want=30 * scale, need=30 * scale, least=scale)
        assert second.units == 30 * scale
        assert (await ask(ledger, kind, "c", want=0)).units == 0
        assert (await ask(ledger, kind, "d", want=500 * scale, need=500 * scale)).units == 120 * scale
        refused = await ask(ledger, kind, "e", want=scale, need=scale, least=scale)
        assert refused.units == 0
        assert refused.remaining == 0
        assert refused.retry_after_s > 0

    tell(ledger_of, story, **{kind: 160})


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_a_lease_counts_until_a_window_after_its_expiry(ledger_of: Callable[[FakeClock], Ledger], kind: str) -> None:
    """It may be used until it expires: only a window later is that over, and then to the slot."""
    window = WINDOWS[kind]

    async def story(ledger: Ledger, now: FakeClock) -> None:
        grant = await ask(ledger, kind, want=10, need=10)
        assert (grant.units, grant.expires_s) == (10, window.life_s)
        refused = await ask(ledger, kind, want=1)
        assert window.length_s + window.life_s < refused.retry_after_s
        assert refused.retry_after_s <= window.length_s + window.life_s + window.slot_s
        assert refused.reset_s == refused.retry_after_s
        now.advance(window.length_s + window.life_s)
        assert (await ask(ledger, kind, want=1)).units == 0
        now.advance(window.slot_s)
        assert (await ask(ledger, kind, want=1)).units == 1

    tell(ledger_of, story, **{kind: 10})


def test_what_is_reported_as_used_leaves_a_window_later(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """A report moves used units to now; what is left over is lent again and counts from its new expiry."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        first = await ask(ledger, "tokens_per_minute", want=100, need=100)
        now.advance(1.0)
        again = await ask(ledger, "tokens_per_minute", used=60, left=40, slot=first.slot, epoch=first.epoch)
        assert again.slot > first.slot > again.used_slot
        assert ledger.remaining(KEY, "tokens_per_minute") == 0
        now.advance(60.5)
        assert (await ask(ledger, "tokens_per_minute")).remaining == 60
        now.advance(15.5)
        assert (await ask(ledger, "tokens_per_minute")).remaining == 100

    tell(ledger_of, story, tokens_per_minute=100)


def test_what_is_given_back_is_free_at_once_and_only_where_it_is_counted(
    ledger_of: Callable[[FakeClock], Ledger],
) -> None:
    """Units come back under the slot they were lent in; a slot that is over has nothing to give."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        first = await ask(ledger, "tokens_per_minute", want=50, need=50)
        back = await ask(ledger, "tokens_per_minute", unused=((first.slot, 30),), epoch=first.epoch)
        assert back.remaining == 80
        now.advance(70.0)
        second = await ask(ledger, "tokens_per_minute", want=70, need=70)
        now.advance(6.0)  # the first lease has left the window
        late = await ask(ledger, "tokens_per_minute", unused=((first.slot, 20),), epoch=first.epoch)
        assert second.units == 70
        assert late.remaining == 30

    tell(ledger_of, story, tokens_per_minute=100)


def test_what_was_used_beyond_the_lease_is_charged(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """Estimates that were too low count, even beyond the limit."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        first = await ask(ledger, "tokens_per_minute", want=100, need=100)
        after = await ask(ledger, "tokens_per_minute", spent=50, epoch=first.epoch, want=1)
        assert (after.units, after.remaining) == (0, 0)
        now.advance(75.5)
        assert (await ask(ledger, "tokens_per_minute")).remaining == 100

    tell(ledger_of, story, tokens_per_minute=100)


def test_a_borrower_of_another_ledger_brings_what_it_holds(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """What it says of slots is not ours; what is in flight counts."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        own = await ask(ledger, "requests_per_minute", "a", want=6, need=6)
        await ask(
            ledger,
            "requests_per_minute",
            "b",
            held=3,
            left=2,
            used=1,
            slot=own.slot,
            unused=((own.slot, 5),),
            epoch="x",
        )
        assert ledger.remaining(KEY, "requests_per_minute") == 1

    tell(ledger_of, story, requests_per_minute=10)


def test_concurrency_is_what_each_borrower_says_it_has(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """Saying it twice counts once; giving it up, or leaving, frees it."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        first = await ask(ledger, "concurrency", "a", want=3, need=3)
        for _ in range(2):
            same = await ask(ledger, "concurrency", "a", held=2, left=1, epoch=first.epoch)
            assert same.remaining == 1
        assert (await ask(ledger, "concurrency", "b", want=2, need=2, least=2)).units == 0
        assert (await ask(ledger, "concurrency", "a", held=2, epoch=first.epoch)).remaining == 2
        assert (await ask(ledger, "concurrency", "b", want=2, need=2)).units == 2
        ledger.left("a")
        assert (await ask(ledger, "concurrency", "c", want=2, need=2)).units == 2

    tell(ledger_of, story, concurrency=4)


@pytest.mark.parametrize(("kind", "days"), [("usd_per_day", 1), ("usd_per_month", 17)])
def test_a_budget_begins_anew_with_the_calendar(ledger_of: Callable[[FakeClock], Ledger], kind: str, days: int) -> None:
    """What is spent stays so until midnight UTC, of the day or the month; a lease ends with it."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        end = period_end(kind, period_of(kind, now()))
        spent = await ask(ledger, kind, want=MICRO, need=MICRO)
        assert spent.expires_s == 60.0
        assert spent.reset_s == end - now() == days * 86_400 - 43_200
        now.advance(end - now() - 1.0)
        refused = await ask(ledger, kind, want=1)
        assert (refused.units, refused.retry_after_s) == (0, 1.0)
        back = await ask(ledger, kind, unused=((spent.slot, 400_000),), epoch=spent.epoch)
        assert back.remaining == 400_000
        assert back.expires_s == 1.0
        now.advance(1.0)
        fresh = await ask(ledger, kind, "b", unused=((spent.slot, 600_000),), epoch=spent.epoch)
        assert fresh.remaining == MICRO

    tell(ledger_of, story, **{kind: 1.0})


def test_usage_rows_rebuild_what_is_counted(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """`update` says what is new; charges count in their window and period, and not when they are older."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        limits = Limits(tokens_per_minute=100, usd_per_day=1.0)
        opened = ledger.update({KEY: Limits(requests_per_minute=5), MODEL: limits, GLOBAL: Limits()})
        assert set(opened) == {(MODEL, "tokens_per_minute"), (MODEL, "usd_per_day")}
        ledger.charge(MODEL, "tokens_per_minute", 30, now() - 20)
        ledger.charge(MODEL, "tokens_per_minute", 50, now() - 61)
        ledger.charge(MODEL, "usd_per_day", 200_000, now() - 3600)
        ledger.charge(MODEL, "usd_per_day", 500_000, now() - 86_400)
        ledger.charge(KEY, "usd_per_day", 1, now())  # not limited
        assert (await ask(ledger, "tokens_per_minute", subject=MODEL)).remaining == 70
        assert (await ask(ledger, "usd_per_day", subject=MODEL)).remaining == 800_000
        now.advance(41.0)
        assert (await ask(ledger, "tokens_per_minute", subject=MODEL)).remaining == 100

    tell(ledger_of, story, requests_per_minute=5)


def test_a_limit_that_changes_keeps_what_is_counted(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """Lowered below what is lent it lends nothing; taken away it refuses nobody."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        await ask(ledger, "requests_per_minute", want=40, need=40)
        assert ledger.update({KEY: Limits(requests_per_minute=30)}) == ()
        lowered = await ask(ledger, "requests_per_minute", want=1)
        assert (lowered.units, lowered.remaining) == (0, 0)
        ledger.update({KEY: Limits(requests_per_minute=50)})
        assert (await ask(ledger, "requests_per_minute")).remaining == 10
        ledger.update({})
        assert ledger.remaining(KEY, "requests_per_minute") is None
        assert (await ask(ledger, "requests_per_minute", want=7, need=7)).units == 7

    tell(ledger_of, story, requests_per_minute=100)


def test_a_budget_warns_once_in_its_period(ledger_of: Callable[[FakeClock], Ledger]) -> None:
    """When the share is spent or lent; again in the next period."""

    async def story(ledger: Ledger, now: FakeClock) -> None:
        await ask(ledger, "usd_per_day", want=700_000, need=700_000)
        assert ledger.warnings() == ()
        for _ in range(2):
            await ask(ledger, "usd_per_day", want=100_000, need=100_000)
        (warning,) = ledger.warnings()
        assert warning == (KEY, "usd_per_day", 0.8, 1.0)
        assert ledger.warnings() == ()
        now.advance(86_400)
        await ask(ledger, "usd_per_day", want=900_000, need=900_000)
        assert len(ledger.warnings()) == 1

    tell(ledger_of, story, usd_per_day=1.0)


ASKS = st.builds(
    lambda kind, want, need, least, held, left, used, spent, back: (
        kind,
        {"want": want, "need": min(want, need), "least": min(want, need, least), "held": held, "left": left},
        {"used": used, "spent": spent},
        back,
    ),
    st.sampled_from(KINDS),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 3),
    st.lists(st.integers(1, 10), max_size=2),
)
STEPS = st.sampled_from((0.0, 0.125, 0.5, 3.0, 14.875, 44.0, 61.0, 300.0, 43_200.0, 86_400.0))


@settings(max_examples=examples(30))
@given(st.lists(st.tuples(STEPS, st.sampled_from("ab"), ASKS), min_size=1, max_size=25))
def test_redis_counts_as_memory_does(redis: RedisServer, events: list[tuple[float, str, tuple]]) -> None:  # type: ignore[type-arg]
    """Whatever is asked in whatever order, both give the same answers."""
    limits = {
        KEY: Limits(
            requests_per_minute=50,
            requests_per_day=90,
            tokens_per_minute=100,
            tokens_per_day=64,
            concurrency=20,
            usd_per_day=0.00007,
            usd_per_month=0.0003,
        )
    }

    async def story() -> None:
        now = clock()
        memory = MemoryLedger(clock=now, wall=now)
        memory.update(limits)
        async with closing(in_redis(redis.url, now)) as shared:
            shared.update(limits)
            last: dict[tuple[str, str], tuple[Grant, Grant]] = {}
            for step, borrower, (kind, wish, report, back) in events:
                now.advance(step)
                if now() - clock()() > 25 and kind == "concurrency":
                    continue  # Redis forgets who is silent; memory is told
                before = last.get((borrower, kind))
                told = [
                    ask(
                        ledger,
                        kind,
                        borrower,
                        **wish,
                        **report,
                        slot=grant.slot if grant else 0,
                        unused=tuple((grant.slot - n % 2, n) for n in back) if grant else (),
                        epoch=grant.epoch if grant else "",
                    )
                    for ledger, grant in zip((memory, shared), before or (None, None), strict=True)
                ]
                ours, theirs = await told[0], await told[1]
                last[borrower, kind] = (ours, theirs)
                assert [*theirs.__struct_fields__] == [*ours.__struct_fields__]
                for field in ours.__struct_fields__:
                    if field != "epoch":
                        mine = getattr(ours, field)
                        assert getattr(theirs, field) == (pytest.approx(mine) if isinstance(mine, float) else mine), (
                            field
                        )

    run(story())
