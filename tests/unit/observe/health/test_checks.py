"""What a check function's result amounts to, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.errors import Unavailable
from llm_router.observe.health.checks import (
    MAX_DETAILS_BYTES,
    MAX_MESSAGE,
    BadResult,
    Check,
    failed,
    outcome_of,
    outcome_of_error,
    passed,
    weighed,
)


@pytest.mark.parametrize(
    ("result", "status", "message"),
    [
        (True, "healthy", "The check passed"),
        (False, "critical", "The check returned False"),
        (passed("fine"), "healthy", "fine"),
        (failed("away"), "critical", "away"),
        (failed("slow", status="degraded"), "degraded", "slow"),
        ({"healthy": True}, "healthy", "The check passed"),
        ({"healthy": False}, "critical", "The check did not pass"),
        ({"healthy": False, "message": "no"}, "critical", "no"),
        ({"healthy": False, "status": "degraded", "message": "slow"}, "degraded", "slow"),
        ({"status": "healthy", "details": None}, "healthy", "The check passed"),
    ],
)
def test_what_a_check_may_return(result: object, status: str, message: str) -> None:
    """True or False, a mapping, or a Check."""
    outcome = outcome_of(result)
    assert (outcome.status, outcome.message) == (status, message)


def test_a_mapping_keeps_all_that_it_says() -> None:
    """Numbers, unit and details at their places; what nobody knows stands beside them."""
    outcome = outcome_of(
        {
            "healthy": True,
            "message": "ok",
            "value": 3,
            "threshold": 5.5,
            "unit": "rows",
            "details": {"a": [1]},
            "seen": 7,
        }
    )
    assert outcome == Check(
        status="healthy", value=3.0, threshold=5.5, message="ok", details={"a": [1]}, unit="rows", extra={"seen": 7}
    )


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "the check returned nothing (None); it may return True, False, a mapping with 'healthy', or a Check"),
        (1, "the check returned int 1; it may return"),
        ("healthy", "the check returned str 'healthy'; it may return"),
        ([], "the check returned list []; it may return"),
        ({}, "a mapping without 'healthy'"),
        ({"healthy": "yes"}, "'healthy' as 'yes'; it is True or False"),
        ({"healthy": 1}, "'healthy' as 1; it is True or False"),
        ({"status": "fine"}, "the status 'fine'; it is one of healthy, degraded, critical, initializing"),
        ({"status": ["healthy"]}, "the status ['healthy']; it is one of"),
        ({"healthy": True, "status": "critical"}, "'healthy' as True together with the status 'critical'"),
        ({"healthy": True, "details": [1]}, "'details' as list; they are a mapping"),
        ({"healthy": True, "value": "7"}, "'value' as '7'; it is a finite number"),
        ({"healthy": True, "threshold": float("nan")}, "'threshold' as nan; it is a finite number"),
        (passed("x", value=float("inf")), "inf of 1.0; both are finite numbers"),
    ],
)
def test_nonsense_says_what_came_and_what_may_come(result: object, message: str) -> None:
    """It is a failure like any other, not a broken health page."""
    with pytest.raises(BadResult) as raised:
        outcome_of(result)
    assert message in str(raised.value)
    outcome = outcome_of_error(raised.value)
    assert (outcome.status, message in outcome.message) == ("critical", True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.just("healthy"), inner),
        max_leaves=20,
    )
)
def test_any_result_is_an_outcome_or_a_clear_failure(result: object) -> None:
    """And what it becomes can be shown as JSON, and is small."""
    try:
        outcome = outcome_of(result)
    except BadResult as error:
        outcome = outcome_of_error(error)
    shown = json.dumps([outcome.message, dict(outcome.details), dict(outcome.extra)], allow_nan=False)
    assert len(outcome.message) < MAX_MESSAGE + 50
    assert len(shown) < 6 * (2 * MAX_DETAILS_BYTES + MAX_MESSAGE + 100)


def test_errors_keep_their_words() -> None:
    """A foreign one with its kind, ours as the sentence that it is; one that cannot even be shown too."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert outcome_of_error(KeyError("x")).message == "Check failed: KeyError: 'x'"
    assert outcome_of_error(TimeoutError()).message == "Check failed: TimeoutError"
    assert outcome_of_error(Unavailable("no worker is up")).message == "Check failed: no worker is up"
    assert outcome_of_error(Mute()).message == "Check failed: Mute: its message cannot be shown"


def test_secrets_are_taken_out() -> None:
    """Of messages of exceptions and of mappings, and of details by name and by pattern."""
    secret = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"
    outcomes: list[Check] = [
        outcome_of_error(ConnectionError(f"postgresql://app:hunter2@db/x refused {secret}")),
        outcome_of({"healthy": False, "message": f"key {secret}", "details": {"password": "hunter2", "a": [secret]}}),
        outcome_of(failed("redis://:hunter2@cache", details={"url": "redis://:hunter2@cache"})),
    ]
    for outcome in outcomes:
        shown = json.dumps([outcome.message, dict(outcome.details)])
        assert secret not in shown
        assert "hunter2" not in shown


def test_long_messages_and_details_are_cut() -> None:
    """The report is read every few seconds."""
    outcome = outcome_of({"healthy": True, "message": "x" * 10_000, "details": {str(n): "y" * 100 for n in range(60)}})
    assert len(outcome.message) < MAX_MESSAGE + 50
    assert list(outcome.details) == ["omitted"]


def test_details_that_are_no_json_are_shown_as_text() -> None:
    """An object as its str; one that contains itself as far as it goes."""
    inner: dict[str, Any] = {}
    inner["again"] = inner
    assert outcome_of({"healthy": True, "details": {"kind": ValueError("no")}}).details == {"kind": "no"}
    assert outcome_of({"healthy": True, "details": inner}).details.keys() == {"again"}


@pytest.mark.parametrize(
    ("status", "is_critical", "expected"),
    [("critical", True, "critical"), ("critical", False, "degraded"), ("degraded", True, "degraded")],
)
def test_only_a_critical_check_makes_the_router_critical(status: Any, is_critical: bool, expected: str) -> None:
    """What a failure means is told at registration."""
    assert weighed(status, is_critical=is_critical) == expected
