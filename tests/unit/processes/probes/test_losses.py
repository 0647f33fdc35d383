"""Lost lines and spans: told once, by reason; what is wrong now is told as long as it is."""

from __future__ import annotations

from llm_router.observe.health.checks import Check
from llm_router.processes.probes.losses import LossCheck, Losses
from support.aio import run


class Lossy:
    def __init__(self) -> None:
        self.now = Losses({"queue-full": 0.0, "disk": 0.0})
        self.losses = LossCheck("log lines", lambda: self.now)

    def check(self) -> Check:
        return run(self.losses.check())


def test_nothing_lost() -> None:
    """Healthy, with what is under way."""
    stage = Lossy()
    stage.now = Losses({"disk": 0.0}, waiting=7)
    check = stage.check()
    assert (check.status, check.message) == ("healthy", "No log lines are lost")
    assert check.details == {"waiting": 7, "lost": {}, "lost_since_start": 0}


def test_what_was_lost_is_told_once() -> None:
    """Degraded, never more: requests are served."""
    stage = Lossy()
    stage.check()
    stage.now = Losses({"queue-full": 3.0, "disk": 40.0})
    check = stage.check()
    assert (check.status, check.value) == ("degraded", 43.0)
    assert check.message == "43 log lines were lost since the last check (3 queue-full, 40 disk)"
    assert stage.check().is_healthy
    assert stage.check().details["lost_since_start"] == 43


def test_what_is_wrong_stays_told() -> None:
    """A disk that is full, though nothing was written meanwhile."""
    stage = Lossy()
    stage.now = Losses({}, problem="/var/log/llm-router: no space left on device")
    for _ in range(3):
        assert stage.check().message == "/var/log/llm-router: no space left on device"


def test_counters_that_begin_again() -> None:
    """Whoever counts was started anew: what it has lost since then is new."""
    stage = Lossy()
    stage.now = Losses({"disk": 40.0})
    stage.check()
    stage.now = Losses({"disk": 2.0})
    assert stage.check().value == 2.0
