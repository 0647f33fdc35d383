"""`MonitoredLLMRouter`: the router of library mode with its collector, its health checks and a metrics server.

Every inference is counted once, by the router itself, whether it came by `quick`, `chat`, `stream` or `asgi()`; the
collector adds what else the program counts. Not for: serving the models' API (application.py, `llm-router serve`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from llm_router.app import LLMRouter
from llm_router.config import Settings
from llm_router.library.health import HealthChecker
from llm_router.library.host import Host, disk_path
from llm_router.library.listener import Listener, guarded
from llm_router.library.logger import StructuredLogger
from llm_router.library.metrics import MetricsCollector
from llm_router.library.pages import Pages, routes
from llm_router.routing.policies import CustomFunction
from llm_router.signals import Around, Recorder, RequestRecord

METRICS_PORT: Final = 9090


class MonitoredLLMRouter(LLMRouter):
    """As `LLMRouter`, observed. Belongs to one event loop.

    Args:
        logger: is told each request and inference, and each model that is loaded or unloaded; it stays the caller's.

    Attributes:
        health: the checks; `await router.health.start()` has them run by themselves, as the metrics server does.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Settings | None = None,
        *,
        env: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        policy: CustomFunction | None = None,
        logger: StructuredLogger | None = None,
    ) -> None:
        super().__init__(config, env=env, data_dir=data_dir, policy=policy)
        settings = self.settings
        self._collector = MetricsCollector(
            enabled=settings.metrics.enabled,
            guide_names=settings.metrics.guide_names,
            inside=self.inside(),
            host=Host(disk_path(settings.health.disk_path, self)) if settings.metrics.enabled else None,
        )
        self.health = HealthChecker(
            self, on_result=self._collector.health_checked, on_transition=self._collector.health_turned
        )
        if settings.health.enabled:
            self._collector.show(self.health.readings)
        self._instruments.sample(settings.metrics.sample)
        self._listener: Listener | None = None
        if logger is not None:
            self.tell(logger)

    def tell(self, logger: StructuredLogger) -> None:
        """Have a logger write each request and inference from now on, and each model that is loaded or unloaded."""
        if isinstance(self._recorder, _Told) and self._recorder.logger is logger:
            return
        self._recorder = _Told(self._recorder, logger)
        logger.is_told_by_router = True
        self.on("model-loaded", lambda model: logger.model_load(model, model.load_duration * 1000))
        self.on("model-unloaded", logger.model_unload)

    @property
    def metrics(self) -> MetricsCollector:
        """The collector: the router's metrics and one's own. `router.metrics()` gives the text, as in `LLMRouter`."""
        return self._collector

    async def cleanup(self) -> None:
        """End the metrics server, checks, runners, connections and background work. Doing it twice does nothing."""
        await self.stop_metrics_server()
        await self.health.stop()
        await super().cleanup()

    async def start_metrics_server(
        self, port: int = METRICS_PORT, host: str = "127.0.0.1", *, insecure: bool = False
    ) -> Listener:
        """Serve metrics, health and `/debug` at an address of their own, until `stop_metrics_server` or `cleanup`.

        Args:
            port: 0 takes any free one; the listener that is returned knows it.
            insecure: needed for a host that other machines can reach, as no key is asked for; there is no `/debug` then.

        Returns: the listener; the one that runs already, if one does.
        Raises: ConfigError when the address cannot be had.
        """
        if self._listener is not None:
            return self._listener
        settings = self.settings
        pages = Pages(
            self._collector,
            self.health if settings.health.enabled else None,
            router=self,
            environment=settings.server.environment,
        )
        metrics_path, health_path = settings.metrics.endpoint, settings.health.endpoint
        shown = routes(
            pages,
            metrics_path=metrics_path,
            health_path=health_path,
            metrics_enabled=settings.metrics.enabled,
            health_enabled=settings.health.enabled,
            debug_enabled=not insecure,
        )
        app = guarded(shown, host, metrics_path=metrics_path, health_path=health_path)
        listener = self._listener = Listener(app, host=host, port=port, insecure=insecure)
        await listener.start()
        if settings.health.enabled:
            await self.health.start()
        return listener

    async def stop_metrics_server(self) -> None:
        """End it. A second call does nothing."""
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.aclose()


class _Told(Around):
    """A recorder that tells a logger, too."""

    def __init__(self, inner: Recorder, logger: StructuredLogger) -> None:
        super().__init__(inner)
        self.logger = logger

    def finish(self, record: RequestRecord, now: float) -> None:
        if not record.finished:
            self._finish(record, now)
            self.logger.finished(record, now)
