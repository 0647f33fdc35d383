"""The values of the main metrics as lines of metrics.log, for those who have logs and no Prometheus.

Every line is about the time since the last one: means and sums over it, so that they can be read one by one. A model
without requests in that time has no lines. Not for: exporting metrics (measure.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final, NamedTuple

from llm_router import families
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.metrics.slots import Collected, Row
from llm_router.signals import Family

Write = Callable[[str, float, Mapping[str, str]], None]
"""Takes a name, a value and labels."""

_LOOK_S: Final = 1.0
"""How soon another interval is heeded."""


class MetricLine(NamedTuple):
    """One line to be."""

    name: str
    value: float
    labels: dict[str, str]


_SUMS: Final = (
    ("http_requests", families.HTTP_REQUESTS),
    ("inferences", families.INFERENCE),
    ("tokens_generated", families.TOKENS_GENERATED),
    ("errors", families.ERRORS),
)
_MEANS_MS: Final = (
    ("http_request_latency", families.HTTP_REQUEST_DURATION),
    ("inference_latency", families.INFERENCE_DURATION),
    ("time_to_first_token", families.TIME_TO_FIRST_TOKEN),
)
_FAMILIES: Final = tuple(family for _, family in (*_SUMS, *_MEANS_MS))


class MetricLines:
    """Writes them at an interval that may change at any time.

    Args:
        write: takes a line.
        sleep: waits so many seconds.
    """

    def __init__(self, write: Write, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._write = write
        self._sleep = sleep
        self._before: dict[tuple[Family, tuple[str, ...]], tuple[float, ...]] | None = None

    async def run(self, collect: Callable[[], Collected], settings: Callable[[], LogSettings]) -> None:
        """Until cancelled. Nothing is collected while the interval is 0."""
        waited_s = 0.0
        while True:
            await self._sleep(_LOOK_S)
            interval_s = settings().metrics_interval_s
            waited_s += _LOOK_S
            if not interval_s:
                self._before = None
            elif self._before is None or waited_s >= interval_s:
                waited_s = 0.0
                for line in self.since(collect()):
                    self._write(*line)

    def since(self, collected: Collected) -> Iterator[MetricLine]:
        """The lines about what was counted since the last call; none at the first."""
        values = {(family, row.labels): tuple(row.values) for family in _FAMILIES for row in collected.rows(family)}
        before, self._before = self._before, values
        if before is None:
            return
        for name, family in _SUMS:
            for row in collected.rows(family):
                (grown,) = _grown(row, before.get((family, row.labels)))
                if grown:
                    yield MetricLine(name, grown, dict(zip(family.labels, row.labels, strict=True)))
        for name, family in _MEANS_MS:
            for row in collected.rows(family):
                *counts, total_s = _grown(row, before.get((family, row.labels)))
                if count := sum(counts):
                    mean_ms = round(total_s / count * 1000, 3)
                    yield MetricLine(name, mean_ms, dict(zip(family.labels, row.labels, strict=True)))


def _grown(row: Row, before: tuple[float, ...] | None) -> list[float]:
    """What was added to each value; all of it if the row is new or began again."""
    if before is None or any(now < then for now, then in zip(row.values, before, strict=True)):
        return list(row.values)
    return [now - then for now, then in zip(row.values, before, strict=True)]
