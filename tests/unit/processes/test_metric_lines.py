"""Lines of metrics.log: what was counted since the last ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from llm_router import families
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.metrics.slots import Collected, Reader, Segment, Writer
from llm_router.processes.metric_lines import MetricLine, MetricLines
from support.aio import run


class Counted:
    """Metrics of one process, and the lines about them."""

    def __init__(self) -> None:
        self.segment = Segment.private()
        self.writer = Writer(self.segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self.written: list[tuple[str, float, Mapping[str, str]]] = []
        self.lines = MetricLines(lambda name, value, labels: self.written.append((name, value, labels)))

    def collect(self) -> Collected:
        return Reader([self.segment], families.FAMILIES).collect()

    def since(self) -> list[MetricLine]:
        return list(self.lines.since(self.collect()))


def test_the_first_look_says_nothing() -> None:
    """What was counted before may be hours old."""
    counted = Counted()
    counted.writer.counter(families.TOKENS_GENERATED, "m", "balanced").inc(5)
    assert counted.since() == []


def test_sums_and_means_are_of_the_time_since_the_last_lines() -> None:
    counted = Counted()
    tokens = counted.writer.counter(families.TOKENS_GENERATED, "m", "balanced")
    took = counted.writer.histogram(families.INFERENCE_DURATION, "m", "balanced")
    tokens.inc(100)
    took.observe(9.0)
    counted.since()
    tokens.inc(7)
    took.observe(0.25)
    took.observe(0.75)
    labels = {"model": "m", "strategy": "balanced"}
    assert counted.since() == [("tokens_generated", 7.0, labels), ("inference_latency", 500.0, labels)]
    assert counted.since() == []


def test_a_series_that_is_new_counts_whole() -> None:
    counted = Counted()
    counted.since()
    counted.writer.counter(families.ERRORS, "timeout", "backend", "error").inc(2)
    assert counted.since() == [("errors", 2.0, {"type": "timeout", "component": "backend", "severity": "error"})]


def collections(interval_s: float, seconds: int) -> int:
    """How often the metrics are collected in so many seconds."""
    counted, collected, slept = Counted(), 0, 0.0

    def collect() -> Collected:
        nonlocal collected
        collected += 1
        return counted.collect()

    async def sleep(wait_s: float) -> None:
        nonlocal slept
        slept += wait_s
        if slept > seconds:
            raise asyncio.CancelledError

    async def watch() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await MetricLines(lambda name, value, labels: None, sleep=sleep).run(
                collect, lambda: LogSettings(metrics_interval_s=interval_s)
            )

    run(watch())
    return collected


def test_metrics_are_collected_at_the_interval_and_never_at_none() -> None:
    """Once at the beginning, to know what there was."""
    assert collections(10.0, 35) == 4
    assert collections(0, 35) == 0
