"""How long property tests look: `HYPOTHESIS_PROFILE` is `normal` (make test) or `fuzz` (make fuzz).

Tests that set their own number of examples take it from `support.fuzz.examples`, so that a profile scales them all.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ_FACTOR = 30
"""`make fuzz` tries this many times more; about five minutes on one CPU."""

# On a machine that is shared a single example may take long: what bounds a test is pytest's timeout. Where CI is set,
# the examples are the same in each run, so that a change fails for what it changes.
settings.register_profile("normal", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.register_profile(
    "fuzz",
    deadline=None,
    print_blob=True,
    max_examples=100 * FUZZ_FACTOR,
    suppress_health_check=[HealthCheck.too_slow],
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or "normal"
settings.load_profile(PROFILE)


def pytest_report_header() -> str:
    now = settings()
    how = "the same in each run" if now.derandomize else "random"
    return f"property tests: profile {PROFILE}, {now.max_examples} examples, {how}"
