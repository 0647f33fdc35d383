"""What a measurement costs the request path, and a scrape: metric slots beside prometheus_client, in one run.

    python -m benchmarks.metrics [--json FILE]

Both count into shared memory (prometheus_client in its multiprocess mode, with one file per type and process)
and, for comparison, in the memory of one process. Rounds are interleaved; the smallest of each is taken, as what
disturbs a measurement only ever adds to it. The scrape is of 5,000 series in histograms, all of which changed
since the scrape before; "4 processes" holds those series four times over and sums them.
Unfair to prometheus_client: it locks, so any thread may count; our writers belong to one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_router.observe.metrics.exposition import Renderer
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.signals import Family

BUCKETS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
COUNTED = Family("bench_requests_total", "counter", ("model", "status"), "Requests.")
OBSERVED = Family("bench_duration_seconds", "histogram", ("model", "strategy"), "Seconds.", BUCKETS, "seconds")
ROWS = 417
SERIES_PER_ROW = len(BUCKETS) + 3
PROCESSES = 4
ROUNDS = 5

Costs = dict[str, float]
"""What was done -> microseconds."""


def fastest(action: Callable[[], object], times: int) -> float:
    """Microseconds of one of `times` calls, the loop's own share taken off."""

    def loop(call: Callable[[], object]) -> int:
        start = time.perf_counter_ns()
        for _ in range(times):
            call()
        return time.perf_counter_ns() - start

    gc.disable()
    try:
        empty = min(loop(_nothing) for _ in range(2))
        return max(0, loop(action) - empty) / times / 1e3
    finally:
        gc.enable()


def _nothing() -> None:
    pass


class Slots:
    """Our own, in memfd segments, one per process that would write."""

    def __init__(self, processes: int) -> None:
        self.segments = [Segment.create(f"bench-{number}") for number in range(processes)]
        self.writers = [Writer(segment, (COUNTED, OBSERVED)) for segment in self.segments]
        self.reader = Reader(self.segments, (COUNTED, OBSERVED))
        self.renderer = Renderer()
        self.children = [
            writer.histogram(OBSERVED, f"model-{number}", "round-robin")
            for writer in self.writers
            for number in range(ROWS)
        ]
        self.counter = self.writers[0].counter(COUNTED, "model-0", "success")

    def costs(self) -> Costs:
        """One round."""
        counter, histogram, writer = self.counter, self.children[0], self.writers[0]
        return {
            "inc": fastest(counter.inc, 200_000),
            "observe": fastest(lambda: histogram.observe(0.7), 200_000),
            "child by labels": fastest(lambda: writer.counter(COUNTED, "model-0", "success"), 100_000),
        }

    def scrape(self) -> float:
        """Microseconds from slots to text."""
        for number, child in enumerate(self.children):
            child.observe(number % 50)
        return fastest(lambda: self.renderer.render(self.reader.collect()), 1)


def _prometheus_client(processes: int) -> Costs:
    """One round of prometheus_client; runs in a process of its own, as its mode is fixed when it is imported."""
    import prometheus_client  # what is compared with: not needed by the rest
    from prometheus_client import multiprocess

    registry = prometheus_client.CollectorRegistry()
    own: Any = registry if processes == 1 else None
    counter = prometheus_client.Counter("bench_requests", "Requests.", ("model", "status"), registry=own)
    histogram = prometheus_client.Histogram(
        "bench_duration_seconds", "Seconds.", ("model", "strategy"), buckets=BUCKETS, registry=own
    )
    counted, observed = counter.labels("model-0", "success"), histogram.labels("model-0", "round-robin")
    costs = {
        "inc": fastest(counted.inc, 50_000),
        "observe": fastest(lambda: observed.observe(0.7), 50_000),
        "child by labels": fastest(lambda: counter.labels("model-0", "success"), 50_000),
    }
    for number in range(ROWS):
        histogram.labels(f"model-{number}", "round-robin").observe(number % 50)
    if processes > 1:
        folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        for path in list(folder.iterdir()):
            for number in range(1, processes):
                shutil.copy(path, path.with_name(f"{path.stem.rpartition('_')[0]}_{os.getpid() + number}.db"))
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    costs["scrape"] = min(fastest(lambda: prometheus_client.generate_latest(registry), 1) for _ in range(3))
    return costs


def theirs(processes: int) -> Costs:
    """A round of prometheus_client in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if processes > 1:
            environment["PROMETHEUS_MULTIPROC_DIR"] = folder
        command = [sys.executable, "-m", "benchmarks.metrics", "--theirs", str(processes)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        costs: Costs = json.loads(done.stdout)
        return costs


def compare() -> dict[str, dict[str, float]]:
    """For each line of the table: our microseconds, theirs, and how many times ours theirs are."""
    kinds = {1: "1 process", PROCESSES: f"{PROCESSES} processes"}
    mine = {processes: Slots(processes) for processes in kinds}
    best: dict[str, dict[str, float]] = {}

    def note(line: str, who: str, value: float) -> None:
        entry = best.setdefault(line, {})
        entry[who] = min(entry.get(who, value), value)

    for _ in range(ROUNDS):
        for processes, kind in kinds.items():
            ours = mine[processes].costs()
            ours["scrape"] = min(mine[processes].scrape() for _ in range(3))
            for who, costs in (("ours_us", ours), ("prometheus_client_us", theirs(processes))):
                for action, cost in costs.items():
                    note(f"{action}, {kind}", who, cost)
    for entry in best.values():
        entry["ratio"] = entry["prometheus_client_us"] / entry["ours_us"]
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Metric slots beside prometheus_client.")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--theirs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.theirs:
        print(json.dumps(_prometheus_client(arguments.theirs)))
        return
    results = compare()
    print(
        f"A scrape is of {ROWS * SERIES_PER_ROW + 1} series. Microseconds; in a process of its own memory, and in shared memory."
    )
    print(f"{'':34}{'slots':>12}{'prometheus_client':>20}{'ratio':>8}")
    for line, entry in results.items():
        print(f"{line:34}{entry['ours_us']:12.3f}{entry['prometheus_client_us']:20.3f}{entry['ratio']:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
