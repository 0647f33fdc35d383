"""Real processes that write and read metric segments, and what their totals must be.

A writer performs `operations(seed, n)` and acknowledges each with a byte on stdout, so whoever kills it
knows what it had done, but for the one operation in hand. Values are multiples of 1/8, so sums of
float64 are exact in any order.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llm_router.observe.metrics.slots import Collected, Reader, Segment, Writer
from llm_router.signals import Family

REQUESTS = Family("requests_total", "counter", ("model", "status"), "Requests.", cap=200)
SECONDS = Family("seconds", "histogram", ("model",), "Seconds.", (0.5, 1.0, 2.0), "seconds", 200)
OPEN = Family("open", "gauge", ("worker",), "Open requests.")
DROPPED = Family("dropped_total", "counter", ("family",), "Refused label sets.")
FAMILIES = (REQUESTS, SECONDS, OPEN, DROPPED)

Totals = dict[tuple[str, ...], float]
"""(family, part, label values...) -> total; the parts of a histogram are its bucket numbers and `sum`."""


class Operation(NamedTuple):
    """One thing that a writer does."""

    kind: str
    labels: tuple[str, ...]
    value: float


def operations(seed: int, n: int) -> Iterator[Operation]:
    """Counting and observing, with ever new label sets, the same for the same seed."""
    source = random.Random(seed)
    for _ in range(n):
        model = f"model-{source.randrange(40)}"
        if source.random() < 0.5:
            yield Operation("count", (model, source.choice(("success", "error"))), source.randrange(1, 9) / 8)
        else:
            yield Operation("observe", (model,), source.randrange(0, 32) / 8)


def totals_of(done: Iterator[Operation]) -> Totals:
    """What a plain dict makes of the operations."""
    totals: Totals = defaultdict(float)
    for kind, labels, value in done:
        if kind == "count":
            totals[REQUESTS.name, "value", *labels] += value
        else:
            bucket = sum(value > bound for bound in SECONDS.buckets)
            totals[SECONDS.name, str(bucket), *labels] += 1
            totals[SECONDS.name, "sum", *labels] += value
    return {key: value for key, value in totals.items() if value}


def totals_read(collected: Collected) -> Totals:
    """The same from what a reader collected."""
    totals: Totals = {}
    for row in collected.rows(REQUESTS):
        totals[REQUESTS.name, "value", *row.labels] = row.values[0]
    for row in collected.rows(SECONDS):
        for number, value in enumerate(row.values):
            part = str(number) if number <= len(SECONDS.buckets) else "sum"
            totals[SECONDS.name, part, *row.labels] = value
    return {key: value for key, value in totals.items() if value}


def added(*parts: Totals) -> Totals:
    """The sum of totals."""
    result: Totals = defaultdict(float)
    for part in parts:
        for key, value in part.items():
            result[key] += value
    return dict(result)


def start(role: str, segments: list[Segment], **arguments: int) -> subprocess.Popen[bytes]:
    """A process of its own; a writer gets one segment, a reader all of them."""
    root = Path(__file__).parents[2]
    fds = [segment.fd for segment in segments]
    return subprocess.Popen(
        [sys.executable, "-m", "support.slot_processes", role, json.dumps({"fds": fds, **arguments})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests'}"},
    )


def _write(fd: int, seed: int, n: int) -> None:
    writer = Writer(Segment.attach(fd, writable=True), FAMILIES, dropped=DROPPED)
    writer.gauge(OPEN, "w").set(1.0)
    for kind, labels, value in operations(seed, n):
        if kind == "count":
            writer.counter(REQUESTS, *labels).inc(value)
        else:
            writer.histogram(SECONDS, *labels).observe(value)
        os.write(1, b".")


def _read(fds: list[int]) -> None:
    """Collect until stdin closes; report on stdout what was wrong, and how often was collected."""
    reader = Reader([Segment.attach(fd, writable=False) for fd in fds], FAMILIES)
    faults: list[str] = []
    before: Totals = {}
    rounds = 0
    os.write(1, b"reading\n")
    while True:
        collected = reader.collect()
        now = totals_read(collected)
        faults += [
            f"{key} went from {value} to {now.get(key)}" for key, value in before.items() if now.get(key, 0) < value
        ]
        faults += [f"unknown label set {key}" for key in now if not key[2].startswith("model-")]
        before = now
        rounds += 1
        if select.select([0], [], [], 0)[0]:
            break
    os.write(1, json.dumps({"faults": faults[:10], "rounds": rounds}).encode())


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    if sys.argv[1] == "write":
        _write(arguments["fds"][0], arguments["seed"], arguments["n"])
    else:
        _read(arguments["fds"])
