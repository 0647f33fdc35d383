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
    from llm_router.models.launch import RunnerSpec

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Chunk",
    "ConfigError",
    "Generated",
    "LLMRouter",
    "LoadedModel",
    "ModelError",
    "RequestError",
    "RouterError",
    "RunnerSpec",
    "__version__",
]

_HOMES = {
    "BackendError": "llm_router.errors",
    "Chunk": "llm_router.chat",
    "ConfigError": "llm_router.errors",
    "Generated": "llm_router.gateway.generate",
    "LLMRouter": "llm_router.app",
    "LoadedModel": "llm_router.app",
    "ModelError": "llm_router.errors",
    "RequestError": "llm_router.errors",
    "RouterError": "llm_router.errors",
    "RunnerSpec": "llm_router.models.launch",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
