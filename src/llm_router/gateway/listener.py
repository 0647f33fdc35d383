"""Accepts connections for a front, all that are waiting at a time.

libuv accepts one connection per turn of its loop (since 1.46). When hundreds connect at once while others are being
served, the last of them would wait hundreds of turns: seconds. Not for: speaking HTTP (front.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

AT_ONCE: Final = 64
"""Connections accepted before those that exist get their turn."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """A listening socket whose connections get a protocol each. Owned by one event loop.

    Args:
        sock: bound and listening; closed by `close`.
        protocol_factory: of `asyncio.Protocol`, called per connection.
        tls: serve TLS with this context.
        handshake_s: how long a TLS handshake may take.
        exhausted_s: how long nothing is accepted after the process ran out of descriptors or memory.
    """

    def __init__(
        self,
        sock: socket.socket,
        protocol_factory: Callable[[], asyncio.Protocol],
        *,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None = None,
        handshake_s: float = 10.0,
        exhausted_s: float = 0.5,  # asyncio's own servers wait 1 s
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._factory = protocol_factory
        self._loop = loop
        self._tls = tls
        self._handshake_s = handshake_s if tls is not None else None
        self._exhausted_s = exhausted_s
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._is_closed = False
        loop.add_reader(sock, self._accept)

    def __repr__(self) -> str:
        return f"<Listener {'closed' if self._is_closed else self._sock.getsockname()}>"

    def close(self) -> None:
        """Accept nothing more. Connections that were accepted go on. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pause is None:
            self._loop.remove_reader(self._sock)
        else:
            self._pause.cancel()
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.warning("cannot accept connections for %g s: %s", self._exhausted_s, error.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(self._exhausted_s, self._resume)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory, connection, ssl=self._tls, ssl_handshake_timeout=self._handshake_s
            )
        except (OSError, ssl.SSLError) as error:
            # The client left, or speaks no TLS: its own affair.
            log.debug("a connection came to nothing: %s", error)
            connection.close()
