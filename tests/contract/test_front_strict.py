"""What only our own server promises: strict HTTP, deadlines, limits, orderly endings, TLS, connection metrics."""

from __future__ import annotations

import asyncio
import ssl
import struct
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import pytest

from llm_router.gateway.front import Front, FrontSettings
from llm_router.gateway.seam import Request, Responder
from llm_router.signals import NoRecorder
from support.aio import run
from support.fronts import Wire, echo, own_front, settled, still
from support.tls import self_signed

GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


REFUSED: dict[str, tuple[int, bytes]] = {
    "not HTTP": (400, b"hello there\r\n\r\n"),
    "TLS on the plain port": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "a reply": (400, b"HTTP/1.1 200 OK\r\n\r\n"),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2.0 request line": (505, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    "RTSP": (505, b"GET / RTSP/1.1\r\nHost: a\r\n\r\n"),
    "unknown method": (400, b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "method in lower case": (400, b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "CONNECT": (501, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
    "no path": (400, b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    "star without OPTIONS": (400, b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    "fragment": (400, b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "absolute form of another scheme": (400, b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "absolute form with a user": (400, b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "space in the target": (400, b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "NUL in the target": (400, b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n"),
    "raw UTF-8 in the target": (400, "GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode()),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "bare LF behind a header": (400, b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    "bare CR in a header": (400, b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n"),
    "two CR": (400, b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n"),
    "folded header": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n"),
    "space before the first header": (400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "space before the colon": (400, b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
    "header without a name": (400, b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n"),
    "bracket in a header name": (400, b"GET / HTTP/1.1\r\nHost: a\r\nx(y: b\r\n\r\n"),
    "NUL in a header": (400, b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n"),
    "control byte in a header": (400, b"GET / HTTP/1.1\r\nHost: a\x01b\r\n\r\n"),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two Host": (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
    "two Content-Type": (400, POST + b"Content-Type: text/plain\r\nContent-Type: application/json\r\n\r\n"),
    "two Content-Length": (400, POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi"),
    "Content-Length as a list": (400, POST + b"Content-Length: 2, 2\r\n\r\nhi"),
    "negative Content-Length": (400, POST + b"Content-Length: -2\r\n\r\nhi"),
    "Content-Length with a sign": (400, POST + b"Content-Length: +2\r\n\r\nhi"),
    "hexadecimal Content-Length": (400, POST + b"Content-Length: 0x2\r\n\r\nhi"),
    "empty Content-Length": (400, POST + b"Content-Length:\r\n\r\nhi"),
    "Content-Length beyond 64 bits": (400, POST + b"Content-Length: 99999999999999999999\r\n\r\nhi"),
    "Content-Length of 5000 digits": (400, POST + b"Content-Length: " + b"0" * 5000 + b"2\r\n\r\nhi"),
    "Content-Length and Transfer-Encoding": (
        400,
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "Transfer-Encoding and Content-Length": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    ),
    "Transfer-Encoding identity": (400, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "Transfer-Encoding gzip": (400, POST + b"Transfer-Encoding: gzip\r\n\r\n"),
    "Transfer-Encoding gzip, chunked": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "Transfer-Encoding chunked, gzip": (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "Transfer-Encoding xchunked": (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "Transfer-Encoding twice": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "Transfer-Encoding behind a vertical tab": (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "Transfer-Encoding in HTTP/1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunk size with a prefix": (400, CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n"),
    "chunk size with a space": (400, CHUNKED + b"2 \r\nhi\r\n0\r\n\r\n"),
    "chunk size with a sign": (400, CHUNKED + b"+2\r\nhi\r\n0\r\n\r\n"),
    "chunk size beyond 64 bits": (400, CHUNKED + b"fffffffffffffffff\r\nhi\r\n0\r\n\r\n"),
    "chunk longer than its size": (400, CHUNKED + b"1\r\nhi\r\n0\r\n\r\n"),
    "chunk behind a bare LF": (400, CHUNKED + b"2\nhi\r\n0\r\n\r\n"),
    "chunk before a bare LF": (400, CHUNKED + b"2\r\nhi\n0\r\n\r\n"),
    "chunk extension with a control byte": (400, CHUNKED + b"2;a=\x01\r\nhi\r\n0\r\n\r\n"),
    "folded trailer": (400, CHUNKED + b"0\r\nX: a\r\n b\r\n\r\n"),
    "unknown expectation": (417, POST + b"Content-Length: 2\r\nExpect: a miracle\r\n\r\n"),
    "long target": (414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "endless target": (414, b"GET /" + b"a" * 100_000),
    "long query": (414, b"GET /?" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "101 headers": (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n"),
    "one long header": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"),
    "an endless header": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000),
    "headers too large together": (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: %b\r\n" % (b"y" * 1000) * 70 + b"\r\n"),
    "trailers too large": (431, CHUNKED + b"0\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"),
    "chunk extension too large": (431, CHUNKED + b"0;x=" + b"y" * 200_000 + b"\r\n\r\n"),
    "body announced too large": (413, POST + b"Content-Length: 11000000\r\n\r\n"),
    "body announced too large, expecting to be told": (
        413,
        POST + b"Content-Length: 11000000\r\nExpect: 100-continue\r\n\r\n",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_strict_http_is_refused_and_the_connection_closed(name: str) -> None:
    """The client gets one reply with the right status and our error object, however much it sends behind."""
    status, message = REFUSED[name]

    async def core(request: Request, responder: Responder) -> None:
        raise AssertionError("a refused request reached the core")

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            wire.send(message + GET)
            reply = await wire.reply()
            assert (reply.status, reply.headers["connection"]) == (status, "close"), reply
            assert reply.json()["message"]
            assert await wire.is_closed()
            assert server.front is not None
            assert server.front.statistics().refused == 1

    run(main())


ACCEPTED: dict[str, tuple[bytes, dict[str, str]]] = {
    "empty lines first": (b"\r\n\r\n" + GET, {"path": "/v1/models"}),
    "leading zeros": (POST + b"Content-Length: 0002\r\n\r\nhi", {"body": "hi"}),
    "space behind the length": (POST + b"Content-Length: 2 \r\n\r\nhi", {"body": "hi"}),
    "100 headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 99 + b"\r\n", {"path": "/"}),
    "trailers are not headers": (CHUNKED + b"0\r\nX-Forged: 1\r\nHost: b\r\n\r\n", {"body": ""}),
    "absolute form": (b"GET http://h:80/p?q=1 HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "/p", "query": "q=1"}),
    "absolute form without a path": (b"GET http://h?q HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "/", "query": "q"}),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "*"}),
    "WebSocket wish": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        {"method": "GET"},
    ),
    "h2c wish with a body": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nhi",
        {"body": "hi"},
    ),
    "h2c wish with a chunked body": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        {"body": "hi"},
    ),
    "HTTP/1.0 kept alive": (
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
        {"version": "1.0", "body": "hi"},
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_but_valid_requests_are_served(name: str) -> None:
    """Each is understood as the standard says, twice on one connection and pipelined."""
    message, expected = ACCEPTED[name]

    async def main() -> None:
        async with own_front(echo) as server, await Wire.connect(server.port) as wire:
            wire.send(message + message)
            for _ in range(2):
                got = (await wire.reply()).json()
                assert {key: got[key] for key in expected} == expected
                headers = dict(got["headers"])
                assert "x-forged" not in headers
                assert headers.get("host", "a") == ("h:80" if "h:80" in message.decode() else headers.get("host", "a"))
            assert (await wire.ask(GET)).json()["path"] == "/v1/models"

    run(main())


def test_the_authority_of_an_absolute_target_takes_the_place_of_host() -> None:
    """Else a check of Host could be passed with one name while another was asked for."""

    async def main() -> None:
        async with own_front(echo) as server, await Wire.connect(server.port) as wire:
            got = (await wire.ask(b"GET http://evil:80/ HTTP/1.1\r\nHost: localhost\r\n\r\n")).json()
            assert dict(got["headers"])["host"] == "evil:80"

    run(main())


def test_a_refusal_waits_for_its_turn() -> None:
    """A good request before a bad one is answered first."""
    go = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        await go.wait()
        await echo(request, responder)

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            wire.send(GET + b"nonsense\r\n\r\n" + GET)
            assert server.front is not None
            await settled(lambda: server.front is not None and server.front.in_flight)
            go.set()
            assert [(await wire.reply()).status for _ in range(2)] == [200, 400]
            assert await wire.is_closed()

    run(main())


def test_method_path_and_request_id_are_handed_to_the_refuse_hook() -> None:
    """As far as they were understood."""

    async def main() -> None:
        async with own_front(echo) as server:
            async with await Wire.connect(server.port) as wire:
                reply = await wire.ask(b"POST /v1/x?q HTTP/1.1\r\nX-Request-Id: r-1\r\nContent-Length: 1\r\n\r\n")
                assert (reply.json()["method"], reply.json()["path"]) == ("POST", "/v1/x")
                assert reply.json()["request_id"] == "r-1"
            async with await Wire.connect(server.port) as wire:
                reply = await wire.ask(b"nonsense\r\n\r\n")
                assert (reply.json()["method"], reply.json()["path"], reply.json()["request_id"]) == ("", "", "")

    run(main())


def test_a_client_that_sends_its_whole_body_first_gets_the_413() -> None:
    """What it sends is thrown away until it looks, instead of resetting the connection under its feet."""

    async def main() -> None:
        async with own_front(echo) as server:
            for _ in range(5):
                async with await Wire.connect(server.port) as wire:
                    wire.send(POST + b"Content-Length: 11534336\r\n\r\n")
                    for _ in range(11):
                        wire.send(bytes(1024 * 1024))
                        await wire.writer.drain()
                    reply = await wire.reply()
                    assert (reply.status, reply.json()["code"]) == (413, "body_too_large")

    run(main())


def test_expect_is_honoured() -> None:
    """The body is asked for, once, when the client waits for that; a client that did not wait is not told."""

    async def main() -> None:
        async with own_front(echo) as server, await Wire.connect(server.port) as wire:
            for body in (b"Content-Length: 2\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
                wire.send(POST + b"Expect: 100-Continue\r\n" + body)
                assert (await wire.reply()).status == 100
                reply = await wire.ask(b"hi" if b"Length" in body else b"2\r\nhi\r\n0\r\n\r\n")
                assert (reply.status, reply.json()["body"]) == (200, "hi")
            reply = await wire.ask(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi")
            assert (reply.status, reply.json()["body"]) == (200, "hi")
            reply = await wire.ask(b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n")
            assert reply.status == 200

    run(main())


@pytest.mark.parametrize(
    ("message", "stays"),
    [
        (GET, True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: X-Hop, Close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", True),
    ],
)
def test_connections_are_kept_as_the_client_wishes(message: bytes, *, stays: bool) -> None:
    """HTTP/1.1 stays unless asked to close; HTTP/1.0 closes unless asked to stay."""

    async def main() -> None:
        async with own_front(echo) as server, await Wire.connect(server.port) as wire:
            reply = await wire.ask(message)
            assert reply.status == 200
            if stays:
                assert reply.headers.get("connection") in {None, "keep-alive"}
                assert (await wire.ask(message)).status == 200
            else:
                assert reply.headers["connection"] == "close"
                assert await wire.is_closed()

    run(main())


def test_what_follows_a_last_request_is_not_served() -> None:
    """After `Connection: close` nothing more is read as a request."""

    async def main() -> None:
        async with own_front(echo) as server, await Wire.connect(server.port) as wire:
            wire.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET)
            assert (await wire.reply()).status == 200
            assert await wire.is_closed()
            assert server.front is not None
            assert server.front.statistics().requests == 1

    run(main())


def test_a_stream_to_an_old_client_ends_with_the_connection() -> None:
    """HTTP/1.0 knows no chunks."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        responder.write(b"one ")
        responder.end(b"two")

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            reply = await wire.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert (reply.body, reply.headers["connection"]) == (b"one two", "close")
            assert "transfer-encoding" not in reply.headers

    run(main())


@pytest.mark.parametrize("body", [b"abc", b"abcdefghi"])
def test_a_reply_that_breaks_its_own_length_is_cut(body: bytes) -> None:
    """Neither a shorter nor a longer body than announced can be taken for the reply, or for the next one."""

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [(b"content-length", b"6")])
        responder.write(body)
        responder.end()

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            try:
                reply = await wire.ask(GET)
            except asyncio.IncompleteReadError:
                return
            assert not reply.is_whole

    run(main())


def test_the_responder_refuses_to_be_misused() -> None:
    """Twice started, written before it started, ended twice."""
    problems: list[str] = []

    async def core(request: Request, responder: Responder) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                responder.write(b"x")
            with pytest.raises(RuntimeError):
                responder.end()
            if not responder.started:
                responder.start(200, [])
                with pytest.raises(RuntimeError):
                    responder.start(200, [])
                responder.end(b"ok")
        problems.append("none")

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            assert (await wire.ask(GET)).body == b"ok"
            await settled(lambda: problems)

    run(main())


# -- deadlines --------------------------------------------------------------------------------------


def test_half_a_head_is_answered_with_408() -> None:
    """Counted from the first byte: sending a byte now and then does not help."""
    clock = Clock()

    async def main() -> None:
        async with own_front(echo, clock=clock) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            for part in (b"POST /v1/x HTTP/1.1\r\nHo", b"st: a\r\nX-Request-Id: r-9\r\nX:"):
                wire.send(part)
                await still(lambda: [str(connection) for connection in front.open_connections], polls=20)
                clock.now += 6.0
            reply = await wire.reply()
            assert (reply.status, reply.json()["code"]) == (408, "request_timeout")
            assert reply.json()["request_id"] == "r-9"
            assert await wire.is_closed()

    run(main())


async def body_arrived(front: Front, size: int) -> None:
    """Wait until the front has parsed `size` bytes of the body on its only connection."""
    await settled(lambda: [connection._size for connection in front.open_connections] == [size])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_stalls_is_answered_with_408(*, chunked: bool) -> None:
    """A pause longer than the bound ends the request."""
    clock = Clock()

    async def main() -> None:
        async with own_front(echo, clock=clock) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            wire.send(CHUNKED + b"5\r\nhe" if chunked else POST + b"Content-Length: 10\r\n\r\nhe")
            await body_arrived(front, 2)
            clock.now += 29.0
            front.sweep(clock.now)
            assert front.statistics().refused == 0
            clock.now += 2.0
            assert (await wire.reply()).status == 408
            assert await wire.is_closed()

    run(main())


def test_a_trickling_body_is_answered_with_408() -> None:
    """Steady progress that is far too slow counts as none."""
    clock = Clock()

    async def main() -> None:
        async with own_front(echo, clock=clock) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            wire.send(POST + b"Content-Length: 10\r\n\r\n")
            for size in range(1, 4):
                wire.send(b"x")
                await body_arrived(front, size)
                clock.now += 14.0
            assert (await wire.reply()).status == 408

    run(main())


def test_a_long_body_that_keeps_coming_is_served() -> None:
    """A slow but honest upload may take longer than the bound on pauses."""
    clock = Clock()

    async def main() -> None:
        async with own_front(echo, clock=clock) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            wire.send(POST + b"Content-Length: 400000\r\n\r\n")
            for number in range(1, 5):
                wire.send(b"x" * 100_000)
                await body_arrived(front, number * 100_000)
                clock.now += 20.0
                front.sweep(clock.now)
            assert (await wire.reply()).status == 200

    run(main())


def test_an_idle_connection_is_closed_without_a_word() -> None:
    """Before the first request and between two."""
    clock = Clock()

    async def main() -> None:
        async with own_front(echo, clock=clock) as server:
            async with await Wire.connect(server.port) as fresh, await Wire.connect(server.port) as used:
                assert (await used.ask(GET)).status == 200
                await settled(lambda: server.front is not None and server.front.connections == 2)
                clock.now += 76.0
                assert await fresh.is_closed()
                assert await used.is_closed()
            assert server.front is not None
            assert server.front.statistics().refused == 0

    run(main())


def test_a_request_may_take_long() -> None:
    """No deadline of the front runs while the core is working: those belong to the backends."""
    clock = Clock()
    go = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        await go.wait()
        await echo(request, responder)

    async def main() -> None:
        async with own_front(core, clock=clock) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            wire.send(GET)
            await settled(lambda: front.in_flight)
            clock.now += 10_000.0
            front.sweep(clock.now)
            go.set()
            assert (await wire.reply()).status == 200

    run(main())


def test_a_client_that_never_takes_its_reply_is_cut_off() -> None:
    """The core is cancelled, and nothing of the reply stays in memory."""
    clock = Clock()
    cancelled = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        try:
            while True:
                if (waiting := responder.write(bytes(65536))) is not None:
                    await waiting
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main() -> None:
        async with (
            own_front(core, clock=clock) as server,
            await Wire.connect(server.port, receive_buffer=16384) as wire,
        ):
            front = server.front
            assert front is not None
            wire.send(GET)
            await settled(lambda: any(connection.write_paused for connection in front.open_connections))
            await still(lambda: [connection.write_paused for connection in front.open_connections])
            clock.now += 80.0
            await cancelled.wait()
            await settled(lambda: front.connections == 0)
            assert front.statistics().lost == 1

    run(main())


# -- bounds -----------------------------------------------------------------------------------------


def test_requests_sent_ahead_wait_outside() -> None:
    """A client that pipelines without end, and never reads, is no longer read from; once it reads, all are served."""
    total = 20_000

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        responder.end(b"x" * 1000)

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port, receive_buffer=16384) as wire:
            front = server.front
            assert front is not None
            wire.send(GET * total)
            await settled(lambda: front.requests)
            await still(lambda: front.requests)
            assert front.requests < total
            (connection,) = front.open_connections
            assert len(connection._pending) < 512 * 1024
            assert connection.transport.get_write_buffer_size() < 512 * 1024
            for _ in range(total):
                assert len((await wire.reply()).body) == 1000

    run(main(), timeout_s=40)


def test_a_connection_too_many_is_told_so() -> None:
    """It gets 503 with Retry-After without asking; far too many are reset; a free place is usable at once."""
    settings = FrontSettings(max_connections=2)

    async def main() -> None:
        async with own_front(echo, settings) as server:
            front = server.front
            assert front is not None
            async with await Wire.connect(server.port) as first:
                async with await Wire.connect(server.port) as second:
                    assert (await first.ask(GET)).status == (await second.ask(GET)).status == 200
                    surplus = [await Wire.connect(server.port) for _ in range(100)]
                    replies = 0
                    for wire in surplus:
                        async with wire:
                            wire.send(GET)
                            try:
                                reply = await wire.reply()
                            except (asyncio.IncompleteReadError, ConnectionError):
                                continue
                            assert (reply.status, reply.json()["code"]) == (503, "too_many_connections")
                            assert reply.headers["retry-after"] == "1"
                            replies += 1
                    assert replies == 64
                    assert front.statistics().turned_away == 100
                    assert (await first.ask(GET)).status == 200
                await settled(lambda: front.connections == 1)
                async with await Wire.connect(server.port) as third:
                    assert (await third.ask(GET)).status == 200

    run(main())


# -- endings ----------------------------------------------------------------------------------------


def test_draining_lets_what_is_going_on_end() -> None:
    """Idle connections close at once; a request in flight, one half sent and one about to come are answered."""
    go = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        if request.path == "/slow":
            await go.wait()
        await echo(request, responder)

    async def main() -> None:
        async with own_front(core) as server:
            front = server.front
            assert front is not None
            idle, busy, half, fresh = [await Wire.connect(server.port) for _ in range(4)]
            assert (await idle.ask(GET)).status == 200
            busy.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" + GET)
            half.send(GET[:20])
            await settled(lambda: front.in_flight == 1 and front.connections == 4)
            await settled(lambda: any("head" in repr(connection) for connection in front.open_connections))
            drained = asyncio.ensure_future(front.drain(10))
            assert await idle.is_closed()
            assert (await fresh.ask(GET)).headers["connection"] == "close"
            assert (await half.ask(GET[20:])).headers["connection"] == "close"
            assert not drained.done()
            go.set()
            assert (await busy.reply()).headers["connection"] == "close"
            assert await busy.is_closed()
            for wire in (idle, busy, half, fresh):
                await wire.__aexit__()
            assert await drained
            assert (front.connections, front.in_flight) == (0, 0)

    run(main())


def test_a_drain_that_takes_too_long_cuts_off_the_rest() -> None:
    """What is still running is cancelled as if its client had left."""
    events: list[str] = []

    async def core(request: Request, responder: Responder) -> None:
        responder.on_disconnect(lambda: events.append("callback"))
        await asyncio.Event().wait()

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            front = server.front
            assert front is not None
            wire.send(GET)
            await settled(lambda: front.in_flight)
            assert not await front.drain(0.01)
            assert (front.connections, front.in_flight, events) == (0, 0, ["callback"])

    run(main())


def test_a_client_that_leaves_after_its_reply_does_not_cancel_the_core() -> None:
    """A core may finish its own bookkeeping when the reply has ended."""
    left, done = asyncio.Event(), asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.on_disconnect(lambda: pytest.fail("nobody left before the reply ended"))
        await echo(request, responder)
        await left.wait()
        done.set()

    async def main() -> None:
        async with own_front(core) as server:
            front = server.front
            assert front is not None
            async with await Wire.connect(server.port) as wire:
                await wire.ask(GET)
            await settled(lambda: front.connections == 0)
            left.set()
            await done.wait()

    run(main())


def test_a_reset_while_a_reply_is_written_ends_quietly() -> None:
    """Writing to a client that reset the connection raises ClientGone or cancels, and nothing else."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        began.set()
        try:
            while True:
                if (waiting := responder.write(b"x" * 1000)) is not None:
                    await waiting
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def main() -> None:
        async with own_front(core) as server, await Wire.connect(server.port) as wire:
            wire.send(GET)
            await began.wait()
            sock = wire.writer.get_extra_info("socket")
            sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            wire.writer.transport.abort()
            await ended.wait()

    run(main())


# -- connections counted ----------------------------------------------------------------------------


class Connections(NoRecorder):
    """Keeps what was said about connections."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def connection_opened(self, type: str, protocol: str) -> None:
        self.events.append(f"+{type} {protocol}")

    def connection_closed(self, type: str, protocol: str, duration_s: float) -> None:
        assert duration_s >= 0.0
        self.events.append(f"-{type} {protocol}")


def test_a_connection_is_counted_under_the_protocol_it_speaks() -> None:
    """A stream makes it an sse connection for as long as the reply lasts, also when the client leaves in between."""
    recorder = Connections()
    finish = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        responder.start(200, [])
        responder.mark_stream()
        responder.mark_stream()
        responder.write(b"data: 1\n\n")
        await finish.wait()
        finish.clear()
        responder.end()

    async def main() -> None:
        async with own_front(core, recorder=recorder) as server:
            async with await Wire.connect(server.port) as wire:
                wire.send(GET)
                await wire.head()
                assert recorder.events == ["+client http", "-client http", "+client sse"]
                finish.set()
                assert (await wire.chunk(), await wire.chunk()) == (b"data: 1\n\n", b"")
                assert recorder.events[3:] == ["-client sse", "+client http"]
                wire.send(GET)
                await wire.head()
            await settled(lambda: server.front is not None and server.front.connections == 0)
            assert recorder.events[5:] == [
                "-client http",
                "+client sse",
                "-client sse",
                "+client http",
                "-client http",
            ]

    run(main())


# -- TLS --------------------------------------------------------------------------------------------


def test_the_protocol_works_over_tls(tmp_path: Path) -> None:
    """Requests, streams with backpressure, refusals with a body on the way, and leaving clients."""
    certificate, key = self_signed(tmp_path)
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate, key)
    client_side = ssl.create_default_context(cafile=str(certificate))
    cancelled = asyncio.Event()

    async def core(request: Request, responder: Responder) -> None:
        if request.path == "/stream":
            responder.start(200, [])
            for _ in range(200):
                if (waiting := responder.write(bytes(65536))) is not None:
                    await waiting
            responder.end()
        elif request.path == "/forever":
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        else:
            await echo(request, responder)

    async def main() -> None:
        async with own_front(core, tls=server_side) as server:
            async with await Wire.connect(server.port, tls=client_side) as wire:
                reply = await wire.ask(POST + b"Content-Length: 2\r\n\r\nhi")
                assert (reply.status, reply.json()["body"]) == (200, "hi")
                assert len((await wire.ask(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")).body) == 200 * 65536
                wire.send(POST + b"Content-Length: 11000000\r\n\r\n" + bytes(1_000_000))
                assert (await wire.reply()).status == 413
                assert await wire.is_closed()
            async with await Wire.connect(server.port, tls=client_side) as wire:
                wire.send(b"GET /forever HTTP/1.1\r\nHost: a\r\n\r\n")
                await settled(lambda: server.front is not None and server.front.in_flight)
            await cancelled.wait()

    run(main())
