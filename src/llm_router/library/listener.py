"""A listener of our own inside the caller's event loop: bounded, without signals, closed in bounded time.

Off loopback it demands that the caller knows what that means, as there are no keys here: `llm-router serve` has them.
Not for: what is answered.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

from starlette.routing import Route

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.admin.application import Entry, Rights, build
from llm_router.admin.server import Server
from llm_router.config.exposure import is_loopback
from llm_router.errors import ConfigError
from llm_router.library.asgi import App

_BACKLOG: Final = 1024  # as the server listens: asyncio calls listen() again
_MAX_PORT: Final = 65_535


class Listener:
    """Serves an ASGI application at an address until `aclose`.

    Args:
        host: an address; one that other machines can reach needs `insecure`.
        port: 0 takes any free one.

    Raises: ConfigError when the address cannot be had.
    """

    def __init__(self, app: App, *, host: str, port: int, insecure: bool = False) -> None:
        if not is_loopback(host) and not insecure:
            raise ConfigError(
                "host",
                f"{host!r} can be reached by other machines, and nobody is asked for a key here: pass insecure=True if a "
                "proxy or a network policy protects it, or use `llm-router serve`, which has keys",
            )
        self._socket = _bound(host, port)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._server = Server(app, {self._socket: Entry.MONITORING})
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Listener {self.url}{' closed' if self._is_closed else ''}>"

    @property
    def url(self) -> str:
        """Where it is, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Accept from now on."""
        await self._server.start()

    def close_to_new(self) -> None:
        """Accept no more connections; those that are open go on."""
        self._server.close_listeners()

    async def aclose(self) -> None:
        """Let replies in progress finish for at most 2 s, and close everything. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self._server.aclose()


def guarded(routes: list[Route], host: str, *, metrics_path: str, health_path: str) -> App:
    """An application of these routes, of ours, that keeps foreign web pages out; no key is asked for.

    Args:
        host: that is listened on.
    """
    guard = Guard(AccessSettings(bound_hosts=(host,)))
    rights = Rights(None, dict.fromkeys(Entry, frozenset()))
    paths = (metrics_path, health_path)
    return build(routes, lambda: guard, lambda: rights, monitoring_paths=paths, health_path=health_path)


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port <= _MAX_PORT:
        raise ConfigError("port", f"{port} is no port: 0 to {_MAX_PORT}")
    try:
        is_v6 = ipaddress.ip_address(host.strip("[]")).version == 6
    except ValueError:
        is_v6 = False
    try:
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError("port", f"{port} is taken by another program; choose another, or 0 for any") from None
        raise ConfigError("host", f"cannot listen on {host}:{port}: {error.strerror or error}") from None
