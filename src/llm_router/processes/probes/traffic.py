"""What requests have shown of each backend, read off the counters that workers keep anyway.

Not for: probing, or deciding what it means (inference.py, endpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from llm_router import families
from llm_router.errors import FaultDomain
from llm_router.observe.metrics.slots import Collected

_BACKENDS_FAULTS: Final = frozenset((FaultDomain.PROVIDER.value, FaultDomain.NETWORK.value))
"""Outcomes that say something against a backend; a caller's mistake, or its leaving, does not."""


MOST_FAILURES: Final = 0.5
"""A backend that fails more than this share of its attempts is failing: where circuits open, too (`routing.breaker`)."""


class Traffic(NamedTuple):
    """Attempts at one backend since the workers began, and requests that it is working on now."""

    successes: float = 0.0
    failures: float = 0.0
    in_flight: float = 0.0

    @property
    def attempts(self) -> float:
        """Those that have ended and say something about the backend."""
        return self.successes + self.failures

    @property
    def is_failing(self) -> bool:
        return self.failures > self.attempts * MOST_FAILURES

    @property
    def words(self) -> str:
        """What it shows, for people: of traffic since the last look, with attempts in it."""
        if self.is_failing:
            return f"{self.failures:.0f} of {self.attempts:.0f} attempts failed since the last check"
        return f"{self.successes:.0f} requests answered since the last check"

    def since(self, before: Traffic) -> Traffic:
        """What came after `before`; counters that are lower than before began again."""
        if self.successes < before.successes or self.failures < before.failures:
            return self
        return Traffic(self.successes - before.successes, self.failures - before.failures, self.in_flight)


NO_TRAFFIC: Final = Traffic()

FAMILIES: Final = (families.ATTEMPTS, families.UPSTREAM_IN_FLIGHT)
"""What `traffic_in` reads: a reader of these alone is much faster than one of all."""


def traffic_in(collected: Collected) -> dict[str, Traffic]:
    """Traffic by backend. A backend beyond the bound of label values has none, and so counts as quiet."""
    found: dict[str, Traffic] = {}
    for row in collected.rows(families.ATTEMPTS):
        backend, outcome = row.labels
        so_far = found.get(backend, NO_TRAFFIC)
        if outcome == "success":
            found[backend] = so_far._replace(successes=so_far.successes + row.values[0])
        elif outcome in _BACKENDS_FAULTS:
            found[backend] = so_far._replace(failures=so_far.failures + row.values[0])
    for row in collected.rows(families.UPSTREAM_IN_FLIGHT):
        backend = row.labels[0]
        found[backend] = found.get(backend, NO_TRAFFIC)._replace(in_flight=row.values[0])
    return found


class Since:
    """Traffic since the last look, for one who looks now and then.

    Args:
        read: traffic since the workers began, by backend.
    """

    def __init__(self, read: Callable[[], Mapping[str, Traffic]]) -> None:
        self._read = read
        self._before: Mapping[str, Traffic] | None = None

    def look(self) -> dict[str, Traffic]:
        """By backend. At the first look only what is in flight is known: the rest may be hours old."""
        now = dict(self._read())
        before, self._before = self._before, now
        if before is None:
            return {name: Traffic(in_flight=traffic.in_flight) for name, traffic in now.items()}
        return {name: traffic.since(before.get(name, NO_TRAFFIC)) for name, traffic in now.items()}
