"""Durations and sizes carry their unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.config.units import seconds, show_bytes, show_seconds, size_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [("30s", 30.0), ("1m30s", 90.0), ("250ms", 0.25), ("2h", 7200.0), ("1.5s", 1.5), ("1d", 86400.0), ("0", 0.0)],
)
def test_duration_is_the_sum_of_its_parts(text: str, value: float) -> None:
    """Each part is a number and a unit."""
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "30", "s", "1m30", "-5s", "5 parsecs", "1s;", "1e3s", "٣x"])
def test_duration_without_a_proper_unit_is_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(ValueError, match="30s"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GiB", 2 * 2**30), ("10 MiB", 10 * 2**20), ("1kb", 1000), ("512B", 512), ("1.5KiB", 1536), ("0", 0)],
)
def test_size_knows_both_kinds_of_units(text: str, value: int) -> None:
    """Powers of 1024 have an i, powers of 1000 do not."""
    assert size_bytes(text) == value


@pytest.mark.parametrize("text", ["", "10", "MiB", "10 MiBs", "-1KiB", "1e3KiB"])
def test_size_without_a_proper_unit_is_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(ValueError, match="10MiB"):
        size_bytes(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_duration_shown_is_read_back(milliseconds: int) -> None:
    """What the documentation shows as a default can be written as a value."""
    assert round(seconds(show_seconds(milliseconds / 1000)) * 1000) == milliseconds


@given(st.integers(min_value=0, max_value=2**50))
def test_size_shown_is_read_back(value: int) -> None:
    """The same for sizes."""
    assert size_bytes(show_bytes(value)) == value
