"""Where a process spends its CPU time: stacks, taken by the kernel's timer of CPU time, weighed by each thread's clock.

`ITIMER_PROF` fires while the process burns CPU; between two bytecodes the main thread then runs the handler, which
sees the very frame that was interrupted. A thread that wakes up by itself sees a uvloop process between two callbacks
nearly always, because that is when the interpreter lock is free (docs/decisions/0015-profiles-by-cpu-timer.md).
A process that sleeps has no samples and no cost. Not for: waiting (traces show it) or memory (memory.py).
"""

from __future__ import annotations

import asyncio
import math
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from opcode import opmap
from types import CodeType, FrameType
from typing import Final, Protocol

from llm_router.observe.meter import thread_clock
from llm_router.observe.profiling.profile import CannotProfile, Frame

MAX_DEPTH: Final = 100
"""Frames of a stack; beyond it the outermost are left out. The deepest of ours has about 40."""

MAX_STACKS: Final = 10_000
"""Different stacks of a profile: 60 s at 100 Hz on both of two busy CPUs have no more samples than that."""

MAX_FRAMES: Final = 20_000
"""Different functions and labels; a program of half a million lines has that many."""

_BUCKETS: Final = 60  # of what is kept for later: a minute of an hour each
_MAX_BUCKET_STACKS: Final = 1000  # 2 Hz for a minute are 120 samples
_MAX_LABEL: Final = 100
_MAX_NAME: Final = 200  # a module and a qualified name of ours have at most 120 characters
_ELSEWHERE_S: Final = 0.001  # the clocks are read one after the other: less than this is only that
_DIGITS: Final = re.compile(r"\d+")
_DEFAULT_TASK: Final = re.compile(r"Task-\d+")
_RESUME: Final = opmap["RESUME"]

Indexes = tuple[int, ...]


class Sink(Protocol):
    """Takes samples; called between two bytecodes of whatever runs, so it must be quick and must not block."""

    def add(self, stack: Indexes, seconds: float, now: float) -> None:
        """`stack`, the outermost first, took CPU time before `now`, of the sampler's clock."""


class Frames:
    """Numbers for functions and labels, so that a stack is a tuple of small integers. 0 stands for all beyond the bound."""

    def __init__(self, max_frames: int = MAX_FRAMES) -> None:
        self._max_frames = max_frames
        self._codes: dict[int, int] = {}  # by identity: to hash a code object takes as long as to walk a stack
        self._labels: dict[str, int] = {}
        self._entries: list[tuple[Frame, CodeType | None, int]] = [(Frame("(other functions)"), None, -1)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Frame:
        return self._entries[index][0]

    def of_label(self, text: str) -> int:
        """The number of a thread, a task or another word."""
        index = self._labels.get(text, -1)
        if index < 0:
            index = self._append(Frame(text), None, -1)
            if index:
                self._labels[text] = index
        return index

    def of_frame(self, frame: FrameType) -> int:
        """The number of the function that `frame` runs. It is kept, so that no other one gets its identity."""
        code = frame.f_code
        index = self._codes.get(id(code), -1)
        if index < 0:
            module = frame.f_globals.get("__name__")
            name = f"{module}:{code.co_qualname}" if isinstance(module, str) else code.co_qualname
            entry = Frame(name[:_MAX_NAME], code.co_filename, code.co_firstlineno)
            index = self._append(entry, code, _first_instruction(code))
            if index:
                self._codes[id(code)] = index
        return index

    def is_entering(self, frame: FrameType) -> bool:
        """Whether `frame` has not done anything yet."""
        return frame.f_lasti <= self._entries[self.of_frame(frame)][2]

    def _append(self, entry: Frame, code: CodeType | None, first: int) -> int:
        if len(self._entries) >= self._max_frames:
            return 0
        self._entries.append((entry, code, first))
        return len(self._entries) - 1


class Stacks:
    """CPU seconds and samples by stack. Beyond `max_stacks` different ones, all others are one."""

    def __init__(self, max_stacks: int = MAX_STACKS) -> None:
        self._max_stacks = max_stacks
        self._found: dict[Indexes, list[float]] = {}

    def add(self, stack: Indexes, seconds: float, now: float = 0.0) -> None:
        """One sample."""
        self.put(stack, seconds, 1)

    def put(self, stack: Indexes, seconds: float, count: int) -> None:
        found = self._found.get(stack)
        if found is None:
            if len(self._found) >= self._max_stacks:
                stack = (0,)
            found = self._found.setdefault(stack, [0.0, 0])
        found[0] += seconds
        found[1] += count

    def items(self) -> Iterator[tuple[Indexes, float, int]]:
        """As they are now; more may come meanwhile."""
        for stack, (seconds, count) in list(self._found.items()):
            yield stack, seconds, int(count)


class Ring:
    """The samples of the last `span_s` seconds, forgotten in sixtieths of that."""

    def __init__(self, span_s: float, now: float) -> None:
        self._bucket_s = span_s / _BUCKETS
        self._buckets: deque[tuple[float, Stacks]] = deque(maxlen=_BUCKETS + 1)
        self._began_at = now
        self._turn(now)

    def add(self, stack: Indexes, seconds: float, now: float) -> None:
        if now - self._buckets[-1][0] >= self._bucket_s:
            self._turn(now)
        self._buckets[-1][1].add(stack, seconds)

    def since(self, at: float, now: float) -> tuple[Stacks, float]:
        """What was added from `at` on, rounded to whole buckets, and the instant from which on that is."""
        found = Stacks()
        at = began_at = max(at, self._began_at, now - self._bucket_s * _BUCKETS)
        for bucket_at, stacks in reversed(tuple(self._buckets)):
            # Its samples are of this time, even if the next one came long after in a process at rest.
            if bucket_at + self._bucket_s <= at:
                break
            began_at = min(at, bucket_at)
            for stack, seconds, count in stacks.items():
                found.put(stack, seconds, count)
        return found, began_at

    def _turn(self, now: float) -> None:
        self._buckets.append((now, Stacks(_MAX_BUCKET_STACKS)))


class Sampler:
    """Takes samples for whoever is attached. There can be one at work in a process: signal and timer belong to it.

    `attach` and `detach` belong into the main thread, where Python's signal handlers run.

    Args:
        clock: monotonic seconds, handed on to the sinks.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.frames = Frames()
        self.faults = 0
        self.cpu_s = 0.0
        """CPU seconds that taking samples has used."""
        self._clock = clock
        self._sinks: tuple[tuple[Sink, float], ...] = ()
        self._is_sampling = False
        self._threads: dict[int, float] = {}
        self._process_s = 0.0
        self._elsewhere_s = 0.0

    def __repr__(self) -> str:
        return f"Sampler(rates={[rate for _, rate in self._sinks]}, frames={len(self.frames)}, faults={self.faults})"

    def attach(self, sink: Sink, rate_hz: float) -> None:
        """Give `sink` `rate_hz` samples for each second of CPU time; the kernel may give fewer (its clock ticks at 100
        to 1000 Hz). Each says how much CPU time it stands for: nothing is lost by that.

        Raises: CannotProfile outside the main thread, or if something else samples this process.
        """
        if threading.current_thread() is not threading.main_thread():
            raise CannotProfile("CPU profiles are taken from the main thread, where Python handles signals")
        holder = signal.getsignal(signal.SIGPROF)
        if holder != self._tick:
            other = getattr(holder, "__self__", None)
            is_free = holder in (signal.SIG_DFL, signal.SIG_IGN) or (isinstance(other, Sampler) and other.is_idle)
            if not is_free:
                raise CannotProfile("something else in this process samples by SIGPROF; stop that first")
            # Not taken back at the end: a signal on its way would then end the process.
            signal.signal(signal.SIGPROF, self._tick)
            signal.siginterrupt(signal.SIGPROF, False)
        # What was spent since the last sample is nobody's: it was not seen where.
        self._process_s, self._elsewhere_s = time.process_time(), 0.0
        self._threads = {
            thread.native_id: cpu_s
            for thread in threading.enumerate()
            if thread.native_id is not None and (cpu_s := thread_cpu_s(thread.native_id)) is not None
        }
        self._sinks = (*self._sinks, (sink, rate_hz))
        self._arm()

    @property
    def is_idle(self) -> bool:
        """Whether nobody is attached."""
        return not self._sinks

    def detach(self, sink: Sink) -> None:
        """`sink` gets no more. One that is not attached is no fault."""
        left = tuple(pair for pair in self._sinks if pair[0] is not sink)
        if len(left) != len(self._sinks):  # else the timer may be somebody else's
            self._sinks = left
            self._arm()

    def _arm(self) -> None:
        rate = max((rate for _, rate in self._sinks), default=0.0)
        period_s = 1.0 / rate if rate > 0.0 else 0.0
        signal.setitimer(signal.ITIMER_PROF, period_s, period_s)

    # -- between two bytecodes of the main thread ----------------------------------------------------------

    def _tick(self, signum: int, frame: FrameType | None) -> None:
        if self._is_sampling or not self._sinks:
            return
        self._is_sampling = True
        began_s = time.thread_time()
        try:
            self._sample(frame)
        except Exception:  # anything that left here would hit code that has nothing to do with it
            self.faults += 1
        finally:
            self.cpu_s += time.thread_time() - began_s
            self._is_sampling = False

    def _sample(self, interrupted: FrameType | None) -> None:
        now, main = self._clock(), threading.main_thread()
        process_s = time.process_time()
        elsewhere_s = self._elsewhere_s + process_s - self._process_s
        self._process_s = process_s
        others: dict[int, FrameType] | None = None
        threads: dict[int, float] = {}
        for thread in threading.enumerate():
            if thread.native_id is None:
                continue
            cpu_s = time.thread_time() if thread is main else thread_cpu_s(thread.native_id)
            if cpu_s is None:
                continue
            threads[thread.native_id] = cpu_s
            before_s = self._threads.get(thread.native_id, 0.0)
            spent_s = cpu_s - (before_s if before_s <= cpu_s else 0.0)  # the number may be another thread's by now
            if spent_s <= 0.0:
                continue
            elsewhere_s -= spent_s
            if thread is main:
                top = interrupted
            else:
                others = sys._current_frames() if others is None else others  # noqa: SLF001 - there is no other way
                top = others.get(thread.ident or 0)
            stack = self._stack(thread, top, self._task() if thread is main else "")
            for sink, _ in self._sinks:
                sink.add(stack, spent_s, now)
        self._threads = threads
        if elsewhere_s > _ELSEWHERE_S:
            stack = (self.frames.of_label("(threads without Python, or that ended)"),)
            for sink, _ in self._sinks:
                sink.add(stack, elsewhere_s, now)
            elsewhere_s = 0.0
        self._elsewhere_s = elsewhere_s

    def _stack(self, thread: threading.Thread, top: FrameType | None, task: str) -> Indexes:
        frames = self.frames
        if top is not None and top.f_back is not None and _is_loop(top.f_back) and frames.is_entering(top):
            # The signal came while the event loop was in C code; this callback is only where Python noticed it.
            top = top.f_back
        found: list[int] = []
        while top is not None and len(found) < MAX_DEPTH:
            found.append(frames.of_frame(top))
            top = top.f_back
        if top is not None:
            found.append(frames.of_label("(outer frames)"))
        if task:
            found.append(frames.of_label(f"task {task}"))
        found.append(frames.of_label(f"thread {label(thread.name)}"))
        found.reverse()
        return tuple(found)

    @staticmethod
    def _task() -> str:
        """What the main thread's event loop is at, in words that are the same for all tasks of a kind."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no loop runs
            return ""
        if task is None:
            return ""
        name = task.get_name()
        if _DEFAULT_TASK.fullmatch(name):
            name = getattr(task.get_coro(), "__qualname__", name)
        return label(name)


def thread_cpu_s(native_id: int) -> float | None:
    """CPU seconds of a thread of this process; None if there is no such thread, or no such clock (not Linux)."""
    if sys.platform != "linux":
        return time.process_time() if native_id == threading.main_thread().native_id else None
    try:
        return time.clock_gettime(thread_clock(native_id))
    except OSError:
        return None


def label(name: str) -> str:
    """The name of a thread or task without what makes each of a kind different, printable and bounded."""
    name = "".join(char if char.isprintable() else "?" for char in name[:_MAX_LABEL])
    return _DIGITS.sub("#", name)


def _first_instruction(code: CodeType) -> int:
    """Where the bytecode of a function begins to do something; what comes before sets it up."""
    instructions = code.co_code[::2]
    return instructions.find(_RESUME) * 2


def _is_loop(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return isinstance(module, str) and module.partition(".")[0] in {"asyncio", "uvloop"}


def rate_bounds(rate_hz: float) -> float:
    """`rate_hz` as the timer takes it: nothing that is no number, at most one each millisecond."""
    return min(1000.0, rate_hz) if math.isfinite(rate_hz) and rate_hz > 0.0 else 0.0
