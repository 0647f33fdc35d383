"""LLM Runner Router: runs language models, routes requests to them, and is observable from the first request.

Public names only, imported when first used: the supervisor imports modules of this package and must stay
small, so importing the package itself imports nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_router.app import LLMRouter, LoadedModel
    from llm_router.chat import Chunk
    from llm_router.errors import BackendError, ConfigError, ModelError, RequestError, RouterError
    from llm_router.gateway.generate import Generated
    from llm_router.library.alerting import Alerting, AlertState
    from llm_router.library.application import MonitoredApplication
    from llm_router.library.health import HealthChecker
    from llm_router.library.logger import StructuredLogger
    from llm_router.library.metrics import MetricsCollector
    from llm_router.library.router import MonitoredLLMRouter
    from llm_router.library.system import MonitoringSystem
    from llm_router.models.launch import RunnerSpec

__version__ = "0.1.0"

__all__ = [
    "AlertState",
    "Alerting",
    "BackendError",
    "Chunk",
    "ConfigError",
    "Generated",
    "HealthChecker",
    "LLMRouter",
    "LoadedModel",
    "MetricsCollector",
    "ModelError",
    "MonitoredApplication",
    "MonitoredLLMRouter",
    "MonitoringSystem",
    "RequestError",
    "RouterError",
    "RunnerSpec",
    "StructuredLogger",
    "__version__",
]

_HOMES = {
    "AlertState": "llm_router.library.alerting",
    "Alerting": "llm_router.library.alerting",
    "BackendError": "llm_router.errors",
    "Chunk": "llm_router.chat",
    "ConfigError": "llm_router.errors",
    "Generated": "llm_router.gateway.generate",
    "HealthChecker": "llm_router.library.health",
    "LLMRouter": "llm_router.app",
    "LoadedModel": "llm_router.app",
    "MetricsCollector": "llm_router.library.metrics",
    "ModelError": "llm_router.errors",
    "MonitoredApplication": "llm_router.library.application",
    "MonitoredLLMRouter": "llm_router.library.router",
    "MonitoringSystem": "llm_router.library.system",
    "RequestError": "llm_router.errors",
    "RouterError": "llm_router.errors",
    "RunnerSpec": "llm_router.models.launch",
    "StructuredLogger": "llm_router.library.logger",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
