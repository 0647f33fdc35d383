"""Snapshots reach every worker, whole and newest; facts come back; either side may come and go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.access import AccessSettings
from llm_router.gateway.front import FrontSettings
from llm_router.processes.news import (
    BadFrame,
    Frames,
    SnapshotClient,
    SnapshotServer,
    WorkerLine,
    decode,
    encode,
    frame,
)
from llm_router.processes.snapshot import BackendSeen, Fact, Snapshot, UsageTaken, Word
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RoutingTable
from support.aio import run, until

FULL = Snapshot(
    version=7,
    table=RoutingTable(
        models=(ModelSpec(name="tiny", deployments=(Deployment("local", "x"),), fallbacks=("big",)),),
        backends=(BackendSpec(name="local", url="http://127.0.0.1:1/v1", api_key="secret", ready=False),),
    ),
    access=AccessSettings(allowed_hosts=("llm.example.org",)),
    front=FrontSettings(max_headers=5),
    admitted_models=("tiny",),
    monitoring_paths=("/m",),
)


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    sock.bind(str(path))
    sock.listen()
    return sock


@contextlib.asynccontextmanager
async def serving(
    path: Path, facts: list[Fact] | None = None, listener: socket.socket | None = None
) -> AsyncIterator[SnapshotServer]:
    server = SnapshotServer(
        listener or listening(path), lambda _, batch: (facts if facts is not None else []).extend(batch)
    )
    await server.start()
    try:
        yield server
    finally:
        await server.aclose()


def test_a_snapshot_survives_the_wire() -> None:
    """Every field comes back as it was."""
    assert decode(encode(FULL)) == FULL


def test_a_certificate_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Without one the app port speaks plain HTTP; a missing file never means that."""
    assert FULL.tls_context() is None
    with pytest.raises(FileNotFoundError):
        Snapshot(version=1, tls_cert_file=str(tmp_path / "none.pem")).tls_context()


@given(st.lists(st.binary(max_size=300), max_size=6), st.randoms(use_true_random=False))
def test_frames_come_out_whole_however_they_are_cut(payloads: list[bytes], random: object) -> None:
    """Any split of any sequence of frames yields the same payloads."""
    stream = b"".join(frame(payload) for payload in payloads)
    frames, found, at = Frames(1000), list[bytes](), 0
    while at < len(stream):
        size = random.randint(1, 50)  # type: ignore[attr-defined]
        found += frames.feed(stream[at : at + size])
        at += size
    assert found == payloads


def test_an_overlong_frame_is_refused_by_its_length() -> None:
    """Nothing is buffered for a frame that is announced as too long."""
    with pytest.raises(BadFrame, match="at most 10"):
        list(Frames(10).feed(b"\x00\x00\x00\x0b"))


def test_a_worker_gets_the_current_snapshot_and_each_new_one(tmp_path: Path) -> None:
    """At once on connecting, then with each publication."""

    async def scenario() -> None:
        seen: list[int] = []
        async with serving(tmp_path / "s") as server:
            server.publish(FULL)
            async with SnapshotClient(str(tmp_path / "s"), lambda news: seen.append(news.version)) as client:
                await until(lambda: seen == [7])
                server.publish(Snapshot(version=8))
                await until(lambda: seen == [7, 8])
                assert client.latest == Snapshot(version=8)
                assert client.statistics().is_connected

    run(scenario())


def test_a_worker_outlives_control(tmp_path: Path) -> None:
    """While control is away the last snapshot stays and facts wait; the next control gets both."""

    async def scenario() -> None:
        path, facts = tmp_path / "s", list[Fact]()
        seen: list[int] = []
        async with SnapshotClient(str(path), lambda news: seen.append(news.version), batch_s=0.01) as client:
            async with serving(path) as first:
                first.publish(FULL)
                await until(lambda: seen == [7])
            await until(lambda: not client.statistics().is_connected)
            client.send_fact(BackendSeen("far", up=False, problem="refused"))
            assert client.latest == FULL
            async with serving(path, facts) as second:
                second.publish(Snapshot(version=1))
                await until(lambda: seen == [7, 1] and facts)
                assert facts == [BackendSeen("far", up=False, problem="refused")]

    run(scenario())


def test_a_connection_made_before_control_runs_is_served(tmp_path: Path) -> None:
    """The supervisor holds the listening socket: who connects early waits in its backlog."""

    async def scenario() -> None:
        path, seen = tmp_path / "s", list[Snapshot]()
        listener = listening(path)
        async with SnapshotClient(str(path), seen.append) as client:
            await until(lambda: client.statistics().is_connected)
            async with serving(path, listener=listener) as server:
                server.publish(FULL)
                await until(lambda: seen == [FULL])

    run(scenario())


def test_facts_arrive_in_order_and_in_batches(tmp_path: Path) -> None:
    """Many facts of one moment are few frames, none lost, in order."""

    async def scenario() -> None:
        path, batches = tmp_path / "s", list[list[Fact]]()
        server = SnapshotServer(listening(path), lambda _, batch: batches.append(batch))
        await server.start()
        async with SnapshotClient(str(path), lambda _: None, batch_s=0.01) as client:
            await until(lambda: client.statistics().is_connected)
            sent = [BackendSeen(f"b{number}", up=True) for number in range(450)]
            for fact in sent:
                client.send_fact(fact)
            await until(lambda: server.statistics().facts == 450)
            assert [fact for batch in batches for fact in batch] == sent
            assert len(batches) == 3
        await server.aclose()

    run(scenario())


def test_facts_are_bounded_while_control_is_away(tmp_path: Path) -> None:
    """The oldest are dropped, and counted; whoever owns the client is told of each."""

    async def scenario() -> None:
        told: list[None] = []
        async with SnapshotClient(
            str(tmp_path / "none"), lambda _: None, on_dropped=lambda: told.append(None), max_facts=3
        ) as client:
            for number in range(5):
                client.send_fact(BackendSeen(str(number), up=True))
            assert (client.statistics().waiting, client.statistics().dropped) == (3, 2)
            assert len(told) == 2

    run(scenario())


def test_a_slow_worker_gets_the_newest_only(tmp_path: Path) -> None:
    """A worker that does not read holds one frame in memory; what it missed is skipped."""

    def big(version: int) -> Snapshot:
        return Snapshot(version=version, admitted_models=tuple(f"model-{number:0100}" for number in range(8000)))

    async def scenario() -> None:
        path = tmp_path / "s"
        async with serving(path) as server:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=2**24)
            await until(lambda: server.statistics().connections == 1)
            for version in range(1, 21):
                server.publish(big(version))
            await asyncio.sleep(0)
            versions: list[int] = []
            while not versions or versions[-1] != 20:
                size = int.from_bytes(await reader.readexactly(4), "big")
                versions.append(decode(await reader.readexactly(size)).version)
            assert len(versions) <= 4
            assert server.statistics().skipped == 20 - len(versions)
            writer.close()
            await until(lambda: server.statistics().connections == 0)

    run(scenario())


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", frame(b"\xc1"), frame(b"\x01"), frame(b'[{"kind":"x"}]')])
def test_a_worker_that_sends_nonsense_is_disconnected(tmp_path: Path, nonsense: bytes) -> None:
    """Only that connection ends; the others go on."""

    async def scenario() -> None:
        path = tmp_path / "s"
        async with serving(path) as server, SnapshotClient(str(path), lambda _: None) as client:
            await until(lambda: client.statistics().is_connected)
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(nonsense)
            assert await reader.read() == b""
            writer.close()
            server.publish(FULL)
            await until(lambda: client.latest == FULL)

    run(scenario())


def test_a_worker_refuses_nonsense_and_connects_again(tmp_path: Path) -> None:
    """A snapshot that cannot be read changes nothing; the worker keeps its last and asks again."""

    async def scenario() -> None:
        path, visits, handlers = tmp_path / "s", 0, list[asyncio.Task[None] | None]()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal visits
            visits += 1
            handlers.append(asyncio.current_task())
            writer.write(frame(encode(FULL)) + (b"" if visits > 1 else frame(b"\xc1")))
            await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(answer, str(path))
        async with SnapshotClient(str(path), lambda _: None, retry_s=0.01) as client:
            await until(lambda: client.latest == FULL)
            assert visits == 2
        await until(lambda: all(handler is not None and handler.done() for handler in handlers))
        server.close()
        await server.wait_closed()

    run(scenario())


def test_words_reach_the_worker_they_are_for_and_none_is_skipped(tmp_path: Path) -> None:
    """However many snapshots are sent between them; another worker hears nothing."""

    async def scenario() -> None:
        path, lines = tmp_path / "s", list[WorkerLine]()
        server = SnapshotServer(listening(path), lambda line, _: lines.append(line))
        await server.start()
        heard, overheard = list[Word](), list[Word]()
        async with (
            SnapshotClient(str(path), lambda _: None, on_word=heard.append) as one,
            SnapshotClient(str(path), lambda _: None, on_word=overheard.append),
        ):
            await until(lambda: server.statistics().connections == 2)
            assert one.send_now(BackendSeen("b", up=True))
            await until(lambda: bool(lines))
            for number in range(50):
                server.publish(Snapshot(version=number + 1))
                lines[0].tell(UsageTaken(number))
            await until(lambda: len(heard) == 50)
        assert heard == [UsageTaken(number) for number in range(50)]
        assert overheard == []
        await server.aclose()

    run(scenario())


def test_who_comes_and_goes_is_told_on_both_sides(tmp_path: Path) -> None:
    """A worker learns that control is there and that it has gone; control, that a worker has gone."""

    async def scenario() -> None:
        path, there, left = tmp_path / "s", list[bool](), list[str]()
        server = SnapshotServer(listening(path), lambda *_: None, on_left=lambda line: left.append(line.name))
        await server.start()
        client = SnapshotClient(str(path), lambda _: None, on_connection=there.append)
        assert not client.send_now(BackendSeen("b", up=True))
        async with client:
            await until(lambda: there == [True])
            await server.aclose()
            await until(lambda: there == [True, False])
        assert left == ["worker-line-1"]

    run(scenario())
