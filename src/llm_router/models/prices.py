"""What a model costs: prices per token, and the cost of an inference by them.

Pure records, so that workers can compute with them. Not for: finding prices (price_list.py).
"""

from __future__ import annotations

import msgspec

from llm_router.chat import Usage

_MILLION = 1_000_000


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """What a request with more than `above_tokens` of input costs, every token of it (as providers count)."""

    above_tokens: int
    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars per million tokens. `cached_input` is for input that the provider had cached; None: as `input`.

    Args:
        cache_write: for input that the provider writes to its cache; None: as `input`.
        cache_write_1h: for what it keeps there for an hour, from price lists, not configured; None: as `cache_write`.
        tiers: for long inputs, those for longer ones later; from price lists, not configured.
    """

    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None
    tiers: tuple[Tier, ...] = ()

    def dearest(self) -> float:
        """What a token may cost at the most, whatever becomes of it and however long the input is."""
        every: tuple[Price | Tier, ...] = (self, *self.tiers)
        return max(
            rate
            for rates in every
            for rate in (rates.input, rates.output, rates.cache_write, rates.cache_write_1h)
            if rate is not None
        )

    def cost_usd(self, usage: Usage) -> float:
        """What these tokens cost in US dollars."""
        rates: Price | Tier = self
        for tier in self.tiers:
            if usage.input_tokens > tier.above_tokens:
                rates = tier
        cached = rates.input if rates.cached_input is None else rates.cached_input
        cached_tokens = min(usage.cached_tokens, usage.input_tokens)
        fresh_tokens = usage.input_tokens - cached_tokens
        micro_usd = fresh_tokens * rates.input + cached_tokens * cached + usage.output_tokens * rates.output
        if usage.cache_write_tokens and rates.cache_write is not None:
            written = min(usage.cache_write_tokens, fresh_tokens)
            longer = min(usage.cache_write_1h_tokens, written)
            rate_1h = rates.cache_write if rates.cache_write_1h is None else rates.cache_write_1h
            micro_usd += (written - longer) * (rates.cache_write - rates.input) + longer * (rate_1h - rates.input)
        return micro_usd / _MILLION
