"""What observes one worker: its recorder, its logs, its traces on their way to control, and what control asks of it.

The worker hands in snapshots, words and the tick; everything else goes by itself. What monitoring loses or keeps waiting
is counted here, and so is the CPU that it uses.
Not for: serving requests (worker.py), or what control makes of traces and profiles.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final
from urllib.parse import urlsplit

from llm_router import __version__, families
from llm_router.cache.base import Cache
from llm_router.gateway.core import Core
from llm_router.gateway.trace_context import TraceContext
from llm_router.instruments import Instruments
from llm_router.observe.logs.console import Console
from llm_router.observe.logs.logs import Logs
from llm_router.observe.logs.service import Service
from llm_router.observe.meter import Meter
from llm_router.observe.metrics.slots import Writer
from llm_router.observe.tracing.keep import Keep
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.spans import Server
from llm_router.processes.observed import MAX_KEPT, Observed
from llm_router.processes.plan import ChildSpec
from llm_router.processes.probes.cache import answer_probe
from llm_router.processes.profiles import ProfileRunner
from llm_router.processes.snapshot import CacheProbe, Fact, ProfileOrder, Snapshot, TraceBatch
from llm_router.processes.usage_outbox import UsageOutbox
from llm_router.processes.usage_rows import UsageRecorder
from llm_router.routing.table import BackendSpec
from llm_router.signals import NoRecorder, Recorder

_TURNS: Final = 5
"""Batches of traces made in one tick of 0.1 s; each is `observed.AT_ONCE`, and requests go on between them."""

_CLOSE_S: Final = 2.0
"""For the last log lines: a disk that takes longer than this does not work."""


class WorkerMonitoring:
    """Observes a worker from its first snapshot on. Lives in the worker's loop.

    Args:
        instruments: counts what belongs to no request, and requests where metrics are on.
        outbox: takes usage rows.
        console: what is said on stderr.
        send: tells control a fact now; False if it could not.
        spawn: keeps a task.

    Attributes:
        traces: begins the traces of the core's requests, as the newest snapshot says.
    """

    def __init__(
        self,
        spec: ChildSpec,
        writer: Writer,
        instruments: Instruments,
        outbox: UsageOutbox,
        *,
        console: Console,
        send: Callable[[Fact], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._name = spec.name
        self._log_dir = spec.plan.log_dir
        self._instruments = instruments
        self._outbox = outbox
        self._console = console
        self._send = send
        self._spawn = spawn
        self.traces = TraceContext(enabled=False, sample_ratio=0.0, rng=random.Random())
        self._tracing: TracingSettings | None = None
        self._profiles = ProfileRunner(spec.name, send)
        self._logs: Logs | None = None
        self._observed: Observed | None = None
        self._core: Core | None = None
        self._queues = {name: writer.gauge(families.INTERNAL_QUEUE_SIZE, name) for name in families.INTERNAL_QUEUES}
        self._lost_lines = {
            reason: writer.counter(families.LOG_DROPPED, reason) for reason in families.LOG_DROP_REASONS
        }
        self._lost_spans = writer.counter(families.SPANS_DROPPED, "queue-full")
        self._passed_over = writer.counter(families.SPANS_DROPPED, "too-many")
        self._lost_facts = writer.counter(families.FACTS_DROPPED, "queue-full")
        self._told_lines: dict[str, int] = {}
        self._meter = Meter(lambda component, seconds: writer.counter(families.MONITORING_CPU, component).inc(seconds))

    # -- snapshots ---------------------------------------------------------------------------------------

    def recorder(self, snapshot: Snapshot) -> Recorder:
        """What the first snapshot wants to be written about requests; nothing is written before."""
        counted: Recorder = self._instruments if snapshot.metrics_enabled else NoRecorder()
        self._logs = Logs(
            snapshot.logs,
            self._log_dir,
            process=self._name,
            service=Service.here(__version__, snapshot.environment),
            severities=families.ERROR_SEVERITIES,
        )
        self._logs.install()
        self._logs.start()
        self._observed = Observed(
            UsageRecorder(counted, self._outbox.add),
            process=self._name,
            on_dropped=self._lost_spans.inc,
            logs=self._logs,
            measure=functools.partial(self._meter.sampled, "recording"),
            scheme="https" if snapshot.tls_cert_file else "http",
        )
        logs = self._logs
        self._meter.watch("logs", lambda: logs.cpu_s)
        self._meter.watch("profiler", lambda: self._profiles.cpu_s)
        return self._observed

    def watch(self, core: Core) -> None:
        """The core whose records may have to hold content."""
        self._core = core

    def apply(self, snapshot: Snapshot) -> None:
        """Observe as this snapshot says from now on."""
        if self._logs is None or self._observed is None:
            return  # the worker has not begun
        self._logs.apply(snapshot.logs)
        self._console.form = snapshot.logs.console
        self._instruments.sample(snapshot.metrics_sample)
        tracing = snapshot.tracing
        if tracing != self._tracing:
            self._tracing = tracing
            self.traces.apply(enabled=tracing.enabled, sample_ratio=tracing.sample_ratio)
            if not tracing.enabled:
                self._observed.keep = None
            elif self._observed.keep is None:
                self._observed.keep = Keep(tracing)
            else:
                self._observed.keep.apply(tracing)
            self._observed.keeps_content = tracing.content
        self._observed.servers = {backend.name: _server(backend) for backend in snapshot.table.backends}
        if self._core is not None:
            self._core.keep_content(snapshot.logs.content or (tracing.enabled and tracing.content))
        self._profiles.apply(snapshot.profiler)

    # -- what control asks ---------------------------------------------------------------------------------

    def hear(self, word: CacheProbe | ProfileOrder, cache: Cache | None) -> None:
        """Do what control asks; the answer is a fact."""
        if isinstance(word, ProfileOrder):
            self._profiles.hear(word)
        else:
            self._spawn(self._probe(word, cache))

    async def _probe(self, word: CacheProbe, cache: Cache | None) -> None:
        self._send(await answer_probe(word.number, cache))

    # -- time ------------------------------------------------------------------------------------------------

    async def tick(self, facts_waiting: int) -> None:
        """Send on the traces that were kept, and say what waits and what was lost. Ten times a second.

        Args:
            facts_waiting: news for control that are not sent yet.
        """
        logs, observed = self._logs, self._observed
        if logs is None or observed is None:
            return
        await self._tell_traces(observed, _TURNS)
        lines = logs.statistics()
        usage = self._outbox.statistics()
        queues = self._queues
        queues["log"].set(lines.queued)
        queues["usage"].set(usage.waiting + usage.under_way)
        queues["span"].set(observed.waiting)
        queues["fact"].set(facts_waiting)
        for reason, count in lines.dropped.items():
            self._lost_lines[reason].inc(count - self._told_lines.get(reason, 0))
            self._told_lines[reason] = count
        self._meter.tick()
        if observed.keep is not None:
            self._passed_over.inc(observed.keep.passed_over)
            observed.keep.passed_over = 0

    async def hand_over(self) -> None:
        """Send on the traces of the last requests; what is kept after this is lost."""
        if self._observed is not None:
            await self._tell_traces(self._observed, MAX_KEPT)

    async def _tell_traces(self, observed: Observed, turns: int) -> None:
        """Send on so many batches, if there are so many. What control cannot be told is lost, and counted."""
        for _ in range(turns):
            with self._meter.measure("traces"):
                traces = observed.traces()
            if not traces:
                break
            if not self._send(TraceBatch(traces)):
                self._lost_spans.inc(sum(len(trace.spans) for trace in traces))
            await asyncio.sleep(0)

    def fact_lost(self) -> None:
        """News for control were dropped."""
        self._lost_facts.inc()

    async def aclose(self) -> None:
        """Write what waits to be written."""
        await self._profiles.aclose()
        if self._logs is not None:
            await asyncio.to_thread(self._logs.close, _CLOSE_S)


def _server(backend: BackendSpec) -> Server:
    parts = urlsplit(backend.url)
    return Server(
        backend.provider or backend.protocol,
        parts.hostname or "",
        parts.port or (443 if parts.scheme == "https" else 80),
    )
