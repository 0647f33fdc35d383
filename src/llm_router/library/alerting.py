"""Alert rules as functions: each is asked at an interval about the metrics of now, and its state can be looked at.

    ok ── condition holds ── pending ── for so long ── firing ── it no longer holds ── ok
    error: the condition raised, hung, or returned nonsense

Conditions run in a thread, each in bounded time: one that hangs or raises is counted and stops no other.
Not for: delivering anything, or rules in files of Prometheus.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from llm_router.library.current import Current
from llm_router.observe.logs.redact import clean
from llm_router.observe.metrics.slots import Collected
from llm_router.observe.timestamp import timestamp

_log = logging.getLogger(__name__)

Severity = Literal["critical", "error", "warning", "info"]
State = Literal["waiting", "ok", "pending", "firing", "error"]
Condition = Callable[[Current], object]

INTERVAL_S: Final = 5.0
"""How often rules are asked: as often as the router looks at its own metrics."""

TIMEOUT_S: Final = 5.0
"""What one condition may take; one that only compares takes microseconds."""

MAX_RULES: Final = 1000
_MAX_NAME: Final = 200
_MAX_MESSAGE: Final = 1000
_HEALTH: Final = "health:"
_KEYS: Final = ("name", "condition", "severity", "message", "for", "labels")
_HEALTH_WORDS: Final[Mapping[float, Severity]] = {0.0: "critical", 0.5: "warning"}


class AlertState(msgspec.Struct, frozen=True, kw_only=True):
    """How a rule stands.

    Args:
        state: waiting before the first evaluation.
        since: when that began, ISO 8601, UTC; empty while it waits.
        value: what the condition said, or else what it read last; None if that is not known.
        error: why there is no answer, while the state is error.
        for_s: how long the condition must hold.
        evaluations, failures: since the rule was added.
    """

    name: str
    state: State
    severity: Severity
    message: str
    labels: Mapping[str, str]
    since: str
    value: float | None
    error: str
    for_s: float
    evaluations: int
    failures: int


class HealthWord(NamedTuple):
    """How a health check stands: 1 healthy, 0.5 degraded, 0 critical; and what it says."""

    value: float
    message: str


class Look(NamedTuple):
    """What rules are asked about: metrics (None where they are not to be seen) and checks by name."""

    metrics: Collected | None = None
    health: Mapping[str, HealthWord] = {}


class _Rule:
    def __init__(
        self, name: str, condition: Condition, severity: Severity, message: str, for_s: float, labels: dict[str, str]
    ) -> None:
        self.name = name
        self.condition = condition
        self.severity = severity
        self.message = message
        self.for_s = for_s
        self.labels = labels
        self.state: State = "waiting"
        self.since = 0.0
        self.held_at: float | None = None
        self.value: float | None = None
        self.error = ""
        self.evaluations = 0
        self.failures = 0
        self.thread: threading.Thread | None = None

    def shown(self) -> AlertState:
        return AlertState(
            name=self.name,
            state=self.state,
            severity=self.severity,
            message=self.message,
            labels=dict(self.labels),
            since=timestamp(self.since) if self.since else "",
            value=None if self.value is None or not math.isfinite(self.value) else self.value,
            error=self.error,
            for_s=self.for_s,
            evaluations=self.evaluations,
            failures=self.failures,
        )


class _Asker:
    """A thread that asks one condition after the other, until it is closed; what it is asking then it ends first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: queue.SimpleQueue[tuple[Condition, Current, asyncio.Future[object]] | None] = queue.SimpleQueue()
        self.is_asking = False
        self.thread = threading.Thread(target=self._work, name="alert rules", daemon=True)
        self.thread.start()

    def ask(self, condition: Condition, current: Current) -> asyncio.Future[object]:
        """What the condition returns, or raises. One at a time."""
        answer: asyncio.Future[object] = self._loop.create_future()
        self.is_asking = True
        self._jobs.put((condition, current, answer))
        return answer

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            condition, current, answer = job
            result, error = None, None
            try:
                result = condition(current)
            except BaseException as raised:  # `sys.exit` too: it is somebody's function
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._tell, answer, result, error)

    def _tell(self, answer: asyncio.Future[object], result: object, error: BaseException | None) -> None:
        self.is_asking = False
        if answer.done():
            return  # nobody waits any more
        if error is None:
            answer.set_result(result)
        elif isinstance(error, Exception) and not isinstance(error, (StopIteration, TimeoutError)):
            answer.set_exception(error)
        else:  # what would mean something to us, or cannot be raised from a future
            answer.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


class Alerting:
    """The rules, and how they stand. Belongs to one event loop; `await start()` has them evaluated by themselves.

    Args:
        look: called at each evaluation.
        interval_s, timeout_s: seconds; the latter for one condition.
        clock, wall: monotonic and Unix seconds.
        on_failure: called when a condition gave no answer.
    """

    def __init__(
        self,
        look: Callable[[], Look] = Look,
        *,
        enabled: bool = True,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.enabled = enabled
        self._look = look
        self._interval_s = _positive("interval", interval_s)
        self._timeout_s = _positive("timeout", timeout_s)
        self._clock = clock
        self._wall = wall
        self._on_failure = on_failure
        self._rules: dict[str, _Rule] = {}
        self._of_health: dict[str, _Rule] = {}
        self._before: tuple[float, Collected] | None = None
        self._task: asyncio.Task[None] | None = None
        self._asker: _Asker | None = None
        self._evaluating = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Alerting {len(self._rules)} rules, {len(self.firing())} firing>"

    # -- rules -----------------------------------------------------------------------------------------------

    def add_rule(
        self,
        name: str | Mapping[str, Any],
        condition: Condition | None = None,
        severity: str = "warning",
        message: str = "",
        *,
        for_: float = 0.0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Have a rule evaluated from now on; one of this name is replaced.

        Args:
            name: or all of it as a mapping with name, condition, severity, message, for and labels.
            condition: called with `Current`; returns True while there is something to tell, or (that, a value).
            severity: critical, error, warning or info.
            message: for people.
            for_: seconds that the condition must hold before the rule fires.

        Raises: ValueError naming what cannot be used.
        """
        if isinstance(name, Mapping):
            given = dict(name)
            if unknown := [key for key in given if key not in _KEYS]:
                raise ValueError(f"a rule has no {str(unknown[0])[:100]!r}; it has {', '.join(_KEYS)}")
            self.add_rule(
                given.get("name", ""),
                given.get("condition"),
                given.get("severity", severity),
                given.get("message", message),
                for_=given.get("for", for_),
                labels=given.get("labels", labels),
            )
            return
        if not _is_name(name):
            raise ValueError(f"a rule needs a name of 1 to {_MAX_NAME} printable characters, not {str(name)[:100]!r}")
        if name.startswith(_HEALTH):
            raise ValueError(f"a rule cannot be called {name!r}: what begins with {_HEALTH!r} stands for health checks")
        if isinstance(condition, str):
            raise ValueError(f"the condition of {name!r} is text; it is a function that is given the metrics")
        if not callable(condition):
            raise ValueError(f"the condition of {name!r} is {type(condition).__name__}; it is a function")
        word = next((word for word in get_args(Severity) if word == severity), None)
        if word is None:
            raise ValueError(f"the severity of {name!r} is {severity!r}; it is {', '.join(get_args(Severity))}")
        for_s = _number(f"how long {name!r} must hold", for_)
        if name not in self._rules and len(self._rules) >= MAX_RULES:
            raise ValueError(f"there are {MAX_RULES} rules already; take one away with remove_rule")
        texts = {str(key): str(value) for key, value in (labels or {}).items()}
        self._rules[name] = _Rule(name, condition, word, str(message)[:_MAX_MESSAGE] or name, for_s, texts)

    def remove_rule(self, name: str) -> None:
        """Evaluate it no more. Raises: ValueError for an unknown name."""
        self._rule(name)
        del self._rules[name]

    def state(self, name: str) -> AlertState:
        """How one rule stands; that of a health check is called `health:NAME`. Raises: ValueError for an unknown name."""
        return self._rule(name).shown()

    def rules(self) -> list[AlertState]:
        """How all rules stand, in the order in which they were added; those of health checks last."""
        return [rule.shown() for rule in (*self._rules.values(), *self._of_health.values())]

    def firing(self) -> list[AlertState]:
        """Those that fire."""
        return [state for state in self.rules() if state.state == "firing"]

    def _rule(self, name: str) -> _Rule:
        rule = self._rules.get(name) or self._of_health.get(name)
        if rule is None:
            raise ValueError(f"there is no rule {name!r}; there are: {', '.join(sorted(self._rules)) or 'none'}")
        return rule

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether rules are evaluated by themselves."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Evaluate by itself from now on, at once first. A second call does nothing; nor does one where it is off."""
        if self.enabled and not self.is_running:
            self._task = asyncio.create_task(self._run(), name="llm-router alerting")

    async def stop(self) -> None:
        """Evaluate no more; the states stay. A second call does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            try:
                await self.evaluate()
            except Exception:  # the next look may be better
                _log.exception("alert rules could not be evaluated")
            await asyncio.sleep(self._interval_s)

    # -- evaluating ------------------------------------------------------------------------------------------

    async def evaluate(self) -> None:
        """Ask every rule once, now."""
        async with self._evaluating:
            look, now = self._look(), self._clock()
            self._follow_health(look.health)
            before, seconds = None, 0.0
            if self._before is not None:
                before, seconds = self._before[1], now - self._before[0]
            self._before = None if look.metrics is None else (now, look.metrics)
            metrics = Collected([]) if look.metrics is None else look.metrics
            words = {name: word.value for name, word in look.health.items()}
            try:
                for rule in list(self._rules.values()):
                    if self._rules.get(rule.name) is rule:  # else it was replaced meanwhile
                        await self._ask(rule, Current(metrics, before, seconds, words))
            finally:
                self._leave_asker()

    async def _ask(self, rule: _Rule, current: Current) -> None:
        rule.evaluations += 1
        if rule.thread is not None and rule.thread.is_alive():
            self._fail(rule, f"it has been running for more than {self._timeout_s:g} s")
            return
        rule.thread = None
        try:
            holds, value = _answer(await self._called(rule, current))
        except TimeoutError:
            self._fail(rule, f"it did not answer within {self._timeout_s:g} s")
        except Exception as error:
            self._fail(rule, f"{type(error).__name__}: {error}")
        else:
            self._take(rule, holds, current.read if value is None else value)

    async def _called(self, rule: _Rule, current: Current) -> object:
        asker = self._asker
        if asker is None:
            asker = self._asker = _Asker(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asker.ask(rule.condition, current)
        except BaseException:
            if asker.is_asking:  # it hangs, or nobody waits any more: the others get another thread
                rule.thread = asker.thread
                self._leave_asker()
            raise

    def _leave_asker(self) -> None:
        asker, self._asker = self._asker, None
        if asker is not None:
            asker.close()

    def _take(self, rule: _Rule, holds: bool, value: float | None) -> None:
        now = self._clock()
        rule.value, rule.error = value, ""
        if not holds:
            rule.held_at = None
            self._turn(rule, "ok")
            return
        if rule.held_at is None:
            rule.held_at = now
        self._turn(rule, "firing" if now - rule.held_at >= rule.for_s else "pending")

    def _fail(self, rule: _Rule, problem: str) -> None:
        rule.failures += 1
        rule.error = clean(problem, _MAX_MESSAGE)
        self._on_failure()
        self._turn(rule, "error")

    def _turn(self, rule: _Rule, state: State) -> None:
        if rule.state == state:
            return
        former, rule.state, rule.since = rule.state, state, self._wall()
        if state == "firing":
            _log.warning("alert %s (%s) is firing: %s", rule.name, rule.severity, rule.message)
        elif state == "error":
            _log.warning("the condition of the alert rule %s gives no answer: %s", rule.name, rule.error)
        elif former in ("firing", "error"):
            _log.info("alert %s is %s", rule.name, state)

    def _follow_health(self, health: Mapping[str, HealthWord]) -> None:
        """A rule for each health check, which fires while that is not healthy; the check waited long enough already."""
        for name in [name for name in self._of_health if name.removeprefix(_HEALTH) not in health]:
            del self._of_health[name]
        for check, word in health.items():
            name = _HEALTH + check
            rule = self._of_health.get(name)
            if rule is None:
                rule = self._of_health[name] = _Rule(name, bool, "warning", "", 0.0, {"check": check})
            rule.severity = _HEALTH_WORDS.get(word.value, "warning")
            rule.message = word.message
            rule.evaluations += 1
            self._take(rule, word.value < 1.0, word.value)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and len(name) <= _MAX_NAME


def _answer(result: object) -> tuple[bool, float | None]:
    """Whether it holds, and the value that the condition gave. Raises: ValueError for anything else."""
    if isinstance(result, bool):
        return result, None
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], bool):
        return result[0], _number("the value that the condition returned", result[1], least=-math.inf)
    raise ValueError(f"the condition returned {type(result).__name__}; it returns True or False, or that and a value")


def _number(what: str, value: object, *, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < least:
        raise ValueError(f"{what} is {value!r}; it is a number{' from 0' if least == 0 else ''}")
    return float(value)


def _positive(what: str, value: float) -> float:
    if _number(what, value) <= 0:
        raise ValueError(f"{what} is {value!r}; it is more than 0")
    return float(value)
