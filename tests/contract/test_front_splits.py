"""However the bytes of a request are cut, the reply is the same; whatever the bytes are, there is a reply or an end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.gateway.front import Front, FrontSettings
from llm_router.signals import NoRecorder
from support.aio import run
from support.fronts import MemoryTransport, echo, refuse, settled
from support.fuzz import examples

BOUNDS = FrontSettings(max_body_bytes=300, max_header_bytes=400, max_headers=10, max_target_bytes=100)

POST = b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: localhost:3006\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Request-Id: r-1\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

MESSAGES: dict[str, bytes] = {
    "plain": POST + b'Content-Length: 13\r\n\r\n{"model":"m"}',
    "no body": GET,
    "chunked": CHUNKED + b'5;ext="v"\r\n\r\n\r\n\r\r\nA\r\n0\r\n\r\n0\r\n\r\n\r\n00\r\nX-Trailer: 1\r\nHost: b\r\n\r\n',
    "pipelined": GET + POST + b"Content-Length: 2\r\n\r\nhi" + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n" + b"\r\n" + GET,
    "kept HTTP/1.0": b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi" * 2,
    "closing": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET,
    "upgrade": POST + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nhi" + GET,
    "upgrade, chunked": POST
    + b"Connection: upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n0\r\n\r\n"
    + GET,
    "absolute form": b"GET http://b/c?d HTTP/1.1\r\nHost: a\r\n\r\n",
    "good, then bad": GET + b"nonsense\r\n\r\n" + GET,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3,
    "bare LF": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "smuggling": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET,
    "repeated Host": b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: r\r\nHost: b\r\nX: y\r\n\r\n" + GET,
    "bad chunk": CHUNKED + b"2\r\nhi\r\nz\r\n\r\n",
    "long target": b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "headers too large": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 500 + b"\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20 + b"\r\n" + GET,
    "body too large": POST + b"Content-Length: 301\r\n\r\n" + b"x" * 301,
    "chunks too large": CHUNKED + b"96\r\n" + b"x" * 150 + b"\r\n97\r\n" + b"x" * 151 + b"\r\n0\r\n\r\n",
}


async def converse(pieces: Sequence[bytes], *, at_once: bool = False) -> tuple[bytes, bool]:
    """What one connection sends when it receives `pieces`, and whether it closed.

    With `at_once` all pieces arrive before any task runs: everything behind the first request has to wait.
    """
    front = Front(echo, refuse, BOUNDS, NoRecorder(), loop=asyncio.get_running_loop())
    transport = MemoryTransport()
    connection = transport.connection = front.protocol_factory()
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        if transport.is_closed:
            break
        assert not transport.is_paused
        connection.data_received(piece)
        if not at_once:
            await settled(lambda: not front.in_flight)
    await settled(lambda: not front.in_flight)
    result = transport.sent, transport.is_closed
    transport.close()
    await settled(lambda: not front.connections)
    front.abort()
    return result


def cut(message: bytes, places: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted({place for place in places if 0 < place < len(message)}), len(message)]
    return [message[start:end] for start, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", MESSAGES)
def test_every_cut_of_a_message_gives_the_same_reply(name: str) -> None:
    """In two at each place, and byte by byte; arriving with pauses, and all before anything is answered."""
    message = MESSAGES[name]

    async def main() -> None:
        expected = await converse([message])
        assert expected[0].startswith(b"HTTP/1.1 ")
        for at_once in (False, True):
            for place in range(len(message)):
                assert await converse(cut(message, [place]), at_once=at_once) == expected, (place, at_once)
            assert await converse(cut(message, range(len(message))), at_once=at_once) == expected

    run(main(), timeout_s=50)


@settings(max_examples=examples(150))
@given(st.data())
def test_random_cuts_of_several_messages_give_the_same_replies(data: st.DataObject) -> None:
    """Messages one after the other in one connection, cut anywhere."""
    names = data.draw(st.lists(st.sampled_from(sorted(MESSAGES)), min_size=1, max_size=4))
    message = b"".join(MESSAGES[name] for name in names)
    places = data.draw(st.lists(st.integers(1, len(message)), max_size=12))

    async def main() -> None:
        expected = await converse([message])
        assert await converse(cut(message, places)) == expected
        assert await converse(cut(message, places), at_once=True) == expected

    run(main())


def mutated(message: bytes, edits: Sequence[tuple[int, bytes]]) -> bytes:
    for where, insert in edits:
        place = where % (len(message) + 1)
        message = message[:place] + insert + message[place + len(insert) :]
    return message


GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=600),
    st.builds(
        mutated,
        st.sampled_from(sorted(MESSAGES.values())),
        st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3)), min_size=1, max_size=4),
    ),
)


@settings(max_examples=examples(400))
@given(GARBAGE, st.lists(st.integers(1, 600), max_size=4))
def test_garbage_never_hangs_or_crashes(garbage: bytes, places: Sequence[int]) -> None:
    """Every connection gets replies and, once the deadlines are over, a reply or an end."""

    async def main() -> None:
        now = 0.0
        front = Front(echo, refuse, BOUNDS, NoRecorder(), loop=asyncio.get_running_loop(), clock=lambda: now)
        transport = MemoryTransport()
        connection = transport.connection = front.protocol_factory()
        connection.connection_made(transport)  # type: ignore[arg-type]
        for piece in cut(garbage, places):
            if not transport.is_closed:
                connection.data_received(piece)
        await settled(lambda: not front.in_flight)
        assert transport.sent.startswith(b"HTTP/1.1 ") or not transport.sent
        now = 100.0
        front.sweep(now)
        await settled(lambda: not front.in_flight)
        assert transport.is_closed
        await settled(lambda: not front.connections)
        front.abort()

    run(main())
