"""The checks `logs` and `traces`: what was to be written or sent on and was lost.

The router serves on when its disk is full or its collector is away; whoever relies on the lines should know.
Not for: writing or sending (observe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from llm_router.observe.health.checks import Check, failed, passed


class Losses(NamedTuple):
    """What was lost since the beginning, in all processes.

    Args:
        dropped: by reason; they only grow, and begin again at 0 where a process does.
        problem: what is wrong now, in a sentence without secrets; empty if nothing is.
        waiting: what is to be written or sent.
    """

    dropped: Mapping[str, float]
    problem: str = ""
    waiting: int = 0


class LossCheck:
    """Unhappy while something is wrong, and once for what was lost since it was last asked.

    Args:
        what: `log lines` or the like, for people.
        read: the state of now; cheap.
    """

    def __init__(self, what: str, read: Callable[[], Losses]) -> None:
        self._what = what
        self._read = read
        self._before: Mapping[str, float] = {}

    async def check(self) -> Check:
        """Degraded at most: requests are served all the same. `value` is how many were lost since the last time."""
        losses = self._read()
        before, self._before = self._before, dict(losses.dropped)
        lost = {
            reason: int(count - before.get(reason, 0.0) if count >= before.get(reason, 0.0) else count)
            for reason, count in losses.dropped.items()
        }
        lost = {reason: count for reason, count in lost.items() if count}
        total = sum(lost.values())
        details = {"waiting": losses.waiting, "lost": lost, "lost_since_start": int(sum(losses.dropped.values()))}
        if not losses.problem and not total:
            return passed(f"No {self._what} are lost", value=0.0, threshold=1.0, details=details, unit=self._what)
        by = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        said = [losses.problem] if losses.problem else []
        if total:
            said.append(f"{total} {self._what} were lost since the last check ({by})")
        return failed("; ".join(said), status="degraded", value=float(total), details=details, unit=self._what)
