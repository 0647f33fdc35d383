"""The retry budget and the wait between tries."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llm_router.routing.retry import RetryBudget, backoff_s
from llm_router.routing.table import RetrySpec


def test_the_minimum_is_always_allowed_and_then_a_share_of_requests() -> None:
    budget = RetryBudget(RetrySpec(budget_ratio=0.2, budget_min=3))
    assert [budget.spend(0.0) for _ in range(5)] == [True, True, True, False, False]
    for _ in range(10):
        budget.request(1.0)
    assert [budget.spend(1.0) for _ in range(4)] == [True, True, False, False]


def test_the_window_forgets_after_ten_seconds() -> None:
    budget = RetryBudget(RetrySpec(budget_ratio=0.0, budget_min=1))
    assert budget.spend(5.5)
    assert not budget.spend(14.9)
    assert budget.spend(15.0)


@given(steps=st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=80))
def test_retries_never_exceed_the_bound_of_any_window(steps: list[tuple[float, bool]]) -> None:
    """Against a plain list of everything that happened."""
    spec = RetrySpec(budget_ratio=0.5, budget_min=2)
    budget = RetryBudget(spec)
    requests: list[int] = []
    retries: list[int] = []
    for now, is_request in sorted(steps):
        second = int(now)
        if is_request:
            budget.request(now)
            requests.append(second)
        else:
            recent = sum(second - 10 < at for at in retries)
            bound = spec.budget_min + spec.budget_ratio * sum(second - 10 < at for at in requests)
            assert budget.spend(now) == (recent < bound)
            if recent < bound:
                retries.append(second)


def test_the_wait_doubles_up_to_its_bound_and_is_jittered() -> None:
    spec = RetrySpec(backoff_s=0.1, backoff_max_s=0.5)
    rng = random.Random(1)
    for retry, bound in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (9, 0.5)):
        waits = [backoff_s(spec, retry, rng) for _ in range(200)]
        assert all(0 <= wait <= bound for wait in waits)
        assert max(waits) > 0.8 * bound
        assert min(waits) < 0.2 * bound
