"""Configuration: `llm-router.yaml`, environment and flags become one frozen `Settings` tree.

Imported by composition roots only (cli, app, processes.control): packages are handed their own section.
"""

from __future__ import annotations

from llm_router.config.load import FILE_NAME, check_exposure, is_loopback, load
from llm_router.config.settings import (
    HealthSettings,
    MetricsSettings,
    ModelSettings,
    RoutingSettings,
    ServerSettings,
    Settings,
)

__all__ = [
    "FILE_NAME",
    "HealthSettings",
    "MetricsSettings",
    "ModelSettings",
    "RoutingSettings",
    "ServerSettings",
    "Settings",
    "check_exposure",
    "is_loopback",
    "load",
]
