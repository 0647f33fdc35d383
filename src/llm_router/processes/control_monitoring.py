"""What observes the router as a whole, as control has it: logs, health checks, traces, profiles, and what they cost.

Control hands in what it knows and passes on what workers tell; everything else goes by itself. Each part that is
switched off is not made: no route, no task. Not for: HTTP (admin), or what a single worker does (worker_monitoring.py).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from llm_router import __version__, families
from llm_router.config.settings import Settings
from llm_router.observe.health.checks import Check
from llm_router.observe.health.report import RESERVED, Health
from llm_router.observe.health.scheduler import HealthChecks
from llm_router.observe.health.state import Inputs
from llm_router.observe.logs.console import Console
from llm_router.observe.logs.levels import ChangedLevels
from llm_router.observe.logs.logs import Logs
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.meter import Meter
from llm_router.observe.profiling.profile import CannotProfile
from llm_router.observe.profiling.profiler import Profiler
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.observe.tracing.store import TraceStore
from llm_router.processes.measure import PROCESS, Measurements
from llm_router.processes.metric_lines import MetricLines
from llm_router.processes.news import WorkerLine
from llm_router.processes.orders import ChildState
from llm_router.processes.plan import LaunchPlan
from llm_router.processes.probes.losses import Losses
from llm_router.processes.probes.standard import Probes, Sources
from llm_router.processes.probes.traffic import FAMILIES as TRAFFIC_FAMILIES
from llm_router.processes.probes.traffic import traffic_in
from llm_router.processes.probes.worker_caches import WorkerCaches
from llm_router.processes.profiles import Profiles
from llm_router.processes.runner_logs import bound_runner_logs
from llm_router.processes.snapshot import CacheProbed, ProfileTaken, TraceBatch
from llm_router.processes.traces import Traces
from llm_router.routing.table import RoutingTable
from llm_router.signals import Family, Reading

_log = logging.getLogger("llm_router.control")

SWEEP_S: Final = 10.0
"""How often log files are looked after."""

_LEVELS_S: Final = 1.0  # how late a level may be taken back
_CLOSE_S: Final = 1.2  # for what waits to be exported, then to be written; the supervisor gives control three seconds


class Knowledge(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows, asked for when it is needed.

    Args:
        table: the routing table.
        inputs: what the state checks look at.
        lines: connected workers; children: all processes, as the supervisor tells.
        ping: asks the store of keys and usage; blocks, raises RouterError.
    """

    table: Callable[[], RoutingTable]
    inputs: Callable[[], Inputs]
    lines: Callable[[], Sequence[WorkerLine]]
    children: Callable[[], Sequence[ChildState]]
    ping: Callable[[], None]


class ControlMonitoring:
    """Everything that observes. Lives in control's loop: `start`, then the `tasks`, `aclose` at the end.

    Args:
        measurements: where control counts.
        console: what control says on stderr.
        on_change: called when workers must learn of other log levels.
        on_log: called with what the supervisor must heed of the same.
    """

    def __init__(
        self,
        settings: Settings,
        plan: LaunchPlan,
        measurements: Measurements,
        knowledge: Knowledge,
        *,
        started_at: float,
        console: Console,
        on_change: Callable[[], None],
        on_log: Callable[[LogSettings], object],
    ) -> None:
        self._settings = settings
        self._environment = settings.server.environment
        self._measurements = measurements
        self._knowledge = knowledge
        self._console = console
        self._on_change = on_change
        self._on_log = on_log
        self._told_lines: dict[str, int] = {}
        self.meter = Meter(measurements.monitoring_cpu, remainder="other")
        self.levels = ChangedLevels(time.time)
        self.logs = Logs(
            settings.logs,
            plan.log_dir,
            process=PROCESS,
            service=Service.here(__version__, self._environment),
            severities=families.ERROR_SEVERITIES,
            rotates=True,
        )
        self.meter.watch("logs", lambda: self.logs.cpu_s)
        self._traces = Traces(environment=self._environment, meter=self.meter, on_dropped=measurements.spans_dropped)
        self.profiler = Profiler(ProfilerSettings(), process=PROCESS)
        self.meter.watch("profiler", lambda: self.profiler.cpu_s)
        self._profile(settings.profiler)
        self.profiles = Profiles(
            self.profiler,
            children=knowledge.children,
            lines=knowledge.lines,
            settings=lambda: self._settings.profiler,
        )
        self._caches = WorkerCaches(knowledge.lines, lambda: self._settings.cache.enabled)
        self._metric_lines = MetricLines(self.logs.metric)
        self._may_check = asyncio.Event()
        self._is_leaving = asyncio.Event()
        self.health = self._made_health(settings, plan, started_at)

    def _made_health(self, settings: Settings, plan: LaunchPlan, started_at: float) -> Health:
        """Reports are there in any case, as readiness and the banner need the state; checks only where they are on."""
        checks = None
        if settings.health.enabled:
            reader = self._measurements.reader(TRAFFIC_FAMILIES)
            checks = HealthChecks(
                settings.health,
                clock=time.monotonic,
                wall=time.time,
                rng=random.Random(),
                on_result=self._checked,
                on_transition=self._measurements.check_turned,
                reserved=RESERVED,
                measure=functools.partial(_followed, self.meter, "health"),
            )
            sources = Sources(
                table=self._knowledge.table,
                traffic=lambda: traffic_in(reader.collect()),
                cache=self._caches.check,
                database=self._knowledge.ping,
                logs=self._log_losses,
                traces=self._span_losses if settings.tracing.enabled else None,
            )
            Probes(settings.health, sources, purse_path=f"{plan.data_dir}/probes.json").register(checks)
        return Health(
            self._knowledge.inputs,
            checks,
            version=__version__,
            started_at=started_at,
            monotonic=time.monotonic,
            now=time.time,
            settings=settings.health,
            on_transition=self._measurements.check_turned,
        )

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write logs and to keep traces."""
        self.logs.install()
        self.logs.start()
        self._heed()
        self._traces.apply(self._settings.tracing, close_s=_CLOSE_S)

    def apply(self, settings: Settings) -> None:
        """Another configuration is in force. Health and metrics stay as they are until a restart."""
        former, self._settings = self._settings, settings
        self._heed()
        self._profile(settings.profiler)
        if settings.tracing != former.tracing:
            self._traces.apply(settings.tracing, close_s=_CLOSE_S)

    def begin_checks(self) -> None:
        """The router is there: before, checks would find what everybody knows, that it is not."""
        self._may_check.set()

    def end_checks(self) -> None:
        """The router is told to leave: that its workers are gone is no news any more."""
        self._is_leaving.set()

    async def _check(self) -> None:
        await self._may_check.wait()
        for name in self.health.report().entries:
            self._measurements.check_known(name)
        running = asyncio.ensure_future(self.meter.follow(self.health.run(), "health"))
        leaving = asyncio.ensure_future(self._is_leaving.wait())
        try:
            await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not self._is_leaving.is_set():
                running.result()
        finally:
            running.cancel()
            leaving.cancel()
            await asyncio.wait({running, leaving})

    def _profile(self, settings: ProfilerSettings) -> None:
        try:
            self.profiler.apply(settings)
        except CannotProfile as error:
            _log.warning("no continuous profile of control: %s", error)

    def log_settings(self) -> LogSettings:
        """As configured, with the levels that were changed since."""
        return self.levels.in_force(self._settings.logs)

    def levels_changed(self) -> None:
        """Some level is another one: here at once, in workers with the next snapshot."""
        self._heed()
        self._on_change()

    def _heed(self) -> None:
        """Have control and supervisor log as is said now."""
        settings = self.log_settings()
        self.logs.apply(settings)
        self._console.form = settings.console
        self._on_log(settings)

    @property
    def traces(self) -> TraceStore | None:
        """Those that can be looked at; None while tracing is off."""
        return self._traces.store

    def tasks(self) -> Iterator[Coroutine[Any, Any, None]]:
        """What runs for as long as control does."""
        if self._settings.health.enabled:
            yield self._check()
        yield self._look_after_logs()
        yield self._end_levels()
        if self._settings.metrics.enabled:
            yield self.meter.follow(self._metric_lines.run(self._collect, lambda: self._settings.logs), "logs")

    async def aclose(self) -> None:
        """End profiles; export and write what waits, for a bounded time."""
        self.profiler.close()
        await self._traces.aclose(_CLOSE_S)
        await asyncio.to_thread(self.logs.close, _CLOSE_S)

    async def _look_after_logs(self) -> None:
        while True:
            await asyncio.to_thread(self.logs.sweep)
            await asyncio.to_thread(bound_runner_logs, self.logs.folder)
            await asyncio.sleep(SWEEP_S)

    async def _end_levels(self) -> None:
        """Levels that were set for a while end by themselves."""
        while True:
            await asyncio.sleep(_LEVELS_S)
            for change in self.levels.end_due():
                self.logs.audit("log_level_ended", logger=change.logger, level=change.level)
                self.levels_changed()

    # -- what workers tell ---------------------------------------------------------------------------------

    def hear(self, line: WorkerLine, fact: TraceBatch | CacheProbed | ProfileTaken) -> None:
        """A worker told something of what it observed."""
        if isinstance(fact, TraceBatch):
            with self.meter.measure("traces"):
                self._traces.take(fact)
        elif isinstance(fact, CacheProbed):
            self._caches.saw(line, fact)
        else:
            self.profiles.taken(line, fact)

    def left(self, line: WorkerLine) -> None:
        """A worker's connection is gone."""
        self._caches.left(line)
        self.profiles.left(line)

    # -- what happened to models ---------------------------------------------------------------------------

    def model_loaded(self, model: str, format: str, size_bytes: int, seconds: float) -> None:
        """A model took `seconds` to load."""
        self._measurements.loaded(model, format, seconds)
        self.logs.model_loaded(model, format=format, size_bytes=size_bytes or None, load_s=seconds)
        self.logs.metric("model_load_duration", round(seconds * 1000, 3), {"model": model, "format": format})

    def model_unloaded(self, model: str, format: str) -> None:
        """A model no longer serves, because somebody wanted it so."""
        self.logs.model_unloaded(model, format=format)

    # -- what it costs, and loses --------------------------------------------------------------------------

    def tick(self) -> None:
        """Count what was used and lost since the last time; several times a second."""
        self.meter.tick()
        for reason, count in self.logs.statistics().dropped.items():
            self._measurements.lines_dropped(reason, count - self._told_lines.get(reason, 0))
            self._told_lines[reason] = count
        self._traces.tick()

    def readings(self) -> Iterator[Reading]:
        """How checks stand, and what waits here."""
        if self._settings.health.enabled:
            for name, value in self.health.report().values().items():
                yield Reading(families.HEALTH_CHECK_STATUS, (name,), value)
        waiting = {"log": self.logs.statistics().queued, "span": self._traces.waiting}
        for queue, size in waiting.items():
            yield Reading(families.INTERNAL_QUEUE_SIZE, (queue,), float(size))

    def _checked(self, name: str, check: Check, seconds: float) -> None:
        self._measurements.checked(name, seconds)

    def _collect(self) -> Any:
        with self.meter.measure("metrics"):
            return self._measurements.collect()

    def _log_losses(self) -> Losses:
        """Of all processes: a disk that is full is full for each of them."""
        statistics = self.logs.statistics()
        problem = statistics.problem and f"{self.logs.folder}: {statistics.problem}"
        return Losses(self._totals(families.LOG_DROPPED), problem, statistics.queued)

    def _span_losses(self) -> Losses:
        problem = self._traces.problem and f"traces: {self._traces.problem}"
        return Losses(self._totals(families.SPANS_DROPPED), problem, self._traces.waiting)

    def _totals(self, family: Family) -> Mapping[str, float]:
        return {row.labels[0]: row.values[0] for row in self._measurements.reader((family,)).collect().rows(family)}


async def _followed(meter: Meter, component: str, work: Coroutine[Any, Any, Any]) -> Any:
    return await meter.follow(work, component)
