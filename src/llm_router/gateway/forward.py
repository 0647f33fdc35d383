"""Hands monitoring and admin requests that came to the app port to control, and streams its reply back.

Control authorises and answers everything itself, CORS included; it learns the client's address from a header that
only workers can send. A worker waits as long as its client does: only a control whose heartbeat is stale is given up.
Not for: deciding which paths are control's (core.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from llm_router.errors import BackendError, Unavailable
from llm_router.gateway.seam import HeaderList, Request, Responder
from llm_router.signals import NoRecorder, Recorder
from llm_router.upstream.http import HOP_BY_HOP, Reply
from llm_router.upstream.pool import Origin, Pool, PoolSettings

AT_ONCE: Final = 16
"""Requests that one worker has with control at the same time; further ones wait for their turn."""

STALE_S: Final = 1.0
"""Age of control's heartbeat, which comes every 0.1 s, beyond which it is taken for gone."""

_CHECK_S: Final = 0.25
_CLIENT: Final = b"x-llm-router-client"
_NOT_PASSED: Final = HOP_BY_HOP | {b"content-length", b"expect", b"host", _CLIENT}


def control_pool(path: str, *, recorder: Recorder | None = None, loop: asyncio.AbstractEventLoop | None = None) -> Pool:
    """The pool of connections to control's socket at `path`; its owner sweeps and closes it."""
    settings = PoolSettings(
        connect_s=0,  # the supervisor holds the listening socket: a connection waits while control restarts
        first_byte_s=0,
        gap_s=0,
        total_s=0,
        max_connections=AT_ONCE,
        wait_s=3600,  # a client that waits longer than this for its turn is none
        max_waiting=1024,
        idle_s=30,  # below control's keep-alive of 75 s
    )
    return Pool("control", Origin("unix", "localhost", 0, path), settings, recorder or NoRecorder(), loop=loop)


class Forwarded(NamedTuple):
    """What control answered: status, and size and type of the body that was passed on."""

    status: int
    size_bytes: int
    content_type: bytes


class Forwarder:
    """Serves requests by asking control.

    Args:
        pool: of connections to control's socket.
        heartbeat: seconds since control's last sign of life.
    """

    def __init__(self, pool: Pool, heartbeat: Callable[[], float]) -> None:
        self._pool = pool
        self._heartbeat = heartbeat

    async def __call__(self, request: Request, responder: Responder) -> Forwarded:
        """Answer `request` with control's reply, streamed.

        Raises: Unavailable when control is away or went away. If the responder was started by then, the reply
            cannot be completed and the connection must be cut. ClientGone when the client left.
        """
        reply = await self._send(_head(request), request.body)
        try:
            headers: HeaderList = reply.headers
            if reply.length is not None:
                headers = [*headers, (b"content-length", b"%d" % reply.length)]
            data = await reply.chunk()  # if control goes away before, the caller still gets a whole error
            responder.start(reply.status, headers)
            size, content_type = 0, reply.header(b"content-type") or b""
            while data:
                size += len(data)
                waiting = responder.write(data)
                if waiting is not None:
                    await waiting
                data = await reply.chunk()
            responder.end()
        except BackendError as error:
            raise _away(error.problem) from error
        finally:
            reply.close()
        return Forwarded(reply.status, size, content_type)

    async def _send(self, head: bytes, body: bytes) -> Reply:
        self._check()
        sending = asyncio.ensure_future(self._pool.send(head, body))
        try:
            while not sending.done():
                await asyncio.wait({sending}, timeout=_CHECK_S)
                if not sending.done():
                    self._check()
            return sending.result()
        except BackendError as error:
            raise _away(error.problem) from error
        except BaseException:
            sending.cancel()
            await asyncio.wait({sending})
            if not sending.cancelled() and sending.exception() is None:  # it arrived in the meantime
                sending.result().close()
            raise

    def _check(self) -> None:
        age_s = self._heartbeat()
        if age_s > STALE_S:
            raise _away("it gave no sign of life for a second or more")


def _away(problem: str) -> Unavailable:
    return Unavailable(f"the control process is not available ({problem}); inference goes on, ask again in a moment")


def _head(request: Request) -> bytes:
    """The request's head for control: the client's headers but for connection and framing, and who the client is."""
    headers = request.headers
    named = headers.get(b"connection", b"").lower()
    skipped = _NOT_PASSED.union(name.strip() for name in named.split(b",")) if named else _NOT_PASSED
    target = f"{request.path}?{request.query}" if request.query else request.path
    parts = [
        f"{request.method} {target} HTTP/1.1\r\nhost: ".encode("latin-1"),
        headers.get(b"host", b""),
        b"\r\nx-llm-router-client: ",
        request.client.encode("latin-1"),
    ]
    for name, value in headers.items():
        if name not in skipped:
            parts += (b"\r\n", name, b": ", value)
    parts.append(b"\r\ncontent-length: %d\r\n\r\n" % len(request.body))
    return b"".join(parts)
