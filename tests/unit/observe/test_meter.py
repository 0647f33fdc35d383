"""CPU by component: each second once, and all of them together what the process used."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.meter import Meter, thread_cpu
from support.aio import run
from support.wait import until


class Account:
    """What a meter told."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls = 0

    def add(self, component: str, seconds: float) -> None:
        assert seconds > 0
        self.calls += 1
        self.seconds[component] = self.seconds.get(component, 0.0) + seconds


class Cpu:
    """A CPU clock that moves when it is told to, one for thread and process."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def burn(seconds: float) -> None:
    """Uses CPU of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def metered(remainder: str = "other") -> tuple[Meter, Account, Cpu]:
    cpu, account = Cpu(), Account()
    return Meter(account.add, remainder=remainder, process_s=cpu, thread_s=cpu), account, cpu


def test_a_section_is_its_components() -> None:
    """And the rest is the remainder's."""
    meter, account, cpu = metered()
    with meter.measure("metrics"):
        cpu.now += 2
    cpu.now += 3
    meter.tick()
    assert account.seconds == {"metrics": 2, "other": 3}


def test_a_section_inside_another_counts_once() -> None:
    """For the inner one; also if it is left by an exception."""
    meter, account, cpu = metered()
    with meter.measure("health"):
        cpu.now += 1
        with contextlib.suppress(ValueError), meter.measure("metrics"):
            cpu.now += 4
            raise ValueError
        with meter.measure("traces"):
            cpu.now += 8
            with meter.measure("health"):
                cpu.now += 16
        cpu.now += 32
    meter.tick()
    assert account.seconds == {"health": 49, "metrics": 4, "traces": 8}


def test_only_what_is_new_is_told() -> None:
    """And nothing where nothing is."""
    meter, account, cpu = metered("")
    meter.tick()
    with meter.measure("metrics"):
        cpu.now += 1
    meter.tick()
    meter.tick()
    assert (account.seconds, account.calls) == ({"metrics": 1}, 1)
    cpu.now += 5  # nobody's, and there is no remainder
    meter.tick()
    assert account.calls == 1
    assert repr(meter) == "Meter(metrics=1.000s)"


def test_the_steps_of_a_coroutine_are_followed() -> None:
    """Not what others do while it waits; what it returns, raises and catches stays what it is."""
    meter, account, cpu = metered()
    gate = asyncio.Event

    async def work(opened: asyncio.Event) -> str:
        cpu.now += 1
        await opened.wait()
        cpu.now += 2
        await asyncio.sleep(0)
        cpu.now += 4
        return "done"

    async def main() -> None:
        opened = gate()
        task = asyncio.create_task(meter.follow(work(opened), "health"))
        await asyncio.sleep(0)
        cpu.now += 100
        opened.set()
        assert await task == "done"

    run(main())
    meter.tick()
    assert account.seconds == {"health": 7, "other": 100}


def test_a_coroutine_that_is_followed_can_fail_and_be_cancelled() -> None:
    """It sees its cancellation, may clean up over several steps, and may refuse."""
    meter, account, cpu = metered("")
    seen: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def stubborn() -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            cpu.now += 1
        return "still here"

    async def yielding() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("left")

    async def main() -> None:
        with pytest.raises(ValueError, match="no"):
            await meter.follow(fail(), "health")
        for coroutine in (stubborn(), yielding()):
            task = asyncio.create_task(meter.follow(coroutine, "health"))
            await asyncio.sleep(0)
            task.cancel()
            seen.append(str((await asyncio.gather(task, return_exceptions=True))[0]))

    run(main())
    assert seen == ["cancelled", "still here", "left", ""]
    meter.tick()
    assert account.seconds == {"health": 1}


def test_a_followed_coroutine_that_nobody_ends_is_closed() -> None:
    """With the one that follows it."""
    meter, _, _ = metered()
    closed: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    followed = meter.follow(work(), "health")
    followed.send(None)
    followed.close()
    assert closed == [True]


def test_the_total_of_a_thread_is_watched() -> None:
    """It counts once; a total that goes down is no reason to count again; the last word stays."""
    meter, account, cpu = metered()
    total = 2.0

    def cpu_s() -> float:
        return total

    meter.watch("logs", cpu_s)
    cpu.now += 10
    meter.tick()
    assert account.seconds == {"logs": 2, "other": 8}
    total = 1.0
    meter.tick()
    total = 3.0
    cpu.now += 1
    meter.unwatch(cpu_s)
    total = 50.0
    meter.tick()
    assert account.seconds == {"logs": 3, "other": 8}


def test_a_remainder_never_goes_down() -> None:
    """A section that was open at a tick was counted as remainder; it makes up for that by standing still."""
    meter, account, cpu = metered()
    section = meter.measure("profiler")
    section.__enter__()
    cpu.now += 5
    meter.tick()
    assert account.seconds == {"other": 5}
    section.__exit__()
    cpu.now += 2
    meter.tick()
    assert account.seconds == {"profiler": 5, "other": 5}
    cpu.now += 4
    meter.tick()
    assert account.seconds == {"profiler": 5, "other": 6}
    assert sum(account.seconds.values()) == cpu.now


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans(), st.booleans()), max_size=40))
def test_the_sum_is_what_the_process_used(steps: list[tuple[str, int, bool, bool]]) -> None:
    """Whatever is measured inside what, and whenever it is asked while nothing is open."""
    meter, account, cpu = metered()
    opened = []
    for component, seconds, opens, closes in steps:
        if opens:
            opened.append(meter.measure(component))
            opened[-1].__enter__()
        cpu.now += seconds
        if closes and opened:
            opened.pop().__exit__()
        if not opened:
            meter.tick()
    while opened:
        opened.pop().__exit__()
    meter.tick()
    assert sum(account.seconds.values()) == pytest.approx(cpu.now)


def test_one_of_many_calls_is_measured() -> None:
    """And counts as many; results and exceptions pass."""
    cpu, account = Cpu(), Account()
    meter = Meter(account.add, process_s=cpu, thread_s=cpu, rng=random.Random(1))

    def record(seconds: float, fails: bool) -> float:
        cpu.now += seconds
        if fails:
            raise ValueError
        return seconds

    sampled = meter.sampled("recording", record)
    for number in range(64_000):
        if number % 10:
            assert sampled(1.0, False) == 1.0
        else:
            with pytest.raises(ValueError):
                sampled(1.0, True)
    meter.tick()
    assert account.seconds["recording"] == pytest.approx(64_000, rel=0.1)


def test_a_rhythm_of_the_calls_does_not_matter() -> None:
    """Were every 64th call the expensive one, a fixed step would see only these, or none."""
    cpu, account = Cpu(), Account()
    meter = Meter(account.add, process_s=cpu, thread_s=cpu, rng=random.Random(3))

    def record(number: int) -> None:
        cpu.now += 10.0 if number % 64 == 0 else 1.0

    sampled = meter.sampled("recording", record)
    for number in range(640_000):
        sampled(number)
    meter.tick()
    assert account.seconds["recording"] == pytest.approx(cpu.now, rel=0.1)


@contextlib.contextmanager
def _working(seconds: float) -> Iterator[threading.Thread]:
    """A thread that has used that much CPU and waits."""
    done, leave = threading.Event(), threading.Event()

    def work() -> None:
        burn(seconds)
        done.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    try:
        yield thread
    finally:
        leave.set()
        thread.join()


def test_the_clock_of_another_thread_can_be_read() -> None:
    """Also after its end, which no reading survives by accident."""
    with _working(0.05) as thread:
        read = thread_cpu(thread)
        assert 0.05 <= read() < 0.15
    until(lambda: not thread.is_alive())
    assert 0.05 <= read() < 0.15
    assert thread_cpu(threading.Thread())() == 0.0


def test_real_components_add_up_to_what_the_kernel_counts() -> None:
    """Sections, coroutines, another thread, sampled calls and the rest: within a tenth, each and together."""
    account = Account()
    used = resource.getrusage(resource.RUSAGE_SELF)
    before = used.ru_utime + used.ru_stime
    began = time.process_time()
    meter = Meter(account.add, remainder="other", process_s=lambda: time.process_time() - began, rng=random.Random(7))

    async def check() -> None:
        for _ in range(10):
            burn(0.01)
            await asyncio.sleep(0)

    async def main() -> None:
        async def noise() -> None:
            for _ in range(10):
                burn(0.005)
                await asyncio.sleep(0)

        await asyncio.gather(meter.follow(check(), "health"), noise())

    record = meter.sampled("recording", lambda: burn(0.0001))
    with _working(0.1) as thread:
        meter.watch("logs", thread_cpu(thread))
        for _ in range(10):
            with meter.measure("metrics"):
                burn(0.01)
        for _ in range(3000):
            record()
        run(main())
        meter.tick()
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = used.ru_utime + used.ru_stime - before
    assert sum(account.seconds.values()) == pytest.approx(total, rel=0.1)
    for component, seconds in {"health": 0.1, "metrics": 0.1, "logs": 0.1}.items():
        assert account.seconds[component] == pytest.approx(seconds, rel=0.1), component
    # 47 of 3,000 calls were measured: their number is known to within a seventh.
    assert account.seconds["recording"] == pytest.approx(0.3, rel=0.3)
