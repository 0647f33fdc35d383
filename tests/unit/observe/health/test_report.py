"""Health: what each check of the state says, what all say together, and how often it is worked out."""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import Any

import pytest

from llm_router.observe.health.checks import failed
from llm_router.observe.health.report import RESERVED, SCHEDULER_CHECK, Health
from llm_router.observe.health.scheduler import HealthChecks
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.observe.health.state import STATE_CHECKS, Inputs, ModelState, assess
from llm_router.testing import FakeClock
from support.aio import run, until

GOOD = {
    "is_initialized": True,
    "models": (ModelState(name="tiny", state="loaded"),),
    "workers_up": 2,
    "workers_wanted": 2,
    "runners": {"tiny": "ready"},
    "cpu_ratio": 0.452,
    "memory_used_bytes": 621.0,
    "memory_limit_bytes": 1000.0,
    "heap_bytes": 2.0**30,
    "disk_ratio": 0.348,
    "disk_path": "/data",
    "engine": "llama.cpp",
}
USUAL = HealthSettings()
KEYS = {
    "status", "value", "threshold", "healthy", "message", "details", "duration", "timestamp", "failures", "flaps",
}  # fmt: skip


def inputs(**changes: object) -> Inputs:
    return Inputs(**{**GOOD, **changes})  # type: ignore[arg-type]


class Site:
    """A health report of values and checks of the test's choosing."""

    def __init__(self, settings: HealthSettings = USUAL) -> None:
        self.clock = FakeClock(100.0)
        self.inputs = inputs()
        self.reads = 0
        self.problem: Exception | None = None
        self.transitions: list[tuple[str, str, str]] = []
        times: dict[str, Any] = {"on_transition": lambda *turn: self.transitions.append(turn)}
        self.checks = HealthChecks(
            settings, clock=self.clock, wall=self._wall, rng=Random(1), reserved=RESERVED, **times
        )
        self.health = Health(
            self._read,
            self.checks,
            version="2.3.4",
            started_at=90.0,
            monotonic=self.clock,
            now=self._wall,
            settings=settings,
            **times,
        )

    def _wall(self) -> float:
        return 1757120400.0 + self.clock.now - 100

    def _read(self) -> Inputs:
        self.reads += 1
        if self.problem is not None:
            raise self.problem
        return self.inputs

    async def idle(self) -> None:
        """Returns when the check `db` has run, and its next run is due later."""
        entry = self.checks._entries["db"]
        await until(lambda: entry.run is None and entry.last is not None)

    def after(self, seconds: float, **changes: object) -> str:
        """The word some time after the state has changed."""
        self.inputs = inputs(**changes)
        self.clock.advance(seconds)
        return self.health.report().status


class Counted:
    """A check that is content."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self) -> bool:
        self.runs += 1
        return True


# -- the state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "unhealthy"),
    [
        ({}, "healthy", []),
        ({"is_initialized": False}, "initializing", ["router_initialized"]),
        ({"cpu_ratio": 0.8}, "degraded", ["cpu_usage"]),
        ({"disk_ratio": 0.9}, "degraded", ["disk_usage"]),
        ({"memory_used_bytes": 850.0}, "degraded", ["memory_usage"]),
        ({"memory_used_bytes": 950.0}, "critical", ["memory_usage"]),
        ({"heap_bytes": 3.5 * 2**30}, "degraded", ["process_memory"]),
        ({"heap_bytes": 0.0, "rss_bytes": 3.5 * 2**30}, "degraded", ["process_memory"]),
        ({"workers_up": 1}, "degraded", ["workers"]),
        ({"workers_up": 0}, "critical", ["workers"]),
        ({"runners": {"tiny": "backoff"}}, "degraded", ["runners"]),
        ({"models": ()}, "critical", ["models_available"]),
        ({"models": (ModelState(name="tiny", state="unloaded"),)}, "critical", ["models_available"]),
        ({"models": (ModelState(name="tiny", state="failed"),)}, "critical", ["models_available", "models"]),
        (
            {"models": (*GOOD["models"], ModelState(name="far", state="down"))},  # type: ignore[misc]
            "degraded",
            ["models"],
        ),
        ({"cpu_ratio": None, "disk_ratio": None, "memory_limit_bytes": None, "heap_bytes": 0.0}, "healthy", []),
    ],
)
def test_each_check_of_the_state_weighs_as_documented(
    changes: dict[str, object], status: str, unhealthy: list[str]
) -> None:
    """One thing wrong from the start: the word for all, and exactly the checks that say so."""
    checks = assess(inputs(**changes), USUAL)
    assert [name for name, check in checks.items() if not check.is_healthy] == unhealthy
    assert tuple(checks) == STATE_CHECKS
    assert Site().after(0.0, **changes) == status


def test_thresholds_are_settings() -> None:
    """Of each level; above its own threshold memory is critical at 95 percent at the earliest."""
    settings = HealthSettings(cpu_percent=40.0, memory_percent=60.0, disk_percent=30.0, process_memory_bytes=2**30)
    checks = assess(inputs(), settings)
    assert [name for name, check in checks.items() if not check.is_healthy] == [
        "cpu_usage", "memory_usage", "process_memory", "disk_usage",
    ]  # fmt: skip
    assert [checks[name].threshold for name in ("cpu_usage", "memory_usage", "disk_usage")] == [40.0, 60.0, 30.0]
    late = assess(inputs(memory_used_bytes=960.0), HealthSettings(memory_percent=97.0))
    assert late["memory_usage"].status == "healthy"
    over = assess(inputs(memory_used_bytes=980.0), HealthSettings(memory_percent=97.0))
    assert over["memory_usage"].status == "critical"


@pytest.mark.parametrize(
    ("name", "own", "changes", "expected"),
    [
        ("cpu_usage", CheckSettings(critical=True), {"cpu_ratio": 0.9}, "critical"),
        ("cpu_usage", CheckSettings(critical=True), {}, "healthy"),
        ("models_available", CheckSettings(critical=False), {"models": ()}, "degraded"),
        ("disk_usage", CheckSettings(enabled=False), {"disk_ratio": 0.99}, None),
        ("disk_space", CheckSettings(enabled=False), {"disk_ratio": 0.99}, None),
        ("disk_space", CheckSettings(critical=True), {"disk_ratio": 0.99}, "critical"),
    ],
)
def test_checks_of_the_state_can_be_weighed_anew(
    name: str, own: CheckSettings, changes: dict[str, object], expected: str | None
) -> None:
    """Critical whenever not content, never critical, or not there at all; by either name."""
    checks = assess(inputs(**changes), HealthSettings(checks={name: own}))
    shown = "disk_usage" if name == "disk_space" else name
    assert (checks[shown].status if shown in checks else None) == expected


def test_what_is_known_for_sure_turns_at_once_and_levels_do_not() -> None:
    """A worker is there or not; the CPU has three readings in a row, a second apart, however often one asks."""
    site = Site()
    assert site.after(0) == "healthy"
    assert site.after(1, workers_up=1) == "degraded"
    assert site.after(1) == "healthy"
    site.health.forget()
    for _ in range(10):
        site.health.forget()
        assert site.after(0.01, cpu_ratio=1.0) == "healthy"
    assert [site.after(1, cpu_ratio=1.0) for _ in range(3)] == ["healthy", "healthy", "degraded"]
    assert [site.after(1) for _ in range(2)] == ["degraded", "healthy"]
    assert site.transitions == [
        ("workers", "healthy", "degraded"),
        ("workers", "degraded", "healthy"),
        ("cpu_usage", "healthy", "degraded"),
        ("cpu_usage", "degraded", "healthy"),
    ]


def test_a_start_is_no_transition() -> None:
    """While the router starts, nothing was ever otherwise."""
    site = Site()
    for changes in ({"is_initialized": False, "models": (), "workers_up": 0}, {"is_initialized": False}):
        assert site.after(1, **changes) == "initializing"
    assert site.after(1) == "healthy"
    assert site.transitions == []


def test_a_turn_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """With what the check said, of the state and of the scheduler alike."""

    async def scenario() -> None:
        site = Site()
        answers = iter((True, False, False, False))
        site.checks.add_check("db", lambda: next(answers))
        for _ in range(4):
            await site.health.run_check("db")
        site.after(1)
        site.after(1, workers_up=0)
        site.after(1)

    with caplog.at_level(logging.INFO, "llm_router.observe.health"):
        run(scenario())
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "health: db is degraded: The check returned False"),
        ("WARNING", "health: workers is critical: 0 of 2 workers answer"),
        ("INFO", "health: workers is healthy again: 2 of 2 workers answer"),
    ]


# -- the documents ----------------------------------------------------------------------------------------


def test_the_document_has_the_keys_of_both_guides() -> None:
    """Top level and checks carry the superset that dashboards and probes of either shape read."""
    document = Site().health.report().document()
    assert {key: document[key] for key in ("status", "timestamp", "age", "uptime", "version")} == {
        "status": "healthy",
        "timestamp": "2025-09-06T01:00:00.000Z",
        "age": 0.0,
        "uptime": 10.0,
        "version": "2.3.4",
    }
    assert document["summary"] == {"total": 10, "healthy": 10, "unhealthy": 0}
    assert document["models"] == {"loaded": 1, "failed": 0, "registry_size": 1}
    assert set(document) == {
        "status", "timestamp", "age", "uptime", "version", "checks", "summary", "memory", "models", "engine",
        "environment",
    }  # fmt: skip
    for check in document["checks"].values():
        assert set(check) >= KEYS
    cpu, models = document["checks"]["cpu_usage"], document["checks"]["models"]
    assert (cpu["status"], cpu["value"], cpu["threshold"]) == ("healthy", 45.2, 80.0)
    assert (models["status"], models["loaded"], models["failed"]) == ("healthy", 1, 0)
    assert document["checks"]["disk_space"] == document["checks"]["disk_usage"]


def test_checks_that_run_stand_beside_the_state() -> None:
    """With age, duration and time of their own; pending ones say nothing about the router."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("db", lambda: failed("refused", details={"host": "db"}), critical=True)
        site.checks.add_check("mine", lambda: {"healthy": True, "seen": 3, "duration": "mine"})
        pending = site.health.report()
        assert pending.status == "healthy"
        assert pending.document()["checks"]["db"]["message"] == "It has not run yet"
        assert "db" not in pending.values()
        await site.checks.run_all_checks()
        site.clock.advance(2.5)
        report = site.health.report()
        assert (report.status, report.http_status) == ("critical", 503)
        site.clock.advance(0.5)
        document = site.health.report().document()
        db, mine = document["checks"]["db"], document["checks"]["mine"]
        assert {key: db[key] for key in ("status", "healthy", "message", "age", "timestamp", "failures")} == {
            "status": "critical",
            "healthy": False,
            "message": "refused",
            "age": 3.0,
            "timestamp": "2025-09-06T01:00:00.000Z",
            "failures": 1,
        }
        assert document["age"] == 0.5
        assert (mine["seen"], mine["duration"], set(mine) - KEYS) == (3, 0.0, {"seen", "age"})
        assert document["summary"] == {"total": 12, "healthy": 11, "unhealthy": 1}
        assert report.values() == {**dict.fromkeys(STATE_CHECKS, 1.0), "db": 0.0, "mine": 1.0}

    run(scenario())


def test_what_does_not_count_yet_is_shown() -> None:
    """A healthy check whose last run failed says so, and one that recovers; an error is shown beside the message."""

    async def scenario() -> None:
        site, answers = Site(), iter((True, OSError("x"), False, False, True))

        def check() -> object:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        site.checks.add_check("db", check)
        shown = []
        for _ in range(5):
            await site.checks.run_check("db")
            site.health.forget()
            db = site.health.report().document()["checks"]["db"]
            shown.append((db["status"], db["message"], db.get("error", "")))
        assert shown == [
            ("healthy", "The check passed", ""),
            ("healthy", "Check failed: OSError: x (failure 1 in a row; 3 count)", "Check failed: OSError: x"),
            ("healthy", "The check returned False (failure 2 in a row; 3 count)", ""),
            ("degraded", "The check returned False", ""),
            ("degraded", "The check passed (success 1 in a row; 2 count)", ""),
        ]

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 200), ({"cpu_ratio": 1.0}, 200), ({"workers_up": 0}, 503), ({"is_initialized": False}, 503)],
)
def test_degraded_still_serves(changes: dict[str, object], code: int) -> None:
    """200 while requests are answered, 503 while they are not; the terse form says the same."""
    site = Site()
    site.after(0, **changes)
    report = site.health.report()
    assert report.http_status == code
    assert report.terse() == {"status": report.status, "timestamp": report.timestamp}


def test_the_draft_shape_says_pass_warn_or_fail() -> None:
    """`application/health+json` in the words of the draft, with what is wrong in `notes`."""
    site = Site()
    site.after(0, cpu_ratio=0.97)
    document = site.health.report().ietf()
    assert (document["status"], document["version"], document["releaseId"]) == ("warn", "2", "2.3.4")
    assert document["notes"] == ["cpu_usage: CPU usage: 97.0%"]
    assert document["checks"]["cpu_usage"][0]["status"] == "warn"
    assert document["checks"]["disk_usage"][0]["status"] == "pass"
    starting = Site()
    starting.after(0, is_initialized=False)
    assert starting.health.report().ietf()["status"] == "fail"


def test_without_a_state_there_are_only_checks() -> None:
    """As in somebody else's application."""

    async def scenario() -> None:
        clock = FakeClock()
        checks = HealthChecks(USUAL, clock=clock, wall=lambda: 0.0, rng=Random(1))
        health = Health(None, checks, version="1", started_at=clock.now, monotonic=clock, now=lambda: 0.0)
        assert set(health.report().document()) == {
            "status", "timestamp", "age", "uptime", "version", "checks", "summary",
        }  # fmt: skip
        checks.add_check("mine", lambda: False, critical=True)
        await health.run_all_checks()
        assert health.report().status == "critical"

    run(scenario())


# -- when -------------------------------------------------------------------------------------------------


def test_a_report_is_made_at_most_once_a_second() -> None:
    """However often it is asked for, and its age is told; `forget` makes the next one new."""
    site = Site()
    ages = []
    for at in (100.0, 100.5, 100.9, 101.0, 101.5):
        site.clock.now = at
        ages.append(round(site.health.report().age_s, 3))
    assert (site.reads, ages) == (2, [0.0, 0.5, 0.9, 0.0, 0.5])
    site.health.forget()
    site.health.report()
    assert site.reads == 3


def test_asking_runs_no_check() -> None:
    """Endpoints show what was found."""

    async def scenario() -> None:
        site, counted = Site(), Counted()
        site.checks.add_check("db", counted)
        for _ in range(5):
            site.clock.advance(100)
            site.health.report()
        assert counted.runs == 0

    run(scenario())


def test_outcomes_that_are_too_old_are_critical() -> None:
    """Whoever is sent here on the ground of what was found long ago is told wrong; which checks are late is named."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("db", lambda: True, interval=10.0, timeout=5.0)
        await site.checks.start()
        await site.idle()
        assert site.health.report().entries[SCHEDULER_CHECK].check.message == "Health checks run in time"
        assert site.after(28.0) == "critical"
        check = site.health.report().entries[SCHEDULER_CHECK].check
        assert check.message.startswith("Health checks are late by ")
        assert check.message.endswith(" s: db")
        site.checks.run_due()
        await site.idle()
        assert site.after(1.0) == "healthy"
        assert site.checks._task is not None
        site.checks._task.cancel()  # as if a fault had ended it
        await until(lambda: not site.checks.is_running)
        assert site.after(1.0) == "critical"
        assert site.health.report().entries[SCHEDULER_CHECK].check.message.startswith("Health checks have stopped")
        await site.checks.aclose()
        assert SCHEDULER_CHECK not in site.health.report().entries or site.after(1.0) == "healthy"

    run(scenario())


def test_running_starts_the_checks_and_looks_at_the_state() -> None:
    """Until it is cancelled; then nothing runs any more."""

    async def scenario() -> None:
        site, counted = Site(), Counted()
        site.checks.add_check("db", counted)
        task = asyncio.create_task(site.health.run())
        await until(lambda: counted.runs and site.reads)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not site.checks.is_running

    run(scenario())


def test_a_look_that_fails_does_not_end_the_watching(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asks is told; the log says so once."""

    async def scenario() -> None:
        site = Site()
        site.problem = OSError("/proc is gone")
        task = asyncio.create_task(site.health.run())
        await until(lambda: site.reads)
        with pytest.raises(OSError, match="/proc is gone"):
            site.health.report()
        site.problem = None
        site.health.forget()
        assert site.health.report().status == "healthy"
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(scenario())
    assert [record.getMessage() for record in caplog.records] == ["the state of the router cannot be looked at"]


# -- by name ----------------------------------------------------------------------------------------------


def test_any_check_can_be_run_by_its_name() -> None:
    """Those of the state are looked at; an unknown one is an error that names the known ones."""

    async def scenario() -> None:
        site = Site()
        site.checks.add_check("db", lambda: True)
        assert (await site.health.run_check("db")).name == "db"
        site.health.report()
        site.inputs = inputs(workers_up=0)
        assert (await site.health.run_check("workers")).check.status == "critical"
        assert (await site.health.run_check("disk_space")).name == "disk_usage"
        assert set(await site.health.run_all_checks()) == {*STATE_CHECKS, "db"}
        with pytest.raises(ValueError, match="there is no check 'nothing'; there are: cpu_usage, db, disk_usage"):
            await site.health.run_check("nothing")

    run(scenario())


@pytest.mark.parametrize("name", [*STATE_CHECKS, "disk_space", SCHEDULER_CHECK])
def test_checks_of_the_router_itself_cannot_be_replaced(name: str) -> None:
    """Two of one name would be told as one."""
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        Site().checks.add_check(name, bool)
