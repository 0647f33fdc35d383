"""Keys, limits and usage in control: what workers are told of them, and what they report.

Opens the store, and goes on trying while it is away; until it was read once nobody is told which keys there are. Lends
out limits, takes in usage rows and acknowledges what is stored. Not for: SQL (accounts/store.py), counting
(accounts/ledger.py) or HTTP (admin/keys.py, admin/usage.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec

from llm_router import families
from llm_router.accounts.journal import UsageJournal
from llm_router.accounts.keys import KeyRing, KeySpec, digest_of, new_id, new_key
from llm_router.accounts.ledger import BUDGETS, MICRO, WINDOWS, Account, Ledger, MemoryLedger
from llm_router.accounts.limits import Limits, Subject
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.usage import UsageGroup, UsageRow, UsageSlot, UsageTotal
from llm_router.config.settings import AccountsSettings
from llm_router.errors import StoreUnavailable, Unavailable
from llm_router.processes.news import WorkerLine
from llm_router.processes.snapshot import LeaseAsk, LeaseGrants, UsageBatch, UsageTaken
from llm_router.signals import Reading

if TYPE_CHECKING:
    from llm_router.accounts.store import Store  # importing it loads SQLAlchemy

_log = logging.getLogger("llm_router.accounts")

T = TypeVar("T")

RETRY_S: Final = (0.5, 1.0, 2.0, 5.0)
"""Waits between attempts to open the store; the last one repeats."""

POLL_S: Final = 0.5
"""How often keys are read again: another router that shares the store may have revoked one."""

PRUNE_S: Final = 3600.0
SLOW_THREADS: Final = 2
"""For reports and for forgetting, which may take a minute; keys have a thread of their own and wait for none of them."""

_OPEN_WAIT_S: Final = 2.0  # how long the journal's thread waits for the store at a start before it says that it is away
_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400.0
_MINUTE_SLOT_S: Final = 5  # how finely what was used before a start is known
_DAY_SLOT_S: Final = 600
_MONEY_SLOT_S: Final = 3600


class _Charge(NamedTuple):
    """Units that were used and that the ledger does not know of, and the Unix second to count them at."""

    account: Account
    units: int
    at: float


class Bookkeeping:
    """Control's accounts. Run `run` as a task; `aclose` writes what is left.

    Args:
        settings: where keys and usage are kept, and for how long.
        limits: every limit in force; asked for whenever keys or the configuration change.
        name: of this router among those that share a Redis; the same after a restart.
        workers: that borrow from the limits.
        on_change: called when what workers are told has changed.
        on_error: called with a key of `families.ERROR_KINDS`.
        on_dropped: called with a value of `families.USAGE_DROP_REASONS` and how many usage rows are lost.
        spawn: runs a coroutine as a task that control owns.
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    def __init__(
        self,
        settings: AccountsSettings,
        *,
        limits: Callable[[], Mapping[Subject, Limits]],
        name: str,
        workers: int,
        on_change: Callable[[], None],
        on_error: Callable[[str], None],
        on_dropped: Callable[[str, int], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._name = name
        self._workers = workers
        self._on_change = on_change
        self._on_error = on_error
        self._spawn = spawn
        self._clock = clock
        self._wall = wall
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._slow_threads = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="usage")
        self._stored: tuple[StoredKey, ...] = ()
        self._ring: KeyRing | None = None
        self._last_used: dict[str, float] = {}
        self._changing = asyncio.Lock()
        self._ledger = self._open_ledger()
        self._uncounted: set[Account] = set()
        self._counting = asyncio.Lock()
        self._counts_due = 0  # that wait for the lock, or have it
        self._is_counted = asyncio.Event()
        self._opened = asyncio.Event()  # the store is open, and what was used before is counted
        self._may_write = threading.Event()  # the same, for the journal's thread
        self._journal = UsageJournal(self._add_usage, on_dropped=on_dropped, on_trouble=self._trouble)
        self._started_time = wall()
        self.problem = ""

    @property
    def is_ready(self) -> bool:
        """Whether the keys were read at least once."""
        return self._ring is not None

    @property
    def stored(self) -> tuple[StoredKey, ...]:
        """Every key that was ever made."""
        return self._stored

    def keys(self) -> tuple[KeySpec, ...]:
        """The keys that are valid now."""
        now = self._wall()
        return tuple(key.spec() for key in self._stored if key.is_valid(now))

    @property
    def ring(self) -> KeyRing | None:
        """The same, to look callers up in; None while they are not known."""
        return self._ring

    # -- life ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Open the store, follow the keys in it, and forget usage that is too old. Ends by being cancelled."""
        async with self._journal:
            await self._open()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_keys())
                group.create_task(self._forget())

    async def _follow_keys(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(StoreUnavailable):
                async with self._changing:
                    await self._read_keys()
            self._warn()

    async def _forget(self) -> None:
        while self._settings.usage_retention_s:
            with contextlib.suppress(StoreUnavailable):
                now = self._wall()
                # What a start counts budgets and limits from is kept in any case.
                before = min(now - self._settings.usage_retention_s, now - _DAY_S, _month_of(now))
                await self._in_slow_thread(self._demand().prune, before)
            await asyncio.sleep(PRUNE_S)

    async def aclose(self) -> None:
        """Close the store; `run` has ended, and with it the journal."""
        await self._ledger.aclose()
        for threads in (self._thread, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    async def _open(self) -> None:
        waits = itertools.chain(RETRY_S, itertools.repeat(RETRY_S[-1]))
        while not self._opened.is_set():
            try:
                self._store = store = await self._in_thread(_open_store, self._settings.database)
                self._last_used.update(await self._in_thread(store.last_used))
                await self._read_keys()
                async with self._count_is_due():
                    await self._count(store)
                    # Not before: rows that are stored now were lent by this ledger, and would be counted twice.
                    self._opened.set()
                    self._may_write.set()
            except StoreUnavailable as error:
                if str(error) != self.problem:
                    _log.error("%s; nobody is let in before the keys are known, which is tried again", error)
                    self.problem = str(error)
                self._on_error("accounts_unavailable")
                if self._store is not None:
                    self._store.close()
                    self._store = None
                await asyncio.sleep(next(waits))
        self.problem = ""

    def _open_ledger(self) -> Ledger:
        if not self._settings.redis:
            return MemoryLedger(clock=self._clock, wall=self._wall, borrowers=self._workers)
        from llm_router.accounts.redis_ledger import RedisLedger

        return RedisLedger(
            self._settings.redis,
            name=self._name,
            clock=self._clock,
            wall=self._wall,
            on_unavailable=self._redis_away,
            on_available=lambda: _log.warning("Redis is back: limits are counted with the other routers again"),
        )

    def _redis_away(self, reason: str) -> None:
        _log.error("Redis is away (%s): this router counts limits alone until it is back", reason)
        self._on_error("accounts_unavailable")

    async def _read_keys(self) -> None:
        found = tuple(await self._in_thread(self._demand().keys))
        if self._ring is None or _validity(found) != _validity(self._stored):
            self._stored = found
            self._ring = KeyRing(self.keys())
            self._on_change()
        else:
            self._stored = found

    def _warn(self) -> None:
        names = {key.id: key.name for key in self._stored}
        for warning in self._ledger.warnings():
            scope, name = warning.subject
            _log.warning(
                "%s has spent %.2f of the %.2f US dollars of its %s",
                f"the key {names.get(name, name)!r}" if scope == "key" else f"the {scope} {name}".rstrip(),
                warning.spent_usd,
                warning.limit_usd,
                warning.kind.removeprefix("usd_per_"),
            )

    # -- what the admin API asks (admin.keys.KeyBook, admin.usage) --------------------------------------------

    async def list(self) -> Sequence[StoredKey]:
        self._demand()
        return [
            msgspec.structs.replace(key, last_used_time=max(filter(None, (key.last_used_time, used)), default=None))
            for key in self._stored
            for used in (self._last_used.get(key.id),)
        ]

    async def add(self, key: StoredKey) -> None:
        await self._change(self._demand().add_key, key)

    async def change(self, id: str, fields: Mapping[str, Any]) -> StoredKey:
        store = self._demand()
        return await self._change(lambda: store.change_key(id, **fields))

    async def revoke(self, id: str) -> StoredKey:
        return await self._change(self._demand().revoke_key, id, self._wall())

    async def usage(
        self, *, by: Sequence[UsageGroup], since: float, until: float, key: str | None, model: str | None
    ) -> Sequence[UsageTotal]:
        """Sums of the stored rows. Raises: StoreUnavailable, Unavailable."""
        store = self._demand()
        return await self._in_slow_thread(lambda: store.usage(by=by, since=since, until=until, key=key, model=model))

    async def make_admin_key(self) -> str:
        """Make a key for administration, for a router that others can reach and that has none. Returns: its text."""
        text = new_key()
        names = {key.name for key in self._stored if key.revoked_time is None}
        name = next(name for name in ("admin", *(f"admin-{n}" for n in range(2, 1000))) if name not in names)
        await self.add(
            StoredKey(id=new_id(), name=name, digest=digest_of(text), scopes=("admin",), created_time=self._wall())
        )
        return text

    async def _change(self, change: Callable[..., T], *arguments: Any) -> T:
        """Change a key, and have workers know it before this returns. Raises: what the store raises."""
        async with self._changing:
            changed = await self._in_thread(change, *arguments)
            await self._read_keys()
        return changed

    def _demand(self) -> Store:
        if self._store is None:
            raise Unavailable(f"keys and usage cannot be read now{': ' if self.problem else ''}{self.problem}")
        return self._store

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def _in_slow_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._slow_threads, call, *arguments)

    # -- what workers report -----------------------------------------------------------------------------------

    def take_usage(self, line: WorkerLine, batch: UsageBatch) -> None:
        """Store a batch; the worker is told when that is done."""
        for row in batch.rows:
            if row.key_id and row.time > self._last_used.get(row.key_id, 0.0):
                self._last_used[row.key_id] = row.time
        if batch.is_late and batch.rows[0].time < self._started_time:
            self._spawn(self._take_late(line, batch))
        else:
            self._journal.take(batch.rows, lambda: line.tell(UsageTaken(batch.number)))

    async def _take_late(self, line: WorkerLine, batch: UsageBatch) -> None:
        """A batch that the control before this one lent for and did not acknowledge, stored or not.

        Nothing is lent before it is counted.
        """
        async with self._count_is_due(after_opening=True):
            assert self._store is not None, "it is open"
            try:
                stored = await self._in_thread(self._store.stored_usage, [row.id for row in batch.rows])
            except StoreUnavailable:
                stored = frozenset()  # counting twice refuses too early, counting never lets too much through
            for row in batch.rows:
                if row.id not in stored:
                    self._charge_row(row)
            self._journal.take(batch.rows, lambda: line.tell(UsageTaken(batch.number)))

    def _charge_row(self, row: UsageRow) -> None:
        slot = UsageSlot(
            time=row.time,
            key_id=row.key_id,
            model=row.model,
            requests=int(bool(row.backend) or row.cached),
            tokens=row.input_tokens + row.output_tokens,
            cost_usd=row.cost_usd,
        )
        for subject in _subjects(slot):
            for kind in (*WINDOWS, *BUDGETS):
                if units := _units(kind, slot):
                    self._ledger.charge(subject, kind, units, row.time)

    def lend(self, line: WorkerLine, asks: LeaseAsk) -> None:
        """Answer a worker's wishes."""
        self._spawn(self._lend(line, asks))

    async def _lend(self, line: WorkerLine, asks: LeaseAsk) -> None:
        await self._is_counted.wait()
        line.tell(LeaseGrants(await self._ledger.lend(line.name, asks.asks)))

    def left(self, line: WorkerLine) -> None:
        """A worker is gone: what it held is free."""
        self._ledger.left(line.name)

    def _add_usage(self, rows: Sequence[UsageRow]) -> int:
        """In the journal's thread."""
        store = self._store if self._may_write.wait(_OPEN_WAIT_S) else None
        if store is None:
            raise StoreUnavailable(self.problem or "the store is not open yet")
        return store.add_usage(rows)

    def _trouble(self, problem: str) -> None:
        self._on_error("accounts_unavailable")

    def follow(self) -> None:
        """The limits may have changed. What is newly limited is counted from the stored usage before any of it is lent."""
        new = self._ledger.update(self._limits())
        if new:
            self._uncounted |= set(new)
            self._is_counted.clear()
            if self._store is not None and self._opened.is_set():
                self._spawn(self._count_more(self._store))

    async def _count_more(self, store: Store) -> None:
        async with self._count_is_due():
            try:
                await self._count(store)
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

    async def _count(self, store: Store) -> None:
        """Charge what the store knows to the accounts that are new: all of it or, with StoreUnavailable, nothing."""
        now = self._wall()
        month = _month_of(now)
        accounts = set(self._uncounted)
        charges: list[_Charge] = []
        for kinds, since, slot_s in (
            (("requests_per_minute", "tokens_per_minute"), now - _MINUTE_S, _MINUTE_SLOT_S),
            (("requests_per_day", "tokens_per_day"), now - _DAY_S, _DAY_SLOT_S),
            (BUDGETS, month, _MONEY_SLOT_S),
        ):
            wanted: dict[Subject, list[Account]] = defaultdict(list)
            for account in accounts:
                if account.kind in kinds:
                    wanted[account.subject].append(account)
            if not wanted:
                continue
            for slot in await self._in_thread(store.usage_slots, since, slot_s):
                # When in the slot it was is not known. For windows the end is safe; money is of the slot's day.
                at = slot.time if kinds is BUDGETS else min(slot.time + slot_s, now)
                charges += (
                    _Charge(account, _units(account.kind, slot), at)
                    for subject in _subjects(slot)
                    for account in wanted.get(subject, ())
                )
        for (subject, kind), units, at in charges:
            self._ledger.charge(subject, kind, units, at)
        self._uncounted -= accounts

    # -- levels --------------------------------------------------------------------------------------------------

    def readings(self) -> Iterator[Reading]:
        """How many keys were used lately, and what is left of each budget."""
        now = self._wall()
        for window, seconds in families.ACTIVE_WINDOWS.items():
            users = sum(now - used <= seconds for used in self._last_used.values())
            yield Reading(families.ACTIVE_USERS, (window,), float(users))
        for key in self.keys():
            left = [
                remaining
                for kind in ("usd_per_day", "usd_per_month")
                if getattr(key.limits, kind)
                and (remaining := self._ledger.remaining(Subject("key", key.id), kind)) is not None
            ]
            if left:
                yield Reading(families.BUDGET_REMAINING, (key.name,), min(left) / MICRO)


def _month_of(time: float) -> float:
    """When the calendar month of a Unix second began, UTC."""
    return datetime.fromtimestamp(time, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def _units(kind: str, slot: UsageSlot) -> int:
    if kind.startswith("requests"):
        return slot.requests
    return slot.tokens if kind.startswith("tokens") else round(slot.cost_usd * MICRO)


def _open_store(url: str) -> Store:
    """In a thread: loading SQLAlchemy takes 0.2 s, and more where tables are made."""
    from llm_router.accounts.store import Store

    return Store.open(url)


def _subjects(slot: UsageSlot) -> tuple[Subject, ...]:
    """Everything whose limits the usage counts for."""
    return Subject("key", slot.key_id), Subject("model", slot.model), Subject("global", "")


def _validity(keys: Sequence[StoredKey]) -> list[StoredKey]:
    """What workers and rights depend on: everything but when a key was last used."""
    return [msgspec.structs.replace(key, last_used_time=None) for key in keys]
