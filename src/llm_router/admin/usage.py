"""What was used, over HTTP: sums of usage rows by key, model, backend and day.

Not for: storing (accounts/store.py) or single rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.accounts.usage import GROUPS, UsageGroup, UsageTotal, sum_of
from llm_router.admin.application import json_response, read_query
from llm_router.errors import InvalidRequest
from llm_router.observe.timestamp import timestamp

_PARAMETERS: Final = ("by", "since", "until", "key", "model")
_USUAL_DAYS: Final = 30
_DAY_S: Final = 86_400.0
_DATE: Final = re.compile(r"\d{4}-?\d\d-?\d\d")
_NUMBER: Final = re.compile(r"0|\d{9,11}(\.\d+)?")  # shorter ones are dates like 20260930
_END_S: Final = 253_402_300_799.0  # of the year 9999, the last that can be shown
_USD_DIGITS: Final = 9  # a billionth of a dollar: below the price of a token, above what sums of floats lose


class UsageBook(Protocol):
    """Whoever keeps the usage."""

    async def usage(
        self, *, by: Sequence[UsageGroup], since: float, until: float, key: str | None, model: str | None
    ) -> Sequence[UsageTotal]:
        """Sums over the inferences that ended in [since, until), Unix seconds. Raises: InvalidRequest, StoreUnavailable."""


def routes(book: UsageBook, *, now: Callable[[], float]) -> list[Route]:
    """The endpoint `/admin/usage?by=key,model,backend,day&since=&until=&key=&model=`.

    Usual is a sum by key over the last 30 days and today. Times are dates, date-times (UTC, or with an offset) or Unix
    seconds; `until` is not included, but a date there is the whole day.

    Args:
        now: Unix time in seconds.
    """

    async def show(request: Request) -> Response:
        wanted = read_query(request, _PARAMETERS)
        by = _groups(wanted.get("by", "key"))
        instant = now()
        until = _instant("until", wanted["until"], is_end=True) if "until" in wanted else instant
        if "since" in wanted:
            since = _instant("since", wanted["since"])
        else:
            since = max(0.0, (min(until, instant) // _DAY_S - _USUAL_DAYS) * _DAY_S)
        if since >= until:
            raise InvalidRequest(
                f"since ({timestamp(since)}) is not before until ({timestamp(until)})",
                code="invalid_time",
                param="since",
            )
        totals = await book.usage(by=by, since=since, until=until, key=wanted.get("key"), model=wanted.get("model"))
        return json_response(
            {
                "since": timestamp(since),
                "until": timestamp(until),
                "by": by,
                "totals": [_document(total) for total in totals] if by else [],
                "total": _document(sum_of(totals)),
            }
        )

    return [Route("/admin/usage", show, methods=["GET"])]


def _groups(text: str) -> tuple[UsageGroup, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in GROUPS:
            raise InvalidRequest(
                f"usage cannot be summed by {name[:100]!r}; it can by {', '.join(GROUPS)}",
                code="invalid_group",
                param="by",
            )
    return cast("tuple[UsageGroup, ...]", tuple(dict.fromkeys(names)))


def _instant(name: str, text: str, *, is_end: bool = False) -> float:
    """Unix seconds. Raises: InvalidRequest."""
    try:
        if _NUMBER.fullmatch(text):
            return min(float(text), _END_S)
        # A + in a query is a blank: an offset that was not encoded is meant all the same.
        at = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        at = at.replace(tzinfo=at.tzinfo or UTC)
        if is_end and _DATE.fullmatch(text):
            at += timedelta(days=1)
        return max(0.0, min(at.timestamp(), _END_S))
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{name}={text[:100]!r} is no time; write 2026-09-30, 2026-09-30T12:00:00Z or Unix seconds",
            code="invalid_time",
            param=name,
        ) from None


def _document(total: UsageTotal) -> dict[str, Any]:
    shown = {name: value for name, value in msgspec.structs.asdict(total).items() if value is not None}
    shown["cost_usd"] = round(total.cost_usd, _USD_DIGITS)
    return shown
