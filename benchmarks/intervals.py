"""How sure we are: medians with order-statistic intervals, and the interval of a difference between alternating runs.

No distribution is assumed for single figures: on a busy machine they are skewed to one side.
Not for: metrics of the product.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom; beyond that the normal quantile is within 2 %.
_T_975: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL_975: Final = 1.960


class Estimate(NamedTuple):
    """A median and its interval; `rounds` is the number of values it comes from."""

    median: float
    low: float
    high: float
    rounds: int

    def show(self, digits: int = 1) -> str:
        """`median [low, high]` with that many digits after the point."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """The median with its 95 % interval from order statistics.

    What is nan was not measured and does not count. Below six values no such interval exists: the extremes are given instead (five values: 93.75 %; three: 75 %).
    """
    ordered = sorted(value for value in values if not math.isnan(value))
    count = len(ordered)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    skip = 0
    # P(fewer than k of n values lie below the median) <= 2.5 % on either side.
    while sum(math.comb(count, i) for i in range(skip + 1)) / 2**count <= 0.025:
        skip += 1
    edge = max(skip - 1, 0)
    return Estimate(statistics.median(ordered), ordered[edge], ordered[count - 1 - edge], count)


class Difference(NamedTuple):
    """The mean of B minus A over pairs, with the half width of its 95 % interval, in the unit of the values."""

    mean: float
    half_width: float
    pairs: int

    @property
    def is_within_noise(self) -> bool:
        """Whether zero lies inside the interval."""
        return abs(self.mean) <= self.half_width


def alternating_difference(values: Sequence[float]) -> Difference:
    """B minus A of a run A B A B … A: each B against the mean of its two neighbours, which cancels a linear drift.

    Args:
        values: an odd number of figures, at least five, beginning and ending with A.
    """
    if len(values) < 5 or len(values) % 2 == 0:
        raise ValueError(f"A B A B A at least, beginning and ending with A; got {len(values)} values")
    pairs = [values[i] - (values[i - 1] + values[i + 1]) / 2 for i in range(1, len(values), 2)]
    freedom = len(pairs) - 1
    quantile = _T_975[freedom - 1] if freedom <= len(_T_975) else _NORMAL_975
    # Neighbouring pairs share an A and so are correlated by 1/6; the t interval ignores that, which makes it at most
    # 15 % too narrow: on the strict side for "less than the interval".
    return Difference(statistics.mean(pairs), quantile * statistics.stdev(pairs) / math.sqrt(len(pairs)), len(pairs))
