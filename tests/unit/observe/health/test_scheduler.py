"""The scheduler: when checks run, and that nothing a check does keeps others from running."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from llm_router.observe.health.checks import Check, failed, passed
from llm_router.observe.health.scheduler import JITTER, MAX_CHECKS, CheckResult, HealthChecks
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.testing import FakeClock
from support.aio import run, until

QUICK = HealthSettings(timeout_s=0.05)


class Site:
    """Health checks with a clock of the test's, and what they told."""

    def __init__(self, settings: HealthSettings | None = None, **more: Any) -> None:
        self.clock = FakeClock()
        self.results: list[tuple[str, str]] = []
        self.transitions: list[tuple[str, str, str]] = []
        self.checks = HealthChecks(
            settings or HealthSettings(),
            clock=self.clock,
            wall=lambda: 1_757_120_400.0 + self.clock.now,
            rng=Random(7),
            on_result=lambda name, check, seconds: self.results.append((name, check.status)),
            on_transition=lambda name, old, new: self.transitions.append((name, old, new)),
            **more,
        )

    async def idle(self, results: int) -> None:
        """Returns when that many runs were told, and are over: the next ones are due from then on."""
        await until(lambda: len(self.results) >= results and all(e.run is None for e in self.checks._entries.values()))

    def status(self, name: str) -> str:
        return self.checks.check_state(name).status


class Switch:
    """A check that says what the test wants, and counts."""

    def __init__(self) -> None:
        self.answer: object = True
        self.runs = 0

    async def __call__(self) -> object:
        self.runs += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


# -- which checks there are -------------------------------------------------------------------------------


def test_an_unknown_check_is_an_error_that_names_the_known_ones() -> None:
    """To run it, to take it away, to ask for it."""

    async def scenario() -> None:
        checks = Site().checks
        with pytest.raises(ValueError, match="there is no check 'cach'; there are: none"):
            checks.remove_check("cach")
        checks.add_check("database", Switch())
        checks.add_check("cache", Switch())
        for ask in (checks.remove_check, checks.check_state):
            with pytest.raises(ValueError, match="there is no check 'cach'; there are: cache, database"):
                ask("cach")
        with pytest.raises(ValueError, match="there is no check 'cach'"):
            await checks.run_check("cach")

    run(scenario())


@pytest.mark.parametrize(
    ("name", "function", "options", "message"),
    [
        ("", bool, {}, "a check cannot be called ''"),
        ("a\nb", bool, {}, r"a check cannot be called 'a\\nb'"),
        ("x" * 101, bool, {}, "its name is 1 to 100 printable characters"),
        (7, bool, {}, "a check cannot be called '7'"),
        ("mine", 7, {}, "the check 'mine' is no function but int"),
        ("mine", bool, {"interval": 0}, "the interval of the check 'mine' is 0; it is a number of seconds above 0"),
        ("mine", bool, {"timeout": -1.0}, "the timeout of the check 'mine' is -1.0"),
        ("mine", bool, {"timeout": float("nan")}, "the timeout of the check 'mine' is nan"),
        ("mine", bool, {"timeout": "5s"}, "the timeout of the check 'mine' is '5s'"),
        ("mine", bool, {"fall": 0}, "fall of the check 'mine' is 0; it is a whole number from 1"),
        ("mine", bool, {"rise": 1.5}, "rise of the check 'mine' is 1.5"),
        ("taken", bool, {}, "a check cannot be called 'taken': it is ours"),
    ],
)
def test_what_cannot_be_added_is_refused(name: Any, function: Any, options: dict[str, Any], message: str) -> None:
    """With the name, the value and what would do."""
    site = Site(reserved={"taken": "it is ours"})
    with pytest.raises(ValueError, match=message):
        site.checks.add_check(name, function, **options)
    assert site.checks.names() == ()


def test_there_is_an_end_to_checks() -> None:
    """Each is a label value and an entry of every report."""
    checks = Site().checks
    for number in range(MAX_CHECKS):
        checks.add_check(f"check-{number}", bool)
    with pytest.raises(ValueError, match=f"there are {MAX_CHECKS} checks already"):
        checks.add_check("one-more", bool)
    checks.add_check("check-0", bool)  # in the place of another


def test_settings_have_the_last_word() -> None:
    """About weight, interval and timeout; one that is switched off does not run."""

    async def scenario() -> None:
        own = {"db": CheckSettings(critical=True, interval_s=7.0, timeout_s=0.01), "off": CheckSettings(enabled=False)}
        site = Site(HealthSettings(checks=own, timeout_s=60.0))
        site.checks.add_check("db", lambda: asyncio.sleep(60), interval=99.0, timeout=99.0)
        site.checks.add_check("off", Switch(), critical=True)
        site.checks.add_check("usual", Switch())
        assert site.checks.names() == ("db", "usual")
        state = site.checks.check_state("db")
        assert (state.is_critical, state.interval_s) == (True, 7.0)
        assert site.checks.check_state("usual").interval_s == 30.0
        assert "within 0.01 s" in (await site.checks.run_check("db")).error
        with pytest.raises(ValueError, match="'off' is switched off by health.checks.off.enabled"):
            await site.checks.run_check("off")

    run(scenario())


def test_a_check_that_is_taken_away_leaves_nothing() -> None:
    """Its run is cancelled, and whoever waits for that is told; a new one of its name begins anew."""

    async def scenario() -> None:
        site = Site()
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def slow() -> bool:
            began.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return True

        site.checks.add_check("slow", slow)
        waiting = asyncio.create_task(site.checks.run_check("slow"))
        await began.wait()
        site.checks.remove_check("slow")
        with pytest.raises(RuntimeError, match="was taken away"):
            await waiting
        await cancelled.wait()
        assert site.checks.state().checks == ()
        site.checks.add_check("slow", Switch())
        assert site.status("slow") == "initializing"
        assert site.results == []

    run(scenario())


# -- one run ----------------------------------------------------------------------------------------------


def returning(value: object) -> Callable[[], object]:
    return lambda: value


def raising(error: BaseException) -> Callable[[], object]:
    def check() -> object:
        raise error

    return check


async def awaited(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def awaited_raise(error: BaseException) -> object:
    await asyncio.sleep(0)
    raise error


class AsyncCall:
    async def __call__(self) -> bool:
        asyncio.get_running_loop()
        return True


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (returning(True), "healthy", "The check passed"),
        (returning(failed("away")), "critical", "away"),
        (functools.partial(awaited, passed("fine")), "healthy", "fine"),
        (lambda: awaited({"healthy": False, "message": "no"}), "critical", "no"),
        (AsyncCall(), "healthy", "The check passed"),
        (returning("ok"), "critical", "the check returned str 'ok'; it may return"),
        (functools.partial(awaited, None), "critical", "the check returned nothing (None)"),
        (raising(OSError("refused")), "critical", "Check failed: OSError: refused"),
        (raising(StopIteration(3)), "critical", "StopIteration: 3"),
        (raising(SystemExit(3)), "critical", "Check failed: RuntimeError: SystemExit: 3"),
        (functools.partial(awaited_raise, ValueError("x")), "critical", "Check failed: ValueError: x"),
        (functools.partial(awaited_raise, SystemExit(3)), "critical", "Check failed: RuntimeError: SystemExit: 3"),
        (
            functools.partial(awaited_raise, GeneratorExit("x")),
            "critical",
            "Check failed: RuntimeError: GeneratorExit: x",
        ),
        (functools.partial(awaited_raise, asyncio.CancelledError()), "critical", "Check failed: it cancelled itself"),
        (functools.partial(asyncio.sleep, 60), "critical", "Check failed: it did not end within 0.05 s"),
    ],
)
def test_whatever_a_check_does_is_an_outcome(function: Any, status: str, message: str) -> None:
    """Synchronous or not: content, failed, raised, nonsense, ended itself, hung."""

    async def scenario() -> None:
        site = Site(QUICK)
        site.checks.add_check("mine", function, critical=True)
        result = await site.checks.run_check("mine")
        assert result.check.status == status
        assert message in result.check.message
        assert result.is_success == (message in {"The check passed", "away", "fine", "no"})
        assert result.time == 1_757_120_400.0 + site.clock.now
        assert site.checks.check_state("mine").last == result

    run(scenario())


def test_what_is_not_critical_degrades_at_most() -> None:
    """The same failure, by how it was added."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("grave", returning(False), critical=True)
        site.checks.add_check("light", returning(False))
        found = await site.checks.run_all_checks()
        assert {name: result.check.status for name, result in found.items()} == {
            "grave": "critical",
            "light": "degraded",
        }

    run(scenario())


def test_a_blocking_check_does_not_block_the_loop() -> None:
    """It has a thread, with the context it was asked from; the thread ends with it."""

    async def scenario() -> None:
        site = Site()
        release, word = threading.Event(), contextvars.ContextVar("word", default="")
        threads: list[threading.Thread] = []
        word.set("here")

        def blocking() -> Check:
            threads.append(threading.current_thread())
            release.wait(10)
            return passed(word.get())

        site.checks.add_check("blocking", blocking)
        waiting = asyncio.create_task(site.checks.run_check("blocking"))
        await until(lambda: threads)
        release.set()
        assert (await waiting).check.message == "here"
        assert (threads[0].name, threads[0].daemon) == ("health-blocking", True)
        await until(lambda: not threads[0].is_alive())

    run(scenario())


def test_two_who_ask_share_one_run() -> None:
    """Also the scheduler's; one who gives up does not end it for the other."""

    async def scenario() -> None:
        site = Site()
        gate, runs = asyncio.Event(), []

        async def slow() -> bool:
            runs.append(1)
            await gate.wait()
            return True

        site.checks.add_check("slow", slow)
        site.checks.run_due()
        asking = [asyncio.create_task(site.checks.run_check("slow")) for _ in range(3)]
        await until(lambda: runs)
        asking[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking[0]
        gate.set()
        first, second = await asyncio.gather(*asking[1:])
        assert first is second
        assert runs == [1]

    run(scenario())


# -- what will not end ------------------------------------------------------------------------------------


def test_a_check_that_will_not_be_cancelled_is_left_behind() -> None:
    """It gives its place back, is not started again while it goes on, and says so each time; when it ends it runs again."""

    async def scenario() -> None:
        site = Site(HealthSettings(timeout_s=0.02, concurrency=1, fall=2))
        gate, runs = asyncio.Event(), []

        async def stubborn() -> bool:
            runs.append(1)
            while not gate.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    continue
            return True

        site.checks.add_check("stubborn", stubborn)
        site.checks.add_check("other", Switch())
        result = await site.checks.run_check("stubborn")
        assert result.error == "Check failed: it did not end within 0.02 s"
        assert (await site.checks.run_check("other")).check.is_healthy
        assert site.checks.state().hanging == ("stubborn",)
        again = await site.checks.run_check("stubborn")
        assert again.error == "Check failed: an earlier run of it hangs and cannot be ended"
        assert (len(runs), site.checks.check_state("stubborn").failures) == (1, 2)
        gate.set()
        await until(lambda: site.checks.state().hanging == ())
        assert (await site.checks.run_check("stubborn")).check.is_healthy
        assert len(runs) == 2
        await site.checks.aclose()

    run(scenario())


def test_a_thread_that_hangs_is_left_behind() -> None:
    """The same for a function that blocks; what it says at last is not listened to."""

    async def scenario() -> None:
        site = Site(HealthSettings(timeout_s=0.02, concurrency=1))
        release, runs = threading.Event(), []

        def blocking() -> bool:
            runs.append(threading.current_thread())
            release.wait(20)
            return True

        site.checks.add_check("blocking", blocking)
        assert "did not end within 0.02 s" in (await site.checks.run_check("blocking")).error
        assert "an earlier run of it hangs" in (await site.checks.run_check("blocking")).error
        assert (site.checks.state().hanging, len(runs)) == (("blocking",), 1)
        release.set()
        await until(lambda: not runs[0].is_alive())
        assert (await site.checks.run_check("blocking")).check.is_healthy

    run(scenario())


def test_one_that_hangs_keeps_no_other_from_running() -> None:
    """Four places, three of them hanging: forty checks still run."""

    async def scenario() -> None:
        site = Site(HealthSettings(timeout_s=5.0, concurrency=4))
        for number in range(3):
            site.checks.add_check(f"hangs-{number}", lambda: asyncio.sleep(600))
        switches = [Switch() for _ in range(40)]
        for number, switch in enumerate(switches):
            site.checks.add_check(f"quick-{number}", switch)
        async with site.checks:
            await until(lambda: len([1 for name, _ in site.results if name.startswith("quick")]) == 40)
            assert {switch.runs for switch in switches} == {1}

    run(scenario())


def test_no_more_run_at_once_than_may() -> None:
    """However many are due."""

    async def scenario() -> None:
        site = Site(HealthSettings(concurrency=3))
        running, most = 0, 0

        async def check() -> bool:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return True

        for number in range(20):
            site.checks.add_check(f"check-{number}", check)
        assert len(await site.checks.run_all_checks()) == 20
        assert most == 3

    run(scenario())


def test_closing_ends_what_runs() -> None:
    """Runs are cancelled; one that will not end is not waited for longer than two seconds; nothing runs afterwards."""

    async def scenario() -> None:
        site = Site()
        release, cancelled = threading.Event(), asyncio.Event()

        async def slow() -> bool:
            try:
                await asyncio.sleep(60)
            finally:
                for _ in range(10):
                    await asyncio.sleep(0)
                cancelled.set()
            return True

        def blocking() -> bool:
            return release.wait(20)

        site.checks.add_check("slow", slow)
        site.checks.add_check("blocking", blocking)
        await site.checks.start()
        await until(lambda: site.checks.state().checks[0].last is None and len(asyncio.all_tasks()) > 4)
        began = time.monotonic()
        await site.checks.aclose()
        await site.checks.aclose()
        assert time.monotonic() - began < 1.5
        assert cancelled.is_set()
        assert not site.checks.is_running
        with pytest.raises(RuntimeError, match="closed"):
            await site.checks.run_check("slow")
        with pytest.raises(RuntimeError, match="closed"):
            await site.checks.start()
        release.set()

    run(scenario())


# -- when -------------------------------------------------------------------------------------------------


def test_checks_are_due_after_their_interval_more_or_less() -> None:
    """At once first, then with jitter around the interval, each with its own."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("often", Switch(), interval=10.0)
        site.checks.add_check("rarely", Switch(), interval=1000.0)
        assert sorted(site.checks.run_due()) == ["often", "rarely"]
        assert site.checks.run_due() == []  # they run
        await site.idle(2)
        gaps = []
        for number in range(50):
            before = site.clock.now
            while not (due := site.checks.run_due()):
                site.clock.advance(0.125)
            assert due == ["often"]
            gaps.append(site.clock.now - before)
            await site.idle(number + 3)
        assert 10.0 * (1 - JITTER) <= min(gaps) < max(gaps) <= 10.0 * (1 + JITTER) + 0.125
        assert len(set(gaps)) > 3

    run(scenario())


def test_started_checks_run_by_themselves() -> None:
    """Also one that is added later; a second start changes nothing."""

    async def scenario() -> None:
        site = Site()
        first, second = Switch(), Switch()
        site.checks.add_check("first", first)
        async with site.checks:
            await site.checks.start()
            await until(lambda: first.runs)
            site.checks.add_check("second", second)
            await until(lambda: second.runs)
            await until(lambda: len(site.results) == 2)
            assert (first.runs, second.runs) == (1, 1)
            state = site.checks.state()
            assert (state.is_running, state.is_started, state.overdue) == (True, True, ())

    run(scenario())


def test_a_run_that_was_asked_for_moves_the_next_one() -> None:
    """It is an outcome like any other."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("mine", Switch(), interval=10.0)
        await site.checks.run_check("mine")
        site.clock.advance(8.9)
        assert site.checks.run_due() == []
        site.clock.advance(2.2)
        assert site.checks.run_due() == ["mine"]
        await site.checks.aclose()

    run(scenario())


def test_late_checks_are_named() -> None:
    """One whole round and its time late: whoever shows old outcomes says so. Not when nobody started them."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("late", Switch(), interval=10.0, timeout=5.0)
        site.clock.advance(1000.0)
        assert site.checks.state().overdue == ()
        await site.checks.start()
        await site.idle(1)
        site.clock.advance(23.0)
        assert site.checks.state().overdue == ()
        site.clock.advance(5.0)  # the loop has not turned since
        state = site.checks.state()
        assert state.overdue == ("late",)
        assert 2.0 <= state.overdue_s <= 4.0
        await site.checks.aclose()
        assert site.checks.state().overdue == ()

    run(scenario())


# -- how they stand ---------------------------------------------------------------------------------------


def test_three_failures_and_two_successes_turn_a_check() -> None:
    """Each run is told with its outcome, each turn once."""

    async def scenario() -> None:
        site, switch = Site(), Switch()
        site.checks.add_check("mine", switch, critical=True)
        shown = []
        for answer in (True, False, False, OSError("x"), True, True, False):
            switch.answer = answer
            await site.checks.run_check("mine")
            shown.append(site.status("mine"))
        assert shown == ["healthy", "healthy", "healthy", "critical", "critical", "healthy", "healthy"]
        assert site.transitions == [("mine", "healthy", "critical"), ("mine", "critical", "healthy")]
        assert len(site.results) == 7
        state = site.checks.check_state("mine")
        assert (state.failures, state.flaps, state.transitions) == (1, 2, 2)

    run(scenario())


def test_the_age_of_an_outcome_is_shown() -> None:
    """Since the end of the run; before the first there is none."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("mine", Switch())
        before = site.checks.check_state("mine")
        assert (before.last, before.age_s, before.status) == (None, 0.0, "initializing")
        await site.checks.run_check("mine")
        site.clock.advance(12.5)
        assert site.checks.check_state("mine").age_s == 12.5

    run(scenario())


def test_what_checks_do_in_the_loop_is_measured() -> None:
    """The run and the function are handed to who accounts for CPU time; a cancelled one leaves nothing unawaited."""

    async def scenario() -> None:
        measured: list[str] = []

        async def measure(work: Any) -> Any:
            measured.append(work.cr_code.co_name)
            return await work

        site = Site(measure=measure)
        site.checks.add_check("mine", Switch())
        result = await site.checks.run_check("mine")
        assert isinstance(result, CheckResult)
        assert sorted(measured) == ["_called", "_run"]
        site.checks.run_due()
        site.clock.advance(100)
        site.checks.run_due()
        site.checks.remove_check("mine")

    run(scenario())
