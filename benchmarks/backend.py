"""The mock model server behind every contender: fixed OpenAI replies, as cheap as Python can give them.

Runs as its own process, `python -m benchmarks.backend --port P [--unix PATH] [--cpu N]`, so that what it costs is
never counted as a contender's. A request that asks for a stream gets CHUNKS content events: as fast as the socket
takes them, or one every PACE_S when the prompt contains PACED_MARK (a mark in the prompt, because every gateway passes
the prompt on while many of them drop headers, paths and fields they do not know).
Not for: testing (it checks nothing and is lax about HTTP on purpose; `llm_router.testing` has the strict one).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
from typing import Final, cast

import uvloop

MODEL: Final = "mock"
CHUNKS: Final = 50
PACE_S: Final = 0.010
PACED_MARK: Final = "@paced"

# 0.66 kB with usage: what a short answer of a real server weighs.
_ANSWER: Final = (
    "Loopback sockets carry this sentence from a program that pretends to be a model to a gateway that can not tell, "
    "so that all the time which passes between them is the time that the gateway itself took, and none of it is spent "
    "on arithmetic; it is as long as a short answer usually is, and it never changes."
)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _reply(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _framed(event: bytes) -> bytes:
    """The bytes as one chunk of HTTP/1.1 chunked coding."""
    return b"%x\r\n%s\r\n" % (len(event), event)


_IDENTITY: Final = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "created": 1750000000, "model": MODEL}
_USAGE: Final = {"prompt_tokens": 412, "completion_tokens": CHUNKS, "total_tokens": 412 + CHUNKS}

PLAIN_REPLY: Final = _reply(
    "200 OK",
    "application/json",
    _json(
        {
            **_IDENTITY,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": _ANSWER}, "finish_reason": "stop"}],
            "usage": _USAGE,
        }
    ),
)

STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: %s\n\n" % _json({**_IDENTITY, "object": "chat.completion.chunk", "choices": [choice]})


_FIRST: Final = _framed(_event({"role": "assistant", "content": "Loopback"}, None))
_NEXT: Final = _framed(_event({"content": " sockets"}, None))
_USAGE_EVENT: Final = b"data: %s\n\n" % _json(
    {**_IDENTITY, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE}
)
_DONE: Final = b"data: [DONE]\n\n"
_LAST: Final = _framed(_event({}, "stop") + _DONE) + b"0\r\n\r\n"
_LAST_WITH_USAGE: Final = _framed(_event({}, "stop")) + _framed(_USAGE_EVENT + _DONE) + b"0\r\n\r\n"

# What the routers of vLLM and SGLang ask a server before they send it anything.
_MODELS: Final = _reply(
    "200 OK",
    "application/json",
    _json({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "mock"}]}),
)
_SERVER_INFO: Final = _reply(
    "200 OK",
    "application/json",
    _json({"model_path": MODEL, "served_model_name": MODEL, "is_generation": True, "dp_size": 1, "tp_size": 1}),
)
_HEALTH: Final = _reply("200 OK", "application/json", b"{}")
_NOT_FOUND: Final = _reply("404 Not Found", "application/json", _json({"error": {"message": "no such path"}}))


def _answer_to_get(path: bytes) -> bytes:
    if path in (b"/v1/models", b"/models"):
        return _MODELS
    if path in (b"/get_model_info", b"/model_info", b"/get_server_info", b"/server_info"):
        return _SERVER_INFO
    return _HEALTH if path.startswith(b"/health") else _NOT_FOUND


class Backend(asyncio.Protocol):
    """One connection. Requests are answered in order; a pipelined one waits until the stream before it has ended."""

    __slots__ = ("_buffer", "_loop", "_sent", "_streaming", "_timer", "_transport", "_with_usage")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""
        self._streaming = False
        self._sent = 0
        self._with_usage = False
        self._timer: asyncio.Handle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._streaming:
            self._answer()

    def _answer(self) -> None:
        """Takes whole requests off the buffer and answers them."""
        while self._buffer and not self._streaming:
            buffer = self._buffer
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            end += 4
            if buffer.startswith(b"GET "):
                self._buffer = buffer[end:]
                self._transport.write(_answer_to_get(buffer[4 : buffer.index(b" ", 4)]))
                continue
            whole = _request_length(buffer, end)
            if whole == 0:
                self._transport.write(_reply("411 Length Required", "application/json", b"{}"))
                self._transport.close()
                return
            if len(buffer) < whole:
                return
            self._buffer = buffer[whole:]
            # Every client here writes JSON with or without one space after a colon.
            if buffer.find(b'"stream":true', end) < 0 and buffer.find(b'"stream": true', end) < 0:
                self._transport.write(PLAIN_REPLY)
            else:
                self._begin_stream(buffer, end)

    def _begin_stream(self, request: bytes, body_at: int) -> None:
        self._with_usage = request.find(b'"include_usage"', body_at) > 0
        self._streaming = True
        self._sent = 1
        self._transport.write(STREAM_HEAD + _FIRST)
        if request.find(PACED_MARK.encode(), body_at) > 0:
            self._pace(self._loop.time())
        else:
            self._timer = self._loop.call_soon(self._burst)

    def _burst(self) -> None:
        """One event a turn of the loop, so that each leaves by a system call of its own as from a real server."""
        if self._next():
            self._timer = self._loop.call_soon(self._burst)

    def _pace(self, began_at: float) -> None:
        """Due times count from the start of the stream, so that lateness does not add up."""
        self._timer = self._loop.call_at(began_at + self._sent * PACE_S, self._paced, began_at)

    def _paced(self, began_at: float) -> None:
        if self._next():
            self._pace(began_at)

    def _next(self) -> bool:
        """Sends the next event, with the end after the last content; False when the stream has ended."""
        if self._transport.is_closing():
            return False
        self._sent += 1
        if self._sent < CHUNKS:
            self._transport.write(_NEXT)
            return True
        self._transport.write(_NEXT + (_LAST_WITH_USAGE if self._with_usage else _LAST))
        self._streaming = False
        self._timer = None
        self._answer()
        return False


def _request_length(buffer: bytes, head_length: int) -> int:
    """Bytes of head and body together, 0 when the length is not given. The usual spellings are tried first."""
    for name in (b"Content-Length: ", b"content-length: "):
        at = buffer.find(name, 0, head_length)
        if at >= 0:
            break
    else:
        name = b"content-length:"
        at = buffer[:head_length].lower().find(name)
        if at < 0:
            return 0
    return head_length + int(buffer[at + len(name) : buffer.index(b"\r\n", at)])


async def serve(port: int, unix: str) -> None:
    """Listens until SIGTERM or SIGINT. `port` 0 or an empty `unix` leaves that socket out."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    servers = []
    if port:
        servers.append(await loop.create_server(lambda: Backend(loop), "127.0.0.1", port, backlog=1024))
    if unix:
        servers.append(await loop.create_unix_server(lambda: Backend(loop), unix, backlog=1024))
    await stopped.wait()
    for server in servers:
        server.close()


def main() -> None:
    """Command line of the backend process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", default="")
    parser.add_argument("--cpu", type=int, default=-1, help="run on this CPU only")
    options = parser.parse_args()
    if options.cpu >= 0:
        os.sched_setaffinity(0, {options.cpu})
    gc.freeze()
    gc.disable()  # a connection makes no cycles, and a collection would show up in everybody's p99
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, options.unix))


if __name__ == "__main__":
    main()
