"""Who used the CPU: sections of code, steps of coroutines and threads, each on the account of a component.

A `Meter` belongs to one process. What is measured inside something else that is measured counts once, for the inner one.
With a remainder, everything that nobody claims is a component too, so that the sum is what the process used. `tick`
passes on what has come together; nothing runs by itself.
Not for: the time a request takes, or CPU of other processes (observe.metrics.system).
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
R = TypeVar("R")

Add = Callable[[str, float], None]
"""Takes a component and the CPU seconds that it used since it was told last."""

ONE_IN: Final = 64
"""Of calls on the request path, one in so many is measured: reading the clock twice takes a tenth of what is measured."""

_CALIBRATIONS: Final = 200


class Meter:
    """CPU seconds by component.

    Safe across threads, but for `tick`, which one thread calls. One component has to be read by one means: a thread that
    is watched must not measure sections.

    Args:
        add: receives the seconds, from `tick` only.
        remainder: the component that has what no other one has; empty: nobody has it.
        process_s: CPU seconds of this process; `thread_s` of the calling thread.
        rng: decides which calls are measured.
    """

    def __init__(
        self,
        add: Add,
        *,
        remainder: str = "",
        process_s: Callable[[], float] = time.process_time,
        thread_s: Callable[[], float] = time.thread_time,
        rng: random.Random | None = None,
    ) -> None:
        self._add = add
        self._remainder = remainder
        self._process_s = process_s
        self._thread_s = thread_s
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._open = _Open()
        self._measured: dict[str, float] = {}
        self._watched: list[_Watched] = []
        self._told: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Meter({', '.join(f'{name}={spent:.3f}s' for name, spent in sorted(self._told.items()))})"

    def measure(self, component: str) -> _Section:
        """`with meter.measure("metrics"):` around code that does not await; in any thread that is not watched."""
        return _Section(component, self._open, self._thread_s, self._charge)

    async def follow(self, coroutine: Coroutine[Any, Any, R], component: str) -> R:
        """The coroutine, with the CPU of each of its steps; tasks that it starts are not followed.

        Returns and raises what the coroutine does. Cancelling this cancels the coroutine.
        """
        return await self._drive(coroutine, component)

    @types.coroutine
    def _drive(self, coroutine: Coroutine[Any, Any, R], component: str) -> Generator[Any, Any, R]:
        sent: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                with self.measure(component):
                    wanted = coroutine.send(sent) if thrown is None else coroutine.throw(thrown)
            except StopIteration as end:
                result: R = end.value
                return result
            sent = thrown = None
            try:
                sent = yield wanted
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # also cancellation: it is the coroutine's to handle
                thrown = error

    def watch(self, component: str, cpu_s: Callable[[], float]) -> None:
        """Count what `cpu_s` says, a total that grows; see `thread_cpu`. What it had before this counts too."""
        with self._lock:
            self._watched.append(_Watched(component, cpu_s))

    def unwatch(self, cpu_s: Callable[[], float]) -> None:
        """Ask it for the last time; what it had stays counted."""
        with self._lock:
            left = [watched for watched in self._watched if watched.cpu_s == cpu_s]
            self._watched = [watched for watched in self._watched if watched not in left]
        for watched in left:
            self._charge(watched.component, watched.read())

    def sampled(
        self, component: str, function: Callable[[*Arguments], R], one_in: int = ONE_IN
    ) -> Callable[[*Arguments], R]:
        """`function`, of whose calls one in `one_in` on average is measured and counted as so many.

        Costs 0.1 us a call, so it takes no arguments by name. For one thread. What reading the clock takes is taken off. An exception passes and its call counts all the same.
        """
        thread_s, lowest = self._thread_s, self._clock_cost()
        draw, widest = self._rng.randrange, 2 * one_in
        left = draw(1, widest)  # 1 to 2n-1, so n on average: a fixed step could fall in with a rhythm of the requests

        def run(*arguments: *Arguments) -> R:
            nonlocal left
            left -= 1
            if left:
                return function(*arguments)
            left = draw(1, widest)
            began = thread_s()
            try:
                return function(*arguments)
            finally:
                spent = thread_s() - began - lowest
                if spent > 0:
                    self._charge(component, spent * one_in)

        return run

    def _clock_cost(self) -> float:
        """CPU seconds between two readings of the clock with nothing in between."""
        thread_s = self._thread_s
        return min(-(thread_s() - thread_s()) for _ in range(_CALIBRATIONS))

    def tick(self) -> None:
        """Tell `add` what each component has used since the last time. Costs some microseconds."""
        with self._lock:
            totals = dict(self._measured)
            for watched in self._watched:
                totals[watched.component] = totals.get(watched.component, 0.0) + watched.read()
        if self._remainder:
            # Read last, so that it has everything that the others have. A section that is open now counts as remainder
            # until it is closed; as a counter never goes down, the remainder then stands still until it fits again.
            claimed = sum(spent for name, spent in totals.items() if name != self._remainder)
            totals[self._remainder] = max(self._told.get(self._remainder, 0.0), self._process_s() - claimed)
        for name, total in totals.items():
            grown = total - self._told.get(name, 0.0)
            if grown > 0:
                self._told[name] = total
                self._add(name, grown)

    def _charge(self, component: str, spent: float) -> None:
        with self._lock:
            self._measured[component] = self._measured.get(component, 0.0) + spent


class _Open(threading.local):
    """The innermost section of each thread."""

    section: _Section | None = None


class _Section:
    """One run through a piece of code. `inner_s` is what sections inside it used."""

    __slots__ = ("_began_s", "_charge", "_component", "_open", "_outer", "_thread_s", "inner_s")

    def __init__(self, component: str, opened: _Open, thread_s: Callable[[], float], charge: Add) -> None:
        self._component = component
        self._open = opened
        self._thread_s = thread_s
        self._charge = charge
        self._began_s = 0.0
        self._outer: _Section | None = None
        self.inner_s = 0.0

    def __enter__(self) -> None:
        self._outer, self._open.section = self._open.section, self
        self._began_s = self._thread_s()

    def __exit__(self, *exception: object) -> None:
        spent = self._thread_s() - self._began_s
        outer = self._open.section = self._outer
        if outer is not None:
            outer.inner_s += spent
        self._charge(self._component, spent - self.inner_s)


class _Watched:
    """A total that somebody else keeps."""

    __slots__ = ("_highest", "component", "cpu_s")

    def __init__(self, component: str, cpu_s: Callable[[], float]) -> None:
        self.component = component
        self.cpu_s = cpu_s
        self._highest = 0.0

    def read(self) -> float:
        self._highest = max(self._highest, self.cpu_s())
        return self._highest


def thread_clock(native_id: int) -> int:
    """The clock of a thread's CPU time, for `time.clock_gettime` in the same process, which raises OSError when the thread
    has ended. Linux.

    As the kernel defines it: per thread (4), by the scheduler's account (2). The C library's function, which takes the
    pthread, would read memory that is no longer there if the thread has just ended.
    """
    return (~native_id << 3) | 6


def thread_cpu(thread: threading.Thread) -> Callable[[], float]:
    """Reads the CPU seconds of a thread that was started, from any thread; after its end, what was read last.

    Where the system does not tell (anything but Linux), it is 0, and the thread's CPU is the remainder's.
    """
    if not sys.platform.startswith("linux") or not thread.native_id:
        return lambda: 0.0
    clock = thread_clock(thread.native_id)
    last = 0.0

    def read() -> float:
        nonlocal last
        with contextlib.suppress(OSError):
            last = max(last, time.clock_gettime(clock))
        return last

    return read
