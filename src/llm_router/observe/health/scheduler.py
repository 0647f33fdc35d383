"""Runs checks: each at its interval with jitter, in bounded time, a few at once, whatever they do.

One task decides when a check is due. A run of it is a task of its own that has a slot and a deadline: a check that
raises, returns nonsense or calls `sys.exit` has failed; one that does not end is cancelled; one that will not be
cancelled, or blocks its thread, gives its slot back, is reported with every further turn, and is not started again
before it has ended. What endpoints show is what was found last: asking for it never runs a check.

    wait for the next due check ─ due ─ wait for a slot ─ run with deadline ─ outcome ─ Standing (fall, rise) ─ due again

Not for: what a check finds (the functions handed in), or the word for all of them (report.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from random import Random
from types import TracebackType
from typing import Any, Final, Protocol, Self, cast

import msgspec

from llm_router.observe.health.checks import (
    Check,
    CheckFunction,
    Status,
    failed,
    outcome_of,
    outcome_of_error,
    weighed,
)
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.observe.health.standing import Standing, told

_log = logging.getLogger(__name__)

JITTER: Final = 0.1
"""Of an interval, this much more or less: routers that were started together do not probe a database together."""

MAX_CHECKS: Final = 500
"""Each is a label value and an entry of every report."""

MAX_NAME: Final = 100

TURN_S: Final = 1.0
"""The scheduler looks about at least this often, so that one that has stopped shows."""

_CANCEL_GRACE_S: Final = 0.5
"""What a cancelled check may take to clean up before it counts as one that will not end."""

_CLOSE_GRACE_S: Final = 2.0


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a check found.

    Args:
        check: the outcome; the status is already weighed: what is not critical degrades at most.
        duration_s: of the run.
        time: Unix seconds at the run's end.
        error: why there is no outcome of the function's own: it raised, hung or returned nonsense; else empty.
    """

    name: str
    check: Check
    duration_s: float
    time: float
    error: str = ""

    @property
    def is_success(self) -> bool:
        """Whether the function ran to its end and said something; not whether it was content."""
        return not self.error


class CheckState(msgspec.Struct, frozen=True, kw_only=True):
    """How a check stands, when it was asked for.

    Args:
        status: after fall and rise; `initializing` before the first outcome.
        last: what the last run found; None before the first.
        age_s: seconds since the last run's end; 0 before the first.
        failures, successes: in a row; `fall` and `rise` are how many count.
        flaps: changes between healthy and not within the last hour; `transitions` since the check was added.
    """

    name: str
    status: Status
    is_critical: bool
    last: CheckResult | None
    age_s: float
    failures: int
    successes: int
    fall: int
    rise: int
    flaps: int
    transitions: int
    interval_s: float


class SchedulerState(msgspec.Struct, frozen=True, kw_only=True):
    """Every check, and whether the scheduler itself is well.

    Args:
        is_running: whether checks run by themselves; `is_started`: whether they should.
        overdue_s: how long ago the check that waits longest should have run, beyond its interval and timeout; 0 if none
            does. A scheduler that was not started is not overdue.
        overdue: the checks that wait so long.
        hanging: checks of which a run would not end.
    """

    checks: tuple[CheckState, ...]
    is_running: bool
    is_started: bool
    overdue_s: float
    overdue: tuple[str, ...]
    hanging: tuple[str, ...]


class _Hanging(Protocol):
    """A run that did not end when it should have."""

    def is_alive(self) -> bool: ...


class _Entry:
    """One check that was added."""

    def __init__(
        self,
        name: str,
        function: CheckFunction,
        *,
        is_critical: bool,
        interval_s: float,
        timeout_s: float,
        standing: Standing,
        due_at: float,
    ) -> None:
        self.name = name
        self.function = function
        self.is_critical = is_critical
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self.standing = standing
        self.due_at = due_at
        self.last: CheckResult | None = None
        self.ended_at = 0.0
        self.run: asyncio.Task[CheckResult] | None = None
        self.hanging: _Hanging | None = None

    def __repr__(self) -> str:
        return f"<check {self.name} {self.standing!r} running={self.run is not None}>"


class HealthChecks:
    """The checks of one process. Lives in one event loop; every method is called there.

    Works without `start` too: then checks run when they are asked to.

    Args:
        settings: `checks` has the last word about interval, timeout and weight of a check, and may switch it off.
        clock, wall: monotonic and Unix seconds.
        on_result: called with the name, the outcome (its status weighed, before fall and rise) and the seconds of
            every run; must not raise.
        on_transition: called with the name, the old and the new status when a check has turned.
        reserved: names that somebody else has taken, with the reason that `add_check` shows.
        measure: given a coroutine that the checks run in the loop, returns what to await instead; for accounting.
    """

    def __init__(
        self,
        settings: HealthSettings,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: Random,
        on_result: Callable[[str, Check, float], None] | None = None,
        on_transition: Callable[[str, Status, Status], None] | None = None,
        reserved: Mapping[str, str] | None = None,
        measure: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]] | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._on_result = on_result
        self._on_transition = on_transition
        self._reserved = dict(reserved or {})
        self._measure = measure
        self._entries: dict[str, _Entry] = {}
        self._disabled: set[str] = set()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._runs: set[asyncio.Task[CheckResult]] = set()
        self._left: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    # -- which checks there are -----------------------------------------------------------------------------

    def add_check(
        self,
        name: str,
        function: CheckFunction,
        *,
        critical: bool = False,
        interval: float | None = None,
        timeout: float | None = None,
        fall: int | None = None,
        rise: int | None = None,
    ) -> None:
        """Run `function` from now on; a check of this name that is there already is replaced.

        Args:
            name: 1 to `MAX_NAME` printable characters; it becomes a label value.
            function: see `checks`. A coroutine function runs in the loop; another one in a thread of its own.
            critical: whether the router is useless while this fails.
            interval, timeout: seconds; None: as the settings say.
            fall, rise: failures, and successes, in a row until the check turns; None: as the settings say.

        Raises: ValueError for a name or number that cannot be used, or for too many checks.
        """
        self._check_name(name)
        if not callable(function):
            raise ValueError(f"the check {name!r} is no function but {type(function).__name__}")
        own = self._settings.checks.get(name, CheckSettings())
        entry = _Entry(
            name,
            function,
            is_critical=critical if own.critical is None else own.critical,
            interval_s=_seconds(name, "interval", own.interval_s, interval, self._settings.interval_s),
            timeout_s=_seconds(name, "timeout", own.timeout_s, timeout, self._settings.timeout_s),
            standing=Standing(
                _count(name, "fall", fall, self._settings.fall), _count(name, "rise", rise, self._settings.rise)
            ),
            due_at=self._clock(),
        )
        if not own.enabled:
            self._disabled.add(name)
            return
        if name not in self._entries and len(self._entries) >= MAX_CHECKS:
            raise ValueError(f"there are {MAX_CHECKS} checks already; take one away with remove_check")
        before = self._entries.pop(name, None)
        if before is not None:
            entry.hanging = before.hanging
            if before.run is not None:
                before.run.cancel()
        self._entries[name] = entry
        self._news.set()

    def remove_check(self, name: str) -> None:
        """Run it no more; a run in progress is cancelled.

        Raises: ValueError for an unknown name.
        """
        entry = self._entry(name)
        del self._entries[entry.name]
        if entry.run is not None:
            entry.run.cancel()

    def names(self) -> tuple[str, ...]:
        """The checks, in the order in which they were added."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(
                f"a check cannot be called {str(name)[:MAX_NAME]!r}: its name is 1 to {MAX_NAME} printable characters"
            )
        if name in self._reserved:
            raise ValueError(f"a check cannot be called {name!r}: {self._reserved[name]}")

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        if name in self._disabled:
            raise ValueError(f"the check {name!r} is switched off by health.checks.{name}.enabled")
        known = ", ".join(sorted(self._entries)) or "none"
        raise ValueError(f"there is no check {name!r}; there are: {known}")

    # -- running them -----------------------------------------------------------------------------------------

    async def run_check(self, name: str) -> CheckResult:
        """Run a check now, whenever it is due; one that is running is waited for, not run twice.

        The outcome counts like that of any other run. Cancelling this does not end the run.

        Raises: ValueError for an unknown name; RuntimeError once closed.
        """
        return await self._finished(self._begin(self._entry(name)))

    async def run_all_checks(self) -> dict[str, CheckResult]:
        """Run every check now, as many at once as the settings allow; by name."""
        runs = {name: self._begin(entry) for name, entry in list(self._entries.items())}
        results = await asyncio.gather(*(self._finished(run) for run in runs.values()), return_exceptions=True)
        found = {}
        for name, result in zip(runs, results, strict=True):
            if isinstance(result, CheckResult):
                found[name] = result
            elif name in self._entries:  # else it was taken away meanwhile
                raise result
        return found

    def run_due(self) -> list[str]:
        """Begin what is due now. Returns the names; `start` calls this by itself."""
        now = self._clock()
        due = [entry for entry in self._entries.values() if entry.run is None and entry.due_at <= now]
        for entry in sorted(due, key=lambda entry: entry.due_at):
            self._begin(entry)
        return [entry.name for entry in due]

    @property
    def is_running(self) -> bool:
        """Whether checks run by themselves."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Run checks by themselves from now on, every one at once first. A second call changes nothing.

        Raises: RuntimeError once closed.
        """
        if self._is_closed:
            raise RuntimeError("these health checks are closed; make new ones")
        if not self.is_running:
            now = self._clock()
            for entry in self._entries.values():
                entry.due_at = max(entry.due_at, now)
            self._task = asyncio.get_running_loop().create_task(self._measured(self._schedule), name="health checks")
            self._task.add_done_callback(_scheduler_ended)

    async def aclose(self) -> None:
        """End every run, within two seconds; one that will not end is left behind. May be called twice."""
        self._is_closed = True
        for task in (self._task, *self._runs, *self._left):
            if task is not None:
                task.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CLOSE_GRACE_S
        # The functions of cancelled runs are among those left only when the runs have ended.
        while (tasks := {*self._runs, *self._left}) and (left_s := deadline - loop.time()) > 0:
            await asyncio.wait(tasks, timeout=left_s)
        if self._task is not None:
            await asyncio.wait({self._task})
        self._task = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _schedule(self) -> None:
        while True:
            self.run_due()
            self._news.clear()
            now = self._clock()
            waiting = (entry.due_at for entry in self._entries.values() if entry.run is None)
            wait_s = min(max(min(waiting, default=math.inf) - now, 0.0), TURN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()

    def _begin(self, entry: _Entry) -> asyncio.Task[CheckResult]:
        if self._is_closed:
            raise RuntimeError("these health checks are closed; make new ones")
        if entry.run is None:
            entry.run = asyncio.get_running_loop().create_task(
                self._measured(self._run, entry), name=f"health check {entry.name}"
            )
            self._runs.add(entry.run)
            entry.run.add_done_callback(functools.partial(self._ended, entry))
        return entry.run

    async def _measured(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        # The coroutine is made here: a task that is cancelled before its first step would leave it unawaited.
        running = work(*arguments)
        return await (running if self._measure is None else self._measure(running))

    async def _finished(self, run: asyncio.Task[CheckResult]) -> CheckResult:
        try:
            return await asyncio.shield(run)
        except asyncio.CancelledError:
            if run.cancelled() and not cast("asyncio.Task[Any]", asyncio.current_task()).cancelling():
                raise RuntimeError("the check was taken away, or all were closed, while it ran") from None
            raise

    def _ended(self, entry: _Entry, run: asyncio.Task[CheckResult]) -> None:
        self._runs.discard(run)
        entry.run = None
        jitter = 1.0 + JITTER * (2.0 * self._rng.random() - 1.0)
        entry.due_at = self._clock() + entry.interval_s * jitter
        self._news.set()
        if not run.cancelled() and (error := run.exception()) is not None:
            _log.error("a fault of the health checks themselves, in %s", entry.name, exc_info=error)

    async def _run(self, entry: _Entry) -> CheckResult:
        async with self._slots:
            began_at = self._clock()
            try:
                outcome, error = await self._outcome(entry), ""
            except _NoOutcome as problem:
                error = str(problem)
                outcome = failed(error)
            now = self._clock()
        outcome = msgspec.structs.replace(outcome, status=weighed(outcome.status, is_critical=entry.is_critical))
        result = CheckResult(name=entry.name, check=outcome, duration_s=now - began_at, time=self._wall(), error=error)
        if self._entries.get(entry.name) is entry:
            self._take(entry, result, now)
        return result

    def _take(self, entry: _Entry, result: CheckResult, now: float) -> None:
        entry.last, entry.ended_at = result, now
        old = entry.standing.status
        has_turned = entry.standing.take(result.check.status, now)
        if self._on_result is not None:
            self._on_result(entry.name, result.check, result.duration_s)
        if has_turned:
            told(_log, entry.name, entry.standing.status, result.check.message)
            if self._on_transition is not None:
                self._on_transition(entry.name, old, entry.standing.status)

    async def _outcome(self, entry: _Entry) -> Check:
        """What the function says within its time. Raises: _NoOutcome."""
        if entry.hanging is not None:
            if entry.hanging.is_alive():
                raise _NoOutcome("Check failed: an earlier run of it hangs and cannot be ended")
            entry.hanging = None
        thread = None if _is_async(entry.function) else _Thread(entry.name, entry.function)
        work = self._measured(_called, entry.function) if thread is None else thread.result()
        call = asyncio.get_running_loop().create_task(work, name=f"health check {entry.name}: function")
        try:
            done, _ = await asyncio.wait({call}, timeout=entry.timeout_s)
            if not done:
                call.cancel()
                await asyncio.wait({call}, timeout=_CANCEL_GRACE_S)
        except asyncio.CancelledError:
            self._leave(call)
            raise
        if not done:
            if not call.done():
                self._leave(call)
                entry.hanging = _Task(call)
            elif not call.cancelled():
                call.exception()  # what it said too late is not asked for
            if thread is not None and thread.is_alive():
                entry.hanging = thread
            raise _NoOutcome(f"Check failed: it did not end within {entry.timeout_s:g} s")
        if call.cancelled():
            raise _NoOutcome("Check failed: it cancelled itself")
        try:
            return outcome_of(call.result())
        except Exception as error:
            raise _NoOutcome(outcome_of_error(error).message) from None

    def _leave(self, call: asyncio.Task[Any]) -> None:
        """Cancel it, and see to it that it is not forgotten before it ends."""
        call.cancel()
        self._left.add(call)
        call.add_done_callback(self._left_ended)

    def _left_ended(self, call: asyncio.Task[Any]) -> None:
        self._left.discard(call)
        if not call.cancelled():
            call.exception()  # retrieved, so that the loop does not complain

    # -- how they stand -----------------------------------------------------------------------------------------

    def state(self) -> SchedulerState:
        """Every check as it stands; runs nothing."""
        now = self._clock()
        overdue = dict(self._overdue(now)) if self._task is not None else {}
        return SchedulerState(
            checks=tuple(self._state_of(entry, now) for entry in self._entries.values()),
            is_running=self.is_running,
            is_started=self._task is not None,
            overdue_s=max(overdue.values(), default=0.0),
            overdue=tuple(overdue),
            hanging=tuple(
                name for name, entry in self._entries.items() if entry.hanging is not None and entry.hanging.is_alive()
            ),
        )

    def check_state(self, name: str) -> CheckState:
        """How one check stands. Raises: ValueError for an unknown name."""
        return self._state_of(self._entry(name), self._clock())

    def _overdue(self, now: float) -> Iterator[tuple[str, float]]:
        for name, entry in self._entries.items():
            late_s = now - entry.due_at - entry.interval_s - entry.timeout_s
            if late_s > 0:
                yield name, late_s

    @staticmethod
    def _state_of(entry: _Entry, now: float) -> CheckState:
        standing = entry.standing
        return CheckState(
            name=entry.name,
            status=standing.status,
            is_critical=entry.is_critical,
            last=entry.last,
            age_s=now - entry.ended_at if entry.last is not None else 0.0,
            failures=standing.failures,
            successes=standing.successes,
            fall=standing.fall,
            rise=standing.rise,
            flaps=standing.flaps(now),
            transitions=standing.transitions,
            interval_s=entry.interval_s,
        )


def _scheduler_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("the health checks do not run any more", exc_info=error)


# -- calling what may do anything -----------------------------------------------------------------------


class _NoOutcome(Exception):
    """The function said nothing that counts; the message says why."""


class _Task:
    """A task as something that hangs."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def is_alive(self) -> bool:
        return not self._task.done()


class _Thread:
    """A function in a thread of its own.

    No pool: a function that never returns would keep a place in it, and the interpreter from ending. There are never
    more threads than checks, as a check is not started before its last run has ended.
    """

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Future[object] = self._loop.create_future()
        self._function = function
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name=f"health-{name[:40]}", daemon=True)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def result(self) -> object:
        """What the function returned; if that can be awaited, what comes of it. Raises what it raised."""
        self._thread.start()
        value = await self._said
        return await value if inspect.isawaitable(value) else value

    def _work(self) -> None:
        value: object = None
        problem: Exception | None = None
        try:
            value = self._function()
        except Exception as error:
            problem = error
        except BaseException as error:  # SystemExit is what a function must not end more than itself with
            problem = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._tell, value, problem)

    def _tell(self, value: object, problem: Exception | None) -> None:
        if self._said.done():
            if inspect.iscoroutine(value):
                value.close()
        elif problem is None:
            self._said.set_result(value)
        else:
            # A future takes no StopIteration.
            self._said.set_exception(
                RuntimeError(f"StopIteration: {problem}") if isinstance(problem, StopIteration) else problem
            )


async def _called(function: CheckFunction) -> object:
    """What a coroutine function returns. Raises what it raises, as an Exception: SystemExit would end the loop."""
    try:
        return await cast("Awaitable[object]", function())
    except (Exception, asyncio.CancelledError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _is_async(function: CheckFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


# -- numbers that are handed in --------------------------------------------------------------------------


def _seconds(name: str, what: str, *candidates: object) -> float:
    """The first of them that is given."""
    value = next(candidate for candidate in candidates if candidate is not None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"the {what} of the check {name!r} is {value!r}; it is a number of seconds above 0")
    return float(value)


def _count(name: str, what: str, *candidates: object) -> int:
    value = next(candidate for candidate in candidates if candidate is not None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} of the check {name!r} is {value!r}; it is a whole number from 1")
    return value
