"""The pool against a scripted backend: one test per promise and per way to break it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from llm_router.errors import BackendBusy, BackendError, BackendTimeout, BackendUnavailable, BadReply
from llm_router.signals import NoRecorder
from llm_router.testing import (
    Close,
    FakeClock,
    Gate,
    Hold,
    RecordingRecorder,
    Repeat,
    Reset,
    ScriptedBackend,
    Stall,
    Step,
    bytewise,
    framed,
    json_reply,
    reply,
    stream_head,
)
from llm_router.upstream.http import Connection
from llm_router.upstream.pool import Origin, Pool, PoolSettings, Reply
from support.aio import run
from support.net import free_port
from support.upstream import request

READ_BYTES = 256 * 1024
"""What one read of uvloop may add to a buffer after it should have paused."""


class Bench:
    """A pool, its backend, a clock that stands still, and a recorder."""

    def __init__(self, backend: ScriptedBackend, settings: PoolSettings) -> None:
        self.backend = backend
        self.clock = FakeClock()
        self.recorder = RecordingRecorder()
        self.pool = Pool("b", Origin.parse(backend.url), settings, self.recorder, clock=self.clock)

    def pass_time(self, seconds: float) -> None:
        """Two sweeps: the first one sees that something moved before."""
        self.pool.sweep(self.clock.now)
        self.pool.sweep(self.clock.advance(seconds))

    async def get(self) -> bytes:
        """One whole exchange."""
        answer = await self.pool.send(*request())
        try:
            return await answer.read()
        finally:
            answer.close()

    async def state(self, reached: Callable[[Pool], bool]) -> None:
        """Lets the loop turn until the pool is in a state."""
        async with asyncio.timeout(10):
            while not reached(self.pool):
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def bench(backend: ScriptedBackend | None = None, **settings: object) -> AsyncIterator[Bench]:
    """A bench that is torn down, with nothing left open."""
    with backend or ScriptedBackend() as running:
        made = Bench(running, PoolSettings(**settings))  # type: ignore[arg-type]
        try:
            yield made
        finally:
            await made.pool.aclose()
        state = made.pool.statistics()
        assert (state.idle, state.busy, state.connecting, state.waiting) == (0, 0, 0, 0)
        assert state.opened == state.closed
        assert made.recorder.open_connections.get(("upstream", "http"), 0) == 0


def test_a_kept_connection_serves_one_request_after_the_other() -> None:
    """Sequential requests share a connection; it is idle again as soon as the reply is whole."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.always(json_reply({"a": 1}))
            for _ in range(5):
                assert await b.get() == b'{"a": 1}'
                assert b.pool.statistics().idle == 1
            assert b.pool.in_use == 0
            assert len(b.backend.connections) == 1
            assert b.recorder.open_connections == {("upstream", "http"): 1}

    run(scenario())


def test_the_last_used_connection_is_used_first() -> None:
    """Load that needs one connection uses one, so that the others grow old and are closed."""

    async def scenario() -> None:
        async with bench(idle_s=10.0) as b:
            gate = Gate()
            b.backend.always(Hold(gate), json_reply({}))
            tasks = [asyncio.create_task(b.get()) for _ in range(3)]
            await b.backend.until(lambda x: len(x.requests) == 3)
            gate.open()
            await asyncio.gather(*tasks)
            assert b.pool.statistics().idle == 3
            b.pool.sweep(b.clock.now)
            for _ in range(4):
                b.clock.advance(4)
                await b.get()
                b.pool.sweep(b.clock.now)
            await b.state(lambda pool: pool.statistics().opened - pool.statistics().closed == 1)
            assert b.pool.statistics().idle == 1

    run(scenario())


def test_idle_connections_are_closed_when_their_time_is_over() -> None:
    """idle_s after its last exchange a connection goes."""

    async def scenario() -> None:
        async with bench(idle_s=10.0) as b:
            await b.get()
            b.pass_time(9.9)
            assert b.pool.statistics().idle == 1
            b.pass_time(10)
            assert b.pool.statistics().idle == 0
            await b.backend.until(lambda x: x.connections[0].closed_by == "client")

    run(scenario())


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_reply_in_single_bytes_is_whole(loop: str) -> None:
    """Segments of one byte, on both event loops that the router runs on."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(*bytewise(stream_head() + framed(b"hello") + framed(b" world") + framed(b"")))
            assert await b.get() == b"hello world"
            b.backend.script(*bytewise(json_reply([1, 2, 3])))
            assert await b.get() == b"[1, 2, 3]"
            assert len(b.backend.connections) == 1

    if loop == "uvloop":
        run(scenario())
    else:
        asyncio.run(scenario())


def test_a_stream_is_read_as_it_comes() -> None:
    """chunk() returns what has arrived, without waiting for more, and b"" at the end."""

    async def scenario() -> None:
        async with bench() as b:
            gates = [Gate(), Gate()]
            b.backend.script(stream_head(), Hold(gates[0]), framed(b"one"), Hold(gates[1]), framed(b"two"), framed(b""))
            answer = await b.pool.send(*request())
            assert answer.take() == b""
            gates[0].open()
            assert await answer.chunk() == b"one"
            gates[1].open()
            assert await answer.read() == b"two"
            assert answer.take() is None
            assert await answer.chunk() == b""
            answer.close()
            assert b.pool.statistics().idle == 1

    run(scenario())


class Fault(NamedTuple):
    """Steps of a backend on a new connection, and what the caller must get."""

    name: str
    steps: tuple[Step, ...]
    error: type[BackendError]
    match: str


@pytest.mark.parametrize(
    "fault",
    [
        Fault("closes at once", (Close(),), BackendUnavailable, "closed before a reply"),
        Fault("resets at once", (Reset(),), BackendUnavailable, "closed before a reply"),
        Fault("closes in the head", (b"HTTP/1.1 200 OK\r\nX: y", Close()), BackendUnavailable, "within the head"),
        Fault("says too much", (reply(b"hello", length=9), Close()), BackendUnavailable, "after 5 of 9 bytes"),
        Fault("resets in the body", (reply(b"hello", length=9), Reset()), BackendUnavailable, "after 5 of 9 bytes"),
        Fault("drops a stream", (stream_head(), framed(b"x"), Close()), BackendUnavailable, "after 1 bytes"),
        Fault("says too little", (reply(b"hello", length=4),), BadReply, "more follows"),
        Fault("is no HTTP", (b"SSH-2.0-OpenSSH_9.6\r\n",), BadReply, "not HTTP/1.1"),
        Fault("bad chunk", (stream_head() + b"zz\r\n",), BadReply, "malformed"),
        Fault("upgrades", (b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",), BadReply, "protocols"),
        Fault("large head", (b"HTTP/1.1 200 OK\r\n", Repeat(b"X: y\r\n", 20_000)), BadReply, "head is larger"),
        Fault("large length", (reply(b"", length=2_000_000),), BadReply, "larger than 1000000 bytes"),
        Fault("large stream", (stream_head(), Repeat(framed(b"x" * 50_000), 40)), BadReply, "larger than 1000000"),
    ],
    ids=lambda fault: fault.name,
)
def test_each_fault_has_its_error(fault: Fault) -> None:
    """Typed error, no retry, the connection gone, and the next request served."""

    async def scenario() -> None:
        async with bench(max_body_bytes=1_000_000) as b:
            b.backend.script(*fault.steps)
            with pytest.raises(fault.error, match=fault.match):
                await b.get()
            assert len(b.backend.requests) == 1
            await b.backend.until(lambda x: x.connections[0].closed_by)
            await b.state(lambda pool: pool.statistics().closed == 1)
            b.backend.script(json_reply({"fine": True}))
            assert await b.get() == b'{"fine": true}'

    run(scenario())


def test_a_connection_closed_while_idle_is_replaced() -> None:
    """The backend's own idle timeout, noticed before the next request: nobody sees it."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            b.backend.close_idle()
            await b.state(lambda pool: pool.statistics().idle == 0)
            await b.get()
            assert (b.pool.statistics().opened, b.pool.statistics().retried) == (2, 0)

    run(scenario())


def test_a_stale_connection_is_retried_once_on_a_new_one() -> None:
    """Closed without a byte when the request came: written again on a new connection, with nobody told."""

    async def scenario() -> None:
        async with bench() as b:
            for fault in (Close(), Reset()):
                await b.get()
                b.backend.script(fault)
                b.backend.script(json_reply({"second": True}))
                before = len(b.backend.connections)
                assert await b.get() == b'{"second": true}'
                assert before + 1 == len(b.backend.connections)
                assert b.backend.requests[-1].connection == before
            assert b.pool.statistics().retried == 2

    run(scenario())


def test_a_stale_connection_is_retried_once_only() -> None:
    """The new connection failing too is the backend's failure."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            b.backend.always(Close())
            with pytest.raises(BackendUnavailable):
                await b.get()
            assert len(b.backend.requests) == 3
            assert b.pool.in_use == 0

    run(scenario())


@pytest.mark.parametrize("first", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_never_retried_after_a_byte_of_the_reply(first: bytes) -> None:
    """A byte says that the peer has taken the request."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            b.backend.script(first, Close())
            with pytest.raises(BackendUnavailable):
                await b.get()
            assert len(b.backend.requests) == 2

    run(scenario())


def test_not_retried_when_the_caller_says_so() -> None:
    """idempotent_retry=False gives the error, and its place in the pool back."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            await b.get()
            b.backend.script(Close())
            with pytest.raises(BackendUnavailable):
                await b.pool.send(*request(), idempotent_retry=False)
            assert len(b.backend.requests) == 2
            await b.get()

    run(scenario())


def test_not_retried_when_the_peer_worked_on_it() -> None:
    """A connection lost long after the request was not closed while idle: the request may be what killed the peer."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            gate = Gate()
            b.backend.script(Hold(gate), Close())
            task = asyncio.create_task(b.get())
            await b.backend.until(lambda x: len(x.requests) == 2)
            b.clock.advance(5)
            gate.open()
            with pytest.raises(BackendUnavailable):
                await task
            assert len(b.backend.requests) == 2

    run(scenario())


def test_requests_racing_with_a_closing_peer_all_succeed() -> None:
    """A backend that closes each connection right after a reply, without saying so, loses no request."""

    async def scenario() -> None:
        async with bench() as b:
            chance = random.Random(7)
            for _ in range(300):
                steps: tuple[Step, ...] = (json_reply({}),)
                b.backend.script(*steps, *([Close()] if chance.random() < 0.5 else []))
                assert await b.get() == b"{}"
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
            assert b.pool.statistics().opened > 50

    run(scenario())


def test_cancelling_before_the_head_closes_the_connection_at_once() -> None:
    """The backend sees the client leave and can stop generating."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(Stall())
            task = asyncio.create_task(b.get())
            await b.backend.until(lambda x: x.requests)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await b.backend.until(lambda x: x.connections[0].closed_by == "client")
            assert b.pool.in_use == 0

    run(scenario())


def test_cancelling_in_the_body_closes_the_connection_at_once() -> None:
    """So does leaving in the middle of a stream."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(stream_head(), framed(b"x"), Stall())
            answer = await b.pool.send(*request())
            assert await answer.chunk() == b"x"
            waiting = asyncio.create_task(answer.chunk())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            answer.close()
            await b.backend.until(lambda x: x.connections[0].closed_by == "client")
            await b.state(lambda pool: pool.in_use == 0)

    run(scenario())


def test_cancelling_at_any_moment_leaves_nothing_behind() -> None:
    """Whatever step a request has reached when it is cancelled, the pool's counts return to nothing in use."""

    async def scenario() -> None:
        async with bench(max_connections=2) as b:
            for turns in range(60):
                tasks = [asyncio.create_task(b.get()) for _ in range(4)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(result, bytes | asyncio.CancelledError) for result in results), results
                await b.state(lambda pool: pool.in_use == 0 and pool.statistics().waiting == 0)
            assert await b.get()

    run(scenario())


async def _in_flight(b: Bench) -> tuple[asyncio.Task[bytes], Connection]:
    """A request on a kept connection that waits for its reply."""
    await b.get()
    b.backend.script(Stall())
    task = asyncio.create_task(b.get())
    await b.backend.until(lambda x: len(x.requests) == 2)
    (connection,) = b.pool._connections
    return task, connection


async def _cancelled(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_cancelled_in_the_moment_of_the_head() -> None:
    """The reply's head has been read, its caller has not run yet: the connection is closed."""

    async def scenario() -> None:
        async with bench() as b:
            task, connection = await _in_flight(b)
            connection.data_received(stream_head())
            await _cancelled(task)
            assert connection.is_closed
            await b.state(lambda pool: pool.in_use == 0)

    run(scenario())


def test_cancelled_in_the_moment_of_the_end() -> None:
    """The reply is whole already: its connection serves others and is left alone."""

    async def scenario() -> None:
        async with bench() as b:
            task, connection = await _in_flight(b)
            connection.data_received(json_reply({}))
            await _cancelled(task)
            assert not connection.is_closed
            assert b.pool.statistics().idle == 1

    run(scenario())


def test_cancelled_in_the_moment_of_a_stale_connection() -> None:
    """No retry for nobody, and the place of the connection is free."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            task, connection = await _in_flight(b)
            connection.connection_lost(None)
            await _cancelled(task)
            assert connection.transport is not None
            connection.transport.abort()
            assert b.pool.in_use == 0
            assert await b.get()
            assert b.pool.statistics().retried == 0

    run(scenario())


@pytest.mark.parametrize("what", ["connection", "place"])
def test_cancelled_in_the_moment_of_its_turn(what: str) -> None:
    """A waiter that was given a connection, or the right to open one, hands it on when it is cancelled."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            first, connection = await _in_flight(b)
            second, third = asyncio.create_task(b.get()), asyncio.create_task(b.get())
            await b.state(lambda pool: pool.statistics().waiting == 2)
            if what == "connection":
                connection.data_received(json_reply({}))
            else:
                connection.fail(BackendUnavailable("b", "broken"))
                b.pool.lost(connection, keep_slot=False)
            assert b.pool.statistics().waiting == 1
            await _cancelled(second)
            connection.fail(BackendUnavailable("b", "gone"))  # it stalls at the backend
            results = await asyncio.gather(first, third, return_exceptions=True)
            assert [isinstance(result, bytes | BackendUnavailable) for result in results] == [True, True]
            await b.state(lambda pool: pool.in_use == 0)
            assert await b.get()

    run(scenario())


def _has_requests(count: int, backend: ScriptedBackend) -> bool:
    return len(backend.requests) == count


def test_first_byte_deadline() -> None:
    """No head within first_byte_s is a timeout, even when bytes of the head trickle in."""

    async def scenario() -> None:
        async with bench(first_byte_s=5.0) as b:
            for steps in ((Stall(),), (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nX:", Stall())):
                b.backend.script(*steps)
                count = len(b.backend.requests) + 1
                task = asyncio.create_task(b.get())
                await b.backend.until(partial(_has_requests, count))
                b.pass_time(4.9)
                await asyncio.sleep(0)
                assert not task.done()
                b.pass_time(0.2)
                with pytest.raises(BackendTimeout, match="first_byte timeout of 5 s"):
                    await task

    run(scenario())


def test_gap_deadline() -> None:
    """Silence within the body is measured from the last bytes."""

    async def scenario() -> None:
        async with bench(gap_s=5.0) as b:
            gate = Gate()
            b.backend.script(stream_head(), framed(b"x"), Hold(gate), framed(b"y"), Stall())
            answer = await b.pool.send(*request())
            assert await answer.chunk() == b"x"
            b.pass_time(4.9)
            gate.open()
            assert await answer.chunk() == b"y"
            b.pass_time(4.9)
            assert answer.take() == b""
            b.pass_time(0.2)
            with pytest.raises(BackendTimeout, match="gap timeout of 5 s"):
                await answer.chunk()
            await b.backend.until(lambda x: x.connections[0].closed_by == "client")

    run(scenario())


def test_total_deadline() -> None:
    """total_s counts from send, in the head and in the body, whatever moves."""

    async def scenario() -> None:
        async with bench(total_s=5.0) as b:
            b.backend.script(Stall())
            task = asyncio.create_task(b.get())
            await b.backend.until(lambda x: x.requests)
            b.pass_time(5.1)
            with pytest.raises(BackendTimeout, match="total timeout of 5 s"):
                await task

            b.backend.script(stream_head(), framed(b"x"), Stall())
            answer = await b.pool.send(*request())
            assert await answer.chunk() == b"x"
            b.pool.sweep(b.clock.advance(5.1))
            with pytest.raises(BackendTimeout, match="total"):
                await answer.chunk()

    run(scenario())


def test_a_slow_reader_does_not_make_memory_grow() -> None:
    """200 MB towards a reader that takes nothing: the pool holds its mark, the rest waits in the backend."""

    async def scenario() -> None:
        high_water_bytes = 64 * 1024
        piece, times = b"x" * 200_000, 1000
        async with bench(high_water_bytes=high_water_bytes) as b:
            b.backend.script(stream_head(), Repeat(framed(piece), times), framed(b""))
            answer = await b.pool.send(*request())
            last = -1
            while last != (last := b.backend.connections[0].sent_bytes):
                await asyncio.sleep(0.1)
            assert b.pool.statistics().buffered_bytes <= high_water_bytes + READ_BYTES
            assert last < 40_000_000  # buffers of two sockets
            received = largest = 0
            while data := await answer.chunk():
                received += len(data)
                largest = max(largest, len(data))
            answer.close()
            assert received == times * len(piece)
            assert largest <= high_water_bytes + READ_BYTES
            assert b.pool.statistics().idle == 1

    run(scenario())


def test_reading_whole_does_not_pause() -> None:
    """read() of a body above the high-water mark gets all of it, up to max_body_bytes."""

    async def scenario() -> None:
        async with bench(high_water_bytes=1024) as b:
            body = bytes(range(256)) * 8000
            b.backend.script(reply(body))
            assert await b.get() == body

    run(scenario())


def test_waiting_for_a_connection_is_first_come_first_served() -> None:
    """With all connections in use the next requests wait in order; who is cancelled is passed over."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            gate = Gate()
            b.backend.script(Hold(gate), json_reply({}))
            order: list[str] = []

            async def named(name: str) -> None:
                answer = await b.pool.send(*request(name.encode()))
                order.append(name)
                await answer.read()

            tasks = [asyncio.create_task(named(name)) for name in "abcd"]
            await b.backend.until(lambda x: x.requests)
            assert b.pool.statistics().waiting == 3
            tasks[1].cancel()
            await asyncio.sleep(0)
            assert b.pool.statistics().waiting == 2
            gate.open()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert order == ["a", "c", "d"]
            assert len(b.backend.connections) == 1

    run(scenario())


def test_waiting_is_bounded_in_number_and_time() -> None:
    """One too many is refused at once; who waits too long is refused by the sweep."""

    async def scenario() -> None:
        async with bench(max_connections=1, max_waiting=1, wait_s=3.0) as b:
            b.backend.script(Stall())
            tasks = [asyncio.create_task(b.get()) for _ in range(2)]
            await b.backend.until(lambda x: x.requests)
            with pytest.raises(BackendBusy, match="1 requests wait already"):
                await b.get()
            b.pool.sweep(b.clock.advance(2.9))
            assert b.pool.statistics().waiting == 1
            b.pool.sweep(b.clock.advance(0.2))
            with pytest.raises(BackendBusy, match="within 3 s"):
                await tasks[1]
            assert (b.pool.statistics().waiting, b.pool.statistics().refused) == (0, 2)
            tasks[0].cancel()
            await asyncio.wait(tasks)

    run(scenario())


def test_a_place_that_becomes_free_is_used_by_who_waits() -> None:
    """A connection that breaks leaves its place to the first in line, who opens a new one."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            gate = Gate()
            b.backend.script(Hold(gate), Reset())
            b.backend.script(json_reply({"second": True}))
            tasks = [asyncio.create_task(b.get()) for _ in range(2)]
            await b.state(lambda pool: pool.statistics().waiting == 1)
            gate.open()
            with pytest.raises(BackendUnavailable):
                await tasks[0]
            assert await tasks[1] == b'{"second": true}'

    run(scenario())


def test_no_more_connections_than_allowed_under_load() -> None:
    """Two hundred requests over eight connections: all answered, never a ninth connection."""

    async def scenario() -> None:
        async with bench(max_connections=8) as b:
            results = await asyncio.gather(*(b.get() for _ in range(200)))
            assert len(results) == 200
            assert len(b.backend.connections) == 8
            state = b.pool.statistics()
            assert (state.idle, state.busy, state.waiting) == (8, 0, 0)

    run(scenario())


def test_a_large_body_is_written_as_the_peer_takes_it() -> None:
    """20 MB to a peer that does not read: little of it is copied, and the deadline holds."""

    async def scenario() -> None:
        async with bench(first_byte_s=5.0) as b:
            b.backend.script(Stall(reads=False), early=True)
            task = asyncio.create_task(b.pool.send(*request(b"x" * 20_000_000)))
            await b.backend.until(lambda x: x.requests)
            (connection,) = b.pool._connections
            await b.state(lambda pool: connection.writing_paused)
            assert connection.transport is not None
            assert connection.transport.get_write_buffer_size() <= 512 * 1024
            b.pass_time(5.1)
            with pytest.raises(BackendTimeout, match="first_byte"):
                await task

    run(scenario())


def test_a_large_body_arrives_whole() -> None:
    """Slices join to what was given, and the connection is kept."""

    async def scenario() -> None:
        async with bench() as b:
            body = os.urandom(5_000_003)
            for _ in range(2):
                b.backend.script(json_reply({}))
                answer = await b.pool.send(*request(body))
                await answer.read()
                assert b.backend.requests[-1].body == body
            assert len(b.backend.connections) == 1

    run(scenario())


@pytest.mark.parametrize("rest", [(), (Stall(reads=False),)])
def test_a_reply_before_the_body_is_written_is_used_and_the_connection_dropped(rest: tuple[Step, ...]) -> None:
    """413 in the middle of an upload reaches the caller; what is left unsaid makes the connection unusable."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(json_reply({"error": "too large"}, 413), *rest, early=True)
            answer = await b.pool.send(*request(b"x" * 20_000_000))
            assert answer.status == 413
            assert b"too large" in await answer.read()
            assert b.pool.statistics().idle == 0
            await b.get()

    run(scenario())


def test_an_upload_that_was_cut_short_ends_its_connection() -> None:
    """A stream that begins before the body is written is read to its end; half a request is never followed by another."""

    async def scenario() -> None:
        async with bench() as b:
            gate = Gate()
            b.backend.script(stream_head(), framed(b"early"), Hold(gate), framed(b""), Stall(), early=True)
            answer = await b.pool.send(*request(b"x" * 20_000_000))
            assert await answer.chunk() == b"early"
            gate.open()
            assert await answer.read() == b""
            assert b.pool.statistics().idle == 0
            await b.backend.until(lambda x: x.connections[0].closed_by == "client")

    run(scenario())


def test_cancelling_an_upload_closes_the_connection() -> None:
    """Cancellation while the peer does not take the body."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(Stall(reads=False), early=True)
            task = asyncio.create_task(b.pool.send(*request(b"x" * 20_000_000)))
            await b.backend.until(lambda x: x.requests)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await b.state(lambda pool: pool.statistics().closed == 1)

    run(scenario())


def test_bytes_nobody_asked_for_end_an_idle_connection() -> None:
    """A reply that comes without a request is never given to a request."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            b.backend.send_idle(json_reply({"poison": True}))
            await b.state(lambda pool: pool.statistics().idle == 0)
            b.backend.script(json_reply({"fine": True}))
            assert await b.get() == b'{"fine": true}'

    run(scenario())


def test_head_requests_have_no_body() -> None:
    """Content-Length of a reply to HEAD announces nothing."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.script(reply(b"", length=700))
            answer = await b.pool.send(*request(method="HEAD"))
            assert (answer.status, answer.length, await answer.read()) == (200, 700, b"")
            await b.get()

    run(scenario())


def test_nobody_listens() -> None:
    """A refused connection is BackendUnavailable and names the backend, not its address."""

    async def scenario() -> None:
        port = free_port()
        async with Pool("west", Origin("http", "127.0.0.1", port), PoolSettings(), NoRecorder()) as pool:
            with pytest.raises(BackendUnavailable, match="'west': cannot connect: Connection refused") as caught:
                await pool.send(*request())
            assert str(port) not in str(caught.value)
            assert pool.in_use == 0

    run(scenario())


def test_tls_to_a_peer_that_speaks_none() -> None:
    """An https backend that answers in clear text is BackendUnavailable and says so."""

    async def scenario() -> None:
        async def clear_text(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(clear_text, "127.0.0.1", 0)
        async with server:
            origin = Origin("https", "127.0.0.1", server.sockets[0].getsockname()[1])
            async with Pool("west", origin, PoolSettings(), NoRecorder()) as pool:
                with pytest.raises(BackendUnavailable, match="'west': no TLS connection: "):
                    await pool.send(*request())
                assert pool.in_use == 0

    run(scenario())


def test_closing_the_pool_while_a_connection_is_being_opened() -> None:
    """The connection that comes about after the end is closed, and its request told."""

    async def scenario() -> None:
        async with bench() as b:
            task = asyncio.create_task(b.get())
            await asyncio.sleep(0)
            assert b.pool.statistics().connecting == 1
            await b.pool.aclose()
            with pytest.raises(BackendUnavailable, match="shutting down"):
                await task
            await b.pool.aclose()

    run(scenario())


def test_an_unknown_host_name() -> None:
    """A name that does not resolve is BackendUnavailable."""

    async def scenario() -> None:
        async with Pool("west", Origin("http", "no-such-host.invalid", 80), PoolSettings(), NoRecorder()) as pool:
            with pytest.raises(BackendUnavailable, match="host name cannot be resolved"):
                await pool.send(*request())

    run(scenario())


def test_connect_deadline_and_cancellation_while_connecting() -> None:
    """A TLS peer that never shakes hands: the deadline of connecting, and a cancelled request, leave nothing."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            origin = Origin("https", "127.0.0.1", silent.getsockname()[1])
            async with Pool("b", origin, PoolSettings(connect_s=0.05), NoRecorder()) as pool:
                with pytest.raises(BackendTimeout, match="connect timeout of 0.05 s"):
                    await pool.send(*request())
                assert pool.in_use == 0
            async with Pool("b", origin, PoolSettings(), NoRecorder()) as pool:
                task = asyncio.create_task(pool.send(*request()))
                await asyncio.sleep(0)
                assert pool.statistics().connecting == 1
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert pool.in_use == 0

    run(scenario())


def test_closing_the_pool_ends_everything() -> None:
    """In flight, waiting and idle: errors for who waits, and no connection left."""

    async def scenario() -> None:
        async with bench(max_connections=1) as b:
            b.backend.script(Stall())
            tasks = [asyncio.create_task(b.get()) for _ in range(2)]
            await b.backend.until(lambda x: x.requests)
            await b.pool.aclose()
            for task in tasks:
                with pytest.raises(BackendUnavailable, match="shutting down"):
                    await task
            with pytest.raises(BackendUnavailable, match="shutting down"):
                await b.get()
            assert "closed" in repr(b.pool)

    run(scenario())


def test_the_recorder_knows_every_connection() -> None:
    """opened, closed and the seconds between."""

    async def scenario() -> None:
        async with bench() as b:
            await b.get()
            b.clock.advance(7)
            b.backend.close_idle()
            await b.state(lambda pool: pool.statistics().closed == 1)
            assert b.recorder.closed_connections == [("upstream", "http", 7.0)]

    run(scenario())


# -- TLS and Unix sockets -----------------------------------------------------------------------------


class Certificate(NamedTuple):
    """A self-signed certificate for the name localhost."""

    certificate: str
    key: str

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    made = Certificate(str(folder / "cert.pem"), str(folder / "key.pem"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", made.key, "-out", made.certificate, "-days", "2", "-subj", "/CN=backend.test"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return made


def test_tls_with_its_authority(certificate: Certificate) -> None:
    """A private authority is accepted when configured; the server name is sent; connections are kept."""

    async def scenario() -> None:
        names: list[str | None] = []
        context = certificate.context()
        context.set_servername_callback(lambda _socket, name, _context: names.append(name))
        with ScriptedBackend(tls=context) as backend:
            origin = Origin("https", "localhost", backend.port)
            settings = PoolSettings(tls_ca_file=certificate.certificate)
            async with Pool("b", origin, settings, NoRecorder()) as pool:
                for _ in range(3):
                    answer = await pool.send(*request(b"{}"))
                    assert b"scripted backend" in await answer.read()
            assert names == ["localhost"]

    run(scenario())


def test_tls_is_verified(certificate: Certificate) -> None:
    """An unknown authority and a wrong name are refused with the reason, unless verification is switched off."""

    async def scenario() -> None:
        with ScriptedBackend(tls=certificate.context()) as backend:
            for host, settings in (
                ("localhost", PoolSettings()),
                ("127.0.0.1", PoolSettings(tls_ca_file=certificate.certificate)),
            ):
                async with Pool("b", Origin("https", host, backend.port), settings, NoRecorder()) as pool:
                    with pytest.raises(BackendUnavailable, match="certificate is not accepted"):
                        await pool.send(*request())
                    assert pool.in_use == 0
            unverified = Pool("b", Origin.parse(backend.url), PoolSettings(tls_verify=False), NoRecorder())
            async with unverified as pool:
                assert (await (await pool.send(*request(b"{}"))).read()) != b""

    run(scenario())


@pytest.mark.parametrize("folder_length", [5, 120])
def test_unix_sockets(tmp_path: Path, folder_length: int) -> None:
    """A backend behind a socket file, also where the path is longer than the system takes."""
    folder = tmp_path / ("f" * folder_length)
    folder.mkdir()
    path = folder / "backend.sock"
    short = f"/tmp/{os.getpid()}-{folder_length}.sock"

    async def scenario() -> None:
        with ScriptedBackend(path=short) as backend:
            os.rename(short, path)
            async with Pool("b", Origin.parse(f"unix:{path}"), PoolSettings(), NoRecorder()) as pool:
                answer: Reply = await pool.send(*request(b"{}"))
                assert answer.status == 200
                await answer.read()
            assert len(backend.requests) == 1

    run(scenario())


def test_a_request_leaves_no_garbage_for_the_collector() -> None:
    """Nothing that an exchange makes refers to itself: memory is free when the reply is, without a collection."""

    async def scenario() -> None:
        async with bench() as b:
            b.backend.always(json_reply({}))
            await b.get()
            gc.collect()
            gc.disable()
            try:
                for _ in range(200):
                    await b.get()
                # The backend's thread and the loop make a few objects of their own.
                assert gc.collect() < 200
            finally:
                gc.enable()

    run(scenario())
