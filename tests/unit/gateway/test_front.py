"""Parts of the front that need no socket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_router.gateway.asgi import AsgiFront
from llm_router.gateway.front import Front, FrontSettings, render_head
from llm_router.gateway.seam import Refusal, RefusalReply, Request, Responder
from llm_router.signals import NoRecorder
from support.aio import run
from support.fronts import MemoryTransport, echo, refuse, settled

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def test_a_head_is_the_status_line_and_the_headers() -> None:
    """A status that has no name of its own is sent without one."""
    assert render_head(200, [(b"a", b"b"), (b"c", b"")]) == b"HTTP/1.1 200 OK\r\na: b\r\nc: \r\n"
    assert render_head(529, []) == b"HTTP/1.1 529 \r\n"


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb: c", b"a\rb", b"a\r\n\r\n", b"\0"])
def test_a_head_cannot_be_forged_through_a_value(value: bytes) -> None:
    """Neither through a value nor through a name."""
    for header in ((b"x", value), (value, b"x")):
        with pytest.raises(ValueError, match="line break"):
            render_head(200, [(b"a", b"b"), header])


async def connected(front: Front) -> tuple[Any, MemoryTransport]:
    transport = MemoryTransport()
    connection: Any = front.protocol_factory()
    transport.connection = connection
    connection.connection_made(transport)
    return connection, transport


def test_a_client_that_leaves_before_the_core_began_is_never_served() -> None:
    """The request and the end of the connection arrive in one turn of the loop."""
    served: list[Request] = []

    async def core(request: Request, responder: Responder) -> None:
        served.append(request)

    async def main() -> None:
        front = Front(core, refuse, FrontSettings(), NoRecorder(), loop=asyncio.get_running_loop())
        connection, transport = await connected(front)
        connection.data_received(GET)
        assert front.in_flight == 1
        connection.eof_received()
        transport.close()
        await settled(lambda: not front.in_flight and not front.connections)
        assert (served, front.statistics().lost) == ([], 1)
        front.abort()

    run(main())


def test_a_refuse_hook_that_fails_is_replaced() -> None:
    """The client still gets the status and an error object."""

    def broken(refusal: Refusal) -> RefusalReply:
        raise LookupError(refusal.path)

    async def main() -> None:
        front = Front(echo, broken, FrontSettings(), NoRecorder(), loop=asyncio.get_running_loop())
        connection, transport = await connected(front)
        connection.data_received(b"nonsense\r\n\r\n")
        assert transport.sent.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b'"code":"internal_error"' in transport.sent
        await settled(lambda: not front.connections)
        front.abort()

    run(main())


def test_head_and_body_leave_in_one_write() -> None:
    """A reply in one packet: the whole point of starting without sending."""
    writes: list[bytes] = []

    class Counting(MemoryTransport):
        def write(self, data: bytes) -> None:
            writes.append(data)

    async def main() -> None:
        front = Front(echo, refuse, FrontSettings(), NoRecorder(), loop=asyncio.get_running_loop())
        transport = Counting()
        connection: Any = front.protocol_factory()
        transport.connection = connection
        connection.connection_made(transport)
        connection.data_received(GET)
        await settled(lambda: not front.in_flight)
        assert len(writes) == 1
        transport.close()
        await settled(lambda: not front.connections)
        front.abort()

    run(main())


def test_a_loop_without_connections_has_nothing_to_do() -> None:
    """The sweep sleeps while nobody is connected."""

    async def main() -> None:
        front = Front(echo, refuse, FrontSettings(), NoRecorder(), loop=asyncio.get_running_loop())
        assert not front._timer
        _, transport = await connected(front)
        assert bool(front._timer)
        transport.close()
        await settled(lambda: not front._timer)
        assert await front.drain(1.0)

    run(main())


def test_objects_say_what_they_are_doing() -> None:
    """Front, connection and exchange show their state."""
    seen: list[str] = []

    async def core(request: Request, responder: Responder) -> None:
        seen.append(repr(request))
        seen.append(repr(responder))
        responder.start(200, [])
        responder.end()
        seen.append(repr(responder))

    async def main() -> None:
        front = Front(core, refuse, FrontSettings(), NoRecorder(), loop=asyncio.get_running_loop())
        connection, transport = await connected(front)
        assert repr(front) == "<Front open, 1 connections, 0 requests in flight>"
        assert repr(connection) == "<Connection 127.0.0.1:5000 idle>"
        connection.data_received(GET)
        await settled(lambda: len(seen) == 3)
        assert seen == [
            "<Request GET / 0 bytes from 127.0.0.1:5000>",
            "<Exchange waiting of <Connection 127.0.0.1:5000 busy>>",
            "<Exchange ended of <Connection 127.0.0.1:5000 idle>>",
        ]
        transport.close()
        await settled(lambda: not front.connections)
        front.abort()

    run(main())


# -- the ASGI front ---------------------------------------------------------------------------------


async def asked(scope: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an AsgiFront over `echo` sends for a scope, given these messages and then a wait."""
    sent: list[dict[str, Any]] = []
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        if queue:
            return queue.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    await AsgiFront(echo, refuse, FrontSettings(body_timeout_s=0.02))(scope, receive, send)
    return sent


def http_scope(**changes: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/llm/v1/é",
        "raw_path": b"/llm/v1/%C3%A9",
        "root_path": "/llm",
        "query_string": b"a=%20",
        "headers": [(b"host", b"a")],
        "client": ("::1", 5000),
        "http_version": "1.1",
    }
    return scope | changes


@pytest.mark.parametrize("raw_path", [b"/llm/v1/%C3%A9", None])
def test_a_mounted_core_sees_paths_below_its_mount_point(raw_path: bytes | None) -> None:
    """In the raw form, which is rebuilt where the server does not tell it."""
    sent = run(asked(http_scope(raw_path=raw_path), [{"type": "http.request", "body": b"hi"}]))
    assert sent[0]["status"] == 200
    assert b'"path": "/v1/%C3%A9"' in sent[1]["body"]
    assert b'"body": "hi"' in sent[1]["body"]


def test_a_body_that_stalls_behind_another_server_is_refused() -> None:
    """The server in front may have no deadline of its own."""
    sent = run(asked(http_scope(), [{"type": "http.request", "body": b"h", "more_body": True}]))
    assert sent[0]["status"] == 408


def test_a_client_that_leaves_while_it_sends_is_not_served() -> None:
    """Nothing is sent either."""
    assert run(asked(http_scope(), [{"type": "http.disconnect"}])) == []


def test_lifespan_and_websockets_are_answered() -> None:
    """A server that starts us waits for the first, and a browser for the second."""
    sent = run(asked({"type": "lifespan"}, [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]))
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    sent = run(asked({"type": "websocket"}, [{"type": "websocket.connect"}]))
    assert [message["type"] for message in sent] == ["websocket.close"]
