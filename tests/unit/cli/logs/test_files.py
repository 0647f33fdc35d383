"""Log files read together: in order of time, from their end or their beginning, whatever happens to them meanwhile."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.cli.logs import files
from llm_router.cli.logs.files import NAMES, Follower, Line, LogFolder, decoded
from llm_router.observe.logs.schema import FileName
from llm_router.observe.timestamp import timestamp

START_S = 1_790_000_000.0


def line(second: float, message: str = "", level: str = "info") -> bytes:
    """A line as the router writes it, `second` after the start of the world of these tests."""
    entry = {"@timestamp": timestamp(START_S + second), "log.level": level, "message": message or f"{second:g}"}
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def lines(*seconds: float) -> bytes:
    return b"".join(line(second) for second in seconds)


def anything(line: Line) -> Line | None:
    """Chooses every line."""
    return line._replace(entry=decoded(line.raw))


def said(found: list[Line]) -> list[str]:
    """The messages; of broken lines their text."""
    return [line.entry["message"] if line.entry is not None else line.raw.decode() for line in found]


def both(folder: Path, names: tuple[FileName, ...] = ("application", "access"), **options: float) -> list[str]:
    """What is found, which is the same from either end."""
    since_s = options.get("since_s", 0.0)
    backward = said(LogFolder(folder, names).newest(10_000, anything, since_s))
    assert said(list(LogFolder(folder, names).all(anything, since_s))) == backward
    return backward


def test_files_are_merged_by_time(tmp_path: Path) -> None:
    """Rotated and compressed ones of several names; numbers of rotations in the same second count."""
    (tmp_path / "application.log").write_bytes(lines(7, 9))
    (tmp_path / "application-20260131T120000Z.log").write_bytes(lines(4))
    (tmp_path / "application-20260131T120000Z.2.log").write_bytes(lines(5))
    (tmp_path / "application-20260131T110000Z.log.gz").write_bytes(gzip.compress(lines(1, 2)))
    (tmp_path / "access.log").write_bytes(lines(8))
    (tmp_path / "access-20260131T120000Z.log.gz").write_bytes(gzip.compress(lines(3, 6)))
    (tmp_path / "access-20260131T120000Z.log.gz.part").write_bytes(b"not yet")
    (tmp_path / "runner-small.log").write_bytes(b"llama.cpp says")
    (tmp_path / "error.log").write_bytes(lines(0))
    assert both(tmp_path) == [str(second) for second in range(1, 10)]


def test_the_newest_are_found_from_the_end(tmp_path: Path) -> None:
    """Older files are not even opened."""
    (tmp_path / "access.log").write_bytes(lines(*range(10, 20)))
    (tmp_path / "access-20260131T120000Z.log.gz").write_bytes(b"no gzip at all")
    folder = LogFolder(tmp_path, ["access"])
    assert said(folder.newest(3, anything)) == ["17", "18", "19"]
    assert folder.problems == []
    assert said(folder.newest(99, anything)) == [str(second) for second in range(10, 20)]
    assert folder.problems == [f"{tmp_path}/access-20260131T120000Z.log.gz: it is cut off, or no gzip file"]


def test_what_is_left_of_a_file_that_was_cut_off_is_read(tmp_path: Path) -> None:
    """And said."""
    packed = gzip.compress(b"".join(line(number, os.urandom(20).hex()) for number in range(2000)))
    (tmp_path / "access-20260131T120000Z.log.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "access.log").write_bytes(lines(5000))
    for read in (lambda log: log.newest(9999, anything), lambda log: list(log.all(anything))):
        folder = LogFolder(tmp_path, ["access"])
        found = read(folder)
        assert 500 < len(found) < 2000
        assert found[-1].entry is not None
        assert found[-1].entry["message"] == "5000"
        assert len(folder.problems) == 1


def test_what_is_older_is_not_read(tmp_path: Path) -> None:
    """By the time of lines, and of files: one that was last written long before is not opened."""
    old = tmp_path / "access-20260131T110000Z.log.gz"
    old.write_bytes(b"no gzip at all")
    os.utime(old, (START_S, START_S))
    (tmp_path / "access.log").write_bytes(lines(100, 200, 300, 299, 400))
    assert both(tmp_path, since_s=START_S + 299.5) == ["300", "400"]
    folder = LogFolder(tmp_path, ["access"])
    assert said(list(folder.all(anything, START_S + 100))) == ["100", "200", "299", "300", "400"]
    assert folder.problems == []


def test_lines_of_other_processes_come_in_their_place(tmp_path: Path) -> None:
    """Though they were written a little later."""
    (tmp_path / "access.log").write_bytes(lines(2, 3, 1, 5, 4))
    assert both(tmp_path) == ["1", "2", "3", "4", "5"]


def test_broken_lines_stay_where_they_are(tmp_path: Path) -> None:
    """Half a line of a process that was killed, bytes that are no text, JSON that is no line, empty lines."""
    (tmp_path / "access.log").write_bytes(
        line(1) + b'{"@timestamp":"2026\n\n' + line(2) + b"\xff\xfe\n[1]\n" + line(3) + b'{"half'
    )
    found = LogFolder(tmp_path, ["access"]).newest(99, anything)
    shown = [line.raw for line in found]
    assert shown == [raw.rstrip(b"\n") for raw in (tmp_path / "access.log").read_bytes().split(b"\n") if raw]
    assert [found.raw for found in LogFolder(tmp_path, ["access"]).all(anything)] == shown


def test_an_error_is_shown_once(tmp_path: Path) -> None:
    """It stands in application.log and in error.log; one that is only in error.log is shown too."""
    shared, alone = line(2, "shared", "error"), line(3, "alone", "critical")
    (tmp_path / "application.log").write_bytes(lines(1) + shared + line(4, "twice") + line(4, "twice"))
    (tmp_path / "error.log").write_bytes(shared + alone)
    (tmp_path / "access.log").write_bytes(lines(5))
    assert both(tmp_path, NAMES) == ["1", "shared", "alone", "twice", "twice", "5"]
    assert both(tmp_path, ("error",)) == ["shared", "alone"]


@given(
    st.lists(st.integers(0, 50), max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(1, 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_both_ways_of_reading_agree(
    tmp_path_factory: pytest.TempPathFactory, seconds: list[int], cuts: list[int], block: int
) -> None:
    """However the lines are spread over files, and however large the blocks are in which they are read."""
    folder = tmp_path_factory.mktemp("logs")
    seconds.sort()
    edges = [0, *sorted(min(cut, len(seconds)) for cut in cuts), len(seconds)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        content = b"".join(line(second, f"{second}-{index}") for index, second in enumerate(seconds[start:end]))
        if number == len(edges) - 2:
            (folder / "access.log").write_bytes(content)
        elif number % 2:
            (folder / f"access-2026013{number}T120000Z.log").write_bytes(content)
        else:
            (folder / f"access-2026013{number}T120000Z.log.gz").write_bytes(gzip.compress(content))
    usual = files._BLOCK_BYTES
    try:
        files._BLOCK_BYTES = block  # type: ignore[misc]  # patched: files of megabytes would take too long
        assert [int(text.partition("-")[0]) for text in both(folder)] == seconds
    finally:
        files._BLOCK_BYTES = usual  # type: ignore[misc]


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of zeros does not fill the memory."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 64)
    (tmp_path / "access.log").write_bytes(bytes(1000) + b"\n" + line(1))
    for found in (
        LogFolder(tmp_path, ["access"]).newest(99, anything),
        list(LogFolder(tmp_path, ["access"]).all(anything)),
    ):
        assert all(len(line.raw) <= 200 for line in found)
        assert sum(line.raw.count(0) for line in found) == 1000
        assert found[-1].entry is not None


def test_there_may_be_nothing(tmp_path: Path) -> None:
    """No folder, no files, empty files."""
    assert LogFolder(tmp_path / "none", NAMES).is_empty()
    assert both(tmp_path / "none") == []
    assert LogFolder(tmp_path, NAMES).is_empty()
    (tmp_path / "access.log").touch()
    assert not LogFolder(tmp_path, NAMES).is_empty()
    assert both(tmp_path) == []


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """And the others are read."""
    (tmp_path / "access.log").mkdir()
    (tmp_path / "application.log").write_bytes(lines(1))
    folder = LogFolder(tmp_path, ["access", "application"])
    assert said(folder.newest(9, anything)) == ["1"]
    assert folder.problems == [f"{tmp_path}/access.log: Is a directory"]


# -- following ------------------------------------------------------------------------------------------


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def polled(follower: Follower) -> list[str]:
    return said(follower.poll(anything))


def test_nothing_is_lost_or_twice_between_reading_and_following(tmp_path: Path) -> None:
    """What is written after the follower was made is its; half a line is whole when its end has come."""
    path = tmp_path / "access.log"
    path.write_bytes(lines(1, 2) + line(3)[:10])
    folder = LogFolder(tmp_path, ["access", "application"])
    follower = folder.follow()
    append(path, line(3)[10:] + lines(4))
    (tmp_path / "application.log").write_bytes(lines(3.5))
    assert said(folder.newest(99, anything, before=follower)) == ["1", "2"]
    assert said(list(folder.all(anything, before=follower))) == ["1", "2"]
    assert polled(follower) == ["3", "4"]
    assert polled(follower) == ["3.5"]
    assert polled(follower) == []
    append(path, line(5)[:-1])
    assert polled(follower) == []
    append(path, b"\n")
    assert polled(follower) == ["5"]
    follower.close()


def test_following_survives_rotation(tmp_path: Path) -> None:
    """A writer that has not noticed yet writes into the old file, which may even be compressed and gone by then."""
    path, rotated = tmp_path / "access.log", tmp_path / "access-20260131T120000Z.log"
    path.write_bytes(lines(1))
    folder = LogFolder(tmp_path, ["access"])
    follower = folder.follow()
    late = path.open("ab", buffering=0)
    path.rename(rotated)
    assert polled(follower) == []  # between its two names
    path.write_bytes(lines(2))
    late.write(lines(3))
    assert polled(follower) + polled(follower) == ["3", "2"]
    rotated.unlink()
    late.write(lines(4))
    append(path, lines(5))
    assert polled(follower) == ["4", "5"]
    late.close()
    assert said(folder.newest(9, anything, before=follower)) == ["1"]  # where it began, whatever that is called now
    for _ in range(files._FADING_POLLS):
        assert polled(follower) == []
    append(path, lines(6))
    assert polled(follower) == ["6"]
    assert len(follower._tails["access"]) == 1
    follower.close()


def test_a_file_that_is_emptied_is_followed_from_its_beginning(tmp_path: Path) -> None:
    """As `copytruncate` of logrotate does it."""
    path = tmp_path / "access.log"
    path.write_bytes(lines(1, 2))
    follower = LogFolder(tmp_path, ["access"]).follow()
    path.write_bytes(lines(3))
    assert polled(follower) == ["3"]
    follower.close()


def test_errors_are_followed_once(tmp_path: Path) -> None:
    """Whichever file has them first."""
    follower = LogFolder(tmp_path, ["application", "error"]).follow()
    shared = line(1, "shared", "error")
    append(tmp_path / "error.log", shared)
    assert polled(follower) + polled(follower) == ["shared"]
    append(tmp_path / "application.log", shared + lines(2))
    assert polled(follower) + polled(follower) == ["2"]
    follower.close()
