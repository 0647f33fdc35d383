"""A worker's usage rows on their way to control: kept until control says that they are stored.

Rows leave in numbered batches, several at a time; after a connection is lost all that were not acknowledged are sent
again, and the store drops the rows it has already. Bounded: beyond the bound the oldest rows are dropped and counted.
Not for: making rows (usage_rows.py) or storing them (accounts/journal.py).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from llm_router.accounts.usage import UsageRow
from llm_router.processes.snapshot import UsageBatch

MAX_ROWS: Final = 50_000
"""What a worker keeps while control or its store is away: about 30 MB; at 100 inferences a second, eight minutes."""

BATCH_ROWS: Final = 500
MAX_BATCHES: Final = 16
"""Batches under way at once: so that a store that commits twice a second takes 16,000 rows a second."""


class OutboxStatistics(NamedTuple):
    """`waiting` rows were not sent yet, `under_way` were and are not stored yet."""

    waiting: int
    under_way: int
    dropped: int


class UsageOutbox:
    """Holds rows until they are stored. Belongs to one event loop.

    Args:
        send: hands a batch to control; False if it could not be sent.
        on_dropped: called for each row that is lost.
    """

    def __init__(
        self, send: Callable[[UsageBatch], bool], on_dropped: Callable[[], None], *, max_rows: int = MAX_ROWS
    ) -> None:
        self._send = send
        self._on_dropped = on_dropped
        self._max_rows = max_rows
        self._waiting: deque[UsageRow] = deque()
        self._late = 0  # of those that wait, in front
        self._under_way: dict[int, UsageBatch] = {}
        self._rows_under_way = 0
        self._numbers = itertools.count(1)
        self._dropped = 0

    def __repr__(self) -> str:
        return f"UsageOutbox({self.statistics()})"

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(len(self._waiting), self._rows_under_way, self._dropped)

    def add(self, row: UsageRow) -> None:
        """Take a row. What is under way is never dropped: it may be stored already."""
        if len(self._waiting) + self._rows_under_way >= self._max_rows:
            if not self._waiting:
                self._lose()
                return
            self._waiting.popleft()
            self._late = max(0, self._late - 1)
            self._lose()
        self._waiting.append(row)

    def flush(self) -> None:
        """Send what waits, as far as batches may be under way. Call it some times a second."""
        while self._waiting and len(self._under_way) < MAX_BATCHES:
            size = min(BATCH_ROWS, self._late or len(self._waiting))
            rows = tuple(self._waiting.popleft() for _ in range(size))
            batch = UsageBatch(next(self._numbers), rows, is_late=bool(self._late))
            if not self._send(batch):
                self._waiting.extendleft(reversed(rows))
                return
            if batch.is_late:
                self._late -= size
            self._under_way[batch.number] = batch
            self._rows_under_way += len(rows)

    def taken(self, number: int) -> None:
        """Control stored the batch of that number."""
        batch = self._under_way.pop(number, None)
        if batch is not None:
            self._rows_under_way -= len(batch.rows)

    def connection_lost(self) -> None:
        """What was under way may not have arrived: it waits again, in front. All that waits is late from now on."""
        for batch in reversed(self._under_way.values()):
            self._waiting.extendleft(reversed(batch.rows))
        self._under_way.clear()
        self._rows_under_way = 0
        self._late = len(self._waiting)

    def _lose(self) -> None:
        self._dropped += 1
        self._on_dropped()
