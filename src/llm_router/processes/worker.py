"""The data plane: one process that answers requests on its own listening socket.

Composition root: ties front, core, router and connections to the supervisor (heartbeat, lifeline) and to control
(snapshots in, facts out). A worker needs control for news only; without it, it serves on with the last snapshot.
Not for: anything slow or large. It imports no YAML, numpy, SQL or Starlette; a test asserts that.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import uvloop

from llm_router import families
from llm_router.accounts.limiter import Limiter
from llm_router.backends.connections import SWEEP_S, Connections
from llm_router.cache import open_cache
from llm_router.cache.base import Cache, CacheSettings
from llm_router.gateway.answers import Answers
from llm_router.gateway.auth import Doorman
from llm_router.gateway.core import Core
from llm_router.gateway.forward import Forwarder, control_pool
from llm_router.gateway.front import Front
from llm_router.gateway.listener import Listener
from llm_router.instruments import Instruments
from llm_router.observe.logs.console import Console
from llm_router.observe.metrics.slots import Segment, Writer
from llm_router.processes.board import CONTROL_ROW
from llm_router.processes.child import Child, log_to_stderr
from llm_router.processes.garbage import Collections
from llm_router.processes.levels import Levels
from llm_router.processes.loads import Loads
from llm_router.processes.news import SnapshotClient
from llm_router.processes.snapshot import (
    BackendSeen,
    CircuitSeen,
    LeaseAsk,
    LeaseGrants,
    Snapshot,
    UsageTaken,
    Word,
)
from llm_router.processes.usage_outbox import UsageOutbox
from llm_router.processes.worker_monitoring import WorkerMonitoring
from llm_router.routing.breaker import State
from llm_router.routing.router import Router

_log = logging.getLogger("llm_router.worker")

_ORPHAN_S = 3.0
"""Seconds that replies in flight get when the supervisor is gone; 4 s after that moment the process ends anyway."""

_LAST_REPLIES_S = 1.0
"""Seconds for replies that are written but not yet taken by their clients."""

_LAST_ROWS_S = 2.0
"""Seconds for the last usage rows to be stored; a store that works takes a quarter of one."""

_ROWS_PAUSE_S = 0.02


class Worker:
    """One worker from its first snapshot to its last request. Lives in the loop it was made in."""

    def __init__(self, child: Child, console: Console) -> None:
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        spec = child.spec
        (_, own), *others = spec.segments
        segment = Segment.attach(own, writable=True)
        self._writer = Writer(segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self._loads = Loads(self._writer, [Segment.attach(fd, writable=False) for _, fd in others])
        self._admitted_backends: frozenset[str] = frozenset()
        self._instruments = Instruments(self._writer)
        self._lag = self._writer.histogram(families.EVENT_LOOP_LAG, spec.name)
        self._dropped_rows = self._writer.counter(families.USAGE_DROPPED, "queue-full")
        self._levels = Levels(self._writer)
        self._collections = Collections(self._writer, spec.name)
        self._connections = Connections(self._instruments)
        self._news = SnapshotClient(
            spec.plan.snapshot_path,
            self._apply,
            on_word=self._hear,
            on_connection=self._control_came_or_went,
            on_dropped=self._fact_dropped,
        )
        self._outbox = UsageOutbox(self._news.send_now, self._usage_dropped)
        self._monitoring = WorkerMonitoring(
            spec,
            self._writer,
            self._instruments,
            self._outbox,
            console=console,
            send=self._news.send_now,
            spawn=self._keep,
        )
        self._doorman = Doorman(clock=time.monotonic, wall=time.time)
        self._limiter = Limiter(lambda asks: self._news.send_now(LeaseAsk(asks)), clock=time.monotonic)
        self._cache: Cache | None = None
        self._cache_settings: CacheSettings | None = None
        self._answers: Answers | None = None
        self._router = Router(
            open_backend=self._connections.open,
            close_backend=self._connections.retire,
            on_backend=self._report_backend,
            on_circuit=self._report_circuit,
            clock=time.monotonic,
            rng=random.Random(),
        )
        self._control = control_pool(spec.plan.forward_path)
        self._is_serving = False
        self._core: Core | None = None
        self._draining: asyncio.Task[None] | None = None
        self._front: Front | None = None
        self._listeners: list[Listener] = []

    async def run(self) -> None:
        """Serve until told to drain, or until the supervisor is gone."""
        self._child.watch(on_drain=lambda: self._post(self._drain), on_orphaned=lambda: self._post(self._abandon))
        self._collections.start()
        ticking = self._keep(self._tick())
        try:
            async with self._news:
                await self._stopped.wait()
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            self._collections.stop()
            self._close_listeners()
            if self._front is not None:
                self._front.abort()
            if self._cache is not None:
                await self._cache.aclose()
            await self._connections.aclose()
            await self._control.aclose()
            await self._monitoring.aclose()

    # -- news ------------------------------------------------------------------------------------------

    def _apply(self, snapshot: Snapshot) -> None:
        """Called with each snapshot, in the loop."""
        try:
            self._use(snapshot)
        except Exception as error:
            if not self._is_serving:
                _give_up(error)
            _log.exception("a snapshot cannot be used; the one before it stays in force")
            self._instruments.error("internal")

    def _use(self, snapshot: Snapshot) -> None:
        self._router.update(snapshot.table, snapshot.workers)
        self._router.open_circuits(snapshot.open_circuits)
        if snapshot.accounts_ready:
            self._doorman.update(snapshot.keys, key_needed=snapshot.key_needed)
            self._limiter.update(snapshot.limits())
        self._admitted_backends = frozenset(snapshot.admitted_backends)
        admitted = set(snapshot.admitted_models)
        self._instruments.admit(
            (model.name, self._router.strategy_of(model.name))
            for model in snapshot.table.models
            if model.name in admitted
        )
        if self._core is None:
            self._open(snapshot)
        else:
            self._core.allow(snapshot.access)
        self._monitoring.apply(snapshot)
        if self._core is not None:  # without its certificate there is none
            if snapshot.accounts_ready:
                self._core.open_doors()
            self._use_cache(self._core, snapshot)

    def _use_cache(self, core: Core, snapshot: Snapshot) -> None:
        """Another cache for other settings; the answers of an old one in memory are gone with it."""
        if snapshot.cache != self._cache_settings:
            if self._cache is not None:
                self._keep(self._cache.aclose())
            self._cache_settings = snapshot.cache
            self._cache = open_cache(snapshot.cache, snapshot.workers, self._cache_failed)
            self._answers = None if self._cache is None else Answers(self._cache, snapshot.cache, snapshot.table)
            core.answer_from(self._answers)
        if self._answers is not None:
            self._answers.follow(snapshot.table)

    def _cache_failed(self, problem: str) -> None:
        """The cache went away; requests go on without it."""
        _log.warning("%s", problem)
        self._instruments.error("cache_unavailable")

    def _open(self, snapshot: Snapshot) -> None:
        """The first snapshot: begin to listen. Without its certificate the worker ends; its successor tries again."""
        try:
            context = snapshot.tls_context()
        except OSError as error:
            _log.error("no TLS with the certificate %s: %s", snapshot.tls_cert_file, error)
            self._stopped.set()
            return
        control_age = self._control_age
        self._core = Core(
            self._router,
            self._monitoring.recorder(snapshot),
            access=snapshot.access,
            forward=Forwarder(self._control, control_age),
            monitoring_paths=frozenset(snapshot.monitoring_paths),
            doorman=self._doorman,
            limiter=self._limiter,
            traces=self._monitoring.traces,
            clock=time.monotonic,
        )
        self._monitoring.watch(self._core)
        self._front = Front(self._core, self._core.refuse, snapshot.front, self._instruments, loop=self._loop)
        for fd in self._child.spec.listen_fds:
            self._listeners.append(
                Listener(
                    socket.socket(fileno=fd),
                    self._front.protocol_factory,
                    loop=self._loop,
                    tls=context,
                    handshake_s=snapshot.front.header_timeout_s,
                )
            )
        self._is_serving = True
        self._child.report({"event": "ready"})

    def _control_age(self) -> float:
        return time.monotonic() - self._child.board.read(CONTROL_ROW)

    def _report_backend(self, name: str, is_up: bool) -> None:
        self._news.send_fact(BackendSeen(name, is_up))

    def _report_circuit(self, name: str, state: State, until: float) -> None:
        self._news.send_fact(CircuitSeen(name, int(state), until))

    def _control_came_or_went(self, is_there: bool) -> None:
        """A control that is new knows nothing of what this worker told the last one."""
        if is_there:
            for name, (state, until) in self._router.circuits().items():
                if state is not State.CLOSED:
                    self._report_circuit(name, state, until)
            self._outbox.flush()  # first: nothing is lent before it is counted
            self._limiter.control_found()
        else:
            self._outbox.connection_lost()
            self._limiter.control_lost()

    def _hear(self, word: Word) -> None:
        if isinstance(word, LeaseGrants):
            self._limiter.granted(word.grants)
        elif isinstance(word, UsageTaken):
            self._outbox.taken(word.number)
        else:
            self._monitoring.hear(word, self._cache)

    def _fact_dropped(self) -> None:
        self._instruments.error("facts_dropped")
        self._monitoring.fact_lost()

    def _usage_dropped(self) -> None:
        self._instruments.error("usage_dropped")
        self._dropped_rows.inc()

    # -- time ------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Heartbeat, loop lag, every deadline of the upstream side and the other workers' load, ten times a second."""
        due = time.monotonic() + SWEEP_S
        while True:
            self._child.beat()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            late_s = max(0.0, now - due)
            self._lag.observe(late_s)
            self._shed(late_s)
            self._collections.flush()
            await self._connections.sweep(now)
            self._control.sweep(now)
            self._router.sweep(now)
            self._limiter.sweep(now)
            self._outbox.flush()
            self._levels.tell(self._router.queues(), self._cache)
            self._loads.tell(self._connections.in_use(), self._admitted_backends)
            self._router.count_elsewhere(self._loads.elsewhere())
            await self._monitoring.tick(self._news.statistics().waiting)
            due = now + SWEEP_S

    def _shed(self, late_s: float) -> None:
        """A loop that is late by more than it may takes nothing new until it has caught up."""
        if self._core is not None:
            limit_s = self._router.table.shed_lag_s
            self._core.is_late(late_s if 0 < limit_s <= late_s else 0.0)

    # -- the end ---------------------------------------------------------------------------------------

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that this worker is nothing without: if it fails, the worker ends, and is replaced."""
        task = self._loop.create_task(work)
        task.add_done_callback(_kept_ended)
        return task

    def _post(self, step: Callable[[], None]) -> None:
        """From the lifeline's thread into the loop."""
        self._loop.call_soon_threadsafe(step)

    def _drain(self) -> None:
        if self._core is None or self._front is None:
            self._stopped.set()
            return
        if self._draining is None:
            self._draining = self._keep(self._finish(self._core, self._front))

    async def _finish(self, core: Core, front: Front) -> None:
        """Inferences in flight end, while new ones and probes are told 503; then nothing listens any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._child.spec.plan.drain_s):
                await core.drain()
        self._close_listeners()
        await front.drain(_LAST_REPLIES_S)
        await self._hand_over()
        self._stopped.set()

    async def _hand_over(self) -> None:
        """Give back what was borrowed, tell the last traces, and see the last usage rows stored; control is asked to
        leave after workers."""
        self._limiter.give_back()
        await self._monitoring.hand_over()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ROWS_S):
                while any(self._outbox.statistics()[:2]):
                    self._outbox.flush()
                    await asyncio.sleep(_ROWS_PAUSE_S)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _abandon(self) -> None:
        """The supervisor is gone: stop listening at once, give replies in flight three seconds."""
        self._close_listeners()
        if self._front is None:
            self._stopped.set()
        else:
            self._leaving = self._keep(self._leave(self._front))

    async def _leave(self, front: Front) -> None:
        await front.drain(_ORPHAN_S)
        self._stopped.set()


def _kept_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _give_up(error)


def _give_up(error: BaseException) -> NoReturn:
    """End at once; what is in flight counts as lost, and the supervisor starts a successor."""
    _log.critical("the worker cannot go on", exc_info=error)
    os._exit(1)


async def _run(child: Child, console: Console) -> None:
    await Worker(child, console).run()


def main() -> None:
    """`python -m llm_router.processes.worker --spec-fd N`; the supervisor starts it."""
    child = Child.from_argv()
    console = log_to_stderr(child.spec.name, child.spec.plan)
    gc.freeze()  # what was imported lives as long as the process: collections need not look at it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(child, console))


if __name__ == "__main__":
    main()
