"""What inferences cost, and what the price list says; checked against its own arithmetic."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import genai_prices
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.chat import Usage
from llm_router.models.price_list import find
from llm_router.models.prices import Price, Tier
from support.fuzz import examples

AT = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
"""For prices that change by date or hour."""

LISTED = [
    ("openai", "gpt-4o"),
    ("openai", "text-embedding-3-small"),
    ("anthropic", "claude-sonnet-4-5"),
    ("anthropic", "claude-3-5-haiku-latest"),
    ("google", "gemini-2.5-pro"),
    ("deepseek", "deepseek-chat"),
    ("azure", "gpt-4o"),
    ("openrouter", "openai/gpt-4o"),
]
tokens = st.one_of(st.integers(0, 5000), st.integers(0, 2_000_000), st.sampled_from([200_000, 200_001, 272_001]))


def test_a_price_is_per_million_tokens() -> None:
    """Input and output have their own."""
    assert Price(input=2.0, output=10.0).cost_usd(Usage(1_000_000, 100_000)) == pytest.approx(3.0)


def test_cached_input_has_its_own_price_if_there_is_one() -> None:
    """It is part of the input; without a price of its own it costs as much."""
    usage = Usage(1_000_000, 0, cached_tokens=400_000)
    assert Price(input=2.0, output=10.0, cached_input=0.5).cost_usd(usage) == pytest.approx(1.4)
    assert Price(input=2.0, output=10.0).cost_usd(usage) == pytest.approx(2.0)
    assert Price(input=2.0, output=10.0, cached_input=0.0).cost_usd(usage) == pytest.approx(1.2)
    assert Price(input=2.0, output=10.0, cached_input=0.5).cost_usd(Usage(10, 0, cached_tokens=99)) == pytest.approx(
        5e-6
    )


def test_input_that_is_written_to_a_cache_has_its_own_price_if_there_is_one() -> None:
    """It is part of the input too; what is kept for an hour may cost more than what is kept for minutes."""
    usage = Usage(1_000_000, 0, cached_tokens=400_000, cache_write_tokens=200_000)
    price = Price(input=2.0, output=10.0, cached_input=0.5, cache_write=2.5)
    assert price.cost_usd(usage) == pytest.approx(0.2 + 0.5 + 0.8)
    assert Price(input=2.0, output=10.0, cached_input=0.5).cost_usd(usage) == pytest.approx(1.4)
    longer = Usage(1_000_000, 0, cache_write_tokens=200_000, cache_write_1h_tokens=50_000)
    assert price.cost_usd(longer) == pytest.approx(0.5 + 1.6)
    listed = Price(input=2.0, output=10.0, cache_write=2.5, cache_write_1h=4.0)
    assert listed.cost_usd(longer) == pytest.approx(0.15 * 2.5 + 0.05 * 4.0 + 1.6)
    assert listed.cost_usd(Usage(10, 0, 6, cache_write_tokens=99, cache_write_1h_tokens=99)) == pytest.approx(28e-6)


def test_a_long_input_costs_by_its_tier_as_a_whole() -> None:
    """The output and what is cached too; the bound itself belongs to the tier below."""
    price = Price(
        input=1.0,
        output=2.0,
        tiers=(
            Tier(above_tokens=100, input=3.0, output=4.0),
            Tier(above_tokens=200, input=5.0, output=6.0, cached_input=1.0),
        ),
    )
    assert price.cost_usd(Usage(100, 10)) == pytest.approx(120e-6)
    assert price.cost_usd(Usage(101, 10)) == pytest.approx(343e-6)
    assert price.cost_usd(Usage(201, 10, cached_tokens=100)) == pytest.approx(665e-6)


def test_a_price_survives_the_way_to_a_worker() -> None:
    """The snapshot carries it."""
    price = find("gemini-2.5-pro", "google", at=AT)
    assert price is not None
    assert price.tiers
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(price), type=Price) == price


@settings(max_examples=examples(200))
@given(st.sampled_from(LISTED), tokens, tokens, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_costs_are_those_of_the_list(
    listed: tuple[str, str], given: int, taken: int, cached: float, written: float, hour: float
) -> None:
    """By its own arithmetic, tiers and what is read from and written to the provider's cache included."""
    provider, model = listed
    price = find(model, provider, at=AT)
    assert price is not None
    cached_tokens = int(given * cached) if price.cached_input is not None else 0
    written_tokens = int((given - cached_tokens) * written) if price.cache_write is not None else 0
    hour_tokens = int(written_tokens * hour) if price.cache_write_1h is not None else 0
    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=given,
            output_tokens=taken,
            cache_read_tokens=cached_tokens,
            cache_write_tokens=written_tokens,
            **({"cache_write_1h_tokens": hour_tokens} if hour_tokens else {}),
        ),
        model,
        provider_id=provider,
        genai_request_timestamp=AT,
    )
    usage = Usage(given, taken, cached_tokens, 0, written_tokens, hour_tokens)
    assert price.cost_usd(usage) == pytest.approx(float(theirs.total_price), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "provider", "url"),
    [
        ("gpt-4o", "openai", ""),
        ("gpt-4o", "", "https://api.openai.com/v1"),
        ("gpt-4o", "", "https://ours.openai.azure.com/openai/v1"),
        ("openai/gpt-4o", "", "https://openrouter.ai/api/v1"),
        ("gpt-4o", "", ""),
        ("openai/gpt-4o", "", ""),
        ("gpt-4o", "openai", "http://10.0.0.5:4000/v1"),
        ("GPT-4o", "OpenAI", ""),
    ],
)
def test_a_price_is_found_by_provider_address_or_name(model: str, provider: str, url: str) -> None:
    """The provider counts before the address, and the address before the name."""
    expected = find("gpt-4o", "openai", at=AT)
    found = find(model, provider, url, at=AT)
    assert expected is not None
    assert found is not None
    assert 0.0 < expected.input < expected.output
    assert expected.cached_input is not None
    assert expected.cached_input < expected.input
    assert (found.input, found.output) == (expected.input, expected.output)


@pytest.mark.parametrize(
    ("model", "provider", "url"),
    [
        ("gpt-4o", "", "http://10.0.0.5:8000/v1"),
        ("deepseek-chat", "", "http://127.0.0.1:11434/v1"),
        ("gpt-4o", "nobody", ""),
        ("gpt-4o", "nobody", "https://api.openai.com/v1"),
        ("a-model-of-our-own", "openai", ""),
        ("a-model-of-our-own", "", ""),
        ("nobody/gpt-4o", "", ""),
        ("", "", ""),
        ("/", "", ""),
        ("whisper-1", "openai", ""),
    ],
)
def test_no_price_is_guessed(model: str, provider: str, url: str) -> None:
    """A server of unknown make may be anybody's, whatever its models are called; speech is not paid by tokens."""
    assert find(model, provider, url) is None


def test_an_embedding_costs_its_input() -> None:
    """There is no output."""
    price = find("text-embedding-3-small", "openai")
    assert price is not None
    assert price.input > 0.0
    assert price.output == 0.0


def test_the_list_is_loaded_when_it_is_asked_for() -> None:
    """Neither costs nor the module that looks them up bring it: a worker computes costs and must stay small."""
    code = (
        "import sys, llm_router.models.prices, llm_router.models.price_list, llm_router.routing.policies as p\n"
        "assert 'genai_prices' not in sys.modules\n"
        "assert p.POLICIES\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_dearest_rate_is_that_of_the_worst_case() -> None:
    """Of input, output and what is written to a cache, in every tier; a limit reserves by it."""
    assert Price(input=2.0, output=1.0).dearest() == 2.0
    assert Price(input=1.0, output=2.0, cache_write=3.0).dearest() == 3.0
    long = Tier(above_tokens=200_000, input=4.0, output=9.0, cache_write_1h=8.0)
    assert Price(input=1.0, output=2.0, tiers=(long,)).dearest() == 9.0
