"""Who can reach the listeners of a router, and so for what a key is needed before there is any.

Not for: keys themselves (accounts), or the needs that follow from the keys that exist (processes).
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from llm_router.config.settings import Settings


class KeysNeeded(NamedTuple):
    """Whether a key is asked for even if none exists: by the models' API, and by monitoring and administration."""

    inference: bool
    admin: bool


def keys_needed(settings: Settings) -> KeysNeeded:
    """What has to be protected although nobody made a key.

    The port of the API serves monitoring and administration too; the monitoring port serves no models.
    """
    server = settings.server
    if server.insecure:
        return KeysNeeded(inference=False, admin=False)
    is_always = settings.accounts.require_key == "always"
    api = is_always or not is_loopback(server.host)
    return KeysNeeded(inference=api, admin=api or (server.metrics_port >= 0 and not is_loopback(server.metrics_host)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener at `host` (an address, or localhost)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
