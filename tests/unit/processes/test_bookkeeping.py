"""Control's accounts over a real database: what was used before a start is known before anything is lent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from llm_router.accounts.keys import digest_of
from llm_router.accounts.ledger import Ask, Grant
from llm_router.accounts.limits import Limits, Subject
from llm_router.accounts.store import Store
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.usage import UsageRow
from llm_router.config.settings import AccountsSettings
from llm_router.errors import Unavailable
from llm_router.processes.bookkeeping import Bookkeeping
from llm_router.processes.news import WorkerLine
from llm_router.processes.snapshot import LeaseAsk, LeaseGrants, UsageBatch, UsageTaken, Word
from llm_router.testing import FakeClock
from support.aio import run, until

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
DAY_S = 86_400.0


class Line:
    """A worker, as far as accounts see one."""

    def __init__(self, name: str = "line 1") -> None:
        self.name = name
        self.told: list[Word] = []

    def tell(self, word: Word) -> None:
        self.told.append(word)

    def grants(self) -> list[Grant]:
        return [grant for word in self.told if isinstance(word, LeaseGrants) for grant in word.grants]


def row(number: int, time: float = NOW - 10.0, **fields: Any) -> UsageRow:
    return UsageRow(
        id=f"row {number}",
        time=time,
        request_id="r",
        key_id="k1",
        model="m",
        backend="b",
        input_tokens=3,
        output_tokens=6,
        cost_usd=0.01,
        outcome="success",
        **fields,
    )


def batch(number: int, *rows: UsageRow, is_late: bool = False) -> UsageBatch:
    return UsageBatch(number, rows, is_late=is_late)


class World:
    """A database with a key that is limited, and control's accounts of it when `opened`."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.url = f"sqlite:///{folder / 'accounts.db'}"
        self.clock = FakeClock(NOW)
        self.line = Line()
        self.limits = Limits(**cast("dict[str, Any]", limits))
        self.store = Store.open(self.url)
        self.store.add_key(StoredKey(id="k1", name="k", digest=digest_of("x"), limits=self.limits, created_time=NOW))

    @contextlib.asynccontextmanager
    async def opened(self, workers: int = 1, retention_s: float = 400 * DAY_S) -> AsyncIterator[Bookkeeping]:
        """As control does it: limits are followed whenever something changed."""
        tasks = set[asyncio.Task[None]]()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            tasks.add(asyncio.get_running_loop().create_task(work))

        books = Bookkeeping(
            AccountsSettings(database=self.url, usage_retention_s=retention_s),
            limits=lambda: {Subject("key", "k1"): self.limits} if books.is_ready else {},
            name="router",
            workers=workers,
            on_change=lambda: books.lending.follow(),  # noqa: PLW0108 - there are no books yet
            on_error=lambda kind: None,
            on_dropped=lambda reason, count: None,
            spawn=spawn,
            clock=self.clock,
            wall=self.clock,
        )
        running = asyncio.create_task(books.run())
        try:
            yield books
        finally:
            for task in (running, *tasks):
                task.cancel()
            await asyncio.gather(running, *tasks, return_exceptions=True)
            await books.aclose()
            self.store.close()

    async def lent(self, books: Bookkeeping, kind: str, need: int, line: Line | None = None) -> int:
        """Units that a worker gets of the key's limit."""
        line = line or self.line
        before = len(line.grants())
        ask = Ask("key", "k1", kind, want=need, need=need, least=1)
        books.lending.lend(cast("WorkerLine", line), LeaseAsk((ask,)))
        await until(lambda: len(line.grants()) > before)
        return line.grants()[-1].units


def test_nothing_is_lent_before_it_is_known_what_was_used(tmp_path: Path) -> None:
    """Whoever asks while the store is being read waits for it."""
    world = World(tmp_path, requests_per_day=20, tokens_per_minute=1000, usd_per_month=1.0)
    world.store.add_usage([row(number) for number in range(12)])

    async def scenario() -> None:
        async with world.opened() as books:
            assert await world.lent(books, "requests_per_day", 20) == 8
            assert await world.lent(books, "tokens_per_minute", 1000) == 1000 - 12 * 9
            assert await world.lent(books, "usd_per_month", 1_000_000) == 880_000

    run(scenario())


def test_rows_that_the_control_before_did_not_acknowledge_are_counted_once(tmp_path: Path) -> None:
    """Those it had stored are counted with the store, the others when they come; before anything is lent."""
    world = World(tmp_path, requests_per_day=20)
    rows = [row(number) for number in range(12)]
    world.store.add_usage(rows[:5])

    async def scenario() -> None:
        async with world.opened() as books:
            books.take_usage(cast("WorkerLine", world.line), batch(1, *rows, is_late=True))
            assert await world.lent(books, "requests_per_day", 20) == 8
            await until(lambda: UsageTaken(1) in world.line.told)
            assert len(world.store.stored_usage([row.id for row in rows])) == 12

    run(scenario())


def test_rows_of_leases_of_this_control_are_not_counted_again(tmp_path: Path) -> None:
    """They were counted when they were lent: also those that are sent again after a connection broke."""
    world = World(tmp_path, requests_per_day=20)

    async def scenario() -> None:
        async with world.opened() as books:
            line = cast("WorkerLine", world.line)
            books.take_usage(line, batch(1, row(1, NOW + 1.0)))
            books.take_usage(line, batch(2, row(2, NOW + 1.0), is_late=True))
            await until(lambda: UsageTaken(2) in world.line.told)
            assert await world.lent(books, "requests_per_day", 20) == 20

    run(scenario())


def test_what_was_used_leaves_the_window_no_earlier_than_it_may(tmp_path: Path) -> None:
    """Stored usage is read in stretches of minutes: each counts as if it were of its stretch's end."""
    world = World(tmp_path, requests_per_day=20)
    used_at = NOW // 600 * 600 - 1.0  # the last second of a stretch
    world.store.add_usage([row(number, used_at) for number in range(12)])

    async def scenario() -> None:
        async with world.opened() as books:
            assert await world.lent(books, "requests_per_day", 1) == 1
            world.clock.now = used_at + DAY_S - 1.0
            assert await world.lent(books, "requests_per_day", 20) <= 8

    run(scenario())


def test_two_workers_get_no_more_than_one(tmp_path: Path) -> None:
    """What both still hold of the control before is known first."""
    world = World(tmp_path, requests_per_minute=20)
    other = Line("line 2")

    async def scenario() -> None:
        async with world.opened(workers=2) as books:
            first = asyncio.create_task(world.lent(books, "requests_per_minute", 20))
            held = Ask("key", "k1", "requests_per_minute", held=15, epoch="of the control before")
            books.lending.lend(cast("WorkerLine", other), LeaseAsk((held,)))
            assert await first == 5

    run(scenario())


def test_usage_that_budgets_and_limits_are_counted_from_is_not_forgotten(tmp_path: Path) -> None:
    """However short usage is to be kept: the next start would lend out again what was spent this month, or this day."""
    world = World(tmp_path, usd_per_month=1.0)
    first_of_month = NOW - 20.5 * DAY_S
    rows = [row(1, first_of_month), row(2, NOW - 5 * DAY_S), row(3, NOW - 22 * DAY_S)]
    world.store.add_usage(rows)

    async def scenario() -> None:
        async with world.opened(retention_s=DAY_S) as books:
            await until(lambda: len(world.store.stored_usage([row.id for row in rows])) == 2)
            assert await world.lent(books, "usd_per_month", 1_000_000) == 980_000
        world.store = Store.open(world.url)
        async with world.opened(retention_s=DAY_S) as books:
            assert await world.lent(books, "usd_per_month", 1_000_000) == 980_000

    run(scenario())


def test_a_health_check_asks_the_store(tmp_path: Path) -> None:
    """Before it is open the answer is no, in words; then the store itself answers."""
    world = World(tmp_path)

    async def scenario() -> None:
        async with world.opened() as books:
            with pytest.raises(Unavailable, match="cannot be read now"):
                books.ping()
            await until(lambda: books.is_ready)
            books.ping()

    run(scenario())
