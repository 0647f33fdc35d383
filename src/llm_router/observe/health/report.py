"""How the router is: what its state and its checks say, as one report that endpoints show.

The report has the keys of both health documents people know from the monitoring guide (`status, value, threshold` and
`healthy, message, details, duration, timestamp`); `ietf` renders the draft format for `application/health+json`. It is
made from what is at hand, so asking for it costs nothing and waits for nothing.
Not for: liveness, which depends on nothing; running checks (scheduler.py); what may be wrong with the state (state.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from llm_router.observe.health.checks import STATUS_VALUES, Check, Status
from llm_router.observe.health.scheduler import CheckResult, CheckState, HealthChecks, SchedulerState
from llm_router.observe.health.settings import HealthSettings
from llm_router.observe.health.standing import Standing, told
from llm_router.observe.health.state import ALIASES, MEASURED_CHECKS, STATE_CHECKS, Inputs, assess
from llm_router.observe.timestamp import timestamp

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Seconds between two looks at the state when nobody asks: what came and went in between is no transition."""

SCHEDULER_CHECK: Final = "health_checks"
"""The check of the checks: that they run."""

RESERVED: Final[Mapping[str, str]] = {
    **dict.fromkeys((*STATE_CHECKS, *ALIASES), "that is a check of the router's own state"),
    SCHEDULER_CHECK: "that is the check of the checks themselves",
}
"""What `HealthChecks` must not be given; its `reserved`."""

_IETF_WORDS: Final[Mapping[str, str]] = {"healthy": "pass", "degraded": "warn", "critical": "fail"}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One check as the report shows it.

    Args:
        check: the last outcome, with the status that counts: after fall and rise.
        duration_ms: that finding it out took.
        timestamp: when it was found out, ISO 8601, UTC; of a check that never ran, the report's own.
        age_s: seconds since then when the report was made; None for what is known at any moment.
        failures, flaps: see `CheckState`; 0 where one outcome is enough.
    """

    check: Check
    duration_ms: float
    timestamp: str
    age_s: float | None = None
    failures: int = 0
    flaps: int = 0
    error: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the router at `timestamp` (ISO 8601, UTC).

    Args:
        age_s: seconds since it was made, when it was asked for.
        inputs: None where there is no state to look at.
    """

    status: Status
    timestamp: str
    uptime_s: float
    version: str
    entries: Mapping[str, Entry]
    inputs: Inputs | None
    age_s: float = 0.0

    @property
    def http_status(self) -> int:
        """200 while the router serves (healthy or degraded), else 503."""
        return 200 if self.status in ("healthy", "degraded") else 503

    @property
    def checks(self) -> dict[str, Check]:
        return {name: entry.check for name, entry in self.entries.items()}

    def values(self) -> dict[str, float]:
        """What `health_check_status` shows: by check 1, 0.5 or 0; without checks that never ran."""
        return {
            name: STATUS_VALUES[check.status]
            for name, check in self.checks.items()
            if check.status != "initializing" or name in STATE_CHECKS
        }

    def terse(self) -> dict[str, Any]:
        """What anybody may know."""
        return {"status": self.status, "timestamp": self.timestamp}

    def document(self) -> dict[str, Any]:
        """The JSON document of `/health`."""
        shown = {name: self._entry_document(entry) for name, entry in self.entries.items()}
        shown.update({alias: shown[name] for alias, name in ALIASES.items() if name in shown})
        healthy = sum(check["healthy"] for check in shown.values())
        document = {
            "status": self.status,
            "timestamp": self.timestamp,
            "age": round(self.age_s, 3),
            "uptime": round(self.uptime_s, 3),
            "version": self.version,
            "checks": shown,
            "summary": {"total": len(shown), "healthy": healthy, "unhealthy": len(shown) - healthy},
        }
        if (inputs := self.inputs) is not None:
            document["memory"] = {
                "used": int(inputs.heap_bytes),
                "total": int(inputs.memory_limit_bytes or 0),
                "external": int(inputs.runner_bytes),
                "rss": int(inputs.rss_bytes),
            }
            states = [model.state for model in inputs.models]
            document["models"] = {
                "loaded": states.count("loaded"),
                "failed": states.count("failed"),
                "registry_size": len(states),
            }
            document["engine"] = inputs.engine
            document["environment"] = inputs.environment
        return document

    def _entry_document(self, entry: Entry) -> dict[str, Any]:
        check = entry.check
        document = {
            "status": check.status,
            "value": check.value,
            "threshold": check.threshold,
            "healthy": check.is_healthy,
            "message": check.message,
            "details": dict(check.details),
            "duration": entry.duration_ms,
            "timestamp": entry.timestamp,
            "failures": entry.failures,
            "flaps": entry.flaps,
        }
        if entry.age_s is not None:
            document["age"] = round(entry.age_s + self.age_s, 3)
        if entry.error:
            document["error"] = entry.error
        return {**check.extra, **document}

    def ietf(self) -> dict[str, Any]:
        """The document of draft-inadarei-api-health-check, media type `application/health+json`."""
        checks = self.checks
        return {
            "status": _IETF_WORDS.get(self.status, "fail"),
            "version": self.version.split(".")[0],
            "releaseId": self.version,
            "description": "LLM Runner Router",
            "notes": [f"{name}: {check.message}" for name, check in checks.items() if not check.is_healthy],
            "checks": {
                name: [
                    {
                        "componentType": "system" if check.unit == "percent" else "component",
                        "observedValue": check.value,
                        "observedUnit": check.unit,
                        "status": _IETF_WORDS.get(check.status, "warn"),
                        "time": self.entries[name].timestamp,
                        "output": "" if check.is_healthy else check.message,
                    }
                ]
                for name, check in checks.items()
            },
        }


class Health:
    """Reports, computed at most once in `max_age_s` however often they are asked for. Lives in one event loop.

    Args:
        read: gathers the state; must not block for long. None: there is no state, only `checks`.
        checks: what runs by itself; None: nothing does. Made with `reserved=RESERVED` where there is a state. `run`
            starts and closes them.
        monotonic, now: the clocks, in seconds; `now` is Unix time.
        started_at: the monotonic instant from which uptime counts.
        on_transition: called with name, old and new status when a check of the state has turned, as `HealthChecks` does
            for its own.
    """

    def __init__(
        self,
        read: Callable[[], Inputs] | None,
        checks: HealthChecks | None = None,
        *,
        version: str,
        started_at: float,
        monotonic: Callable[[], float],
        now: Callable[[], float],
        settings: HealthSettings | None = None,
        on_transition: Callable[[str, Status, Status], None] | None = None,
        max_age_s: float = 1.0,
    ) -> None:
        self._read = read
        self._checks = checks
        self._settings = settings or HealthSettings()
        self._version = version
        self._started_at = started_at
        self._monotonic = monotonic
        self._now = now
        self._on_transition = on_transition
        self._max_age_s = max_age_s
        self._report: Report | None = None
        self._made_at = 0.0
        self._standings = {
            name: Standing(self._settings.fall, self._settings.rise) if name in MEASURED_CHECKS else Standing(1, 1)
            for name in STATE_CHECKS
        }
        self._measured_at: float | None = None

    async def run(self) -> None:
        """Start the checks, and look at the state every second, until cancelled."""
        if self._checks is not None:
            await self._checks.start()
        was_well = True
        try:
            while True:
                try:
                    self.report()
                    was_well = True
                except Exception:  # whoever asks is told; the next look may be better
                    if was_well:
                        _log.exception("the state of the router cannot be looked at")
                    was_well = False
                await asyncio.sleep(LOOK_S)
        finally:
            if self._checks is not None:
                await self._checks.aclose()

    def report(self) -> Report:
        """The newest report; made now if the last one is older than `max_age_s`."""
        begin = self._monotonic()
        if self._report is None or begin - self._made_at >= self._max_age_s:
            self._report = self._make(begin)
            self._made_at = begin
        return msgspec.structs.replace(self._report, age_s=max(0.0, begin - self._made_at))

    def forget(self) -> None:
        """Have the next report made anew: something changed that must show at once."""
        self._report = None

    async def run_check(self, name: str) -> CheckResult:
        """Run a check now; one of the router's state is looked at.

        Raises: ValueError for an unknown name.
        """
        name = ALIASES.get(name, name)
        if self._checks is not None and name in self._checks:
            return await self._checks.run_check(name)
        self.forget()
        report = self.report()
        entry = report.entries.get(name)
        if entry is None:
            raise ValueError(f"there is no check {name!r}; there are: {', '.join(sorted(report.entries))}")
        return CheckResult(name=name, check=entry.check, duration_s=entry.duration_ms / 1000, time=self._now())

    async def run_all_checks(self) -> dict[str, CheckResult]:
        """Run every check now; by name."""
        ran = await self._checks.run_all_checks() if self._checks is not None else {}
        self.forget()
        states = {name: await self.run_check(name) for name in self.report().entries if name not in ran}
        return {**states, **ran}

    # -- making one -------------------------------------------------------------------------------------------

    def _make(self, begin: float) -> Report:
        wall = self._now()
        entries, inputs = {}, None
        if self._read is not None:
            inputs = self._read()
            states = assess(inputs, self._settings)
            duration_ms = round((self._monotonic() - begin) * 1000, 3)
            for name, check in self._stand(states, begin, is_initialized=inputs.is_initialized).items():
                standing = self._standings[name]
                entries[name] = Entry(
                    check=check,
                    duration_ms=duration_ms,
                    timestamp=timestamp(wall),
                    failures=standing.failures,
                    flaps=standing.flaps(begin),
                )
        if self._checks is not None:
            state = self._checks.state()
            entries.update({check.name: _entry_of(check, wall) for check in state.checks})
            if state.is_started:
                entries[SCHEDULER_CHECK] = Entry(
                    check=_scheduler_check(state), duration_ms=0.0, timestamp=timestamp(wall)
                )
        return Report(
            status=_together(entries, is_initialized=inputs is None or inputs.is_initialized),
            timestamp=timestamp(wall),
            uptime_s=begin - self._started_at,
            version=self._version,
            entries=entries,
            inputs=inputs,
        )

    def _stand(self, checks: dict[str, Check], now: float, *, is_initialized: bool) -> dict[str, Check]:
        """The checks with the status that counts. While the router starts nothing has a standing that could be lost."""
        if not is_initialized:
            return checks
        # However often a report is wanted at once, a level is one reading.
        is_new_reading = self._measured_at is None or now - self._measured_at >= self._max_age_s
        if is_new_reading:
            self._measured_at = now
        stood = {}
        for name, check in checks.items():
            standing = self._standings[name]
            old = standing.status
            if (is_new_reading or name not in MEASURED_CHECKS) and standing.take(check.status, now):
                told(_log, name, standing.status, check.message)
                if self._on_transition is not None:
                    self._on_transition(name, old, standing.status)
            stood[name] = msgspec.structs.replace(check, status=standing.status)
        return stood


def _together(entries: Mapping[str, Entry], *, is_initialized: bool) -> Status:
    """One word for all: initializing before the first readiness, else the worst; what never ran says nothing."""
    if not is_initialized:
        return "initializing"
    found = {entry.check.status for entry in entries.values()}
    return "critical" if "critical" in found else "degraded" if "degraded" in found else "healthy"


def _entry_of(state: CheckState, wall: float) -> Entry:
    last = state.last
    if last is None:
        pending = Check(status="initializing", value=0.0, threshold=1.0, message="It has not run yet")
        return Entry(check=pending, duration_ms=0.0, timestamp=timestamp(wall), age_s=0.0)
    message = last.check.message
    if state.status == "healthy" and state.failures:
        message = f"{message} (failure {state.failures} in a row; {state.fall} count)"
    elif state.status != "healthy" and state.successes:
        message = f"{message} (success {state.successes} in a row; {state.rise} count)"
    return Entry(
        check=msgspec.structs.replace(last.check, status=state.status, message=message),
        duration_ms=round(last.duration_s * 1000, 3),
        timestamp=timestamp(last.time),
        age_s=state.age_s,
        failures=state.failures,
        flaps=state.flaps,
        error=last.error,
    )


def _scheduler_check(state: SchedulerState) -> Check:
    """Whether checks run at all: what they found long ago is no ground to send anybody here."""
    status: Status
    if not state.is_running:
        status, message = "critical", "Health checks have stopped: the outcomes shown are old"
    elif state.overdue:
        status, message = "critical", f"Health checks are late by {state.overdue_s:.0f} s: {', '.join(state.overdue)}"
    else:
        status, message = "healthy", "Health checks run in time"
    return Check(
        status=status,
        value=round(state.overdue_s, 3),
        threshold=0.0,
        message=message,
        details={"checks": len(state.checks), "hanging": list(state.hanging)},
        unit="seconds",
    )
