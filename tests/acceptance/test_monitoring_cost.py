"""What monitoring says it costs is what the operating system says the processes used, and what waits in its queues.

How much it costs is measured by `python -m benchmarks --surfaces`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from llm_router.families import INTERNAL_QUEUES, MONITORING_COMPONENTS
from llm_router.testing import ScriptedBackend
from support.callers import chat, crowd, statuses
from support.net import free_port
from support.serving import Serving, remote_config
from support.wait import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="threads' CPU is read from /proc"),
]

CPU: str = "llm_router_monitoring_cpu_seconds_total"
QUEUE: str = "llm_router_internal_queue_size"

WITHIN = 0.1
"""How far the components may be from what was used."""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One worker; every trace is kept, for a collector that is away."""
    more = f"tracing: {{sample_ratio: 1, endpoint: 'http://127.0.0.1:{free_port()}/v1/traces'}}\n"
    with ScriptedBackend() as backend:
        config = remote_config(backend.base_url, extra=more)
        with Serving(tmp_path_factory.mktemp("cost"), config) as serving:
            yield serving


class Used(NamedTuple):
    """CPU seconds since the start: by component as told, and as the system has it.

    Args:
        control, worker: of these processes.
        writer: of the worker's threads but the one that serves.
    """

    told: Mapping[str, float]
    control: float
    worker: float
    writer: float

    @classmethod
    def now(cls, serving: Serving) -> Self:
        """Once the router is at rest, so that what was used is also told."""
        children = serving.children()
        control, worker = children["control"], children["worker-0"]

        def told() -> dict[str, float]:
            scrape = serving.scrape()
            return {component: scrape.total(CPU, component=component) for component in MONITORING_COMPONENTS}

        before, seen_at = _cpu_s(worker), time.monotonic()

        def is_at_rest() -> bool:
            nonlocal before, seen_at
            used = _cpu_s(worker)
            if used > before:
                before, seen_at = used, time.monotonic()
            return time.monotonic() - seen_at > 0.3  # three of its ticks

        until(is_at_rest, 10.0, "rest")
        return cls(told(), _cpu_s(control), _cpu_s(worker), _threads_s(worker))

    def since(self, before: Used) -> Used:
        """What was used in between."""
        told = {component: spent - before.told[component] for component, spent in self.told.items()}
        return Used(told, self.control - before.control, self.worker - before.worker, self.writer - before.writer)


def _cpu_s(pid: int) -> float:
    """Of a process with all its threads, also those that have ended; to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _threads_s(pid: int) -> float:
    """Of the threads of a process that are there now, without the first; to the nanosecond."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if task.name != str(pid):
            with contextlib.suppress(FileNotFoundError):
                spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def test_the_components_add_up_to_what_control_used(serving: Serving) -> None:
    """While workers are idle all of it is control's: scrapes, reports, pages, checks."""
    before = Used.now(serving)
    while _cpu_s(serving.children()["control"]) < before.control + 1.2:
        for path in ("/metrics", "/health", "/debug"):
            serving.get(path)
    used = Used.now(serving).since(before)
    assert sum(used.told.values()) == pytest.approx(used.control, rel=WITHIN)
    assert used.told["metrics"] > 0.1
    assert used.told["other"] > 0.1
    assert used.told["profiler"] == used.told["alerting"] == 0, "what is off costs nothing"
    assert used.worker < 0.2 * used.control


def test_the_components_add_up_while_requests_are_served(serving: Serving) -> None:
    """The threads that write logs are among them, and what recording takes in the workers, but not serving itself."""
    before = Used.now(serving)
    assert statuses(crowd(1500, lambda _: chat(serving.port), 4)) == {200: 1500}
    used = Used.now(serving).since(before)
    inside = used.told["recording"] + used.writer  # of the worker, but for making traces
    total = sum(used.told.values())
    tolerance = WITHIN * total + 0.02
    # What is left is the worker's part of `traces`; the rest of that is in control, and in what control used.
    assert -tolerance <= total - used.control - inside <= used.told["traces"] + tolerance
    assert used.told["logs"] >= used.writer * (1 - WITHIN)
    assert used.told["logs"] == pytest.approx(used.writer, rel=0.25, abs=0.01), "control writes next to nothing"
    assert used.told["traces"] > 0
    assert 2e-6 < used.told["recording"] / 1500 < 200e-6
    assert inside < 0.5 * used.worker


def test_what_waits_is_told_by_queue(serving: Serving) -> None:
    """Rows that the database does not take, spans that the collector does not take; and nothing when all is well."""

    def waiting() -> dict[str, float]:
        return {labels["queue"]: value for name, labels, value in serving.scrape().samples if name == QUEUE}

    assert waiting().keys() == set(INTERNAL_QUEUES)
    until(lambda: waiting()["usage"] == waiting()["log"] == waiting()["fact"] == 0, what="rest")
    database = sqlite3.connect(serving.folder / "data" / "accounts.db", isolation_level=None)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        assert statuses(crowd(5, lambda _: chat(serving.port))) == {200: 5}
        until(lambda: waiting()["usage"] >= 5, what="rows to wait")
        database.execute("ROLLBACK")
    until(lambda: waiting()["usage"] == 0, what="the rows to be stored")
    assert waiting()["span"] > 0, "the collector is away"
