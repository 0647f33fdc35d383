"""`--where`: what it finds, what it makes of odd lines, and where it says that something is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.cli.logs.where import ALIASES, MAX_DEPTH, BadWhere, Where
from llm_router.observe.logs.schema import FILES

ACCESS: dict[str, Any] = {
    "@timestamp": "2026-01-31T12:00:00.000Z",
    "log.level": "error",
    "message": "HTTP Request",
    "pid": 4711,
    "trace.id": "ab" * 16,
    "request_id": "0f64a3c97a8b12de-17",
    "request": {"method": "POST", "path": "/v1/chat/completions", "headers": {"userAgent": "curl/8.5 (x86)"}},
    "response": {"statusCode": 502},
    "duration": 2500.0,
    "routing": {"model": "small", "backend": "local", "cached": False, "attempts": 2},
    "sample_rate": 1,
}
LOADED: dict[str, Any] = {
    "@timestamp": "2026-01-31T11:00:00.000Z",
    "log.level": "info",
    "message": "Model loaded",
    "model": {"id": "small", "name": "small", "load_duration": 900},
    "tags": ["a", "b"],
}


@pytest.mark.parametrize(
    "text",
    [
        "status>=500",
        'status >= 500 and model=="small"',
        "model == small",
        "model = 'small'",
        "duration > 2s",
        "duration == 2.5s",
        "duration <= 2500",
        "level >= warning",
        "level >= WARN",
        "level == error",
        "time < 2026-02",
        "@timestamp >= 2026-01-31T12:00:00.000Z",
        "path =~ '^/v1/'",
        "path =~ /chat/",
        "path !~ embeddings",
        'request.headers.userAgent =~ "curl/8\\.5 \\("',
        "trace =~ ^abab",
        "trace.id == " + "ab" * 16,
        "cached == false",
        "not cached",
        "!cached",
        "pid == 4711",
        "request_id == 0f64a3c97a8b12de-17",
        "request == 0f64a3c97a8b12de-17",
        "status == 200 or status == 502",
        "status == 200 || attempts > 1",
        "status != 200 && status < 503",
        "not (status == 200 or status == 404)",
        "NOT status == 200 AND backend == local",
        "status == 1 and status == 2 or status == 502",
        "cost == null",
        "status != null",
        "model != 4",
        "status != x",
        "status == '502'",
        "sample_rate == 1",
        "duration > 2.4e3",
        "  status>1  ",
    ],
)  # fmt: skip
def test_lines_that_match(text: str) -> None:
    """By short names and paths, numbers, texts, times, levels and truth."""
    assert Where(text).matches(ACCESS)


@pytest.mark.parametrize(
    "text",
    [
        "status < 500",
        "model == Small",
        "duration > 3s",
        "level > error",
        "cached",
        "missing",
        "missing == 1",
        "missing != 1",
        "missing =~ .",
        "missing !~ x",
        "missing < 1",
        "status == null",
        "status == '502x'",
        "status > x",
        "cached == 0",
        "status == true",
        "request == x",
    ],
)
def test_lines_that_do_not_match(text: str) -> None:
    """A line without the field does not match, whatever the sign; things of different kinds are not equal."""
    assert not Where(text).matches(ACCESS)


def test_a_field_alone_asks_whether_it_is_there() -> None:
    """Also one that holds others."""
    assert Where("request.headers").matches(ACCESS)
    assert not Where("request.cookies").matches(ACCESS)


def test_a_short_name_means_what_holds_a_value() -> None:
    """`model` is the name of a model, not the object that has it; `duration` also how long loading took."""
    assert Where("model == small and duration < 1s").matches(LOADED)


def test_one_of_several_is_enough() -> None:
    """In a list."""
    assert Where("tags == b").matches(LOADED)
    assert not Where("tags == c").matches(LOADED)


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 1, "something is missing here"),
        ("status>=", 9, "a value is missing after >="),
        ("status>=500 and", 16, "something is missing here"),
        ("status>=500 model==x", 13, "'model' is one too many"),
        ("(status>=500", 1, "this parenthesis is not closed"),
        ("status>=500)", 12, "')' is one too many"),
        ('model == "small', 10, "this quote is not closed"),
        ("status >= 500 & model", 15, "'&' does not belong here"),
        ("500 <= status", 1, "'500' is no field"),
        ('"status" == 500', 1, "'\"status\"' is no field"),
        ("and status", 1, "'and' is no field"),
        ("path =~ '['", 9, "is no regular expression: unterminated character set"),
        ("status > 5s", 10, "'status' has no unit of time"),
        ("duration > 5parsecs", 12, "'5parsecs' is no time: write milliseconds, or a unit: ms, s, m or h"),
        ("level >= loud", 10, "'loud' is no level; there are debug, info, warning, error, critical"),
        ("== 5", 1, "'==' is no field"),
        ("(" * (MAX_DEPTH + 2) + "a" + ")" * (MAX_DEPTH + 2), MAX_DEPTH + 2, "parentheses within each other"),
        ("not " * 500 + "a", 4 * (MAX_DEPTH + 1) + 1, "parentheses within each other"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(text: str, column: int, problem: str) -> None:
    """In words, with the column."""
    with pytest.raises(BadWhere, match="^column ") as caught:
        Where(text)
    assert problem in str(caught.value)
    assert caught.value.column == column


def test_fields_that_no_line_has_are_told() -> None:
    """Only those that were looked for, and with a near name if they are none that we know."""
    where = Where("stauts >= 500 and modle == x")
    assert not where.matches(ACCESS)
    assert where.unseen() == ["'stauts'; did you mean 'status'?"]
    assert Where("cost > 1").unseen() == []
    costly = Where("cost > 1")
    costly.matches(ACCESS)
    assert costly.unseen() == ["'cost'"]
    costly.matches({"inference": {"cost_usd": 0.5}})
    assert costly.unseen() == []


def test_every_short_name_stands_for_fields_that_there_are() -> None:
    """Else it would silently find nothing."""
    declared = {field.name for fields in FILES.values() for field in fields}
    assert {path for paths in ALIASES.values() for path in paths} <= declared


@given(st.text(alphabet="status=><!~()'\" andornt.5|&\\[", max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    """Nothing else comes out, and a refusal points into the text or behind its end."""
    try:
        where = Where(text)
    except BadWhere as error:
        assert 1 <= error.column <= len(text) + 1
    else:
        assert where.matches(ACCESS) in {True, False}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc."), inner, max_size=3),
    max_leaves=8,
)
SIGNS = st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "=~", "!~"])


@given(st.dictionaries(st.sampled_from(["a", "a.b", "b"]), JSON, max_size=3), SIGNS, st.sampled_from(["a.b", "a", "b"]))
def test_whatever_a_line_holds_is_compared(entry: dict[str, Any], sign: str, field: str) -> None:
    """Without an error; and a sign and its opposite never both match."""
    opposites = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "=~": "!~", "!~": "=~"}
    for value in ("5", "true", "x", "null", "2s"):
        if value == "2s" and sign in {"<", "<=", ">", ">="}:
            continue
        matches = Where(f"{field} {sign} {value}").matches(entry)
        opposite = Where(f"{field} {opposites[sign]} {value}").matches(entry)
        is_list = any(isinstance(value, list) for value in entry.values())
        assert not (matches and opposite) or is_list or sign in {"<", "<=", ">", ">="}
