"""Gathering rows, keeping them while the store is away, and never telling that one is stored which is not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from llm_router.accounts.journal import COMMIT_ROWS, JournalStatistics, UsageJournal
from llm_router.accounts.store import Store
from llm_router.accounts.usage import UsageRow, sum_of
from llm_router.errors import StoreRefused, StoreUnavailable
from support.aio import run, until

NEVER_S = 3600.0


class Database:
    """A store of the test's choosing. Safe across threads, as the real one."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.attempts = 0
        self.problem: Exception | None = None
        self.bad: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def add(self, rows: Sequence[UsageRow]) -> int:
        self.attempts += 1
        self.threads.add(threading.current_thread().name)
        assert self.go_on.wait(20)
        if self.problem is not None:
            raise self.problem
        if self.bad & {row.id for row in rows}:
            raise StoreRefused("a row is bad")
        new = [row.id for row in rows if row.id not in self.ids]
        self.ids += new
        self.sizes.append(len(rows))
        return len(new)


class Seen:
    """What a journal told."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.dropped: list[tuple[str, int]] = []
        self.troubles: list[str] = []

    def take(self, journal: UsageJournal, number: int, size: int = 1) -> list[str]:
        """Hand over batch `number`. Returns: the ids of its rows."""
        ids = [f"{number}/{index}" for index in range(size)]
        rows = [UsageRow(id=id, time=1.7e9, request_id="r") for id in ids]
        journal.take(rows, lambda: self.done.append(number))
        return ids


@contextlib.asynccontextmanager
async def journal_of(
    database: Database, seen: Seen, *, max_rows: int = 10_000, commit_s: float = 0.001, retry_s: float = 0.001
) -> AsyncIterator[UsageJournal]:
    journal = UsageJournal(
        database.add,
        on_dropped=lambda reason, count: seen.dropped.append((reason, count)),
        on_trouble=seen.troubles.append,
        max_rows=max_rows,
        commit_s=commit_s,
        retry_s=(retry_s, retry_s),
    )
    async with journal:
        yield journal


def test_rows_are_gathered_and_acknowledged_when_they_are_stored() -> None:
    """Several batches in one commit, in a thread of their own; not acknowledged before."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.go_on.clear()
        async with journal_of(database, seen) as journal:
            for number in range(5):
                seen.take(journal, number, 10)
            await until(lambda: database.attempts == 1)
            assert (seen.done, journal.statistics().waiting) == ([], 50)
            database.go_on.set()
            await until(lambda: len(seen.done) == 5)
            assert seen.done == [0, 1, 2, 3, 4]
            assert database.sizes == [50]
            assert database.threads == {"usage-journal_0"}
            assert journal.statistics() == JournalStatistics(waiting=0, stored=50, dropped=0, refused=0)

    run(scenario())


def test_a_full_commit_does_not_wait() -> None:
    """However long rows may be gathered; batches stay whole."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        async with journal_of(database, seen, commit_s=NEVER_S) as journal:
            seen.take(journal, 0, COMMIT_ROWS - 1)
            seen.take(journal, 1, 2)
            seen.take(journal, 2, 5)
            await until(lambda: seen.done == [0, 1])
            assert database.sizes == [COMMIT_ROWS + 1]
            assert journal.statistics().waiting == 5
        assert (seen.done, database.sizes) == ([0, 1, 2], [COMMIT_ROWS + 1, 5])  # the end waits for nobody either

    run(scenario())


def test_while_the_store_is_away_rows_are_kept_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """In their order; the trouble is told once each time it begins, and its end is logged."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        async with journal_of(database, seen) as journal:
            for trouble in (1, 2):
                database.problem, attempts = StoreUnavailable("accounts.db: database is locked"), database.attempts
                ids = seen.take(journal, trouble, 3)
                await until(lambda attempts=attempts: database.attempts > attempts + 3)  # type: ignore[misc]
                assert journal.problem == "accounts.db: database is locked"
                assert trouble not in seen.done
                database.problem = None
                await until(lambda trouble=trouble: trouble in seen.done)  # type: ignore[misc]
                assert database.ids[-3:] == ids
                assert journal.problem == ""
        assert seen.troubles == ["accounts.db: database is locked"] * 2
        assert seen.dropped == []

    with caplog.at_level(logging.WARNING):
        run(scenario())
    told = [record.getMessage() for record in caplog.records]
    assert told == 2 * [
        "usage cannot be stored: accounts.db: database is locked; up to 10000 rows are kept",
        "usage is stored again; 0 rows waited, 0 were lost",
    ]


def test_memory_is_bounded_and_what_does_not_fit_is_counted_once() -> None:
    """The oldest batches go, whole; their sender is told, so that it does not keep and count them as well."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.problem = StoreUnavailable("away")
        async with journal_of(database, seen, max_rows=10, retry_s=NEVER_S) as journal:
            seen.take(journal, 0, 4)
            await until(lambda: journal.problem)
            for number in range(1, 6):
                seen.take(journal, number, 4)
                assert journal.statistics().waiting <= 10
            assert seen.done == [0, 1, 2, 3]
            assert seen.dropped == [("queue-full", 4)] * 4
            seen.take(journal, 6, 11)  # more than fits at all
            assert seen.done == [0, 1, 2, 3, 4, 5, 6]
            assert journal.statistics() == JournalStatistics(waiting=0, stored=0, dropped=35, refused=0)
            seen.take(journal, 7, 4)
            database.problem = None
        assert database.ids == [f"7/{index}" for index in range(4)]

    run(scenario())


def test_what_is_being_written_is_not_dropped() -> None:
    """It may be stored already: the batches behind it go."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.go_on.clear()
        async with journal_of(database, seen, max_rows=10) as journal:
            seen.take(journal, 0, 8)
            await until(lambda: database.attempts == 1)
            seen.take(journal, 1, 4)
            seen.take(journal, 2, 2)
            assert (seen.done, seen.dropped, journal.statistics().waiting) == ([1], [("queue-full", 4)], 10)
            database.go_on.set()
            await until(lambda: len(seen.done) == 3)
        assert database.ids == [*(f"0/{index}" for index in range(8)), "2/0", "2/1"]

    run(scenario())


def test_rows_that_can_never_be_stored_are_counted_and_do_not_hold_up_the_others() -> None:
    """Found by halving; acknowledged, for sending them again would not help."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.bad = {"0/3", "0/17"}
        async with journal_of(database, seen) as journal:
            ids = seen.take(journal, 0, 40)
            await until(lambda: seen.done == [0])
            assert database.ids == [id for id in ids if id not in database.bad]
            assert seen.dropped == [("store-refused", 2)]
            assert journal.statistics() == JournalStatistics(waiting=0, stored=38, dropped=0, refused=2)
            assert (journal.problem, seen.troubles) == ("", [])

    run(scenario())


def test_a_store_that_goes_away_between_two_halves_counts_nothing_twice() -> None:
    """What was stored of a commit is passed over the next time, and its bad rows are counted with its success."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.bad = {"0/0"}
        calls = 0

        def add(rows: Sequence[UsageRow]) -> int:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise StoreUnavailable("away")
            return database.add(rows)

        journal = UsageJournal(
            add, on_dropped=lambda reason, count: seen.dropped.append((reason, count)), commit_s=0, retry_s=(0, 0)
        )
        async with journal:
            ids = seen.take(journal, 0, 4)
            await until(lambda: seen.done == [0])
        assert sorted(database.ids) == ids[1:]
        assert seen.dropped == [("store-refused", 1)]

    run(scenario())


def test_faults_of_the_store_itself_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An error that nobody foresaw is logged with where it came from, and the rows are tried again."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.problem = ZeroDivisionError("a bug")
        async with journal_of(database, seen) as journal:
            seen.take(journal, 0)
            await until(lambda: seen.troubles == ["a bug"])
            database.problem = None
            await until(lambda: seen.done == [0])

    run(scenario())
    assert caplog.records[0].exc_info is not None


def test_an_acknowledgement_that_fails_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the batches behind it are acknowledged."""

    def fail() -> None:
        raise ConnectionError("the worker is gone")

    async def scenario() -> None:
        database, seen = Database(), Seen()
        async with journal_of(database, seen) as journal:
            journal.take([], fail)
            seen.take(journal, 1)
            await until(lambda: seen.done == [1])

    run(scenario())
    assert "could not be acknowledged" in caplog.text


def test_the_end_stores_what_waits() -> None:
    """At once, and everything, however many commits it takes."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        async with journal_of(database, seen, commit_s=NEVER_S) as journal:
            for number in range(5):
                seen.take(journal, number, COMMIT_ROWS // 2)
        assert len(database.ids) == 5 * COMMIT_ROWS // 2
        assert seen.done == [0, 1, 2, 3, 4]

    run(scenario())


@pytest.mark.parametrize("is_tried", [True, False], ids=["while it is away", "at its first failure"])
def test_the_end_does_not_wait_for_a_store_that_is_away(caplog: pytest.LogCaptureFixture, is_tried: bool) -> None:
    """One attempt; what is left was never acknowledged, so that its senders have it, and is told."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.problem = StoreUnavailable("away")
        async with journal_of(database, seen, retry_s=NEVER_S) as journal:
            seen.take(journal, 0, 3)
            if is_tried:
                await until(lambda: database.attempts == 1)
        assert (seen.done, seen.dropped) == ([], [])

    run(scenario())
    assert "3 usage rows were not stored before the end" in caplog.text


def test_the_end_waits_only_so_long_for_a_store_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A database that never answers must not keep the program from ending."""

    async def scenario() -> None:
        database, seen = Database(), Seen()
        database.go_on.clear()
        async with journal_of(database, seen) as journal:
            seen.take(journal, 0, 3)
            await until(lambda: database.attempts == 1)
            await journal.aclose(timeout_s=0.01)
        database.go_on.set()
        assert seen.done == []

    run(scenario())
    assert "3 usage rows were not stored before the end" in caplog.text


def test_batches_that_are_sent_again_are_stored_once(tmp_path: Path) -> None:
    """With the real store: senders that were cut off repeat what was not acknowledged."""

    async def scenario() -> None:
        store, seen = Store.open(f"sqlite:///{tmp_path}/accounts.db"), Seen()
        async with UsageJournal(store.add_usage, commit_s=0.001) as journal:
            for number in (0, 1, 0, 1, 2, 0):
                seen.take(journal, number, 100)
                await asyncio.sleep(0)
            await until(lambda: len(seen.done) == 6)
            assert journal.statistics().stored == 300
        assert sum_of(store.usage(by=(), since=0, until=2**33)).requests == 300
        store.close()

    run(scenario())
