"""What a key, a model or everybody together may use: the numbers, without any state.

Not for: counting (ledger.py) or deciding (limiter.py).
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec

Scope = Literal["key", "model", "global"]

KINDS: Final = (
    "requests_per_minute",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_day",
    "concurrency",
    "usd_per_day",
    "usd_per_month",
)
"""The limits there are; label values of `rate_limit_hits_total`, and fields of `Limits`."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one subject; 0 is no bound.

    Minutes and days of requests and tokens slide: in no 60 s, and in no 24 h, is more let through. Days and months of
    money are the calendar's, UTC. Tokens are input and output together.

    Args:
        concurrency: inferences in flight at once.
        usd_per_day, usd_per_month: what may be spent; meant for keys.
        warn_ratio: share of a budget from which on a warning is given, 0..1.
    """

    requests_per_minute: int = 0
    requests_per_day: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0
    usd_per_day: float = 0.0
    usd_per_month: float = 0.0
    warn_ratio: float = 0.8

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)


class Subject(NamedTuple):
    """Whose limit it is. `name` is the key's id, the model's name, or empty for everybody together."""

    scope: Scope
    name: str
