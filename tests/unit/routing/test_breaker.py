"""The circuit breaker: when it opens, how it probes, when it closes, and what it never does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from llm_router.routing.breaker import Breaker, State
from llm_router.routing.table import BreakerSpec
from llm_router.testing import FakeClock
from support.fuzz import examples

SPEC = BreakerSpec(min_attempts=4, error_ratio=0.5, cooldown_s=5.0, cooldown_max_s=60.0, probes=2)


class Told:
    """A breaker on a clock that moves when told to, and the changes that it told."""

    def __init__(self, spec: BreakerSpec = SPEC) -> None:
        self.clock = FakeClock()
        self.changes: list[State] = []
        self.breaker = Breaker(spec, lambda state, until: self.changes.append(state))

    def attempt(self, *, failed: bool, took_s: float = 0.0, retry_after_s: float | None = None) -> None:
        ticket = self.breaker.allow(self.clock())
        assert ticket, "the attempt is allowed"
        self.breaker.record(ticket, self.clock(), failed=failed, took_s=took_s, retry_after_s=retry_after_s)

    def fail(self, times: int) -> None:
        for _ in range(times):
            self.attempt(failed=True)

    def state(self) -> State:
        return self.breaker.state

    def wait_out(self) -> None:
        """To the instant at which it may be probed."""
        self.clock.now = self.breaker.open_until


def test_it_opens_when_enough_attempts_failed_often_enough() -> None:
    it = Told()
    it.attempt(failed=False)
    it.attempt(failed=False)
    it.fail(1)
    assert it.state() is State.CLOSED
    it.fail(1)
    assert it.state() is State.OPEN
    assert it.breaker.allow(it.clock()) == 0
    assert it.changes == [State.OPEN]


def test_what_happened_before_the_window_does_not_count() -> None:
    it = Told()
    it.fail(3)
    it.clock.advance(SPEC.window_s)
    it.fail(3)
    assert it.state() is State.CLOSED
    it.fail(1)
    assert it.state() is State.OPEN


def test_slow_attempts_open_it_as_well() -> None:
    it = Told(msgspec.structs.replace(SPEC, slow_s=1.0, slow_ratio=0.75))
    it.attempt(failed=False, took_s=0.5)
    for _ in range(2):
        it.attempt(failed=False, took_s=1.5)
    assert it.state() is State.CLOSED
    it.attempt(failed=False, took_s=1.5)
    assert it.state() is State.OPEN


def test_slowness_counts_only_where_a_bound_is_set() -> None:
    it = Told()
    for _ in range(10):
        it.attempt(failed=False, took_s=1e6)
    assert it.state() is State.CLOSED


def test_one_that_is_not_enabled_never_opens() -> None:
    it = Told(msgspec.structs.replace(SPEC, enabled=False))
    it.fail(50)
    assert not it.breaker.adopt(it.clock() + 10, it.clock())
    assert (it.state(), it.changes) == (State.CLOSED, [])


def test_after_the_cooldown_it_lets_probes_through_and_closes_when_they_succeed() -> None:
    it = Told()
    it.fail(4)
    it.clock.advance(SPEC.cooldown_s - 0.001)
    assert not it.breaker.may(it.clock())
    it.clock.advance(0.001)
    assert it.breaker.state_at(it.clock()) is State.HALF_OPEN
    tickets = [it.breaker.allow(it.clock()) for _ in range(3)]
    assert [bool(ticket) for ticket in tickets] == [True, True, False]
    for ticket in tickets[:2]:
        it.breaker.record(ticket, it.clock(), failed=False)
    assert it.state() is State.CLOSED
    assert it.changes == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    it.fail(3)
    assert it.state() is State.CLOSED  # what was counted before is forgotten


def test_a_probe_that_fails_opens_it_for_twice_as_long() -> None:
    it = Told()
    it.fail(4)
    cooldowns = []
    for _ in range(6):
        cooldowns.append(it.breaker.open_until - it.clock())
        it.wait_out()
        it.fail(1)
    assert cooldowns == [5, 10, 20, 40, 60, 60]
    it.wait_out()
    for _ in range(2):
        it.attempt(failed=False)
    it.fail(4)
    assert it.breaker.open_until - it.clock() == SPEC.cooldown_s  # no more in a row


def test_a_slow_probe_is_no_success_where_slowness_counts() -> None:
    it = Told(msgspec.structs.replace(SPEC, slow_s=1.0))
    it.fail(4)
    it.wait_out()
    it.attempt(failed=False, took_s=2.0)
    assert it.state() is State.OPEN


def test_a_probe_that_told_nothing_makes_room_for_another() -> None:
    it = Told()
    it.fail(4)
    it.wait_out()
    first, _ = it.breaker.allow(it.clock()), it.breaker.allow(it.clock())
    assert not it.breaker.may(it.clock())
    it.breaker.release(first)
    assert it.breaker.may(it.clock())
    assert it.state() is State.HALF_OPEN


def test_who_gave_up_waiting_longer_than_is_slow_says_so() -> None:
    """A backend that hangs is found even if no caller has the patience to see it time out."""
    it = Told(msgspec.structs.replace(SPEC, slow_s=1.0))
    for _ in range(3):
        it.breaker.give_up(it.breaker.allow(it.clock()), it.clock(), waited_s=3.0)
    it.breaker.give_up(it.breaker.allow(it.clock()), it.clock(), waited_s=0.3)
    assert it.state() is State.CLOSED
    it.breaker.give_up(it.breaker.allow(it.clock()), it.clock(), waited_s=3.0)
    assert it.state() is State.OPEN


@pytest.mark.parametrize(("retry_after_s", "open_s"), [(2.0, 5.0), (30.0, 30.0), (3600.0, 60.0)])
def test_the_cooldown_honours_retry_after_up_to_its_maximum(retry_after_s: float, open_s: float) -> None:
    it = Told()
    it.fail(2)
    it.attempt(failed=True, retry_after_s=retry_after_s)
    it.fail(1)
    assert it.breaker.open_until - it.clock() == open_s


def test_a_success_that_broke_off_later_counts_as_failed() -> None:
    it = Told()
    tickets = [it.breaker.allow(it.clock()) for _ in range(4)]
    for ticket in tickets:
        it.breaker.record(ticket, it.clock(), failed=False)
    it.breaker.break_off(tickets[0], it.clock())
    assert it.state() is State.CLOSED
    it.breaker.break_off(tickets[1], it.clock())
    assert it.state() is State.OPEN


def test_a_probe_that_broke_off_later_opens_it() -> None:
    it = Told()
    it.fail(4)
    it.wait_out()
    ticket = it.breaker.allow(it.clock())
    it.breaker.record(ticket, it.clock(), failed=False)
    it.breaker.break_off(ticket, it.clock())
    assert it.state() is State.OPEN


def test_what_began_before_the_circuit_changed_says_nothing() -> None:
    it = Told()
    old = [it.breaker.allow(it.clock()) for _ in range(5)]
    it.fail(4)
    it.breaker.record(old[0], it.clock(), failed=True)
    it.wait_out()
    probe = it.breaker.allow(it.clock())
    it.breaker.record(old[1], it.clock(), failed=True)
    it.breaker.record(old[2], it.clock(), failed=False)
    it.breaker.release(old[3])
    it.breaker.break_off(old[4], it.clock())
    assert it.state() is State.HALF_OPEN
    assert it.breaker.allow(it.clock())
    assert not it.breaker.allow(it.clock())
    it.breaker.record(probe, it.clock(), failed=True)
    assert it.state() is State.OPEN


def test_the_opening_of_another_process_is_taken_in_and_not_told_again() -> None:
    it = Told()
    assert it.breaker.adopt(it.clock() + 7, it.clock())
    assert not it.breaker.adopt(it.clock() + 7, it.clock())
    assert not it.breaker.adopt(it.clock() - 1, it.clock())
    assert (it.state(), it.breaker.open_until, it.changes) == (State.OPEN, it.clock() + 7, [])
    assert it.breaker.adopt(it.clock() + 1e9, it.clock())  # nobody can close it for longer than the maximum
    it.clock.advance(SPEC.cooldown_max_s)
    it.attempt(failed=False)
    assert it.changes == [State.HALF_OPEN]


def test_one_that_is_retired_tells_nothing_more() -> None:
    it = Told()
    it.breaker.retire()
    it.fail(4)
    assert (it.state(), it.changes) == (State.OPEN, [])


@given(
    spec=st.builds(
        BreakerSpec,
        min_attempts=st.integers(1, 8),
        error_ratio=st.floats(0.1, 1.0),
        slow_s=st.sampled_from([0.0, 1.0]),
        slow_ratio=st.floats(0.1, 1.0),
    ),
    outcomes=st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 8)), max_size=60),
)
def test_it_opens_only_for_what_a_plain_list_of_attempts_shows(
    spec: BreakerSpec, outcomes: list[tuple[bool, bool, float]]
) -> None:
    """Never with fewer than `min_attempts` within the window, and never below both shares."""
    it = Told(spec)
    width = spec.window_s / 10
    attempts: list[tuple[int, bool, bool]] = []
    for failed, slow, pause in outcomes:
        it.clock.advance(pause)
        bucket = int(it.clock() / width)
        it.attempt(failed=failed, took_s=2.0 if slow else 0.5)
        attempts.append((bucket, failed, slow and spec.slow_s > 0))
        recent = [attempt for attempt in attempts if attempt[0] > bucket - 10]
        share = sum(attempt[1] for attempt in recent) / len(recent)
        slow_share = sum(attempt[2] for attempt in recent) / len(recent)
        is_bad = share >= spec.error_ratio or (spec.slow_s > 0 and slow_share >= spec.slow_ratio)
        told = failed or attempts[-1][2]  # a good attempt opens nothing
        assert (it.state() is State.OPEN) == (told and is_bad and len(recent) >= spec.min_attempts)
        if it.state() is State.OPEN:
            return


class Probing(RuleBasedStateMachine):
    """Attempts begin, end, are given up and overtake each other in any order; the promises hold all the time."""

    tickets = Bundle("tickets")

    @initialize(
        probes=st.integers(1, 3),
        min_attempts=st.integers(1, 5),
        error_ratio=st.sampled_from([0.2, 0.5, 1.0]),
        slow_s=st.sampled_from([0.0, 1.0]),
    )
    def begin(self, probes: int, min_attempts: int, error_ratio: float, slow_s: float) -> None:
        self.spec = BreakerSpec(
            probes=probes, min_attempts=min_attempts, error_ratio=error_ratio, slow_s=slow_s, cooldown_max_s=40.0
        )
        self.clock = FakeClock()
        self.changes: list[tuple[State, float]] = []
        self.breaker = Breaker(self.spec, lambda state, until: self.changes.append((state, until)))
        self.period: list[int] = []  # tickets of the half-open period that are out or succeeded
        self.asked_until = 0.0

    @rule(target=tickets)
    def allow(self) -> object:
        before = self.breaker.state_at(self.clock())
        may = self.breaker.may(self.clock())
        was = self.breaker.state
        ticket = self.breaker.allow(self.clock())
        assert bool(ticket) == may
        assert before is not State.CLOSED or ticket
        assert before is not State.OPEN or not ticket
        if was is State.OPEN and ticket:
            self.period = []
        if not ticket:
            return multiple()
        if self.breaker.state is State.HALF_OPEN:
            self.period.append(ticket)
            assert len(self.period) <= self.spec.probes
        return ticket

    @rule(
        ticket=consumes(tickets),
        failed=st.booleans(),
        took_s=st.sampled_from([0.1, 5.0]),
        retry_after_s=st.sampled_from([None, 0.0, 3.0, 30.0, 1000.0]),
    )
    def end(self, ticket: int, failed: bool, took_s: float, retry_after_s: float | None) -> None:
        was = self.breaker.state
        changes = len(self.changes)
        now = self.clock()
        self.breaker.record(ticket, now, failed=failed, took_s=took_s, retry_after_s=retry_after_s)
        if len(self.changes) > changes:
            assert self.breaker.state is not was
        if self.breaker.state is State.OPEN and was is not State.OPEN:
            open_s = self.breaker.open_until - now
            assert self.spec.cooldown_s <= open_s <= self.spec.cooldown_max_s
            asked_s = min(retry_after_s or 0.0, self.spec.cooldown_max_s)
            assert open_s >= asked_s - 1e-9

    @rule(ticket=consumes(tickets))
    def release(self, ticket: int) -> None:
        was = self.breaker.state
        self.breaker.release(ticket)
        assert self.breaker.state is was
        if was is State.HALF_OPEN and ticket in self.period:
            self.period.remove(ticket)

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 10.0, 50.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.breaker.state is State.OPEN)
    @rule()
    def wait_out(self) -> None:
        self.clock.now = max(self.clock.now, self.breaker.open_until)

    @rule(seconds=st.floats(-5, 100))
    def adopt(self, seconds: float) -> None:
        was = self.breaker.open_until if self.breaker.state is State.OPEN else 0.0
        self.breaker.adopt(self.clock() + seconds, self.clock())
        if self.breaker.state is State.OPEN:
            assert self.breaker.open_until >= was

    @invariant()
    def never_open_for_longer_than_the_maximum(self) -> None:
        if hasattr(self, "breaker") and self.breaker.state is State.OPEN:
            assert self.breaker.open_until <= self.clock() + self.spec.cooldown_max_s + 1e-9


TestProbing = Probing.TestCase
TestProbing.settings = settings(max_examples=examples(100), stateful_step_count=40)
