"""Files are rotated by size and age, compressed, and deleted; whatever was interrupted is finished."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_router.observe.logs.rotate import SETTLE_S, Rotation, rotated_files
from llm_router.observe.logs.settings import LogSettings
from llm_router.testing import FakeClock
from support.wait import until

NOON = 1_769_860_800.0  # 2026-01-31T12:00:00Z
STAMP = "20260131T120000Z"


def rotation(folder: Path, wall: Callable[[], float], said: list[str] | None = None, **settings: object) -> Rotation:
    found = LogSettings(**{"max_file_bytes": 1000, **settings})  # type: ignore[arg-type]
    heard: list[str] = [] if said is None else said
    return Rotation(str(folder), found, wall=wall, on_problem=heard.append)


def line(at: str, size: int = 100) -> bytes:
    return json.dumps({"@timestamp": at, "message": "x" * size}).encode() + b"\n"


def test_large_files_are_rotated_and_compressed(tmp_path: Path) -> None:
    """With the time in their name; small ones stay."""
    wall = FakeClock(NOON)
    (tmp_path / "access.log").write_bytes(content := line("2026-01-31T11:59:00.000Z", 1000))
    (tmp_path / "access.log").chmod(0o640)
    (tmp_path / "error.log").write_bytes(line("2026-01-31T11:59:00.000Z"))
    (tmp_path / "other.log").write_bytes(b"x" * 2000)
    keeper = rotation(tmp_path, wall)
    keeper.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {f"access-{STAMP}.log", "error.log", "other.log"}
    wall.advance(SETTLE_S)
    keeper.sweep()
    packed = tmp_path / f"access-{STAMP}.log.gz"
    until(lambda: packed.exists() and not (tmp_path / f"access-{STAMP}.log").exists())
    assert gzip.decompress(packed.read_bytes()) == content
    assert packed.stat().st_mode & 0o777 == 0o640
    until(lambda: keeper.cpu_s > 0)
    keeper.close(5)
    assert not list(tmp_path.glob("*.part"))


def test_late_lines_are_compressed_too(tmp_path: Path) -> None:
    """A file is not compressed while somebody may still finish writing to it."""
    wall = FakeClock(NOON)
    (tmp_path / "access.log").write_bytes(line("2026-01-31T11:59:00.000Z", 1000))
    keeper = rotation(tmp_path, wall)
    keeper.sweep()
    wall.advance(SETTLE_S - 1)
    keeper.sweep()
    keeper.close(5)
    assert [found.is_compressed for found in rotated_files(str(tmp_path))] == [False]


def test_two_of_one_second_have_two_names(tmp_path: Path) -> None:
    """And neither overwrites the other, compressed or not."""
    keeper = rotation(tmp_path, FakeClock(NOON), compress=False)
    (tmp_path / f"access-{STAMP}.1.log.gz").write_bytes(b"")
    for _ in range(2):
        (tmp_path / "access.log").write_bytes(line("2026-01-31T11:59:00.000Z", 1000))
        keeper.sweep()
    assert [Path(found.path).name for found in rotated_files(str(tmp_path))] == [
        f"access-{STAMP}.log",
        f"access-{STAMP}.1.log.gz",
        f"access-{STAMP}.2.log",
    ]


@pytest.mark.parametrize(
    ("content", "is_due"),
    [
        (line("2026-01-30T11:59:59.000Z"), True),
        (line("2026-01-30T12:00:01.000Z"), False),
        (b"\n" + line("2026-01-30T11:59:59.000Z"), True),
        (b"no JSON\n", False),  # its own time, which is now, has to do
        (b'{"@timestamp":"9999-99-99T99:99:99.000Z"}\n', False),
        (b"", False),
    ],
)
def test_age_is_that_of_the_first_line(tmp_path: Path, content: bytes, is_due: bool) -> None:
    """So it goes on over restarts of whoever rotates."""
    (tmp_path / "audit.log").write_bytes(content)
    os.utime(tmp_path / "audit.log", (NOON, NOON))
    rotation(tmp_path, FakeClock(NOON), max_age_s=86400.0).sweep()
    assert (tmp_path / "audit.log").exists() is not is_due


def rotated(folder: Path, name: str, size: int = 100) -> None:
    (folder / name).write_bytes(b"x" * size)


def test_old_files_are_deleted(tmp_path: Path) -> None:
    """By the time in their name."""
    rotated(tmp_path, "access-20260101T000000Z.log.gz")
    rotated(tmp_path, "access-20260130T000000Z.log.gz")
    rotated(tmp_path, "mine-20200101T000000Z.log.gz")
    rotation(tmp_path, FakeClock(NOON), keep_s=14 * 86400.0).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "access-20260130T000000Z.log.gz",
        "mine-20200101T000000Z.log.gz",
    ]


def test_the_oldest_go_first_and_audit_last(tmp_path: Path) -> None:
    """A flood of requests does not wash away who did what."""
    for day in (20, 21, 22):
        rotated(tmp_path, f"access-202601{day}T000000Z.log.gz", 1000)
    for day in (18, 19):
        rotated(tmp_path, f"audit-202601{day}T000000Z.log.gz", 1000)
    rotation(tmp_path, FakeClock(NOON), keep_bytes=3500).sweep()
    assert sorted(path.name[:14] for path in tmp_path.iterdir()) == [
        "access-2026012",
        "audit-20260118",
        "audit-20260119",
    ]
    assert (tmp_path / "access-20260122T000000Z.log.gz").exists()
    rotation(tmp_path, FakeClock(NOON), keep_bytes=1000).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["audit-20260119T000000Z.log.gz"]


def test_what_a_killed_process_left_is_finished(tmp_path: Path) -> None:
    """Halves are thrown away and made again, sources that were compressed deleted, waiting ones compressed."""
    rotated(tmp_path, "access-20260130T000000Z.log")
    rotated(tmp_path, "access-20260130T000000Z.log.gz.part", 3)
    rotated(tmp_path, "error-20260130T000000Z.log")
    (tmp_path / "error-20260130T000000Z.log.gz").write_bytes(gzip.compress(b"whole"))
    keeper = rotation(tmp_path, FakeClock(NOON))
    keeper.sweep()
    until(lambda: not (tmp_path / "access-20260130T000000Z.log").exists())
    keeper.close(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "access-20260130T000000Z.log.gz",
        "error-20260130T000000Z.log.gz",
    ]
    assert gzip.decompress((tmp_path / "access-20260130T000000Z.log.gz").read_bytes()) == b"x" * 100
    assert gzip.decompress((tmp_path / "error-20260130T000000Z.log.gz").read_bytes()) == b"whole"


def test_links_are_left_alone(tmp_path: Path) -> None:
    """Like one to /dev/stdout in a container."""
    (tmp_path / "real").write_bytes(b"x" * 2000)
    (tmp_path / "access.log").symlink_to(tmp_path / "real")
    rotation(tmp_path, FakeClock(NOON)).sweep()
    assert (tmp_path / "access.log").is_symlink()


def test_no_folder_is_no_problem(tmp_path: Path) -> None:
    """Nothing was written yet; or a file is in its place, and whoever writes says so."""
    said: list[str] = []
    (tmp_path / "file").touch()
    for name in ("none", "file", "file/none"):
        rotation(tmp_path / name, FakeClock(NOON), said).sweep()
    assert said == []


def test_what_cannot_be_done_is_said_once(tmp_path: Path) -> None:
    """Not at each sweep; and forgotten when it can be done."""
    said: list[str] = []
    old = tmp_path / "access-20200101T000000Z.log.gz"
    old.mkdir()
    keeper = rotation(tmp_path, FakeClock(NOON), said)
    keeper.sweep()
    keeper.sweep()
    assert said == [f"{old}: Is a directory"]
    assert keeper.problem
    old.rmdir()
    keeper.sweep()
    assert keeper.problem == ""


def test_a_packed_file_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """Its source is kept, and everything else goes on."""
    said: list[str] = []
    rotated(tmp_path, "access-20260130T000000Z.log")
    (tmp_path / "access-20260130T000000Z.log.gz.part").mkdir()
    (tmp_path / "error.log").write_bytes(line("2026-01-31T11:59:00.000Z", 2000))
    keeper = rotation(tmp_path, FakeClock(NOON), said)
    keeper.sweep()
    assert said == [f"{tmp_path}/access-20260130T000000Z.log.gz.part: Is a directory"]
    keeper.close(5)
    keeper.sweep()
    assert "cannot be compressed" in keeper.problem
    assert (tmp_path / "access-20260130T000000Z.log").exists()
    assert (tmp_path / f"error-{STAMP}.log").exists()
    (tmp_path / "access-20260130T000000Z.log").unlink()
    (tmp_path / "access-20260130T000000Z.log.gz.part").rmdir()
    keeper.sweep()
    keeper.sweep()
    assert keeper.problem == "", "what could not be compressed is gone"


def test_times_of_rotation_are_read_back() -> None:
    """As they were written."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(NOON))
    assert stamp == STAMP
