"""Lends limits to workers, in control: never more than is left after what the stored usage says was used already.

A ledger forgets at its end, so what is limited anew (at a start, or by a change of the configuration) is counted from
usage rows before any of it is lent. Not for: counting itself (accounts/ledger.py) or the store (bookkeeping.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

from llm_router.accounts.ledger import BUDGETS, MICRO, WINDOWS, Account, Ledger
from llm_router.accounts.limits import Limits, Subject
from llm_router.accounts.usage import UsageRow, UsageSlot
from llm_router.errors import StoreUnavailable
from llm_router.processes.news import WorkerLine
from llm_router.processes.snapshot import LeaseAsk, LeaseGrants

_log = logging.getLogger("llm_router.accounts")

_MINUTE_S: Final = 60.0
DAY_S: Final = 86_400.0
_MINUTE_SLOT_S: Final = 5  # how finely what was used before a start is known
_DAY_SLOT_S: Final = 600
_MONEY_SLOT_S: Final = 3600


class Stored(Protocol):
    """What is known of usage. Raises, from both: StoreUnavailable."""

    def usage_slots(self, since: float, slot_s: int) -> Awaitable[Sequence[UsageSlot]]:
        """As `Store.usage_slots`."""

    def stored_usage(self, ids: Sequence[str]) -> Awaitable[frozenset[str]]:
        """As `Store.stored_usage`."""


class _Charge(NamedTuple):
    """Units that were used and that the ledger does not know of, and the Unix second to count them at."""

    account: Account
    units: int
    at: float


class Lending:
    """Answers workers that ask for leases. Lives in one event loop.

    Args:
        ledger: counts; closed by `aclose`.
        limits: every limit in force; asked for by `follow`.
        stored: asked for usage, not before `open`.
        spawn: runs a coroutine as a task that control owns.
        wall: Unix seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        limits: Callable[[], Mapping[Subject, Limits]],
        stored: Stored,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        wall: Callable[[], float],
    ) -> None:
        self.ledger = ledger
        self._limits = limits
        self._stored = stored
        self._spawn = spawn
        self._wall = wall
        self._uncounted: set[Account] = set()
        self._counting = asyncio.Lock()
        self._counts_due = 0  # that wait for the lock, or have it
        self._is_counted = asyncio.Event()
        self._opened = asyncio.Event()  # what was used before is counted

    async def open(self, then: Callable[[], None]) -> None:
        """Count what was used before this start, then lend.

        Args:
            then: called once that is counted, and before anything is lent.

        Raises: StoreUnavailable, with nothing counted: to be called again.
        """
        async with self._count_is_due():
            await self._count()
            self._opened.set()
            then()

    def follow(self) -> None:
        """The limits may have changed. What is newly limited is counted before any of it is lent."""
        new = self.ledger.update(self._limits())
        if new:
            self._uncounted |= set(new)
            self._is_counted.clear()
            if self._opened.is_set():
                self._spawn(self._count_more())

    def lend(self, line: WorkerLine, asks: LeaseAsk) -> None:
        """Answer a worker's wishes."""
        self._spawn(self._lend(line, asks))

    async def _lend(self, line: WorkerLine, asks: LeaseAsk) -> None:
        await self._is_counted.wait()
        line.tell(LeaseGrants(await self.ledger.lend(line.name, asks.asks)))

    async def count_late(self, rows: Sequence[UsageRow], then: Callable[[], None]) -> None:
        """Count rows that the control before this one lent for and did not acknowledge, stored or not.

        Nothing is lent before they are counted.

        Args:
            then: called once they are: they may be stored now.
        """
        async with self._count_is_due(after_opening=True):
            try:
                known = await self._stored.stored_usage([row.id for row in rows])
            except StoreUnavailable:
                known = frozenset()  # counting twice refuses too early, counting never lets too much through
            for row in rows:
                if row.id not in known:
                    self._charge(_charges_of(row))
            then()

    async def aclose(self) -> None:
        """Let go of the ledger's connections."""
        await self.ledger.aclose()

    # -- counting --------------------------------------------------------------------------------------------

    async def _count_more(self) -> None:
        async with self._count_is_due():
            try:
                await self._count()
            except StoreUnavailable as error:
                _log.error("limits that are new are counted from now on only: %s", error)
                self._uncounted.clear()

    @contextlib.asynccontextmanager
    async def _count_is_due(self, *, after_opening: bool = False) -> AsyncIterator[None]:
        """One count at a time; nothing is lent from now on until the last one is done."""
        self._counts_due += 1
        self._is_counted.clear()
        try:
            if after_opening:
                await self._opened.wait()
            async with self._counting:
                yield
        finally:
            self._counts_due -= 1
            if self._opened.is_set() and not self._counts_due and not self._uncounted:
                self._is_counted.set()

    async def _count(self) -> None:
        """Charge what the store knows to the accounts that are new: all of it or, with StoreUnavailable, nothing."""
        now = self._wall()
        accounts = set(self._uncounted)
        charges: list[_Charge] = []
        for kinds, since, slot_s in (
            (("requests_per_minute", "tokens_per_minute"), now - _MINUTE_S, _MINUTE_SLOT_S),
            (("requests_per_day", "tokens_per_day"), now - DAY_S, _DAY_SLOT_S),
            (BUDGETS, month_of(now), _MONEY_SLOT_S),
        ):
            wanted: dict[Subject, list[Account]] = defaultdict(list)
            for account in accounts:
                if account.kind in kinds:
                    wanted[account.subject].append(account)
            if not wanted:
                continue
            for slot in await self._stored.usage_slots(since, slot_s):
                # When in the slot it was is not known. For windows the end is safe; money is of the slot's day.
                at = slot.time if kinds is BUDGETS else min(slot.time + slot_s, now)
                charges += (
                    _Charge(account, _units(account.kind, slot), at)
                    for subject in _subjects(slot)
                    for account in wanted.get(subject, ())
                )
        self._charge(charges)
        self._uncounted -= accounts

    def _charge(self, charges: Iterable[_Charge]) -> None:
        for (subject, kind), units, at in charges:
            if units:
                self.ledger.charge(subject, kind, units, at)


def month_of(time: float) -> float:
    """When the calendar month of a Unix second began, UTC."""
    return datetime.fromtimestamp(time, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def _charges_of(row: UsageRow) -> Iterable[_Charge]:
    slot = UsageSlot(
        time=row.time,
        key_id=row.key_id,
        model=row.model,
        requests=int(bool(row.backend) or row.cached),
        tokens=row.input_tokens + row.output_tokens,
        cost_usd=row.cost_usd,
    )
    return (
        _Charge(Account(subject, kind), _units(kind, slot), row.time)
        for subject in _subjects(slot)
        for kind in (*WINDOWS, *BUDGETS)
    )


def _units(kind: str, slot: UsageSlot) -> int:
    if kind.startswith("requests"):
        return slot.requests
    return slot.tokens if kind.startswith("tokens") else round(slot.cost_usd * MICRO)


def _subjects(slot: UsageSlot) -> tuple[Subject, ...]:
    """Everything whose limits the usage counts for."""
    return Subject("key", slot.key_id), Subject("model", slot.model), Subject("global", "")
