"""What every worker says of its circuits, in control: the worst state of each backend, and openings for the others.

Not for: opening circuits (routing/breaker.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llm_router.processes.snapshot import CircuitSeen

CLOSED, HALF_OPEN, OPEN = 0, 1, 2


class Circuits:
    """State by worker connection and backend.

    Args:
        clock: monotonic seconds, the machine's own, as workers use it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, str], CircuitSeen] = {}

    def saw(self, worker: str, fact: CircuitSeen) -> None:
        """A worker's circuit changed."""
        if fact.state == CLOSED:
            self._seen.pop((worker, fact.name), None)
        else:
            self._seen[worker, fact.name] = fact

    def left(self, worker: str) -> bool:
        """The connection to a worker is gone, and what it saw with it. Returns: whether it had seen anything."""
        gone = [key for key in self._seen if key[0] == worker]
        for key in gone:
            del self._seen[key]
        return bool(gone)

    def open_until(self) -> dict[str, float]:
        """Backend to the latest moment until which a worker leaves it alone; those that are over are not in it."""
        now, found = self._clock(), dict[str, float]()
        for fact in self._seen.values():
            if fact.state == OPEN and fact.until > now:
                found[fact.name] = max(found.get(fact.name, 0.0), fact.until)
        return found

    def states(self, backends: Iterable[str]) -> dict[str, int]:
        """The worst state of each backend now: an open circuit that may be probed again counts as half-open."""
        now = self._clock()
        found = dict.fromkeys(backends, CLOSED)
        for fact in self._seen.values():
            if fact.name in found:
                state = HALF_OPEN if fact.state == OPEN and fact.until <= now else fact.state
                found[fact.name] = max(found[fact.name], state)
        return found
