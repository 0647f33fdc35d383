"""Fakes for tests of the router and of programs that use it: a scripted backend, a clock, a recorder that keeps.

`ScriptedBackend` is a real HTTP server on a real socket, in a thread of its own, so that synchronous tests,
event loops and other processes can all talk to it. Left alone it answers like an OpenAI-compatible backend;
a script makes it answer with any bytes at any rhythm: split, lying about lengths, stalling, resetting.
Not for: load (see benchmarks), or replacing a backend in production.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, cast

from llm_router.signals import RequestRecord

T = TypeVar("T")


# -- clock and recorder -----------------------------------------------------------------------------


class FakeClock:
    """A monotonic clock that moves when told to. Calling it gives the instant in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Moves on by `seconds` (>= 0) and returns the new instant."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back")
        self.now += seconds
        return self.now


class RecordingRecorder:
    """A `Recorder` that keeps everything it is told. Raises AssertionError when the protocol of it is broken."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.finished: list[RequestRecord] = []
        self.gap_seconds: list[float] = []
        self.open_connections: dict[tuple[str, str], int] = {}
        self.closed_connections: list[tuple[str, str, float]] = []
        self.errors: list[str] = []

    def begin(self) -> None:
        self.in_flight += 1

    def finish(self, record: RequestRecord, now: float) -> None:
        assert self.in_flight > 0, "finish without begin"
        assert not record.finished, "a record is finished once"
        assert now >= record.started_at, "a request ends after it began"
        record.finished = True
        self.in_flight -= 1
        self.gaps(record)
        self.finished.append(record)

    def gaps(self, record: RequestRecord) -> None:
        if record.gaps_s:
            self.gap_seconds.extend(record.gaps_s)
            record.gaps_s.clear()

    def connection_opened(self, type: str, protocol: str) -> None:
        key = (type, protocol)
        self.open_connections[key] = self.open_connections.get(key, 0) + 1

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None:
        key = (type, protocol)
        assert self.open_connections.get(key, 0) > 0, f"{key} closed without being opened"
        assert duration_s >= 0, "a connection closes after it opened"
        self.open_connections[key] -= 1
        self.closed_connections.append((type, protocol, duration_s))

    def error(self, type: str) -> None:
        self.errors.append(type)


# -- scripts ----------------------------------------------------------------------------------------


class Pause(NamedTuple):
    """Lets `seconds` pass: the rhythm of a paced stream."""

    seconds: float


class Repeat(NamedTuple):
    """Writes `data` `times` times, no faster than the client takes it."""

    data: bytes
    times: int


class Hold(NamedTuple):
    """Waits until `gate.open()`, or until the client leaves."""

    gate: Gate


class Stall(NamedTuple):
    """Writes nothing more until the client leaves. With `reads` False nothing is read from it either."""

    reads: bool = True


class Reset(NamedTuple):
    """Breaks the connection with a TCP reset."""


class Close(NamedTuple):
    """Closes the connection after what has been written."""


Step = bytes | Pause | Repeat | Hold | Stall | Reset | Close


class Gate:
    """Keeps a script waiting until it is opened, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_open = False
        self._waiting: list[Callable[[], object]] = []

    def open(self) -> None:
        """Lets every script that waits, or will wait, go on."""
        with self._lock:
            self._is_open = True
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()

    async def passed(self) -> None:
        """Returns when the gate is open."""
        loop = asyncio.get_running_loop()
        opened = asyncio.Event()
        with self._lock:
            if self._is_open:
                return
            self._waiting.append(lambda: loop.call_soon_threadsafe(opened.set))
        await opened.wait()


def reply(
    body: bytes,
    status: int = 200,
    content_type: str = "application/json",
    headers: Iterable[tuple[str, str]] = (),
    *,
    length: int | None = None,
) -> bytes:
    """A whole reply with Content-Length; `length` lies about it."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}", f"Content-Type: {content_type}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def json_reply(value: object, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole reply with `value` as its JSON body."""
    return reply(json.dumps(value).encode(), status, headers=headers)


def stream_head(content_type: str = "text/event-stream", headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The head of a chunked reply."""
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {content_type}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "Transfer-Encoding: chunked"]).encode("latin-1") + b"\r\n\r\n"


def framed(data: bytes) -> bytes:
    """One chunk of chunked framing; `framed(b"")` is the end of the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def bytewise(data: bytes) -> list[bytes]:
    """Every byte a step of its own."""
    return [data[index : index + 1] for index in range(len(data))]


_REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Server Error"}


# -- the server -------------------------------------------------------------------------------------


class RecordedRequest(NamedTuple):
    """A request as the backend got it. Header names are in lower case; `connection` counts from 0."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    time: float  # time.monotonic() when the request was whole

    def json(self) -> Any:
        return json.loads(self.body)


class RecordedConnection:
    """A connection as the backend saw it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests = 0
        self.sent_bytes = 0  # handed to the operating system, nearly
        self.received_bytes = 0
        self.closed_by: Literal["", "client", "backend"] = ""  # empty while it is open
        self.closed_time = 0.0  # time.monotonic()

    def __repr__(self) -> str:
        return f"<RecordedConnection {self.number} requests={self.requests} closed_by={self.closed_by!r}>"


class _Script(NamedTuple):
    steps: Sequence[Step]
    early: bool


class ScriptedBackend:
    """An HTTP/1.1 server for tests; a context manager, running from construction of the context to its end.

    Without a script it answers POST /v1/chat/completions and /v1/completions (plain and streaming, with usage),
    POST /v1/embeddings and GET /v1/models, and 404 with an OpenAI error object otherwise.

    Args:
        tokens: the pieces of every completion.
        pace_s: seconds between two events of a stream.
        models: what GET /v1/models lists.
        tls: serve TLS with this context.
        path: serve on this Unix socket instead of a loopback port.
        port: a fixed port, so that a backend can come back where it was; 0 takes a free one.
    """

    def __init__(
        self,
        *,
        tokens: Sequence[str] = ("Hello", " from", " the", " scripted", " backend", "."),
        pace_s: float = 0.0,
        models: Sequence[str] = ("scripted",),
        tls: ssl.SSLContext | None = None,
        path: str | None = None,
        port: int = 0,
    ) -> None:
        self.tokens = tuple(tokens)
        self.pace_s = pace_s
        self.models = tuple(models)
        self.port = port
        self.requests: list[RecordedRequest] = []
        self.connections: list[RecordedConnection] = []
        self._tls = tls
        self._path = path
        self._changed = threading.Condition()
        self._scripts: deque[_Script] = deque()
        self._always: _Script | None = None
        self._peers: set[_Peer] = set()
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="scripted-backend", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        if self._path is not None:
            return f"unix:{self._path}"
        return f"{'https' if self._tls is not None else 'http'}://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client wants as its base URL."""
        return f"{self.url}/v1"

    # -- scripting ---------------------------------------------------------------------------------

    def script(self, *steps: Step, early: bool = False) -> None:
        """The next request without a script is answered by `steps`; the connection then stays open.

        Args:
            early: begin when the head of the request is there, and read nothing of its body but what a
                `Stall` reads; the connection closes at the end of the script.
        """
        with self._changed:
            self._scripts.append(_Script(steps, early))

    def always(self, *steps: Step, early: bool = False) -> None:
        """Every request without a script of its own is answered by `steps` from now on; none: as OpenAI would."""
        with self._changed:
            self._always = _Script(steps, early) if steps else None

    def close_idle(self) -> None:
        """Closes every connection that carries no request at this moment; returns when it is done."""
        self._for_each(lambda peer: None if peer.is_busy else peer.close())

    def reset_all(self) -> None:
        """Resets every connection; returns when it is done."""
        self._for_each(lambda peer: peer.reset())

    def send_idle(self, data: bytes) -> None:
        """Writes bytes that nobody asked for on every connection that carries no request."""
        self._for_each(lambda peer: None if peer.is_busy else peer.write(data))

    def stop(self) -> None:
        """Stops listening and breaks every connection. Idempotent."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        self._thread.join()

    # -- waiting -----------------------------------------------------------------------------------

    def wait(self, predicate: Callable[[Self], T], timeout_s: float = 10.0) -> T:
        """The first true value of `predicate(self)`, looked at whenever something happens. Blocks the thread.

        Raises: AssertionError when there is none within `timeout_s`.
        """
        with self._changed:
            value = predicate(self)
            deadline = time.monotonic() + timeout_s
            while not value:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    value = predicate(self)
                    assert value, f"not within {timeout_s:g} s; requests {len(self.requests)}, {self.connections}"
                    break
                value = predicate(self)
            return value

    async def until(self, predicate: Callable[[Self], T], timeout_s: float = 10.0) -> T:
        """`wait` for coroutines: the event loop goes on."""
        return await asyncio.to_thread(self.wait, predicate, timeout_s)

    # -- the server's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._start_error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server: asyncio.Server
        if self._path is not None:
            server = await loop.create_unix_server(self._peer, self._path, ssl=self._tls)
        else:
            server = await loop.create_server(self._peer, "127.0.0.1", self.port, ssl=self._tls, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        for listening in server.sockets:
            loop.remove_reader(listening.fileno())  # a closed server breaks connections that are just being accepted
        playing = {peer.task for peer in self._peers}
        accepting = asyncio.all_tasks() - playing - {asyncio.current_task()}
        if accepting:  # connections that came with the end; a TLS handshake may be one that never ends
            await asyncio.wait(accepting, timeout=1)
        server.close()
        peers = tuple(self._peers)
        for peer in peers:
            peer.reset()
            if peer.task is not None:
                peer.task.cancel()
        await asyncio.gather(*(peer.task for peer in peers if peer.task is not None), return_exceptions=True)
        while self._peers:  # noqa: ASYNC110 - connection_lost comes with the next turn of the loop
            await asyncio.sleep(0)
        await server.wait_closed()

    def _peer(self) -> _Peer:
        return _Peer(self)

    def _for_each(self, action: Callable[[_Peer], None]) -> None:
        """Does something to every connection in the server's thread and waits for it."""
        assert self._loop is not None, "the backend runs inside its with block"
        done = threading.Event()

        def act() -> None:
            for peer in tuple(self._peers):
                action(peer)
            done.set()

        self._loop.call_soon_threadsafe(act)
        done.wait()

    def opened(self, peer: _Peer) -> RecordedConnection:
        self._peers.add(peer)
        with self._changed:
            record = RecordedConnection(len(self.connections))
            self.connections.append(record)
            self._changed.notify_all()
        return record

    def closed(self, peer: _Peer, record: RecordedConnection, by: Literal["client", "backend"]) -> None:
        self._peers.discard(peer)
        with self._changed:
            record.closed_by = by
            record.closed_time = time.monotonic()
            self._changed.notify_all()

    def next_script(self) -> _Script | None:
        with self._changed:
            return self._scripts.popleft() if self._scripts else self._always

    def record(self, request: RecordedRequest) -> None:
        with self._changed:
            self.connections[request.connection].requests += 1
            self.requests.append(request)
            self._changed.notify_all()

    def progress(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- OpenAI ------------------------------------------------------------------------------------

    def answer(self, request: RecordedRequest) -> list[Step]:
        """What an OpenAI-compatible backend would say."""
        path = request.target.partition("?")[0]
        if request.method == "GET" and path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "scripted"} for name in self.models]
            return [json_reply({"object": "list", "data": data})]
        if request.method != "POST" or path not in _ENDPOINTS:
            return [_error(404, f"no route {request.method} {path}")]
        try:
            asked = json.loads(request.body)
        except ValueError as error:
            return [_error(400, f"the body is not JSON: {error}")]
        if not isinstance(asked, dict):
            return [_error(400, "the body is not a JSON object")]
        if path == "/v1/embeddings":
            return [json_reply(_embeddings(asked))]
        return self._complete(asked, chat=path == "/v1/chat/completions")

    def _complete(self, asked: dict[str, Any], *, chat: bool) -> list[Step]:
        prompt_tokens = _words(asked.get("messages") if chat else asked.get("prompt"))
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens")
        tokens = self.tokens[:limit] if isinstance(limit, int) else self.tokens
        finish = "stop" if len(tokens) == len(self.tokens) else "length"
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(tokens),
            "total_tokens": prompt_tokens + len(tokens),
        }
        common = {"id": "scripted-1", "created": 0, "model": asked.get("model", "scripted")}
        if not asked.get("stream"):
            text = "".join(tokens)
            whole = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            kind = "chat.completion" if chat else "text_completion"
            choice: dict[str, object] = {"index": 0, **whole, "logprobs": None, "finish_reason": finish}
            return [json_reply({**common, "object": kind, "choices": [choice], "usage": usage})]
        kind = "chat.completion.chunk" if chat else "text_completion"
        events: list[object] = []
        for index, token in enumerate(tokens):
            delta = {"role": "assistant", "content": token} if index == 0 else {"content": token}
            part: dict[str, object] = {"delta": delta} if chat else {"text": token}
            choice = {"index": 0, **part, "logprobs": None, "finish_reason": None}
            events.append({**common, "object": kind, "choices": [choice]})
        last: dict[str, object] = {"delta": {}} if chat else {"text": ""}
        choice = {"index": 0, **last, "logprobs": None, "finish_reason": finish}
        events.append({**common, "object": kind, "choices": [choice]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append({**common, "object": kind, "choices": [], "usage": usage})
        steps: list[Step] = [stream_head()]
        for number, event in enumerate(events):
            if number and self.pace_s:
                steps.append(Pause(self.pace_s))
            steps.append(framed(b"data: " + json.dumps(event).encode() + b"\n\n"))
        return [*steps, framed(b"data: [DONE]\n\n") + framed(b"")]


_ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def _error(status: int, message: str) -> bytes:
    return json_reply(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status
    )


def _words(value: object) -> int:
    """How many words are in the texts of a prompt: a token count that a test can check by hand."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, dict):
        return _words(value.get("content", value.get("text")))
    if isinstance(value, list):
        return sum(_words(item) for item in value)
    return 0


def _embeddings(asked: dict[str, Any]) -> dict[str, Any]:
    """Vectors of eight numbers that depend on nothing but the text."""
    given = asked.get("input", "")
    texts = given if isinstance(given, list) else [given]
    data = []
    for index, text in enumerate(texts):
        digest = hashlib.sha256(str(text).encode()).digest()[:8]
        data.append({"object": "embedding", "index": index, "embedding": [byte / 255 for byte in digest]})
    count = _words(texts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": asked.get("model", "scripted"), "usage": usage}


class _Peer(asyncio.Protocol):
    """One connection of the backend: reads requests and plays a script for each."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend
        self.task: asyncio.Task[None] | None = None
        self.is_busy = False
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._by: Literal["client", "backend"] = "client"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.connection = self.backend.opened(self)
        self.task = asyncio.get_running_loop().create_task(self._play())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self.connection.received_bytes += len(data)
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set()
        self._news.set()
        self._writable.set()
        self.backend.closed(self, self.connection, self._by)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def write(self, data: bytes) -> None:
        self.transport.write(data)
        self.connection.sent_bytes += len(data)

    def close(self) -> None:
        if not self._gone.is_set():
            self._by = "backend"
            self.transport.close()

    def reset(self) -> None:
        if self._gone.is_set():
            return
        self._by = "backend"
        raw = self.transport.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def _play(self) -> None:
        try:
            while not self._gone.is_set():
                head = await self._until_head()
                self.is_busy = True
                script = self.backend.next_script()
                method, target, headers = _parse_head(head)
                early = script is not None and script.early
                if early:
                    self.transport.pause_reading()
                body = b"" if early else await self._body(headers)
                request = RecordedRequest(method, target, headers, body, self.connection.number, time.monotonic())
                self.backend.record(request)
                steps = self.backend.answer(request) if script is None else script.steps
                for number, step in enumerate(steps, start=1):
                    # Idle before the client can have the last byte: `close_idle` after its reply then finds it.
                    self.is_busy = number < len(steps) or not isinstance(step, bytes)
                    await self._step(step)
                if early:
                    self.close()
                self.is_busy = False
        except ConnectionError:
            pass  # the client left: what was recorded tells
        except ValueError:
            self.write(_error(400, "not HTTP"))
            self.close()

    async def _step(self, step: Step) -> None:
        if self._gone.is_set():
            raise ConnectionResetError
        match step:
            case bytes():
                self.write(step)
                await asyncio.sleep(0)  # a turn of the loop: the next step is a write of its own
                await self._writable.wait()
            case Pause():
                await asyncio.sleep(step.seconds)
            case Repeat():
                for _ in range(step.times):
                    await self._step(step.data)
                    self.backend.progress()
            case Hold():
                await self._or_gone(step.gate.passed())
            case Stall():
                if step.reads:
                    self.transport.resume_reading()
                else:
                    self.transport.pause_reading()
                await self._gone.wait()
            case Reset():
                self.reset()
                await self._gone.wait()
            case Close():
                self.close()
                await self._gone.wait()

    async def _or_gone(self, waiting: Any) -> None:
        """Waits for something, or for the client to leave."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._gone.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self._gone.is_set():
            raise ConnectionResetError

    async def _more(self) -> None:
        if self._gone.is_set():
            raise ConnectionResetError
        self._news.clear()
        await self._news.wait()

    async def _until_head(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._more()
        return self._taken(end + 4)

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        return self._taken(size)

    async def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            await self._more()
        return self._taken(end + 2)[:-2]

    def _taken(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int((await self._line()).partition(b";")[0], 16):
                parts.append(await self._exactly(size))
                await self._line()
            await self._line()
            return b"".join(parts)
        return await self._exactly(int(headers.get("content-length", "0")))


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers. Raises ValueError when it is not HTTP."""
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return method, target, headers
