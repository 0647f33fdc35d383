"""What every policy promises, and for each strategy the one thing that no other strategy does."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.models.prices import Price
from llm_router.routing.needs import Need
from llm_router.routing.policies import POLICIES, Candidate, Policy, Reason, make_policy
from llm_router.routing.table import CAPABILITIES, STRATEGIES
from llm_router.testing import FakeClock
from support.candidates import Deployed, flat, nothing, wanting
from support.fuzz import examples

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def last_by_name(model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> int:
    """The operator's function in all of these tests."""
    return max(range(len(candidates)), key=lambda index: candidates[index].name)


def policy(strategy: str, *, seed: int = 1, clock: FakeClock | None = None) -> Policy:
    return make_policy(strategy, rng=random.Random(seed), clock=clock or FakeClock(), custom=last_by_name)


# -- the kit: what all of them promise ------------------------------------------------------------------

prices = st.builds(
    Price,
    input=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    output=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)
abilities = st.one_of(st.none(), st.frozensets(st.sampled_from(CAPABILITIES)))
deployments = st.builds(
    Deployed,
    st.just(""),
    in_use=st.integers(0, 300),
    quality=st.one_of(st.none(), st.floats(0, 1)),
    price=st.one_of(st.none(), prices),
    context_tokens=st.sampled_from([0, 100, 8000]),
    capabilities=abilities,
    total_s=st.one_of(st.none(), st.sampled_from([0.0, 1e-9, 0.2, 0.21, 90.0])),
)
needs = st.builds(
    Need,
    input_tokens=st.integers(0, 10_000),
    output_tokens=st.sampled_from([0, 50, 9000]),
    capabilities=st.frozensets(st.sampled_from(CAPABILITIES)),
)


@st.composite
def groups(draw: st.DrawFn) -> list[Deployed]:
    group = draw(st.lists(deployments, min_size=1, max_size=5))
    for index, deployment in enumerate(group):
        deployment.name = f"d{index}"
    return group


def test_there_is_a_policy_for_every_strategy() -> None:
    """And each goes by the name that it is asked for by."""
    assert set(POLICIES) == set(STRATEGIES)
    assert [policy(strategy).name for strategy in STRATEGIES] == list(STRATEGIES)


@every_strategy
@settings(max_examples=examples(50))
@given(data=st.data())
def test_any_deployments_are_chosen_from(strategy: str, data: st.DataObject) -> None:
    """Whatever is known or unknown of them, as lists or tuples, while they change and some are left out."""
    clock = FakeClock()
    made = policy(strategy, clock=clock)
    group = data.draw(groups())
    for _ in range(data.draw(st.integers(1, 25))):
        some: Sequence[Deployed] = data.draw(st.lists(st.sampled_from(group), min_size=1, unique_by=id))
        if data.draw(st.booleans()):
            some = tuple(some)
        need = data.draw(needs)
        index, reason = made.choose(data.draw(st.sampled_from(["m", "n"])), some, wanting(need))
        assert type(index) is int
        assert 0 <= index < len(some)
        assert isinstance(reason, Reason)
        assert (reason is Reason.ONLY_DEPLOYMENT) == (len(some) == 1)
        assert reason is not Reason.CUSTOM_FAILED
        clock.advance(data.draw(st.sampled_from([0.0, 0.5, 100.0])))
        some[index].replied(clock.now, data.draw(st.sampled_from([0.0, 0.1, 20.0])))
        some[index].in_use = data.draw(st.integers(0, 50))


@every_strategy
def test_a_single_deployment_is_no_decision(strategy: str) -> None:
    """Nothing is asked, and nothing is called."""

    def never() -> Need:
        raise AssertionError("nobody needs to know")

    only = [Deployed("a", in_use=5, context_tokens=1, capabilities=frozenset())]
    assert policy(strategy).choose("m", only, never) == (0, Reason.ONLY_DEPLOYMENT)


@every_strategy
def test_what_a_request_needs_is_worked_out_at_most_once_and_only_for_unlike_deployments(strategy: str) -> None:
    """Reading it off the request costs more than the rest of the decision."""
    asked: list[Need] = []

    def need() -> Need:
        asked.append(Need(500, 100, frozenset({"tools"})))
        return asked[-1]

    made = policy(strategy)
    made.choose("m", [Deployed("a", price=flat(1.0)), Deployed("b", price=flat(2.0))], need)
    assert not asked
    unlike = [
        Deployed("a", context_tokens=8000, price=Price(input=1.0, output=5.0)),
        Deployed("b", capabilities=frozenset({"tools"}), price=Price(input=2.0, output=2.0)),
        Deployed("c", capabilities=frozenset(), price=flat(3.0)),
    ]
    made.choose("n", unlike, need)
    assert len(asked) == (
        strategy in {"balanced", "quality-first", "cost-optimized", "speed-priority", "capability-match"}
    )


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "custom"])
@pytest.mark.parametrize("total_s", [None, 1.0])
def test_equals_share(strategy: str, total_s: float | None) -> None:
    """Deployments that nothing tells apart get about the same part of the traffic."""
    made = policy(strategy)
    equals = [Deployed(name, quality=0.8, price=flat(1.0), total_s=total_s) for name in "abc"]
    shares = Counter(made.choose("m", equals, nothing)[0] for _ in range(300))
    assert all(80 <= shares[index] <= 120 for index in range(3)), shares


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "random"])  # that has one source of chance
def test_choices_for_one_model_do_not_depend_on_those_for_another(strategy: str) -> None:
    """Two models in turn get what each gets alone."""
    group = [Deployed(name, total_s=1.0) for name in "abc"]
    alone = policy(strategy)
    expected = [alone.choose("m", group, nothing) for _ in range(9)]
    both = policy(strategy)
    found = []
    for _ in range(9):
        found.append(both.choose("m", group, nothing))
        both.choose("other", group[:2], nothing)
    assert found == expected


@every_strategy
def test_models_that_left_are_forgotten(strategy: str) -> None:
    """A router runs for months, and models come and go."""
    group = [Deployed(name, total_s=1.0) for name in "abc"]
    made = policy(strategy)
    first = made.choose("m", group, nothing)
    made.choose("stays", group, nothing)
    made.keep({"stays"})
    if strategy != "random":
        assert made.choose("m", group, nothing) == first
    remembered = [set(value) for value in vars(made).values() if isinstance(value, dict)]
    assert all(names <= {"stays", "m"} for names in remembered)


@every_strategy
def test_a_choice_costs_no_more_with_what_came_before(strategy: str) -> None:
    """The state of a model has a bound: it does not grow with the number of choices."""
    clock = FakeClock()
    made = policy(strategy, clock=clock)
    group = [
        Deployed("a", context_tokens=100, capabilities=frozenset()),
        Deployed("b", context_tokens=1000),
        Deployed("c", context_tokens=8000, capabilities=frozenset({"tools"})),
    ]

    def size() -> int:
        return sum(len(repr(value)) for value in vars(made).values() if isinstance(value, dict))

    for count in range(2000):
        need = Need(count * 5, 0, frozenset({"tools"} if count % 2 else ()))
        made.choose("m", group[: 2 + count % 2], wanting(need))
        clock.advance(1.0)
    assert size() < 500


# -- what only one of them does -------------------------------------------------------------------------

Make = Callable[[], Policy]


def names(made: Policy, group: Sequence[Deployed], times: int, need: Callable[[], Need] = nothing) -> list[str]:
    return [group[made.choose("m", group, need)[0]].name for _ in range(times)]


def takes_strict_turns(make: Make) -> None:
    """round-robin: a, b, c, a, b, c…, although they are as different as can be."""
    group = [
        Deployed("a", in_use=50, quality=0.1, price=flat(9.0), total_s=9.0),
        Deployed("b", in_use=0, quality=0.9, price=flat(1.0), total_s=1.0),
        Deployed("c", in_use=9, quality=0.5, price=flat(5.0), total_s=5.0),
    ]
    assert names(make(), group, 30) == ["a", "b", "c"] * 10


def is_left_to_chance(make: Make) -> None:
    """random: each as often as the others, and after each as often as after the others."""
    group = [
        Deployed("a", in_use=50, quality=0.1, price=flat(9.0), total_s=9.0),
        Deployed("b", in_use=0, quality=0.9, price=flat(1.0), total_s=1.0),
        Deployed("c", in_use=9, quality=0.5, price=flat(5.0), total_s=5.0),
    ]
    chosen = names(make(), group, 9000)
    pairs = Counter(itertools.pairwise(chosen))
    assert len(pairs) == 9
    assert all(850 < count < 1150 for count in pairs.values()), pairs


def follows_the_load(make: Make) -> None:
    """least-loaded: whichever has least in flight, as that changes, whatever else there is to say."""
    group = [
        Deployed("a", quality=0.1, price=flat(9.0), total_s=9.0, context_tokens=8_000),
        Deployed("b", quality=0.9, price=flat(1.0), total_s=1.0, context_tokens=80_000),
        Deployed("c", quality=0.5, price=flat(5.0), total_s=5.0, capabilities=frozenset({"tools"})),
    ]
    made = make()
    for loads in ((1, 2, 3), (1, 2, 2), (30, 31, 40), (5, 4, 9), (0, 4, 1), (7, 8, 6), (3, 3, 2)):
        for deployment, load in zip(group, loads, strict=True):
            deployment.in_use = load
        assert names(made, group, 3) == ["abc"[loads.index(min(loads))]] * 3


def asks_the_best(make: Make) -> None:
    """quality-first: the best answers, though they be dear, slow and from a busy backend."""
    group = [
        Deployed("a", quality=0.8, price=flat(0.1), total_s=0.1),
        Deployed("b", quality=0.9, price=flat(90.0), total_s=60.0, in_use=40),
        Deployed("c", price=flat(0.0), total_s=0.1),
    ]
    assert names(make(), group, 30) == ["b"] * 30


def pays_least_for_this_request(make: Make) -> None:
    """cost-optimized: by what comes in and may go out, and what has no known price is not free."""
    group = [
        Deployed("a", price=Price(input=1.0, output=10.0), quality=0.1, total_s=60.0, in_use=40),
        Deployed("b", price=Price(input=5.0, output=2.0), quality=0.1, total_s=60.0, in_use=40),
        Deployed("c", quality=1.0, total_s=0.1),
    ]
    made = make()
    assert names(made, group, 30, lambda: Need(10_000, 100)) == ["a"] * 30
    assert names(made, group, 30, lambda: Need(100, 2_000)) == ["b"] * 30


def asks_the_fastest(make: Make) -> None:
    """speed-priority: the shortest time lately, though it be bad, dear and busy; and whoever is faster later on."""
    clock = FakeClock()
    group = [
        Deployed("a", quality=1.0, price=flat(0.0), total_s=3.0),
        Deployed("b", quality=0.1, price=flat(90.0), total_s=1.0, in_use=30),
        Deployed("c", quality=0.9, price=flat(0.1), total_s=2.0),
    ]
    made = make()
    assert names(made, group, 30) == ["b"] * 30
    for _ in range(30):
        group[1].replied(clock.now, 30.0)
    group[2].in_use = 300
    assert names(made, group, 30) == ["c"] * 30


def weighs_everything(make: Make) -> None:
    """balanced: the second best in everything before those that are best in one thing and bad in others.

    Numbers are as they come: ratios, dollars from cents to tens, seconds, requests. None may drown the others.
    """
    group = [
        Deployed("best", quality=1.0, price=flat(60.0), total_s=12.0, in_use=12),
        Deployed("cheap", quality=0.3, price=flat(0.1), total_s=12.0, in_use=12),
        Deployed("fast", quality=0.3, price=flat(60.0), total_s=0.5, in_use=12),
        Deployed("round", quality=0.8, price=flat(12.0), total_s=2.0, in_use=3),
        Deployed("worst", quality=0.3, price=flat(60.0), total_s=12.0, in_use=0),
    ]
    assert names(make(), group, 30) == ["round"] * 30


def matches_the_need(make: Make) -> None:
    """capability-match: the least able one that is able enough, so that the others stay free."""
    group = [
        Deployed("big", quality=1.0, context_tokens=200_000, capabilities=frozenset({"tools", "vision", "json"})),
        Deployed("plain", quality=0.1, price=flat(9.0), context_tokens=8_000, capabilities=frozenset(), in_use=40),
        Deployed("tools", price=flat(5.0), context_tokens=8_000, capabilities=frozenset({"tools"}), in_use=30),
        Deployed("unknown", quality=1.0, price=flat(0.0)),
    ]
    made = make()
    assert names(made, group, 9) == ["plain"] * 9
    assert names(made, group, 9, lambda: Need(10, 10, frozenset({"tools"}))) == ["tools"] * 9
    assert names(made, group, 9, lambda: Need(10, 10, frozenset({"vision"}))) == ["big"] * 9
    assert names(made, group, 9, lambda: Need(7_000, 3_000)) == ["big"] * 9
    assert names(made, group, 9, lambda: Need(10, 10, frozenset({"reasoning"}))) == ["unknown"] * 9


def does_what_the_operator_says(make: Make) -> None:
    """custom: the last one by name here, for which nothing else speaks."""
    group = [
        Deployed("a", quality=1.0, price=flat(0.0), total_s=0.1),
        Deployed("z", quality=0.0, price=flat(90.0), total_s=60.0, in_use=99),
        Deployed("b", quality=0.9, price=flat(1.0), total_s=1.0),
    ]
    assert names(make(), group, 30) == ["z"] * 30


PECULIAR: dict[str, Callable[[Make], None]] = {
    "round-robin": takes_strict_turns,
    "random": is_left_to_chance,
    "least-loaded": follows_the_load,
    "quality-first": asks_the_best,
    "cost-optimized": pays_least_for_this_request,
    "speed-priority": asks_the_fastest,
    "balanced": weighs_everything,
    "capability-match": matches_the_need,
    "custom": does_what_the_operator_says,
}


def passes(check: Callable[[Make], None], strategy: str) -> bool:
    try:
        check(lambda: policy(strategy))
    except AssertionError:
        return False
    return True


@every_strategy
def test_a_strategy_does_what_it_is_named_for(strategy: str) -> None:
    """Shown with what fails, unlike in the next test."""
    PECULIAR[strategy](lambda: policy(strategy))


@every_strategy
def test_only_one_strategy_does_it(strategy: str) -> None:
    """Of all strategies exactly the one passes: no two are the same under two names."""
    assert [other for other in STRATEGIES if passes(PECULIAR[strategy], other)] == [strategy]
