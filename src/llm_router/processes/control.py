"""The control process: everything that may be slow, large or new, so that workers and supervisor need not be.

Composition root. Reads the configuration, publishes the routing snapshot, has local models loaded, watches backends
and serves monitoring and administration. If it dies, workers serve on with their last snapshot; what it needs to go
on (which runners there are, what was counted) lies with the supervisor and in the metric segments.
Not for: requests (worker.py) or children (supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import uvloop

from llm_router import __version__
from llm_router.accounts.access import Guard
from llm_router.accounts.keys import closed_scopes
from llm_router.accounts.limits import Limits, Subject
from llm_router.config.exposure import is_loopback, keys_needed
from llm_router.config.load import load
from llm_router.config.settings import Settings
from llm_router.errors import ConfigError, RouterError, Unavailable
from llm_router.models.registry import ModelsFolder
from llm_router.observe.health.report import Report
from llm_router.observe.health.state import Inputs, ModelState
from llm_router.observe.logs.console import Console
from llm_router.observe.logs.levels import level_of
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.metrics.slots import Collected, Segment
from llm_router.processes.backends import BackendWatch
from llm_router.processes.board import worker_row
from llm_router.processes.bookkeeping import Bookkeeping
from llm_router.processes.child import EXIT_REFUSED, Child, log_to_stderr
from llm_router.processes.circuits import Circuits
from llm_router.processes.control_monitoring import ControlMonitoring, Knowledge
from llm_router.processes.local import LocalModels
from llm_router.processes.measure import Levels, LoadedModel, Measurements
from llm_router.processes.news import SnapshotServer, WorkerLine
from llm_router.processes.orders import OrderRefused, Orders, SupervisorState
from llm_router.processes.snapshot import BackendSeen, CircuitSeen, Fact, LeaseAsk, Snapshot, UsageBatch
from llm_router.processes.tables import PriceFinder, admitted, no_prices, routing_table, runner_backend
from llm_router.routing.policies import load_custom
from llm_router.routing.table import ModelSpec, RoutingTable

if TYPE_CHECKING:
    from llm_router.admin.debug import ModelFacts, RouterStatus  # which brings Starlette along

_log = logging.getLogger("llm_router.control")

TICK_S: Final = 0.1
"""Heartbeat: workers take control for gone when it is a second old."""

_STATE_WAIT_S: Final = 1.0
"""The supervisor sends its state as soon as control starts; a snapshot without it would say that no runner is ready."""

_WORKER_STALE_S: Final = 2.0  # workers beat every 0.1 s; one that misses twenty is not up
_NEEDS_RESTART: Final = ("server", "front", "accounts", "metrics", "health", "profiler")


class Control:
    """Control from its start to its end. Lives in the loop it was made in.

    Args:
        settings: as loaded at the start.
        reload: loads them again; raises ConfigError.
        console: what control says on stderr.
    """

    def __init__(self, child: Child, settings: Settings, reload: Callable[[], Settings], console: Console) -> None:
        spec = child.spec
        self._child = child
        self._plan = spec.plan
        self._settings = settings
        self._load_settings = reload
        self._guard = Guard(settings.access)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._started_at = time.monotonic()
        self._reload_succeeded, self._reload_time = True, time.time()
        self._is_initialized = False
        self._has_state = False
        self._is_serving = False
        self._publish_due = False
        self._snapshot = Snapshot(version=0)
        self._prices: PriceFinder = no_prices
        self._has_asked_prices = False
        self._table = RoutingTable()
        self._disk_path = settings.health.disk_path or self._plan.data_dir
        own, *others = spec.segments
        self._measurements = Measurements(
            Segment.attach(own[1], writable=True),
            [Segment.attach(fd, writable=False) for _, fd in others],
            self._levels,
            guide_names=settings.metrics.guide_names,
            disks=dict.fromkeys((self._plan.data_dir, self._disk_path)),
        )
        self._orders = Orders(self._take_state, self._stopping.set)
        self._snapshots = SnapshotServer(
            socket.socket(fileno=spec.payload["snapshot_fd"]), self._take_facts, on_left=self._worker_left
        )
        self._monitoring = ControlMonitoring(
            settings,
            self._plan,
            self._measurements,
            Knowledge(
                table=lambda: self._table,
                inputs=self._health_inputs,
                lines=self._snapshots.lines,
                children=lambda: self._orders.state.children,
                ping=self._ping,
            ),
            started_at=self._router_started_at(),
            console=console,
            on_change=self._change,
            on_log=lambda logs: self._spawn(self._tell_supervisor(logs)),
        )
        self._health = self._monitoring.health
        self._circuits = Circuits(time.monotonic)
        self._needed = keys_needed(settings)
        self._is_monitoring_exposed = self._needed.admin and (
            settings.accounts.require_key == "always" or not is_loopback(settings.server.metrics_host)
        )
        self._has_admin_key = False
        self._books = Bookkeeping(
            settings.accounts,
            limits=self._limits,
            name=f"{socket.gethostname()}:{self._plan.data_dir}",
            workers=self._plan.workers,
            on_change=self._accounts_changed,
            on_error=self._measurements.error,
            on_dropped=self._measurements.usage_dropped,
            spawn=self._spawn,
        )
        self._watch = BackendWatch(lambda name: self._health.forget())
        self._local = LocalModels(
            self._orders,
            ModelsFolder(settings.server.models_dir),
            Path(self._plan.run_dir) / "unloaded.json",
            spawn=self._spawn,
            grace_s=self._plan.drain_s,
            on_change=self._change,
            on_loaded=self._monitoring.model_loaded,
            on_unloaded=self._monitoring.model_unloaded,
            on_error=self._measurements.error,
            resident_bytes=self._resident_bytes,
        )

    async def run(self) -> None:
        """Serve until told to leave, or until the supervisor is gone."""
        payload = self._child.spec.payload
        await self._orders.connect(socket.socket(fileno=payload["channel_fd"]))
        self._monitoring.start()
        if not await self._orders.first_state(_STATE_WAIT_S):
            _log.warning("the supervisor did not tell its state; local models count as not ready until it does")
        self._publish()
        await self._snapshots.start()
        self._child.watch(
            on_drain=lambda: self._post(self._stopping.set),
            on_orphaned=lambda: self._post(self._abandon),
            on_reload=lambda: self._post(self._reload_quietly),
        )
        self._measurements.collections.start()
        always = [
            self._keep(work) for work in (self._tick(), self._watch.run(), self._books.run(), *self._monitoring.tasks())
        ]
        self._local.configure(self._settings.models, is_first_start=self._is_first_start)
        self._server = self._make_server()
        await self._server.start()
        self._is_serving = True
        self._child.report({"event": "ready"})
        self._look_whether_initialized()
        try:
            await self._stopping.wait()
        finally:
            await self._server.aclose()
            for task in (*always, *self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, *always, return_exceptions=True)
            await self._books.aclose()
            self._measurements.collections.stop()
            self._orders.close()
            await self._snapshots.aclose()
            await self._monitoring.aclose()

    async def _tell_supervisor(self, logs: LogSettings) -> None:
        with contextlib.suppress(OrderRefused, Unavailable):  # it is going, and has other worries
            await self._orders.set_log(level_of(logs, "llm_router.supervisor"), logs.console)

    def _router_started_at(self) -> float:
        """The supervisor's start on this process's clock: the router's uptime does not begin again with control's."""
        use = self._measurements.processes.use(os.getppid())
        return self._started_at if use is None else self._started_at - max(0.0, time.time() - use.start_time)

    def _ping(self) -> None:
        self._books.ping()

    # -- what the admin application shows --------------------------------------------------------------------

    def metrics(self, *, openmetrics: bool) -> bytes:
        """The exposition of every family, made now."""
        with self._monitoring.meter.measure("metrics"):
            return self._measurements.render(openmetrics=openmetrics)

    def metrics_json(self) -> bytes:
        """The same values as JSON."""
        with self._monitoring.meter.measure("metrics"):
            return self._measurements.render_json()

    def collected(self) -> Collected:
        """All metrics now."""
        with self._monitoring.meter.measure("metrics"):
            return self._measurements.collect()

    def health(self) -> Report:
        """The newest health report."""
        return self._health.report()

    def health_document(self) -> Mapping[str, Any] | None:
        """The newest health report as `/health` shows it; None if health is off."""
        return self.health().document() if self._settings.health.enabled else None

    def status(self) -> RouterStatus:
        """How the router stands, in names and words."""
        from llm_router.admin.debug import RouterStatus

        is_ready, state = self.readiness()
        inputs = self._health_inputs()
        return RouterStatus(
            state=state,
            initialized=self._is_initialized,
            ready=is_ready,
            models={model.name: model.state for model in inputs.models},
            workers=self._workers(),
            backends={backend.name: self._watch.is_up(backend.name) for backend in self._table.backends},
            strategy=self._table.strategy,
            engine=inputs.engine,
            environment=inputs.environment,
        )

    async def model_facts(self) -> Sequence[ModelFacts]:
        """Every model that can be asked for, and every local one that is more than a file."""
        from llm_router.admin.debug import model_facts

        return model_facts([self._model_state(model) for model in self._table.models], await self._local.list())

    def readiness(self) -> tuple[bool, str]:
        """Whether new requests are welcome, and one word for why not."""
        if self._orders.state.draining:
            return False, "draining"
        if not self._is_initialized:
            return False, "initializing"
        return (True, "ready") if any(self._workers().values()) else (False, "no worker is up")

    def is_initialized(self) -> bool:
        """Whether the router was ready once since it started."""
        return self._is_initialized

    def reload(self) -> list[str]:
        """Make the configuration the one in force. Returns the sections whose change needs a restart.

        Raises: ConfigError, and then nothing has changed.
        """
        try:
            new = self._load_settings()
        except ConfigError as error:
            self._reload_succeeded = False
            _log.error("the configuration was not reloaded: %s", error)
            raise
        old = self._settings
        kept = {name: getattr(old, name) for name in _NEEDS_RESTART}
        kept["metrics"] = msgspec.structs.replace(old.metrics, sample=new.metrics.sample)  # workers follow that
        waiting = [name for name, section in kept.items() if getattr(new, name) != section]
        self._settings = msgspec.structs.replace(new, **kept)
        self._guard = Guard(new.access)
        self._reload_succeeded, self._reload_time = True, time.time()
        self._local.configure(new.models)
        self._monitoring.apply(self._settings)
        self._publish()
        _log.info("the configuration was reloaded%s", f"; {', '.join(waiting)} need a restart" if waiting else "")
        return waiting

    def _make_server(self) -> Any:
        # Not before workers have their snapshot: these imports take 0.2 s.
        from llm_router.admin import debug, keys, log_level, models, monitoring, profile, reload, usage
        from llm_router.admin.application import Entry, Rights, build
        from llm_router.admin.server import Server

        watch, audit = self._monitoring, self._monitoring.logs.audit
        routes = [
            *monitoring.routes(
                self,
                version=__version__,
                metrics_path=self._settings.metrics.endpoint,
                health_path=self._settings.health.endpoint,
                now=time.time,
                metrics_enabled=self._settings.metrics.enabled,
                health_enabled=self._settings.health.enabled,
            ),
            *models.routes(self._local, audit=audit),
            *keys.routes(self._books, audit=audit, now=time.time),
            *usage.routes(self._books, now=time.time),
            *reload.routes(self.reload, audit=audit),
            *log_level.routes(watch.levels, lambda: self._settings.logs, on_change=watch.levels_changed, audit=audit),
            *debug.routes(
                self,
                traces=lambda: watch.traces,
                version=__version__,
                now=time.time,
                metrics_enabled=self._settings.metrics.enabled,
            ),
        ]
        if self._settings.profiler.enabled:
            routes += profile.routes(watch.profiles, audit=audit, now=time.time)
        entries = {
            socket.socket(fileno=fd): entry
            for name, entry in (
                ("monitoring_fd", Entry.MONITORING),
                ("cli_fd", Entry.CLI),
                ("forward_fd", Entry.FORWARD),
            )
            if (fd := self._child.spec.payload[name]) >= 0
        }
        paths = (self._settings.metrics.endpoint, self._settings.health.endpoint)

        def rights() -> Rights:
            books = self._books
            if books.ring is None:
                return Rights(None, {})  # closed for all but the command line
            monitoring = closed_scopes(books.stored, always=self._is_monitoring_exposed)
            forward = closed_scopes(books.stored, always=self._needed.inference)
            return Rights(books.ring, {Entry.MONITORING: monitoring, Entry.FORWARD: forward})

        app = build(
            routes,
            lambda: self._guard,
            rights,
            monitoring_paths=paths,
            health_path=self._settings.health.endpoint,
        )
        return Server(app, entries)

    # -- news -------------------------------------------------------------------------------------------------

    def _take_state(self, state: SupervisorState) -> None:
        self._local.take_state(state, is_first=not self._has_state)
        self._has_state = True
        if state.draining:
            self._monitoring.end_checks()
        self._health.forget()
        self._look_whether_initialized()
        self._change()

    async def _read_price_list(self) -> None:
        """Loading it takes a quarter of a second, so it waits until the router serves, and until a price is wanted."""
        from llm_router.models import price_list

        await asyncio.to_thread(price_list.find, "", "", "")
        self._prices = price_list.find
        self._change()

    def _take_facts(self, line: WorkerLine, facts: list[Fact]) -> None:
        for fact in facts:
            if isinstance(fact, UsageBatch):
                self._books.take_usage(line, fact)
            elif isinstance(fact, BackendSeen):
                self._watch.saw(fact)
            elif isinstance(fact, CircuitSeen):
                self._circuits.saw(line.name, fact)
                self._change()
            elif isinstance(fact, LeaseAsk):
                self._books.lending.lend(line, fact)
            else:
                self._monitoring.hear(line, fact)

    def _worker_left(self, line: WorkerLine) -> None:
        self._books.left(line)
        self._monitoring.left(line)
        if self._circuits.left(line.name):
            self._change()

    def _limits(self) -> dict[Subject, Limits]:
        return self._snapshot.limits()

    def _accounts_changed(self) -> None:
        """Keys or their limits are others than before: workers learn it at once, not with the next turn of the loop."""
        self._publish()
        if self._books.is_ready and self._needed.admin and not self._has_admin_key:
            self._has_admin_key = True
            if not any("admin" in key.scopes for key in self._books.stored):
                self._spawn(self._first_key())

    async def _first_key(self) -> None:
        """Others can reach this router, and nobody has a key for it: make one and show it, once."""
        try:
            text = await self._books.make_admin_key()
        except RouterError as error:  # the store went away, or another router that shares it was faster
            _log.error("no key for administration was made: %s; `llm-router keys create` makes one", error)
            return
        await self._announce(
            f"other machines can reach this router, so a key is needed. This one is for administration and is not shown "
            f"again:\n\n    {text}\n\nmake keys for inference with `llm-router keys create --name NAME`\n"
        )

    @property
    def _is_first_start(self) -> bool:
        return all(child.restarts == 0 for child in self._orders.state.of_role("control"))

    def _change(self) -> None:
        """The table may be another one: publish it, once for all changes of this turn of the loop."""
        if not self._publish_due:
            self._publish_due = True
            self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        self._publish_due = False
        self._look_whether_initialized()
        self._table = routing_table(
            self._settings,
            self._local.extra(),
            self._local.addresses(),
            prices=self._prices,
            workers=self._plan.workers,
        )
        if self._is_initialized and not self._has_asked_prices and _lacks_a_price(self._table):
            self._has_asked_prices = True
            self._spawn(self._read_price_list())
        self._watch.follow(self._table.backends)
        self._health.forget()
        settings = self._settings
        models, backends = admitted(self._table)
        snapshot = Snapshot(
            version=self._snapshot.version,
            table=self._table,
            keys=self._books.keys(),
            accounts_ready=self._books.is_ready,
            key_needed="inference" in closed_scopes(self._books.stored, always=self._needed.inference),
            open_circuits=self._circuits.open_until(),
            cache=settings.cache,
            workers=self._plan.workers,
            access=settings.access,
            front=settings.front,
            admitted_models=models,
            admitted_backends=backends,
            tls_cert_file=settings.server.tls_cert,
            tls_key_file=settings.server.tls_key,
            logs=self._monitoring.log_settings(),
            tracing=settings.tracing,
            profiler=settings.profiler,
            metrics_enabled=settings.metrics.enabled,
            metrics_sample=settings.metrics.sample,
            environment=settings.server.environment,
            monitoring_paths=(settings.metrics.endpoint, settings.health.endpoint),
        )
        if snapshot != self._snapshot or not snapshot.version:
            self._snapshot = msgspec.structs.replace(snapshot, version=snapshot.version + 1)
            self._books.lending.follow()  # before any worker knows of a limit
            self._snapshots.publish(self._snapshot)

    def _look_whether_initialized(self) -> None:
        """Once every worker and every configured model had its chance, the router is there; say so on stdout."""
        workers = self._orders.state.of_role("worker")
        if self._is_initialized or self._local.is_loading or not self._is_serving or self._books.ring is None:
            return
        if len(workers) < self._plan.workers or any(child.state == "starting" for child in workers):
            return
        self._is_initialized = True
        self._monitoring.begin_checks()
        self._health.forget()
        self._change()
        if self._plan.banner and self._is_first_start:
            key = " -H 'authorization: Bearer KEY'" if self._snapshot.key_needed else ""
            known = {"{port}": self._plan.port, "{metrics_port}": self._plan.metrics_port, "{key}": key}
            banner = self._plan.banner
            for placeholder, value in known.items():
                banner = banner.replace(placeholder, str(value))
            self._spawn(self._announce(banner))

    async def _announce(self, text: str) -> None:
        with contextlib.suppress(OrderRefused):  # nobody reads stdout
            await self._orders.announce(text)

    # -- levels -----------------------------------------------------------------------------------------------

    def _workers(self) -> dict[str, bool]:
        """Every worker, and whether it is up: ready, with a fresh heartbeat."""
        now, found = time.monotonic(), {f"worker-{index}": False for index in range(self._plan.workers)}
        for child in self._orders.state.of_role("worker"):
            beat_at = self._child.board.read(worker_row(int(child.name.rpartition("-")[2])))
            found[child.name] = child.state == "ready" and now - beat_at < _WORKER_STALE_S
        return found

    def _pids(self) -> dict[str, int]:
        pids = {"supervisor": os.getppid(), "control": os.getpid()}
        for child in self._orders.state.children:
            if child.pid and child.role != "control":
                pids[runner_backend(child.name) if child.role == "runner" else child.name] = child.pid
        return pids

    def _levels(self) -> Levels:
        known = {backend.name: self._watch.is_up(backend.name) for backend in self._table.backends}
        remote = [
            LoadedModel(model.name, "remote", "remote")
            for model in self._table.models
            if any(known.get(name) for name in self._remote_backends(model))
        ]
        return Levels(
            version=__version__,
            pids=self._pids(),
            workers=self._workers(),
            backends={name: is_up for name, is_up in known.items() if is_up is not None},
            models=(*self._local.loaded(), *remote),
            circuits=self._circuits.states(known),
            accounts=tuple(self._books.readings()),
            monitoring=tuple(self._monitoring.readings()),
            reload_succeeded=self._reload_succeeded,
            reload_time=self._reload_time,
        )

    def _remote_backends(self, model: ModelSpec) -> list[str]:
        return [d.backend for d in model.deployments if d.backend != runner_backend(model.name)]

    def _health_inputs(self) -> Inputs:
        machine = {
            (reading.family.name, reading.labels): reading.value for reading in self._measurements.machine.readings()
        }
        uses = {name: self._measurements.processes.use(pid) for name, pid in self._pids().items()}
        ours = [use for name, use in uses.items() if use is not None and not name.startswith("runner-")]
        workers = self._workers()
        disk = self._disk_path
        return Inputs(
            is_initialized=self._is_initialized,
            models=tuple(self._model_state(model) for model in self._table.models),
            workers_up=sum(workers.values()),
            workers_wanted=self._plan.workers,
            runners={child.name: child.state for child in self._orders.state.of_role("runner")},
            cpu_ratio=machine.get(("llm_router_system_cpu_usage_ratio", ())),
            memory_used_bytes=machine.get(("llm_router_system_memory_usage_bytes", ())),
            memory_limit_bytes=machine.get(("llm_router_system_memory_limit_bytes", ())),
            disk_ratio=machine.get(("llm_router_system_disk_usage_ratio", (disk,))),
            disk_path=disk,
            rss_bytes=sum(use.resident_bytes for use in ours),
            heap_bytes=sum(use.heap_bytes or 0.0 for use in ours),
            runner_bytes=sum(
                u.resident_bytes for name, u in uses.items() if u is not None and name.startswith("runner-")
            ),
            engine="llama.cpp" if self._local.addresses() else "",
            environment=self._settings.server.environment,
        )

    def _model_state(self, model: ModelSpec) -> ModelState:
        """A model serves while its runner is ready, or a remote backend of it is not known to be down."""
        address = self._local.addresses().get(model.name)
        if (address is not None and address.is_ready) or any(
            self._watch.is_up(name) is not False for name in self._remote_backends(model)
        ):
            return ModelState(name=model.name, state="loaded")
        if failure := self._local.failure(model.name):
            return ModelState(name=model.name, state="failed", error=failure)
        if address is not None or self._local.is_loading:
            return ModelState(name=model.name, state="loading")
        if remote := self._remote_backends(model):
            return ModelState(name=model.name, state="down", error=f"no backend of it is up ({', '.join(remote)})")
        return ModelState(name=model.name, state="unloaded")

    def _resident_bytes(self, pid: int) -> float | None:
        use = self._measurements.processes.use(pid)
        return use.resident_bytes if use is not None else None

    # -- tasks --------------------------------------------------------------------------------------------------

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task for as long as control lives: if it fails, control ends, and the supervisor starts it again."""
        task = self._loop.create_task(work)
        task.add_done_callback(self._kept_ended)
        return task

    def _kept_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("control cannot go on", exc_info=error)
            os._exit(1)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that control waits for at its end."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a fault of control itself", exc_info=error)
            self._measurements.error("internal")

    def _post(self, step: Callable[[], None]) -> None:
        """From the lifeline's thread into the loop."""
        self._loop.call_soon_threadsafe(step)

    async def _tick(self) -> None:
        due = self._loop.time() + TICK_S
        while True:
            self._child.beat()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            now = self._loop.time()
            self._measurements.late(max(0.0, now - due))
            self._measurements.collections.flush()
            self._monitoring.tick()
            due = now + TICK_S

    def _reload_quietly(self) -> None:
        audit = self._monitoring.logs.audit
        try:
            waiting = self.reload()
        except ConfigError as error:  # logged, and shown by config_last_reload_successful
            audit("config_reloaded", actor="SIGHUP", success=False, problem=str(error))
        else:
            audit("config_reloaded", actor="SIGHUP", success=True, needs_restart=", ".join(waiting))

    def _abandon(self) -> None:
        """The supervisor is gone: stop listening at once and leave."""
        self._server.close_listeners()
        self._stopping.set()


def _lacks_a_price(table: RoutingTable) -> bool:
    return any(deployment.price is None for model in table.models for deployment in model.deployments)


async def _run(child: Child, settings: Settings, reload: Callable[[], Settings], console: Console) -> None:
    await Control(child, settings, reload, console).run()


def main() -> None:
    """`python -m llm_router.processes.control --spec-fd N`; the supervisor starts it."""
    child = Child.from_argv()
    console = log_to_stderr(child.spec.name, child.spec.plan)
    plan = child.spec.plan

    def read() -> Settings:
        settings = load(plan.config_path or None, os.environ, plan.overrides)
        if settings.routing.custom:
            load_custom(settings.routing.custom)  # workers import it: what cannot be had is refused here
        return settings

    try:
        settings = read()
    except RouterError as error:
        _log.error("the configuration cannot be used: %s", error)
        sys.exit(EXIT_REFUSED)
    gc.freeze()  # what was imported lives as long as the process: collections need not look at it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(child, settings, read, console))


if __name__ == "__main__":
    main()
