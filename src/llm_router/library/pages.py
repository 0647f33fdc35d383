"""The monitoring pages of a program that is not our gateway: the same documents at the same paths.

Not for: who may see them: whoever mounts these routes decides that, except on listeners of our own (listener.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router import __version__
from llm_router.admin import debug, monitoring
from llm_router.app import LLMRouter
from llm_router.errors import RouterError
from llm_router.gateway.openai import error_object
from llm_router.library.health import HealthChecker
from llm_router.library.host import state_of
from llm_router.library.metrics import MetricsCollector
from llm_router.observe.health.report import Report
from llm_router.observe.metrics.slots import Collected

_INDEX: Final = "/"


class Pages:
    """What the pages show.

    Args:
        router: whose state `/debug` tells; None where there is none.
        environment: the operator's word for what the program is used for.
    """

    def __init__(
        self, metrics: MetricsCollector, health: HealthChecker | None, *, router: LLMRouter | None, environment: str
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._router = router
        self._environment = environment

    def metrics(self, *, openmetrics: bool) -> bytes:
        return self._metrics(openmetrics=openmetrics)

    def metrics_json(self) -> bytes:
        return self._metrics.render_json()

    def health(self) -> Report:
        assert self._health is not None, "there is no such page without health"
        return self._health.report()

    def readiness(self) -> tuple[bool, str]:
        if self._health is not None:
            report = self._health.report()
            return report.http_status == 200, "ready" if report.http_status == 200 else report.status
        return self.is_initialized(), "ready" if self.is_initialized() else "initializing"

    def is_initialized(self) -> bool:
        return self._router is None or bool(self._router.get_status()["initialized"])

    # -- /debug ----------------------------------------------------------------------------------------------

    def status(self) -> debug.RouterStatus:
        is_ready, word = self.readiness()
        status: dict[str, Any] = {} if self._router is None else self._router.get_status()
        models = [] if self._router is None else self._router.registry.list()
        return debug.RouterStatus(
            state=word,
            initialized=self.is_initialized(),
            ready=is_ready,
            models={model.name: state_of(model) for model in models},
            strategy=status.get("strategy", ""),
            engine=status.get("engine", ""),
            environment=self._environment,
        )

    def health_document(self) -> Mapping[str, Any] | None:
        return None if self._health is None else self._health.report().document()

    def collected(self) -> Collected:
        return self._metrics.collected()

    async def model_facts(self) -> Sequence[debug.ModelFacts]:
        if self._router is None:
            return []
        failed: Mapping[str, str] = self._router.get_status()["failed"]
        return [
            debug.ModelFacts(
                name=model.name,
                state=state_of(model),
                load_s=model.load_duration or None,
                memory_bytes=model.memory or None,
                error=failed.get(model.name, ""),
            )
            for model in self._router.registry.list()
        ]


def routes(
    pages: Pages,
    *,
    metrics_path: str = "/metrics",
    health_path: str = "/health",
    metrics_enabled: bool = True,
    health_enabled: bool = True,
    debug_enabled: bool = False,
    index: bool = False,
) -> list[Route]:
    """Routes for Starlette or FastAPI. What is not enabled has none.

    Args:
        debug_enabled: with `/debug` and `/debug/models`, which show how the program is made: for administrators.
        index: with `/`, a list of what there is.
    """
    found = monitoring.routes(
        pages,
        version=__version__,
        metrics_path=metrics_path,
        health_path=health_path,
        now=time.time,
        metrics_enabled=metrics_enabled,
        health_enabled=health_enabled,
    )
    if not index:
        found = [route for route in found if route.path != _INDEX]
    if not health_enabled:
        found = [route for route in found if not route.path.startswith("/health/")]
    if debug_enabled:
        shown = debug.routes(
            pages, traces=lambda: None, version=__version__, now=time.time, metrics_enabled=metrics_enabled
        )
        found += [route for route in shown if route.path in ("/debug", "/debug/models")]
    return [Route(route.path, _answering(route.endpoint), methods=["GET"]) for route in found]


def _answering(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint in an application that does not know our errors."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RouterError as error:
            return Response(error_object(error, uuid.uuid4().hex), error.status, media_type="application/json")

    return answer
