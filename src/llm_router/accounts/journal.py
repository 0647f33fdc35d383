"""Usage rows on their way into the store: gathered, written in batches by a thread of their own, kept while it is away.

A batch is acknowledged when it is stored and not before, so that its sender keeps it until then; a batch that comes
twice is stored once. What a killed program loses is what no sender has any more: nothing of ours. Bounded: beyond the
bound the oldest batches are dropped, counted and acknowledged, so that each lost row is counted in one place.
Not for: the database (store.py) or the way from the workers (processes).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, Self

from llm_router.accounts.usage import UsageRow
from llm_router.errors import RouterError, StoreRefused

_log = logging.getLogger(__name__)

MAX_ROWS: Final = 100_000
"""Kept while the store is away: about 60 MB. A worker has at most 8,000 rows under way: twelve of them fit."""

COMMIT_ROWS: Final = 1000
"""Enough to make the price of a commit small: SQLite takes 15 ms for them."""

COMMIT_S: Final = 0.25
"""The longest that a row waits for others. With the workers' own 0.1 s a row is stored well within a second."""

RETRY_S: Final = (0.1, 5.0)
"""The first and the longest pause before the store is tried again; each is twice the one before."""

CLOSE_S: Final = 5.0


class JournalStatistics(NamedTuple):
    """Rows. `waiting` includes those that are being written; `dropped` did not fit, `refused` cannot be stored."""

    waiting: int
    stored: int
    dropped: int
    refused: int


class _Batch(NamedTuple):
    rows: Sequence[UsageRow]
    done: Callable[[], None]


class UsageJournal:
    """Writes usage rows. An async context manager: leaving it is `aclose`. Belongs to one event loop.

    Args:
        add: `Store.add_usage`, or what raises StoreUnavailable while there is no store. Called in the journal's thread.
        on_dropped: called in the loop with a value of `families.USAGE_DROP_REASONS` and how many rows were lost.
        on_trouble: called in the loop with what is wrong when storing begins to fail, once for each time that it does.
        max_rows: rows that may wait.
        commit_s: seconds that rows are gathered.
        retry_s: first and longest pause between attempts.
    """

    def __init__(
        self,
        add: Callable[[Sequence[UsageRow]], int],
        *,
        on_dropped: Callable[[str, int], None] = lambda reason, count: None,
        on_trouble: Callable[[str], None] = lambda problem: None,
        max_rows: int = MAX_ROWS,
        commit_s: float = COMMIT_S,
        retry_s: tuple[float, float] = RETRY_S,
    ) -> None:
        self.problem = ""
        """Why nothing can be stored at the moment; empty while it can."""
        self._add = add
        self._on_dropped = on_dropped
        self._on_trouble = on_trouble
        self._max_rows = max_rows
        self._commit_s = commit_s
        self._retry_s = retry_s
        self._batches: deque[_Batch] = deque()
        self._waiting = 0  # rows of `_batches`
        self._writing = 0  # rows in the thread
        self._stored = 0
        self._dropped = 0
        self._refused = 0
        self._is_closing = False
        self._news = asyncio.Event()  # a first row waits, or we are closing
        self._enough = asyncio.Event()  # a commit is full, or we are closing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage-journal")
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"UsageJournal({self.statistics()}, problem={self.problem!r})"

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="usage journal")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def take(self, rows: Sequence[UsageRow], done: Callable[[], None]) -> None:
        """Take a batch. Never blocks.

        Args:
            done: called in the loop, once, when the batch need no longer be kept elsewhere: after it was stored, or
                after its rows were dropped and counted. Never called for what is left over at the end.
        """
        self._batches.append(_Batch(rows, done))
        self._waiting += len(rows)
        self._keep_bound()
        if self._batches:
            self._news.set()
        if self._waiting >= COMMIT_ROWS:
            self._enough.set()

    def statistics(self) -> JournalStatistics:
        return JournalStatistics(self._waiting + self._writing, self._stored, self._dropped, self._refused)

    async def aclose(self, timeout_s: float = CLOSE_S) -> None:
        """Store what waits, with one attempt and within `timeout_s`. What cannot be stored is left to its senders."""
        self._is_closing = True
        self._news.set()
        self._enough.set()
        if self._task is not None:
            _, unfinished = await asyncio.wait({self._task}, timeout=timeout_s)
            for task in unfinished:
                task.cancel()
                await asyncio.wait({task})
            self._task = None
        self._thread.shutdown(wait=False, cancel_futures=True)
        if left := self._waiting + self._writing:
            _log.warning("%d usage rows were not stored before the end", left)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = self._retry_s[0]
        while True:
            await self._news.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._commit_s):
                    await self._enough.wait()
            group = self._next_group()
            if not group:
                return  # only when closing is there news without rows
            rows = [row for batch in group for row in batch.rows]
            self._writing = len(rows)
            try:
                stored, refused = await loop.run_in_executor(self._thread, _store, self._add, rows)
            except Exception as error:
                self._put_back(group)
                self._failed(error)
                if self._is_closing:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._closing()
                pause_s = min(2 * pause_s, self._retry_s[1])
                continue
            self._writing = 0
            self._succeeded()
            pause_s = self._retry_s[0]
            self._stored += stored
            if refused:
                self._refused += refused
                self._on_dropped("store-refused", refused)
            _tell(group)

    async def _closing(self) -> None:
        """Return when we are closing: `_enough` is set for other reasons too."""
        while not self._is_closing:
            self._enough.clear()
            await self._enough.wait()

    def _next_group(self) -> list[_Batch]:
        """Whole batches that make up a commit: a batch is acknowledged at once or not at all."""
        group: list[_Batch] = []
        size = 0
        while self._batches and size < COMMIT_ROWS:
            batch = self._batches.popleft()
            group.append(batch)
            size += len(batch.rows)
        self._waiting -= size
        if not self._is_closing:
            if not self._batches:
                self._news.clear()
            if self._waiting < COMMIT_ROWS:
                self._enough.clear()
        return group

    def _put_back(self, group: list[_Batch]) -> None:
        self._batches.extendleft(reversed(group))
        self._waiting += self._writing
        self._writing = 0
        self._keep_bound()
        if self._batches:
            self._news.set()

    def _keep_bound(self) -> None:
        dropped: list[_Batch] = []
        while self._waiting + self._writing > self._max_rows and self._batches:
            batch = self._batches.popleft()
            self._waiting -= len(batch.rows)
            dropped.append(batch)
        if dropped:
            count = sum(len(batch.rows) for batch in dropped)
            self._dropped += count
            self._on_dropped("queue-full", count)
            _tell(dropped)
        if not self._batches and not self._is_closing:
            self._news.clear()

    def _failed(self, error: Exception) -> None:
        is_news = not self.problem
        self.problem = str(error) or type(error).__name__
        if is_news:
            # An error that is not ours is a fault of this program: where it came from is worth knowing.
            trace = None if isinstance(error, RouterError) else error
            _log.error(
                "usage cannot be stored: %s; up to %d rows are kept", self.problem, self._max_rows, exc_info=trace
            )
            self._on_trouble(self.problem)

    def _succeeded(self) -> None:
        if self.problem:
            self.problem = ""
            _log.warning("usage is stored again; %d rows waited, %d were lost", self._waiting, self._dropped)


def _store(add: Callable[[Sequence[UsageRow]], int], rows: Sequence[UsageRow]) -> tuple[int, int]:
    """Store what can be stored. Returns: rows that were new, and rows that can never be stored."""
    try:
        return add(rows), 0
    except StoreRefused as error:
        if len(rows) == 1:
            _log.error("a usage row is lost: %s", error)
            return 0, 1
    half = len(rows) // 2
    first, second = _store(add, rows[:half]), _store(add, rows[half:])
    return first[0] + second[0], first[1] + second[1]


def _tell(batches: Iterable[_Batch]) -> None:
    for batch in batches:
        try:
            batch.done()
        except Exception:
            _log.exception("a fault of control itself: a batch of usage could not be acknowledged")
