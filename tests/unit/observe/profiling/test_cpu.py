"""Samples of CPU time: they add up to what was spent, and stand where it was spent."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.profiling.cpu import (
    MAX_DEPTH,
    Frames,
    Ring,
    Sampler,
    Stacks,
    label,
    rate_bounds,
    thread_cpu_s,
)
from llm_router.observe.profiling.profile import CannotProfile
from support.aio import run

RATE_HZ = 500.0  # as often as the kernel's clock allows


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    """One that is stopped whatever a test does."""
    sampler = Sampler()
    yield sampler
    for sink, _ in sampler._sinks:
        sampler.detach(sink)
    assert sampler.faults == 0
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def burn(seconds: float) -> None:
    """CPU time of the calling thread, in this function."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


def burn_more(seconds: float) -> None:
    """The same by another name."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


def spent(sampler: Sampler, stacks: Stacks, word: str) -> float:
    """CPU seconds of the stacks in which a frame's name has this word."""
    return sum(
        seconds for stack, seconds, _ in stacks.items() if any(word in sampler.frames[index].name for index in stack)
    )


def total(stacks: Stacks) -> float:
    return sum(seconds for _, seconds, _ in stacks.items())


def sampled(sampler: Sampler, work: Callable[[], None]) -> tuple[Stacks, float]:
    """What was seen of `work`, and the CPU seconds it took."""
    stacks, began = Stacks(), time.process_time()
    sampler.attach(stacks, RATE_HZ)
    work()
    sampler.detach(stacks)
    return stacks, time.process_time() - began


def test_samples_add_up_to_the_cpu_time(sampler: Sampler) -> None:
    """Each stands for the time since the one before, whatever the kernel makes of the rate."""
    stacks, used = sampled(sampler, lambda: burn(0.4))
    assert 0.9 * used <= total(stacks) <= 1.01 * used
    assert spent(sampler, stacks, ":burn") >= 0.9 * total(stacks)


def test_sampling_accounts_for_itself(sampler: Sampler) -> None:
    """It is a small part of what it looks at, and nothing while nobody wants samples."""
    assert sampler.cpu_s == 0.0
    _, used = sampled(sampler, lambda: burn(0.4))
    assert 0.0 < sampler.cpu_s <= 0.2 * used
    before_s = sampler.cpu_s
    burn(0.02)
    assert sampler.cpu_s == before_s


def test_time_is_shared_as_it_was_spent(sampler: Sampler) -> None:
    """Twice the time, twice the weight."""

    def work() -> None:
        for _ in range(200):
            burn(0.001)
            burn_more(0.002)

    stacks, _ = sampled(sampler, work)
    less, more = (
        sum(s for stack, s, _ in stacks.items() if sampler.frames[stack[-1]].name.endswith(name))
        for name in (":burn", ":burn_more")
    )
    assert 1.3 <= more / less <= 3.0


def test_sleep_takes_no_samples(sampler: Sampler) -> None:
    """The timer counts CPU time: a process at rest is left alone."""
    stacks, used = sampled(sampler, lambda: time.sleep(0.1))
    assert total(stacks) <= used + 0.001


def test_threads_are_told_apart_by_name(sampler: Sampler) -> None:
    """Those of a pool are one; each has the CPU time that its clock says."""

    def work() -> None:
        threads = [threading.Thread(target=burn, args=(0.15,), name=f"pool-{i}") for i in range(2)]
        for thread in threads:
            thread.start()
        burn_more(0.15)
        for thread in threads:
            thread.join()

    stacks, _ = sampled(sampler, work)
    assert 0.1 <= spent(sampler, stacks, "thread MainThread") <= 0.3
    # What a thread spent between its last sample and its end is nobody's.
    elsewhere = spent(sampler, stacks, "(threads")
    assert 0.25 <= spent(sampler, stacks, "thread pool-#") + elsewhere <= 0.4


def test_the_task_is_named() -> None:
    """By its name, or what it runs if it was given none; numbers do not make one of each."""
    sampler, stacks = Sampler(), Stacks()

    async def anonymous() -> None:
        burn(0.1)

    async def main() -> None:
        sampler.attach(stacks, RATE_HZ)
        await asyncio.create_task(anonymous())
        for number in range(5):
            await asyncio.create_task(anonymous(), name=f"request {number}")
        sampler.detach(stacks)

    run(main())
    assert spent(sampler, stacks, "anonymous") >= 0.4
    tasks = {sampler.frames[stack[1]].name for stack, s, _ in stacks.items() if s > 0.02}
    assert tasks == {"task test_the_task_is_named.<locals>.anonymous", "task request #"}


def test_the_event_loops_own_time_is_not_a_callbacks() -> None:
    """A signal that came while the loop was in C code is noticed in the next callback, which has done nothing yet."""
    sampler = Sampler()
    innermost: dict[str, str] = {}

    def see(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_name in {"callback", "called"} and event in {"call", "return"}:
            stack = sampler._stack(threading.main_thread(), frame, "")
            name = sampler.frames[stack[-1]].name.rpartition(".")[2]
            innermost[f"{frame.f_code.co_name}, {event}"] = name

    def called() -> None:
        pass

    def callback() -> None:
        called()

    async def main() -> None:
        asyncio.get_running_loop().call_soon(callback)
        sys.setprofile(see)
        await asyncio.sleep(0)
        sys.setprofile(None)

    run(main())
    assert innermost == {
        "callback, call": "run",  # asyncio.Runner's, which is where the loop is
        "called, call": "called",
        "called, return": "called",
        "callback, return": "callback",
    }


def test_a_deep_stack_keeps_its_inner_frames(sampler: Sampler) -> None:
    """The outermost are one entry."""

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        else:
            burn(0.05)

    stacks, _ = sampled(sampler, lambda: deep(200))
    stack = max(stacks.items(), key=lambda item: item[1])[0]
    assert len(stack) == MAX_DEPTH + 2
    names = [sampler.frames[index].name for index in stack]
    assert names[0] == "thread MainThread"
    assert names[1] == "(outer frames)"
    assert names[-1].endswith(":burn")


def test_several_at_a_time_each_get_all(sampler: Sampler) -> None:
    """A slow one does not slow the other down, and the timer follows whoever is left."""
    slow, fast = Stacks(), Stacks()
    sampler.attach(slow, 2.0)
    assert signal.getitimer(signal.ITIMER_PROF)[1] == pytest.approx(0.5, abs=0.01)
    sampler.attach(fast, RATE_HZ)
    burn(0.1)
    sampler.detach(fast)
    assert signal.getitimer(signal.ITIMER_PROF)[1] == pytest.approx(0.5, abs=0.01)
    sampler.detach(slow)
    assert total(slow) == total(fast) > 0.05
    sampler.detach(slow)


def test_only_the_main_thread_can_begin(sampler: Sampler) -> None:
    """Python handles signals there."""
    problems: list[Exception] = []

    def begin() -> None:
        try:
            sampler.attach(Stacks(), RATE_HZ)
        except CannotProfile as error:
            problems.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert "main thread" in str(problems[0])


def test_another_profiler_is_left_alone(sampler: Sampler) -> None:
    """Its handler stays; one of ours that is idle gives way."""
    other, stacks = Sampler(), Stacks()
    other.attach(stacks, 1.0)
    with pytest.raises(CannotProfile, match="SIGPROF"):
        sampler.attach(Stacks(), RATE_HZ)
    other.detach(stacks)
    sampler.attach(stacks, RATE_HZ)
    sampler.detach(stacks)
    before = signal.signal(signal.SIGPROF, lambda number, frame: None)
    try:
        with pytest.raises(CannotProfile, match="SIGPROF"):
            sampler.attach(stacks, RATE_HZ)
    finally:
        signal.signal(signal.SIGPROF, before)


def test_a_late_signal_does_no_harm() -> None:
    """After the end, the handler stays; and programs that are started do not inherit anything of it."""
    program = """
import os, signal, subprocess, sys
from llm_router.observe.profiling.cpu import Sampler, Stacks
sampler, stacks = Sampler(), Stacks()
sampler.attach(stacks, 100.0)
sampler.detach(stacks)
os.kill(os.getpid(), signal.SIGPROF)
child = "import signal; print(signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF))"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0 (0.0, 0.0)"), done.stderr


def test_a_fault_in_the_handler_reaches_nobody() -> None:
    """It is counted; the code that was interrupted goes on."""

    class Broken:
        def add(self, stack: object, seconds: float, now: float) -> None:
            raise ZeroDivisionError

    sampler, sink = Sampler(), Broken()
    sampler.attach(sink, RATE_HZ)
    burn(0.05)
    sampler.detach(sink)
    assert sampler.faults > 0


def test_threads_have_clocks_and_dead_ones_none() -> None:
    """No memory of a thread that ended is read."""
    here = threading.main_thread().native_id or 0
    cpu_s = thread_cpu_s(here)
    assert cpu_s is not None
    burn(0.02)
    assert (thread_cpu_s(here) or 0.0) >= cpu_s + 0.02
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    if sys.platform == "linux":
        assert thread_cpu_s(2**22) is None


def test_frames_are_bounded() -> None:
    """What does not fit is one."""
    frames = Frames(max_frames=3)
    assert [frames.of_label(text) for text in "abacd"] == [1, 2, 1, 0, 0]
    assert frames[0].name == "(other functions)"
    assert frames.of_frame(sys._getframe()) == 0
    assert len(frames) == 3


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 1000)), max_size=200), st.integers(1, 40))
def test_bounded_stacks_keep_the_sum(samples: list[tuple[int, int]], bound: int) -> None:
    """Whatever comes, nothing is lost, and there are never more than the bound and one for the others."""
    stacks = Stacks(bound)
    for stack, seconds in samples:
        stacks.add((stack + 1,), float(seconds))
    found = list(stacks.items())
    assert sum(s for _, s, _ in found) == sum(seconds for _, seconds in samples)
    assert sum(count for _, _, count in found) == len(samples)
    assert len(found) <= bound + 1


@given(st.lists(st.floats(0.0, 500.0), min_size=1, max_size=60), st.floats(1.0, 7000.0))
def test_the_ring_has_what_was_asked_for(gaps: list[float], back_s: float) -> None:
    """Every sample of the time that it says, up to a bucket more, and none from before it."""
    ring, now, added = Ring(3600.0, 0.0), 0.0, []
    for number, gap in enumerate(gaps):
        now += gap
        ring.add((number,), 1.0, now)
        added.append((now, number))
    stacks, began_at = ring.since(now - back_s, now)
    found = {stack[0] for stack, _, _ in stacks.items()}
    begins = max(0.0, now - min(back_s, 3600.0))
    assert begins - 60.0 <= began_at <= begins
    # A sample begins a bucket a minute or more after the bucket before it, so its own minute is the bucket's.
    assert {number for at, number in added if at > begins} <= found
    assert found <= {number for at, number in added if at >= began_at}
    assert len(ring._buckets) <= 61


def test_labels_are_clean() -> None:
    """Nothing that could break a line, and bounded."""
    assert label("pool-12_3") == "pool-#_#"
    assert label("a\nb\x1b[31m") == "a?b?[#m"
    assert len(label("x" * 1000)) == 100


def test_rates_are_bounded() -> None:
    """What is no rate is none."""
    assert [rate_bounds(rate) for rate in (100.0, 1e9, 0.0, -1.0, float("nan"), float("inf"))] == [
        100,
        1000,
        0,
        0,
        0,
        0,
    ]
