"""What is the same for everybody's backend of one kind: address, dialect, how the key is sent, whose prices count.

A preset stands in for keys that an entry of `backends` leaves out. Not for: speaking to them (backends).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal
from urllib.parse import urlsplit

Preset = Literal["openai", "azure", "openrouter", "ollama", "vllm", "llama-server", "anthropic"]

LOCAL: Final = "local"
"""The provider of servers of one's own: their tokens cost nothing."""

_AZURE_API: Final = "/openai/v1"
"""Azure's API without dated versions: deployments are named by the request's `model`, as everywhere else."""

_AZURE_VERSION: Final = "api-version=2024-10-21"
"""The last version that is no preview of the API with a path for each deployment."""

_PRESETS: Final[Mapping[Preset, Mapping[str, Any]]] = {
    "openai": {"url": "https://api.openai.com/v1", "provider": "openai"},
    # Each resource has an address of its own.
    "azure": {"auth": "api-key", "provider": "azure"},
    "openrouter": {"url": "https://openrouter.ai/api/v1", "provider": "openrouter"},
    "ollama": {"url": "http://127.0.0.1:11434/v1", "provider": LOCAL},
    "vllm": {"url": "http://127.0.0.1:8000/v1", "provider": LOCAL},
    "llama-server": {"url": "http://127.0.0.1:8080/v1", "provider": LOCAL},
    "anthropic": {
        "url": "https://api.anthropic.com/v1",
        "protocol": "anthropic",
        "auth": "x-api-key",
        "embeddings": False,
        "provider": "anthropic",
    },
}

NEED_A_KEY: Final = frozenset[str](("openai", "azure", "openrouter", "anthropic"))
"""Whose servers refuse requests without one."""


def with_preset(preset: Preset, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `backends` with what the preset says; what the entry says itself wins."""
    filled = {**_PRESETS[preset], **entry}
    url = filled.get("url")
    if preset == "azure" and isinstance(url, str):
        try:
            path = urlsplit(url).path
        except ValueError:  # whoever checks the address says so
            return filled
        if not path.strip("/"):
            filled["url"] = url.rstrip("/") + _AZURE_API
        elif "/deployments/" in path:
            filled.setdefault("query", _AZURE_VERSION)
    return filled
