"""Orders for profiles: the right process takes it, over the real wire, and whatever goes wrong is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_router.errors import InvalidRequest
from llm_router.observe.profiling.profile import CannotProfile, ProfileRunning
from llm_router.observe.profiling.profiler import Profiler
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.processes.news import SnapshotClient, SnapshotServer, WorkerLine
from llm_router.processes.orders import ChildState
from llm_router.processes.profiles import ProfileRunner, Profiles
from llm_router.processes.snapshot import Fact, ProfileOrder, ProfileTaken, Word
from support.aio import run, until

ON = ProfilerSettings(enabled=True, rate_hz=500.0, continuous_hz=0.0)
CHILDREN = (
    ChildState(name="worker-0", role="worker", pid=os.getpid(), state="ready"),
    ChildState(name="worker-1", role="worker", pid=0, state="backoff"),
    ChildState(name="control", role="control", pid=1, state="ready"),
    ChildState(name="smollm2", role="runner", pid=2, state="ready"),
)


class Router:
    """Control's side and a connection to it whose process is this one; `words` is what it was told."""

    def __init__(self, server: SnapshotServer, client: SnapshotClient, profiles: Profiles) -> None:
        self.server = server
        self.client = client
        self.profiles = profiles
        self.words: list[Word] = []
        self.runner: ProfileRunner | None = None

    def hear(self, word: Word) -> None:
        self.words.append(word)
        if self.runner is not None and isinstance(word, ProfileOrder):
            self.runner.hear(word)


@contextlib.asynccontextmanager
async def routing(folder: Path, *, grace_s: float = 5.0, worker: bool = True) -> AsyncIterator[Router]:
    """A router of one worker, that takes profiles itself if `worker`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "s"))
    listener.listen()

    def facts(line: WorkerLine, batch: list[Fact]) -> None:
        for fact in batch:
            if isinstance(fact, ProfileTaken):
                profiles.taken(line, fact)

    def left(line: WorkerLine) -> None:
        profiles.left(line)

    def hear(word: Word) -> None:
        router.hear(word)

    server = SnapshotServer(listener, facts, on_left=left)
    own = Profiler(ON, process="control")
    profiles = Profiles(own, children=lambda: CHILDREN, lines=server.lines, settings=lambda: ON, grace_s=grace_s)
    await server.start()
    client = SnapshotClient(str(folder / "s"), lambda snapshot: None, on_word=hear)
    router = Router(server, client, profiles)
    if worker:
        router.runner = ProfileRunner("worker-0", client.send_now)
        router.runner.apply(ON)
    try:
        async with client:
            await until(lambda: bool(server.lines()) and client.statistics().is_connected)
            yield router
    finally:
        if router.runner is not None:
            await router.runner.aclose()
        own.close()
        await server.aclose()
    assert signal.getitimer(signal.ITIMER_PROF)[1] == 0.0


def test_a_worker_takes_what_is_ordered(tmp_path: Path) -> None:
    """The order goes to the process of that name, and its answer comes back whole."""

    async def main() -> None:
        async with routing(tmp_path) as router:
            body = await router.profiles.take("worker-0", "cpu", 0.05, "json")
            assert json.loads(body)["process"] == "worker-0"
            assert router.words == [ProfileOrder(1, "cpu", 0.05, "json", 500.0)]
            assert (await router.profiles.take("worker-0", "memory", 0.05, "folded")) is not None

    run(main())


def test_control_takes_its_own(tmp_path: Path) -> None:
    """Without telling anybody."""

    async def main() -> None:
        async with routing(tmp_path) as router:
            assert json.loads(await router.profiles.take("control", "cpu", 0.05, "json"))["process"] == "control"
            assert not router.words

    run(main())


def test_one_at_a_time_over_the_whole_router(tmp_path: Path) -> None:
    """Of another process too; the refusal says of which one and for how long."""

    async def main() -> None:
        async with routing(tmp_path, worker=False) as router:
            first = asyncio.create_task(router.profiles.take("worker-0", "cpu", 30.0, "json"))
            await until(lambda: router.words)
            with pytest.raises(ProfileRunning, match=r"profile of worker-0 is being taken.*in (29|30) s") as caught:
                await router.profiles.take("control", "cpu", 0.05, "json")
            assert caught.value.retry_after_s > 28.0
            first.cancel()
            await asyncio.wait({first})
            await router.profiles.take("control", "cpu", 0.05, "json")

    run(main())


def test_a_worker_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    """The caller is told, and the next profile can be taken."""

    async def main() -> None:
        async with routing(tmp_path, worker=False) as router:
            order = asyncio.create_task(router.profiles.take("worker-0", "cpu", 30.0, "json"))
            await until(lambda: router.words)
            router.server.lines()[0].abort()
            with pytest.raises(CannotProfile, match="worker-0 went away before its profile was done"):
                await order
            await router.profiles.take("control", "cpu", 0.05, "json")

    run(main())


def test_a_worker_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """Later than its time; an answer that comes even later is nobody's."""

    async def main() -> None:
        async with routing(tmp_path, worker=False, grace_s=0.05) as router:
            with pytest.raises(CannotProfile, match="worker-0 did not answer within 0.1 s"):
                await router.profiles.take("worker-0", "cpu", 0.05, "json")
            order = asyncio.create_task(router.profiles.take("worker-0", "cpu", 5.0, "json"))
            await until(lambda: len(router.words) == 2)
            router.client.send_now(ProfileTaken(1, b"late"))
            router.client.send_now(ProfileTaken(2, b"in time"))
            assert await order == b"in time"
            router.client.send_now(ProfileTaken(2, b"again"))
            await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize(
    ("process", "status", "message"),
    [
        ("worker-7", 404, "there is no process 'worker-7'; there are worker-0, worker-1, control"),
        ("supervisor", 400, "the supervisor cannot be profiled"),
        ("smollm2", 400, "smollm2 is a model's runner, llama.cpp and not Python"),
        ("runner-smollm2", 400, "runner-smollm2 is a model's runner"),
    ],
)
def test_what_cannot_be_profiled_says_why(tmp_path: Path, process: str, status: int, message: str) -> None:
    """And what can."""

    async def main() -> None:
        async with routing(tmp_path, worker=False) as router:
            with pytest.raises(InvalidRequest, match=message) as caught:
                await router.profiles.take(process, "cpu", 1.0, "json")
            assert caught.value.status == status

    run(main())


def test_a_worker_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """It is known, and being started again."""

    async def main() -> None:
        async with routing(tmp_path, worker=False) as router:
            with pytest.raises(CannotProfile, match=r"worker-1 is not there now \(backoff\)"):
                await router.profiles.take("worker-1", "cpu", 1.0, "json")

    run(main())


def test_a_worker_answers_with_what_went_wrong(tmp_path: Path) -> None:
    """Switched off, two at once, or a fault: never silence."""
    answers: list[ProfileTaken] = []

    def send(taken: ProfileTaken) -> bool:
        answers.append(taken)
        return len(answers) > 1  # the first one does not get through, and is sent again

    async def main() -> None:
        runner = ProfileRunner("worker-0", send)
        runner.hear(ProfileOrder(1, "cpu", 0.05, "json"))
        await until(lambda: len(answers) == 2)
        runner.apply(ON)
        for number, kind, format in ((2, "cpu", "json"), (3, "cpu", "json"), (4, "wall", "json")):
            runner.hear(ProfileOrder(number, kind, 0.05, format))
        await until(lambda: len(answers) == 5)
        runner.apply(ProfilerSettings())
        runner.hear(ProfileOrder(5, "cpu", 30.0, "json"))
        await until(lambda: len(answers) == 6)
        await runner.aclose()

    run(main())
    assert answers[0] == answers[1]
    problems = {answer.number: answer.problem for answer in answers}
    assert "switched off" in problems[1]
    assert problems[2] == ""
    assert "being taken" in problems[3]
    assert problems[4] == "worker-0: ValueError: no profile of kind 'wall' and format 'json'"
    assert "switched off" in problems[5]


def test_a_worker_that_ends_leaves_nothing_running() -> None:
    """Neither a timer nor a task."""

    async def main() -> None:
        runner = ProfileRunner("worker-0", lambda taken: True)
        runner.apply(ProfilerSettings(enabled=True, continuous_hz=10.0))
        assert signal.getitimer(signal.ITIMER_PROF)[1] > 0.0
        runner.hear(ProfileOrder(1, "cpu", 30.0, "json"))
        await until(lambda: signal.getitimer(signal.ITIMER_PROF)[1] < 0.05)
        await runner.aclose()

    run(main())
    assert signal.getitimer(signal.ITIMER_PROF)[1] == 0.0


def test_where_profiles_are_off_nothing_of_them_is_loaded() -> None:
    """A worker that never takes one holds no code for it."""
    program = """
import sys
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.processes.profiles import ProfileRunner
ProfileRunner("worker-0", lambda taken: True).apply(ProfilerSettings())
print([name for name in ("llm_router.observe.profiling.cpu", "tracemalloc") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_control_knows_which_process_a_connection_is(tmp_path: Path) -> None:
    """From the kernel, not from what it says."""

    async def main() -> None:
        async with routing(tmp_path, worker=False) as router:
            assert [line.pid for line in router.server.lines()] == [os.getpid()]

    run(main())
