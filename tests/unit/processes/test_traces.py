"""Traces that workers tell are kept and exported as the settings of the moment say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from llm_router.observe.meter import Meter
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.processes.snapshot import TraceBatch
from llm_router.processes.traces import Traces
from support.aio import run
from support.collector import Collector, running
from support.net import free_port
from support.traces import trace


class Site:
    """Traces, and what was said of them."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self.meter = Meter(lambda component, seconds: None)
        self.traces = Traces(environment="test", meter=self.meter, on_dropped=self._lose)

    def _lose(self, reason: str, spans: int) -> None:
        self.lost[reason] += spans

    def kept(self) -> int | None:
        return None if self.traces.store is None else self.traces.store.statistics().traces

    def apply(self, endpoint: str = "", *, enabled: bool = True) -> None:
        self.traces.apply(TracingSettings(enabled=enabled, endpoint=endpoint), close_s=5.0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running() as made:
        yield made


def test_they_are_kept_as_long_as_tracing_is_on() -> None:
    """An exporter is not needed for that."""

    async def main() -> None:
        site = Site()
        site.traces.take(TraceBatch((trace(),)))
        assert site.kept() is None
        site.apply()
        site.traces.take(TraceBatch((trace(), trace())))
        assert site.kept() == 2
        site.apply(enabled=False)
        assert site.kept() is None
        await site.traces.aclose(1.0)

    run(main())


def test_what_waits_for_a_former_collector_still_reaches_it(collector: Collector) -> None:
    """Though settings change before it was sent, and control ends at once."""

    async def main() -> None:
        site = Site()
        with running() as second:
            site.apply(collector.url)
            site.traces.take(TraceBatch((trace(),)))
            site.apply(second.url)
            site.traces.take(TraceBatch((trace(),)))
            await site.traces.aclose(5.0)
            assert (len(collector.exports), len(second.exports)) == (1, 1)
        assert site.lost.total() == 0

    run(main())


def test_spans_that_are_lost_at_an_exporters_end_are_counted_once() -> None:
    """Whether settings changed or control ends; `tick` has nothing to add."""

    async def main() -> None:
        site = Site()
        nobody = f"http://127.0.0.1:{free_port()}/v1/traces"
        for _ in range(3):
            site.apply(nobody)
            site.traces.take(TraceBatch((trace(),)))
            site.traces.tick()
        await site.traces.aclose(5.0)
        site.traces.tick()
        assert site.lost == {"export-failed": 3, "queue-full": 0, "export-refused": 0}

    run(main())


def test_exporters_that_ended_leave_nothing_to_be_asked(collector: Collector) -> None:
    """A router that is reloaded every minute must not keep an account of each."""

    async def main() -> None:
        site = Site()
        for _ in range(4):
            site.apply(collector.url)
        await site.traces.aclose(5.0)
        assert not site.meter._watched

    run(main())
