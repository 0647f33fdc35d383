"""Health: what each check says, what they say together, and how often it is worked out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_router.observe.health import Health, Inputs, ModelState, assess, timestamp

GOOD = {
    "is_initialized": True,
    "models": (ModelState(name="tiny", state="loaded"),),
    "workers_up": 2,
    "workers_wanted": 2,
    "runners": {"tiny": "ready"},
    "cpu_ratio": 0.452,
    "memory_used_bytes": 621.0,
    "memory_limit_bytes": 1000.0,
    "disk_ratio": 0.348,
    "disk_path": "/data",
    "engine": "llama.cpp",
}


def inputs(**changes: object) -> Inputs:
    return Inputs(**{**GOOD, **changes})  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def health(read: Callable[[], Inputs], clock: Clock) -> Health:
    return Health(read, version="2.3.4", started_at=90.0, monotonic=clock, now=lambda: 1757120400.0 + clock.at - 100)


def test_the_document_has_the_keys_of_both_guides() -> None:
    """Top level and checks carry the superset that dashboards and probes of either shape read."""
    document = health(inputs, Clock()).report().document()
    assert {key: document[key] for key in ("status", "timestamp", "uptime", "version")} == {
        "status": "healthy",
        "timestamp": "2025-09-06T01:00:00.000Z",
        "uptime": 10.0,
        "version": "2.3.4",
    }
    assert document["summary"] == {"total": 8, "healthy": 8, "unhealthy": 0}
    assert document["models"] == {"loaded": 1, "failed": 0, "registry_size": 1}
    assert set(document) == {
        "status", "timestamp", "uptime", "version", "checks", "summary", "memory", "models", "engine", "environment",
    }  # fmt: skip
    for check in document["checks"].values():
        assert set(check) >= {
            "status", "value", "threshold", "healthy", "message", "details", "duration", "timestamp",
        }  # fmt: skip
    cpu, models = document["checks"]["cpu_usage"], document["checks"]["models"]
    assert (cpu["status"], cpu["value"], cpu["threshold"]) == ("healthy", 45.2, 80.0)
    assert (models["status"], models["loaded"], models["failed"]) == ("healthy", 1, 0)


@pytest.mark.parametrize(
    ("changes", "status", "unhealthy"),
    [
        ({}, "healthy", []),
        ({"is_initialized": False}, "initializing", ["router_initialized"]),
        ({"cpu_ratio": 0.8}, "degraded", ["cpu_usage"]),
        ({"disk_ratio": 0.9}, "degraded", ["disk_usage"]),
        ({"memory_used_bytes": 850.0}, "degraded", ["memory_usage"]),
        ({"memory_used_bytes": 950.0}, "critical", ["memory_usage"]),
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
        ({"cpu_ratio": None, "disk_ratio": None, "memory_limit_bytes": None}, "healthy", []),
    ],
)
def test_each_check_weighs_as_documented(changes: dict[str, object], status: str, unhealthy: list[str]) -> None:
    """One thing wrong: the word for all, and exactly the checks that say so."""
    word, checks = assess(inputs(**changes))
    assert word == status
    assert [name for name, check in checks.items() if not check.is_healthy] == unhealthy


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 200), ({"cpu_ratio": 1.0}, 200), ({"workers_up": 0}, 503), ({"is_initialized": False}, 503)],
)
def test_degraded_still_serves(changes: dict[str, object], code: int) -> None:
    """200 while requests are answered, 503 while they are not."""
    assert health(lambda: inputs(**changes), Clock()).report().http_status == code


def test_the_draft_shape_says_pass_warn_or_fail() -> None:
    """`application/health+json` in the words of the draft, with what is wrong in `notes`."""
    document = health(lambda: inputs(cpu_ratio=0.97), Clock()).report().ietf()
    assert (document["status"], document["version"], document["releaseId"]) == ("warn", "2", "2.3.4")
    assert document["notes"] == ["cpu_usage: CPU usage: 97.0%"]
    assert document["checks"]["cpu_usage"][0]["status"] == "warn"
    assert document["checks"]["disk_usage"][0]["status"] == "pass"
    assert health(lambda: inputs(is_initialized=False), Clock()).report().ietf()["status"] == "fail"


def test_a_report_is_made_at_most_once_a_second() -> None:
    """However often it is asked for; `forget` makes the next one new."""
    clock, reads = Clock(), []

    def read() -> Inputs:
        reads.append(clock.at)
        return inputs()

    subject = health(read, clock)
    for clock.at in (100.0, 100.5, 100.9, 101.0, 101.5):
        subject.report()
    assert reads == [100.0, 101.0]
    subject.forget()
    subject.report()
    assert reads == [100.0, 101.0, 101.5]


def test_timestamps_are_utc_with_milliseconds() -> None:
    """The form that the guide's documents use, with milliseconds."""
    assert timestamp(0.25) == "1970-01-01T00:00:00.250Z"
