"""The connections to one backend: which request gets which, how many there may be, and how long things may take.

Assignment is synchronous (`_idle`, `_waiting`, `_slots` change without an await between them); only opening a
connection awaits. One `sweep` per pool enforces every deadline but that of connecting, so that a request costs
no timer. Not for: HTTP itself (http.py), choosing a backend, retrying beyond a connection that was stale.

Bounds: `max_connections` open or being opened; `max_waiting` requests wait for one, in order, `wait_s` each.
A pool belongs to one event loop and one thread.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from llm_router.errors import BackendBusy, BackendError, BackendTimeout, BackendUnavailable
from llm_router.signals import Recorder
from llm_router.upstream.http import UPLOAD_SLICE_BYTES, Connection, ConnectionStale, Reply

__all__ = ["Origin", "Pool", "PoolSettings", "PoolStatistics", "Reply"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_UNIX_PATH_BYTES: Final = 100
"""Longest Unix-socket path handed to connect(2) as it is; sun_path holds 108 bytes on Linux, 104 on macOS."""


class Origin(NamedTuple):
    """Where a backend listens. `path` is the socket's path for scheme `unix`, empty otherwise."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """The origin of `http://host[:port]/…`, `https://host[:port]/…` or `unix:/path/of/socket`.

        The path of an http URL is not part of an origin: it belongs into the request.

        Raises: ValueError with what is wrong, without repeating user name or password.
        """
        scheme, separator, rest = url.partition(":")
        scheme = scheme.lower()
        if scheme == "unix" and separator:
            path = "/" + rest.lstrip("/")
            if path == "/":
                raise ValueError("a unix URL needs the path of a socket, like unix:/run/backend.sock")
            return cls("unix", "localhost", 0, path)
        if scheme not in _DEFAULT_PORTS:
            raise ValueError("the URL of a backend begins with http://, https:// or unix:")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError("the URL of a backend has an invalid host or port") from error
        if parts.username is not None or parts.password is not None:
            raise ValueError("the URL of a backend must not hold a user name or password; use its key")
        if not parts.hostname or any(character <= " " for character in parts.netloc):
            raise ValueError("the URL of a backend needs a host")
        return cls(scheme, parts.hostname, _DEFAULT_PORTS[scheme] if port is None else port)

    @property
    def authority(self) -> str:
        """What belongs into the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (0, _DEFAULT_PORTS.get(self.scheme)) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.scheme == "unix" else f"{self.scheme}://{self.authority}"


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a pool. Times in seconds; 0 means no deadline for the five timeouts."""

    connect_s: float = 5.0  # name resolution, TCP and TLS together
    first_byte_s: float = 300.0  # until the head of the reply is whole; a busy local model may queue this long
    gap_s: float = 120.0  # between two pieces of the body
    total_s: float = 0.0  # from the call of send to the last byte; streams may rightly take hours
    max_connections: int = 256
    wait_s: float = 10.0  # for a connection to become free; 0: do not wait at all
    max_waiting: int = 1024
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024  # for Reply.read; streaming has no bound
    high_water_bytes: int = 64 * 1024
    idle_s: float = 60.0
    tls_verify: bool = True
    tls_ca_file: str | None = None  # PEM file of authorities instead of the system's


class PoolStatistics(msgspec.Struct, frozen=True):
    """The state of a pool at one instant, and counts since its beginning."""

    idle: int
    busy: int
    connecting: int
    waiting: int
    max_connections: int
    max_waiting: int
    buffered_bytes: int  # received and not yet taken by readers
    opened: int
    closed: int
    retried: int  # requests written again because their connection had been closed while idle
    refused: int  # BackendBusy: the queue was full or the wait too long


class Pool:
    """Keep-alive connections to one backend.

    Args:
        name: the backend's configured name, for errors.
        recorder: told about connections opened and closed (type `upstream`, protocol `http`).
        clock: monotonic seconds of the same kind that `sweep` gets; the loop's time when None.
    """

    def __init__(
        self,
        name: str,
        origin: Origin,
        settings: PoolSettings,
        recorder: Recorder,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.name = name
        self.origin = origin
        self.settings = settings
        self._recorder = recorder
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._clock = clock if clock is not None else self._loop.time
        self._first_byte_s = settings.first_byte_s or inf
        self._gap_s = settings.gap_s or inf
        self._total_s = settings.total_s or inf
        self._tls: ssl.SSLContext | None = None
        self._tls_problem = ""  # each request is told: one bad setting must not keep the other backends from serving
        if origin.scheme == "https":
            try:
                self._tls = _tls_context(settings)
            except OSError as error:
                self._tls_problem = f"its tls_ca_file cannot be used: {error.strerror or error}"
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []  # the last one used is used first: the others may age and be closed
        self._waiting: deque[tuple[float, asyncio.Future[Connection | None]]] = deque()
        self._slots = 0  # connections that exist or are being opened
        self._connecting = 0
        self._opened = 0
        self._closed_count = 0
        self._retried = 0
        self._refused = 0
        self._is_closed = False
        self._emptied: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = self.statistics()
        return (
            f"<Pool {self.name} idle={state.idle} busy={state.busy} connecting={state.connecting} "
            f"waiting={state.waiting}{' closed' if self._is_closed else ''}>"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def in_use(self) -> int:
        """Requests that the backend is working on, those included whose connection is not open or not free yet."""
        return self._slots - len(self._idle) + len(self._waiting)

    # -- requests --------------------------------------------------------------------------------------

    async def send(self, head: bytes, body: bytes = b"", *, idempotent_retry: bool = True) -> Reply:
        """Writes a request and returns its reply as soon as the head of it has arrived.

        Cancellation closes the connection at once and leaves nothing behind.

        Args:
            head: request line and headers with their final CRLF CRLF, Content-Length included.
            body: exactly as long as the head says.
            idempotent_retry: whether a request may be written a second time, on a new connection, when the kept
                connection turns out to have been closed by the peer before a byte of the reply came.

        Raises: BackendUnavailable, BackendTimeout (connect, first_byte, total), BackendBusy, BadReply.
        """
        began_at = self._clock()
        total_at = began_at + self._total_s
        idle = self._idle
        if idle:
            connection = idle.pop()
        else:
            connection = await self._acquire()
            began_at = self._clock()
        while True:
            waiter = connection.begin(head, body, began_at, total_at)
            try:
                if len(body) > UPLOAD_SLICE_BYTES:
                    await connection.upload(body)
                return await waiter
            except ConnectionStale:
                if not idempotent_retry:
                    self._free_slot()
                    raise
            except BackendError:
                raise
            except BaseException:
                self._give_up(connection, waiter)
                raise
            self._retried += 1
            connection = await self._connect()  # in the slot of the stale one; a new one is never stale
            began_at = self._clock()

    def _give_up(self, connection: Connection, waiter: asyncio.Future[Reply]) -> None:
        """Undoes an exchange whose caller was cancelled, perhaps after its future had been resolved."""
        if not waiter.done() or waiter.cancelled():
            connection.abort()
        elif (error := waiter.exception()) is None:
            waiter.result().close()
        elif isinstance(error, ConnectionStale):
            self._free_slot()

    # -- deadlines -------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Enforces every deadline as of `now`; to be called about every 0.1 s, which is how late it may be."""
        waiting = self._waiting
        while waiting and (waiting[0][0] <= now or waiting[0][1].done()):
            _, future = waiting.popleft()
            if not future.done():
                self._refused += 1
                future.set_exception(
                    BackendBusy(
                        self.name,
                        f"all {self.settings.max_connections} connections are in use and none became free "
                        f"within {self.settings.wait_s:g} s",
                    )
                )
        settings = self.settings
        for connection in tuple(self._connections):
            connection.check(now, self._first_byte_s, self._gap_s, settings.total_s)
        idle_s = settings.idle_s
        expired = []
        for connection in self._idle:
            if connection.moved:
                connection.moved = False
                connection.quiet_at = now
            elif now - connection.quiet_at >= idle_s:
                expired.append(connection)
        for connection in expired:
            self._idle.remove(connection)
            connection.abort()

    # -- state -----------------------------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        """What the pool holds now; costs a walk over its connections."""
        buffered = sum(c.reply.buffered_bytes for c in self._connections if c.reply is not None)
        idle = len(self._idle)
        return PoolStatistics(
            idle=idle,
            busy=self._slots - idle - self._connecting,
            connecting=self._connecting,
            waiting=sum(not future.done() for _, future in self._waiting),
            max_connections=self.settings.max_connections,
            max_waiting=self.settings.max_waiting,
            buffered_bytes=buffered,
            opened=self._opened,
            closed=self._closed_count,
            retried=self._retried,
            refused=self._refused,
        )

    async def aclose(self) -> None:
        """Closes every connection at once and waits until they are gone. Exchanges and waiters get BackendUnavailable."""
        self._is_closed = True
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(self._shut())
        self._idle.clear()
        for connection in tuple(self._connections):
            connection.fail(self._shut())
        while self._connections:
            self._emptied = self._loop.create_future()
            await self._emptied

    # -- connections -----------------------------------------------------------------------------------

    async def _acquire(self) -> Connection:
        """A connection that is ours: a new one within the bound, else the next one that becomes free."""
        while True:
            if self._is_closed:
                raise self._shut()
            if self._idle:
                return self._idle.pop()
            if self._slots < self.settings.max_connections:
                self._slots += 1
                return await self._connect()
            connection = await self._wait()
            if connection is None:
                return await self._connect()
            if not connection.is_closed:
                return connection

    async def _wait(self) -> Connection | None:
        """Waits in line. Returns a connection, or None when a slot for a new one has been reserved for us."""
        settings = self.settings
        in_line = len(self._waiting)
        if settings.wait_s <= 0 or in_line >= settings.max_waiting:
            self._refused += 1
            raise BackendBusy(
                self.name, f"all {settings.max_connections} connections are in use and {in_line} requests wait already"
            )
        future: asyncio.Future[Connection | None] = self._loop.create_future()
        self._waiting.append((self._clock() + settings.wait_s, future))
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():
                if future.exception() is None:
                    self._pass_on(future.result())
            else:
                self._waiting = deque(entry for entry in self._waiting if entry[1] is not future)
            raise

    def _pass_on(self, connection: Connection | None) -> None:
        """Gives what was assigned to a cancelled waiter to the next one."""
        if connection is None:
            self._free_slot()
        elif not connection.is_closed:
            self.released(connection)

    def _free_slot(self) -> None:
        """One connection less: the first in line may open one."""
        self._slots -= 1
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                self._slots += 1
                future.set_result(None)
                return

    async def _connect(self) -> Connection:
        """Opens a connection in a slot that is reserved already; the slot is given back on failure."""
        self._connecting += 1
        connection = self._protocol()
        is_ours = False
        try:
            if self._is_closed:
                raise self._shut()
            async with asyncio.timeout(self.settings.connect_s or None):
                await self._open(connection)
            if self._is_closed:
                raise self._shut()
            if connection.is_closed:
                raise BackendUnavailable(self.name, "connection closed as soon as it was open")
            is_ours = True
        except TimeoutError as error:
            raise BackendTimeout(self.name, "connect", self.settings.connect_s) from error
        except (OSError, ssl.CertificateError) as error:
            raise BackendUnavailable(self.name, _connect_problem(error)) from error
        finally:
            self._connecting -= 1
            if connection.transport is None:
                self._free_slot()
            elif not is_ours:
                # It opened at the moment we gave up. uvloop closes such a transport without connection_lost.
                connection.abort()
                self.lost(connection, keep_slot=False)
        return connection

    async def _open(self, connection: Connection) -> None:
        origin, loop = self.origin, self._loop
        if self._tls_problem:
            raise BackendUnavailable(self.name, self._tls_problem)
        if origin.scheme != "unix":
            await loop.create_connection(
                lambda: connection,
                origin.host,
                origin.port,
                ssl=self._tls,
                server_hostname=origin.host if self._tls is not None else None,
            )
        elif len(os.fsencode(origin.path)) <= _UNIX_PATH_BYTES:
            await loop.create_unix_connection(lambda: connection, origin.path)
        else:
            folder = os.open(os.path.dirname(origin.path), os.O_RDONLY | os.O_DIRECTORY)
            try:
                short = f"/proc/self/fd/{folder}/{os.path.basename(origin.path)}"
                await loop.create_unix_connection(lambda: connection, short)
            finally:
                os.close(folder)

    def _protocol(self) -> Connection:
        settings = self.settings
        return Connection(
            self.name,
            self,
            self._loop,
            self._clock,
            max_header_bytes=settings.max_header_bytes,
            max_body_bytes=settings.max_body_bytes,
            high_water_bytes=settings.high_water_bytes,
        )

    def _shut(self) -> BackendUnavailable:
        return BackendUnavailable(self.name, "its connections are closed: the process is shutting down")

    # -- http.Owner ------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._opened += 1
        self._recorder.connection_opened("upstream", "http")

    def released(self, connection: Connection) -> None:
        waiting = self._waiting
        while waiting:
            _, future = waiting.popleft()
            if not future.done():
                future.set_result(connection)
                return
        connection.moved = True
        self._idle.append(connection)

    def unusable(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def lost(self, connection: Connection, *, keep_slot: bool) -> None:
        if connection not in self._connections:
            return
        self.unusable(connection)
        self._connections.remove(connection)
        self._closed_count += 1
        self._recorder.connection_closed("upstream", "http", self._clock() - connection.opened_at)
        if not keep_slot:
            self._free_slot()
        if not self._connections and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


def _tls_context(settings: PoolSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.tls_ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if not settings.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _connect_problem(error: Exception) -> str:
    """Why no connection came about, without the address."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is not accepted: {error.verify_message} (a private authority needs tls_ca_file)"
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return f"no TLS connection: {getattr(error, 'reason', None) or type(error).__name__}"
    if isinstance(error, socket.gaierror):
        return "its host name cannot be resolved"
    number = error.errno if isinstance(error, OSError) else None
    return f"cannot connect: {os.strerror(number) if number else 'none of its addresses accepts connections'}"
