"""Intervals of the benchmark: known small cases, and what they are meant to cancel."""

from __future__ import annotations

import math

import pytest
from benchmarks.intervals import alternating_difference, estimate


def test_no_values_estimate_nothing() -> None:
    """Without rounds there is no median, and the count says so."""
    found = estimate([])
    assert found.rounds == 0
    assert math.isnan(found.median)


@pytest.mark.parametrize(("count", "skipped"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2)])
def test_interval_is_the_order_statistic_of_the_sign_test(count: int, skipped: int) -> None:
    """The edges are the values that the tables for a 95 % interval of the median name."""
    found = estimate([float(value) for value in range(count, 0, -1)])
    assert (found.low, found.high) == (1 + skipped, count - skipped)


def test_linear_drift_is_no_difference() -> None:
    """A machine that only gets slower shows no difference between A and B."""
    found = alternating_difference([10.0 + step for step in range(9)])
    assert found.mean == 0
    assert found.is_within_noise


def test_steady_difference_is_found() -> None:
    """B two units above A with small noise lies outside the interval."""
    found = alternating_difference([10.0, 12.1, 10.0, 11.9, 10.0, 12.0, 10.0])
    assert found.pairs == 3
    assert found.mean == pytest.approx(2.0)
    assert not found.is_within_noise


@pytest.mark.parametrize("values", [[1.0, 2.0, 1.0], [1.0, 2.0, 1.0, 2.0], []])
def test_run_must_begin_and_end_with_a(values: list[float]) -> None:
    """Too few values, or a run that ends with B, are refused."""
    with pytest.raises(ValueError, match="A B A B A"):
        alternating_difference(values)
