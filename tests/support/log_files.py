"""What a router wrote into its log folder, rotated and compressed files included, each line held to the schema.

Not for: making lines (log_records.py), or showing them (`llm-router logs`).
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_router.observe.logs.schema import FILES, FileName, problems
from support.wait import until

Entry = Mapping[str, Any]

_ROTATED = re.compile(r"(?P<file>[a-z]+)-(?P<stamp>\d{8}T\d{6}Z)(?:\.\d+)?\.log(?P<gz>\.gz)?")


class Rotated(NamedTuple):
    """A file that was rotated away; `stamp` like `20260131T120000Z`."""

    path: Path
    stamp: str
    is_compressed: bool


class LogFiles:
    """The log files in a folder. Every look reads all of them anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rotated(self, file: FileName) -> list[Rotated]:
        """From the oldest to the newest. A file that is being compressed, or was just now, counts once."""
        found: dict[str, Rotated] = {}
        for path in sorted(self.folder.iterdir()):  # the plain one comes first
            match = _ROTATED.fullmatch(path.name)
            if match is not None and match["file"] == file:
                found[path.name.removesuffix(".gz")] = Rotated(path, match["stamp"], bool(match["gz"]))
        return list(found.values())

    def raw(self, file: FileName) -> bytes:
        """All that a file holds, from the oldest line on."""
        while True:
            try:
                # The current one first: what is rotated away meanwhile is then read twice at worst, and that is told.
                current = self.folder / f"{file}.log"
                parts, inode = (b"", -1)
                if current.exists():
                    with current.open("rb") as opened:
                        parts, inode = opened.read(), current.stat().st_ino
                older = [rotated for rotated in self.rotated(file) if rotated.path.stat().st_ino != inode]
                return b"".join(_read(rotated.path) for rotated in older) + parts
            except FileNotFoundError:  # rotated, or compressed, between two steps
                continue

    def entries(self, file: FileName, *, torn: int = 0) -> list[Entry]:
        """Every line, the oldest first. All must be whole and as the schema says; `torn` lines need not be, where a
        disk was full. A last line without its end is being written, and left out."""
        lines = self.raw(file).split(b"\n")[:-1]
        found: list[Entry] = []
        wrong: list[str] = []
        broken: list[bytes] = []
        for line in lines:
            if not line:
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                broken.append(line)
                continue
            found.append(entry)
            wrong += [f"{problem}: {line!r}" for problem in problems(file, entry)]
        assert wrong == []
        assert len(broken) <= torn, broken
        return found

    def check(self, *, torn: int = 0) -> None:
        """Every line of every file is as the schema says, and every line of level error is in error.log."""
        for file in FILES:
            self.entries(file, torn=torn)
        told = Counter(_identity(entry) for entry in self.entries("application", torn=torn) if _is_error(entry))
        errors = Counter(_identity(entry) for entry in self.entries("error", torn=torn))
        assert told <= errors
        assert all(_is_error(entry) for entry in self.entries("error", torn=torn))

    def of_request(self, file: FileName, id: str) -> list[Entry]:
        """The lines of one request."""
        return [entry for entry in self.entries(file) if entry.get("request_id") == id]

    def one_of_request(self, file: FileName, id: str) -> Entry:
        """The only line of a request in a file, which may still be on its way."""
        until(lambda: self.of_request(file, id), what=f"a line of {id} in {file}.log")
        (entry,) = self.of_request(file, id)
        return entry

    def wait(self, file: FileName, **fields: Any) -> Entry:
        """The first line with these values; `log__level` stands for `log.level`."""
        wanted = {name.replace("__", "."): value for name, value in fields.items()}

        def found() -> Entry | None:
            return next((entry for entry in self.entries(file) if entry.items() >= wanted.items()), None)

        entry = until(found, what=f"a line with {wanted} in {file}.log")
        assert entry is not None
        return entry


def counted(entries: Iterable[Entry]) -> Counter[str]:
    """How many lines each request has."""
    return Counter(entry["request_id"] for entry in entries)


def _is_error(entry: Entry) -> bool:
    return entry["log.level"] in {"error", "critical"}


def _identity(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True)


def _read(path: Path) -> bytes:
    """What a rotated file holds; a compressed one must be whole."""
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        return file.read()
