"""Whatever the order of requests, settlements, expiries and losses: never more than the limit, hardly ever less."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.accounts.ledger import Account, lease_of
from llm_router.accounts.limits import Limits
from llm_router.errors import LimitExceeded
from support.aio import run
from support.fuzz import examples
from support.limits import KEY, MODEL, Borrowers, clock

WINDOW_S = 60.0
LATE_S = WINDOW_S / 16
"""A unit may come back this much later than it could: a report a second, a slot of half a second, a sweep."""

STEPS = st.sampled_from((0.0, 0.125, 0.125, 0.5, 2.0, 7.0, 16.0, 31.0, 59.875, 61.0))
ACTIONS = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 2), st.integers(1, 60)),
    st.tuples(st.just("burst"), st.integers(0, 2), st.integers(1, 60)),
    st.tuples(st.just("settle"), st.integers(0, 50), st.integers(0, 100)),
    st.tuples(st.just("advance"), STEPS, st.just(0)),
)
LIMITS = st.builds(
    Limits,
    requests_per_minute=st.sampled_from((1, 3, 15, 16, 40, 100)),
    tokens_per_minute=st.sampled_from((60, 200, 1000)),
    concurrency=st.sampled_from((1, 2, 8, 70)),
)
OTHERS = st.builds(Limits, requests_per_minute=st.sampled_from((0, 20, 64)))


def check_windows(borrowers: Borrowers, limits: Limits) -> None:
    for requests, tokens in borrowers.windows(WINDOW_S):
        assert requests <= limits.requests_per_minute
        assert tokens <= limits.tokens_per_minute


@settings(max_examples=examples(150))
@given(LIMITS, OTHERS, st.integers(1, 3), st.lists(ACTIONS, max_size=60))
def test_never_more_than_the_limit_and_never_much_less(
    limits: Limits, others: Limits, count: int, actions: list[tuple[str, float, int]]
) -> None:
    """Several borrowers: no window, and no moment, holds more than the limit; whoever is refused is so for a reason."""
    borrowers = Borrowers({KEY: limits, MODEL: others}, clock(), count=count)
    for action, where, how in actions:
        if action == "advance":
            borrowers.advance(where)
        elif action == "settle" and borrowers.open():
            open_ones = borrowers.open()
            one = open_ones[int(where) % len(open_ones)]
            one.settle(borrowers.clock(), one.tokens * how // 100)
        elif action in {"admit", "burst"}:
            for _ in range(9 if action == "burst" else 1):
                borrowers.admit(how, borrower=int(where) % count)
                check_refusals(borrowers, limits, others, count)
        assert len(borrowers.open()) <= limits.concurrency
        for limiter in borrowers.limiters:
            limiter.sweep(borrowers.clock.advance(0.125))
            for kind in ("requests_per_minute", "tokens_per_minute"):
                assert limiter.idle(Account(KEY, kind)) <= lease_of(getattr(limits, kind))
    check_windows(borrowers, limits)


def check_refusals(borrowers: Borrowers, limits: Limits, others: Limits, count: int) -> None:
    """Each refusal is due: with what others keep idle, a lease each, and what is about to be free, there is no room."""
    now = borrowers.clock()
    recent = [one for one in borrowers.admitted if one.at > now - WINDOW_S - LATE_S]
    while borrowers.refused:
        refusal = borrowers.refused.pop()
        error = refusal.error
        assert isinstance(error, LimitExceeded)
        limit = getattr(limits if error.scope == "key" else others, error.limit)
        kept = (count - 1) * lease_of(limit)
        assert 0 <= error.retry_after_s <= WINDOW_S + 16
        if error.limit == "requests_per_minute":
            assert len(recent) + kept + 1 > limit
        elif error.limit == "tokens_per_minute":
            # what was settled just now may not be back yet
            used = sum(o.reservation.tokens if o.settled_at > now - 0.5 else o.tokens for o in recent)
            assert used + kept + refusal.tokens > limit
        else:
            held = [one for one in borrowers.admitted if one.is_open or one.settled_at > now - 0.5]
            assert len(held) + kept + 1 > limit


@settings(max_examples=examples(100))
@given(LIMITS, st.integers(1, 3), st.lists(ACTIONS, max_size=50))
def test_settling_leaks_nothing(limits: Limits, count: int, actions: list[tuple[str, float, int]]) -> None:
    """When all is settled and given back the ledger counts what was used, no more and no less; a window later nothing."""
    borrowers = Borrowers({KEY: limits}, clock(), count=count)
    for action, where, how in actions:
        if action == "advance":
            borrowers.advance(where)
        elif action == "settle" and borrowers.open():
            one = borrowers.open()[int(where) % len(borrowers.open())]
            one.settle(borrowers.clock(), one.tokens * how // 100)
        elif action in {"admit", "burst"}:
            borrowers.admit(how, borrower=int(where) % count)
    for one in borrowers.open():
        one.settle(borrowers.clock(), one.tokens // 2)
    for limiter in borrowers.limiters:
        limiter.give_back()
    now = borrowers.clock()
    counted = borrowers.ledger.counted()
    sure = [one for one in borrowers.admitted if one.at > now - WINDOW_S]
    maybe = [one for one in borrowers.admitted if one.at > now - WINDOW_S - LATE_S]
    assert len(sure) <= counted.get(Account(KEY, "requests_per_minute"), 0) <= len(maybe)
    tokens = counted.get(Account(KEY, "tokens_per_minute"), 0)
    assert sum(one.tokens for one in sure) <= tokens <= sum(one.tokens for one in maybe)
    assert Account(KEY, "concurrency") not in counted
    borrowers.advance(WINDOW_S + LATE_S)
    assert borrowers.ledger.counted() == {}
    assert all(limiter.statistics().leases == 0 for limiter in borrowers.limiters)


DELAYED = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 2), st.integers(1, 60)),
    st.tuples(st.just("settle"), st.integers(0, 50), st.integers(0, 100)),
    st.tuples(st.just("advance"), st.sampled_from((0.125, 0.25, 0.5, 2.0, 16.0)), st.just(0)),
    st.tuples(st.just("deliver"), st.just(0), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)


@settings(max_examples=examples(150))
@given(LIMITS, st.integers(1, 3), st.lists(DELAYED, max_size=60))
def test_late_answers_and_a_ledger_that_starts_anew_let_nothing_more_through(
    limits: Limits, count: int, actions: list[tuple[str, float, int]]
) -> None:
    """Answers come when they like, control is killed now and then: still no window holds more than the limit."""

    async def story() -> None:
        borrowers = Borrowers({KEY: limits}, clock(), count=count, at_once=False)
        for action, where, how in actions:
            if action == "advance":
                await borrowers.deliver() if where > 1 else None
                borrowers.advance(where)
            elif action == "deliver":
                await borrowers.deliver()
            elif action == "restart":
                borrowers.replace_ledger()
                await borrowers.deliver()
            elif action == "settle" and borrowers.open():
                one = borrowers.open()[int(where) % len(borrowers.open())]
                one.settle(borrowers.clock(), one.tokens * how // 100)
            elif action == "admit":
                borrowers.admit(how, borrower=int(where) % count)
            assert len(borrowers.open()) <= limits.concurrency
        for _ in range(20):
            borrowers.advance(0.125)
            await borrowers.deliver()
        assert all(limiter.statistics().waiting == 0 for limiter in borrowers.limiters)
        check_windows(borrowers, limits)

    run(story())
