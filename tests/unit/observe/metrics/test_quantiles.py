"""Quantiles of histograms: what they are, and that Prometheus computes the same ones."""

from __future__ import annotations

import json
import math
import random
import subprocess
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.families import FIRST_TOKEN_SECONDS, INFERENCE_SECONDS, TOKENS_PER_SECOND
from llm_router.observe.metrics.quantiles import quantile
from support.tools import require


@pytest.mark.parametrize(
    ("q", "counts", "expected"),
    [
        (0.5, (10, 0, 0, 0), 0.5),  # in the middle of the first bucket, which begins at 0
        (0.5, (0, 4, 0, 0), 1.5),
        (0.75, (2, 2, 0, 0), 1.5),
        (0.5, (2, 2, 0, 0), 1.0),  # exactly at a bound
        (0.51, (1, 0, 1, 0), 2.0 + 2.0 * 0.02),  # an empty bucket in between is passed over
        (1.0, (1, 1, 1, 0), 4.0),
        (0.0, (0, 0, 1, 0), 2.0),
        (0.99, (1, 0, 0, 9), 4.0),  # above the highest bound nothing is known
    ],
)
def test_quantiles_by_hand(q: float, counts: tuple[int, ...], expected: float) -> None:
    """Of buckets up to 1, 2, 4 and beyond."""
    assert quantile(q, (1.0, 2.0, 4.0), counts) == pytest.approx(expected)


@pytest.mark.parametrize(("bounds", "counts"), [((1.0, 2.0), (0, 0, 0)), ((), (5,)), ((), ())])
def test_nothing_observed_has_no_quantile(bounds: tuple[float, ...], counts: tuple[int, ...]) -> None:
    """Nor has a histogram without bounds."""
    assert math.isnan(quantile(0.5, bounds, counts))


@given(st.lists(st.floats(0.0, 200.0), min_size=1, max_size=200), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float, r: float) -> None:
    """That is all that buckets tell; and a higher share never has a lower quantile."""
    counts = [0.0] * (len(INFERENCE_SECONDS) + 1)
    for value in values:
        counts[bisect_left(INFERENCE_SECONDS, value)] += 1
    low, high = sorted((quantile(q, INFERENCE_SECONDS, counts), quantile(r, INFERENCE_SECONDS, counts)))
    assert (quantile(min(q, r), INFERENCE_SECONDS, counts), quantile(max(q, r), INFERENCE_SECONDS, counts)) == (
        low,
        high,
    )
    ranked = sorted(values)
    true = ranked[max(0, math.ceil(q * len(values)) - 1)]
    bucket = bisect_left(INFERENCE_SECONDS, true)
    bounds = (0.0, *INFERENCE_SECONDS, INFERENCE_SECONDS[-1])
    assert bounds[bucket] - 1e-9 <= quantile(q, INFERENCE_SECONDS, counts) <= bounds[bucket + 1] + 1e-9


def test_prometheus_computes_the_same(tmp_path: Path) -> None:
    """`histogram_quantile`, by the last digit."""
    rng = random.Random(7)
    series: list[dict[str, str]] = []
    expected: dict[float, list[dict[str, Any]]] = {0.5: [], 0.9: [], 0.95: [], 0.99: []}
    for case in range(40):
        bounds = rng.choice((INFERENCE_SECONDS, FIRST_TOKEN_SECONDS, TOKENS_PER_SECOND))
        counts = [rng.choice((0, 0, 1, rng.randrange(1000))) for _ in range(len(bounds) + 1)]
        counts[rng.randrange(len(counts))] += 1
        for bound, count in zip((*bounds, math.inf), accumulate(counts), strict=True):
            le = "+Inf" if bound == math.inf else repr(bound)
            series.append({"series": f'h_bucket{{case="{case}",le="{le}"}}', "values": str(count)})
        for q, samples in expected.items():
            samples.append({"labels": f'{{case="{case}"}}', "value": quantile(q, bounds, counts)})
    tests = {
        "rule_files": [],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [
                    {"expr": f"histogram_quantile({q}, h_bucket)", "eval_time": "0m", "exp_samples": samples}
                    for q, samples in expected.items()
                ],
            }
        ],
    }
    file = tmp_path / "quantiles.yml"
    file.write_text(json.dumps(tests))  # which is YAML
    done = subprocess.run(
        [require("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
