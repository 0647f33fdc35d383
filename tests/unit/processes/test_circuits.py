"""What control makes of circuits that several workers see."""

from __future__ import annotations

from llm_router.processes.circuits import CLOSED, HALF_OPEN, OPEN, Circuits
from llm_router.processes.snapshot import CircuitSeen
from llm_router.testing import FakeClock


def test_the_worst_that_any_worker_sees_is_shown() -> None:
    clock = FakeClock(100.0)
    circuits = Circuits(clock)
    assert circuits.states(["a", "b"]) == {"a": CLOSED, "b": CLOSED}
    circuits.saw("w0", CircuitSeen("a", HALF_OPEN))
    circuits.saw("w1", CircuitSeen("a", OPEN, 105.0))
    circuits.saw("w1", CircuitSeen("left the table", OPEN, 105.0))
    assert circuits.states(["a", "b"]) == {"a": OPEN, "b": CLOSED}
    circuits.saw("w1", CircuitSeen("a", CLOSED))
    assert circuits.states(["a"]) == {"a": HALF_OPEN}
    circuits.saw("w0", CircuitSeen("a", CLOSED))
    assert circuits.states(["a"]) == {"a": CLOSED}


def test_an_opening_is_for_the_others_until_it_is_over() -> None:
    """Then whoever asks may probe, which is what half-open means."""
    clock = FakeClock(100.0)
    circuits = Circuits(clock)
    circuits.saw("w0", CircuitSeen("a", OPEN, 103.0))
    circuits.saw("w1", CircuitSeen("a", OPEN, 105.0))
    circuits.saw("w1", CircuitSeen("b", HALF_OPEN))
    assert circuits.open_until() == {"a": 105.0}
    clock.advance(5.0)
    assert circuits.open_until() == {}
    assert circuits.states(["a"]) == {"a": HALF_OPEN}


def test_what_a_worker_saw_leaves_with_it() -> None:
    circuits = Circuits(FakeClock(100.0))
    circuits.saw("w0", CircuitSeen("a", OPEN, 105.0))
    assert circuits.left("w0")
    assert not circuits.left("w0")
    assert circuits.open_until() == {}
    assert circuits.states(["a"]) == {"a": CLOSED}
