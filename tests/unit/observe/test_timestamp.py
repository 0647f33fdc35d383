"""The form of instants."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.timestamp import timestamp


def test_it_has_milliseconds_in_utc_that_are_cut_off() -> None:
    """A millisecond that has not come yet is not shown."""
    assert timestamp(0.0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(0.25) == "1970-01-01T00:00:00.250Z"
    assert timestamp(1_790_000_000.9996) == "2026-09-21T14:13:20.999Z"


@given(st.integers(0, 4_102_444_800_000))
def test_a_whole_millisecond_is_shown_as_it_is(milliseconds: int) -> None:
    """What a float lacks of it in the last digits is nothing that was cut off."""
    shown = datetime.fromisoformat(timestamp(milliseconds / 1000))
    assert round((shown - datetime.fromtimestamp(0, UTC)).total_seconds() * 1000) == milliseconds
