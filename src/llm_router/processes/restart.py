"""When a child is started again, and when it counts as hung: pure state, every clock reading an argument.

Not for: starting, killing or counting (supervisor.py). Standard library only.
"""

from __future__ import annotations


class Backoff:
    """How long to wait before a child is started again: longer each time it dies young.

    Args:
        first_s: the wait after the first death, and after any death at `healthy_s` or older.
        base_s: the wait after the second; it doubles from there.
        ceiling_s: the longest wait.
        healthy_s: seconds of life after which former deaths are forgotten.
    """

    def __init__(self, first_s: float, base_s: float, ceiling_s: float, healthy_s: float) -> None:
        self._first_s = first_s
        self._base_s = base_s
        self._ceiling_s = ceiling_s
        self._healthy_s = healthy_s
        self._young_deaths = 0

    def after_death(self, lived_s: float) -> float:
        """Seconds to wait, now that the child died at the age of `lived_s`."""
        if lived_s >= self._healthy_s:
            self._young_deaths = 0
        deaths = self._young_deaths
        self._young_deaths += 1
        if deaths == 0:
            return self._first_s
        # 2**30 s is beyond any ceiling; the bound keeps the power small however often a child dies.
        return float(min(self._ceiling_s, self._base_s * 2 ** min(deaths - 1, 30)))

    def __repr__(self) -> str:
        return f"Backoff(young_deaths={self._young_deaths})"


class Punctuality:
    """Tells a hung child from a machine that stood still: stale heartbeats count only while we ourselves turned.

    After a suspended machine, a stopped container or a starved supervisor every heartbeat is stale at
    once; so a tick that comes late gives all children their full time again.
    """

    def __init__(self, late_s: float) -> None:
        self._late_s = late_s
        self._ticked_at: float | None = None
        self._trusted_from = 0.0

    def tick(self, now: float) -> None:
        """To be called regularly, more often than every `late_s` seconds."""
        if self._ticked_at is None or now - self._ticked_at > self._late_s:
            self._trusted_from = now
        self._ticked_at = now

    def is_hung(self, seen_at: float, now: float, hang_s: float) -> bool:
        """Whether a child whose last sign of life was at `seen_at` has been silent for more than `hang_s`."""
        return now - max(seen_at, self._trusted_from) > hang_s
