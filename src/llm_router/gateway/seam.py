"""The narrow seam between a front (which speaks HTTP) and the core (which serves requests).

A front turns bytes into a `Request`, makes one task that runs the core, and gives it a `Responder` to answer with.
Neither side knows more of the other: the core knows no sockets and no ASGI, the front no models and no metrics of
requests. Not for: parsing HTTP (front.py, asgi.py) or deciding anything about a request (core).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from llm_router.errors import InvalidRequest

HeaderList = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client left before its reply was complete; nobody is there to be told."""


class Request:
    """One HTTP request, whole: the core never waits for more of it.

    Attributes:
        method: upper-case token, like `POST`.
        path: the raw path without the query, ASCII, percent-encoding left as it came; starts with `/`, or is `*`.
        query: the raw query without `?`; empty if none.
        headers: names in lower case; repeated headers joined with `, ` in order (`; ` for cookie).
        body: the complete body, transfer coding removed; empty if none.
        client: `ip:port` of the peer; empty when unknown.
        received_at: `loop.time()` in seconds when the first byte of this request arrived.
        http_version: `1.1` or `1.0`.
    """

    __slots__ = ("body", "client", "headers", "http_version", "method", "path", "query", "received_at")

    def __init__(
        self,
        method: str,
        path: str,
        query: str,
        headers: dict[bytes, bytes],
        body: bytes,
        client: str,
        received_at: float,
        http_version: str = "1.1",
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.client = client
        self.received_at = received_at
        self.http_version = http_version

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} {len(self.body)} bytes from {self.client or 'unknown'}>"


class Responder(Protocol):
    """Where the core puts the one reply to a request.

    `start`, then any number of `write`, then `end`; from one task. `start` followed directly by `end` is framed
    by content-length, anything else by chunks (or by the end of the connection on HTTP/1.0).
    """

    @property
    def started(self) -> bool:
        """Whether `start` was called: the status can no longer be changed."""

    @property
    def gone(self) -> bool:
        """Whether the client left before the reply was complete."""

    def start(self, status: int, headers: HeaderList) -> None:
        """Set status and headers; nothing is sent before the first `write` or `end`.

        Framing (content-length, transfer-encoding, connection) is added by the front and must not be in `headers`.
        One exception: a content-length that announces the body of a HEAD reply or of a streamed reply of known length
        is honoured.

        Raises: ValueError when a header holds a line break or NUL, RuntimeError when started already.
        """

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Hand over the next bytes of the body.

        Returns: None while little is waiting to be sent, else an awaitable that completes when it has drained and
            raises ClientGone when the client leaves; await it before writing more, or memory grows.
        Raises: ClientGone when the client has left already.
        """

    def end(self, data: bytes = b"") -> None:
        """Hand over the last bytes: the reply is complete. Without a client it does nothing.

        The body of replies that have none (to HEAD; 204, 304) is suppressed.
        """

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called, once and synchronously, if the client leaves before `end`; None clears it."""

    def mark_stream(self) -> None:
        """Count the connection as an event stream (protocol `sse`) until this reply ends."""


Core = Callable[[Request, Responder], Awaitable[None]]
"""Serves one request. It handles its own errors; one that escapes is answered with a bare 500, or cuts the reply.

When the client leaves, the disconnect callback runs first and then the core's task is cancelled.
"""


class Refusal(NamedTuple):
    """A request that the front turned away before there was a `Request`.

    `method` and `path` are empty when they were not understood; `request_id` is the raw `x-request-id` header, not
    checked, empty if none; `received_at` is `loop.time()` of the first byte; `client` as in `Request`.
    """

    error: InvalidRequest
    method: str
    path: str
    request_id: bytes
    received_at: float
    client: str = ""


class RefusalReply(NamedTuple):
    """What is sent to a client that was turned away."""

    status: int
    headers: HeaderList
    body: bytes


Refuse = Callable[[Refusal], RefusalReply]
"""Makes the reply to a refused request, and counts it. Must not raise; the front closes the connection afterwards."""
