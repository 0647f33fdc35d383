"""`MonitoredApplication`: a whole program around a router, in one process: the models' API, monitoring and your routes.

Inferences are served by the router's own front, which records them; everything else passes the middlewares of metrics and
logs. Not for: production with many callers: `llm-router serve` has several processes, keys and limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from starlette.applications import Starlette

from llm_router import __version__
from llm_router.config import Settings
from llm_router.gateway.asgi import AsgiFront
from llm_router.library.asgi import App, Receive, Scope, Send
from llm_router.library.listener import Listener, guarded
from llm_router.library.logger import StructuredLogger
from llm_router.library.pages import Pages, routes
from llm_router.library.router import MonitoredLLMRouter
from llm_router.library.switches import Components, Integrations
from llm_router.library.system import MonitoringSystem

PORT: Final = 3000
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class MonitoredApplication:
    """A router with everything around it. Belongs to one event loop; an async context manager.

        application = MonitoredApplication("llm-router.yaml", logging={"log_dir": "logs"})
        await application.start(port=3000)
        await application.wait_closed()

    It is an ASGI application itself, for a server of yours: then `await application.initialize()` and `shutdown()`.

    Args:
        router: a configuration, or a router. As for `LLMRouter`.
        logging: arguments of `StructuredLogger`; by default in the configuration's log folder.
        components, integrations: as for `MonitoringSystem`.
        env: environment that the configuration may refer to; the process's own by default.

    Raises: ConfigError naming what cannot be used.

    Attributes:
        app: a Starlette application for routes of your own: `application.app.add_route("/hello", hello)`.
        router, logger, metrics, health, monitoring: the parts.
    """

    def __init__(
        self,
        router: str | os.PathLike[str] | Settings | MonitoredLLMRouter | None = None,
        *,
        logging: Mapping[str, Any] | None = None,
        components: Mapping[str, bool] | Components | None = None,
        integrations: Mapping[str, bool] | Integrations | None = None,
        env: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.router, self.logger = _made(router, logging, env, data_dir)
        self.monitoring = MonitoringSystem(router=self.router, components=components, integrations=integrations)
        self.metrics = self.router.metrics
        self.health = self.router.health
        self.app = Starlette()
        self._front: AsgiFront | None = None
        self._pages: App = self.app
        self._paths: frozenset[str] = frozenset()
        self._listener: Listener | None = None
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._closed = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._has_handlers = False
        self._is_initialized = False
        # The program's own part passes both; a request is one record for them.
        self._watched = self.logger.middleware(self.monitoring.middleware(self._rest))
        self._show("127.0.0.1", debug=True)

    def __repr__(self) -> str:
        return f"<MonitoredApplication {self.url or 'not listening'}, {self._in_flight} requests in flight>"

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Where it listens; 0 while it does not."""
        return 0 if self._listener is None else self._listener.port

    @property
    def url(self) -> str:
        """The same for people; empty while it does not."""
        return "" if self._listener is None else self._listener.url

    async def initialize(self) -> None:
        """Start router and monitoring, without listening. A second call does nothing.

        Raises: ConfigError; a model that cannot be loaded does not stop the others.
        """
        if not self._is_initialized:
            self._is_initialized = True
            await self.router.initialize()
            self._front = self.router.asgi()
            await self.monitoring.start()

    async def start(
        self, port: int = PORT, host: str = "127.0.0.1", *, insecure: bool = False, handle_signals: bool = True
    ) -> None:
        """Start everything, and accept requests. What cannot start ends what did, and raises.

        Args:
            port: 0 takes any free one, see `port`.
            insecure: needed for a host that other machines can reach: no key is asked for. There is no `/debug` then.
            handle_signals: whether SIGTERM and SIGINT shut it down; only in the main thread.

        Raises: ConfigError when the address cannot be had.
        """
        if self._listener is not None:
            return
        try:
            self._show(host, debug=not insecure)
            listener = Listener(self, host=host, port=port, insecure=insecure)
            try:
                await self.initialize()
                await listener.start()
            except BaseException:
                await listener.aclose()
                raise
        except BaseException as error:
            self.logger.error("Failed to start application", error)
            await self.shutdown()
            raise
        self._listener = listener
        if handle_signals and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)
            self._has_handlers = True
        environment = self.router.settings.server.environment
        self.logger.info("Application started", {"port": self.port, "environment": environment, "version": __version__})

    async def shutdown(self, signal: str = "") -> None:
        """Accept no more, let requests in flight end (for the `server.drain` of the configuration), end everything.

        The log files are complete when this returns. A second call waits for the first.

        Args:
            signal: its name, if one is the reason.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(signal), name="llm-router shutdown")
        await asyncio.shield(self._ending)

    async def wait_closed(self) -> None:
        """Return when it was shut down, by whatever."""
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def _end(self, signal: str) -> None:
        self.logger.info("Shutting down gracefully", {"signal": signal} if signal else None)
        if self._has_handlers:
            for number in _SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close_to_new()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.router.settings.server.drain_s):
                while self._in_flight:
                    self._idle.clear()
                    await self._idle.wait()
        for what, step in self._steps(listener):
            try:
                await step()
            except Exception as error:  # the rest has to end all the same
                self.logger.error(f"{what} could not be ended as it should be", error)
        self.logger.info("Shutdown complete")
        await asyncio.to_thread(self.logger.close)
        self._closed.set()

    def _steps(self, listener: Listener | None) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        steps: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("The monitoring", self.monitoring.stop),
            ("The router", self.router.cleanup),
        ]
        return steps if listener is None else [("The listener", listener.aclose), *steps]

    def _signalled(self, number: signal.Signals) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(number.name), name="llm-router shutdown")

    # -- requests ----------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._in_flight += 1
        try:
            path: str = scope["path"]
            if self._front is not None and (path == "/api/generate" or path.startswith("/v1/")):
                await self._front(scope, receive, send)
            else:
                await self._watched(scope, receive, send)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _rest(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._pages if scope["path"] in self._paths else self.app
        await app(scope, receive, send)

    def _show(self, host: str, *, debug: bool) -> None:
        """Have the monitoring pages there, for a listener at `host`."""
        monitoring = self.monitoring
        components = monitoring.components
        pages = Pages(
            self.metrics,
            self.health if components.health else None,
            router=self.router,
            environment=self.router.settings.server.environment,
        )
        metrics_path, health_path = monitoring.metrics_path, monitoring.health_path
        shown = routes(
            pages,
            metrics_path=metrics_path,
            health_path=health_path,
            metrics_enabled=components.prometheus,
            health_enabled=components.health,
            debug_enabled=debug and monitoring.enabled,
        )
        self._paths = frozenset(route.path for route in shown)
        self._pages = guarded(shown, host, metrics_path=metrics_path, health_path=health_path)


def _made(
    router: str | os.PathLike[str] | Settings | MonitoredLLMRouter | None,
    options: Mapping[str, Any] | None,
    env: Mapping[str, str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> tuple[MonitoredLLMRouter, StructuredLogger]:
    """The router, and the logger that it tells."""
    made = router if isinstance(router, MonitoredLLMRouter) else MonitoredLLMRouter(router, env=env, data_dir=data_dir)
    settings = made.settings
    usual = {
        "settings": settings.logs,
        "log_dir": settings.server.log_dir or os.path.join(settings.server.data_dir, "logs"),
        "environment": settings.server.environment,
        "log_level": settings.logs.level,
    }
    logger = StructuredLogger(**{**usual, **(options or {})})
    made.tell(logger)
    return made, logger
