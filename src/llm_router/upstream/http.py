"""One HTTP/1.1 connection to a backend, and the reply that arrives on it.

A `Connection` carries one exchange after the other: it writes a complete request, feeds llhttp with what
comes back and resolves one future when the reply's head is there. It keeps instants, not timers: the pool's
sweep compares them with the clock. Not for: choosing or opening connections (pool.py), building requests.

State of a connection, by what it holds:

    waiter None, reply None    idle (or handed to somebody who has not written yet)
    waiter set,  reply None    request written, the head of the reply is awaited
    waiter None, reply set     the body is arriving
    transport closing          lost; never used again

A reply that is whole leaves its connection at once, so the connection may already serve somebody else while
the body is still being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from httptools import HttpParserError, HttpResponseParser

from llm_router.errors import BackendError, BackendTimeout, BackendUnavailable, BadReply

HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_FRAMING: Final = HOP_BY_HOP | {b"content-length"}
_STARTS: Final = (b"HTTP/1.1 ", b"HTTP/1.0 ")  # llhttp itself also takes 0.9, 2.0, RTSP and ICE
UPLOAD_SLICE_BYTES: Final = 256 * 1024
"""Request bodies above this are written in slices, with waits for the peer; smaller ones in one write."""
_STALE_S: Final = 1.0
"""A used connection that is lost later than this after the request was written was not closed while idle:
the peer took the request and failed, and doing it again could bring down the next one."""


class ConnectionStale(BackendUnavailable):
    """The peer closed a kept connection before a byte of the reply came: another connection may do.

    Whoever receives it owns the slot of the lost connection.
    """


class Owner(Protocol):
    """What a connection needs from the pool it belongs to."""

    def connected(self, connection: Connection) -> None:
        """The connection is open."""

    def released(self, connection: Connection) -> None:
        """The reply is whole and the connection may carry another request."""

    def unusable(self, connection: Connection) -> None:
        """The connection is closing while nobody uses it."""

    def lost(self, connection: Connection, *, keep_slot: bool) -> None:
        """The connection is gone; with `keep_slot` its place in the pool belongs to the receiver of ConnectionStale."""


class Reply:
    """A reply whose head has arrived. One reader at a time; not safe across threads.

    `headers` are in order, names in lower case, without hop-by-hop headers and without `content-length`, which
    is `length` (None when the body is chunked or ends with the connection). Body bytes are without chunk framing.
    """

    __slots__ = (
        "_connection",
        "_high_water",
        "_patient",
        "_wake",
        "backend",
        "buffered_bytes",
        "complete",
        "error",
        "headers",
        "length",
        "max_body_bytes",
        "parts",
        "received_bytes",
        "status",
    )

    def __init__(
        self,
        connection: Connection,
        status: int,
        headers: list[tuple[bytes, bytes]],
        length: int | None,
        high_water_bytes: int,
        max_body_bytes: int,
    ) -> None:
        self._connection: Connection | None = connection
        self.status = status
        self.headers = headers
        self.length = length
        self.complete = False
        self.error: BackendError | None = None
        self.parts: list[bytes] = []
        self.buffered_bytes = 0
        self.received_bytes = 0
        self._wake: asyncio.Future[None] | None = None
        self._patient = False
        self.backend = connection.backend
        self._high_water = high_water_bytes
        self.max_body_bytes = max_body_bytes

    def __repr__(self) -> str:
        state = "complete" if self.complete else repr(self.error) if self.error else "arriving"
        return f"<Reply {self.status} {state} {self.received_bytes} of {self.length} bytes>"

    def header(self, name: bytes) -> bytes | None:
        """The value of the first header called `name` (lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def take(self) -> bytes | None:
        """The body bytes received so far without waiting; b"" when there are none yet, None at the end.

        Raises: BackendError when the body broke off, after everything that came before has been taken.
        """
        parts = self.parts
        if parts:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            self.buffered_bytes = 0
            connection = self._connection
            if connection is not None and connection.paused:
                connection.resume()
            return data
        if self.error is not None:
            raise self.error
        return None if self.complete else b""

    async def chunk(self) -> bytes:
        """Everything received, waiting for the first byte of it; b"" at the end of the body.

        Raises: BackendUnavailable, BackendTimeout (gap, total), BadReply.
        """
        while True:
            data = self.take()
            if data:
                return data
            if data is None:
                return b""
            await self._news()

    async def read(self) -> bytes:
        """The whole body, or what `take` and `chunk` have left of it. Does not wait when it is already there.

        Raises: BadReply beyond `max_body_bytes`; BackendUnavailable, BackendTimeout.
        """
        if not self.complete:
            await self._whole()
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) > self.max_body_bytes:
            raise self._too_large()
        self.parts = []
        self.buffered_bytes = 0
        return data

    def close(self) -> None:
        """Let go of the reply: what has not arrived is given up and its connection closed. Idempotent."""
        connection = self._connection
        if connection is not None:
            connection.fail(BackendUnavailable(self.backend, "the reply was closed before its end"))
        self.parts.clear()
        self.buffered_bytes = 0

    # -- the connection's side -------------------------------------------------------------------------

    def received(self, data: bytes) -> bool:
        """Takes body bytes in; True when the reader is so far behind that the connection must pause."""
        self.parts.append(data)
        size = len(data)
        self.received_bytes += size
        self.buffered_bytes += size
        return self.buffered_bytes > self._high_water

    def wake(self) -> None:
        """Tells the reader that there is news."""
        wake = self._wake
        if wake is not None and not wake.done():
            if self._patient and self._connection is not None and self.buffered_bytes <= self._high_water:
                return
            wake.set_result(None)

    def finish(self) -> None:
        """The body is whole."""
        self._connection = None
        self.complete = True

    def break_off(self, error: BackendError) -> None:
        """No more of the body will come."""
        self._connection = None
        self.complete = False
        self.error = error

    # -- waiting ---------------------------------------------------------------------------------------

    async def _news(self) -> None:
        connection = self._connection
        assert connection is not None, "an arriving reply has a connection"
        self._wake = connection.loop.create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    async def _whole(self) -> None:
        """Waits for the end of the body. The high-water mark becomes the bound of the body: reading is never paused."""
        if self.length is not None and self.length > self.max_body_bytes:
            self.close()
            raise self._too_large()
        self._high_water = self.max_body_bytes
        self._patient = True
        connection = self._connection
        if connection is not None and connection.paused:
            connection.resume()
        while not self.complete:
            if self.error is not None:
                raise self.error
            if self.buffered_bytes > self.max_body_bytes:
                self.close()
                raise self._too_large()
            await self._news()

    def _too_large(self) -> BadReply:
        return BadReply(self.backend, f"the reply is larger than {self.max_body_bytes} bytes")


class Connection(asyncio.Protocol):
    """A connection to one backend that carries one exchange at a time.

    Args:
        backend: its configured name, for errors.
        clock: monotonic seconds, the same as the sweep's.
        max_header_bytes: bound of a reply's head; also of trailers and chunk extensions between two body bytes.
        high_water_bytes: reading pauses when a reader is more than this behind.
    """

    __slots__ = (
        "_barren_bytes",
        "_chunked",
        "_clock",
        "_cut",
        "_done",
        "_excess",
        "_feed",
        "_head_bytes",
        "_header_list",
        "_high_water_bytes",
        "_interim",
        "_is_head",
        "_keep",
        "_length",
        "_max_body_bytes",
        "_max_header_bytes",
        "_named_hops",
        "_owner",
        "_parser",
        "_start",
        "_until_eof",
        "_used",
        "_writable",
        "_write",
        "backend",
        "began_at",
        "loop",
        "moved",
        "opened_at",
        "paused",
        "problem",
        "quiet_at",
        "reply",
        "total_at",
        "transport",
        "waiter",
        "writing_paused",
    )

    def __init__(
        self,
        backend: str,
        owner: Owner,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        max_header_bytes: int,
        max_body_bytes: int,
        high_water_bytes: int,
    ) -> None:
        self.backend = backend
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.waiter: asyncio.Future[Reply] | None = None
        self.reply: Reply | None = None
        self.began_at = 0.0
        self.total_at = 0.0
        self.quiet_at = self.opened_at = clock()
        self.moved = True
        self.paused = False
        self.writing_paused = False
        self.problem = ""
        self._owner = owner
        self._clock = clock
        self._write: Callable[[bytes | memoryview], None]
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._high_water_bytes = high_water_bytes
        self._writable: asyncio.Future[None] | None = None
        self._used = False
        self._cut = False  # a request body was not written to its end: nothing may follow it
        self._is_head = False
        self._start: bytes | None = b""  # the first bytes of a reply until its version is known; None afterwards
        self._head_bytes = 0
        self._barren_bytes = 0
        self._header_list: list[tuple[bytes, bytes]] = []
        self._length: int | None = None
        self._chunked = False
        self._keep = False
        self._done = False
        self._excess = False
        self._interim = False
        self._until_eof = False
        self._named_hops = b""
        self._parser = HttpResponseParser(self)
        self._feed = self._parser.feed_data

    def __repr__(self) -> str:
        if self.transport is None or self.transport.is_closing():
            state = "closed"
        elif self.reply is not None:
            state = "receiving"
        else:
            state = "idle" if self.waiter is None else "waiting"
        return f"<Connection {self.backend} {state}{' paused' if self.paused else ''}>"

    @property
    def is_closed(self) -> bool:
        """True when no request may be written any more."""
        return self.transport is None or self.transport.is_closing()

    # -- sending ---------------------------------------------------------------------------------------

    def begin(self, head: bytes, body: bytes, began_at: float, total_at: float) -> asyncio.Future[Reply]:
        """Writes a request and returns the future of its reply. The connection must be idle.

        A body above 256 KiB is left to `upload`.
        """
        self.began_at = began_at
        self.total_at = total_at
        self._is_head = head.startswith(b"HEAD ")
        self.waiter = waiter = self.loop.create_future()
        self._write(head + body if len(body) <= UPLOAD_SLICE_BYTES else head)
        return waiter

    async def upload(self, body: bytes) -> None:
        """Writes the body in slices, each when the peer has taken those before; stops when the reply comes first."""
        view = memoryview(body)
        for start in range(0, len(body), UPLOAD_SLICE_BYTES):
            while self.writing_paused:
                if self.waiter is None:
                    self._cut = True
                    return
                self._writable = self.loop.create_future()
                try:
                    await self._writable
                finally:
                    self._writable = None
            if self.waiter is None or self.is_closed:
                self._cut = True
                return
            self._write(view[start : start + UPLOAD_SLICE_BYTES])
            self.began_at = self._clock()  # the wait for the first byte begins when the request is written

    # -- deadlines -------------------------------------------------------------------------------------

    def check(self, now: float, first_byte_s: float, gap_s: float, total_s: float) -> None:
        """Fails the exchange when it is over one of its deadlines (`inf` for none)."""
        if self.waiter is not None:
            if now > self.total_at:
                self.fail(BackendTimeout(self.backend, "total", total_s))
            elif now - self.began_at > first_byte_s:
                self.fail(BackendTimeout(self.backend, "first_byte", first_byte_s))
        elif self.reply is not None:
            if now > self.total_at:
                self.fail(BackendTimeout(self.backend, "total", total_s))
            elif self.moved or self.paused:
                # A pause is ours: while the reader is behind, the backend is not late.
                self.moved = False
                self.quiet_at = now
            elif now - self.quiet_at > gap_s:
                self.fail(BackendTimeout(self.backend, "gap", gap_s))

    # -- ending ----------------------------------------------------------------------------------------

    def fail(self, error: BackendError) -> None:
        """Ends the exchange with `error` and closes the connection at once."""
        if self.transport is not None:
            self.transport.abort()
        self._end(error)

    def abort(self) -> None:
        """Closes the connection at once, while it has no exchange or nobody waits for it any more."""
        self.waiter = None
        if self.transport is not None:
            self.transport.abort()

    def resume(self) -> None:
        """Goes on reading after a pause."""
        self.paused = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _end(self, error: BackendError) -> None:
        waiter, reply = self.waiter, self.reply
        self.waiter = self.reply = None
        if reply is not None:
            reply.break_off(error)
            reply.wake()
        if waiter is not None and not waiter.done():
            if reply is not None:
                waiter.set_result(reply)
            else:
                waiter.set_exception(error)
        self._wake_upload()

    def _wake_upload(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # -- asyncio.Protocol ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._write = self.transport.write
        self._owner.connected(self)

    def data_received(self, data: bytes) -> None:
        if self._start is not None:
            if self.waiter is None:  # nobody asked: what comes now cannot be the reply to a later request
                self._unsolicited()
                return
            if self._start or not data.startswith(_STARTS):
                data = self._start + data
                if len(data) < 9:
                    self._start = data
                    if not any(start.startswith(data) for start in _STARTS):
                        self.fail(BadReply(self.backend, "the reply is not HTTP/1.1"))
                    return
                if not data.startswith(_STARTS):
                    self.fail(BadReply(self.backend, "the reply is not HTTP/1.1"))
                    return
            self._start = None
            self._head_bytes = 0
        self.moved = True
        reply = self.reply
        if reply is None:
            self._head_bytes += len(data)
            try:
                self._feed(data)
            except HttpParserError as error:
                self._malformed(error)
                return
            reply = self.reply
            if self._head_bytes > self._max_header_bytes and self._head_is_too_large():
                self.reply = None
                self.fail(BadReply(self.backend, f"its reply's head is larger than {self._max_header_bytes} bytes"))
                return
            if reply is None:
                return
            waiter = self.waiter
            self.waiter = None
            if self._done:
                self._finish(reply)
            if waiter is not None and not waiter.done():
                waiter.set_result(reply)
            if self._writable is not None:
                self._wake_upload()
            return
        before = reply.received_bytes
        try:
            self._feed(data)
        except HttpParserError as error:
            self._malformed(error)
            return
        if self._done:
            self._finish(reply)
        elif reply.received_bytes == before:
            self._barren_bytes += len(data)
            if self._barren_bytes > self._max_header_bytes:
                self.fail(BadReply(self.backend, "the reply has endless chunk extensions or trailers"))
                return
        else:
            self._barren_bytes = 0
        reply.wake()

    def eof_received(self) -> None:
        if self.waiter is None and self.reply is None:
            self._owner.unusable(self)

    def connection_lost(self, error: Exception | None) -> None:
        reply = self.reply
        stale = False
        if reply is not None:
            if self._until_eof and error is None:
                self.reply = None
                reply.finish()
                reply.wake()
            else:
                of = f"{reply.received_bytes} of {reply.length}" if reply.length is not None else reply.received_bytes
                self._end(BackendUnavailable(self.backend, f"connection closed after {of} bytes of the body"))
        elif self.waiter is not None:
            if self._head_bytes or self._start:
                self._end(BackendUnavailable(self.backend, "connection closed within the head of the reply"))
            elif self._used and not self.waiter.done() and self._clock() - self.began_at < _STALE_S:
                stale = True
                self._end(ConnectionStale(self.backend, "connection closed before a reply"))
            else:
                self._end(BackendUnavailable(self.backend, "connection closed before a reply"))
        self._wake_upload()
        self._owner.lost(self, keep_slot=stale)

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        self._wake_upload()

    # -- llhttp callbacks; they run inside _feed -------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._done:
            self._excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.reply is not None:  # trailers: nobody asked for them (no `te: trailers` is sent)
            return
        name = name.lower()
        if name in _FRAMING:
            self._framing(name, value.strip())
        else:
            self._header_list.append((name, value.strip()))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._excess:
            return
        if status < 200 or status > 599:
            if status == 101:
                raise self._reject("the reply switches protocols, which nobody asked for")
            if status < 100 or status > 599:
                raise self._reject(f"the status {status} does not exist")
            self._interim = True
            return
        if self._named_hops:
            self._drop_named_hops()
        if self._chunked:
            if self._parser.get_http_version() != "1.1":
                raise self._reject("a reply of HTTP/1.0 cannot be chunked")
        elif self._length is None and status not in (204, 304):
            self._until_eof = True
        self.reply = Reply(self, status, self._header_list, self._length, self._high_water_bytes, self._max_body_bytes)
        if self._is_head:
            # llhttp cannot be told that no body follows: the message ends here, and the connection with it.
            self._done = True

    def on_body(self, body: bytes) -> None:
        reply = self.reply
        if reply is not None and not self._is_head and reply.received(body) and not self.paused:
            self.paused = True
            if self.transport is not None:
                self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            self._reset_head()
        elif not self._done:
            self._done = True
            self._keep = not self._cut and self._parser.should_keep_alive()

    # -- helpers ---------------------------------------------------------------------------------------

    def _reject(self, problem: str) -> Exception:
        """What a callback raises so that llhttp stops; `_malformed` tells the problem."""
        self.problem = problem
        return ValueError(problem)

    def _malformed(self, error: HttpParserError) -> None:
        """The reply is no valid HTTP, or something follows it."""
        reply = self.reply
        if self._done and reply is not None:
            problem = "more follows after the end of the reply"
        else:
            problem = self.problem or f"the reply is malformed: {error}"
        self.fail(BadReply(self.backend, problem))

    def _framing(self, name: bytes, value: bytes) -> None:
        """Takes in a header that is about this connection, or about where the body ends."""
        if name == b"content-length":
            self._length = int(value)  # llhttp has refused everything but digits, and a second one
        elif name == b"transfer-encoding":
            if self._chunked or value.lower() != b"chunked":
                raise self._reject("the reply has a transfer coding other than chunked")
            self._chunked = True
        elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            self._named_hops += b"," + value.lower()

    def _drop_named_hops(self) -> None:
        names = {name.strip() for name in self._named_hops.split(b",")}
        self._header_list = [header for header in self._header_list if header[0] not in names]

    def _head_is_too_large(self) -> bool:
        """Whether the head exceeds its bound; the body that came with the last piece of it does not count."""
        if self.reply is None:
            return True
        head = sum(len(name) + len(value) + 4 for name, value in self.reply.headers)
        return head > self._max_header_bytes

    def _reset_head(self) -> None:
        self._header_list = []
        self._length = None
        self._chunked = False
        self._named_hops = b""

    def _finish(self, reply: Reply) -> None:
        """The reply is whole: it leaves the connection, which is free for another request, or closed."""
        if self._excess:
            self.fail(BadReply(self.backend, "more follows after the end of the reply"))
            return
        self.reply = None
        reply.finish()
        transport = self.transport
        assert transport is not None
        if self._keep and not transport.is_closing() and not self.writing_paused and self._writable is None:
            self._header_list = []
            self._length = None
            self._chunked = self._done = self._keep = False
            self._named_hops = b""
            self._barren_bytes = self._head_bytes = 0
            self._start = b""
            self._used = True
            if self.paused:
                self.resume()
            self._owner.released(self)
        else:
            transport.abort()

    def _unsolicited(self) -> None:
        self._owner.unusable(self)
        self.abort()
