"""Starts what is measured, pinned to a CPU, and reads from /proc what its process tree used. Linux only.

CPU time is utime + stime as the kernel accounts it to each process, in clock ticks (10 ms): enough for runs of
seconds, and the only figure that is the same for a C, Rust, Node and Python program.
Not for: restarting or supervising; a process that dies while it is measured is an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")
Role = Callable[[str], str]


class StartFailed(Exception):
    """A program did not come up; the message ends with the last lines that it printed."""


def free_port() -> int:
    """A loopback TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def own_folder() -> Path:
    """The repository's root, from where modules of `benchmarks` are started."""
    return Path(__file__).resolve().parent.parent


class ProcessUse(NamedTuple):
    """One process at one moment. `resident_bytes` includes pages shared with other processes."""

    pid: int
    command: str
    cpu_s: float
    resident_bytes: int


def _children_by_parent() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
                # The command name in parentheses may itself contain spaces and parentheses.
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    return children


def tree(root: int) -> list[int]:
    """`root` and all its descendants that are alive."""
    children = _children_by_parent()
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def use(root: int) -> dict[int, ProcessUse]:
    """What each process of the tree has used since it was started."""
    page = os.sysconf("SC_PAGE_SIZE")
    result = {}
    for pid in tree(root):
        with contextlib.suppress(OSError):
            folder = Path("/proc", str(pid))
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            # Fields 14, 15 and 24 of proc(5), counted from 1; the split begins with field 3.
            cpu_s = (int(fields[11]) + int(fields[12])) * TICK_S
            result[pid] = ProcessUse(pid, command, cpu_s, int(fields[21]) * page)
    return result


def cpu_by_role(before: Mapping[int, ProcessUse], after: Mapping[int, ProcessUse], role: Role) -> dict[str, float]:
    """CPU seconds between two readings, by role. Raises RuntimeError when a process left in between."""
    left = [before[pid].command for pid in before.keys() - after.keys()]
    if left:
        raise RuntimeError(f"left while it was measured: {left}")
    spent: dict[str, float] = {}
    for pid, now in after.items():
        then = before[pid].cpu_s if pid in before else 0.0
        name = role(now.command)
        spent[name] = spent.get(name, 0.0) + now.cpu_s - then
    return spent


def resident_by_role(reading: Mapping[int, ProcessUse], role: Role) -> dict[str, int]:
    """Resident bytes by role, the sum where several processes have the same one."""
    held: dict[str, int] = {}
    for process in reading.values():
        name = role(process.command)
        held[name] = held.get(name, 0) + process.resident_bytes
    return held


def answers(url: str, headers: Mapping[str, str]) -> bool:
    """Whether a GET of `url` is answered with 200 now."""
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    cpu: int,
    log: Path,
    ready_url: str,
    environment: Mapping[str, str] | None = None,
    ready_within_s: float = 30.0,
    poll_s: float = 0.02,
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts `command` on one CPU, waits until `ready_url` answers 200, and ends its whole tree on leaving.

    Args:
        cpu: the CPU that the tree is pinned to; -1 leaves it free.
        log: where its output goes.
        environment: the whole environment; None passes ours on.
    Raises: StartFailed.
    """
    pinned = ["taskset", "-c", str(cpu), *command] if cpu >= 0 else list(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            pinned, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + ready_within_s
        while not answers(ready_url, {}):
            if process.poll() is not None:
                raise StartFailed(f"{command[0]} left with {process.returncode}: {_tail(log)}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{command[0]} was not ready within {ready_within_s:g} s: {_tail(log)}")
            time.sleep(poll_s)
        yield process
    finally:
        _end(process)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-6:])[-800:] or "it printed nothing"


def _began(pid: int) -> int:
    """When the process was started, in ticks since boot: with its id, what identifies a process. 0 when it is gone."""
    with contextlib.suppress(OSError):
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the tree's root to leave, then kills what is left of the tree."""
    members = {pid: _began(pid) for pid in tree(process.pid)}
    thaw(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for pid, began in members.items():
        if began and _began(pid) == began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def settle(root: int, within_s: float = 20.0) -> None:
    """Waits until the tree is idle: what is left of an overload would be booked on whatever is measured next."""
    deadline = time.monotonic() + within_s
    spent = -1.0
    while time.monotonic() < deadline:
        now = sum(process.cpu_s for process in use(root).values())
        if now - spent <= TICK_S:
            return
        spent = now
        time.sleep(0.1)


def move(root: int, cpu: int) -> None:
    """Pins every thread of the tree to another CPU."""
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), {cpu})


def freeze(root: int) -> None:
    """Stops every process of the tree, so that its background work disturbs nobody's turn."""
    for pid in tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def thaw(root: int) -> None:
    """Lets a frozen tree go on."""
    for pid in tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
