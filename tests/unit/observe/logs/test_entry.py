"""Times, bounds and objects of texts are as every line of every file has them."""

from __future__ import annotations

import json
from datetime import datetime

from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.logs.entry import Entries, Times, quoted, texts
from llm_router.observe.logs.redact import REDACTED, clean
from llm_router.observe.timestamp import timestamp
from support.log_records import SERVICE, inferred

NOON = 1_769_860_800.0


def entries(line_bytes: int = 32768, field_chars: int = 8192) -> Entries:
    return Entries(SERVICE, "control", max_line_bytes=line_bytes, max_field_chars=field_chars)


def test_times_are_utc_with_milliseconds() -> None:
    """Whichever way they are made."""
    times = Times()
    assert times(NOON) == timestamp(NOON) == "2026-01-31T12:00:00.000Z"
    assert times(NOON + 59.9996) == "2026-01-31T12:00:59.999Z"


@given(st.lists(st.floats(0, 4e9, allow_nan=False), max_size=200))
def test_remembered_times_are_those_of_their_instants(instants: list[float]) -> None:
    """However many different seconds come, in any order."""
    times = Times()
    for instant in instants:
        apart = datetime.fromisoformat(times(instant)) - datetime.fromisoformat(timestamp(instant))
        assert abs(apart.total_seconds()) <= 0.001
    assert len(times._seconds) <= 65


def test_a_line_has_the_fields_of_its_process() -> None:
    """And those of the request that it belongs to."""
    line = json.loads(entries().line(NOON, "info", "hi\n", {"event": "x"}, inferred("sk-0123456789abcdef")))
    assert line == {
        "@timestamp": "2026-01-31T12:00:00.000Z",
        "log.level": "info",
        "message": "hi\\x0a",
        "service": "llm-router",
        "version": "1.2.3",
        "env": "test",
        "hostname": "host-1",
        "pid": 42,
        "process": "control",
        "request_id": REDACTED,
        "trace.id": inferred().trace_id,
        "span.id": inferred().span_id,
        "event": "x",
    }


def test_a_line_that_is_too_long_keeps_what_matters() -> None:
    """Texts are cut shorter and shorter; if that does not do, only what every line has is left."""
    made = entries(line_bytes=1000)
    line = made.line(NOON, "info", "m" * 5000, {"data": {"a": "b" * 5000}})
    assert len(line) <= 1000
    entry = json.loads(line)
    assert entry["truncated"] is True
    assert entry["data"]["a"] == "b" * 256 + "..."
    entry = json.loads(made.line(NOON, "info", "m", {"data": {f"name{number}": "b" * 50 for number in range(64)}}))
    assert "data" not in entry
    assert entry["truncated"] is True


def test_objects_of_texts_hold_nothing_else() -> None:
    """Numbers, lists and objects are JSON in a text; names have no dots; secrets are hidden by name."""
    assert texts({"n": 5, "list": [1, "a"], "none": None, "a.b": True, "token": "x", "x": b"\xff"}, 100) == {
        "n": "5",
        "list": '[1,"a"]',
        "none": "null",
        "a_b": "true",
        "token": REDACTED,
        "x": "\\xff",
    }
    assert len(texts({str(number): number for number in range(1000)}, 100)) == 64


@given(st.text(st.characters()))
def test_quoted_texts_are_read_back(text: str) -> None:
    """After cleaning, any text."""
    assert json.loads(quoted(clean(text))) == clean(text)
