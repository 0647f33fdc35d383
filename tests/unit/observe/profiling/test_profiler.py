"""Profiles of this process: each kind, one at a time, bounded, and nothing left when it is over."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from llm_router.observe.profiling.memory import Growth, growth, short
from llm_router.observe.profiling.profile import CannotProfile, ProfileRunning
from llm_router.observe.profiling.profiler import Profiler
from llm_router.observe.profiling.settings import ProfilerSettings
from support.aio import run, until

ON = ProfilerSettings(enabled=True, rate_hz=500.0, continuous_hz=0.0)


@pytest.fixture
def profiler() -> Iterator[Profiler]:
    profiler = Profiler(ON, process="worker-0")
    yield profiler
    profiler.close()
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert not tracemalloc.is_tracing()


def burn(seconds: float) -> None:
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


async def busy(profiler: Profiler, kind: str, format: str) -> bytes:
    """A profile of a loop that burns all it can."""
    taking = asyncio.create_task(profiler.take(kind, 0.2, format))
    while not taking.done():
        burn(0.005)
        await asyncio.sleep(0)
    return taking.result()


def allocate(count: int) -> list[bytearray]:
    return [bytearray(1000) for _ in range(count)]


def test_a_cpu_profile_shows_what_ran(profiler: Profiler) -> None:
    """With the CPU seconds that the process spent, nearly all of which are in it."""
    document = json.loads(run(busy(profiler, "cpu", "json")))
    assert (document["kind"], document["process"], document["unit"]) == ("cpu", "worker-0", "seconds")
    assert document["seconds"] == pytest.approx(0.2, abs=0.1)
    assert document["total"] >= 0.8 * document["notes"]["process_cpu_seconds"]
    names = [frame["name"] for frame in document["frames"]]
    heaviest = [names[index] for index in document["stacks"][0]["frames"]]
    assert heaviest[0] == "thread MainThread"
    assert heaviest[-1].endswith(":burn")
    assert document["notes"]["faults"] == 0


def test_memory_that_stays_is_shown_with_where_it_came_from(profiler: Profiler) -> None:
    """What was freed before the end is not, and the profiler's own is not either."""
    held: list[Any] = []

    async def main() -> bytes:
        taking = asyncio.create_task(profiler.take("memory", 0.1, "json"))
        await until(tracemalloc.is_tracing)
        held.extend(allocate(1000))
        allocate(5000)
        return await taking

    document = json.loads(run(main()))
    assert (document["kind"], document["unit"]) == ("memory", "bytes")
    names = [frame["name"] for frame in document["frames"]]
    first = document["stacks"][0]
    assert "test_profiler.py:" in names[first["frames"][-1]]
    assert 1_000_000 <= first["value"] <= 1_200_000
    assert first["count"] >= 1000
    assert document["notes"]["peak_bytes"] >= 5_000_000
    leaves = {names[stack["frames"][-1]] for stack in document["stacks"]}
    assert not any("llm_router/observe/profiling" in name for name in leaves)


def test_tracing_that_was_on_goes_on(profiler: Profiler) -> None:
    """And what was held before is not counted."""
    tracemalloc.start(5)
    try:
        held = allocate(2000)

        async def main() -> bytes:
            taking = asyncio.create_task(profiler.take("memory", 0.05, "json"))
            await asyncio.sleep(0.03)
            held.extend(allocate(100))
            return await taking

        document = json.loads(run(main()))
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    assert document["total"] < 1_000_000
    assert any(100_000 <= stack["value"] <= 200_000 for stack in document["stacks"])


def test_bookkeeping_of_memory_is_bounded() -> None:
    """A process that allocates without end is not traced until it suffocates."""

    async def main() -> Growth:
        tracing = asyncio.create_task(growth(30.0, max_tracing_bytes=200_000))
        await until(tracemalloc.is_tracing)
        held = [bytes(10) * number for number in range(20_000)]
        found = await tracing
        assert held
        return found

    assert run(main(), timeout_s=10.0).tracing_bytes >= 200_000
    assert not tracemalloc.is_tracing()


def test_one_at_a_time(profiler: Profiler) -> None:
    """A second one is told how long the first takes; after its end, or if it is cancelled, the next may begin."""

    async def main() -> None:
        first = asyncio.create_task(profiler.take("memory", 30.0, "json"))
        await until(tracemalloc.is_tracing)
        with pytest.raises(ProfileRunning, match=r"worker-0 is being taken; it takes (29|30) s more") as caught:
            await profiler.take("cpu", 0.1, "json")
        assert 29.0 <= caught.value.retry_after_s <= 30.0
        first.cancel()
        await asyncio.wait({first})
        assert not tracemalloc.is_tracing()
        second = asyncio.create_task(profiler.take("cpu", 30.0, "json"))
        await until(lambda: signal.getitimer(signal.ITIMER_PROF)[1])
        second.cancel()
        await asyncio.wait({second})
        assert signal.getitimer(signal.ITIMER_PROF)[1] == 0.0
        await profiler.take("cpu", 0.01, "folded")

    run(main())


def test_the_continuous_samples_can_be_read_at_any_time(profiler: Profiler) -> None:
    """Those of the time that was asked for, while they go on; other settings begin them anew."""
    profiler.apply(ProfilerSettings(enabled=True, continuous_hz=200.0, continuous_s=60.0))
    burn(0.1)
    document = json.loads(run(profiler.take("continuous", 5.0, "json")))
    assert document["kind"] == "continuous"
    assert document["total"] >= 0.05
    assert document["seconds"] <= 5.0
    profiler.apply(ProfilerSettings(enabled=True, continuous_hz=200.0, continuous_s=60.0, rate_hz=1.0))
    assert json.loads(run(profiler.take("continuous", 5.0, "json")))["total"] >= 0.05
    profiler.apply(ProfilerSettings(enabled=True, continuous_hz=100.0, continuous_s=60.0))
    assert json.loads(run(profiler.take("continuous", 5.0, "json")))["total"] < 0.05


def test_without_continuous_samples_it_says_how_to_have_them(profiler: Profiler) -> None:
    """Nothing was sampled, so nothing can be shown."""
    with pytest.raises(CannotProfile, match="continuous_hz"):
        run(profiler.take("continuous", 5.0, "json"))


def test_switched_off_there_is_none(profiler: Profiler) -> None:
    """And nothing runs."""
    profiler.apply(ProfilerSettings())
    with pytest.raises(CannotProfile, match="PROFILER_ENABLED"):
        run(profiler.take("cpu", 0.1, "json"))
    assert signal.getitimer(signal.ITIMER_PROF)[1] == 0.0


@pytest.mark.parametrize(
    ("kind", "seconds", "format"),
    [("wall", 1.0, "json"), ("cpu", 1.0, "svg"), ("cpu", 61.0, "json"), ("cpu", 0.0, "json"), ("cpu", float("nan"), "json")],
)  # fmt: skip
def test_what_there_is_not_is_refused(profiler: Profiler, kind: str, seconds: float, format: str) -> None:
    """By whoever takes it too, and not only at the door."""
    with pytest.raises(ValueError):
        run(profiler.take(kind, seconds, format))


def test_each_format_is_what_it_says(profiler: Profiler) -> None:
    """Folded stacks of the same profile add up to what speedscope shows."""
    folded = run(busy(profiler, "cpu", "folded")).decode()
    assert all(line.rpartition(" ")[2].isdigit() for line in folded.splitlines())
    assert folded.startswith("thread MainThread;")
    scope = json.loads(run(busy(profiler, "cpu", "speedscope")))
    assert scope["profiles"][0]["unit"] == "seconds"


def test_paths_are_shown_as_imports_find_them() -> None:
    """Whatever lies elsewhere keeps its path."""
    assert short(json.__file__) == "json/__init__.py"
    assert short("/nowhere/x.py") == "/nowhere/x.py"


def test_importing_does_nothing() -> None:
    """No timer, no handler, no thread, no tracing."""
    program = """
import signal, threading, tracemalloc
from llm_router.observe.profiling import profiler
profiler.Profiler(profiler.ProfilerSettings(), process="x")
print(signal.getsignal(signal.SIGPROF) is signal.SIG_DFL, threading.active_count(), tracemalloc.is_tracing())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["True", "1", "False"], done.stderr
