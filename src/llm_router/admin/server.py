"""Serves control's application on sockets that it inherited: uvicorn with our own bounds, signals left alone.

Each connection learns by which entry it came, from the socket that accepted it. On Unix sockets the peer must be
the same user (or root). A connection that has not sent a whole request head in time is closed: uvicorn itself waits
for ever. Not for: what is answered (application.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
import uuid
from collections.abc import Generator, Mapping
from http import HTTPStatus
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from llm_router.admin.application import Entry
from llm_router.errors import InvalidRequest
from llm_router.gateway.openai import error_object

HEAD_TIMEOUT_S: Final = 10.0
_MAX_CONNECTIONS: Final = 512
_KEEP_ALIVE_S: Final = 75
_BACKLOG: Final = 1024  # as the supervisor listens: asyncio calls listen() again
_PEER: Final = struct.Struct("3i")  # pid, uid, gid


class Server:
    """The application on its sockets, until `aclose`.

    Args:
        entries: listening socket to the entry it stands for; closed by `aclose`.
    """

    def __init__(
        self, app: ASGIApp, entries: Mapping[socket.socket, Entry], *, head_timeout_s: float = HEAD_TIMEOUT_S
    ) -> None:
        by_name = {_name(sock.getsockname()): entry for sock, entry in entries.items()}

        class Connection(_Connection):
            """uvicorn makes these itself and hands over nothing of ours: so a class for each server."""

            entries = by_name
            timeout_s = head_timeout_s

        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=True,
            backlog=_BACKLOG,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64 * 1024,
        )
        self._server = _Uvicorn(config)
        self._sockets = list(entries)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept from now on. Connections made before waited in the backlog of their socket. Raises: OSError."""
        self._server.config.load()
        task = asyncio.get_running_loop().create_task(self._server.serve(self._sockets), name="admin server")
        self._task = task
        while not self._server.started and not task.done():  # noqa: ASYNC110  # uvicorn has a flag, no event
            await asyncio.sleep(0)
        if task.done():
            task.result()

    def close_listeners(self) -> None:
        """Accept no more, at once; connections that are open go on."""
        for server in getattr(self._server, "servers", ()):
            server.close()

    async def aclose(self) -> None:
        """Stop accepting, let replies in progress finish for at most 2 s, close every connection."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task})
        for sock in self._sockets:
            sock.close()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the supervisor."""
        yield


class _Connection(H11Protocol):
    entries: Mapping[str, Entry] = {}
    timeout_s = HEAD_TIMEOUT_S

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX and not _is_same_user(sock):
            transport.abort()
            return
        entry = self.entries.get(_name(sock.getsockname()), Entry.MONITORING)
        self.app_state = {**self.app_state, "entry": entry}
        self._head_timer = self.loop.call_later(self.timeout_s, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_serving():
            self._stop_waiting()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with our error object, and with 431 where h11 says that the head is too large."""
        status = int(getattr(sys.exception(), "error_status_hint", 400))
        problem = "the request's head is too large" if status == 431 else "this is not a valid HTTP request"
        self._refuse(status, problem)

    def _refuse(self, status: int, problem: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the reply before it is still on its way
            self.transport.close()
            return
        request_id = uuid.uuid4().hex
        body = error_object(InvalidRequest(problem, status=status), request_id)
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", request_id),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_serving():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the headers did not arrive within {self.timeout_s:g} s")
        else:
            self.transport.abort()

    def _is_serving(self) -> bool:
        """Whether a request's head was read and its reply is not complete."""
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn annotates
        return cycle is not None and not cycle.response_complete


def _name(address: object) -> str:
    """A socket's own address as a key: the path of a Unix socket, the port of a TCP one."""
    return str(address[1]) if isinstance(address, tuple) else str(address)


def _is_same_user(sock: socket.socket) -> bool:
    """Whether the peer of a Unix connection is this user or root. Where the kernel does not tell (not Linux), the
    socket's file mode 0600 has to do."""
    if sys.platform != "linux":
        return True
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())
