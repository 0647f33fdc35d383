"""The lines of log files: of those that are written now and of those that were rotated away, in order of time.

The newest lines are read from the end, so that they are there at once however much there is; all of them are read from
the beginning and held one at a time. Each process writes on its own, so lines of one file are only nearly in order.
Whatever happens to a file meanwhile (rotated, compressed, deleted, cut off) is no reason to fail. Not for: choosing by
what lines say (where.py) or showing them (lines.py).
"""

from __future__ import annotations

import contextlib
import gzip
import heapq
import os
import re
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from llm_router.observe.logs.schema import FILES, FileName
from llm_router.observe.timestamp import timestamp

NAMES: Final[tuple[FileName, ...]] = tuple(FILES)

MAX_LINE_BYTES: Final = 2 * 1024 * 1024
"""Of what has no line end for longer, each such piece is a line: nothing that we wrote."""

_BLOCK_BYTES: Final = 256 * 1024
_HELD_LINES: Final = 1000
"""Lines that are held back so that those of other processes, which wrote them a little later, come in their place."""

_DISORDER_S: Final = 60.0
"""A line is never older than the one before it by more: lines wait for a second or two before they are written."""

_SEEN_ERRORS: Final = 4096
_FADING_POLLS: Final = 50
"""How often a file that was rotated away is still looked at: writers notice a little later."""

_TIME_KEY: Final = b'{"@timestamp":"'
_TIME_END: Final = len(_TIME_KEY) + len("2026-01-31T12:00:00.000Z")
_END_OF_TIME: Final = "9999"


class Line(NamedTuple):
    """One line without its end. `time` is its timestamp, of a broken one that of a line beside it; `entry` is None for a
    broken one, and for one that was not chosen."""

    time: str
    file: FileName
    raw: bytes
    entry: dict[str, Any] | None


Choose = Callable[[Line], Line | None]
"""Gives a line with its entry, or None for one that is not wanted. The entry is not there yet; `decoded` reads it."""


def decoded(raw: bytes) -> dict[str, Any] | None:
    """What a line says, None for one that is broken."""
    try:
        entry = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


class LogFolder:
    """The log files in a folder.

    Args:
        names: which, by what they are called without `.log`.

    `problems` has a sentence for each file that could not be read, or not to its end.
    """

    def __init__(self, folder: Path, names: Sequence[FileName]) -> None:
        self._folder = folder
        self._names = names
        self._twins = _Twins() if {"application", "error"} <= set(names) else None
        self.problems: list[str] = []

    def newest(self, count: int, choose: Choose, since_s: float = 0.0, *, before: Follower | None = None) -> list[Line]:
        """The newest `count` (> 0) lines that are wanted, the oldest first.

        Args:
            since_s: Unix seconds; what is older is not read.
            before: read up to where this follower begins.
        """
        streams = [self._backward(name, choose, since_s, before) for name in self._names]
        found: list[Line] = []
        for line in heapq.merge(*streams, key=lambda line: line.time, reverse=True):
            if not self._is_twin(line):
                found.append(line)
                if len(found) == count:
                    break
        found.reverse()
        return sorted(found, key=lambda line: line.time)

    def all(self, choose: Choose, since_s: float = 0.0, *, before: Follower | None = None) -> Iterator[Line]:
        """Every line that is wanted, the oldest first; the same arguments."""
        streams = [self._forward(name, choose, since_s, before) for name in self._names]
        merged = heapq.merge(*streams, key=lambda line: line.time)
        return _in_order(line for line in merged if not self._is_twin(line))

    def follow(self) -> Follower:
        """What is written from now on."""
        return Follower(self._folder, self._names, self.problems, self._is_twin)

    def is_empty(self) -> bool:
        """Whether there is not one file."""
        return not any(self._rotated(name) or (self._folder / f"{name}.log").exists() for name in self._names)

    # -- reading one name -----------------------------------------------------------------------------

    def _current(self, name: FileName, before: Follower | None) -> tuple[IO[bytes], int] | None:
        """The file that is written now, and where to end in it. None if there is none."""
        if before is not None:
            return before.beginning(name)
        try:
            file = (self._folder / f"{name}.log").open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(f"{name}.log", error)
            return None
        return file, os.fstat(file.fileno()).st_size

    def _rotated(self, name: FileName, since_s: float = 0.0, but_inode: int = -1) -> list[Path]:
        """The rotated files of a name, the newest first; of one that is there compressed too, the plain one.

        Args:
            but_inode: of the current file, which may have been rotated since it was opened.
        """
        pattern = re.compile(rf"{name}-(\d[\dTZ:_-]*)(?:\.(\d+))?\.log(\.gz)?")
        found: dict[tuple[str, int], Path] = {}
        try:
            paths = sorted(self._folder.iterdir())  # a plain file comes before the same with .gz
        except OSError:
            return []
        for path in paths:
            match = pattern.fullmatch(path.name)
            if match is None:
                continue
            try:
                stat = path.stat()
            except OSError:
                continue  # it was compressed or deleted: the first is found too, the second is past
            if stat.st_ino != but_inode and stat.st_mtime >= since_s - _DISORDER_S:
                found.setdefault((match[1], int(match[2] or 0)), path)
        return [found[key] for key in sorted(found, reverse=True)]

    def _backward(self, name: FileName, choose: Choose, since_s: float, before: Follower | None) -> Iterator[Line]:
        since, oldest = _time(since_s), _time(since_s - _DISORDER_S)
        time = _END_OF_TIME
        for raw in self._raw_backward(name, since_s, before):
            line = _line(raw, name, time)
            time = line.time
            if time < oldest:
                return
            chosen = choose(line) if time >= since else None
            if chosen is not None:
                yield chosen

    def _raw_backward(self, name: FileName, since_s: float, before: Follower | None) -> Iterator[bytes]:
        current = self._current(name, before)
        inode = -1
        if current is not None:
            with current[0] as file:
                inode = os.fstat(file.fileno()).st_ino
                rotated = self._rotated(name, since_s, inode)
                yield from _reversed_lines(file, current[1])
        else:
            rotated = self._rotated(name, since_s)
        for path in rotated:
            with self._complaining(path.name), _opened(path) as file:
                if not file.name.endswith(".gz"):
                    yield from _reversed_lines(file, os.fstat(file.fileno()).st_size)
                    continue
                with tempfile.TemporaryFile() as plain:  # gzip cannot be read from its end
                    for block in self._unpacked(file, path.name):
                        plain.write(block)
                    yield from _reversed_lines(plain, plain.tell())

    def _forward(self, name: FileName, choose: Choose, since_s: float, before: Follower | None) -> Iterator[Line]:
        since = _time(since_s)
        time = ""
        for raw in self._raw_forward(name, since_s, before):
            line = _line(raw, name, time)
            time = line.time
            chosen = choose(line) if time >= since else None
            if chosen is not None:
                yield chosen

    def _raw_forward(self, name: FileName, since_s: float, before: Follower | None) -> Iterator[bytes]:
        # The current file is held open meanwhile: it may be rotated, and compressed, before its turn comes.
        with contextlib.ExitStack() as stack:
            current = self._current(name, before)
            inode = os.fstat(stack.enter_context(current[0]).fileno()).st_ino if current is not None else -1
            for path in reversed(self._rotated(name, since_s, inode)):
                with self._complaining(path.name), _opened(path) as file:
                    if file.name.endswith(".gz"):
                        yield from _lines(self._unpacked(file, path.name))
                    else:
                        yield from _lines(_blocks(file, os.fstat(file.fileno()).st_size))
            if current is not None:
                yield from _lines(_blocks(*current))

    def _unpacked(self, file: IO[bytes], name: str) -> Iterator[bytes]:
        """What a compressed file holds; of one that is cut off, what is there."""
        with self._complaining(name), gzip.open(file) as packed:
            while block := packed.read1(_BLOCK_BYTES):  # `read` would lose what came before the cut
                yield block

    def _is_twin(self, line: Line) -> bool:
        return self._twins is not None and self._twins.has_seen(line)

    @contextlib.contextmanager
    def _complaining(self, name: str) -> Iterator[None]:
        """What goes wrong with one file is noted, and the others are read; one that is gone was too old."""
        try:
            yield
        except FileNotFoundError:
            return
        except (OSError, EOFError, zlib.error) as error:
            self._complain(name, error)

    def _complain(self, name: str, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is cut off, or no gzip file"
        self.problems.append(f"{self._folder / name}: {why}")


class _Twins:
    """Errors stand in application.log and in error.log: whoever reads both wants each once."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, FileName] = OrderedDict()

    def has_seen(self, line: Line) -> bool:
        """Whether the same line was there, in the other file."""
        if line.file not in {"application", "error"} or line.entry is None:
            return False
        if line.entry.get("log.level") not in {"error", "critical"}:
            return False
        if self._seen.get(line.raw, line.file) != line.file:
            del self._seen[line.raw]
            return True
        self._seen[line.raw] = line.file
        if len(self._seen) > _SEEN_ERRORS:
            self._seen.popitem(last=False)
        return False


class Follower:
    """What is added to the current files, also when these are rotated away. Begins where they end when it is made.

    `close` it.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[FileName],
        problems: list[str],
        is_twin: Callable[[Line], bool] = lambda line: False,
    ) -> None:
        self._folder = folder
        self._problems = problems
        self._is_twin = is_twin
        self._tails: dict[FileName, list[_Tail]] = {}
        self._beginnings: dict[FileName, int] = {}
        for name in names:
            tail = self._open(name)
            self._tails[name] = [tail] if tail is not None else []
            if tail is not None:
                self._beginnings[name] = tail.go_to_end()

    def beginning(self, name: FileName) -> tuple[IO[bytes], int] | None:
        """The file that is followed, and where; None if there was none."""
        if name not in self._beginnings:
            return None
        # The tail reads by offset: it does not mind who moves the position that both share.
        return os.fdopen(os.dup(self._tails[name][0].fd), "rb"), self._beginnings[name]

    def poll(self, choose: Choose) -> list[Line]:
        """What was added since the last time, in order of time. Never waits."""
        found: list[Line] = []
        for name, tails in self._tails.items():
            for tail in tails:
                for raw in tail.read():
                    line = _line(raw, name, tail.time)
                    tail.time = line.time
                    chosen = choose(line)
                    if chosen is not None:
                        found.append(chosen)
            self._look_for_successor(name, tails)
        return [line for line in sorted(found, key=lambda line: line.time) if not self._is_twin(line)]

    def close(self) -> None:
        for tails in self._tails.values():
            for tail in tails:
                os.close(tail.fd)
            tails.clear()

    def _look_for_successor(self, name: FileName, tails: list[_Tail]) -> None:
        try:
            inode = (self._folder / f"{name}.log").stat().st_ino
        except OSError:
            inode = -1  # it is between its two names
        if inode not in {-1, tails[-1].inode if tails else -1}:
            tail = self._open(name)
            if tail is not None:
                tails.append(tail)
        for tail in tails[:-1]:
            tail.polls_left -= 1
            if not tail.polls_left:
                os.close(tail.fd)
                tails.remove(tail)

    def _open(self, name: FileName) -> _Tail | None:
        path = self._folder / f"{name}.log"
        try:
            return _Tail(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            if problem not in self._problems:
                self._problems.append(problem)
            return None


class _Tail:
    """The end of one open file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.polls_left = _FADING_POLLS
        self.time = ""
        self._offset = 0
        self._begun = b""

    def go_to_end(self) -> int:
        """Behind the last whole line that there is; returns where that is."""
        end = os.fstat(self.fd).st_size
        start = max(0, end - MAX_LINE_BYTES)
        cut = os.pread(self.fd, end - start, start).rfind(b"\n")
        self._offset = start + cut + 1 if cut >= 0 else start
        return self._offset

    def read(self) -> Iterator[bytes]:
        if os.fstat(self.fd).st_size < self._offset:
            self._offset, self._begun = 0, b""  # somebody emptied it
        while block := os.pread(self.fd, _BLOCK_BYTES, self._offset):
            self._offset += len(block)
            *lines, self._begun = (self._begun + block).split(b"\n")
            if len(self._begun) > MAX_LINE_BYTES:
                lines.append(self._begun)
                self._begun = b""
            yield from (line for line in lines if line)


def _line(raw: bytes, file: FileName, time_beside: str) -> Line:
    """A line with its time, of which only ours are taken apart for that."""
    if raw.startswith(_TIME_KEY) and raw[_TIME_END - 1 : _TIME_END + 1] == b'Z"':
        return Line(raw[len(_TIME_KEY) : _TIME_END].decode("ascii", "replace"), file, raw, None)
    entry = decoded(raw)
    time = entry.get("@timestamp") if entry is not None else None
    return Line(time if isinstance(time, str) else time_beside, file, raw, None)


def _opened(path: Path) -> IO[bytes]:
    """The file, or what it was made into meanwhile. Raises: OSError."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        if path.suffix == ".gz":
            raise
        return path.with_name(f"{path.name}.gz").open("rb")


def _blocks(file: IO[bytes], end: int) -> Iterator[bytes]:
    file.seek(0)
    while end > 0 and (block := file.read(min(end, _BLOCK_BYTES))):
        end -= len(block)
        yield block


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that blocks make up; what the last one begins counts as one."""
    begun = b""
    for block in blocks:
        *lines, begun = (begun + block).split(b"\n")
        yield from (line for line in lines if line)
        if len(begun) > MAX_LINE_BYTES:
            yield begun
            begun = b""
    if begun:
        yield begun


def _reversed_lines(file: IO[bytes], end: int) -> Iterator[bytes]:
    """The lines up to `end`, the last one first."""
    rest = b""
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        block = file.read(end - start) + rest
        end = start
        rest, *lines = block.split(b"\n")
        yield from (line for line in reversed(lines) if line)
        if len(rest) > MAX_LINE_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest


def _in_order(lines: Iterable[Line]) -> Iterator[Line]:
    held: list[tuple[str, int, Line]] = []
    for number, line in enumerate(lines):
        heapq.heappush(held, (line.time, number, line))
        if len(held) > _HELD_LINES:
            yield heapq.heappop(held)[2]
    while held:
        yield heapq.heappop(held)[2]


def _time(unix_s: float) -> str:
    """The timestamp of an instant, before all others for one that is before time began."""
    return timestamp(unix_s) if unix_s > 0 else ""
