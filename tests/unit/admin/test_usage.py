"""`/admin/usage`: what is asked of the store, what is shown, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import pytest

from llm_router.accounts.usage import UsageGroup, UsageTotal
from llm_router.admin import usage
from llm_router.errors import InvalidRequest, StoreUnavailable
from support.admin import asked

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
TODAY = 1_789_948_800.0
DAY_S = 86_400.0


class Book:
    """Usage of the test's choosing, and what was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.totals: list[UsageTotal] = []
        self.problem: Exception | None = None

    async def usage(
        self, *, by: Sequence[UsageGroup], since: float, until: float, key: str | None, model: str | None
    ) -> Sequence[UsageTotal]:
        self.asked = {"by": by, "since": since, "until": until, "key": key, "model": model}
        if self.problem is not None:
            raise self.problem
        return self.totals


def get(book: Book, query: str = "", **parameters: str) -> tuple[int, Any]:
    """Status and JSON of the reply, asked as the command line."""
    answer = asked(usage.routes(book, now=lambda: NOW), "GET", "/admin/usage", query or urlencode(parameters))
    return answer.status, answer.json()


def test_without_parameters_the_last_month_is_summed_by_key() -> None:
    """Thirty whole days and today until now, with their total."""
    book = Book()
    book.totals = [
        UsageTotal(key_id="", key="", requests=1, input_tokens=3, unpriced_requests=1),
        UsageTotal(
            key_id="k1", key="ci", requests=2, errors=1, output_tokens=4, cost_usd=0.1 + 0.2, cost_status="exact"
        ),
    ]
    status, reply = get(book)
    assert status == 200
    assert book.asked == {"by": ("key",), "since": TODAY - 30 * DAY_S, "until": NOW, "key": None, "model": None}
    assert (reply["since"], reply["until"]) == ("2026-08-22T00:00:00.000Z", "2026-09-21T14:13:20.000Z")
    assert reply["by"] == ["key"]
    assert reply["totals"][1] == {
        "key_id": "k1",
        "key": "ci",
        "requests": 2,
        "errors": 1,
        "cached_requests": 0,
        "input_tokens": 0,
        "output_tokens": 4,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "cost_usd": 0.3,
        "cost_status": "exact",
        "unpriced_requests": 0,
    }
    total = reply["total"]
    assert (total["requests"], total["input_tokens"], total["cost_usd"], total["unpriced_requests"]) == (3, 3, 0.3, 1)
    assert "key" not in total


def test_groups_and_filters_are_handed_on() -> None:
    """In their order, each once; without groups there is the total alone."""
    book = Book()
    book.totals = [UsageTotal(day="2026-09-20", model="m", backend="b", requests=7)]
    _, reply = get(book, by="day,model,,backend,day", key="ci", model="m")
    assert (book.asked["by"], book.asked["key"], book.asked["model"]) == (("day", "model", "backend"), "ci", "m")
    assert (reply["by"], reply["totals"][0]["day"]) == (["day", "model", "backend"], "2026-09-20")
    book.totals = [UsageTotal(requests=7)]
    _, reply = get(book, "by=")
    assert (book.asked["by"], reply["totals"], reply["total"]["requests"]) == ((), [], 7)


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("2026-09-20", "2026-09-20", (TODAY - DAY_S, TODAY)),
        ("20260920", "20260921", (TODAY - DAY_S, TODAY + DAY_S)),
        ("2026-09-20T12:00:00Z", "2026-09-21T00:00:00", (TODAY - DAY_S / 2, TODAY)),
        ("2026-09-20T02:00:00+02:00", "1789948800.5", (TODAY - DAY_S, TODAY + 0.5)),
        ("0", "9999-12-31T23:59:59-14:00", (0.0, 253_402_300_799.0)),
        ("0001-01-01", "99999999999", (0.0, 99_999_999_999.0)),
    ],
)
def test_times_are_dates_date_times_or_seconds(since: str, until: str, expected: tuple[float, float]) -> None:
    """UTC unless they say otherwise; the end is not included, but a date as the end is the whole day."""
    book = Book()
    assert get(book, since=since, until=until)[0] == 200
    assert (book.asked["since"], book.asked["until"]) == expected
    assert get(book, f"since={since}&until={until}")[0] == 200  # a + that was not encoded
    assert (book.asked["since"], book.asked["until"]) == expected


@pytest.mark.parametrize(
    ("query", "code", "param", "problem"),
    [
        ("by=user", "invalid_group", "by", "usage cannot be summed by 'user'; it can by key, model, backend, day"),
        ("since=yesterday", "invalid_time", "since", "since='yesterday' is no time; write 2026-09-30"),
        ("until=", "invalid_time", "until", "until='' is no time"),
        ("until=9999-12-31", "invalid_time", "until", "is no time"),
        ("since=nan", "invalid_time", "since", "is no time"),
        ("since=2026-09-22", "invalid_time", "since", "(2026-09-22T00:00:00.000Z) is not before until (2026-09-21T14"),
        ("until=0", "invalid_time", "since", "is not before until"),
        (
            "from=2026-09-22",
            "unknown_parameter",
            "from",
            "there is no parameter 'from'; there are by, since, until, key",
        ),
        ("by=key&by=model", "repeated_parameter", "by", "by is given twice"),
    ],
)
def test_what_cannot_be_understood_is_refused(query: str, code: str, param: str, problem: str) -> None:
    """With the parameter at fault and what to write; the store is not asked."""
    book = Book()
    status, reply = get(book, query)
    error = reply["error"]
    assert (status, error["code"], error["param"]) == (400, code, param)
    assert problem in error["message"]
    assert book.asked == {}


def test_what_the_store_says_is_passed_on() -> None:
    """Too many sums are the caller's matter, a store that is away is not."""
    book = Book()
    book.problem = InvalidRequest("too many", code="too_many_groups")
    assert get(book)[0] == 400
    book.problem = StoreUnavailable("accounts.db: database is locked")
    status, reply = get(book)
    assert (status, reply["error"]["code"]) == (503, "accounts_unavailable")
