"""What probes that cost money may cost in a day, and what they did cost. Survives restarts.

The amount is written to a file before a probe is sent, so that a crash cannot make the router forget it. Days are UTC's.
Spending is spread: at noon half of the day's amount may be gone, so that the last models of a day are probed too.
A file that cannot be read or written spends nothing. Not for: what requests cost (accounts).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

_log = logging.getLogger("llm_router.control")

_DAY_S: Final = 86_400


class Taken(NamedTuple):
    """Money that was taken for a probe. `day` counts from 1970-01-01, UTC."""

    usd: float
    day: int


class _Spent(msgspec.Struct):
    """`day` counts from 1970-01-01, UTC."""

    day: int
    usd: float


_decode = msgspec.json.Decoder(_Spent).decode
_encode = msgspec.json.Encoder().encode


class Purse:
    """Money for probes. Of one process and one thread; the file is small and local.

    Args:
        path: the file; made when first needed.
        daily_usd: what may be spent in a day; 0 for nothing.
        wall: Unix seconds.
    """

    def __init__(self, path: str, daily_usd: float, *, wall: Callable[[], float] = time.time) -> None:
        self.daily_usd = daily_usd
        self.problem = ""
        """Why nothing can be spent, if that is not for lack of money."""
        self._path = path
        self._wall = wall
        self._spent: _Spent | None = None

    def __repr__(self) -> str:
        return f"<Purse {self.spent_usd():.6f} of {self.daily_usd:g} USD>"

    def spent_usd(self) -> float:
        """What was spent today, reservations included."""
        return self._today().usd

    def why_not(self, usd: float) -> str:
        """Why `usd` cannot be spent now; empty if it can. 0 always can."""
        if usd <= 0:
            return ""
        if self.daily_usd <= 0:
            return "it costs money, and health.paid_probe_daily_usd is 0"
        spent = self._today()
        if self.problem:
            return self.problem
        if spent.usd + usd > self.daily_usd:
            return f"it may cost {usd:.6f} USD, and {spent.usd:.6f} of the day's {self.daily_usd:g} are spent"
        if spent.usd > self.daily_usd * self._share_of_day(spent.day):
            return "the money for probes is spread over the day"
        return ""

    def take(self, usd: float) -> Taken | None:
        """Spend `usd`, if `why_not` has no objection and it could be written down; None if not."""
        if self.why_not(usd):
            return None
        spent = self._today()
        return Taken(max(0.0, usd), spent.day) if usd <= 0 or self._write(spent.usd + usd) else None

    def put_back(self, taken: Taken, cost_usd: float) -> None:
        """It did cost `cost_usd`: the rest of what was taken is free again, unless that day is over.

        More than was taken is spent all the same. What cannot be written down stays as it was.
        """
        spent = self._today()
        if spent.day == taken.day and cost_usd != taken.usd and not self.problem:
            self._write(max(0.0, spent.usd - taken.usd + max(0.0, cost_usd)))

    def _share_of_day(self, day: int) -> float:
        return min(1.0, max(0.0, self._wall() / _DAY_S - day))

    def _today(self) -> _Spent:
        """The amount of today. A clock that was put back does not make a new day."""
        if self._spent is None:
            self._spent = self._read()
        day = int(self._wall() // _DAY_S)
        if day > self._spent.day:
            self._spent = _Spent(day, 0.0)
            self.problem = ""
        return self._spent

    def _read(self) -> _Spent:
        day = int(self._wall() // _DAY_S)
        try:
            with open(self._path, "rb") as file:
                spent = _decode(file.read(1000))
            if not 0.0 <= spent.usd < float("inf"):
                raise ValueError("no amount of money")
        except FileNotFoundError:
            return _Spent(day, 0.0)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            self.problem = f"what probes cost today cannot be read from {self._path}; no money is spent until tomorrow"
            _log.warning("%s (%s); remove the file and restart to spend some today", self.problem, type(error).__name__)
            return _Spent(day, self.daily_usd)
        return spent

    def _write(self, usd: float) -> bool:
        """Remember the amount on the disk first, then here. Returns: whether it is there."""
        new = _Spent(self._today().day, usd)
        temporary = f"{self._path}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(
                    fd, _encode(new)
                )  # no fsync: it outlives this process, and control's loop must not wait for a disk
            finally:
                os.close(fd)
            os.replace(temporary, self._path)
        except OSError as error:
            _log.warning("what probes cost cannot be written to %s: %s", self._path, error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            return False
        self._spent = new
        return True
