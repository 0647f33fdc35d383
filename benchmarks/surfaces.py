"""What logs, traces and health checks cost a request: the gateway with all of them takes turns with itself without.

On is what a user gets, with one trace in a hundred exported to a collector, and with files so small that each turn pays
its part of rotating and compressing them; metrics are counted in both. The gateway as it was before there were any of
these takes turns too, since switches that are off are not free either. CPU is that of the whole process tree until it is
idle again, so writer threads and control count. What each component says it used is read from the gateway's own account.
Not for: what single pieces cost (pieces.py).
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import processes
from benchmarks.accounts import NotThere, earlier
from benchmarks.contenders import Gateway, gateway, started
from benchmarks.measure import Measured, Plan, settled_load, warm_up

ON: Final = "gateway, logs and traces"
OFF: Final = "gateway, neither"
BEFORE: Final = "gateway, before logs"

BEFORE_COMMIT: Final = "d18369c"
"""The last commit without logs, traces and health checks."""

LINES_PER_S: Final = 20_000
"""What one process must write without a drop: two lines of each request."""

LOAD: Final = "plain.32"
OWN: Final = f"{LOAD}.own_us"
"""Followed by a dot and the component: what the gateway says it used, in microseconds of a request."""

_CONNECTIONS: Final = 32
_WRITTEN_S: Final = 2.0  # within which every line is written and every trace is with control
_COMPONENT: Final = re.compile(rb'llm_router_monitoring_cpu_seconds_total\{component="([a-z]+)"\} (\S+)')
_DROPPED: Final = re.compile(rb'llm_router_(?:log|spans|facts)_dropped_total\{reason="[a-z-]+"\} (\S+)')


class Written(NamedTuple):
    """What became of a steady stream of lines.

    Args:
        lines: that were wanted in `seconds`, and `written` of them; `dropped` were lost.
        longest: lines' requests that waited at most.
        writer_us: CPU microseconds of the writer's thread for one line.
        bytes_each: of one request, in both files.
    """

    lines: int
    seconds: float
    written: int
    dropped: int
    longest: int
    writer_us: float
    bytes_each: float


def settings_on(collector: str) -> dict[str, object]:
    """Everything, as it comes; traces go to `collector`."""
    return {
        "logs": {"max_file": "16MiB"},  # several rotations in each turn, none left over for the next one
        "tracing": {"sample_ratio": 0.01, "endpoint": collector},
    }


def settings_off() -> dict[str, object]:
    """Nothing of it; what was there before stays."""
    return {
        "logs": {"access": False, "level": "critical", "metrics_interval": 0},
        "tracing": {"enabled": False},
        "health": {"enabled": False},
        "alerting": {"enabled": False},
    }


def measure(
    before: str, backend_port: int, plan: Plan, folder: Path, say: Callable[[str], None]
) -> tuple[Measured, str]:
    """Plain requests at 32 connections, contenders in turn.

    Args:
        before: the commit to compare with.

    Returns: the figures by contender, and why there is nothing to compare with (empty if there is).
    Raises: RuntimeError when a request was refused, or a line or span was lost.
    """
    measured, missing = Measured(), ""
    with contextlib.ExitStack() as stack:
        collector = stack.enter_context(_collector())
        contenders = [
            gateway(backend_port, folder, name=ON, settings=settings_on(collector)),
            gateway(backend_port, folder, name=OFF, settings=settings_off()),
        ]
        try:
            contenders.append(earlier(before, backend_port, folder, name=BEFORE))
        except NotThere as error:
            missing = str(error)
            say(missing)
        running = []
        for contender in contenders:
            say(f"starting {contender.name}")
            running.append((contender, stack.enter_context(started(contender, cpu=plan.contender_cpu, folder=folder))))
            warm_up(contender, plan)
        requests = 0
        for number in range(1, plan.rounds + 1):
            say(f"logs and traces: round {number} of {plan.rounds}")
            for contender, pid in running[:: 1 if number % 2 else -1]:
                answered = _turn(measured, contender, pid, plan)
                requests += answered if contender.name == ON else 0
        _check_written(contenders[0], requests)
        measured.resident = {
            contender.name: processes.resident_by_role(processes.use(pid), contender.role) for contender, pid in running
        }
    return measured, missing


def lines_written(cpu: int, seconds: float, lines_per_s: int = LINES_PER_S) -> Written:
    """Offers that many lines a second to the log writer, in a process on that CPU. Raises RuntimeError if that fails."""
    command = (
        "taskset", "-c", str(cpu), sys.executable, "-m", "benchmarks.pieces", "--only-lines",
        "--seconds", str(seconds), "--lines", str(lines_per_s), "--json", "/dev/stdout",
    )  # fmt: skip
    environment = {"PYTHONPATH": f"{processes.own_folder()}:{processes.own_folder() / 'src'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=processes.own_folder()
    )
    if done.returncode:
        raise RuntimeError(f"the lines were not written: {done.stderr.strip()[-500:]}")
    return Written(**json.loads(done.stdout)["lines"])


def components(measured: Measured) -> list[str]:
    """Those on whose account something stands, the most expensive first."""
    prefix = f"{OWN}."
    names = [key.removeprefix(prefix) for key in measured.figures.get(ON, {}) if key.startswith(prefix)]
    return sorted(names, key=lambda name: -measured.estimate(ON, prefix + name).median)


def _turn(into: Measured, contender: Gateway, root: int, plan: Plan) -> int:
    """The number of requests that were answered."""
    processes.settle(root)
    said = _own_account(contender)
    load = settled_load(into, contender, root, plan, key=LOAD, connections=_CONNECTIONS, after_s=_WRITTEN_S)
    for component, seconds in _own_account(contender).items():
        used_us = (seconds - said.get(component, 0.0)) / max(load.requests, 1) * 1e6
        into.add(contender.name, f"{OWN}.{component}", used_us)
    return load.requests


def _metrics(contender: Gateway) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{contender.metrics_port}/metrics", timeout=10) as reply:
        body: bytes = reply.read()
    return body


def _own_account(contender: Gateway) -> dict[str, float]:
    """CPU seconds by component; nothing for a gateway that keeps no such account."""
    return {name.decode(): float(value) for name, value in _COMPONENT.findall(_metrics(contender))}


def _check_written(contender: Gateway, requests: int) -> None:
    """Raises RuntimeError unless every request has its line, and nothing was dropped."""
    lost = sum(float(value) for value in _DROPPED.findall(_metrics(contender)))
    if lost:
        raise RuntimeError(f"{contender.name}: {lost:.0f} lines, spans or facts were dropped")
    lines = count_lines(log_folder(contender), "access")
    if lines < requests:
        raise RuntimeError(f"{contender.name}: {requests} requests, but {lines} lines in its access logs")


def log_folder(contender: Gateway) -> Path:
    """Where it writes its logs."""
    return Path(contender.command[contender.command.index("--data-dir") + 1]) / "logs"


def count_lines(folder: Path, name: str) -> int:
    """Lines of a log, those of its rotated files included."""
    count = 0
    for path in sorted(folder.glob(f"{name}*.log*")):
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                count += sum(1 for _ in packed)
        elif path.suffix == ".log":
            with path.open("rb") as file:
                count += sum(1 for _ in file)
    return count


class _Collector(http.server.BaseHTTPRequestHandler):
    """Takes every export and looks at none."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _collector() -> Iterator[str]:
    """A place for traces, on the load's CPU; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="collector")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
