"""`HealthChecker`: the router's health checks, and one's own, for a program that is not our gateway.

A thin face over `observe.health`: every check in bounded time, in the background at its interval, three failures in a
row until it turns; endpoints show what was found last. With a router its probes run too (a generation by an idle local
model, the cache, backends). Without one there are the machine's checks and one's own.
Not for: the processes of `llm-router serve` (processes/control_monitoring.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llm_router import __version__, families
from llm_router.admin.application import json_response
from llm_router.admin.monitoring import health_response
from llm_router.app import LLMRouter
from llm_router.library.host import Host, disk_path
from llm_router.observe.health.checks import Check, CheckFunction, Status
from llm_router.observe.health.report import RESERVED, SCHEDULER_CHECK, Health, Report
from llm_router.observe.health.scheduler import CheckResult, HealthChecks
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.observe.health.state import ALIASES, STATE_CHECKS
from llm_router.observe.metrics.slots import Reader
from llm_router.observe.timestamp import timestamp
from llm_router.processes.probes.own_cache import OwnCache
from llm_router.processes.probes.standard import Probes, Sources
from llm_router.processes.probes.traffic import FAMILIES as TRAFFIC_FAMILIES
from llm_router.processes.probes.traffic import traffic_in
from llm_router.signals import Reading

CRITICAL: Final = frozenset(("router_initialized", "models_available", "memory_usage"))
"""Checks of the state without which a router is of no use; of one's own, those that are added so."""

_PROCESSES: Final = ("workers", "runners")  # there are none of these in a program that is not ours
_OF_A_ROUTER: Final = ("router_initialized", "models_available", "models")

Endpoint = Callable[[Request], Awaitable[Response]]


class HealthEndpoints(NamedTuple):
    """Endpoints for Starlette's `Route` or FastAPI's `add_route`."""

    liveness: Endpoint
    readiness: Endpoint
    health: Endpoint


class _Added(NamedTuple):
    function: CheckFunction
    options: dict[str, Any]


class HealthChecker:
    """Runs checks and says how the program is. Belongs to one event loop; `await start()` has them run by themselves.

    Args:
        router: whose state and probes are checked, too.
        timeout, interval: seconds, of a check that does not say otherwise; retries: failures in a row until it turns.
        settings: all there is to say about checks; by default the router's own, and the three above override it.
        environment: the operator's word for what the program is used for; ENVIRONMENT by default.
        on_result: called with the name and the seconds of every run; on_transition: with the name of a check that turned.
    """

    def __init__(
        self,
        router: LLMRouter | None = None,
        *,
        timeout: float | None = None,
        interval: float | None = None,
        retries: int | None = None,
        settings: HealthSettings | None = None,
        environment: str | None = None,
        on_result: Callable[[str, float], None] | None = None,
        on_transition: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        if settings is None:
            settings = HealthSettings() if router is None else router.settings.health
        given = {"timeout_s": timeout, "interval_s": interval, "fall": retries}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name.removesuffix('_s')} is {value!r}; it is more than 0")
        settings = msgspec.structs.replace(
            settings, **{name: value for name, value in given.items() if value is not None}
        )
        own = "" if router is None else router.settings.server.environment
        self._router = router
        self._settings = _without(settings, _PROCESSES if router is not None else (*_PROCESSES, *_OF_A_ROUTER))
        self._environment = environment or own or os.environ.get("ENVIRONMENT", "production")
        self._on_result = on_result
        self._on_transition = on_transition
        self._clock = clock
        self._wall = wall
        self._rng = rng or random.Random()
        self._host = Host(disk_path(settings.disk_path, router))
        self._added: dict[str, _Added] = {}
        self._started_at = clock()
        self._task: asyncio.Task[None] | None = None
        self._checks, self._health = self._made()

    def __repr__(self) -> str:
        return f"<HealthChecker {len(self._added)} checks added, {'running' if self.is_running else 'not running'}>"

    # -- which checks there are ------------------------------------------------------------------------------

    def add_check(
        self,
        name: str,
        function: CheckFunction,
        *,
        critical: bool = False,
        interval: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Run `function` from now on; a check of this name that was added before is replaced.

        Args:
            function: takes nothing, may be a coroutine function; returns True or False, or a mapping with `healthy`,
                `message` and `details`. It fails by saying so, by raising, by taking too long and by returning nonsense.
            critical: whether the program is useless while this fails: `/health` then answers 503.
            interval, timeout: seconds; None: as all.

        Raises: ValueError for a name or number that cannot be used.
        """
        options = {"critical": critical, "interval": interval, "timeout": timeout}
        self._checks.add_check(name, function, **options)  # type: ignore[arg-type]  # each by its name
        self._added[name] = _Added(function, options)
        self._health.forget()

    def remove_check(self, name: str) -> None:
        """Run it no more. Raises: ValueError for an unknown name."""
        self._checks.remove_check(name)
        self._added.pop(name, None)
        self._health.forget()

    def names(self) -> tuple[str, ...]:
        """Every check, those of the state first."""
        return tuple(name for name in self.report().entries if name != SCHEDULER_CHECK)

    def is_critical(self, name: str) -> bool:
        """Whether the program is useless while this check fails. Raises: ValueError for an unknown name."""
        name = ALIASES.get(name, name)
        if name in self._checks:
            return self._checks.check_state(name).is_critical
        if name not in self.report().entries:
            raise ValueError(f"there is no check {name!r}; there are: {', '.join(sorted(self.names()))}")
        own = self._settings.checks.get(name, CheckSettings()).critical
        return name in CRITICAL if own is None else own

    # -- running them ----------------------------------------------------------------------------------------

    async def run_check(self, name: str) -> dict[str, Any]:
        """Run a check now: `{healthy, status, message, details, value, threshold, duration (ms), timestamp, success}`.

        Raises: ValueError for an unknown name, with the known ones.
        """
        return _document(await self._health.run_check(name))

    async def run_all_checks(self) -> dict[str, dict[str, Any]]:
        """Run every check now, some at once; by name."""
        return {name: _document(result) for name, result in (await self._health.run_all_checks()).items()}

    async def get_health_status(self) -> dict[str, Any]:
        """What `/health` shows. Where checks do not run by themselves, they are run now."""
        if not self.is_running:
            await self._health.run_all_checks()
            self._health.forget()
        return self.report().document()

    def report(self) -> Report:
        """What is known, without running anything."""
        return self._health.report()

    def readings(self) -> Iterator[Reading]:
        """`health_check_status` of every check that ran."""
        for name, value in self.report().values().items():
            yield Reading(families.HEALTH_CHECK_STATUS, (name,), value)

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether checks run by themselves."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Run checks by themselves from now on. A second call does nothing."""
        if not self.is_running:
            self._task = asyncio.create_task(self._health.run(), name="llm-router health")
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Run them no more, and end those that run; what was found is forgotten. A second call does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._checks, self._health = self._made()

    # -- endpoints -------------------------------------------------------------------------------------------

    def middleware(self) -> HealthEndpoints:
        """Endpoints for three routes of yours: whether the process turns, whether it is of use, and all of it."""
        return HealthEndpoints(self._liveness, self._readiness, self._show)

    async def _liveness(self, request: Request) -> Response:
        return json_response({"status": "alive", "timestamp": timestamp(self._wall())})

    async def _readiness(self, request: Request) -> Response:
        report = self.report()
        return json_response(report.terse(), report.http_status)

    async def _show(self, request: Request) -> Response:
        return health_response(request, self.report())

    # -- inside ----------------------------------------------------------------------------------------------

    def _made(self) -> tuple[HealthChecks, Health]:
        settings, router = self._settings, self._router
        there = {name for name in STATE_CHECKS if settings.checks.get(name, CheckSettings()).enabled}
        reserved = {name: why for name, why in RESERVED.items() if ALIASES.get(name, name) in there}
        reserved[SCHEDULER_CHECK] = RESERVED[SCHEDULER_CHECK]
        checks = HealthChecks(
            settings,
            clock=self._clock,
            wall=self._wall,
            rng=self._rng,
            on_result=self._ran,
            on_transition=self._turned,
            reserved=reserved,
        )
        if router is not None:
            inside = router.inside()
            reader = Reader([inside.writer.segment], TRAFFIC_FAMILIES)
            sources = Sources(
                table=inside.table,
                traffic=lambda: traffic_in(reader.collect(inside.levels())),
                cache=OwnCache(inside.cache).check,
            )
            purse_path = os.path.join(router.settings.server.data_dir, "probes.json")
            Probes(settings, sources, purse_path=purse_path, clock=self._clock, wall=self._wall).register(checks)
        for name, added in self._added.items():
            checks.add_check(name, added.function, **added.options)
        health = Health(
            lambda: self._host.inputs(router, self._environment),
            checks,
            version=__version__,
            started_at=self._started_at,
            monotonic=self._clock,
            now=self._wall,
            settings=settings,
            on_transition=self._turned,
        )
        return checks, health

    def _ran(self, name: str, check: Check, seconds: float) -> None:
        self._health.forget()
        if self._on_result is not None:
            self._on_result(name, seconds)

    def _turned(self, name: str, old: Status, new: Status) -> None:
        if self._on_transition is not None:
            self._on_transition(name)


def _without(settings: HealthSettings, names: tuple[str, ...]) -> HealthSettings:
    off = {name: msgspec.structs.replace(settings.checks.get(name, CheckSettings()), enabled=False) for name in names}
    return msgspec.structs.replace(settings, checks={**settings.checks, **off})


def _document(result: CheckResult) -> dict[str, Any]:
    check = result.check
    document: dict[str, Any] = {
        **check.extra,
        "healthy": check.is_healthy,
        "status": check.status,
        "message": check.message,
        "details": dict(check.details),
        "value": check.value,
        "threshold": check.threshold,
        "duration": round(result.duration_s * 1000, 3),
        "timestamp": timestamp(result.time),
        "success": result.is_success,
    }
    if result.error:
        document["error"] = result.error
    return document
