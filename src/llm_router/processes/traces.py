"""What control does with the traces that workers tell: it keeps them to be looked at, and exports them, as configured.

Not for: making traces or deciding which are kept (observe/tracing), or showing them (admin/debug.py).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from llm_router import __version__
from llm_router.observe.meter import Meter, thread_cpu
from llm_router.observe.tracing.otlp import OtlpExporter
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.store import TraceStore
from llm_router.processes.snapshot import TraceBatch


class Traces:
    """The store and the exporter of now. Lives in control's loop; nothing is kept before the first `apply`.

    Args:
        environment: the operator's word for what the router is used for.
        meter: has the CPU that exporting takes.
        on_dropped: called with a reason and a number of spans that were lost, by `tick` or at an exporter's end.

    Attributes:
        store: the traces that can be looked at; None while tracing is off.
    """

    def __init__(self, *, environment: str, meter: Meter, on_dropped: Callable[[str, int], None]) -> None:
        self.store: TraceStore | None = None
        self._environment = environment
        self._meter = meter
        self._on_dropped = on_dropped
        self._export: _Export | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"Traces({self.store}, {self._export and self._export.exporter}, {len(self._ending)} ending)"

    def apply(self, settings: TracingSettings, *, close_s: float) -> None:
        """Keep and export as these settings say.

        Args:
            close_s: how long a former exporter may still send what waits for it.
        """
        if not settings.enabled:
            self.store = None
        elif self.store is None:
            self.store = TraceStore(settings.max_traces, wall=time.time)
        else:
            self.store.resize(settings.max_traces)
        former, self._export = self._export, None
        if settings.enabled and settings.endpoint:
            exporter = OtlpExporter(
                settings, version=__version__, environment=self._environment, hostname=socket.gethostname()
            )
            exporter.start()
            self._export = _Export(exporter, self._meter, self._on_dropped)
        if former is not None:
            ending = asyncio.get_running_loop().create_task(former.aclose(close_s), name="end of a trace exporter")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def take(self, batch: TraceBatch) -> None:
        """Keep and export what a worker told."""
        for trace in batch.traces:
            if self.store is not None:
                self.store.add(trace)
            if self._export is not None:
                self._export.exporter.submit(trace)

    def tick(self) -> None:
        """Count what was lost since the last time."""
        if self._export is not None:
            self._export.count()

    @property
    def waiting(self) -> int:
        """Spans that are to be exported."""
        return 0 if self._export is None else self._export.exporter.statistics().waiting

    @property
    def problem(self) -> str:
        """Why the last export failed, empty if none did."""
        return "" if self._export is None else self._export.exporter.statistics().problem

    async def aclose(self, timeout_s: float) -> None:
        """Export what waits, for so long."""
        export, self._export = self._export, None
        await asyncio.gather(*self._ending, *(() if export is None else (export.aclose(timeout_s),)))


class _Export:
    """One exporter on its account."""

    def __init__(self, exporter: OtlpExporter, meter: Meter, on_dropped: Callable[[str, int], None]) -> None:
        self.exporter = exporter
        self._meter = meter
        self._on_dropped = on_dropped
        self._told: dict[str, int] = {}
        self._cpu_s = thread_cpu(exporter.thread)
        meter.watch("traces", self._cpu_s)

    def count(self) -> None:
        for reason, count in self.exporter.statistics().dropped.items():
            self._on_dropped(reason, count - self._told.get(reason, 0))
            self._told[reason] = count

    async def aclose(self, timeout_s: float) -> None:
        await self.exporter.aclose(timeout_s)
        self._meter.unwatch(self._cpu_s)
        self.count()
