"""Quantiles of histograms, as PromQL's `histogram_quantile` estimates them.

Not for: histograms over time, as everything here counts since the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(q: float, bounds: Sequence[float], counts: Sequence[float]) -> float:
    """The value below which the share `q` of the observations lies, assuming that they lie evenly in their bucket.

    Args:
        q: 0..1.
        bounds: upper bounds of the buckets, ascending, > 0, without +Inf.
        counts: observations in each bucket, not cumulative; one more than bounds, the last for +Inf.

    Returns: between 0 and the highest bound, which stands for everything above it too; nan without observations.
    """
    total = sum(counts)
    if not total or not bounds:
        return math.nan
    rank, below = q * total, 0.0
    for index, bound in enumerate(bounds):
        within = counts[index]
        if within and below + within >= rank:
            start = bounds[index - 1] if index else 0.0
            return start + (bound - start) * max(0.0, (rank - below) / within)
        below += within
    return bounds[-1]
