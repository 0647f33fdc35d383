"""Forwarding to control: what it is told, what comes back, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from llm_router.errors import Unavailable
from llm_router.gateway.forward import AT_ONCE, Forwarder, control_pool
from llm_router.gateway.seam import ClientGone, HeaderList, Request
from llm_router.testing import Close, Gate, Hold, Repeat, ScriptedBackend, Stall, framed, reply, stream_head
from llm_router.upstream.pool import Pool
from support.aio import run, until


class Client:
    """A responder that keeps what it gets. With `slow`, each write waits for `read`; `leaves_after` bytes it is gone."""

    def __init__(self, *, slow: bool = False, leaves_after: int = 2**60) -> None:
        self.status = 0
        self.headers: HeaderList = []
        self.body = b""
        self.ended = False
        self.read = asyncio.Semaphore(0)
        self._slow = slow
        self._leaves_after = leaves_after

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def gone(self) -> bool:
        return len(self.body) > self._leaves_after

    def start(self, status: int, headers: HeaderList) -> None:
        self.status, self.headers = status, headers

    def write(self, data: bytes) -> Awaitable[None] | None:
        self.body += data
        if self.gone:
            raise ClientGone
        return self._drained() if self._slow else None

    async def _drained(self) -> None:
        await self.read.acquire()

    def end(self, data: bytes = b"") -> None:
        self.body += data
        self.ended = True

    def on_disconnect(self, callback: Callable[[], None] | None) -> None: ...

    def mark_stream(self) -> None: ...


def request(
    method: str = "GET", path: str = "/metrics", headers: dict[bytes, bytes] | None = None, body: bytes = b""
) -> Request:
    return Request(method, path, "a=1", {b"host": b"localhost:3006", **(headers or {})}, body, "10.0.0.9:555", 0.0)


@contextlib.asynccontextmanager
async def pool_to(path: Path) -> AsyncIterator[Pool]:
    pool = control_pool(str(path))
    try:
        yield pool
    finally:
        await pool.aclose()


def test_control_sees_the_client_and_its_headers(tmp_path: Path) -> None:
    """Host, query and end-to-end headers stay; hop-by-hop ones go; nobody else can say who the client is."""

    async def scenario() -> None:
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.script(reply(b"fine", 201, headers=[("x-request-id", "r1")]))
            async with pool_to(tmp_path / "c") as pool:
                client = Client()
                asked = request(
                    "POST",
                    "/admin/reload",
                    {
                        b"connection": b"keep-alive, X-Hop",
                        b"x-hop": b"1",
                        b"keep-alive": b"5",
                        b"transfer-encoding": b"chunked",
                        b"content-type": b"application/json",
                        b"x-llm-router-client": b"127.0.0.1:1",
                        b"origin": b"https://evil.example",
                    },
                    b"{}",
                )
                assert (await Forwarder(pool, lambda: 0.1)(asked, client)).status == 201
            seen = control.requests[0]
            assert (seen.method, seen.target, seen.body) == ("POST", "/admin/reload?a=1", b"{}")
            assert seen.headers == {
                "host": "localhost:3006",
                "x-llm-router-client": "10.0.0.9:555",
                "content-type": "application/json",
                "origin": "https://evil.example",
                "content-length": "2",
            }
            assert (client.status, client.body, client.ended) == (201, b"fine", True)
            assert dict(client.headers) == {
                b"content-type": b"application/json",
                b"x-request-id": b"r1",
                b"content-length": b"4",
            }

    run(scenario())


def test_a_stale_heartbeat_is_503_at_once(tmp_path: Path) -> None:
    """Nothing is sent to a control that has not been heard of for a second."""

    async def scenario() -> None:
        async with pool_to(tmp_path / "none") as pool:
            with pytest.raises(Unavailable, match="no sign of life") as caught:
                await Forwarder(pool, lambda: 1.5)(request(), Client())
            assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)

    run(scenario())


def test_a_control_that_stops_breathing_is_given_up(tmp_path: Path) -> None:
    """A request waits as long as control lives, and no longer."""

    async def scenario() -> None:
        ages = iter([0.1, 0.5, 0.9, 1.2])
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.script(Stall())
            async with pool_to(tmp_path / "c") as pool:
                with pytest.raises(Unavailable, match="no sign of life"):
                    await Forwarder(pool, lambda: next(ages))(request(), Client())
                assert pool.statistics().busy == 0

    run(scenario())


def test_a_control_that_is_not_there_is_503(tmp_path: Path) -> None:
    """No socket, or one that breaks off: unavailable, with what happened."""

    async def scenario() -> None:
        async with pool_to(tmp_path / "none") as pool:
            with pytest.raises(Unavailable):
                await Forwarder(pool, lambda: 0.0)(request(), Client())
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.always(reply(b"half", length=100), Close())
            async with pool_to(tmp_path / "c") as pool:
                client = Client()
                with pytest.raises(Unavailable):
                    await Forwarder(pool, lambda: 0.0)(request(), client)
                assert client.started and not client.ended
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.always(reply(b"", length=100), Close())
            async with pool_to(tmp_path / "c") as pool:
                client = Client()
                with pytest.raises(Unavailable):
                    await Forwarder(pool, lambda: 0.0)(request(), client)
                assert not client.started  # so it can still be told the reason

    run(scenario())


def test_a_slow_client_holds_control_back(tmp_path: Path) -> None:
    """What the client does not take is not read from control: memory stays bounded."""

    async def scenario() -> None:
        size = 200
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.script(stream_head("text/plain"), Repeat(framed(b"z" * 65536), size), framed(b""))
            async with pool_to(tmp_path / "c") as pool:
                client = Client(slow=True)
                forwarding = asyncio.ensure_future(Forwarder(pool, lambda: 0.0)(request(), client))
                await until(lambda: client.body)
                for _ in range(200):
                    await asyncio.sleep(0)
                assert len(client.body) + pool.statistics().buffered_bytes < 2**20
                while not forwarding.done():
                    client.read.release()
                    await asyncio.sleep(0)
                assert await forwarding == (200, size * 65536, b"text/plain")
                assert len(client.body) == size * 65536

    run(scenario())


def test_a_client_that_leaves_frees_the_connection(tmp_path: Path) -> None:
    """Control's reply to nobody is cut, not read."""

    async def scenario() -> None:
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.script(stream_head("text/plain"), Repeat(framed(b"z" * 65536), 1000))
            async with pool_to(tmp_path / "c") as pool:
                with pytest.raises(ClientGone):
                    await Forwarder(pool, lambda: 0.0)(request(), Client(leaves_after=100_000))
                await until(lambda: pool.statistics().busy == 0)

    run(scenario())


def test_a_cancelled_request_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also when it is cancelled while control has not answered yet."""

    async def scenario() -> None:
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.script(Stall())
            async with pool_to(tmp_path / "c") as pool:
                forwarding = asyncio.ensure_future(Forwarder(pool, lambda: 0.0)(request(), Client()))
                await control.until(lambda backend: backend.requests)
                forwarding.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await forwarding
                assert pool.statistics().busy == 0

    run(scenario())


def test_sixteen_at_once(tmp_path: Path) -> None:
    """Further requests wait for their turn and are then served."""

    async def scenario() -> None:
        gate = Gate()
        with ScriptedBackend(path=str(tmp_path / "c")) as control:
            control.always(Hold(gate), reply(b"ok"))
            async with pool_to(tmp_path / "c") as pool:
                forward = Forwarder(pool, lambda: 0.0)
                tasks = [asyncio.ensure_future(forward(request(), Client())) for _ in range(AT_ONCE + 4)]
                await control.until(lambda backend: len(backend.requests) == AT_ONCE)
                assert pool.statistics().waiting == 4
                gate.open()
                assert [forwarded.status for forwarded in await asyncio.gather(*tasks)] == [200] * (AT_ONCE + 4)

    run(scenario())
