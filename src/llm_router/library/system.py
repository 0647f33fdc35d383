"""`MonitoringSystem`: metrics, health, alerting and profiles as one thing, for a program that is not our gateway.

    monitoring = MonitoringSystem()
    app = Starlette(routes=[*my_routes, *monitoring.routes()], middleware=[Middleware(monitoring.middleware)])
    await monitoring.start()

A part that is switched off takes what it is told and keeps nothing: a program need not ask whether it is there.
Not for: delivering alerts, or several processes (`llm-router serve`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, Self

from starlette.routing import Route

from llm_router.app import LLMRouter
from llm_router.errors import ConfigError, RouterError
from llm_router.library.alerting import INTERVAL_S, Alerting, HealthWord, Look
from llm_router.library.asgi import App, RouteOf
from llm_router.library.health import HealthChecker
from llm_router.library.host import PROCESS, Host, disk_path
from llm_router.library.listener import Listener, guarded
from llm_router.library.metrics import MetricsCollector
from llm_router.library.pages import Pages, routes
from llm_router.library.router import MonitoredLLMRouter
from llm_router.library.switches import Components, Integrations, changed, from_environment, from_settings
from llm_router.observe.profiling.profiler import Profiler
from llm_router.observe.profiling.settings import ProfilerSettings

_log = logging.getLogger(__name__)

_HOST: Final = "127.0.0.1"


class MonitoringSystem:
    """The monitoring of one program. Belongs to one event loop; an async context manager.

    Args:
        enabled: whether there is any; by default MONITORING_ENABLED, else yes.
        components: which parts there are: prometheus, health, alerting, profiler. What is not named is as the
            environment says (PROMETHEUS_ENABLED, HEALTH_CHECK_ENABLED, ALERTING_ENABLED, PROFILER_ENABLED), else on, but
            for the profiler.
        integrations: metrics_to_alerting and health_to_alerting, both on. The names of the guide, like
            metricsToAlerting, are understood.
        router: whose metrics and state are shown, too; its configuration then has the word that the environment has
            otherwise. One with a collector and checks of its own (MonitoredLLMRouter) shares them.
        metrics_port: where to listen for Prometheus; None: nowhere, as your application has `routes()`.
        interval: seconds between two looks at the rules.
        env: where the switches are read.

    Raises: ConfigError naming what cannot be used, and the way out.

    Attributes:
        metrics, health, alerting, profiler: the parts, whatever is on.
    """

    def __init__(
        self,
        *,
        enabled: bool | None = None,
        components: Mapping[str, bool] | Components | None = None,
        integrations: Mapping[str, bool] | Integrations | None = None,
        router: LLMRouter | None = None,
        metrics_port: int | None = None,
        metrics_host: str = _HOST,
        insecure: bool = False,
        interval: float = INTERVAL_S,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        usual = from_environment(env) if router is None else from_settings(router.settings)
        if enabled is not None and not isinstance(enabled, bool):
            raise ConfigError("enabled", f"{enabled!r} will not do: write True or False")
        self.enabled = usual.enabled if enabled is None else enabled
        wanted = changed(usual.components, components, "components")
        off = Components(prometheus=False, health=False, alerting=False, profiler=False)
        self.components = wanted if self.enabled else off
        self.integrations = changed(Integrations(), integrations, "integrations")
        self.metrics_path, self.health_path = usual.metrics_path, usual.health_path
        self._environment = usual.environment
        self._address = (metrics_host, metrics_port, insecure)
        self._listener: Listener | None = None
        self._started: dict[str, bool] = {}
        self._failed: dict[str, str] = {}
        self._router = router
        own = router if isinstance(router, MonitoredLLMRouter) else None
        self.metrics = (
            own.metrics
            if own is not None
            else MetricsCollector(
                enabled=self.components.prometheus,
                inside=None if router is None else router.inside(),
                host=Host(disk_path("", router)) if self.components.prometheus else None,
                wall=wall,
            )
        )
        self.health = (
            own.health
            if own is not None
            else HealthChecker(
                router,
                environment=self._environment,
                on_result=self.metrics.health_checked,
                on_transition=self.metrics.health_turned,
                clock=clock,
                wall=wall,
            )
        )
        if self.components.health:
            self.metrics.show(self.health.readings)
        self.alerting = Alerting(
            self._look,
            enabled=self.components.alerting,
            interval_s=interval,
            clock=clock,
            wall=wall,
            on_failure=lambda: self.metrics.error("alert_condition", "alerting", "error"),
        )
        self.profiler = Profiler(ProfilerSettings(), process=PROCESS, clock=clock, wall=wall)
        self._pages = Pages(
            self.metrics,
            self.health if self.components.health else None,
            router=router,
            environment=self._environment,
        )
        self._parts: dict[str, tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]] = {
            "prometheus": (self._start_listening, self._stop_listening),
            "health": (self.health.start, self.health.stop),
            "alerting": (self.alerting.start, self.alerting.stop),
            "profiler": (self._start_profiler, self._stop_profiler),
        }

    def __repr__(self) -> str:
        return f"<MonitoringSystem {', '.join(f'{name} {state}' for name, state in self.status().items())}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start what is on. What cannot start is logged and tells why in `status()`; the others run. Twice does nothing."""
        for name, (begin, _) in self._parts.items():
            if not getattr(self.components, name) or name in self._started:
                continue
            try:
                await begin()
            except Exception as error:  # whatever it is: the program is not to suffer from its monitoring
                self._failed[name] = (
                    error.message if isinstance(error, RouterError) else f"{type(error).__name__}: {error}"
                )
                _log.error("the monitoring goes on without %s: %s", name, self._failed[name])
            else:
                self._failed.pop(name, None)
                self._started[name] = True

    async def stop(self) -> None:
        """Stop what runs, in reverse; what was counted stays. A second call does nothing."""
        for name in reversed(self._started):
            try:
                await self._parts[name][1]()
            except Exception:
                _log.exception("%s could not be stopped as it should be", name)
        self._started.clear()

    @property
    def is_running(self) -> bool:
        """Whether anything that was started runs."""
        return bool(self._started)

    def status(self) -> dict[str, str]:
        """Each part: off, stopped, running, or `failed: ` and why."""
        return {
            name: "off"
            if not getattr(self.components, name)
            else "running"
            if name in self._started
            else f"failed: {self._failed[name]}"
            if name in self._failed
            else "stopped"
            for name in self._parts
        }

    # -- in somebody's application ------------------------------------------------------------------------------

    def middleware(self, app: App, *, route_of: RouteOf | None = None) -> App:
        """`app` with its requests counted; `app` itself where metrics are off. As `MetricsCollector.middleware`."""
        return self.metrics.middleware(app, route_of=route_of) if self.components.prometheus else app

    def routes(self, *, debug: bool = False) -> list[Route]:
        """Routes for a Starlette or FastAPI application: metrics and health, as far as they are on.

        Args:
            debug: with `/debug` and `/debug/models`, which are for administrators: protect them.
        """
        return routes(
            self._pages,
            metrics_path=self.metrics_path,
            health_path=self.health_path,
            metrics_enabled=self.components.prometheus,
            health_enabled=self.components.health,
            debug_enabled=debug and self.enabled,
        )

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds the metrics; empty while there is no listener."""
        return "" if self._listener is None else f"{self._listener.url}{self.metrics_path}"

    # -- parts ---------------------------------------------------------------------------------------------------

    async def _start_listening(self) -> None:
        host, port, insecure = self._address
        if port is not None:
            app = guarded(self.routes(), host, metrics_path=self.metrics_path, health_path=self.health_path)
            listener = Listener(app, host=host, port=port, insecure=insecure)
            await listener.start()
            self._listener = listener

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.aclose()

    async def _start_profiler(self) -> None:
        usual = ProfilerSettings() if self._router is None else self._router.settings.profiler
        self.profiler.apply(
            ProfilerSettings(
                enabled=True,
                rate_hz=usual.rate_hz,
                continuous_hz=usual.continuous_hz,
                continuous_s=usual.continuous_s,
            )
        )

    async def _stop_profiler(self) -> None:
        self.profiler.close()

    def _look(self) -> Look:
        metrics = self.metrics.collected() if self.integrations.metrics_to_alerting else None
        if not (self.integrations.health_to_alerting and self.components.health):
            return Look(metrics)
        report = self.health.report()
        checks = report.checks
        return Look(metrics, {name: HealthWord(value, checks[name].message) for name, value in report.values().items()})
