"""Deployments as a policy sees them, with everything said and measured by hand."""

from __future__ import annotations

from collections.abc import Callable

from llm_router.models.prices import Price
from llm_router.routing.needs import Need
from llm_router.routing.speed import Speed


class Deployed:
    """A candidate. `total_s` is what replies of 100 tokens took there lately, at instant `now`; None: never measured."""

    def __init__(
        self,
        name: str,
        *,
        in_use: int = 0,
        quality: float | None = None,
        price: Price | None = None,
        context_tokens: int = 0,
        capabilities: frozenset[str] | None = None,
        total_s: float | None = None,
        now: float = 1000.0,
    ) -> None:
        self.name = name
        self.in_use = in_use
        self.quality = quality
        self.price = price
        self.context_tokens = context_tokens
        self.capabilities = capabilities
        self.speed = Speed()
        if total_s is not None:
            self.replied(now, total_s)

    def replied(self, now: float, total_s: float) -> None:
        """A reply of 100 tokens ended."""
        self.speed.observe(now, total_s, output_tokens=100)

    def __repr__(self) -> str:
        return f"Deployed({self.name!r}, in_use={self.in_use}, {self.speed})"


def flat(dollars: float) -> Price:
    """A price that is the same for input and output."""
    return Price(input=dollars, output=dollars)


def nothing() -> Need:
    """What a request without any wish needs."""
    return Need(input_tokens=10)


def wanting(need: Need) -> Callable[[], Need]:
    """The way to ask what a request needs, for one that needs this."""
    return lambda: need
