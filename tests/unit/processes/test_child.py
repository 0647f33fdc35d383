"""The child's ties to its supervisor, seen from the supervisor's end of the pipes, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import pytest

from llm_router.processes.board import Board
from llm_router.processes.child import EXIT_ORPHANED, LONGEST_REPORT_BYTES, Child
from llm_router.processes.plan import ChildSpec, LaunchPlan, memory_file

BEGIN = """
import sys, threading
from llm_router.processes.child import Child
child = Child.from_argv()
child.report({"event": "tied"})
"""
WATCH = """
done = threading.Event()
child.watch(
    lambda: (child.report({"event": "drain"}), done.set()),
    lambda: (print("orphaned", flush=True), done.set()),
    lambda: child.report({"event": "reload"}),
)
child.report({"event": "watching"})
"""


class Tied(NamedTuple):
    process: subprocess.Popen[bytes]
    lifeline_fd: int
    reports: Iterator[dict[str, Any]]
    board: Board


@contextlib.contextmanager
def running(code: str) -> Iterator[Tied]:
    """A process that runs `code`, and our ends of its pipes. It has reported that it is tied."""
    lifeline, ours = os.pipe()
    reading, status = os.pipe()
    board = Board.create(2)
    spec = ChildSpec("runner", "test", 0, lifeline, status, board.fd, 1, LaunchPlan("/data", "/logs"))
    spec_fd = memory_file("spec", spec.to_json())
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--spec-fd", str(spec_fd)],
        pass_fds=[lifeline, status, board.fd, spec_fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for fd in (lifeline, status, spec_fd):
        os.close(fd)
    with os.fdopen(reading, "rb") as lines, process:
        try:
            reports = (json.loads(line) for line in lines)
            assert next(reports) == {"event": "tied"}
            yield Tied(process, ours, reports, board)
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                os.close(ours)
            board.close()


def test_orders_call_back() -> None:
    """Reload and drain arrive as what they are."""
    with running(BEGIN + WATCH + "done.wait()") as child:
        assert next(child.reports) == {"event": "watching"}
        os.write(child.lifeline_fd, b"h")
        assert next(child.reports) == {"event": "reload"}
        os.write(child.lifeline_fd, b"d")
        assert next(child.reports) == {"event": "drain"}
        assert child.process.wait(5) == 0


def test_a_reload_before_watching_is_not_lost() -> None:
    """It is called for once, whether the lifeline's thread reads it before or after."""
    code = BEGIN + "sys.stdin.readline()" + WATCH + "done.wait()"
    with running(code) as child:
        os.write(child.lifeline_fd, b"h")
        assert child.process.stdin is not None
        child.process.stdin.write(b"go on\n")
        child.process.stdin.flush()
        events = {next(child.reports)["event"] for _ in range(2)}
        assert events == {"reload", "watching"}
        os.write(child.lifeline_fd, b"d")
        assert next(child.reports) == {"event": "drain"}


def test_a_drain_before_watching_ends_the_process() -> None:
    """Nothing is in flight in a process that still imports."""
    with running(BEGIN + "sys.stdin.readline()") as child:
        os.write(child.lifeline_fd, b"d")
        assert child.process.wait(5) == 0


def test_an_orphan_that_does_not_watch_yet_leaves_at_once() -> None:
    """However long its imports last."""
    with running(BEGIN + "sys.stdin.readline()") as child:
        os.close(child.lifeline_fd)
        assert child.process.wait(5) == EXIT_ORPHANED


def test_an_orphan_is_told_and_may_leave_by_itself() -> None:
    """It need not wait for the end of its time."""
    with running(BEGIN + WATCH + "done.wait(); sys.exit(7)") as child:
        assert next(child.reports) == {"event": "watching"}
        os.close(child.lifeline_fd)
        assert child.process.wait(2) == 7
        assert child.process.stdout is not None
        assert child.process.stdout.read() == b"orphaned\n"


def test_a_callback_that_fails_does_not_keep_an_orphan() -> None:
    """Its loop may be closed already; the process leaves all the same."""
    code = BEGIN + "child.watch(print, lambda: 1 / 0)\nchild.report({})\nsys.stdin.readline()"
    with running(code) as child:
        assert next(child.reports) == {}
        os.close(child.lifeline_fd)
        assert child.process.wait(6) == EXIT_ORPHANED
        assert child.process.stderr is not None
        assert b"ZeroDivisionError" in child.process.stderr.read()


def test_stacks_are_printed_on_a_signal() -> None:
    """SIGUSR1 prints the stacks of all threads, and the process goes on."""
    with running(BEGIN + WATCH + "def waiting_here():\n    done.wait()\nwaiting_here()") as child:
        assert next(child.reports) == {"event": "watching"}
        child.process.send_signal(signal.SIGUSR1)
        os.write(child.lifeline_fd, b"d")
        assert child.process.wait(5) == 0
        assert child.process.stderr is not None
        stacks = child.process.stderr.read()
        assert b"_follow" in stacks
        assert b"most recent call first" in stacks


def test_beats_go_to_the_row_of_the_child() -> None:
    """With the clock of the machine, or the instant that is handed in."""
    with running(BEGIN + "child.beat(12.5)\nchild.report({})\nsys.stdin.readline()") as child:
        assert next(child.reports) == {}
        assert child.board.read(1) == 12.5
        assert child.board.read(0) == 0.0


def test_reports_are_bounded_and_need_no_supervisor() -> None:
    """One that is too long is an error of the caller; one that nobody reads is none."""
    lifeline, ours = os.pipe()
    reading, status = os.pipe()
    board = Board.create(1)
    child = Child(ChildSpec("worker", "test", 0, lifeline, status, os.dup(board.fd), 0, LaunchPlan("/data", "/logs")))
    with pytest.raises(ValueError, match="over the bound"):
        child.report({"event": "x" * LONGEST_REPORT_BYTES})
    os.close(reading)
    child.report({"event": "ready"})
    child.board.close()
    board.close()
    for fd in (lifeline, ours, status):
        os.close(fd)


def test_log_lines_look_like_the_supervisors() -> None:
    """One clock and one shape for all processes, whatever the time zone: JSON, or text if the plan says so."""
    code = (
        "import logging, sys; from llm_router.processes.child import log_to_stderr as go; "
        "from llm_router.processes.plan import LaunchPlan; "
        "go('control', LaunchPlan('', '', console=sys.argv[1], log_level='debug', environment='test')); "
        "logging.getLogger('llm_router.cache').debug('x'); logging.getLogger('library').debug('y')"
    )
    env = {**os.environ, "TZ": "America/New_York"}
    before = datetime.now(UTC).replace(microsecond=0)
    run = partial(subprocess.run, env=env, capture_output=True, text=True, check=True)
    stamp, _, rest = run([sys.executable, "-c", code, "text"]).stderr.partition(" ")
    assert rest == "control: DEBUG llm_router.cache: x\n"
    entry = json.loads(run([sys.executable, "-c", code, "auto"]).stderr)
    assert (entry["process"], entry["message"], entry["env"]) == ("control", "x", "test")
    for shown in (stamp, entry["@timestamp"]):
        assert shown.endswith("Z")
        assert before <= datetime.fromisoformat(shown) <= datetime.now(UTC)
