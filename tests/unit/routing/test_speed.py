"""How fast a deployment is, by what was measured lately."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.routing.speed import HALF_LIFE_S, NEW_SHARE, Speed


def test_nothing_is_known_before_the_first_reply() -> None:
    """And that can be told from a deployment that answers at once."""
    speed = Speed()
    assert speed.samples == 0
    assert speed.observed_at == -math.inf
    assert speed.tried_at == -math.inf
    assert repr(speed) == "Speed(never measured)"
    speed.observe(5.0, 0.0)
    assert speed.samples == 1
    assert speed.observed_at == 5.0
    assert speed.seconds(100) == 0.0


def test_the_first_replies_are_a_plain_mean() -> None:
    """The very first one, of a cold connection or model, has no greater part in it than the second."""
    speed = Speed()
    for total_s in (9.0, 1.0, 2.0, 4.0):
        speed.observe(5.0, total_s)
    assert speed.total_s == pytest.approx(4.0)


def test_later_a_reply_counts_a_fifth() -> None:
    """However many came before."""
    speed = Speed()
    for _ in range(50):
        speed.observe(5.0, 1.0)
    speed.observe(5.0, 2.0)
    assert speed.total_s == pytest.approx(1.0 + NEW_SHARE)


def test_a_stream_tells_the_first_token_from_the_rest() -> None:
    """So that what a reply of any length takes can be said."""
    speed = Speed()
    speed.observe(5.0, 2.5, first_byte_s=0.5, output_tokens=100)
    assert speed.fixed_s == pytest.approx(0.5)
    assert speed.tokens_per_s == pytest.approx(50.0)
    assert speed.seconds(10) == pytest.approx(0.7)
    assert speed.seconds(1000) == pytest.approx(20.5)
    assert repr(speed) == "Speed(2.5 s a reply, 0.5 s to its first token, 50 tokens/s, samples=1)"


def test_a_plain_reply_takes_as_long_as_it_has_tokens() -> None:
    """Nothing says when its first token was there."""
    speed = Speed()
    speed.observe(5.0, 2.0, output_tokens=100)
    assert speed.seconds(50) == pytest.approx(1.0)


def test_a_reply_without_usage_takes_what_it_took() -> None:
    """Embeddings, and backends that do not say how many tokens they sent."""
    speed = Speed()
    speed.observe(5.0, 2.0)
    speed.observe(5.0, 4.0, first_byte_s=1.0)
    assert speed.seconds(0) == speed.seconds(500) == pytest.approx(3.0)
    assert speed.tokens_per_s == 0.0


def test_long_and_short_replies_can_be_compared() -> None:
    """A deployment that got the long answers is not slower for that."""
    long, short = Speed(), Speed()
    for _ in range(5):
        long.observe(5.0, 0.5 + 400 * 0.02, first_byte_s=0.5, output_tokens=400)
        short.observe(5.0, 0.5 + 20 * 0.04, first_byte_s=0.5, output_tokens=20)
    assert long.total_s > 5 * short.total_s
    assert long.seconds(100) < short.seconds(100)


def test_what_is_old_counts_less() -> None:
    """After two half-lives one reply makes four fifths of it: a backend that recovered is found out at once."""
    speed = Speed()
    for _ in range(50):
        speed.observe(5.0, 10.0)
    speed.observe(5.0 + 2 * HALF_LIFE_S, 1.0)
    assert speed.total_s == pytest.approx(1.0 + 9.0 * (1 - NEW_SHARE) / 4)


replies = st.tuples(
    st.floats(0, 1000), st.floats(0, 1000), st.one_of(st.none(), st.floats(0, 2000)), st.integers(0, 100_000)
)


@given(st.lists(replies, min_size=1, max_size=30))
def test_an_average_is_among_what_it_is_of(seen: list[tuple[float, float, float | None, int]]) -> None:
    """In whatever order instants come, and whatever a clock says of the first byte."""
    speed = Speed()
    for now, total_s, first_byte_s, tokens in seen:
        speed.observe(now, total_s, first_byte_s, tokens)
    totals = [total_s for _, total_s, _, _ in seen]
    counts = [tokens for _, _, _, tokens in seen]
    assert min(totals) - 1e-9 <= speed.total_s <= max(totals) + 1e-9
    assert min(counts) - 1e-6 <= speed.output_tokens <= max(counts) + 1e-6
    assert 0.0 <= speed.fixed_s <= speed.total_s + 1e-9
    assert 0.0 <= speed.per_token_s < math.inf
    assert speed.seconds(speed.output_tokens) == pytest.approx(speed.total_s, abs=1e-6)
    assert speed.samples == len(seen)
