"""What policies make of what is known, measured, unknown and too old; and the operator's own function."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llm_router.errors import ConfigError
from llm_router.models.prices import Price, Tier
from llm_router.routing.needs import Need
from llm_router.routing.policies import (
    EXPLORE_EVERY,
    EXPLORE_GAP_S,
    REMEASURE_S,
    TIE,
    WEIGHT_LOAD,
    WEIGHT_PRICE,
    WEIGHT_QUALITY,
    WEIGHT_SPEED,
    CustomFunction,
    Policy,
    Reason,
    load_custom,
    make_policy,
)
from llm_router.testing import FakeClock
from support.candidates import Deployed, flat, nothing

measuring = pytest.mark.parametrize("strategy", ["balanced", "speed-priority"])
scoring = pytest.mark.parametrize("strategy", ["balanced", "quality-first", "cost-optimized", "speed-priority"])


def policy(strategy: str, *, clock: FakeClock | None = None, custom: CustomFunction | None = None) -> Policy:
    return make_policy(strategy, rng=random.Random(1), clock=clock or FakeClock(), custom=custom)


def choose(made: Policy, group: Sequence[Deployed], need: Callable[[], Need] = nothing) -> tuple[str, Reason]:
    index, reason = made.choose("m", group, need)
    return group[index].name, reason


# -- reasons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [
        ("round-robin", "a", Reason.TURN),
        ("least-loaded", "b", Reason.LEAST_LOADED),
        ("quality-first", "a", Reason.BEST_QUALITY),
        ("cost-optimized", "c", Reason.LOWEST_COST),
        ("speed-priority", "c", Reason.FASTEST),
        ("balanced", "c", Reason.BEST_BALANCE),
        ("capability-match", "b", Reason.BEST_FIT),
    ],
)
def test_each_says_why(strategy: str, name: str, reason: Reason) -> None:
    """In the words that the metric counts by."""
    group = [
        Deployed("a", quality=0.9, price=flat(5.0), total_s=4.0, in_use=9, capabilities=frozenset({"tools"})),
        Deployed("b", quality=0.1, price=flat(9.0), total_s=9.0, in_use=0, capabilities=frozenset()),
        Deployed("c", quality=0.8, price=flat(1.0), total_s=1.0, in_use=2, capabilities=frozenset({"json"})),
    ]
    assert choose(policy(strategy), group) == (name, reason)


def test_chance_is_said_to_be_chance() -> None:
    """Nothing else spoke for it."""
    assert choose(policy("random"), [Deployed("a"), Deployed("b")])[1] is Reason.CHANCE


@pytest.mark.parametrize("strategy", ["quality-first", "cost-optimized", "speed-priority", "capability-match"])
def test_where_all_are_equal_the_load_decides(strategy: str) -> None:
    """And is given as the reason."""
    equals = [
        Deployed(name, quality=0.5, price=flat(1.0), total_s=1.0, in_use=load)
        for name, load in zip("abc", (3, 1, 2), strict=True)
    ]
    assert [choose(policy(strategy), equals) for _ in range(3)] == [("b", Reason.LEAST_LOADED)] * 3


@pytest.mark.parametrize("strategy", ["quality-first", "cost-optimized", "speed-priority"])
def test_among_the_best_the_load_decides(strategy: str) -> None:
    """Two of the same share what the third is not good enough for."""
    group = [
        Deployed("a", quality=0.9, price=flat(1.0), total_s=1.0, in_use=5),
        Deployed("b", quality=0.9, price=flat(1.0), total_s=1.0, in_use=3),
        Deployed("c", quality=0.1, price=flat(9.0), total_s=9.0),
    ]
    made = policy(strategy)
    assert {choose(made, group)[0] for _ in range(30)} == {"b"}
    group[1].in_use = 5
    assert Counter(choose(made, group)[0] for _ in range(30)) == {"a": 15, "b": 15}


# -- what is not known ----------------------------------------------------------------------------------


def test_a_quality_that_nobody_gave_is_in_the_middle() -> None:
    """Before what is said to be bad, behind what is said to be good."""
    good, unknown, bad = Deployed("good", quality=0.6), Deployed("unknown"), Deployed("bad", quality=0.4)
    assert choose(policy("quality-first"), [bad, unknown]) == ("unknown", Reason.BEST_QUALITY)
    assert choose(policy("quality-first"), [unknown, good]) == ("good", Reason.BEST_QUALITY)


@pytest.mark.parametrize("strategy", ["cost-optimized", "balanced"])
def test_a_price_that_nobody_knows_is_not_free(strategy: str) -> None:
    """What has one goes first, be it dear."""
    group = [Deployed("unknown"), Deployed("dear", price=flat(90.0)), Deployed("less", price=flat(60.0))]
    made = policy(strategy)
    assert {choose(made, group)[0] for _ in range(30)} == {"less"}


def test_without_any_price_cost_decides_nothing() -> None:
    """The load does."""
    group = [Deployed("a", in_use=2), Deployed("b", in_use=1)]
    assert choose(policy("cost-optimized"), group) == ("b", Reason.LEAST_LOADED)


def test_long_inputs_cost_by_their_tier() -> None:
    """What is cheap for a short input may be dear for a long one."""
    group = [
        Deployed("tiers", price=Price(input=1.0, output=1.0, tiers=(Tier(above_tokens=1000, input=9.0, output=9.0),))),
        Deployed("plain", price=flat(2.0)),
    ]
    made = policy("cost-optimized")
    assert choose(made, group, lambda: Need(1000, 10)) == ("tiers", Reason.LOWEST_COST)
    assert choose(made, group, lambda: Need(1001, 10)) == ("plain", Reason.LOWEST_COST)


# -- what fits ------------------------------------------------------------------------------------------


@scoring
def test_deployments_that_are_known_not_to_fit_are_left_out(strategy: str) -> None:
    """The best one that answers 400 is no good; where none fits all are asked as if they did."""
    group = [
        Deployed("small", quality=1.0, price=flat(0.0), total_s=0.1, context_tokens=100),
        Deployed("blind", quality=1.0, price=flat(0.0), total_s=0.1, capabilities=frozenset({"tools"})),
        Deployed("able", quality=0.1, price=flat(9.0), total_s=9.0, context_tokens=9000),
        Deployed(
            "more",
            quality=0.2,
            price=flat(8.0),
            total_s=5.0,
            context_tokens=9000,
            capabilities=frozenset({"vision", "json"}),
        ),
    ]
    made = policy(strategy)
    picture = Need(500, 100, frozenset({"vision"}))
    assert {choose(made, group, lambda: picture)[0] for _ in range(30)} == {"more"}
    assert choose(made, group[:3], lambda: picture) == ("able", Reason.BEST_FIT)
    assert choose(made, group[:2], lambda: Need(500, 0, frozenset({"vision"})))[0] in {"small", "blind"}
    assert choose(made, group, lambda: Need(50, 50))[0] in {"small", "blind"}
    assert choose(made, group, lambda: Need(51, 50))[0] == "blind"


def test_where_none_fits_the_one_nearest_to_it_is_asked() -> None:
    """An estimate may be wrong, and a backend's own error tells more than ours could."""
    made = policy("capability-match")
    group = [
        Deployed("none", context_tokens=9000, capabilities=frozenset()),
        Deployed("one", context_tokens=100, capabilities=frozenset({"tools"})),
        Deployed("more", context_tokens=200, capabilities=frozenset({"tools"})),
    ]
    assert choose(made, group, lambda: Need(5000, 0, frozenset({"tools"}))) == ("more", Reason.NONE_FITS)
    assert choose(made, group, lambda: Need(50_000, 0)) == ("none", Reason.NONE_FITS)


# -- balance --------------------------------------------------------------------------------------------


def test_the_weights_are_the_same_and_make_up_one() -> None:
    """So a score is 0..1, and a tie is a fiftieth of it."""
    assert WEIGHT_QUALITY == WEIGHT_PRICE == WEIGHT_SPEED == WEIGHT_LOAD == 0.25
    assert TIE < WEIGHT_LOAD / 9  # one request in flight on an idle backend is no tie


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"quality": 0.8, "price": flat(2.0)}, {"quality": 0.4, "price": flat(1.0)}),
        ({"quality": 0.8, "total_s": 2.0}, {"quality": 0.4, "total_s": 1.0}),
        ({"price": flat(2.0), "total_s": 1.0}, {"price": flat(1.0), "total_s": 2.0}),
        ({"price": flat(0.5), "in_use": 8}, {"price": flat(1.0), "in_use": 0}),
    ],
)
def test_twice_as_good_in_one_is_worth_twice_as_good_in_another(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Whatever it is measured in; the slightest thing more decides."""
    made = policy("balanced")
    pair = [Deployed("left", **left), Deployed("right", **right)]
    assert Counter(choose(made, pair) for _ in range(40)) == {("left", Reason.TURN): 20, ("right", Reason.TURN): 20}
    better = [Deployed("left", **left), Deployed("right", **{**right, "quality": right.get("quality", 0.5) * 1.2})]
    assert {choose(made, better) for _ in range(40)} == {("right", Reason.BEST_BALANCE)}


factors = st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**30])
things = st.tuples(
    st.floats(0.05, 1), st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 60), st.integers(0, 50)
)


@given(st.lists(things, min_size=2, max_size=5), factors, factors)
def test_units_do_not_matter(found: list[tuple[float, float, float, float, int]], money: float, time: float) -> None:
    """Prices in another currency and times in another unit: the same choice."""

    def group(money: float, time: float) -> list[Deployed]:
        return [
            Deployed(
                str(index),
                quality=quality,
                price=Price(input=given * money, output=taken * money),
                total_s=total_s * time,
                in_use=in_use,
            )
            for index, (quality, given, taken, total_s, in_use) in enumerate(found)
        ]

    assert choose(policy("balanced"), group(1.0, 1.0)) == choose(policy("balanced"), group(money, time))


@given(st.lists(things, min_size=2, max_size=5), st.data())
def test_the_chosen_one_stays_chosen_when_it_gets_better(
    found: list[tuple[float, float, float, float, int]], data: st.DataObject
) -> None:
    """In anything, and however much."""

    def group(changed: int = -1, **better: Any) -> list[Deployed]:
        return [
            Deployed(
                str(index),
                **{
                    "quality": quality,
                    "price": Price(input=given, output=taken),
                    "total_s": total_s,
                    "in_use": in_use,
                    **(better if index == changed else {}),
                },
            )
            for index, (quality, given, taken, total_s, in_use) in enumerate(found)
        ]

    def winners(deployments: list[Deployed]) -> set[int]:
        made = policy("balanced")
        return {made.choose("m", deployments, nothing)[0] for _ in deployments}

    before = winners(group())
    assume(len(before) == 1)  # else they take turns, and it is chance whose turn it is
    (index,) = before
    quality, _, _, _, in_use = found[index]
    better: dict[str, Any] = data.draw(
        st.sampled_from(
            [{"quality": min(1.0, quality * 1.5)}, {"price": flat(0.0)}, {"total_s": 0.0}, {"in_use": in_use // 2}]
        )
    )
    assert winners(group(index, **better)) == before


def test_load_moves_traffic_to_one_that_is_not_as_good() -> None:
    """But for one request it does not give up half the price."""
    group = [Deployed("cheap", price=flat(1.0)), Deployed("dear", price=flat(2.0))]
    made = policy("balanced")
    group[0].in_use = 1
    assert {choose(made, group)[0] for _ in range(30)} == {"cheap"}
    group[0].in_use = 30
    assert {choose(made, group)[0] for _ in range(30)} == {"dear"}


# -- what is measured -----------------------------------------------------------------------------------


@measuring
def test_a_newcomer_gets_a_part_of_the_traffic_and_no_rush(strategy: str) -> None:
    """One in ten at most; and as long as no answer came, one in a second."""
    clock = FakeClock()
    made = policy(strategy, clock=clock)
    group = [Deployed("old", total_s=1.0, now=clock.now), Deployed("new")]
    found: list[tuple[str, Reason]] = []
    for _ in range(1000):
        found.append(choose(made, group))
        clock.advance(0.01)
    fresh = [reason for name, reason in found if name == "new"]
    if strategy == "speed-priority":
        assert set(fresh) == {Reason.EXPLORED}
        assert len(fresh) == pytest.approx(10.0 / EXPLORE_GAP_S, abs=1)
    explored = [index for index, (_, reason) in enumerate(found) if reason is Reason.EXPLORED]
    assert explored[0] < EXPLORE_EVERY
    assert all(later - sooner >= EXPLORE_EVERY for sooner, later in itertools.pairwise(explored))
    assert len(explored) <= 10.0 / EXPLORE_GAP_S + 1


@measuring
def test_at_low_traffic_one_in_ten_explores(strategy: str) -> None:
    """However long the pauses are: age alone does not send everything to what may be slow."""
    clock = FakeClock()
    made = policy(strategy, clock=clock)
    group = [Deployed("fast", total_s=1.0, now=clock.now), Deployed("slow", total_s=9.0, now=clock.now)]
    chosen: Counter[str] = Counter()
    for _ in range(200):
        clock.advance(10 * REMEASURE_S)
        name, _ = choose(made, group)
        chosen[name] += 1
        group[name == "slow"].replied(clock.now, 1.0 if name == "fast" else 9.0)
    assert 1 <= chosen["slow"] <= 200 / EXPLORE_EVERY


def test_all_are_tried_when_none_is_measured() -> None:
    """By turns, from the first request on."""
    made = policy("speed-priority")
    group = [Deployed(name) for name in "abc"]
    found = [choose(made, group) for _ in range(6)]
    assert sorted(name for name, _ in found) == ["a", "a", "b", "b", "c", "c"]
    assert {reason for _, reason in found} == {Reason.EXPLORED}


@measuring
@given(
    latencies=st.lists(st.floats(0.01, 30), min_size=2, max_size=5),
    gap_s=st.sampled_from([0.01, 0.5, 20.0]),
)
def test_nobody_starves(strategy: str, latencies: list[float], gap_s: float) -> None:
    """Within a bounded number of choices each deployment is measured, and later measured again."""
    clock = FakeClock()
    made = policy(strategy, clock=clock)
    group = [Deployed(str(index)) for index in range(len(latencies))]
    bound = int(2 * len(group) * (EXPLORE_EVERY + EXPLORE_GAP_S / gap_s + 1))

    def serve(times: int) -> None:
        for _ in range(times):
            index, _ = made.choose("m", group, nothing)
            clock.advance(gap_s)
            group[index].replied(clock.now, latencies[index])

    serve(bound)
    assert all(deployment.speed.samples for deployment in group)
    then = clock.now
    serve(int(REMEASURE_S / gap_s) + 1 + bound)
    assert all(deployment.speed.observed_at > then for deployment in group)


def test_one_that_was_slow_once_is_found_to_be_fast_again() -> None:
    """Soon after its measurement is too old, and then it gets the traffic."""
    clock = FakeClock()
    made = policy("speed-priority", clock=clock)
    group = [Deployed("steady", total_s=2.0, now=clock.now), Deployed("ill", now=clock.now)]
    for _ in range(20):
        group[1].replied(clock.now, 20.0)
    found = []
    for _ in range(300):
        name, _ = choose(made, group)
        found.append(name)
        clock.advance(1.0)
        group[name == "ill"].replied(clock.now, 0.5 if name == "ill" else 2.0)
    early = found[: int(REMEASURE_S) - 1]
    assert set(early) == {"steady"}
    assert found[-50:].count("ill") >= 45


def test_one_that_fails_is_not_asked_more_for_never_being_measured() -> None:
    """Failures tell nothing about speed: it keeps the part of one that is to be measured."""
    clock = FakeClock()
    made = policy("speed-priority", clock=clock)
    group = [Deployed("good", total_s=2.0, now=clock.now), Deployed("broken")]
    found = []
    for _ in range(1000):
        name, _ = choose(made, group)
        found.append(name)
        clock.advance(0.05)
        if name == "good":
            group[0].replied(clock.now, 2.0)
    assert 30 <= found.count("broken") <= 51


def test_what_could_not_win_is_not_measured() -> None:
    """`balanced` pays nothing dear to learn the speed of what it would not choose at any speed."""
    clock = FakeClock()
    made = policy("balanced", clock=clock)
    hopeless = Deployed("hopeless", quality=0.1, price=flat(90.0))
    group = [Deployed("good", quality=0.9, price=flat(1.0), total_s=1.0, now=clock.now), hopeless]
    for _ in range(100):
        assert choose(made, group)[0] == "good"
        clock.advance(REMEASURE_S)


def test_noise_does_not_send_everything_to_one_of_two_like_backends() -> None:
    """Half a percent faster is not faster."""
    for strategy in ("balanced", "speed-priority"):
        made = policy(strategy)
        group = [Deployed("a", total_s=1.0), Deployed("b", total_s=1.005)]
        assert Counter(choose(made, group)[0] for _ in range(40)) == {"a": 20, "b": 20}


# -- the operator's function ----------------------------------------------------------------------------


def test_the_function_gets_what_a_policy_gets() -> None:
    """The model, the deployments and the way to ask what the request needs; it may answer with an index or a name."""
    group = [Deployed("a"), Deployed("b", in_use=3), Deployed("c")]
    seen: list[Any] = []

    def busiest(model: str, candidates: Sequence[Any], need: Callable[[], Need]) -> str:
        seen.append((model, list(candidates), need()))
        return max(candidates, key=lambda one: one.in_use).name  # type: ignore[no-any-return]

    assert choose(policy("custom", custom=busiest), group) == ("b", Reason.CUSTOM)
    assert seen == [("m", group, nothing())]
    assert choose(policy("custom", custom=lambda model, candidates, need: 2), group) == ("c", Reason.CUSTOM)
    assert choose(policy("custom", custom=lambda model, candidates, need: candidates[0]), group) == ("a", Reason.CUSTOM)


@pytest.mark.parametrize("said", [None, -1, 3, True, 1.0, "nobody", "", [0], object()])
def test_when_it_talks_nonsense_balanced_decides(said: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And the reason tells that it did."""
    group = [Deployed("a", quality=0.1), Deployed("b", quality=0.9), Deployed("c", quality=0.2)]
    made = policy("custom", custom=lambda model, candidates, need: said)
    assert choose(made, group) == ("b", Reason.CUSTOM_FAILED)
    assert "which is no index or name of the 3 candidates a, b, c" in caplog.text


def test_when_it_fails_balanced_decides_and_the_log_says_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """Each request of a busy router would write a line otherwise."""
    clock = FakeClock()

    def broken(model: str, candidates: Sequence[Any], need: Callable[[], Need]) -> int:
        raise KeyError("gpt")

    made = policy("custom", clock=clock, custom=broken)
    group = [Deployed("a", quality=0.1), Deployed("b", quality=0.9)]
    for _ in range(61):
        assert choose(made, group) == ("b", Reason.CUSTOM_FAILED)
        clock.advance(1.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "KeyError: 'gpt'" in caplog.text
    assert "model 'm'" in caplog.text


def test_custom_needs_a_function() -> None:
    """Said when the policy is made, not at the first request."""
    with pytest.raises(ConfigError, match="routing.custom: the strategy `custom` needs a function"):
        policy("custom")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody's with functions, good and bad, and entry points to them."""
    (tmp_path / "ours_of_test.py").write_text(
        """
class Own:
    def choose(self, model, candidates, need):
        return 1
    def __call__(self, model, candidates, need):
        return 0
    async def late(self, model, candidates, need):
        return 0
own = Own()
constant = 5
def first(model, candidates, need):
    return 0
def short(model):
    return 0
async def later(model, candidates, need):
    return 0
""",
        encoding="utf-8",
    )
    (tmp_path / "broken_of_test.py").write_text("raise RuntimeError('no licence')", encoding="utf-8")
    info = tmp_path / "ours_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ours-of-test\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[llm_router.policies]\nfirst-one = ours_of_test:first\ngone = ours_of_test:gone\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("where", "name"),
    [("ours_of_test:first", "a"), ("ours_of_test:own.choose", "b"), ("ours_of_test:own", "a"), ("first-one", "a")],
)
def test_a_function_is_named_by_its_place_or_as_an_entry_point(where: str, name: str) -> None:
    """Any callable does."""
    made = policy("custom", custom=load_custom(where))
    assert choose(made, [Deployed("a"), Deployed("b")]) == (name, Reason.CUSTOM)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("", "'' is no entry point of the group llm_router.policies"),
        ("nobody", r"'nobody' is no entry point of the group llm_router.policies \(first-one, gone\), nor"),
        ("gone", "'gone' cannot be imported: AttributeError"),
        ("nowhere_at_all:f", "'nowhere_at_all:f' cannot be imported: ModuleNotFoundError"),
        ("ours_of_test:gone", "'ours_of_test:gone' cannot be imported: AttributeError"),
        ("ours_of_test:", "cannot be imported: AttributeError"),
        (":first", "cannot be imported: ValueError"),
        ("broken_of_test:f", "cannot be imported: RuntimeError: no licence"),
        ("ours_of_test:constant", "'ours_of_test:constant' is int, not a function"),
        ("ours_of_test:short", r"cannot be called with \(model, candidates, need\): too many"),
        ("ours_of_test:later", "is async"),
        ("ours_of_test:own.late", "is async"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(where: str, problem: str) -> None:
    """When the configuration is read, with the key, the value and what is wrong."""
    with pytest.raises(ConfigError, match=problem) as caught:
        load_custom(where)
    assert caught.value.key == "routing.custom"
