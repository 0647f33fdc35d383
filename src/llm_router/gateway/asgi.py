"""The core as an ASGI 3 application, for mounting the router into somebody's FastAPI or Starlette application.

The server in front owns connections, headers and deadlines; this module keeps what is left of the promises: the body
is bounded, replies are streamed with backpressure, and a client that leaves cancels the core.

Not for: serving the router by itself (front.py is stricter and costs half the CPU).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Final
from urllib.parse import quote

from llm_router.errors import InvalidRequest
from llm_router.gateway.front import INTERNAL_ERROR, FrontSettings, render_head
from llm_router.gateway.seam import ClientGone, Core, HeaderList, Refusal, Refuse, Request

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COUNTED: Final = "llm_router.counted"
"""Key of the scope: whoever measures requests around this front has a function there, which is called when one is
measured here already."""

_PATH_SAFE: Final = "/%:@!$&'()*+,;=~-._"


class AsgiFront:
    """An ASGI 3 application over `core`: http and lifespan; a websocket is refused.

    Args:
        core: serves a request; called in a task of its own.
        refuse: makes the reply to a request whose body is too large.
        settings: only `max_body_bytes` and `body_timeout_s` are of use here.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        core: Core,
        refuse: Refuse,
        settings: FrontSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._refuse = refuse
        self._settings = settings
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if (counted := scope.get(COUNTED)) is not None:
                counted()
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_at = self._clock()
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers:
                headers[name] += (b"; " if name == b"cookie" else b", ") + value
            else:
                headers[name] = value
        path = _raw_path(scope)
        try:
            body = await self._read_body(headers, receive)
        except InvalidRequest as error:
            given = headers.get(b"x-request-id", b"")
            refusal = Refusal(error, scope["method"], path, given, received_at, _client(scope))
            reply = self._refuse(refusal)
            length = (b"content-length", b"%d" % len(reply.body))
            close = (b"connection", b"close")
            await send(
                {"type": "http.response.start", "status": reply.status, "headers": [*reply.headers, length, close]}
            )
            await send({"type": "http.response.body", "body": reply.body})
            return
        except ClientGone:
            return
        request = Request(
            scope["method"],
            path,
            scope["query_string"].decode("latin-1"),
            headers,
            body,
            _client(scope),
            received_at,
            scope["http_version"],
        )
        await self._answer(request, receive, send)

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises: InvalidRequest (413, 408), ClientGone."""
        limit = self._settings.max_body_bytes
        too_large = InvalidRequest(f"the request body is larger than {limit} bytes", status=413, code="body_too_large")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                async with asyncio.timeout(self._settings.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                raise InvalidRequest(
                    f"the body arrived too slowly: nothing for {self._settings.body_timeout_s:g} s",
                    status=408,
                    code="request_timeout",
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        responder = AsgiResponder(send, is_head=request.method == "HEAD")
        core = asyncio.ensure_future(self._run(request, responder))
        watch = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((core, watch), return_when=asyncio.FIRST_COMPLETED)
            if not core.done() and not responder.ended:
                responder.lose()
                core.cancel()
            await asyncio.wait((core,))
        finally:
            # Also when the server cancels us: it then counts as the client's leaving.
            if not core.done():
                responder.lose()
                core.cancel()
            watch.cancel()
            await asyncio.gather(core, watch, return_exceptions=True)
        await responder.finish()

    async def _run(self, request: Request, responder: AsgiResponder) -> None:
        try:
            await self._core(request, responder)
        except ClientGone:
            pass
        except Exception:
            log.exception("the core failed")


class AsgiResponder:
    """The responder of one request (see seam.Responder) over an ASGI `send`.

    ASGI sends by awaiting, so every `write` returns an awaitable, and the last bytes go out when the core returns.
    """

    def __init__(self, send: Send, *, is_head: bool) -> None:
        self._send = send
        self._is_head = is_head
        self._callback: Callable[[], None] | None = None
        self._head: Message | None = None
        self._last = b""
        self._has_length = False
        self.started = False
        self.ended = False
        self.gone = False

    def start(self, status: int, headers: HeaderList) -> None:
        if self.started:
            raise RuntimeError("the reply was started already")
        for name, _ in headers:
            if name in {b"transfer-encoding", b"connection"}:
                raise ValueError(f"{name.decode()} is the front's own header")
            self._has_length = self._has_length or name == b"content-length"
        render_head(status, headers)  # for its check
        self._head = {"type": "http.response.start", "status": status, "headers": headers}
        self._has_length = self._has_length or status in {204, 304}
        self.started = True

    def write(self, data: bytes) -> Coroutine[Any, Any, None]:
        if self.gone:
            raise ClientGone
        if not self.started or self.ended:
            raise RuntimeError("bytes of a reply that is not open")
        return self._write(data)

    def end(self, data: bytes = b"") -> None:
        if self.gone:
            return
        if not self.started or self.ended:
            raise RuntimeError("end of a reply that is not open")
        self._last = data
        self._callback = None
        self.ended = True

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def mark_stream(self) -> None:
        """The connection is the server's; there is nothing to count."""

    def lose(self) -> None:
        """The client is gone: tell the core."""
        if self.gone or self.ended:
            return
        self.gone = True
        callback, self._callback = self._callback, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("the disconnect callback of a request failed")

    async def finish(self) -> None:
        """The core is done: send the last bytes. Raises: RuntimeError, which has the server cut a broken reply."""
        if self.gone:
            return
        if not self.ended:
            if self._head is None and self.started:
                raise RuntimeError("the core left a reply unfinished")
            self.started = self._has_length = False
            self.start(500, [(b"content-type", b"application/json")])
            self.end(INTERNAL_ERROR)
        if self._head is not None and not self._has_length:
            self._head["headers"] = [*self._head["headers"], (b"content-length", b"%d" % len(self._last))]
        await self._write(self._last, more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        head, self._head = self._head, None
        if head is not None:
            await self._send(head)
        await self._send({"type": "http.response.body", "body": b"" if self._is_head else data, "more_body": more})
        if self.gone:
            raise ClientGone


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _raw_path(scope: Scope) -> str:
    """The path below the mount point, as it was sent where the server tells."""
    path: str = scope["path"]
    raw: bytes | None = scope.get("raw_path")
    text = raw.partition(b"?")[0].decode("latin-1") if raw else quote(path, safe=_PATH_SAFE)
    root: str = quote(scope.get("root_path", ""), safe=_PATH_SAFE)
    if root and text.startswith(root):
        text = text[len(root) :]
    return text or "/"


def _client(scope: Scope) -> str:
    """`ip:port` of the peer; empty if the server does not tell."""
    client = scope.get("client")
    if not client:
        return ""
    host, port = client[0], client[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
