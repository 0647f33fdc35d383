"""News between control and the workers over a Unix stream: snapshots and words one way, facts the other.

Wire, both directions: frames of a 4-byte big-endian length and that many bytes. Control's frames begin with one byte
that tells a snapshot (`S`) from a word (`W`); the rest is one MessagePack value. A worker's frames are MessagePack
arrays of facts. Of snapshots only the newest is sent and read; words and facts are never skipped.
Not for: what is said (snapshot.py), requests (gateway/forward.py) or measurements (metric segments).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Self, cast

import msgspec

from llm_router.processes.plan import unix_address
from llm_router.processes.snapshot import Fact, Snapshot, Word

_log = logging.getLogger(__name__)

MAX_SNAPSHOT_BYTES: Final = 64 * 1024 * 1024
MAX_FACTS_BYTES: Final = 8 * 1024 * 1024
_HIGH_WATER_BYTES: Final = 64 * 1024
_LENGTH_BYTES: Final = 4
_PEER: Final = struct.Struct("3i")  # pid, uid, gid
_SOL_LOCAL: Final = 0
_LOCAL_PEERPID: Final = 2  # both of macOS's <sys/un.h>
_SNAPSHOT: Final = b"S"
_WORD: Final = b"W"

_encoder: Final = msgspec.msgpack.Encoder()
_snapshots: Final = msgspec.msgpack.Decoder(Snapshot)
_words: Final = msgspec.msgpack.Decoder(Word)
_facts: Final = msgspec.msgpack.Decoder(list[Fact])


def encode(snapshot: Snapshot) -> bytes:
    """The snapshot's frame without the length in front."""
    return _SNAPSHOT + _encoder.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """The reverse of `encode`. Raises: msgspec.DecodeError (ValidationError included)."""
    return _snapshots.decode(memoryview(data)[1:])


def frame(payload: bytes) -> bytes:
    """The payload with its length in front."""
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


class BadFrame(Exception):
    """The stream cannot be understood from here on; the connection is of no more use."""


class Frames:
    """Cuts a byte stream into payloads, however the bytes are split. Holds at most one incomplete frame."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are complete with `data`. Raises: BadFrame for one longer than `max_bytes`."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(buffer[:_LENGTH_BYTES], "big")
            if length > self._max_bytes:
                raise BadFrame(f"a frame of {length} bytes; at most {self._max_bytes} are allowed")
            end = _LENGTH_BYTES + length
            if len(buffer) < end:
                return
            payload = bytes(buffer[_LENGTH_BYTES:end])
            del buffer[:end]
            yield payload


# -- control's side -----------------------------------------------------------------------------------


class ServerStatistics(NamedTuple):
    """`skipped` counts snapshots that a slow worker did not get because a newer one followed."""

    connections: int
    published: int
    skipped: int
    facts: int


class SnapshotServer:
    """Gives every connected worker the newest snapshot and hands on what they report.

    A worker that does not read holds one frame in memory and then gets the newest snapshot only. A worker that
    sends something incomprehensible is disconnected. Runs in one event loop; not safe across threads.

    Args:
        sock: a listening Unix stream socket; closed by `aclose`.
        on_facts: called in the loop with the connection that a batch came by and the batch.
        on_left: called in the loop with a connection that is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_facts: Callable[[WorkerLine, list[Fact]], None],
        *,
        on_left: Callable[[WorkerLine], None] = lambda line: None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._sock = sock
        self._on_facts = on_facts
        self._on_left = on_left
        self._loop = loop or asyncio.get_running_loop()
        self._server: asyncio.AbstractServer | None = None
        self._feeds: set[WorkerLine] = set()
        self._frame = b""
        self._published = 0
        self._skipped = 0
        self._facts = 0
        self._names = itertools.count(1)

    def __repr__(self) -> str:
        return f"SnapshotServer({self.statistics()})"

    async def start(self) -> None:
        """Begin to accept workers; those that connected before are waiting in the socket's backlog."""
        self._server = await self._loop.create_unix_server(lambda: WorkerLine(self), sock=self._sock)

    def publish(self, snapshot: Snapshot) -> None:
        """Send `snapshot` to every worker, now and on connecting."""
        self._frame = frame(encode(snapshot))
        self._published += 1
        for feed in self._feeds:
            if feed.send(self._frame):
                self._skipped += 1

    def lines(self) -> list[WorkerLine]:
        """The workers that are connected now."""
        return list(self._feeds)

    async def aclose(self) -> None:
        """Stop accepting and disconnect every worker."""
        if self._server is not None:
            self._server.close()
        for feed in list(self._feeds):
            feed.abort()
        if self._server is not None:
            await self._server.wait_closed()
        self._sock.close()

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(len(self._feeds), self._published, self._skipped, self._facts)

    def joined(self, feed: WorkerLine) -> None:
        self._feeds.add(feed)
        if self._frame:
            feed.send(self._frame)

    def left(self, feed: WorkerLine) -> None:
        self._feeds.discard(feed)
        self._on_left(feed)

    def reported(self, feed: WorkerLine, facts: list[Fact]) -> None:
        self._facts += len(facts)
        self._on_facts(feed, facts)

    def next_name(self) -> str:
        return f"worker-line-{next(self._names)}"


class WorkerLine(asyncio.Protocol):
    """One connected worker. `name` is unique among the connections of one server, and never used again; `pid` is the
    process that connected, 0 where the kernel does not tell."""

    def __init__(self, server: SnapshotServer) -> None:
        self._server = server
        self.name = server.next_name()
        self._frames = Frames(MAX_FACTS_BYTES)
        self._transport: asyncio.WriteTransport | None = None
        self.pid = 0
        self._is_paused = False
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's transports do not inherit from it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self.pid = _pid_of(transport.get_extra_info("socket"))
        self._server.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._server.reported(self, _facts.decode(payload))
        except (BadFrame, msgspec.DecodeError) as error:
            _log.warning("a worker sent facts that cannot be read: %s", error)
            self.abort()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._waiting:
            waiting, self._waiting = self._waiting, b""
            self.send(waiting)

    def tell(self, word: Word) -> None:
        """Say something to this worker alone; lost if it is gone. Words answer facts, which bounds them."""
        if self._transport is not None:
            self._transport.write(frame(_WORD + _encoder.encode(word)))

    def send(self, data: bytes) -> bool:
        """Send one frame, or keep it until there is room. Returns: whether an older kept one is lost by it."""
        if self._transport is None:
            return False
        if self._is_paused:
            is_replaced = bool(self._waiting)
            self._waiting = data
            return is_replaced
        self._transport.write(data)
        return False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _pid_of(sock: socket.socket) -> int:
    """The process at the other end of a Unix stream."""
    try:
        if sys.platform != "linux":
            return sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)
        pid: int = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
    except OSError:  # it has gone already
        return 0
    return pid


# -- a worker's side ----------------------------------------------------------------------------------


class ClientStatistics(NamedTuple):
    """`dropped` counts facts that were lost because more than the bound were waiting."""

    is_connected: bool
    snapshots: int
    waiting: int
    dropped: int


class SnapshotClient:
    """Follows control's snapshots and reports facts to it; connects again for ever.

    While control is away `latest` stays, and facts wait: at most `max_facts`, the oldest are dropped first. Facts
    that were handed to a control that died are lost. Use as an async context manager; runs in one event loop.

    Args:
        path: of control's socket, of any length.
        on_snapshot: called in the loop with each snapshot; must not raise.
        on_word: called in the loop with each word; must not raise.
        on_connection: called in the loop with True when control is there, with False when it has gone.
        on_dropped: called for each fact that is dropped.
        retry_s: seconds between attempts to connect.
        batch_s: seconds that facts are gathered before they are sent.
    """

    def __init__(
        self,
        path: str,
        on_snapshot: Callable[[Snapshot], None],
        *,
        on_word: Callable[[Word], None] = lambda word: None,
        on_connection: Callable[[bool], None] = lambda is_there: None,
        on_dropped: Callable[[], None] = lambda: None,
        loop: asyncio.AbstractEventLoop | None = None,
        retry_s: float = 0.05,
        batch_s: float = 0.1,
        max_facts: int = 1000,
    ) -> None:
        self.latest: Snapshot | None = None
        self._path = path
        self._on_snapshot = on_snapshot
        self._on_word = on_word
        self._on_connection = on_connection
        self._on_dropped = on_dropped
        self._loop = loop or asyncio.get_running_loop()
        self._retry_s = retry_s
        self._batch_s = batch_s
        self._max_facts = max_facts
        self._waiting: deque[Fact] = deque()
        self._dropped = 0
        self._received = 0
        self._line: _Line | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"SnapshotClient({self._path!r}, {self.statistics()})"

    async def __aenter__(self) -> Self:
        self._task = self._loop.create_task(self._stay_connected(), name="snapshot client")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self._line is not None:
            self._line.abort()

    def send_fact(self, fact: Fact) -> None:
        """Report `fact` with the next batch. Never blocks."""
        if len(self._waiting) >= self._max_facts:
            self._waiting.popleft()
            self._dropped += 1
            self._on_dropped()
        self._waiting.append(fact)
        if self._flush_timer is None and self._line is not None:
            self._flush_timer = self._loop.call_later(self._batch_s, self.flush)

    def send_now(self, fact: Fact) -> bool:
        """Report `fact` at once, before what waits. Returns: whether it was sent; it is not kept."""
        if self._line is None or self._line.is_paused:
            return False
        self._line.send(frame(_encoder.encode([fact])))
        return True

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(self._line is not None, self._received, len(self._waiting), self._dropped)

    async def _stay_connected(self) -> None:
        while True:
            line = _Line(self)
            try:
                await self._loop.create_unix_connection(lambda line=line: line, unix_address(self._path))  # type: ignore[misc]
            except OSError:  # control is not there yet, or no more
                pass
            else:
                await line.closed
            await asyncio.sleep(self._retry_s)

    def connected(self, line: _Line) -> None:
        self._line = line
        self._on_connection(True)
        self.flush()

    def disconnected(self, line: _Line) -> None:
        if self._line is line:
            self._line = None
            self._on_connection(False)

    def arrived(self, snapshot: Snapshot) -> None:
        self.latest = snapshot
        self._received += 1
        self._on_snapshot(snapshot)

    def told(self, word: Word) -> None:
        self._on_word(word)

    def flush(self) -> None:
        self._flush_timer = None
        line = self._line
        while self._waiting and line is not None and not line.is_paused:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), 200))]
            line.send(frame(_encoder.encode(batch)))


class _Line(asyncio.Protocol):
    """One connection to control."""

    def __init__(self, client: SnapshotClient) -> None:
        self.is_paused = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._frames = Frames(MAX_SNAPSHOT_BYTES)
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's transports do not inherit from it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._client.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.disconnected(self)
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        try:
            newest = b""
            for payload in self._frames.feed(data):
                if payload[:1] == _WORD:
                    self._client.told(_words.decode(payload[1:]))
                else:  # of several snapshots that arrived together the older ones are not even decoded
                    newest = payload
            if newest:
                self._client.arrived(decode(newest))
        except (BadFrame, msgspec.DecodeError) as error:
            _log.error("control sent something that cannot be read: %s", error)
            self.abort()

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        self._client.flush()

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
