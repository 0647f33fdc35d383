"""Lines that are not as declared are found, each with what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from llm_router.observe.logs.schema import problems

LINE: dict[str, Any] = {
    "@timestamp": "2026-01-31T12:00:00.000Z",
    "log.level": "info",
    "message": "Metric: up",
    "service": "llm-router",
    "version": "1",
    "env": "test",
    "hostname": "h",
    "pid": 1,
    "process": "control",
    "metric": {"name": "up", "value": 1, "labels": {"a": "b"}, "timestamp": "2026-01-31T12:00:00.000Z"},
}


def test_a_line_as_declared_has_no_problem() -> None:
    """All there, all of their types."""
    assert problems("metrics", LINE) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"surprise": 1}, "surprise is not declared"),
        ({"pid": "1"}, "pid is no integer: '1'"),
        ({"pid": True}, "pid is no integer: True"),
        ({"message": None}, "message is no text: None"),
        ({"@timestamp": "yesterday"}, "@timestamp is no time: 'yesterday'"),
        ({"truncated": 1}, "truncated is no boolean: 1"),
        ({"a.b": 1}, "a.b (a dot in a name) is not declared"),
        ({"metric": {**LINE["metric"], "labels": {"a": 1}}}, "metric.labels is no texts: {'a': 1}"),
        ({"metric": {**LINE["metric"], "value": "1"}}, "metric.value is no number: '1'"),
        ({"metric": {**LINE["metric"], "more": {"x": 1}}}, "metric.more.x is not declared"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], problem: str) -> None:
    """With its path and value."""
    assert problems("metrics", {**LINE, **change}) == [problem]


def test_what_is_missing_is_named() -> None:
    """If the file promises it."""
    assert problems("metrics", {name: value for name, value in LINE.items() if name != "pid"}) == ["pid is missing"]
