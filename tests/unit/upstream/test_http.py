"""A connection fed with bytes by hand: every split, every kind of framing, garbage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.errors import BackendError, BackendTimeout, BackendUnavailable, BadReply
from llm_router.testing import FakeClock, framed
from llm_router.upstream.http import Connection, ConnectionStale, Reply

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
HEAD_REQUEST = REQUEST.replace(b"GET", b"HEAD")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class RecordingTransport:
    """What a connection does to its transport."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False
        self.is_paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class RecordingOwner:
    """What a connection tells its pool."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def connected(self, connection: Connection) -> None:
        self.said.append("connected")

    def released(self, connection: Connection) -> None:
        self.said.append("released")

    def unusable(self, connection: Connection) -> None:
        self.said.append("unusable")

    def lost(self, connection: Connection, *, keep_slot: bool) -> None:
        self.said.append("lost, slot kept" if keep_slot else "lost")


class Outcome(NamedTuple):
    """How an exchange ended; `error` is a type so that splits can be compared."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    error: type[BackendError] | None


class Bench:
    """A connection with everything around it recorded. Needs no running loop."""

    def __init__(
        self, *, max_header_bytes: int = 4096, max_body_bytes: int = 1 << 20, high_water_bytes: int = 1 << 20
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.owner = RecordingOwner()
        self.transport = RecordingTransport()
        self.connection = Connection(
            "b",
            self.owner,
            self.loop,
            self.clock,
            max_header_bytes=max_header_bytes,
            max_body_bytes=max_body_bytes,
            high_water_bytes=high_water_bytes,
        )
        self.connection.connection_made(cast("asyncio.Transport", self.transport))

    def begin(self, request: bytes = REQUEST) -> asyncio.Future[Reply]:
        return self.connection.begin(request, b"", self.clock.now, float("inf"))

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            if self.transport.is_aborted:
                return
            self.connection.data_received(piece)

    def exchange(self, *pieces: bytes, eof: bool = False, request: bytes = REQUEST) -> Outcome:
        """Sends a request, receives the pieces, and what became of it. Raises AssertionError when nothing did."""
        waiter = self.begin(request)
        self.feed(*pieces)
        if eof or self.transport.is_aborted:
            self.connection.connection_lost(None)
        assert waiter.done(), "the exchange has no outcome"
        error = waiter.exception()
        if error is not None:
            assert isinstance(error, BackendError)
            return Outcome(0, (), b"", type(error))
        reply = waiter.result()
        body = b""
        try:
            while (data := reply.take()) is not None:
                assert data, "the body has no outcome"
                body += data
        except BackendError as broken:
            return Outcome(reply.status, tuple(reply.headers), body, type(broken))
        assert reply.complete
        return Outcome(reply.status, tuple(reply.headers), body, None)

    def close(self) -> None:
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def outcome(message: bytes, cuts: list[int] | None = None, *, eof: bool = False, request: bytes = REQUEST) -> Outcome:
    """The outcome of a message that arrives cut at these offsets."""
    edges = [0, *sorted({cut % (len(message) + 1) for cut in cuts or []}), len(message)]
    pieces = [message[start:end] for start, end in pairwise(edges) if end > start]
    bench = Bench()
    try:
        return bench.exchange(*pieces, eof=eof, request=request)
    finally:
        bench.close()


class Case(NamedTuple):
    """A message and what it means; `eof`: the peer closes after it."""

    name: str
    message: bytes
    status: int
    body: bytes
    eof: bool = False
    error: type[BackendError] | None = None
    request: bytes = REQUEST


def ok(headers: bytes, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + body


CASES = [
    Case("content-length", ok(b"Content-Type: a/b\r\nContent-Length: 5\r\n", b"hello"), 200, b"hello"),
    Case("empty body", ok(b"Content-Length: 0\r\n"), 200, b""),
    Case("chunked", CHUNKED + framed(b"hello") + framed(b" ") + framed(b"world") + framed(b""), 200, b"hello world"),
    Case("chunk extensions, trailers", CHUNKED + b"5;a=b\r\nhello\r\n0\r\nX-T: v\r\n\r\n", 200, b"hello"),
    Case("until the end", ok(b"Connection: close\r\n", b"hello"), 200, b"hello", eof=True),
    Case("until the end, 1.0", b"HTTP/1.0 200 OK\r\n\r\nhello", 200, b"hello", eof=True),
    Case("interim", b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" + ok(b"Content-Length: 2\r\n", b"ok"), 200, b"ok"),
    Case("early hints", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 2 + ok(b"Content-Length: 0\r\n"), 200, b""),
    Case("204", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    Case("304 with length", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, b""),
    Case("HEAD", ok(b"Content-Length: 700\r\n"), 200, b"", request=HEAD_REQUEST),
    Case("HEAD, chunked", CHUNKED, 200, b"", request=HEAD_REQUEST),
    Case("no reason phrase", b"HTTP/1.1 429\r\nContent-Length: 2\r\n\r\nno", 429, b"no"),
    Case("empty values", ok(b"X:\r\nY: \r\nContent-Length: 1\r\n", b"1"), 200, b"1"),
    Case("short body", ok(b"Content-Length: 9\r\n", b"hello"), 200, b"hello", eof=True, error=BackendUnavailable),
    Case("short chunk", CHUNKED + b"9\r\nhello", 200, b"hello", eof=True, error=BackendUnavailable),
    Case("no last chunk", CHUNKED + framed(b"hello"), 200, b"hello", eof=True, error=BackendUnavailable),
    Case("half a head", b"HTTP/1.1 200 OK\r\nContent-Le", 0, b"", eof=True, error=BackendUnavailable),
    Case("half a start", b"HTTP", 0, b"", eof=True, error=BackendUnavailable),
    Case("nothing", b"", 0, b"", eof=True, error=BackendUnavailable),
    Case("bad chunk size", CHUNKED + b"zz\r\n", 200, b"", error=BadReply),
    Case("chunk size overflow", CHUNKED + b"fffffffffffffffff\r\n", 200, b"", error=BadReply),
    Case("chunk too long", CHUNKED + b"2\r\nokX\r\n0\r\n\r\n", 200, b"ok", error=BadReply),
    Case("bare line feeds in chunks", CHUNKED + b"2\nok\n0\n\n", 200, b"", error=BadReply),
]
REFUSED = [
    Case(name, message, 0, b"", error=BadReply)
    for name, message in (
        ("html", b"<html><body>502</body></html>"),
        ("http 0.9", b"HTTP/0.9 200 OK\r\n\r\n"),
        ("http 2", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ("http 2 preface", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00"),
        ("rtsp", b"RTSP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ("tls alert", b"\x15\x03\x03\x00\x02\x02\x46 more"),
        ("both lengths", ok(b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n")),
        ("both lengths, other order", ok(b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"0\r\n\r\n")),
        ("two lengths", ok(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ok")),
        ("list of lengths", ok(b"Content-Length: 2, 2\r\n", b"ok")),
        ("signed length", ok(b"Content-Length: +2\r\n", b"ok")),
        ("huge length", ok(b"Content-Length: 99999999999999999999\r\n", b"ok")),
        ("empty length", ok(b"Content-Length:\r\n", b"ok")),
        ("gzip coding", ok(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n")),
        ("chunked is not last", ok(b"Transfer-Encoding: chunked, gzip\r\n", b"0\r\n\r\n")),
        ("twice chunked", ok(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n")),
        ("chunked 1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("folded header", ok(b"X: a\r\n b\r\nContent-Length: 0\r\n")),
        ("space before colon", ok(b"Content-Length : 2\r\n", b"ok")),
        ("no name", ok(b": a\r\nContent-Length: 0\r\n")),
        ("nul in value", ok(b"X: a\0b\r\nContent-Length: 0\r\n")),
        ("bare carriage return", ok(b"X: a\rb\r\nContent-Length: 0\r\n")),
        ("bare line feeds", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
        ("status 99", b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n"),
        ("status 600", b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n"),
        ("status 1000", b"HTTP/1.1 1000 X\r\nContent-Length: 0\r\n\r\n"),
        ("upgrade", b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00"),
        ("upgrade without header", b"HTTP/1.1 101 Switching\r\n\r\n"),
        ("large head", ok(b"X: " + b"a" * 5000 + b"\r\nContent-Length: 0\r\n")),
        ("many headers", ok(b"X: y\r\n" * 1000 + b"Content-Length: 0\r\n")),
        ("endless interim", b"HTTP/1.1 100 Continue\r\n\r\n" * 200),
    )
]
ALL = [*CASES, *REFUSED]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_message_means_what_it_says(case: Case) -> None:
    """Whole messages give their status and body, or the typed error."""
    got = outcome(case.message, eof=case.eof, request=case.request)
    assert (case.status, case.body, case.error) == (got.status, got.body, got.error)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_split_in_two_gives_the_same(case: Case) -> None:
    """Where the network cuts a message does not matter: each of its bytes can be the last of a piece."""
    whole = outcome(case.message, eof=case.eof, request=case.request)
    for cut in range(1, min(len(case.message), 600)):
        assert whole == outcome(case.message, [cut], eof=case.eof, request=case.request), cut


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_byte_by_byte_gives_the_same(case: Case) -> None:
    """A message in pieces of one byte is the same message."""
    whole = outcome(case.message, eof=case.eof, request=case.request)
    assert whole == outcome(case.message, list(range(len(case.message))), eof=case.eof, request=case.request)


@given(st.sampled_from(ALL), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_splits_give_the_same(case: Case, cuts: list[int]) -> None:
    """Any number of cuts anywhere does not change the outcome."""
    whole = outcome(case.message, eof=case.eof, request=case.request)
    assert whole == outcome(case.message, cuts, eof=case.eof, request=case.request)


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_random_bytes_never_hang(pieces: list[bytes]) -> None:
    """Whatever a peer sends before it closes, the caller gets a reply or a typed error."""
    bench = Bench()
    try:
        bench.exchange(*filter(None, pieces), eof=True)
    finally:
        bench.close()


@given(st.sampled_from(CASES), st.data())
def test_damaged_messages_never_hang(case: Case, data: st.DataObject) -> None:
    """A valid message with bytes changed, dropped or doubled ends in a reply or a typed error."""
    message = bytearray(case.message)
    for _ in range(data.draw(st.integers(1, 4))):
        if not message:
            break
        at = data.draw(st.integers(0, len(message) - 1))
        match data.draw(st.sampled_from(["change", "drop", "double"])):
            case "change":
                message[at] = data.draw(st.integers(0, 255))
            case "drop":
                del message[at]
            case _:
                message[at:at] = message[at : at + 20]
    cuts = data.draw(st.lists(st.integers(0, 10_000), max_size=6))
    outcome(bytes(message), cuts, eof=True)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10), st.lists(st.integers(0, 10_000), max_size=12))
def test_a_chunked_body_is_its_chunks_joined(chunks: list[bytes], cuts: list[int]) -> None:
    """No framing shows through, whatever the chunks and the cuts."""
    message = CHUNKED + b"".join(map(framed, chunks)) + framed(b"")
    assert Outcome(200, (), b"".join(chunks), None) == outcome(message, cuts)


@given(st.lists(st.sampled_from([case for case in CASES if case.error is None and not case.eof])))
def test_replies_follow_each_other_on_one_connection(cases: list[Case]) -> None:
    """One parser serves all exchanges of a kept connection, and nothing of one shows in the next."""
    bench = Bench()
    try:
        for case in cases:
            if case.request is HEAD_REQUEST:
                continue
            got = bench.exchange(case.message)
            assert (case.status, case.body, None) == (got.status, got.body, got.error)
            assert bench.owner.said[-1] == "released"
    finally:
        bench.close()


def test_headers_that_are_the_connections_own_are_removed(bench: Bench) -> None:
    """Hop-by-hop headers, those named by Connection, and the length do not pass; names are in lower case."""
    got = bench.exchange(
        ok(
            b"Connection: keep-alive, X-Internal\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\n"
            b"X-Internal: 1\r\nUpgrade: h2c\r\nTrailer: X\r\nX-Request-ID:  7 \t\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
            b"Content-Length: 0\r\n"
        )
    )
    assert got.headers == ((b"x-request-id", b"7"), (b"set-cookie", b"a"), (b"set-cookie", b"b"))


def test_the_length_is_an_attribute(bench: Bench) -> None:
    """Content-Length is known from the head on."""
    waiter = bench.begin()
    bench.feed(ok(b"Content-Length: 12\r\nX-A: b\r\n"))
    reply = waiter.result()
    assert (reply.length, reply.complete, reply.header(b"x-a"), reply.header(b"x-b")) == (12, False, b"b", None)


@pytest.mark.parametrize(
    ("message", "eof", "kept"),
    [
        (ok(b"Content-Length: 0\r\n"), False, True),
        (ok(b"Connection: close\r\nContent-Length: 0\r\n"), False, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False, False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", False, True),
        (ok(b"", b"x"), True, False),
    ],
)
def test_a_connection_is_kept_when_the_peer_keeps_it(bench: Bench, message: bytes, eof: bool, kept: bool) -> None:
    """Connection: close, HTTP/1.0 and a body that ends with the connection end it."""
    bench.exchange(message, eof=eof)
    assert kept == ("released" in bench.owner.said)


@pytest.mark.parametrize("excess", [b"X", b"GARBAGE", b"HTTP/1.1 200 OK\r\n", ok(b"Content-Length: 0\r\n")])
@pytest.mark.parametrize("first", [ok(b"Content-Length: 2\r\n", b"ok"), CHUNKED + framed(b"ok") + framed(b"")])
def test_more_than_a_reply_is_refused(first: bytes, excess: bytes) -> None:
    """What follows a reply makes it a BadReply when it comes with it, and never becomes the next reply."""
    message = first + excess
    assert outcome(message).error is BadReply
    for cut in range(1, len(message)):
        bench = Bench()
        try:
            got = bench.exchange(message[:cut], message[cut:])
            assert got.error is (BadReply if cut != len(first) else None)
            assert bench.transport.is_aborted
        finally:
            bench.close()


def test_bytes_on_an_idle_connection_close_it(bench: Bench) -> None:
    """Nobody asked: the bytes are not the reply to a later request."""
    bench.exchange(ok(b"Content-Length: 0\r\n"))
    bench.feed(ok(b"Content-Length: 0\r\n"))
    assert bench.transport.is_aborted
    assert bench.owner.said[-1] == "unusable"


@pytest.mark.parametrize("tail", [b"1;" + b"a" * 5000, b"0\r\n" + b"X: y\r\n" * 900])
def test_a_body_that_does_not_go_on_is_bounded(bench: Bench, tail: bytes) -> None:
    """Chunk extensions and trailers without end are a BadReply, not a hang."""
    waiter = bench.begin()
    bench.feed(CHUNKED, *(tail[at : at + 100] for at in range(0, len(tail), 100)))
    reply = waiter.result()
    assert isinstance(reply.error, BadReply)
    assert bench.transport.is_aborted


def test_reading_pauses_above_the_mark_and_goes_on_when_taken() -> None:
    """A reader that is behind makes the connection stop reading, and its taking makes it go on."""
    bench = Bench(high_water_bytes=100)
    waiter = bench.begin()
    bench.feed(CHUNKED + framed(b"x" * 101))
    reply = waiter.result()
    states = [bench.transport.is_paused]
    assert len(reply.take() or b"") == 101
    assert [*states, bench.transport.is_paused] == [True, False]
    bench.close()


def test_a_pause_is_not_the_backends_silence() -> None:
    """The gap deadline does not run while the reader is what is slow."""
    bench = Bench(high_water_bytes=100)
    waiter = bench.begin()
    bench.feed(CHUNKED + framed(b"x" * 101))
    reply = waiter.result()
    errors = []
    for seconds in (10, 10, 10):
        bench.connection.check(bench.clock.advance(seconds), 60, 5, 0)
        errors.append(reply.error)
    reply.take()
    for seconds in (4, 2):
        bench.connection.check(bench.clock.advance(seconds), 60, 5, 0)
        errors.append(reply.error)
    assert errors[:-1] == [None] * 4
    assert isinstance(errors[-1], BackendTimeout)
    bench.close()


def test_what_came_before_an_error_can_be_taken(bench: Bench) -> None:
    """Bytes received are delivered first; the error comes after them, every time it is asked."""
    waiter = bench.begin()
    bench.feed(CHUNKED + framed(b"hello"))
    bench.connection.connection_lost(ConnectionResetError())
    reply = waiter.result()
    assert reply.take() == b"hello"
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="after 5 bytes"):
            reply.take()


def test_a_lost_connection_is_stale_only_when_kept_fresh_and_silent(bench: Bench) -> None:
    """Only a connection used before, without a byte of reply, lost right after the request, is worth a retry."""
    assert outcome(b"", eof=True).error is BackendUnavailable  # never used before

    bench.exchange(ok(b"Content-Length: 0\r\n"))
    assert bench.exchange(b"", eof=True).error is ConnectionStale
    assert bench.owner.said[-1] == "lost, slot kept"

    for start in (b"H", b"HTTP/1.1 200"):
        used = Bench()
        used.exchange(ok(b"Content-Length: 0\r\n"))
        assert used.exchange(start, eof=True).error is BackendUnavailable
        used.close()

    late = Bench()
    late.exchange(ok(b"Content-Length: 0\r\n"))
    waiter = late.begin()
    late.clock.advance(1.5)
    late.connection.connection_lost(None)
    assert type(waiter.exception()) is BackendUnavailable
    late.close()


def test_closing_an_unfinished_reply_breaks_the_connection(bench: Bench) -> None:
    """close() before the end aborts at once; after the end it leaves the connection alone."""
    waiter = bench.begin()
    bench.feed(CHUNKED)
    reply = waiter.result()
    reply.close()
    reply.close()
    assert bench.transport.is_aborted

    other = Bench()
    waiter = other.begin()
    other.feed(ok(b"Content-Length: 0\r\n"))
    waiter.result().close()
    assert not other.transport.is_aborted
    other.close()


def test_the_state_is_readable(bench: Bench) -> None:
    """repr tells what a connection and a reply are doing."""
    assert "idle" in repr(bench.connection)
    waiter = bench.begin()
    assert "waiting" in repr(bench.connection)
    bench.feed(CHUNKED + framed(b"hello"))
    assert "receiving" in repr(bench.connection)
    assert repr(waiter.result()) == "<Reply 200 arriving 5 of None bytes>"
    bench.connection.abort()
    assert "closed" in repr(bench.connection)
