"""Prices that providers publish, by the list that the package genai-prices carries. No network.

The list takes a quarter of a second and some megabytes to load: only control and library mode ask it, and only when
a price is not configured. Not for: computing costs (prices.py).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from llm_router.models.prices import Price, Tier

if TYPE_CHECKING:
    from decimal import Decimal

    from genai_prices.types import ModelPrice, TieredPrices


def find(model: str, provider: str = "", url: str = "", *, at: datetime | None = None) -> Price | None:
    """What a model costs at whoever serves it; None when the list does not know that.

    A server that the list does not know may take any price for a model with a well-known name, nothing included: a
    price is never guessed from the name alone when there is a `url`.

    Args:
        model: the name that the backend knows it by.
        provider: a provider's id in the list (openai, anthropic, azure, aws, google, openrouter…); counts before `url`.
        url: the backend's base URL, by which the provider is found. With neither, the name must tell:
            `gpt-4o`, or `anthropic/claude-sonnet-4-5` with the provider's id in front.
        at: for when; now, if None. Some prices change by date or hour: what is found holds for that instant.
    """
    from genai_prices.data_snapshot import get_snapshot

    prices = get_snapshot()
    places = [(model, provider or None, None if provider else url or None)]
    owner, slash, rest = model.partition("/")
    if not provider and not url and slash:
        places.append((rest, owner, None))
    for name, owner_id, base in places:
        try:
            _, info = prices.find_provider_model(name, None, owner_id, base)
        except LookupError:
            continue
        return _price(info.get_prices(at or datetime.now(UTC)))
    return None


def _price(listed: ModelPrice) -> Price | None:
    """The list's price in our words; None for a model that is not paid by tokens of text (speech, images)."""
    given, taken, cached = listed.input_mtok, listed.output_mtok, listed.cache_read_mtok
    written, written_1h = listed.cache_write_mtok, listed.cache_write_1h_mtok
    if given is None and taken is None:
        return None
    if listed.requests_kcount is not None:
        return None  # a fee per request besides: what its tokens cost is not what it costs
    starts = sorted(
        {tier.start for value in (given, taken, cached, written, written_1h) for tier in getattr(value, "tiers", ())},
    )
    return Price(
        input=_at(given, 0) or 0.0,
        output=_at(taken, 0) or 0.0,
        cached_input=_at(cached, 0),
        cache_write=_at(written, 0),
        cache_write_1h=_at(written_1h, 0),
        tiers=tuple(
            Tier(
                above_tokens=start,
                input=_at(given, start) or 0.0,
                output=_at(taken, start) or 0.0,
                cached_input=_at(cached, start),
                cache_write=_at(written, start),
                cache_write_1h=_at(written_1h, start),
            )
            for start in starts
        ),
    )


def _at(value: Decimal | TieredPrices | None, start: int) -> float | None:
    """The number that holds for inputs beyond `start` tokens."""
    from genai_prices.types import TieredPrices

    if value is None:
        return None
    if not isinstance(value, TieredPrices):
        return float(value)
    number = value.base
    for tier in value.tiers:  # ascending
        if tier.start <= start:
            number = tier.price
    return float(number)
