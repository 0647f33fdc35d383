"""Rotation: a log file that is too large or too old gets a name with its time, is compressed, and deleted in the end.

`application.log` becomes `application-20260131T120000Z.log` and some seconds later `...log.gz`; a second one of the same
second is `application-20260131T120000Z.1.log`. One process rotates; the others notice a new inode (files.py). Everything
is decided from what lies in the folder, so a process that was killed half way is continued by the next one.
Not for: writing lines.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import gzip
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from llm_router.observe.logs.schema import FILES
from llm_router.observe.logs.settings import LogSettings

SETTLE_S: Final = 10.0
"""Before a rotated file is compressed. Who has it open still looks at its path before each write, but may have been
stopped between the look and the write."""

_ROTATED: Final = re.compile(
    rf"(?P<file>{'|'.join(FILES)})-(?P<stamp>[0-9]{{8}}T[0-9]{{6}}Z)(?:\.(?P<number>[0-9]+))?\.log(?P<gz>\.gz)?"
)
_UNFINISHED: Final = ".part"
_GZIP_LEVEL: Final = 1
"""Every line is compressed once: level 6 takes three microseconds more for the lines of a request, for a sixth of their
compressed size."""

_CHUNK_BYTES: Final = 256 * 1024
_FIRST_LINE_BYTES: Final = 4096
_NICENESS: Final = 19


class Rotated(NamedTuple):
    """A rotated file. Sorts by file, then time."""

    file: str
    stamp: str
    number: int
    path: str
    is_compressed: bool

    @property
    def rotated_time(self) -> float:
        """Unix seconds."""
        return dt.datetime.strptime(f"{self.stamp[:-1]}+0000", "%Y%m%dT%H%M%S%z").timestamp()


def rotated_files(folder: str) -> list[Rotated]:
    """Every rotated file of a folder, by file and from the oldest to the newest. Raises OSError."""
    found = []
    for name in os.listdir(folder):
        match = _ROTATED.fullmatch(name)
        if match is not None:
            path = os.path.join(folder, name)
            found.append(Rotated(match["file"], match["stamp"], int(match["number"] or 0), path, bool(match["gz"])))
    return sorted(found)


class Rotation:
    """Keeps one folder in order. Only one process may do this. `sweep` blocks: call it in a thread, not in several.

    Args:
        wall: Unix seconds.
        on_problem: called with what could not be done, in words, when it is another than before.
    """

    def __init__(
        self, folder: str, settings: LogSettings, *, wall: Callable[[], float], on_problem: Callable[[str], None]
    ) -> None:
        self.settings = settings
        """May be replaced at any time; the next sweep heeds it."""
        self.problem = ""
        """What could not be done, empty if all was."""
        self.cpu_s = 0.0
        """CPU seconds that compressing took."""
        self._folder = folder
        self._wall = wall
        self._on_problem = on_problem
        self._compressing: threading.Thread | None = None
        self._uncompressed = ""
        self._ends = False
        self._is_new = True

    def sweep(self) -> None:
        """Rotate what is due, delete what is past keeping, and have the rest compressed in a thread of its own."""
        now = self._wall()
        # Each for itself: a file that cannot be touched must not let the others grow.
        steps: list[Callable[[], None]] = [functools.partial(self._rotate, file, now) for file in FILES]
        steps.append(functools.partial(self._delete, now))
        if self._is_new:
            self._is_new = False
            steps.insert(0, self._clear_up)
        if self.settings.compress:
            steps.append(functools.partial(self._compress, now))
        problem = self._uncompressed
        for step in steps:
            try:
                step()
            except (FileNotFoundError, NotADirectoryError):
                # No folder: nothing was written yet, or whoever writes says so. Or somebody deletes beside us, and the
                # next sweep goes on.
                continue
            except OSError as error:
                problem = f"{error.filename or self._folder}: {error.strerror or error}"
        if problem and problem != self.problem:
            self._on_problem(problem)
        self.problem = problem

    def close(self, timeout_s: float) -> None:
        """Give up compressing; the next start goes on with it."""
        self._ends = True
        if self._compressing is not None:
            self._compressing.join(timeout_s)

    # -- one sweep -------------------------------------------------------------------------------------

    def _clear_up(self) -> None:
        """What a process left that was killed while it compressed: halves, and sources that were done with."""
        for name in os.listdir(self._folder):
            if name.endswith(f".gz{_UNFINISHED}"):
                os.unlink(os.path.join(self._folder, name))
        rotated = {found.path for found in rotated_files(self._folder)}
        for path in rotated:
            if f"{path}.gz" in rotated:  # whole, or it would not have that name
                os.unlink(path)

    def _rotate(self, file: str, now: float) -> None:
        path = os.path.join(self._folder, f"{file}.log")
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return  # a link to /dev/stdout, say, is somebody's arrangement
        if status.st_size <= self.settings.max_file_bytes:
            begun = _first_time(path)
            if now - (status.st_mtime if begun is None else begun) <= self.settings.max_age_s:
                return
        os.rename(path, self._free_name(file, now))

    def _free_name(self, file: str, now: float) -> str:
        stem = os.path.join(self._folder, f"{file}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}")
        number = 0
        while True:
            path = f"{stem}.{number}.log" if number else f"{stem}.log"
            if not os.path.lexists(path) and not os.path.lexists(f"{path}.gz"):
                return path
            number += 1

    def _delete(self, now: float) -> None:
        """By age, then the oldest until the rest fits; audit.log last, or a flood of requests could wash it away."""
        left: list[tuple[Rotated, int]] = []
        for found in rotated_files(self._folder):
            if now - found.rotated_time > self.settings.keep_s:
                os.unlink(found.path)
            else:
                left.append((found, os.stat(found.path).st_size))
        total = sum(size for _, size in left)
        for found, size in sorted(left, key=lambda item: (item[0].file == "audit", item[0].stamp, item[0].number)):
            if total <= self.settings.keep_bytes:
                return
            os.unlink(found.path)
            total -= size

    def _compress(self, now: float) -> None:
        if self._compressing is not None and self._compressing.is_alive():
            return
        due = [
            found.path
            for found in rotated_files(self._folder)
            if not found.is_compressed and now - found.rotated_time >= SETTLE_S
        ]
        if not due:
            self._uncompressed = ""  # what could not be compressed is gone
        elif not self._ends:
            self._compressing = threading.Thread(
                target=self._compress_all, args=(due,), name="log-compress", daemon=True
            )
            self._compressing.start()

    # -- the compressing thread ------------------------------------------------------------------------

    def _compress_all(self, paths: list[str]) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        before = self.cpu_s
        for path in paths:
            try:
                self._compress_one(path)
            except FileNotFoundError:
                pass  # deleted meanwhile: it was past keeping
            except OSError as error:
                self._uncompressed = f"{path} cannot be compressed: {error.strerror or error}"
                return
            self.cpu_s = before + time.thread_time()
        self._uncompressed = ""

    def _compress_one(self, path: str) -> None:
        """Into a file beside it that gets its name only when it is whole and on the disk."""
        target = f"{path}.gz"
        part = f"{target}{_UNFINISHED}"
        try:
            with open(path, "rb") as source, open(part, "wb") as raw:
                os.fchmod(raw.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode))
                with gzip.GzipFile(os.path.basename(path), "wb", _GZIP_LEVEL, raw) as packed:
                    while chunk := source.read(_CHUNK_BYTES):
                        if self._ends:
                            raise InterruptedError
                        packed.write(chunk)
                raw.flush()
                os.fsync(raw.fileno())
            shutil.copystat(path, part)
            os.rename(part, target)
            os.unlink(path)
        except InterruptedError:
            os.unlink(part)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise


def _first_time(path: str) -> float | None:
    """Unix seconds of the first line that tells: since when the file is written, over restarts and copies."""
    try:
        with open(path, "rb") as file:
            start = file.read(_FIRST_LINE_BYTES)
    except OSError:
        return None
    match = _TIMESTAMP.search(start)
    if match is None:
        return None
    try:
        return msgspec.convert(match[1].decode(), dt.datetime).timestamp()
    except msgspec.ValidationError:
        return None


_TIMESTAMP: Final = re.compile(rb'"@timestamp":\s?"([^"]{20,40})"')
