"""What `/metrics` shows: the counts of every process, and the levels that are read at the moment of a scrape.

Counters and histograms lie in the processes' segments; levels (which models are loaded, who is up, what memory is
used) come from control's own tables, so that a series leaves with its object.
Not for: text formats (observe/metrics/exposition.py) or deciding what is healthy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from llm_router import families
from llm_router.observe.metrics.exposition import Renderer
from llm_router.observe.metrics.slots import Collected, FamilyRows, Reader, Row, Segment, Writer
from llm_router.observe.metrics.system import Machine, MachineFamilies, Processes, ProcessFamilies
from llm_router.processes.garbage import Collections
from llm_router.signals import Family, Reading

PROCESS: Final = "control"

PROCESS_FAMILIES: Final = ProcessFamilies(
    families.PROCESS_CPU,
    families.PROCESS_RESIDENT,
    families.PROCESS_HEAP,
    families.PROCESS_FDS,
    families.PROCESS_START,
)
MACHINE_FAMILIES: Final = MachineFamilies(
    families.SYSTEM_CPU,
    families.SYSTEM_MEMORY,
    families.SYSTEM_MEMORY_LIMIT,
    families.SYSTEM_DISK,
    families.SYSTEM_DISK_IO,
    families.SYSTEM_NETWORK,
)
_LOADED_ZEROS: Final = tuple(
    ("remote" if category == "remote" else "gguf", category) for category in families.SIZE_CATEGORIES
)


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that serves. `pid` is its runner's; 0 for remote ones."""

    name: str
    format: str
    size_category: str
    pid: int = 0


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the router at one moment.

    Args:
        pids: label value of `process` to pid, of every process of ours.
        workers, backends: name to whether it is up; a backend of which nothing is known is not there.
        models: those that serve.
        circuits: backend to the state of its circuit, the worst that any worker sees.
        accounts: what is known of keys and budgets.
        monitoring: how checks stand, and what waits to be written or sent.
    """

    version: str
    pids: Mapping[str, int]
    workers: Mapping[str, bool]
    backends: Mapping[str, bool]
    models: tuple[LoadedModel, ...]
    circuits: Mapping[str, int]
    reload_succeeded: bool
    reload_time: float
    accounts: tuple[Reading, ...] = ()
    monitoring: tuple[Reading, ...] = ()


class Measurements:
    """Everything that is exported, and control's own part of it. Owned by the loop's thread.

    Args:
        own: control's segment, attached for writing.
        others: the segments of all other processes.
        levels: called at each collection.
        guide_names: whether to add the unprefixed names.
        disks: paths whose file systems are reported.
    """

    def __init__(
        self,
        own: Segment,
        others: Iterable[Segment],
        levels: Callable[[], Levels],
        *,
        guide_names: bool,
        disks: Iterable[str],
    ) -> None:
        self.processes = Processes(PROCESS_FAMILIES)
        self.machine = Machine(MACHINE_FAMILIES, disks)
        self._levels = levels
        self._writer = Writer(own, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self._segments = [own, *others]
        self._reader = Reader(self._segments, families.FAMILIES)
        self._renderer = Renderer(
            families.GUIDE_VIEWS if guide_names else (), on_collector_error=lambda error: self.error("render")
        )
        self._scrapes = self._writer.histogram(families.SCRAPE_DURATION)
        self._lag = self._writer.histogram(families.EVENT_LOOP_LAG, PROCESS)
        self._lost_lines = {r: self._writer.counter(families.LOG_DROPPED, r) for r in families.LOG_DROP_REASONS}
        self._lost_spans = {r: self._writer.counter(families.SPANS_DROPPED, r) for r in families.SPAN_DROP_REASONS}
        self._cpu = {c: self._writer.counter(families.MONITORING_CPU, c) for c in families.MONITORING_COMPONENTS}
        self._dropped = {r: self._writer.counter(families.USAGE_DROPPED, r) for r in families.USAGE_DROP_REASONS}
        self.collections = Collections(self._writer, PROCESS)

    def collect(self) -> Collected:
        """All families now."""
        self.collections.flush()
        collected = self._reader.collect(self._readings(self._levels()))
        return _with_series_counts(collected)

    def render(self, *, openmetrics: bool) -> bytes:
        """The exposition; what it cost is in `scrape_duration_seconds` of the next one."""
        begin = time.perf_counter()
        text = self._renderer.render(self.collect(), openmetrics=openmetrics)
        self._scrapes.observe(time.perf_counter() - begin)
        return text

    def render_json(self) -> bytes:
        begin = time.perf_counter()
        text = self._renderer.render_json(self.collect())
        self._scrapes.observe(time.perf_counter() - begin)
        return text

    def late(self, seconds: float) -> None:
        """The event loop ran a timer `seconds` after it was due."""
        self._lag.observe(seconds)

    def loaded(self, model: str, format: str, seconds: float) -> None:
        """A model took `seconds` to load."""
        self._writer.histogram(families.MODEL_LOAD_DURATION, model, format).observe(seconds)

    def error(self, type: str) -> None:
        """Something of ours failed; `type` is one of `families.ERROR_KINDS`."""
        self._writer.counter(families.ERRORS, type, *families.ERROR_KINDS[type]).inc()

    def usage_dropped(self, reason: str, rows: int) -> None:
        """So many usage rows are lost; `reason` is one of `families.USAGE_DROP_REASONS`."""
        self._dropped[reason].inc(rows)
        self.error("usage_dropped")

    def lines_dropped(self, reason: str, lines: int) -> None:
        """So many log lines of control are lost; `reason` is one of `families.LOG_DROP_REASONS`."""
        self._lost_lines[reason].inc(lines)

    def spans_dropped(self, reason: str, spans: int) -> None:
        """So many spans are lost; `reason` is one of `families.SPAN_DROP_REASONS`."""
        self._lost_spans[reason].inc(spans)

    def monitoring_cpu(self, component: str, seconds: float) -> None:
        """A component, one of `families.MONITORING_COMPONENTS`, used so much CPU more."""
        self._cpu[component].inc(seconds)

    def check_known(self, name: str) -> None:
        """Have the series of a health check exist before anything happens to it."""
        self._writer.counter(families.HEALTH_CHECK_TRANSITIONS, name)

    def checked(self, name: str, seconds: float) -> None:
        """A health check ran for `seconds`."""
        self.check_known(name)
        self._writer.histogram(families.HEALTH_CHECK_DURATION, name).observe(seconds)

    def check_turned(self, name: str, old: str, new: str) -> None:
        """A health check changed between healthy and not."""
        self._writer.counter(families.HEALTH_CHECK_TRANSITIONS, name).inc()

    def reader(self, wanted: Iterable[Family]) -> Reader:
        """Reads these families of all processes: cheaper than all of them."""
        return Reader(self._segments, wanted)

    def _readings(self, levels: Levels) -> Iterator[Reading]:
        yield Reading(families.BUILD_INFO, (levels.version,), 1.0)
        yield Reading(families.CONFIG_RELOAD_OK, (), float(levels.reload_succeeded))
        yield Reading(families.CONFIG_RELOAD_TIME, (), levels.reload_time)
        for labels in _LOADED_ZEROS:
            yield Reading(families.MODELS_LOADED, labels, 0.0)
        for model in levels.models:
            yield Reading(families.MODELS_LOADED, (model.format, model.size_category), 1.0)
            use = self.processes.use(model.pid) if model.pid else None
            if use is not None:
                yield Reading(families.MODEL_MEMORY, (model.name, model.format), use.resident_bytes)
        for family, states in ((families.WORKER_UP, levels.workers), (families.BACKEND_UP, levels.backends)):
            for name, is_up in states.items():
                yield Reading(family, (name,), float(is_up))
        for name, state in levels.circuits.items():
            yield Reading(families.CIRCUIT_STATE, (name,), float(state))
        yield from levels.accounts
        yield from levels.monitoring
        yield from self.processes.readings(levels.pids)
        yield from self.machine.readings()


def _with_series_counts(collected: Collected) -> Collected:
    """The same, with `series`: how many there are of each family, of `series` itself too."""
    counts: dict[Family, int] = {rows.family: rows.series for rows in collected.families if rows.rows}
    counts[families.SERIES] = len(counts) + 1
    rows = [Row((family.name,), (float(count),)) for family, count in counts.items()]
    counted = FamilyRows(families.SERIES, sorted(rows, key=lambda row: row.labels))
    return Collected([counted if rows.family is families.SERIES else rows for rows in collected.families])
