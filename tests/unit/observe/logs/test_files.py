"""A log file takes whole lines, follows rotation, and neither raises nor forgets what it may not forget."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from llm_router.observe.logs.files import RETRY_S, LogFile
from llm_router.testing import FakeClock


class Told:
    """What a file told."""

    def __init__(self) -> None:
        self.lost = 0
        self.changes: list[str] = []

    def lose(self, lines: int) -> None:
        self.lost += lines


def file(path: Path, clock: FakeClock, told: Told, *, keeps: bool = False) -> LogFile:
    return LogFile(str(path), clock=clock, on_lost=told.lose, on_change=told.changes.append, keeps=keeps)


def test_lines_are_appended_and_counted(tmp_path: Path) -> None:
    """In a folder that is made for them, readable by the owner and the group only."""
    path = tmp_path / "deep" / "er" / "access.log"
    log = file(path, FakeClock(), told := Told())
    log.write([b"one\n", b"two\n"])
    log.write([b"three\n"])
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert (log.written, told.lost, told.changes) == (3, 0, [])
    assert path.stat().st_mode & 0o007 == 0
    assert path.parent.stat().st_mode & 0o007 == 0
    log.close()


def test_a_renamed_file_is_left(tmp_path: Path) -> None:
    """The next line is in a new one; also if the file was deleted."""
    path = tmp_path / "access.log"
    log = file(path, FakeClock(), Told())
    log.write([b"one\n"])
    path.rename(tmp_path / "old.log")
    log.write([b"two\n"])
    path.unlink()
    log.write([b"three\n"])
    assert path.read_bytes() == b"three\n"
    assert (tmp_path / "old.log").read_bytes() == b"one\n"
    log.close()


def test_a_half_line_of_somebody_else_is_ended(tmp_path: Path) -> None:
    """One that was killed or ran out of space: only that line is broken."""
    path = tmp_path / "access.log"
    path.write_bytes(b'{"half')
    log = file(path, FakeClock(), Told())
    log.write([b"whole\n"])
    assert path.read_bytes() == b'{"half\nwhole\n'
    log.close()


def test_a_full_disk_costs_the_lines_and_is_told_once(tmp_path: Path) -> None:
    """They are counted, but for one; it is tried again a second later, not each time."""
    path, clock, told = tmp_path / "access.log", FakeClock(), Told()
    path.symlink_to("/dev/full")
    log = file(path, clock, told)
    log.write([b"one\n", b"two\n"])
    log.write([b"three\n"])
    assert (told.lost, log.problem, told.changes) == (2, "No space left on device", ["No space left on device"])
    path.unlink()
    log.write([b"too early\n"])
    assert told.lost == 3
    clock.advance(RETRY_S)
    log.write([b"four\n"])
    assert path.read_bytes() == b"one\nfour\n"
    assert (told.changes[1:], log.written) == ([""], 2)
    log.close()


def test_lines_that_must_not_be_lost_wait_for_the_disk(tmp_path: Path) -> None:
    """In order, before those that come then; up to a bound."""
    path, clock, told = tmp_path / "audit.log", FakeClock(), Told()
    path.symlink_to("/dev/full")
    log = file(path, clock, told, keeps=True)
    log.write([b"one\n"])
    log.write([b"two\n"])
    assert (told.lost, log.kept) == (0, 2)
    path.unlink()
    log.retry()
    assert log.kept == 2
    clock.advance(RETRY_S)
    log.retry()
    log.write([b"three\n"])
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert log.kept == 0
    path.unlink()
    path.symlink_to("/dev/full")
    for _ in range(20):
        log.write([b"x" * 100_000 + b"\n"])
    assert (log.kept, told.lost) == (10, 10)
    log.close()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    """Before any line is lost to it."""
    (tmp_path / "taken").write_text("a file")
    log = file(tmp_path / "taken" / "access.log", FakeClock(), told := Told())
    log.probe()
    assert told.changes == ["Not a directory"]
    log.write([b"one\n", b"two\n"])
    assert told.lost == 1
    assert "Not a directory" in repr(log)


def test_a_file_is_well_again_without_a_line_for_it(tmp_path: Path) -> None:
    """Nobody needs to write to it for its problem to end."""
    (tmp_path / "taken").write_text("a file")
    log = file(tmp_path / "taken" / "access.log", clock := FakeClock(), told := Told())
    log.probe()
    (tmp_path / "taken").unlink()
    log.retry()
    assert log.problem
    clock.advance(RETRY_S)
    log.retry()
    assert (log.problem, told.changes[1:]) == ("", [""])
    log.close()


def test_a_pipe_without_a_reader_stops_nobody(tmp_path: Path) -> None:
    """It is a file that cannot be written."""
    path = tmp_path / "access.log"
    os.mkfifo(path)
    log = file(path, FakeClock(), told := Told())
    log.write([b"one\n"])
    assert told.changes == ["No such device or address"]


PARTLY = """
import resource, sys
from llm_router.observe.logs.files import LogFile
lost = []
log = LogFile(sys.argv[1], clock=lambda: 0.0, on_lost=lost.append, on_change=lambda problem: None)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, 100))
log.write([b"0123456789\\n", b"abcdefghij\\n", b"klmnopqrst\\n"])
assert log.written == 2 and log.kept == 1, (log, lost)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log.retry(now=True)
log.write([b"the next\\n"])
"""


def test_a_line_that_fits_partly_breaks_no_other(tmp_path: Path) -> None:
    """The disk fills in the middle of a batch: what is whole counts as written, and the next line begins anew."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "access.log"
    subprocess.run([sys.executable, "-c", PARTLY, str(path)], check=True, timeout=30)
    assert path.read_bytes() == b"0123456789\nabcdefghij\nklm\nklmnopqrst\nthe next\n"


MANY = """
import sys, time
from llm_router.observe.logs.files import LogFile
log = LogFile(sys.argv[1], clock=time.monotonic, on_lost=print, on_change=print)
for number in range(400):
    log.write([b"%s %d %s\\n" % (sys.argv[2].encode(), number, b"x" * 300)] * 3)
"""


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    """Nor is one lost while the file is rotated under them."""
    path = tmp_path / "access.log"
    writers = [
        subprocess.Popen([sys.executable, "-c", MANY, str(path), name], stdout=subprocess.PIPE) for name in "abcd"
    ]
    rotated = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists() and path.stat().st_size > 100_000:
            path.rename(tmp_path / f"{rotated}.log")
            rotated += 1
    for writer in writers:
        assert writer.communicate(timeout=30)[0] == b""
    # An empty line may come between, where one process opens the file while another is in the middle of a write.
    lines = [line for found in tmp_path.glob("*.log") for line in found.read_bytes().splitlines() if line]
    assert rotated > 1
    assert len(lines) == 4 * 400 * 3
    assert {len(line.split()[2]) for line in lines} == {300}
    assert len(set(lines)) == 4 * 400
