"""What both fronts promise a core and its clients: our own server, and the ASGI front mounted in uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from llm_router.gateway.front import FrontSettings
from llm_router.gateway.seam import Request, Responder
from support.aio import run
from support.fronts import FRONTS, Server, Wire, echo, settled, still

pytestmark = pytest.mark.parametrize("front", list(FRONTS.values()), ids=list(FRONTS))

Serving = Callable[..., AbstractAsyncContextManager[Server]]

CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"


def test_a_request_reaches_the_core_as_it_was_sent(front: Serving) -> None:
    """Method, raw path, query, headers in lower case and the body arrive; repeated headers are joined in order."""

    async def main() -> None:
        async with front(echo) as server, await Wire.connect(server.port) as wire:
            reply = await wire.ask(
                b"POST /v1/a%2Fb?x=1&y=%20 HTTP/1.1\r\nHost: localhost:3006\r\nX-Twice: one\r\nCookie: a=1\r\n"
                b"x-twice: two\r\ncookie: b=2\r\nX-Empty:\r\nX-Padded: \t a b \t \r\nContent-Length: 5\r\n\r\n\x00\xff\r\n\n"
            )
            got = reply.json()
            assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
            assert (got["method"], got["path"], got["query"]) == ("POST", "/v1/a%2Fb", "x=1&y=%20")
            assert got["version"] == "1.1"
            assert got["body"] == "\x00\xff\r\n\n"
            headers = dict(got["headers"])
            assert headers["host"] == "localhost:3006"
            assert headers["x-twice"] == "one, two"
            assert headers["cookie"] == "a=1; b=2"
            assert headers["x-empty"] == ""
            assert headers["x-padded"].rstrip() == "a b"

    run(main())


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ""),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", "hi"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""),
        (
            CHUNKED + b"2\r\nhi\r\nA;x=y\r\n\r\n\r\n0\r\n\r\n\r\r\n0\r\nX-Trailer: 1\r\n\r\n",
            "hi\r\n\r\n0\r\n\r\n\r",
        ),
    ],
)
def test_bodies_arrive_whole(front: Serving, message: bytes, body: str) -> None:
    """Content-length, chunked and absent bodies are told apart, and the next request on the connection is served."""

    async def main() -> None:
        async with front(echo) as server, await Wire.connect(server.port) as wire:
            for _ in range(2):
                assert (await wire.ask(message)).json()["body"] == body

    run(main())


def test_pipelined_requests_are_answered_in_order(front: Serving) -> None:
    """Requests sent at once are answered one after the other, each whole, even if the first takes longest."""

    async def core(request: Request, responder: Responder) -> None:
        for _ in range(20 - int(request.query)):
            await asyncio.sleep(0)
        await echo(request, responder)

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            for number in range(20):
                wire.send(b"POST /?%d HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n%02d" % (number, number))
            for number in range(20):
                got = (await wire.reply()).json()
                assert (got["query"], got["body"]) == (str(number), f"{number:02d}")

    run(main())


def test_a_stream_arrives_piece_by_piece(front: Serving) -> None:
    """What the core writes is sent at once, not when the reply ends; empty writes do not end the reply."""
    seen = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [(b"content-type", b"text/event-stream")])
        responder.mark_stream()
        for piece in (b"", b"data: 1\n\n", b""):
            if (waiting := responder.write(piece)) is not None:
                await waiting
        await seen.wait()
        responder.end(b"data: [DONE]\n\n")

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            for _ in range(2):
                seen.clear()
                wire.send(GET)
                status, headers = await wire.head()
                assert (status, headers["transfer-encoding"]) == (200, "chunked")
                assert await wire.chunk() == b"data: 1\n\n"
                seen.set()
                assert await wire.chunk() == b"data: [DONE]\n\n"
                assert await wire.chunk() == b""

    run(main())


@pytest.mark.parametrize("status", [204, 304])
def test_replies_without_a_body_have_none(front: Serving, status: int) -> None:
    """The next reply on the connection follows directly."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(status, [(b"x-kept", b"yes")])
        responder.end()

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            for _ in range(2):
                reply = await wire.ask(GET)
                assert (reply.status, reply.headers["x-kept"]) == (status, "yes")
                assert "transfer-encoding" not in reply.headers

    run(main())


def test_head_is_answered_like_get_without_the_body(front: Serving) -> None:
    """The reply announces the length that GET would have; a stream has no body either."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        if request.path == "/stream" and (waiting := responder.write(b"abc")) is not None:
            await waiting
        responder.end(b"0123456789")

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            wire.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await wire.reply(to_head=True)).headers["content-length"] == "10"
            wire.send(b"HEAD /stream HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await wire.reply(to_head=True)).status == 200
            assert (await wire.ask(GET)).body == b"0123456789"

    run(main())


def test_a_length_that_the_core_announces_is_used(front: Serving) -> None:
    """A streamed reply of known length is not chunked."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [(b"content-length", b"6")])
        if (waiting := responder.write(b"abc")) is not None:
            await waiting
        responder.end(b"def")

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            for _ in range(2):
                reply = await wire.ask(GET)
                assert (reply.body, reply.headers.get("transfer-encoding")) == (b"abcdef", None)

    run(main())


def test_a_core_that_fails_before_its_reply_is_answered_with_500(front: Serving) -> None:
    """Raising, returning without a reply, and a forged header all give the same plain error object."""

    async def core(request: Request, responder: Responder) -> None:
        if request.path == "/raise":
            raise LookupError("no such thing")
        if request.path == "/forge":
            responder.start(200, [(b"x-a", b"b\r\nset-cookie: c=d")])
        if request.path == "/framing":
            responder.start(200, [(b"transfer-encoding", b"chunked")])

    async def main() -> None:
        async with front(core) as server:
            for path in (b"/raise", b"/silent", b"/forge", b"/framing"):
                async with await Wire.connect(server.port) as wire:
                    reply = await wire.ask(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path)
                    assert (reply.status, reply.json()["error"]["code"]) == (500, "internal_error")
                    assert "set-cookie" not in reply.headers

    run(main())


def test_a_core_that_fails_in_its_reply_cuts_it(front: Serving) -> None:
    """The client cannot take half a reply for a whole one."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        if (waiting := responder.write(b"half")) is not None:
            await waiting
        raise LookupError("no such thing")

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port) as wire:
            wire.send(GET)
            try:
                reply = await wire.reply()
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            assert not reply.is_whole

    run(main())


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_client_that_leaves_cancels_the_core(front: Serving, *, is_streaming: bool) -> None:
    """First the disconnect callback runs, then the core is cancelled, whether or not it has begun to reply."""
    events: list[str] = []
    began = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.on_disconnect(lambda: events.append(f"callback, gone: {responder.gone}"))
        if is_streaming:
            responder.start(200, [])
            if (waiting := responder.write(b"some")) is not None:
                await waiting
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("cancelled")
            responder.end(b"nobody reads this")
            raise

    async def main() -> None:
        async with front(core) as server:
            async with await Wire.connect(server.port) as wire:
                wire.send(GET)
                await began.wait()
            await settled(lambda: len(events) == 2)
            assert events == ["callback, gone: True", "cancelled"]
            async with await Wire.connect(server.port) as wire:
                wire.send(GET)

    run(main())


def test_a_slow_client_makes_the_core_wait(front: Serving) -> None:
    """A client that does not read stops the core after a bounded number of bytes, and then gets every one of them."""
    piece = bytes(range(256)) * 64
    written = 0
    total = 64 * 1024 * 1024

    async def core(request: Request, responder: Responder) -> None:
        nonlocal written
        responder.start(200, [])
        while written < total:
            written += len(piece)
            if (waiting := responder.write(piece)) is not None:
                await waiting
        responder.end()

    async def main() -> None:
        async with front(core) as server, await Wire.connect(server.port, receive_buffer=16384) as wire:
            wire.send(GET)
            await wire.head()
            await still(lambda: written)
            assert written < 8 * 1024 * 1024, "the kernel's buffers and ours hold a few megabytes at most"
            got = 0
            while chunk := await wire.chunk():
                assert chunk == piece
                got += len(chunk)
            assert got == total

    run(main(), timeout_s=40)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_is_too_large_is_refused(front: Serving, framing: str) -> None:
    """The client that sends everything before it reads gets the refusal too, with method, path and request id."""
    size = 3_000_000
    settings = FrontSettings(max_body_bytes=1_000_000)
    head = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nX-Request-Id: r-1\r\n"

    async def main() -> None:
        async with front(echo, settings) as server, await Wire.connect(server.port) as wire:
            if framing == "length":
                wire.send(head + b"Content-Length: %d\r\n\r\n" % size + bytes(size))
            else:
                chunk = b"%x\r\n%b\r\n" % (size // 100, bytes(size // 100))
                wire.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 100 + b"0\r\n\r\n")
            if server.front is not None:  # uvicorn closes at once, and the reset may overtake our reply
                await wire.writer.drain()
            reply = await wire.reply()
            assert (reply.status, reply.json()["code"]) == (413, "body_too_large")
            assert (reply.json()["path"], reply.json()["request_id"]) == ("/v1/x", "r-1")

    run(main())


def test_the_largest_allowed_body_is_served(front: Serving) -> None:
    """The bound itself is allowed, with either framing."""
    settings = FrontSettings(max_body_bytes=100_000)

    async def main() -> None:
        async with front(echo, settings) as server, await Wire.connect(server.port) as wire:
            body = b"x" * 100_000
            reply = await wire.ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + body)
            assert len(reply.json()["body"]) == 100_000
            reply = await wire.ask(
                b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n186A0\r\n" + body + b"\r\n0\r\n\r\n"
            )
            assert len(reply.json()["body"]) == 100_000

    run(main())
