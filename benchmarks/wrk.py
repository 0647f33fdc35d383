"""Plain requests: wrk posting a 2 kB chat request over a fixed number of keep-alive connections, as fast as it gets answers.

Not for: streams (streams.py), since wrk cannot see inside a reply.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

REQUEST_BYTES: Final = 2048
_SCRIPT: Final = Path(__file__).with_name("chat.lua")


class Load(NamedTuple):
    """Outcome of one run. Times in microseconds; `errors` counts refused, broken, late and non-2xx answers."""

    requests: int
    duration_s: float
    p50_us: float
    p99_us: float
    errors: int

    @property
    def per_second(self) -> float:
        """Requests answered per second."""
        return self.requests / self.duration_s


def load(url: str, *, connections: int, seconds: float, cpu: int, model: str, headers: Mapping[str, str]) -> Load:
    """Runs wrk for about `seconds` (at least 1, whole) pinned to `cpu`. Raises RuntimeError when wrk itself fails."""
    command = [
        "taskset", "-c", str(cpu), "wrk", "--threads", "1", "--connections", str(connections),
        "--duration", f"{max(1, round(seconds))}s", "--timeout", "30s", "--script", str(_SCRIPT), url, "--",
        model, str(REQUEST_BYTES), *(f"{name}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 90)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"wrk left with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    found = json.loads(lines[-1])
    errors = sum(found[f"{kind}_errors"] for kind in ("connect", "read", "write", "status")) + found["timeouts"]
    return Load(found["requests"], found["duration_us"] / 1e6, found["p50_us"], found["p99_us"], errors)
