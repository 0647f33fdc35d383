"""What a request meets: plans, reservations, waits, refusals with reasons, headers; and control coming and going."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from llm_router.accounts.ledger import Account, Grant, MemoryLedger
from llm_router.accounts.limiter import WAIT_S, Limiter, Reservation
from llm_router.accounts.limits import Limits, Subject
from llm_router.errors import BudgetExceeded, LimitExceeded, Unavailable
from support.aio import run
from support.limits import GLOBAL, KEY, MODEL, Borrowers, clock


def borrowers(
    limits: dict[Subject, Limits] | None = None, *, count: int = 1, at_once: bool = True, **key: float
) -> Borrowers:
    return Borrowers(limits or {KEY: Limits(**key)}, clock(), count=count, at_once=at_once)  # type: ignore[arg-type]


def refusal(of: Borrowers, tokens: int = 0, micro_usd: int = 0) -> LimitExceeded:
    assert of.admit(tokens, micro_usd) is None
    error = of.refused.pop().error
    assert isinstance(error, LimitExceeded)
    return error


def headers(of: Borrowers, **reserve: int) -> dict[str, str]:
    one = of.admit(**reserve)  # type: ignore[arg-type]
    assert one is not None
    return {name.decode(): value.decode() for name, value in one.reservation.headers()}


# -- plans ----------------------------------------------------------------------------------------------


def test_nothing_is_planned_where_nothing_is_limited() -> None:
    """No limits at all, or none of this key, model and everybody."""
    limiter = borrowers().limiters[0]
    assert limiter.plan("k1", "tiny") is None
    limiter.update({KEY: Limits(concurrency=1)})
    assert limiter.plan("k2", "tiny") is None
    assert limiter.plan("", "tiny") is None
    assert limiter.plan("k1", "tiny") is limiter.plan("k1", "tiny") is not None


def test_a_plan_says_what_it_needs_to_know() -> None:
    """Tokens and money are estimated only for those whose limits count them."""
    limiter = borrowers(
        {KEY: Limits(usd_per_day=1), MODEL: Limits(tokens_per_day=5), GLOBAL: Limits(concurrency=1)}
    ).limiters[0]
    known = [limiter.plan("k1", "tiny"), limiter.plan("", "tiny"), limiter.plan("", "big")]
    assert [(plan.needs_tokens, plan.needs_usd) for plan in known if plan] == [
        (True, True),
        (True, False),
        (False, False),
    ]


def test_plans_follow_changes() -> None:
    """A limit that is raised, lowered or taken away holds for the next request, and in-flight ones settle."""
    world = borrowers(requests_per_minute=320)
    first = world.admit()
    assert world.limiters[0].idle(Account(KEY, "requests_per_minute")) == 19
    for bound in (2, 0):
        world.limits = {KEY: Limits(requests_per_minute=bound, concurrency=9)}
        world.ledger.update(world.limits)
        world.limiters[0].update(world.limits)
        if bound:
            assert world.limiters[0].idle(Account(KEY, "requests_per_minute")) == 1, "what 2 would not lend went back"
    assert first is not None
    first.settle(world.clock(), 0)
    assert all(world.admit() for _ in range(5))


# -- admission ------------------------------------------------------------------------------------------------


def test_a_lease_is_fetched_once_for_many_requests() -> None:
    """A sixteenth of the limit costs one ask."""
    world = borrowers(requests_per_minute=1600)
    assert all(world.admit() for _ in range(100))
    assert len(world.asks) == 1


def test_a_lease_in_use_is_renewed_before_it_is_used_up_or_expires() -> None:
    """With steady traffic nobody ever waits: the sweep asks ahead."""
    world = borrowers(requests_per_minute=1600, tokens_per_minute=160_000, concurrency=64)
    assert world.admit(tokens=10)
    asked_ahead = len(world.asks)
    for _ in range(400):
        world.advance(0.125)
        before = len(world.asks)
        one = world.admit(tokens=50)
        assert one is not None
        assert len(world.asks) == before, "a request had to wait for a lease"
        one.settle(world.clock(), 30)
    assert len(world.asks) - asked_ahead < 50 * 3 * 5


def test_all_limits_or_none() -> None:
    """A request that one limit refuses draws on no other."""
    world = borrowers({KEY: Limits(requests_per_minute=5), MODEL: Limits(concurrency=1)})
    one = world.admit()
    for _ in range(10):
        assert refusal(world).limit == "concurrency"
    assert one is not None
    one.settle(world.clock(), 0)
    for _ in range(4):
        one = world.admit()
        assert one is not None
        one.settle(world.clock(), 0)
    assert refusal(world).limit == "requests_per_minute"


def test_settling_twice_settles_once() -> None:
    """The place is freed once, the tokens come back once."""
    world = borrowers(concurrency=16, tokens_per_minute=1600)
    one = world.admit(tokens=100)
    assert one is not None
    for _ in range(3):
        one.reservation.settle(40, 0)
    world.limiters[0].give_back()
    assert world.ledger.counted() == {Account(KEY, "tokens_per_minute"): 40}


def test_more_than_was_reserved_is_charged() -> None:
    """Even beyond what is lent: the ledger hears of it."""
    world = borrowers(tokens_per_minute=160, usd_per_day=1.0)
    one = world.admit(tokens=5, micro_usd=1000)
    assert one is not None
    one.settle(world.clock(), 300, 400_000)
    world.advance(0.5)
    world.limiters[0].give_back()
    assert world.ledger.counted() == {Account(KEY, "tokens_per_minute"): 300, Account(KEY, "usd_per_day"): 400_000}


def test_what_costs_nothing_needs_no_budget() -> None:
    """A model without a price is served when the money is spent."""
    world = borrowers(usd_per_day=0.001)
    assert world.admit(micro_usd=1000)
    assert isinstance(refusal(world, micro_usd=1), BudgetExceeded)
    assert world.admit(micro_usd=0)


def test_tokens_of_a_long_answer_come_back_where_they_were_counted() -> None:
    """Settled many leases later, the difference is free at the ledger within the next reports."""
    world = borrowers(tokens_per_minute=1000)
    one = world.admit(tokens=900)
    world.advance(30)
    assert refusal(world, tokens=600).limit == "tokens_per_minute"
    assert one is not None
    one.settle(world.clock(), 100)
    world.advance(0.5)
    assert world.admit(tokens=600)


def test_what_comes_back_too_late_frees_nothing() -> None:
    """The window in which it was counted is over: giving it back must not make room for others' tokens."""
    world = borrowers(tokens_per_minute=1000)
    one = world.admit(tokens=900)
    world.advance(64)
    assert world.admit(tokens=900)
    assert one is not None
    one.settle(world.clock(), 0)
    world.advance(0.5)
    assert refusal(world, tokens=600).limit == "tokens_per_minute"


def test_idle_units_and_places_go_back() -> None:
    """After its life a lease that nobody uses is with the ledger again, and nothing is left to look after."""
    world = borrowers(requests_per_minute=1600, concurrency=160)
    one = world.admit()
    assert one is not None
    one.settle(world.clock(), 0)
    world.advance(20)
    assert world.ledger.counted() == {Account(KEY, "requests_per_minute"): 1}
    assert world.limiters[0].statistics().leases == 0
    quiet = len(world.asks)
    world.advance(100)
    assert len(world.asks) == quiet


def test_a_place_is_confirmed_while_an_inference_lasts() -> None:
    """However long, so that a ledger may forget those who fall silent."""
    world = borrowers(concurrency=2)
    assert world.admit()
    world.asks.clear()
    world.advance(60)
    assert 5 <= len(world.asks) <= 7
    assert all(ask.held == 1 for ask in world.asks)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "request_", "message"),
    [
        (
            {KEY: Limits(requests_per_minute=1)},
            {},
            "the limit requests_per_minute of this key, 1, is reached; try again in 61 s",
        ),
        (
            {MODEL: Limits(concurrency=1)},
            {},
            "the limit concurrency of model 'tiny', 1, is reached; try again in 1 s",
        ),
        (
            {GLOBAL: Limits(requests_per_day=1)},
            {},
            "the limit requests_per_day of all callers together, 1, is reached; try again in 25 h",
        ),
        (
            {KEY: Limits(tokens_per_minute=500)},
            {"tokens": 300},
            "the limit tokens_per_minute of this key, 500, leaves 200, and this request may use 300; try again in 60 s",
        ),
        (
            {KEY: Limits(usd_per_day=0.5)},
            {"micro_usd": 300_000},
            (
                "the budget usd_per_day of this key, 0.50 USD, leaves 0.2000 USD, and this request may cost "
                "0.3000 USD; try again in 12 h"
            ),
        ),
        (
            {KEY: Limits(usd_per_month=0.3)},
            {"micro_usd": 300_000},
            "the budget usd_per_month of this key, 0.30 USD, is spent; try again in 17 d",
        ),
    ],
)
def test_a_refusal_says_which_limit_whose_and_when(
    limits: dict[Subject, Limits], request_: dict[str, int], message: str
) -> None:
    """In words, and as data for the reply and the counter."""
    world = borrowers(limits)
    assert world.admit(**request_)  # type: ignore[arg-type]
    world.advance(1)
    error = refusal(world, **request_)
    assert error.message == message
    ((subject, limit),) = limits.items()
    assert error.scope == subject.scope
    assert getattr(limit, error.limit) > 0
    assert error.retry_after_s > 0
    assert isinstance(error, BudgetExceeded) == error.limit.startswith("usd")


def test_what_can_never_be_admitted_is_told_so_without_asking() -> None:
    """The way out is a smaller request."""
    world = borrowers(tokens_per_minute=500, usd_per_day=1.0)
    error = refusal(world, tokens=501)
    assert error.message == (
        "the limit tokens_per_minute of this key, 500, is less than this request may use (501 tokens, input and the "
        "output that it allows); send less, or lower max_tokens"
    )
    assert "is less than this request may cost (2.0000 USD)" in refusal(world, micro_usd=2_000_000).message
    assert world.asks == []


def test_coming_back_when_told_to_is_admitted() -> None:
    """Retry-After is kept."""
    world = borrowers(requests_per_minute=3, tokens_per_minute=600)
    for _ in range(3):
        assert world.admit(tokens=200)
    world.advance(5)
    world.advance(refusal(world, tokens=100).retry_after_s)
    assert world.admit(tokens=100)


def test_hammering_asks_the_ledger_a_few_times_a_second() -> None:
    """A refusal is remembered for a quarter of a second."""
    world = borrowers(requests_per_minute=1)
    assert world.admit()
    world.asks.clear()
    for _ in range(80):
        world.clock.advance(0.0125)
        refusal(world)
    assert len(world.asks) <= 5


def test_headers_tell_the_tightest_limits() -> None:
    """Of requests and of tokens; on refusals too."""
    world = borrowers(
        {
            KEY: Limits(requests_per_minute=100, tokens_per_minute=4000),
            MODEL: Limits(requests_per_minute=3, tokens_per_day=9000),
        }
    )
    assert headers(world, tokens=1000) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "76s",
        "x-ratelimit-limit-tokens": "4000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "76s",
    }
    world.advance(1)
    assert headers(world, tokens=0)["x-ratelimit-remaining-requests"] == "1"
    assert headers(world, tokens=0)["x-ratelimit-remaining-requests"] == "0"
    told = dict(refusal(world, tokens=0).headers)
    assert told[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers(borrowers(concurrency=3)) == {}


# -- waiting ---------------------------------------------------------------------------------------------------


def test_those_who_wait_are_served_in_the_order_they_came() -> None:
    """One answer serves as many as it has units for; the rest are refused by the next."""

    async def story() -> None:
        world = borrowers(requests_per_minute=3, at_once=False)
        for _ in range(5):
            world.admit()
        assert world.limiters[0].statistics().waiting == 5
        assert len(world.asks) == 1, "those who wait share an ask"
        for _ in range(3):
            await world.deliver()
        assert (len(world.admitted), len(world.refused)) == (3, 2)
        assert world.limiters[0].statistics() == (1, 0, len(world.asks), 2, 0)

    run(story())


def test_a_caller_that_leaves_while_waiting_leaves_nothing_behind() -> None:
    """Before the answer, or at the same instant: its place is free."""

    async def story() -> None:
        for answered in (False, True):
            world = borrowers(concurrency=1, at_once=False)
            limiter = world.limiters[0]
            plan = limiter.plan("k1", "tiny")
            assert plan is not None
            waiting = limiter.reserve(plan, 0, 0)
            assert not isinstance(waiting, Reservation)
            task = asyncio.ensure_future(waiting)
            await asyncio.sleep(0)
            if answered:
                number, asks = world.in_transit.pop()
                limiter.granted(world.ledger.lend_now(f"worker-{number}", asks))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await world.deliver()
            world.advance(0.25)
            await world.deliver()
            assert world.ledger.counted() == {}
            assert limiter.statistics().waiting == 0

    run(story())


def test_no_answer_within_a_second_is_unavailable_and_not_a_limit() -> None:
    """The caller is told to try again; no limit is said to be reached."""

    async def story() -> None:
        world = borrowers(requests_per_minute=10, at_once=False)
        world.admit()
        await asyncio.sleep(0)
        world.advance(WAIT_S + 0.25)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (refused,) = world.refused
        assert isinstance(refused.error, Unavailable)
        assert refused.error.retry_after_s == 1.0
        assert "requests_per_minute of this key cannot be checked now" in refused.error.message
        await world.deliver()
        assert world.admit(), "the answer that came late is of use"

    run(story())


# -- control comes and goes --------------------------------------------------------------------------------------


def test_what_is_lent_can_be_used_while_control_is_away() -> None:
    """Until it is used up or expires; then requests are turned away at once."""
    world = borrowers(requests_per_minute=160)
    assert world.admit()
    world.limiters[0].control_lost()
    world.advance(WAIT_S)
    assert all(world.admit() for _ in range(9))
    assert world.admit() is None
    assert isinstance(world.refused[0].error, Unavailable)
    world.advance(61)
    world.limiters[0].control_found()
    assert world.admit()


def test_an_expired_lease_is_not_used_though_control_is_away() -> None:
    """It may be somebody else's by then."""
    world = borrowers(requests_per_minute=160)
    assert world.admit()
    world.limiters[0].control_lost()
    world.advance(15)
    assert world.admit() is None
    assert isinstance(world.refused[0].error, Unavailable)


def test_who_waits_when_control_is_lost_is_asked_for_again() -> None:
    """The answer comes from the next one."""

    async def story() -> None:
        world = borrowers(requests_per_minute=160, at_once=False)
        world.admit()
        await asyncio.sleep(0)
        world.replace_ledger()
        await world.deliver()
        assert len(world.admitted) == 1

    run(story())


def test_a_new_ledger_learns_what_is_in_flight_and_gets_the_rest_back() -> None:
    """Reservations from before are counted by it, and settle with it."""
    world = borrowers(tokens_per_minute=1600, concurrency=3)
    one = world.admit(tokens=700)
    world.replace_ledger()
    world.advance(1)
    counted = world.ledger.counted()
    assert counted[Account(KEY, "tokens_per_minute")] - world.limiters[0].idle(Account(KEY, "tokens_per_minute")) == 700
    assert counted[Account(KEY, "concurrency")] == 1
    assert one is not None
    one.settle(world.clock(), 200)
    world.advance(0.5)
    world.limiters[0].give_back()
    assert world.ledger.counted() == {Account(KEY, "tokens_per_minute"): 200}


def test_tells_a_ledger_that_it_is_there_though_it_has_borrowed_nothing() -> None:
    """A new ledger waits until it has heard of everybody."""
    told: list[int] = []
    limiter = Limiter(lambda asks: told.append(len(asks)), clock=clock())
    limiter.control_found()
    assert told == [0]


def test_answers_nobody_asked_for_are_ignored() -> None:
    """Of a limit that is no more, or to what was asked before the connection was lost."""
    world = borrowers(concurrency=2)
    for name in ("k1", "k9"):
        world.limiters[0].granted([Grant("key", name, "concurrency", 5)])
    assert world.limiters[0].idle(Account(KEY, "concurrency")) == 0


def test_a_budgets_units_are_not_lost_to_restarts() -> None:
    """What was lent and not spent is not counted by the ledger that was rebuilt from what was spent."""
    world = borrowers(usd_per_day=1.6)
    for _ in range(20):
        one = world.admit(micro_usd=10_000)
        assert one is not None
        one.settle(world.clock(), 0, 5_000)
        world.replace_ledger()
        world.ledger.charge(KEY, "usd_per_day", sum(one.micro_usd for one in world.admitted), world.clock())
    world.limiters[0].give_back()
    assert world.ledger.counted() == {Account(KEY, "usd_per_day"): 100_000}


def test_many_keys_share_a_model_and_everybody() -> None:
    """Each key's own limit, the model's and the global one hold at once, over several workers."""
    limits = {Subject("key", f"k{n}"): Limits(requests_per_minute=20) for n in range(4)}
    world = borrowers(
        {**limits, MODEL: Limits(requests_per_minute=50), GLOBAL: Limits(requests_per_minute=64)}, count=2
    )
    for turn, worker in itertools.product(range(40), range(2)):
        world.admit(borrower=worker, key=f"k{turn % 4}")
    assert 50 - 3 <= len(world.admitted) <= 50, "the other worker keeps a lease at most"


def test_a_lease_runs_from_when_it_was_asked_for() -> None:
    """An answer that takes long leaves less time: the ledger counts from before it was sent."""

    async def story() -> None:
        world = borrowers(requests_per_minute=160, at_once=False)
        world.admit()
        await asyncio.sleep(0)
        world.advance(0.75)
        await world.deliver()
        assert len(world.admitted) == 1
        world.limiters[0].control_lost()
        world.clock.advance(15 - 0.75 - 0.125)
        assert world.admit()
        world.clock.advance(0.125)
        assert world.admit() is None

    run(story())


def test_a_charge_that_was_lost_on_its_way_is_told_again() -> None:
    """What was used beyond the estimate counts, whether control heard of it before or not."""

    async def story() -> None:
        world = borrowers(tokens_per_minute=160, at_once=False)
        world.admit(tokens=10)
        await world.deliver()
        world.admitted[0].settle(world.clock(), 100)
        world.advance(0.5)
        assert [ask.spent for _, asks in world.in_transit for ask in asks] == [90]
        world.in_transit.clear()
        world.limiters[0].control_lost()
        world.limiters[0].control_found()
        await world.deliver()
        assert world.ledger.counted() == {Account(KEY, "tokens_per_minute"): 100}

    run(story())


def test_what_settles_while_control_is_away_is_told_to_the_next() -> None:
    """Its usage row may have come too late for the new ledger to begin with."""
    world = borrowers(tokens_per_minute=1600)
    one = world.admit(tokens=500)
    limiter = world.limiters[0]
    limiter.control_lost()
    assert one is not None
    one.settle(world.clock(), 400)
    world.ledger = MemoryLedger(clock=world.clock, wall=world.clock)
    world.ledger.update(world.limits)
    limiter.control_found()
    limiter.give_back()
    assert world.ledger.counted() == {Account(KEY, "tokens_per_minute"): 400}


def test_a_ledger_that_changes_unnoticed_counts_all_that_is_used_from_then_on() -> None:
    """As when Redis loses its memory: what was lent by the one before is not used any more."""
    world = borrowers(tokens_per_minute=1600, concurrency=64)
    assert world.admit(tokens=50)
    world.ledger = MemoryLedger(clock=world.clock, wall=world.clock)
    world.ledger.update(world.limits)
    world.advance(12)
    limiter = world.limiters[0]
    idle = {kind: limiter.idle(Account(KEY, kind)) for kind in ("tokens_per_minute", "concurrency")}
    assert world.ledger.counted() == {
        Account(KEY, "tokens_per_minute"): 50 + idle["tokens_per_minute"],
        Account(KEY, "concurrency"): 1 + idle["concurrency"],
    }
