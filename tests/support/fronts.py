"""The fronts under test: our own server and the ASGI front in uvicorn, a raw client, and a transport in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Self

import uvicorn

from llm_router.gateway.asgi import AsgiFront
from llm_router.gateway.front import Connection, Front, FrontSettings
from llm_router.gateway.seam import Core, Refusal, RefusalReply, Request, Responder
from llm_router.signals import NoRecorder


def refuse(refusal: Refusal) -> RefusalReply:
    """A refuse hook whose reply tells everything that the front handed over."""
    body = {
        "message": refusal.error.message,
        "code": refusal.error.code,
        "method": refusal.method,
        "path": refusal.path,
        "request_id": refusal.request_id.decode("latin-1"),
    }
    headers = [(b"content-type", b"application/json"), *refusal.error.headers]
    return RefusalReply(refusal.error.status, headers, json.dumps(body).encode())


async def echo(request: Request, responder: Responder) -> None:
    """A core that replies with what it got."""
    body = {
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "version": request.http_version,
        "headers": sorted([name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers.items()),
        "body": request.body.decode("latin-1"),
    }
    responder.start(200, [(b"content-type", b"application/json")])
    responder.end(json.dumps(body).encode())


class Reply(NamedTuple):
    """One reply as it came over the wire. `is_whole` is False when the connection ended before the body did."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool = True

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A client that sends bytes as they are given and reads replies one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, *, tls: ssl.SSLContext | None = None, receive_buffer: int = 0) -> Wire:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        limit = receive_buffer or 2**16
        return cls(
            *await asyncio.open_connection(
                sock=sock, ssl=tls, server_hostname="localhost" if tls else None, limit=limit
            )
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines[1:] if line]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a header of the reply is repeated: {lines}"
        return int(lines[0].split(" ")[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at the end."""
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def reply(self, *, to_head: bool = False) -> Reply:
        status, headers = await self.head()
        body = b""
        try:
            if to_head or status in {100, 204, 304}:
                pass
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while piece := await self.chunk():
                    body += piece
            else:
                body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            return Reply(status, headers, body, is_whole=False)
        return Reply(status, headers, body)

    async def ask(self, data: bytes) -> Reply:
        self.send(data)
        return await self.reply()

    async def is_closed(self) -> bool:
        """Wait for the server to close; False when it sends something instead."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


class Server(NamedTuple):
    """A front that listens. `front` is None for the ASGI front."""

    port: int
    front: Front | None


@contextlib.asynccontextmanager
async def own_front(
    core: Core,
    settings: FrontSettings | None = None,
    *,
    recorder: Any = None,
    tls: ssl.SSLContext | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """Our own server on a free port."""
    loop = asyncio.get_running_loop()
    front = Front(core, refuse, settings or FrontSettings(), recorder or NoRecorder(), loop=loop, **options)
    server = await loop.create_server(front.protocol_factory, "127.0.0.1", 0, ssl=tls)
    try:
        yield Server(server.sockets[0].getsockname()[1], front)
    finally:
        server.close()
        front.abort()
        await front.drain(5)
        await server.wait_closed()


@contextlib.asynccontextmanager
async def asgi_front(core: Core, settings: FrontSettings | None = None) -> AsyncIterator[Server]:
    """The ASGI front in uvicorn on a free port."""
    app: Any = AsgiFront(core, refuse, settings or FrontSettings())
    config = uvicorn.Config(
        app, http="httptools", ws="none", log_level="critical", lifespan="on", server_header=False, date_header=False
    )
    server = uvicorn.Server(config)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        task = asyncio.ensure_future(server.serve(sockets=[sock]))
        await settled(lambda: server.started)
        try:
            yield Server(sock.getsockname()[1], None)
        finally:
            server.should_exit = True
            await task


FRONTS: dict[str, Callable[..., contextlib.AbstractAsyncContextManager[Server]]] = {
    "own": own_front,
    "asgi": asgi_front,
}


class MemoryTransport:
    """A transport that keeps what is written: for feeding a connection every possible split without sockets."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_closed = False
        self.is_paused = False
        self.connection: Connection | None = None

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 5000) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 0

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """The client answers the half close by closing."""
        self.close()

    def pause_reading(self) -> None:
        assert not self.is_paused
        self.is_paused = True

    def resume_reading(self) -> None:
        assert self.is_paused
        self.is_paused = False

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().call_soon(self._lost)

    abort = close

    def _lost(self) -> None:
        assert self.connection is not None
        self.connection.connection_lost(None)


async def settled(predicate: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Let the loop turn until `predicate` is true. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        turns = 0
        while not predicate():
            await asyncio.sleep(0 if turns < 20 else 0.001)  # the state of code that knows nothing of this test
            turns += 1


async def still(value: Callable[[], object], polls: int = 100) -> None:
    """Let the loop turn until `value` has stayed the same for `polls` milliseconds of turns."""
    last, same = value(), 0
    while same < polls:
        await asyncio.sleep(0.001)
        same = same + 1 if value() == last else 0
        last = value()
