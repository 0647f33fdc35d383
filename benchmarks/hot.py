"""Where the CPU goes: holds a contender under a steady load and records one of its processes with perf or py-spy.

`python -m benchmarks.hot` prints the hottest functions of the gateway's worker; `--contender nginx` shows what the
kernel alone takes. perf (Debian: linux-perf) sees kernel and C but no Python names; py-spy (PyPI) sees Python lines
and is used when `--py-spy` names it. Not for: figures to compare, since recording itself takes time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from benchmarks import processes, streams, wrk
from benchmarks.backend import MODEL
from benchmarks.contenders import Contender, backend, gateway, nginx, started


def _hold(contender: Contender, seconds: float, cpu: int, *, paced: bool) -> None:
    if not paced:
        wrk.load(contender.url, connections=32, seconds=seconds, cpu=cpu, model=MODEL, headers=contender.headers)
        return
    each = max(1, round(seconds * 2))  # a paced stream takes half a second
    streams.measure(
        contender.url, connections=50, each=each, paced=True, cpu=cpu, model=MODEL, headers=contender.headers
    )


def _python_functions(pid: int, seconds: float, py_spy: str, folder: Path) -> str:
    """Share of samples by function: with what it calls, and by itself. Time in the kernel is booked on its caller."""
    target = folder / "profile.txt"
    # Without --nonblocking the stops of ptrace fall on system calls, which then seem to take most of the time.
    command = [
        py_spy, "record", "--pid", str(pid), "--duration", f"{seconds:.0f}", "--rate", "400", "--format", "raw",
        "--nonblocking", "--function", "--output", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for line in target.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        functions = stack.split(";")
        own[functions[-1]] += int(count)
        within.update(dict.fromkeys(functions, int(count)))
    total = own.total() or 1
    rows = [f"{within[name] / total:7.1%} {count / total:7.1%}  {name}" for name, count in own.most_common(40)]
    return "\n".join([" within     own  function", *rows])


def _record(pid: int, seconds: float, py_spy: str, folder: Path) -> str:
    if py_spy:
        return _python_functions(pid, seconds, py_spy, folder)
    perf = shutil.which("perf")
    if perf is None:
        raise SystemExit("neither perf (Debian: linux-perf) nor --py-spy PATH: nothing to record with")
    data = folder / "perf.data"
    record = [perf, "record", "--quiet", "--output", str(data), "--pid", str(pid), "--", "sleep", f"{seconds:.0f}"]
    subprocess.run(record, check=True, stdout=subprocess.DEVNULL)
    parts = []
    for sort, limit in (("dso", "1"), ("dso,symbol", "0.5")):
        shown = subprocess.run(
            [perf, "report", "--stdio", "--input", str(data), "--sort", sort, "--percent-limit", limit],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = (line.rstrip() for line in shown.stdout.splitlines())
        parts.append("\n".join(line for line in lines if line and not line.startswith("#")))
    return "\n\n".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hot", description=__doc__)
    parser.add_argument("--contender", choices=("gateway", "nginx"), default="gateway")
    parser.add_argument("--role", default="worker", help="which of its processes (default: %(default)s)")
    parser.add_argument("--paced", action="store_true", help="50 paced streams in place of plain requests")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--py-spy", default="", metavar="PATH", help="record Python lines with this program")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    first, second = cpus[0], cpus[-1]
    os.sched_setaffinity(0, {second})
    folder = Path(tempfile.mkdtemp(prefix="bench-hot-"))
    with backend(cpu=second, folder=folder) as (port, _):
        contender = gateway(port, folder) if options.contender == "gateway" else nginx(port, folder)
        with started(contender, cpu=first, folder=folder) as root:
            pids = [use.pid for use in processes.use(root).values() if contender.role(use.command) == options.role]
            if not pids:
                sys.exit(f"{contender.name} has no process {options.role!r}")
            load = threading.Thread(target=lambda: _hold(contender, options.seconds + 2, second, paced=options.paced))
            load.start()
            try:
                print(_record(pids[0], options.seconds, options.py_spy, folder))
            finally:
                load.join()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
