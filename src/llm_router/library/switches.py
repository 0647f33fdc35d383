"""What of the monitoring is on: as the caller says, else as the environment says, else as the guide has it.

Not for: what a router's own configuration says (config/load.py), which has read the same environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

import msgspec

from llm_router.config.settings import MonitoringSettings, Settings
from llm_router.config.shape import Shaper, suggest
from llm_router.config.surfaces import is_endpoint
from llm_router.errors import ConfigError
from llm_router.gateway.generate import snake_name

S = TypeVar("S", bound=msgspec.Struct)


class Components(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the monitoring. The profiler costs CPU while a profile is taken, so it has to be asked for."""

    prometheus: bool = True
    health: bool = True
    alerting: bool = True
    profiler: bool = False


class Integrations(msgspec.Struct, frozen=True, kw_only=True):
    """Whether alert rules see the metrics, and whether a health check that is not healthy is an alert."""

    metrics_to_alerting: bool = True
    health_to_alerting: bool = True


class Switches(NamedTuple):
    """All of it, decided."""

    enabled: bool
    components: Components
    metrics_path: str
    health_path: str
    environment: str


_VARIABLES: Final = {
    "prometheus": "PROMETHEUS_ENABLED",
    "health": "HEALTH_CHECK_ENABLED",
    "alerting": "ALERTING_ENABLED",
    "profiler": "PROFILER_ENABLED",
}


def from_environment(env: Mapping[str, str]) -> Switches:
    """What the variables of the monitoring guide say. Raises: ConfigError naming variable, value and way out."""
    components = {name: _switch(env, variable) for name, variable in _VARIABLES.items() if env.get(variable)}
    return Switches(
        _switch(env, "MONITORING_ENABLED") if env.get("MONITORING_ENABLED") else True,
        msgspec.structs.replace(Components(), **components),
        _path(env, "METRICS_ENDPOINT", "/metrics"),
        _path(env, "HEALTH_ENDPOINT", "/health"),
        env.get("ENVIRONMENT") or "production",
    )


def from_settings(settings: Settings) -> Switches:
    """What the configuration of a router says."""
    return Switches(
        settings.monitoring.enabled,
        Components(
            prometheus=settings.metrics.enabled,
            health=settings.health.enabled,
            alerting=settings.alerting.enabled,
            profiler=settings.profiler.enabled,
        ),
        settings.metrics.endpoint,
        settings.health.endpoint,
        settings.server.environment,
    )


def changed(usual: S, given: Mapping[str, bool] | S | None, what: str) -> S:
    """`usual` with what is given; names may be written as in the guide (metricsToAlerting).

    Raises: ConfigError for a name that there is not, or a value that is neither true nor false.
    """
    if given is None:
        return usual
    if not isinstance(given, Mapping):
        return given
    known = usual.__struct_fields__
    changes: dict[str, bool] = {}
    for key, value in given.items():
        name = snake_name(str(key))
        if name not in known:
            raise ConfigError(f"{what}.{key}", f"no such thing{suggest(name, known)}; there are {', '.join(known)}")
        if not isinstance(value, bool):
            raise ConfigError(f"{what}.{key}", f"{value!r} will not do: write True or False")
        changes[name] = value
    return msgspec.structs.replace(usual, **changes)


def _switch(env: Mapping[str, str], variable: str) -> bool:
    shaper = Shaper((), lambda path, problem: ConfigError(variable, problem))
    return shaper.build(MonitoringSettings, {"enabled": env[variable]}, "").enabled


def _path(env: Mapping[str, str], variable: str, usual: str) -> str:
    path = env.get(variable) or usual
    if not is_endpoint(path):
        raise ConfigError(variable, f"{path!r} is no path: it begins with / and does not end with it, like {usual}")
    return path
