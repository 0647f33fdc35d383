"""Configuration: `llm-router.yaml`, environment and flags become one frozen `Settings` tree.

Imported by composition roots only (cli, app, processes.control): packages are handed their own section.
"""

from __future__ import annotations

from llm_router.config.exposure import KeysNeeded, is_loopback, keys_needed
from llm_router.config.load import FILE_NAME, load
from llm_router.config.settings import (
    AccountsSettings,
    AlertingSettings,
    MetricsSettings,
    ModelSettings,
    MonitoringSettings,
    RoutingSettings,
    ServerSettings,
    Settings,
)

__all__ = [
    "FILE_NAME",
    "AccountsSettings",
    "AlertingSettings",
    "KeysNeeded",
    "MetricsSettings",
    "ModelSettings",
    "MonitoringSettings",
    "RoutingSettings",
    "ServerSettings",
    "Settings",
    "is_loopback",
    "keys_needed",
    "load",
]
