"""What each policy chooses, and the reason it gives."""

from __future__ import annotations

from typing import NamedTuple

from llm_router.routing.policies import LeastLoaded, Reason, RoundRobin


class Load(NamedTuple):
    name: str
    in_use: int


def test_round_robin_takes_turns_per_model() -> None:
    policy = RoundRobin()
    three = [Load(name, 0) for name in "abc"]
    assert [policy.choose("m", three)[0] for _ in range(4)] == [0, 1, 2, 0]
    assert policy.choose("other", three) == (0, Reason.TURN)


def test_round_robin_ignores_load() -> None:
    policy = RoundRobin()
    pair = [Load("busy", 9), Load("idle", 0)]
    assert [policy.choose("m", pair)[0] for _ in range(4)] == [0, 1, 0, 1]


def test_least_loaded_takes_the_one_with_fewest_requests() -> None:
    policy = LeastLoaded()
    assert policy.choose("m", [Load("a", 2), Load("b", 1), Load("c", 3)]) == (1, Reason.LEAST_LOADED)


def test_least_loaded_spreads_over_equals() -> None:
    policy = LeastLoaded()
    equals = [Load(name, 0) for name in "abc"]
    assert sorted(policy.choose("m", equals)[0] for _ in range(3)) == [0, 1, 2]


def test_a_single_deployment_is_no_decision() -> None:
    only = [Load("a", 5)]
    assert RoundRobin().choose("m", only) == (0, Reason.ONLY_DEPLOYMENT)
    assert LeastLoaded().choose("m", only) == (0, Reason.ONLY_DEPLOYMENT)
