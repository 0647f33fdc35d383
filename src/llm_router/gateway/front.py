"""The router's own HTTP/1.1 server: strict, bounded in every direction, and cheap.

One `Front` per event loop; `protocol_factory` goes to `loop.create_server`, with `ssl=` for TLS. A connection reads
one request whole, hands it with a responder to the core in one task, and reads the next when the reply has ended:

    idle -> head -> (body | chunked) -> busy -> idle ...        any of the first four -> lingering -> closed

Bytes of later requests wait unparsed, and reading stops when many wait, so pipelining needs no queue. There are no
timers per request: one sweep over all connections enforces every deadline. What is malformed, too large or too slow
is answered through the `refuse` hook; the connection is then closed for writing and what the client still sends is
thrown away for a while, since closing outright would reset the connection and could destroy the reply on its way.

A client that ends its half of the connection counts as gone: on the wire it cannot be told from one that left, and
a model must not go on generating for nobody.

Not for: what a request means (core), HTTP/2 and HTTP/3 (a proxy's job).
Why there is a server of our own: docs/decisions/0004-own-http-front.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import httptools
import msgspec

from llm_router.errors import InvalidRequest
from llm_router.gateway.seam import ClientGone, Core, HeaderList, Refusal, RefusalReply, Refuse, Request
from llm_router.signals import Recorder

log = logging.getLogger(__name__)


class FrontSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the front. Sizes are bytes, times seconds.

    Attributes:
        max_body_bytes: largest request body; 10 MiB holds a few images in base64.
        max_header_bytes: request line and headers together; 64 KiB as in most proxies.
        max_headers: header lines; a browser sends about 20.
        max_target_bytes: the request target (path and query).
        header_timeout_s: from the first byte of a request to the end of its headers.
        body_timeout_s: longest pause while a body arrives; also how long it may take in all, plus one second for
            each 4 KiB received, so that a trickle is no way to hold a connection.
        idle_timeout_s: how long a connection may wait between requests, or stall while a reply is sent to it.
            Longer than the 60 s that clients and proxies commonly keep a connection, so that they close first.
        max_connections: open connections; one more is answered with 503.
        high_water_bytes: reply bytes that may wait for a slow client before `write` asks to be awaited, and
            bytes of later requests that may wait before reading stops.
    """

    max_body_bytes: int = 10 * 1024 * 1024
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_target_bytes: int = 8 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    max_connections: int = 4096
    high_water_bytes: int = 64 * 1024


class FrontStatistics(NamedTuple):
    """Levels and totals of one front. `refused` counts malformed, oversized and late requests, `turned_away`
    connections beyond the limit, `lost` requests whose client left before the reply was complete."""

    connections: int
    in_flight: int
    accepted: int
    requests: int
    refused: int
    turned_away: int
    lost: int


SWEEP_S: Final = 0.25
"""How often deadlines are looked at: a deadline is late by at most this."""

BODY_BYTES_PER_S: Final = 4096
"""The slowest average at which a long body may come: a tenth of the slowest mobile networks still in use."""

FRESH_GRACE_S: Final = 1.0
"""How long a connection that has not asked anything yet may do so after draining began: its request may be on the
way, and a client cannot safely repeat what it does not know to be unread."""

CANCEL_GRACE_S: Final = 1.0
"""How long the core may take to leave its cancelled requests when a drain ran out of time."""

LINGER_QUIET_S: Final = 2.0
LINGER_TOTAL_S: Final = 10.0
LINGER_BODIES: Final = 4
"""After a refusal, reading and discarding goes on until the client closes, is silent for `LINGER_QUIET_S`, has sent
`LINGER_BODIES` times the largest body, or `LINGER_TOTAL_S` are over: enough for a client that sends an 11 MB body to
the end before it looks at the reply."""

SURPLUS_CONNECTIONS: Final = 64
"""How many connections beyond the limit are told so at one time; those beyond are reset."""

PENDING_PIECE: Final = 8192
"""Bytes of waiting requests that are looked at together: several small requests, or a good part of a large one."""

_COLON: Final = b": "
_HEAD_END: Final = b"\r\n\r\n"
_NEVER: Final = math.inf
_AT_EVERY_SWEEP: Final = 0.0

# States of a connection; those up to _CHUNKED want bytes.
_IDLE, _HEAD, _BODY, _CHUNKED, _BUSY, _LINGERING, _CLOSED = range(7)

_METHODS: Final = {name.encode(): name for name in ("GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS")}
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus if status >= 200
}
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))
# Repeating these is how requests are smuggled past a proxy, or a media type past a check.
_ONCE: Final = frozenset((b"host", b"content-length", b"content-type", b"transfer-encoding", b"expect"))

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_KEEP_10: Final = b"connection: keep-alive\r\n"
_CLOSE: Final = b"connection: close\r\n"

# Length of a reply's body: not settled yet, chunked, until the connection closes, no body. From 0 on: bytes to come.
_UNSETTLED, _BY_CHUNKS, _BY_CLOSE, _NO_BODY = -1, -2, -3, -4

INTERNAL_ERROR: Final = (
    b'{"error":{"message":"The router failed to answer this request; its log has the reason.",'
    b'"type":"api_error","param":null,"code":"internal_error"}}'
)
"""Body of the 500 that stands in for a core that failed: the core makes all other error objects."""


def render_head(status: int, headers: HeaderList) -> bytes:
    """Status line and header lines, without the empty line.

    Raises: ValueError when a name or value holds CR, LF or NUL, which would let it forge headers or a second reply.
    """
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    if not headers:
        return line
    head = b"%b%b\r\n" % (line, b"\r\n".join(map(_COLON.join, headers)))
    # Each line has one CR and one LF of ours; one look for all three bytes is cheaper than any look at the values.
    if len(head) - len(head.translate(None, b"\r\n\0")) != 2 * len(headers) + 2:
        raise ValueError(f"a header of the reply holds a line break or NUL: {headers!r}")
    return head


class Exchange:
    """The responder of one request (see seam.Responder). Made by its connection; dead when the reply has ended."""

    __slots__ = (
        "_callback",
        "_connection",
        "_head",
        "_is_head",
        "_keep_alive",
        "_left",
        "_modern",
        "_streaming_since",
        "ended",
        "gone",
        "is_running",
        "started",
        "task",
    )

    def __init__(self, connection: Connection, *, keep_alive: bool, modern: bool, is_head: bool) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self._modern = modern
        self._is_head = is_head
        self._callback: Callable[[], None] | None = None
        self._head: bytes | None = None
        self._left = _UNSETTLED
        self._streaming_since = 0.0
        self.started = False
        self.ended = False
        self.gone = False
        self.is_running = False
        self.task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "gone" if self.gone else "ended" if self.ended else "started" if self.started else "waiting"
        return f"<Exchange {state} of {self._connection!r}>"

    def start(self, status: int, headers: HeaderList) -> None:
        if self.started:
            raise RuntimeError("the reply was started already")
        left = _UNSETTLED
        for name, value in headers:
            if name in _FRAMING:
                if name != b"content-length":
                    raise ValueError(f"{name.decode()} is the front's own header")
                left = int(value)
        if status in {204, 304}:
            left = _NO_BODY
        self._head = render_head(status, headers)
        self._left = left
        self.started = True

    def write(self, data: bytes) -> Awaitable[None] | None:
        if self.gone:
            raise ClientGone
        if not self.started or self.ended:
            raise RuntimeError("bytes of a reply that is not open")
        head = self._head
        if head is not None:
            self._head = None
            head = self._opened(head)
        left = self._left
        if left == _BY_CHUNKS:
            piece = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        elif left == _NO_BODY:
            piece = b""
        elif left == _BY_CLOSE:
            piece = data
        else:
            if len(data) > left:
                self._cut()
                raise RuntimeError("the reply is longer than its content-length")
            self._left = left - len(data)
            piece = data
        if head is not None:
            piece = head + piece
        connection = self._connection
        if piece:
            connection.transport.write(piece)
        return connection.drained() if connection.write_paused else None

    def end(self, data: bytes = b"") -> None:
        if self.gone:
            return
        if not self.started or self.ended:
            raise RuntimeError("end of a reply that is not open")
        connection = self._connection
        head = self._head
        left = self._left
        if head is not None and left == _UNSETTLED:
            # The usual reply: head, length and body in one write.
            if self._keep_alive and not connection.front.draining:
                piece = b"%bcontent-length: %d\r\n%b\r\n" % (head, len(data), b"" if self._modern else _KEEP_10)
            else:
                self._keep_alive = False
                piece = b"%bcontent-length: %d\r\nconnection: close\r\n\r\n" % (head, len(data))
            self._head = None
            if not self._is_head:
                piece += data
        else:
            if head is not None:
                self._head = None
                piece = self._opened(head)
                left = self._left
            else:
                piece = b""
            if left == _BY_CHUNKS:
                piece += b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
            elif left == _BY_CLOSE:
                piece += data
            elif left != _NO_BODY:
                if len(data) != left:
                    self._cut()
                    raise RuntimeError(f"the reply is {left - len(data)} bytes shorter than its content-length")
                piece += data
        self.ended = True
        self._callback = None
        if piece:
            connection.transport.write(piece)
        if self._streaming_since:
            self._stop_streaming()
        connection.reply_ended(keep_alive=self._keep_alive)

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def mark_stream(self) -> None:
        if not self._streaming_since and not self.gone and not self.ended:
            self._streaming_since = self._connection.switch_protocol("http", "sse")

    def lose(self) -> None:
        """The client is gone: tell the core, then cancel it."""
        self.gone = True
        if self._streaming_since:
            self._stop_streaming()
        callback, self._callback = self._callback, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("the disconnect callback of a request failed")
        if self.is_running and self.task is not None:
            self.task.cancel()

    def finish(self, error: Exception | None) -> None:
        """The core is done. Without a complete reply, the client gets a 500, or a reply visibly cut short."""
        if error is not None:
            log.error("the core failed", exc_info=error)
        if self.ended or self.gone:
            return
        if error is None:
            log.error("the core left a reply unfinished: %r", self)
        if self._head is None and self.started:
            self._cut()
            return
        self.started = False
        self._keep_alive = False
        self.start(500, [(b"content-type", b"application/json")])
        self.end(INTERNAL_ERROR)

    def _opened(self, head: bytes) -> bytes:
        """The complete head of a reply that is not sent in one piece; settles how its end will be known."""
        if self._connection.front.draining:
            self._keep_alive = False
        framing = b""
        if self._left == _UNSETTLED:
            if self._modern:
                framing = b"transfer-encoding: chunked\r\n"
                self._left = _BY_CHUNKS
            else:
                self._left = _BY_CLOSE
                self._keep_alive = False
        if self._is_head:
            self._left = _NO_BODY
        connection = b"" if self._modern else _KEEP_10
        return b"%b%b%b\r\n" % (head, framing, connection if self._keep_alive else _CLOSE)

    def _stop_streaming(self) -> None:
        self._connection.switch_protocol("sse", "http")
        self._streaming_since = 0.0

    def _cut(self) -> None:
        """End the connection without ending the message, so that nobody takes the reply for whole."""
        self.ended = True
        self._callback = None
        if self._streaming_since:
            self._stop_streaming()
        self._connection.cut()


class Connection(asyncio.Protocol):
    """One client connection: its parser, its state, and at most one exchange."""

    __slots__ = (
        "_body",
        "_client",
        "_counted",
        "_deadline",
        "_discarded",
        "_exchange",
        "_head",
        "_headers",
        "_is_modern",
        "_keep_alive",
        "_linger_until",
        "_method",
        "_missing",
        "_parsed_head",
        "_parsed_message",
        "_parser",
        "_path",
        "_pending",
        "_problem",
        "_progress_at",
        "_protocol_since",
        "_query",
        "_reading_paused",
        "_received_at",
        "_repeated",
        "_served",
        "_settled",
        "_silent",
        "_size",
        "_state",
        "_tail",
        "_taken",
        "_target",
        "_waiter",
        "front",
        "transport",
        "write_paused",
    )

    def __init__(self, front: Front) -> None:
        self.front = front
        self.transport: Any = None  # a uvloop or asyncio transport, once connected
        self.write_paused = False
        self._parser: Any = None
        self._state = _IDLE
        self._deadline = _NEVER
        self._client = ""
        self._counted = False
        self._served = False
        self._protocol_since = 0.0
        self._exchange: Exchange | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pending = b""  # came while a request was being answered
        self._taken = 0  # bytes of it that were parsed already
        self._reading_paused = False
        self._linger_until = 0.0
        self._discarded = 0
        self._received_at = 0.0
        self._progress_at = 0.0
        self._method = self._path = self._query = ""
        self._is_modern = self._keep_alive = True
        self._missing = 0  # bytes of the body that content-length announced and that are still to come
        self._size = 0  # bytes of the body that came
        self._silent = 0  # bytes of chunk framing since the last byte of body
        self._tail = b""  # last three bytes of a chunked message
        self._reset()

    def _reset(self) -> None:
        """Forget the last request."""
        self._head = b""
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._settled: dict[bytes, bytes] | None = None  # the headers, once what follows them is something else
        self._repeated = 0
        self._parsed_head = False
        self._parsed_message = False
        self._problem: InvalidRequest | None = None
        self._body: list[bytes] = []

    def __repr__(self) -> str:
        state = ("idle", "head", "body", "chunked", "busy", "lingering", "closed")[self._state]
        return f"<Connection {self._client or 'unknown'} {state}>"

    # -- the transport calls these --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        front = self.front
        self.transport = transport
        now = front.tick()
        self._protocol_since = self._received_at = now
        self.transport.set_write_buffer_limits(high=front.settings.high_water_bytes)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and len(peer) >= 2:
            host, port = peer[0], peer[1]
            self._client = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if not front.admit(self):
            if len(front.open_connections) > front.settings.max_connections + SURPLUS_CONNECTIONS:
                self._state = _CLOSED
                self.transport.abort()
                return
            self._refuse(
                InvalidRequest(
                    f"too many connections: {front.settings.max_connections} are open; try again",
                    status=503,
                    code="too_many_connections",
                    headers=((b"retry-after", b"1"),),
                )
            )
            return
        self._counted = True
        front.recorder.connection_opened("client", "http")
        self._parser = httptools.HttpRequestParser(self)
        self._deadline = now + (FRESH_GRACE_S if front.draining else front.settings.idle_timeout_s)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state <= _CHUNKED:
            self._advance(data)
        elif state == _BUSY:
            # The next request; it waits until this one is answered.
            self._keep(data)
        elif state == _LINGERING:
            self._discarded += len(data)
            self._deadline = min(self.front.now + LINGER_QUIET_S, self._linger_until)
            if self._discarded > LINGER_BODIES * self.front.settings.max_body_bytes:
                self._close()

    def eof_received(self) -> None:
        exchange = self._exchange
        if exchange is not None:
            self._exchange = None
            self.front.lost += 1
            exchange.lose()
        self._state = _CLOSED
        self._deadline = self.front.now + self.front.settings.idle_timeout_s  # for what is still being sent

    def pause_writing(self) -> None:
        self.write_paused = True
        self._deadline = self.front.now + self.front.settings.idle_timeout_s

    def resume_writing(self) -> None:
        self.write_paused = False
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._state == _BUSY:
            self._deadline = _NEVER
            if self._exchange is None:
                self._await_next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self.front.lost += 1
            exchange.lose()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.cancel()
        self._parser = None  # it holds bound methods of ours: a cycle
        self._pending = b""
        self._reset()
        front = self.front
        if self._counted:
            front.recorder.connection_closed("client", "http", front.clock() - self._protocol_since)
        front.dismiss(self)

    # -- the parser calls these -----------------------------------------------------------------------

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > self.front.settings.max_target_bytes:
            self._object(_target_too_long(self.front.settings))

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        if name in headers:
            self._on_repeated_header(name, value)
        else:
            headers[name] = value.rstrip()  # llhttp leaves white space at the end of the line

    def on_headers_complete(self) -> None:
        self._parsed_head = True

    def on_body(self, data: bytes) -> None:
        self._silent = 0
        self._size += len(data)
        if self._size > self.front.settings.max_body_bytes:
            self._object(_body_too_large(self.front.settings))
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._parsed_message = True

    def _on_repeated_header(self, name: bytes, value: bytes) -> None:
        if self._settled is not None:
            return
        self._repeated += 1
        if name in _ONCE:
            self._object(_malformed(f"the header {name.decode('latin-1')} is repeated"))
        elif self._repeated > self.front.settings.max_headers:
            self._object(_too_many_headers(self.front.settings))
        else:
            join = b"; " if name == b"cookie" else b", "
            self._headers[name] += join + value.rstrip()

    def _object(self, problem: InvalidRequest) -> None:
        """Note why the request will be refused. The first reason counts, and what came before it."""
        if self._problem is None:
            self._problem = problem
            self._settle_headers()

    def _settle_headers(self) -> None:
        """From here on nothing that the parser finds is a header of this request."""
        self._settled = self._headers
        self._headers = dict(self._headers)

    # -- reading a request ----------------------------------------------------------------------------

    def _advance(self, data: bytes) -> None:
        """Take bytes while a request is wanted, up to the end of one request; what is beyond stays pending."""
        state = self._state
        front = self.front
        if state == _IDLE:
            if data[0] <= 13:
                # An empty line before a request is to be ignored (RFC 9112, 2.2). Other control bytes stay.
                data = data.lstrip(b"\r\n")
                if not data:
                    return
            self._received_at = front.now = front.clock()
            self._state = state = _HEAD
        if state == _HEAD:
            known = len(self._head)
            if known:
                data = self._head + data
            # The parser gets one message at a time: a head ends with the first empty line, and nowhere else.
            end = data.find(_HEAD_END, known - 3 if known > 3 else 0) + 4
            is_whole = end > 3
            if not is_whole:
                end = len(data)
            limit = front.settings.max_header_bytes
            if end > limit:
                if self._feed(data[known:limit]):
                    self._refuse(
                        InvalidRequest(f"headers larger than {limit} bytes", status=431, code="headers_too_large")
                        if self._headers
                        else _target_too_long(front.settings)
                    )
                return
            if not self._feed(data if not known and end == len(data) else data[known:end]):
                return
            if not is_whole:
                self._head = data
                self._deadline = self._received_at + front.settings.header_timeout_s
                return
            self._head = b""
            if not self._understand(data[:end]):
                return
            data = data[end:]
            if self._state == _BUSY:
                self._dispatch(data)
                return
            if not data:
                if self._is_modern and b"expect" in (self._settled or self._headers):
                    self.transport.write(_CONTINUE)
                return
        if self._state == _BODY:
            missing = self._missing
            if len(data) < missing:
                self._missing = missing - len(data)
                self._progress_at = front.now
                self._feed(data)
                return
            if self._feed(data if len(data) == missing else data[:missing]):
                if self._parsed_message:
                    self._dispatch(data[missing:])
                else:
                    self._refuse(_malformed("the body does not end where it was announced"))
        else:
            self._advance_chunked(data)

    def _advance_chunked(self, data: bytes) -> None:
        """Feed a chunked body up to its end.

        The last chunk and the trailers end with an empty line whose CRLFs follow some other character, so cutting
        the feed behind each `CRLF CRLF` makes the end of the message coincide with the end of a piece.
        """
        view = memoryview(data)
        tail = self._tail
        across = (tail + data[:3]).find(_HEAD_END)
        position = 0
        end = across + 4 - len(tail) if across >= 0 else data.find(_HEAD_END) + 4
        while True:
            if end <= position:
                end = len(data)
            size = self._size
            if not self._feed(view[position:end]):
                return
            if self._parsed_message:
                self._dispatch(data[end:])
                return
            if self._size != size:
                self._progress_at = self.front.now
            else:
                self._silent += end - position
                if self._silent > self.front.settings.max_header_bytes:
                    self._refuse(
                        InvalidRequest("chunk extensions or trailers too large", status=431, code="headers_too_large")
                    )
                    return
            if end == len(data):
                break
            position = end
            end = data.find(_HEAD_END, position) + 4
        self._tail = (tail + data[-3:])[-3:]

    def _feed(self, data: bytes | memoryview) -> bool:
        """Give bytes of this message to the parser. False when the request was refused."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._problem is None:
                return True  # asked for another protocol: answered in this one (RFC 9110, 7.8)
        except httptools.HttpParserError as error:
            if self._problem is None:
                self._problem = _explain(error, self._head[:4] + bytes(data[:4]), has_headers=bool(self._headers))
        if self._problem is None:
            return True
        self._refuse(self._problem)
        return False

    def _understand(self, head: bytes) -> bool:
        """Check the head and settle the framing: state becomes _BODY, _CHUNKED, or _BUSY when there is no body.

        Returns: False when the request was refused.
        """
        if not self._parsed_head:
            # The preface of HTTP/2 has an empty line in its middle, where llhttp has not given up on it yet.
            is_http2 = head.startswith(b"PRI ")
            self._refuse(_unsupported_version() if is_http2 else _malformed("this is not an HTTP request"))
            return False
        headers = self._headers
        line_end = head.find(b"\r\n")
        version = head[line_end - 9 : line_end]
        self._is_modern = is_modern = version == b" HTTP/1.1"
        problem: InvalidRequest | None = None
        if not is_modern and version != b" HTTP/1.0":
            problem = _unsupported_version()
        connection = headers.get(b"connection")
        if connection is None:
            self._keep_alive = is_modern
        else:
            wishes = [wish.strip() for wish in connection.lower().split(b",")]
            self._keep_alive = b"close" not in wishes and (is_modern or b"keep-alive" in wishes)
        method = self._parser.get_method()
        self._method = _METHODS.get(method) or method.decode("latin-1")
        problem = problem or self._read_target()
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        if problem is not None:
            pass
        elif len(headers) + self._repeated > self.front.settings.max_headers:
            problem = _too_many_headers(self.front.settings)
        elif is_modern and b"host" not in headers:
            problem = _malformed("the header Host is missing")
        elif coding is not None:
            if length is not None:
                problem = _malformed("both Content-Length and Transfer-Encoding")
            elif not is_modern:
                problem = _malformed("Transfer-Encoding in an HTTP/1.0 request")
            elif coding.lower() != b"chunked":
                problem = InvalidRequest(
                    "the only transfer coding is chunked", status=501, code="unsupported_transfer_encoding"
                )
            self._missing = 0
        elif length is not None:
            if not length.isdigit() or len(length) > 19:
                problem = _malformed("Content-Length is not a plain number")
            else:
                self._missing = int(length)
                if self._missing > self.front.settings.max_body_bytes:
                    problem = _body_too_large(self.front.settings)
        if problem is None and b"expect" in headers and headers[b"expect"].lower() != b"100-continue":
            problem = InvalidRequest("the only expectation is 100-continue", status=417, code="expectation_failed")
        if problem is not None:
            self._refuse(problem)
            return False
        if coding is None and (length is None or not self._missing):
            self._state = _BUSY
            return True
        if coding is not None:
            self._state = _CHUNKED
            self._settle_headers()  # trailers follow, and nothing of ours may depend on them
        else:
            self._state = _BODY
        self._size = self._silent = 0
        self._tail = b""
        self._parsed_message = False
        self._progress_at = self.front.now
        self._deadline = _AT_EVERY_SWEEP
        if b"upgrade" in headers:
            self._forget_upgrade(length)
        return True

    def _read_target(self) -> InvalidRequest | None:
        target = self._target.decode("latin-1")
        if target[0] != "/":
            if self._method == "CONNECT":
                return InvalidRequest("CONNECT is not supported: this is no proxy", status=501, code="not_implemented")
            scheme, separator, rest = target.partition("://")
            if separator and scheme.lower() in {"http", "https"}:
                # The absolute form, which proxies use: its authority takes the place of Host (RFC 9112, 3.2.2).
                authority = rest.partition("/")[0].partition("?")[0]
                if not authority or "@" in authority:
                    return _malformed("the request target has no usable host")
                self._headers[b"host"] = authority.encode("latin-1")
                target = rest[len(authority) :]
                if not target.startswith("/"):
                    target = "/" + target
            elif target != "*" or self._method != "OPTIONS":
                return _malformed("the request target is not a path")
        if "#" in target:
            return _malformed("the request target holds a fragment")
        self._path, _, self._query = target.partition("?")
        return None

    def _forget_upgrade(self, length: bytes | None) -> None:
        """Give the body of a request that wished another protocol to a parser that did not see the wish.

        llhttp parses nothing behind such a head, but the wish is ignored and the body comes as announced.
        """
        kept = self._target, self._headers
        self._headers = {}
        self._parser = httptools.HttpRequestParser(self)
        framing = b"transfer-encoding: chunked" if length is None else b"content-length: " + length
        self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + _HEAD_END)
        self._target, self._headers = kept

    def _dispatch(self, rest: bytes) -> None:
        """Hand the request that is now whole to the core, in a task of its own; `rest` is of the next one."""
        front = self.front
        body = self._body
        is_modern = self._is_modern
        method = self._method
        headers = self._headers if self._settled is None else self._settled
        request = Request(
            method,
            self._path,
            self._query,
            headers,
            (body[0] if len(body) == 1 else b"".join(body)) if body else b"",
            self._client,
            self._received_at,
            "1.1" if is_modern else "1.0",
        )
        if b"upgrade" in headers:
            self._parser = httptools.HttpRequestParser(self)
        self._reset()
        self._state = _BUSY
        self._deadline = _NEVER
        self._served = True
        if rest:
            if self._taken:
                self._taken -= len(rest)  # it came from there
            else:
                self._keep(rest)
        exchange = Exchange(self, keep_alive=self._keep_alive, modern=is_modern, is_head=method == "HEAD")
        self._exchange = exchange
        front.serve(request, exchange)

    # -- between requests -----------------------------------------------------------------------------

    def reply_ended(self, *, keep_alive: bool) -> None:
        """The reply was handed to the transport whole."""
        self._exchange = None
        if not keep_alive or self.front.draining:
            if self._pending or self._reading_paused:
                self._linger()
            else:
                self._close()
        elif not self.write_paused:
            self._await_next()
        # Otherwise the client must take what it asked for before it may ask for more.

    def _keep(self, data: bytes) -> None:
        """Put aside what belongs to later requests; reading stops when it is much."""
        self._pending = self._pending[self._taken :] + data
        self._taken = 0
        if len(self._pending) > self.front.settings.high_water_bytes and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def _await_next(self) -> None:
        self._state = _IDLE
        self._deadline = self.front.now + self.front.settings.idle_timeout_s
        if self._pending:
            # We are in the task of the request before; the next one must not inherit its context.
            self.front.context.copy().run(self._take_pending)

    def _take_pending(self) -> None:
        pending = self._pending
        # In small pieces, or each of many short requests would copy all that follow it.
        while self._state <= _CHUNKED and self._taken < len(pending):
            piece = pending[self._taken : self._taken + PENDING_PIECE]
            self._taken += len(piece)
            self._advance(piece)
        if self._taken >= len(pending):
            self._pending = b""
            self._taken = 0
            if self._reading_paused and self._state != _CLOSED:
                self._reading_paused = False
                self.transport.resume_reading()

    def drained(self) -> asyncio.Future[None]:
        """Completes when little is waiting to be sent; cancelled with the task when the client leaves."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            waiter = self._waiter = self.front.loop.create_future()
        return waiter

    def switch_protocol(self, before: str, after: str) -> float:
        """Count the connection as speaking `after` from now on. Returns the instant."""
        now = self.front.clock()
        if self._counted:
            recorder = self.front.recorder
            recorder.connection_closed("client", before, now - self._protocol_since)
            recorder.connection_opened("client", after)
        self._protocol_since = now
        return now

    # -- endings --------------------------------------------------------------------------------------

    def _refuse(self, error: InvalidRequest) -> None:
        """Answer a request that never reached the core, then close."""
        front = self.front
        front.refused += 1
        # The request line is known to be whole when a header followed it; a part of it would be a riddle.
        headers = self._headers if self._settled is None else self._settled
        is_known = (headers or self._parsed_head) and error.status != 414
        path = self._target.partition(b"?")[0].decode("latin-1") if is_known else ""
        method = self._parser.get_method().decode("latin-1") if path else ""
        refusal = Refusal(error, method, path, headers.get(b"x-request-id", b""), self._received_at, self._client)
        try:
            reply = front.refuse(refusal)
            head = render_head(reply.status, reply.headers)
        except Exception:
            log.exception("the refuse hook failed")
            reply = RefusalReply(error.status, [(b"content-type", b"application/json")], INTERNAL_ERROR)
            head = render_head(reply.status, reply.headers)
        self.transport.write(
            b"%bcontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (head, len(reply.body), b"" if method == "HEAD" else reply.body)
        )
        self._linger()

    def _linger(self) -> None:
        self._state = _LINGERING
        self._linger_until = self.front.now + LINGER_TOTAL_S
        self._deadline = self.front.now + LINGER_QUIET_S
        self._reset()
        self._pending = b""
        self._taken = 0
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        if self.transport.can_write_eof():  # not over TLS
            self.transport.write_eof()

    def _close(self) -> None:
        """Close when everything is sent; a client that does not take it is cut off at the deadline."""
        self._state = _CLOSED
        self._deadline = self.front.now + self.front.settings.idle_timeout_s
        self.transport.close()

    def cut(self) -> None:
        """Close now; what is not sent yet is lost."""
        self._exchange = None
        self._state = _CLOSED
        self.transport.abort()

    def drain(self, now: float) -> None:
        """Close if nothing is going on; soon, if the first request may be on its way."""
        if self._state == _IDLE:
            if self._served:
                self._close()
            else:
                self._deadline = min(self._deadline, now + FRESH_GRACE_S)

    def check(self, now: float) -> None:
        """Act if the deadline of whatever is going on is over."""
        if self._deadline > now:
            return
        state = self._state
        settings = self.front.settings
        if state == _IDLE:
            self._close()
        elif state == _HEAD:
            self._refuse(
                InvalidRequest(
                    f"the headers did not arrive within {settings.header_timeout_s:g} s",
                    status=408,
                    code="request_timeout",
                )
            )
        elif state in {_BODY, _CHUNKED}:
            allowed = settings.body_timeout_s
            started = self._received_at
            if now - self._progress_at > allowed or now - started > allowed + self._size / BODY_BYTES_PER_S:
                self._refuse(
                    InvalidRequest(
                        f"the body arrived too slowly: {self._size} bytes in {now - started:.1f} s",
                        status=408,
                        code="request_timeout",
                    )
                )
        else:
            # The client does not take its reply, or does not close.
            self.transport.abort()
            self._deadline = _NEVER


class Front:
    """Every client connection of one event loop.

    Args:
        core: serves a request; called in a task of its own.
        refuse: makes the replies to what cannot be a request.
        recorder: learns about connections; requests are the core's business.
        loop: where the sweep runs, and the tasks.
        clock: monotonic seconds. `loop.time()` of uvloop has the same origin but only milliseconds.

    Not safe across threads.
    """

    def __init__(
        self,
        core: Core,
        refuse: Refuse,
        settings: FrontSettings,
        recorder: Recorder,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.refuse = refuse
        self.settings = settings
        self.recorder = recorder
        self.loop = loop
        self.clock = clock
        self.now = clock()  # of the last event that asked; behind by at most SWEEP_S while a connection is open
        self.context = contextvars.copy_context()
        self.draining = False
        self.open_connections: set[Connection] = set()
        self.accepted = 0
        self.requests = 0
        self.refused = 0
        self.turned_away = 0
        self.lost = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = "draining" if self.draining else "open"
        return f"<Front {state}, {self.connections} connections, {self.in_flight} requests in flight>"

    def protocol_factory(self) -> Connection:
        """A protocol for one new connection: the argument of `loop.create_server`."""
        return Connection(self)

    @property
    def in_flight(self) -> int:
        """Requests that the core is working on."""
        return len(self._tasks)

    @property
    def connections(self) -> int:
        """Open connections, those being closed included."""
        return len(self.open_connections)

    def statistics(self) -> FrontStatistics:
        return FrontStatistics(
            self.connections,
            self.in_flight,
            self.accepted,
            self.requests,
            self.refused,
            self.turned_away,
            self.lost,
        )

    # -- connections call these -----------------------------------------------------------------------

    def tick(self) -> float:
        """Read the clock, and have the sweep run from now on. Returns the instant."""
        self.now = self.clock()
        if self._timer is None:
            self._timer = self.loop.call_later(SWEEP_S, self._on_timer)
        return self.now

    def admit(self, connection: Connection) -> bool:
        """Take in a connection; False when it is one too many (it stays known until it is closed)."""
        self.accepted += 1
        self.open_connections.add(connection)
        if len(self.open_connections) > self.settings.max_connections:
            self.turned_away += 1
            return False
        return True

    def dismiss(self, connection: Connection) -> None:
        """A connection is closed."""
        self.open_connections.discard(connection)
        self._notice_empty()

    def serve(self, request: Request, exchange: Exchange) -> None:
        """Run the core on a request."""
        self.requests += 1
        task = self.loop.create_task(self._run(request, exchange))
        exchange.task = task
        self._tasks.add(task)

    async def _run(self, request: Request, exchange: Exchange) -> None:
        error: Exception | None = None
        try:
            # A task that is cancelled before its first step would never get here to be counted out.
            exchange.is_running = True
            if not exchange.gone:
                await self.core(request, exchange)
        except ClientGone:
            pass
        except Exception as raised:
            error = raised
        finally:
            if error is not None or not exchange.ended:
                exchange.finish(error)
            if exchange.task is not None:
                self._tasks.discard(exchange.task)
                exchange.task = None  # the task holds the exchange: a cycle
            if self.draining:
                self._notice_empty()

    # -- deadlines ------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Enforce every deadline that is over at `now`. Runs by itself every `SWEEP_S` while connections are open."""
        self.now = now
        for connection in tuple(self.open_connections):
            connection.check(now)

    def _on_timer(self) -> None:
        self._timer = None
        if self.open_connections:
            self.sweep(self.tick())

    # -- ending ---------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> bool:
        """Let what is going on end, and begin nothing more on these connections.

        Idle connections are closed at once; replies announce `connection: close`. The listening sockets are the
        caller's to close, before. After `timeout_s` what is left is cut off. Idempotent.

        Returns: whether everything ended in time.
        """
        self.draining = True
        self.tick()
        for connection in tuple(self.open_connections):
            connection.drain(self.now)
        if self._emptied is None:
            self._emptied = asyncio.Event()
        self._notice_empty()
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            self.abort()
        else:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE_S):
                await self._emptied.wait()
        return False

    def abort(self) -> None:
        """Cut every connection; the core's tasks are cancelled as if the clients had left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in tuple(self.open_connections):
            connection.transport.abort()

    def _notice_empty(self) -> None:
        if not self.open_connections and not self._tasks and self._emptied is not None:
            self._emptied.set()


def _malformed(problem: str) -> InvalidRequest:
    return InvalidRequest(f"malformed HTTP request: {problem}", status=400, code="malformed_http")


def _unsupported_version() -> InvalidRequest:
    return InvalidRequest(
        "only HTTP/1.1 and HTTP/1.0 are spoken here; put a proxy in front for HTTP/2",
        status=505,
        code="http_version_not_supported",
    )


def _too_many_headers(settings: FrontSettings) -> InvalidRequest:
    return InvalidRequest(f"more than {settings.max_headers} headers", status=431, code="headers_too_large")


def _target_too_long(settings: FrontSettings) -> InvalidRequest:
    return InvalidRequest(
        f"the request target is longer than {settings.max_target_bytes} bytes", status=414, code="target_too_long"
    )


def _body_too_large(settings: FrontSettings) -> InvalidRequest:
    return InvalidRequest(
        f"the request body is larger than {settings.max_body_bytes} bytes", status=413, code="body_too_large"
    )


def _explain(error: Exception, start: bytes, *, has_headers: bool) -> InvalidRequest:
    """The client's view of a parser error; `start` is how its message begins, `has_headers` whether one was found."""
    reason = str(error)
    if not has_headers:
        if start.startswith(b"PRI "):  # the preface of HTTP/2
            return _unsupported_version()
        if start.startswith(b"\x16"):  # a handshake record
            return _malformed("this looks like TLS; this port speaks plain HTTP")
        if reason == "Invalid HTTP version":
            return _unsupported_version()
    return _malformed(reason[:1].lower() + reason[1:] if reason else "it cannot be parsed")
