"""One call writes everything about a request, in the order that exemplars need, and once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_router.observe.logs.logs import Logs
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.tracing.keep import Keep
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.processes import observed as observed_module
from llm_router.processes.observed import AT_ONCE, MAX_KEPT, Observed
from llm_router.signals import RequestRecord
from llm_router.testing import RecordingRecorder


class Told(RecordingRecorder):
    """Keeps what was known of a record's trace when it was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def finish(self, record: RequestRecord, now: float) -> None:
        self.kept.append(record.kept)
        super().finish(record, now)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.inner = Told()
        self.lost = 0
        self.logs = Logs(LogSettings(), str(folder), process="worker-7", service=Service())
        self.measured = 0
        self.observed = Observed(
            self.inner,
            process="worker-7",
            logs=self.logs,
            on_dropped=self._lose,
            measure=self._measure,
            wall=lambda: 1_000_000.0,
            clock=lambda: 100.0,
        )
        self.observed.keep = Keep(TracingSettings(recent_per_s=0.0))

    def _lose(self, traces: int) -> None:
        self.lost += traces

    def _measure(self, finish: observed_module.Finish) -> Callable[[RequestRecord, float], None]:
        def measured(record: RequestRecord, now: float) -> None:
            self.measured += 1
            finish(record, now)

        return measured

    def request(self, *, sampled: bool = False, route: str = "/v1/models") -> RequestRecord:
        """One that began and ended."""
        record = RequestRecord("GET", route, "r-1", 99.5)
        record.status, record.outcome = 200, "success"
        record.trace_id, record.span_id, record.is_sampled = "ab" * 16, "cd" * 8, sampled
        self.observed.begin()
        self.observed.finish(record, 99.75)
        return record


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_what_is_kept_is_known_before_it_is_counted(scene: Scene) -> None:
    scene.request(sampled=True)
    assert scene.inner.kept == ["sampled"]


def test_a_request_is_told_once(scene: Scene) -> None:
    """However often it ends: it is counted once, logged once, and kept once."""
    record = scene.request(sampled=True)
    scene.observed.finish(record, 99.9)
    assert scene.inner.kept == ["sampled"]
    assert scene.logs.statistics().queued == 1
    assert scene.observed.waiting == 1
    assert scene.measured == 1


def test_a_trace_says_when_and_where(scene: Scene) -> None:
    scene.request(sampled=True)
    (trace,) = scene.observed.traces()
    assert (trace.process, trace.kept, trace.status) == ("worker-7", "sampled", 200)
    assert (trace.start_ns, trace.end_ns) == (999_999_500_000_000, 999_999_750_000_000)
    assert scene.observed.traces() == ()


def test_what_is_not_kept_makes_no_trace(scene: Scene) -> None:
    scene.request()  # the first of its kind
    scene.request()
    assert scene.inner.kept == ["first", ""]
    assert len(scene.observed.traces()) == 1


def test_without_tracing_nothing_is_kept(scene: Scene) -> None:
    scene.observed.keep = None
    scene.request(sampled=True)
    assert scene.observed.traces() == ()


def test_traces_are_made_few_at_a_time_and_the_oldest_first(scene: Scene) -> None:
    """Making one takes as long as a request: others must not wait for all."""
    for number in range(AT_ONCE + 5):
        scene.request(sampled=True, route=f"/{number}")
    first, second = scene.observed.traces(), scene.observed.traces()
    assert [trace.route for trace in (*first, *second)] == [f"/{number}" for number in range(AT_ONCE + 5)]
    assert len(first) == AT_ONCE


def test_too_many_that_wait_are_dropped_and_counted(scene: Scene) -> None:
    for _ in range(MAX_KEPT + 3):
        scene.request(sampled=True)
    assert scene.observed.waiting == MAX_KEPT
    assert scene.lost == 3
