"""`llm-router check`: is the configuration good, and what does it say?"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llm_router.cli.options import ConfigFile, DataDir, reachable
from llm_router.errors import BadModelFile, BadOptions, ConfigError, OutOfMemory

if TYPE_CHECKING:
    from llm_router.accounts.limits import Limits
    from llm_router.config import ModelSettings, Settings

EPILOG = """Exit status 0 if a router would start with it, 2 if not. Nothing is started and no backend is asked.

Example: `llm-router check --config production.yaml && llm-router reload --config production.yaml`"""


def check(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Check the configuration without starting anything, and say what was found."""
    from llm_router.cli.options import settings_of

    settings = settings_of(config, data_dir=data_dir)
    check_models(settings)
    check_policy(settings)
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


def check_policy(settings: Settings) -> None:
    """Import the function of the strategy `custom`. Raises ConfigError when it cannot be had."""
    if settings.routing.custom:
        from llm_router.routing.policies import load_custom

        load_custom(settings.routing.custom)


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
        + ("" if backend.protocol == "openai" else f", speaks the protocol of {backend.protocol}")
        for backend in settings.backends
    ]
    if settings.routing.default_model:
        lines.append(f"default model: {settings.routing.default_model}")
    custom = f" ({settings.routing.custom})" if settings.routing.custom else ""
    lines.append(f"strategy: {settings.routing.strategy}{custom}")
    if settings.limits:
        lines.append(f"all callers together: {_bounds(settings.limits)}")
    lines += [_cache(settings), _accounts(settings), _keys(settings)]
    return lines + [f"note: {note}" for note in settings.notes]


def _served_by(model: ModelSettings) -> str:
    places = [f"runs here from {model.file}"] if model.file else []
    places += [f"{deployment.upstream_model} on {deployment.backend}" for deployment in model.deployments]
    if model.members:
        places.append("all other models" if model.members == "all" else f"what serves {', '.join(model.members)}")
    parts = [", ".join(places)]
    if model.strategy:
        parts.append(f"strategy {model.strategy}")
    if model.limits:
        parts.append(_bounds(model.limits))
    if model.fallbacks:
        parts.append(f"falls back to {', '.join(model.fallbacks)}")
    return "; ".join(parts)


def _bounds(limits: Limits) -> str:
    from llm_router.accounts.limits import KINDS

    return ", ".join(f"{kind} {value:g}" for kind in KINDS if (value := getattr(limits, kind)))


def _cache(settings: Settings) -> str:
    from llm_router.config.units import show_bytes, show_seconds

    cache = settings.cache
    if not cache.enabled:
        return "cache: off"
    where = f"in Redis at {_place(cache.url)}" if cache.url else f"{show_bytes(cache.max_bytes)} in memory"
    return f"cache: {where}, for {show_seconds(cache.ttl_s)}"


def _accounts(settings: Settings) -> str:
    from llm_router.accounts.database import read_url

    accounts = settings.accounts
    shared = f"; limits are counted in Redis at {_place(accounts.redis)}" if accounts.redis else ""
    return f"keys and usage: {read_url(accounts.database).label}{shared}"


def _keys(settings: Settings) -> str:
    from llm_router.config import keys_needed

    needed = keys_needed(settings)
    if needed.inference:
        return "a key is needed for everything"
    if needed.admin:
        return "a key is needed for monitoring and administration; for models as soon as there is one"
    if settings.server.insecure:
        return "no key is needed, wherever a request comes from"
    return "no key is needed until there is one"


def _place(url: str) -> str:
    """Host, port and path of a URL, without what may be secret."""
    parts = urlsplit(url)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path}"
