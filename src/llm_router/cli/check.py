"""`llm-router check`: is the configuration good, and what does it say?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_router.cli.options import ConfigFile, DataDir, reachable
from llm_router.errors import BadModelFile, BadOptions, ConfigError, OutOfMemory

if TYPE_CHECKING:
    from llm_router.config import ModelSettings, Settings

EPILOG = """Exit status 0 if a router would start with it, 2 if not. Nothing is started and no backend is asked.

Example: `llm-router check --config production.yaml && llm-router reload --config production.yaml`"""


def check(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Check the configuration without starting anything, and say what was found."""
    from llm_router.cli.options import settings_of
    from llm_router.config import check_exposure

    settings = settings_of(config, data_dir=data_dir)
    check_exposure(settings)
    check_models(settings)
    print("\n".join(report(settings)))


def check_models(settings: Settings) -> None:
    """Read the header of every model file. Raises ConfigError for one that could never be run.

    Whether it fits into memory is not judged: that changes, and whoever loads it says so.
    """
    from llm_router.models.launch import check as check_runner

    for index, model in enumerate(settings.models):
        if model.runner is None:
            continue
        try:
            check_runner(model.runner)
        except OutOfMemory:
            continue
        except BadModelFile as error:
            raise ConfigError(f"models[{index}].file", error.message) from error
        except BadOptions as error:
            raise ConfigError(f"models[{index}].runner", error.message) from error


def report(settings: Settings) -> list[str]:
    """What a person wants to see confirmed, line by line; nothing secret."""
    server = settings.server
    workers = f"{server.workers} worker{'s' if server.workers > 1 else ''}"
    lines = [
        f"{settings.source or 'no file, the defaults'}: good",
        f"API on {reachable(server.host)}:{server.port} with {workers}, "
        + (
            f"metrics on {reachable(server.metrics_host)}:{server.metrics_port}"
            if server.metrics_port >= 0
            else "metrics there too"
        ),
    ]
    lines += [f"model {model.name}: {_served_by(model)}" for model in settings.models]
    lines += [
        f"backend {backend.name}: {backend.url}, {'with' if backend.api_key else 'without'} a key"
        for backend in settings.backends
    ]
    if settings.routing.default_model:
        lines.append(f"default model: {settings.routing.default_model}")
    return lines + [f"note: {note}" for note in settings.notes]


def _served_by(model: ModelSettings) -> str:
    places = [f"runs here from {model.file}"] if model.file else []
    places += [f"{deployment.upstream_model} on {deployment.backend}" for deployment in model.deployments]
    text = ", ".join(places)
    return f"{text}; falls back to {', '.join(model.fallbacks)}" if model.fallbacks else text
