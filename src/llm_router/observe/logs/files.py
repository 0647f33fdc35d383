"""One log file as one process sees it: whole lines are appended, and a file that was rotated away is left.

Every write is one `os.write` on a descriptor with O_APPEND, so lines of several processes do not mix. Before each the
inode behind the path is compared: whoever rotates needs to tell nobody. Not for: rotating (rotate.py), or threads and
queues (writer.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

RETRY_S: Final = 1.0
"""How long a file that could not be written is left alone."""

_KEPT_BYTES: Final = 1024 * 1024
"""Of lines that must not be lost, how much waits for a file that cannot be written."""

_LOOKS: Final = 3

FOLDER_MODE: Final = 0o750
FILE_MODE: Final = 0o640
"""Readable for the group: that is how log shippers come to read without being root."""


class LogFile:
    """Appends to `path`. Safe across threads.

    Args:
        keeps: whether lines that cannot be written now are kept, up to 1 MiB, and written when they can be: for the
            few that must not be lost. Of others one is kept, the rest is lost and counted at once.
        on_lost: called with a number of lines, outside of any lock.
        on_change: called with the problem when the file can no longer be written, and with nothing when it can again,
            outside of any lock.
    """

    def __init__(
        self,
        path: str,
        *,
        clock: Callable[[], float],
        on_lost: Callable[[int], None],
        on_change: Callable[[str], None],
        keeps: bool = False,
    ) -> None:
        self.path = path
        self.problem = ""
        """Why it cannot be written; empty if it can."""
        self.written = 0
        """Lines."""
        self._clock = clock
        self._on_lost = on_lost
        self._on_change = on_change
        self._keeps = keeps
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._fd = -1
        self._inode = (0, 0)
        self._is_torn = False
        self._retry_at = -math.inf
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"LogFile({self.path!r}, {self.problem or 'written'})"

    @property
    def kept(self) -> int:
        """Lines that wait for the file to be writable again."""
        return len(self._kept)

    def write(self, lines: list[bytes]) -> None:
        """Append whole lines, each with its end. Raises nothing: what could not be written is kept or lost."""
        with self._lock:
            before = self.problem
            lost = self._write(lines)
            problem = self.problem
        if lost:
            self._on_lost(lost)
        if bool(before) != bool(problem):
            self._on_change(problem)

    def probe(self) -> None:
        """Find out whether the file can be opened: makes it, and its folder."""
        with self._lock:
            before = self.problem
            try:
                self._open()
            except OSError as error:
                self._failed(error)
            else:
                if not self._kept:  # with a line that waits, only writing it tells
                    self.problem = ""
            problem = self.problem
        if bool(before) != bool(problem):
            self._on_change(problem)

    def retry(self, *, now: bool = False) -> None:
        """Find out whether a file that had a problem still has it, if its time has come, or `now`."""
        if now:
            self._retry_at = -math.inf
        if self._kept:
            self.write([])
        elif self.problem and self._clock() >= self._retry_at:
            self.probe()

    def close(self) -> None:
        """Let go of the descriptor; a later write opens the file again."""
        with self._lock:
            self._close()

    # -- under the lock --------------------------------------------------------------------------------

    def _write(self, lines: list[bytes]) -> int:
        """Lines that were lost."""
        if self.problem and self._clock() < self._retry_at:
            return self._keep(lines)
        if self._kept:
            lines = [*self._kept, *lines]
            self._kept.clear()
            self._kept_bytes = 0
        if not lines:
            return 0
        data = b"".join(lines)
        done = 0
        try:
            self._open()
            if self._is_torn:  # end the half line, so that only that one is broken
                data = b"\n" + data
                done = -1
            written = os.write(self._fd, data)
            done += written
            if written < len(data):  # a full disk takes what fits; the next try says why
                self._is_torn = data[written - 1 : written] != b"\n"
                more = os.write(self._fd, data[written:])
                done += more
                written += more
            self._is_torn = data[written - 1 : written] != b"\n"
            if written < len(data):
                raise OSError("only a part of the lines could be written")
        except OSError as error:
            self._failed(error)
            left = _rest(lines, max(0, done))
            self.written += len(lines) - len(left)
            return self._keep(left)
        self.written += len(lines)
        self.problem = ""
        return 0

    def _failed(self, error: OSError) -> None:
        self.problem = error.strerror or str(error)
        self._retry_at = self._clock() + RETRY_S
        self._close()

    def _keep(self, lines: list[bytes]) -> int:
        """Lines that were not kept. One is kept at any rate: writing it will tell when the file is well again."""
        lost = 0
        for line in lines:
            if self._kept and (not self._keeps or self._kept_bytes + len(line) > _KEPT_BYTES):
                lost += 1
                continue
            self._kept.append(line)
            self._kept_bytes += len(line)
        return lost

    def _open(self) -> None:
        """Have the descriptor of the file that lies at `path` now. Raises OSError."""
        if self._fd >= 0:
            try:
                found = os.stat(self.path)
            except FileNotFoundError:
                found = None
            if found is not None and (found.st_dev, found.st_ino) == self._inode:
                return
            self._close()
        # A pipe without a reader fails instead of waiting for one; files know no waiting.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._fd = os.open(self.path, flags, FILE_MODE)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path) or ".", FOLDER_MODE, exist_ok=True)
            self._fd = os.open(self.path, flags, FILE_MODE)
        status = os.fstat(self._fd)
        self._inode = (status.st_dev, status.st_ino)
        has_lines = stat.S_ISREG(status.st_mode) and status.st_size > 0
        self._is_torn = has_lines and not _ends_with_a_line(self.path)

    def _close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _ends_with_a_line(path: str) -> bool:
    """Whether whoever wrote before, possibly killed or out of space, finished its last line.

    The size of a file grows page by page while somebody else's write is under way: then it says no though the line will
    be whole, and an empty line comes between, which readers skip. Looking again makes that rare.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            for _ in range(_LOOKS):
                size = os.fstat(file.fileno()).st_size
                if not size:
                    return True
                file.seek(size - 1)
                if file.read(1) == b"\n":
                    return True
                if os.fstat(file.fileno()).st_size == size:
                    return False
    except OSError:
        pass  # written and never read by us: nothing can be known
    return True


def _rest(lines: list[bytes], done: int) -> list[bytes]:
    """The lines that are not wholly among the first `done` bytes."""
    for index, line in enumerate(lines):
        done -= len(line)
        if done < 0:
            return lines[index:]
    return []
