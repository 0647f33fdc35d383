"""Backoff and the judgement about hung children, on a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.processes.restart import Backoff, Punctuality


def test_the_first_death_costs_nothing_and_the_next_ones_double() -> None:
    """A worker is back at once; one that keeps dying waits longer each time, up to the ceiling."""
    backoff = Backoff(first_s=0.0, base_s=0.1, ceiling_s=5.0, healthy_s=10.0)
    waits = [backoff.after_death(lived_s=1.0) for _ in range(9)]
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_a_healthy_life_forgets_former_deaths() -> None:
    """After `healthy_s` of life a death is a first death again."""
    backoff = Backoff(first_s=0.2, base_s=0.4, ceiling_s=10.0, healthy_s=60.0)
    assert [backoff.after_death(1.0) for _ in range(3)] == [0.2, 0.4, 0.8]
    assert backoff.after_death(60.0) == 0.2
    assert backoff.after_death(59.9) == 0.4


@given(st.lists(st.floats(0, 100), max_size=200))
def test_no_wait_is_beyond_the_ceiling_or_below_the_first(lives: list[float]) -> None:
    """Whatever happens, the wait stays within its bounds."""
    backoff = Backoff(first_s=0.0, base_s=0.1, ceiling_s=5.0, healthy_s=10.0)
    assert all(0.0 <= backoff.after_death(lived_s) <= 5.0 for lived_s in lives)


def ticked(*instants: float) -> Punctuality:
    punctuality = Punctuality(late_s=1.0)
    for now in instants:
        punctuality.tick(now)
    return punctuality


def test_a_silent_child_hangs_while_ticks_are_on_time() -> None:
    """Five seconds of silence in a machine that turns are a hung child."""
    punctuality = ticked(*(100 + 0.25 * tick for tick in range(30)))
    assert not punctuality.is_hung(seen_at=102.0, now=107.0, hang_s=5.0)
    assert punctuality.is_hung(seen_at=102.0, now=107.1, hang_s=5.0)


def test_a_machine_that_stood_still_hangs_nobody() -> None:
    """After a late tick every child has its full time again, and only then hangs."""
    punctuality = ticked(100.0, 100.25, 5000.0)
    assert not punctuality.is_hung(seen_at=100.2, now=5000.0, hang_s=5.0)
    for tick in range(21):
        punctuality.tick(5000.0 + 0.25 * tick)
    assert not punctuality.is_hung(seen_at=100.2, now=5005.0, hang_s=5.0)
    assert punctuality.is_hung(seen_at=100.2, now=5005.1, hang_s=5.0)


def test_nobody_hangs_at_the_first_tick() -> None:
    """A supervisor that has just begun knows nothing about the past."""
    assert not ticked(100.0).is_hung(seen_at=0.0, now=100.0, hang_s=5.0)
