"""What is kept of one inference: one row, written once; and what many of them come to.

Not for: storing rows (store.py) or making them (processes).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from llm_router.signals import CostStatus, Outcome, UsageSource


class UsageRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """One inference.

    Args:
        id: unique over all workers and starts, so that a row that is sent twice is stored once.
        time: end of the inference, Unix seconds.
        request_id: as in the reply's `x-request-id`; callers may choose it, so it need not be unique.
        key_id, key: the caller's key and its name then; empty without one.
        model: as the caller named it, or the fallback that answered.
        backend: that answered last; empty if none was asked.
        cost_usd: US dollars; 0 with an empty `cost_status` when there is no price.
        cached: answered from the cache: then no tokens and no cost.
        duration_s: seconds from the request's first byte to the reply's last.
    """

    id: str
    time: float
    request_id: str
    key_id: str = ""
    key: str = ""
    model: str = ""
    backend: str = ""
    strategy: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    usage_source: UsageSource = "none"
    cost_usd: float = 0.0
    cost_status: CostStatus = ""
    cached: bool = False
    outcome: Outcome = "error"
    status: int = 0
    duration_s: float = 0.0


UsageGroup = Literal["key", "model", "backend", "day"]
GROUPS: Final[tuple[UsageGroup, ...]] = ("key", "model", "backend", "day")
"""By what usage can be summed; a day is UTC's."""


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """What the inferences of one group come to. What is not grouped by is None.

    Args:
        key_id: of the key; empty for inferences without one.
        key: its name now, or when it was last used if it is not in the store.
        day: like `2026-09-30`, UTC.
        requests: inferences, however they ended; `errors` and `cached_requests` are among them.
        errors: that failed; one whose client left is none.
        cached_requests: that the cache answered: no tokens and no cost.
        cost_usd: of those that have a price.
        cost_status: `exact` if price and usage of each were known for sure, `estimated` if not of every one, empty if
            none has a price.
        unpriced_requests: that a model answered and that have no price.
    """

    key_id: str | None = None
    key: str | None = None
    model: str | None = None
    backend: str | None = None
    day: str | None = None
    requests: int = 0
    errors: int = 0
    cached_requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float = 0.0
    cost_status: CostStatus = ""
    unpriced_requests: int = 0


class UsageSlot(msgspec.Struct, frozen=True, kw_only=True):
    """What one key used of one model in a stretch of time: what limits are rebuilt from at a start.

    Args:
        time: beginning of the stretch, Unix seconds.
        requests: that were let through: asked of a backend or answered by the cache.
        tokens: input and output.
    """

    time: float
    key_id: str
    model: str
    requests: int
    tokens: int
    cost_usd: float


def sum_of(totals: Iterable[UsageTotal]) -> UsageTotal:
    """One total of many groups, grouped by nothing."""
    sums = dict.fromkeys(_COUNTS, 0)
    cost_usd, statuses = 0.0, set[CostStatus]()
    for total in totals:
        for name in _COUNTS:
            sums[name] += getattr(total, name)
        cost_usd += total.cost_usd
        statuses.add(total.cost_status)
    status: CostStatus = "estimated" if "estimated" in statuses else "exact" if "exact" in statuses else ""
    return UsageTotal(**sums, cost_usd=cost_usd, cost_status=status)  # type: ignore[arg-type]  # counts, by name


_COUNTS: Final = (
    "requests",
    "errors",
    "cached_requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "unpriced_requests",
)
