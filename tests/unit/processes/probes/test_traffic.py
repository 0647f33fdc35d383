"""Traffic by backend, read from the metrics; and many probes in bounded time."""

from __future__ import annotations

import asyncio
import functools

from llm_router import families
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.processes.probes.rounds import in_turn
from llm_router.processes.probes.traffic import FAMILIES, NO_TRAFFIC, Since, Traffic, traffic_in
from support.aio import run


def test_traffic_is_read_from_the_counters_of_all_workers() -> None:
    """Success, and faults of provider and network; what callers did wrong says nothing against a backend."""
    segments = [Segment.private(f"worker-{number}") for number in range(2)]
    for segment in segments:
        writer = Writer(segment, families.FAMILIES)
        for outcome, count in (("success", 5), ("provider", 2), ("network", 1), ("caller", 9), ("cancelled", 4)):
            writer.counter(families.ATTEMPTS, "openai", outcome).inc(count)
        writer.gauge(families.UPSTREAM_IN_FLIGHT, "openai").set(3)
        writer.gauge(families.UPSTREAM_IN_FLIGHT, "quiet").set(0)
    found = traffic_in(Reader(segments, FAMILIES).collect())
    assert found == {"openai": Traffic(10, 6, 6), "quiet": NO_TRAFFIC}
    assert found == traffic_in(Reader(segments, families.FAMILIES).collect())


def test_traffic_since_the_last_look() -> None:
    """Nothing at the first; counters that began again count from 0."""
    now = {"a": Traffic(100, 10, 1)}
    since = Since(lambda: now)
    assert since.look() == {"a": Traffic(0, 0, 1)}
    now = {"a": Traffic(103, 11, 0), "new": Traffic(2, 0, 0)}
    assert since.look() == {"a": Traffic(3, 1, 0), "new": Traffic(2, 0, 0)}
    now = {"a": Traffic(1, 0, 0)}
    assert since.look() == {"a": Traffic(1, 0, 0)}


def test_when_a_backend_is_failing() -> None:
    """More than half of its attempts; none is no evidence."""
    assert [Traffic(*counts).is_failing for counts in ((0, 0), (1, 1), (1, 2), (0, 1))] == [False, False, True, True]


def test_jobs_run_a_few_at_once() -> None:
    """In their order, each once."""

    async def scene() -> None:
        running = most = 0
        done: list[int] = []

        async def job(number: int) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done.append(number)

        await in_turn((functools.partial(job, number) for number in range(10)), at_once=3, for_s=60.0)
        assert (most, sorted(done)) == (3, list(range(10)))

    run(scene())


def test_no_job_begins_when_time_is_up() -> None:
    """Those that run may end."""

    async def scene() -> None:
        done: list[int] = []

        async def job(number: int) -> None:
            await asyncio.sleep(0.02)
            done.append(number)

        await in_turn((functools.partial(job, number) for number in range(100)), at_once=2, for_s=0.01)
        assert done == [0, 1]

    run(scene())
