"""Fall and rise: which outcomes make a check turn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.health.checks import Status
from llm_router.observe.health.standing import FLAP_WINDOW_S, Standing

WORDS: dict[str, Status] = {"h": "healthy", "d": "degraded", "c": "critical", "i": "initializing"}


def stood(outcomes: str, fall: int = 3, rise: int = 2) -> str:
    """The word after each of the outcomes."""
    standing = Standing(fall, rise)
    shown = []
    for outcome in outcomes:
        standing.take(WORDS[outcome], 0.0)
        shown.append(standing.status[0])
    return "".join(shown)


@pytest.mark.parametrize(
    ("outcomes", "shown"),
    [
        ("h", "h"),
        ("c", "c"),  # nothing was known before
        ("i", "i"),
        ("ihc", "ihh"),
        ("hcchccc", "hhhhhhc"),
        ("hcdc", "hhhc"),
        ("hccd", "hhhd"),
        ("hcccd", "hhhcd"),
        ("hccchchh", "hhhcccch"),
        ("chh", "cch"),
        ("hic", "hhh"),
    ],
)
def test_outcomes_in_a_row_count(outcomes: str, shown: str) -> None:
    """Three failures, two successes; the first outcome at once; the newest failure is the word."""
    assert stood(outcomes) == shown


@given(st.text(alphabet="hdc", min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_a_check_turns_only_after_enough_in_a_row(outcomes: str, fall: int, rise: int) -> None:
    """By the definition, looked at from each turn backwards; every turn is counted and told."""
    standing, turns = Standing(fall, rise), 0
    for index, outcome in enumerate(outcomes):
        before = standing.status
        has_turned = standing.take(WORDS[outcome], float(index))
        assert has_turned == (index > 0 and (before == "healthy") != (standing.status == "healthy"))
        turns += has_turned
        recent = outcomes[: index + 1]
        if has_turned and standing.status == "healthy":
            assert recent.endswith("h" * rise)
        elif has_turned:
            assert len(recent) - len(recent.rstrip("dc")) >= fall
        assert min(standing.failures, standing.successes) == 0
    assert standing.transitions == turns
    assert standing.flaps(float(len(outcomes))) == turns


@given(st.lists(st.sampled_from("hc"), min_size=1, max_size=30))
def test_what_is_known_for_sure_turns_at_once(outcomes: Sequence[str]) -> None:
    """Fall and rise of one are the outcomes themselves."""
    assert stood("".join(outcomes), 1, 1) == "".join(outcomes)


def test_flaps_are_those_of_the_last_hour() -> None:
    """The total goes on."""
    standing = Standing(1, 1)
    for at, outcome in enumerate("hchch"):
        standing.take(WORDS[outcome], float(at))
    assert (standing.transitions, standing.flaps(4.0)) == (4, 4)
    assert standing.flaps(2.5 + FLAP_WINDOW_S) == 2
    assert (standing.transitions, standing.flaps(5 + FLAP_WINDOW_S)) == (4, 0)
