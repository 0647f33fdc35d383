"""How a check stands: its outcomes over time as a word that does not flutter.

The first outcome counts at once, as nothing was known before. After that, `fall` failures in a row make a healthy check
an unhealthy one, and `rise` successes in a row make it healthy again; between degraded and critical the newest failure
decides. Not for: running checks (scheduler.py) or what an outcome is (checks.py).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

from llm_router.observe.health.checks import Status

FLAP_WINDOW_S: Final = 3600.0
"""Changes within the last hour are what an operator asks about; older ones are in the metric."""

_MAX_FLAPS: Final = 1000


class Standing:
    """The word of one check. Not safe across threads.

    Args:
        fall, rise: at least 1.

    Attributes:
        failures, successes: in a row; one of them is 0.
        transitions: changes between healthy and not, since the first outcome.
    """

    def __init__(self, fall: int, rise: int) -> None:
        self.fall = fall
        self.rise = rise
        self.status: Status = "initializing"
        self.failures = 0
        self.successes = 0
        self.transitions = 0
        self._changed_at: deque[float] = deque(maxlen=_MAX_FLAPS)

    def take(self, status: Status, now: float) -> bool:
        """One more outcome, at monotonic `now`; `initializing` says that there is none yet, and changes nothing.

        Returns: whether the check has turned from healthy to not, or back.
        """
        if status == "initializing":
            return False
        is_success = status == "healthy"
        self.successes = self.successes + 1 if is_success else 0
        self.failures = 0 if is_success else self.failures + 1
        was, is_first = self.status == "healthy", self.status == "initializing"
        if is_first:
            self.status = status
            return False
        if was and self.failures >= self.fall:
            self.status = status
        elif not was and self.successes >= self.rise:
            self.status = "healthy"
        elif not was and not is_success:
            self.status = status
        has_turned = was != (self.status == "healthy")
        if has_turned:
            self.transitions += 1
            self._changed_at.append(now)
        return has_turned

    def flaps(self, now: float) -> int:
        """Changes within the last `FLAP_WINDOW_S`."""
        while self._changed_at and now - self._changed_at[0] > FLAP_WINDOW_S:
            self._changed_at.popleft()
        return len(self._changed_at)

    def __repr__(self) -> str:
        return f"<Standing {self.status} failures={self.failures} transitions={self.transitions}>"


def told(log: logging.Logger, name: str, status: Status, message: str) -> None:
    """One line for a check that has turned."""
    if status == "healthy":
        log.info("health: %s is healthy again: %s", name, message)
    else:
        log.warning("health: %s is %s: %s", name, status, message)
