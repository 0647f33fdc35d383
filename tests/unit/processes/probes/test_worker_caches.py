"""The check of all workers' caches: who answers, who does not, who leaves, and what is late."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from llm_router.cache.memory import MemoryCache
from llm_router.processes.news import SnapshotClient, SnapshotServer, WorkerLine
from llm_router.processes.probes.cache import answer_probe
from llm_router.processes.probes.own_cache import OwnCache
from llm_router.processes.probes.worker_caches import Line, WorkerCaches
from llm_router.processes.snapshot import CacheProbe, CacheProbed, Fact, Snapshot, Word
from support.aio import run, until


class Worker:
    """A line whose worker answers as told; None: never."""

    def __init__(self, name: str, problem: str | None = "", seconds: float = 0.002) -> None:
        self.name = name
        self.problem = problem
        self.seconds = seconds
        self.told: list[int] = []
        self.caches: WorkerCaches | None = None

    def tell(self, word: CacheProbe) -> None:
        self.told.append(word.number)
        if self.problem is not None:
            assert self.caches is not None
            asyncio.get_running_loop().call_soon(
                self.caches.saw, self, CacheProbed(word.number, self.problem, self.seconds)
            )


def caches(*workers: Worker, is_enabled: bool = True, answer_s: float = 5.0) -> WorkerCaches:
    made = WorkerCaches(lambda: workers, lambda: is_enabled, answer_s=answer_s)
    for worker in workers:
        worker.caches = made
    return made


def test_all_work() -> None:
    """Every worker is asked, with the same number; the slowest is shown."""
    workers = [Worker("a"), Worker("b", seconds=0.25)]
    check = run(caches(*workers).check())
    assert (check.status, check.value, check.threshold) == ("healthy", 2.0, 2.0)
    assert check.message == "Cache functionality verified"
    assert check.details == {"slowest_ms": 250.0}
    assert [worker.told for worker in workers] == [[1], [1]]


def test_some_do_not() -> None:
    """One in three: the others still answer from theirs. The same words are said once."""
    check = run(caches(Worker("a"), Worker("b", "it is away"), Worker("c", "it is away")).check())
    assert (check.status, check.value, check.threshold) == ("degraded", 1.0, 3.0)
    assert check.message == "2 of 3 workers' caches do not work: it is away"


def test_none_does() -> None:
    """It does not work at all."""
    assert run(caches(Worker("a", "it is away")).check()).status == "critical"


def test_who_does_not_answer_is_told_and_holds_nobody_up() -> None:
    """After `answer_s`, and the answer that comes afterwards says nothing about the next round."""

    async def scene() -> None:
        silent = Worker("silent", None)
        made = caches(Worker("a"), silent, answer_s=0.05)
        check = await made.check()
        assert check.message == "1 of 2 workers' caches do not work: it did not answer within 0.05 s"
        made.saw(silent, CacheProbed(1, "", 0.0))  # nobody waits any more
        asking = asyncio.create_task(made.check())
        await until(lambda: silent.told == [1, 2])
        made.saw(silent, CacheProbed(1, "", 0.0))
        assert (await asking).status == "degraded"

    run(scene())


def test_who_leaves_is_not_waited_for() -> None:
    """A worker that drains is no broken cache."""

    async def scene() -> None:
        silent = Worker("silent", None)
        made = caches(Worker("a"), silent, answer_s=60.0)
        asking = asyncio.create_task(made.check())
        await until(lambda: silent.told)
        made.left(silent)
        check = await asking
        assert (check.status, check.threshold) == ("healthy", 1.0)

    run(scene())


def test_without_workers_nothing_is_known_to_work() -> None:
    """That is not health."""
    assert run(caches().check()).status == "critical"


def test_a_cache_that_is_off_cannot_fail() -> None:
    """Nobody is asked."""
    worker = Worker("a")
    check = run(caches(worker, is_enabled=False).check())
    assert check.status == "healthy"
    assert "off" in check.message
    assert worker.told == []


def test_a_cancelled_round_leaves_nothing() -> None:
    """The scheduler cancels what takes too long."""

    async def scene() -> None:
        made = caches(Worker("silent", None))
        asking = asyncio.create_task(made.check())
        await until(lambda: "1 answers" in repr(made))
        asking.cancel()
        await asyncio.wait({asking})
        assert "0 answers" in repr(made)

    run(scene())


def test_a_cache_without_workers() -> None:
    """Library mode has one of its own: it works, does not, or is off."""
    well = MemoryCache(max_bytes=10_000, max_entry_bytes=1000, ttl_s=60.0, clock=lambda: 0.0)
    small = MemoryCache(max_bytes=1, max_entry_bytes=1000, ttl_s=60.0, clock=lambda: 0.0)
    assert run(OwnCache(lambda: well).check()).message == "Cache functionality verified"
    check = run(OwnCache(lambda: small).check())
    assert (check.status, check.message) == (
        "critical",
        "The cache does not work: what was put into it was not there",
    )
    assert "off" in run(OwnCache(lambda: None).check()).message


def test_over_the_real_line(tmp_path: Path) -> None:
    """Words go out and facts come back by the socket that control and workers have."""
    path = str(tmp_path / "snapshot.sock")

    async def scene() -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        listening.listen()
        cache = MemoryCache(max_bytes=10_000, max_entry_bytes=1000, ttl_s=60.0, clock=lambda: 0.0)
        answering: set[asyncio.Task[None]] = set()

        def take(line: WorkerLine, facts: list[Fact]) -> None:
            for fact in facts:
                assert isinstance(fact, CacheProbed)
                made.saw(line, fact)

        def hear(word: Word) -> None:
            async def answer(number: int) -> None:
                client.send_fact(await answer_probe(number, cache))

            assert isinstance(word, CacheProbe)
            answering.add(asyncio.ensure_future(answer(word.number)))

        server = SnapshotServer(listening, take)
        made = WorkerCaches(server.lines, lambda: True)
        await server.start()
        server.publish(Snapshot(version=1))
        client = SnapshotClient(path, lambda snapshot: None, on_word=hear)
        async with client:
            await until(lambda: client.latest is not None)
            lines: list[Line] = [*server.lines()]
            assert len(lines) == 1
            assert (await made.check()).status == "healthy"
        await server.aclose()

    run(scene())
