"""The heartbeat board: one row of shared memory a child, written by the child, read by all.

A row is two float64: the monotonic instant of the child's last beat, and a spare. The clock is the
machine's, so instants of different processes compare. An aligned float64 is stored and loaded whole on
every platform we run on, so there is no lock. Row 0 is control's, then one a worker, then runners.
Not for: metrics (observe/metrics/slots.py). Standard library only: the supervisor imports it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, Self

from llm_router.processes.plan import memory_file

CONTROL_ROW: Final = 0
_ROW_BYTES: Final = 16


def worker_row(index: int) -> int:
    """The row of worker `index`, which counts from 0."""
    return 1 + index


class Board:
    """A mapped board; `fd` is what children inherit. Rows read 0.0 until their first beat."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._values = memoryview(self._map).cast("d")

    @classmethod
    def create(cls, rows: int) -> Self:
        """A new board of `rows` > 0 rows."""
        fd = memory_file("llm-router-board")
        os.ftruncate(fd, rows * _ROW_BYTES)
        return cls(fd)

    @classmethod
    def attach(cls, fd: int) -> Self:
        """The board behind an inherited descriptor. Raises OSError or ValueError if it is none."""
        return cls(fd)

    @property
    def rows(self) -> int:
        return len(self._values) // 2

    def beat(self, row: int, now: float) -> None:
        """Write `now` (time.monotonic) into a row. Raises IndexError for a row that is not there."""
        self._values[2 * row] = now

    def read(self, row: int) -> float:
        """The instant of the row's last beat, 0.0 if there was none."""
        value: float = self._values[2 * row]
        return value

    def clear(self, row: int) -> None:
        """Forget the beats of a row's former child."""
        self._values[2 * row] = 0.0

    def close(self) -> None:
        self._values.release()
        self._map.close()
        os.close(self.fd)

    def __repr__(self) -> str:
        return f"Board({self._values.tolist()[::2]})" if self._values.nbytes else "Board(closed)"
