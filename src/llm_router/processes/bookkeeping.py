"""Keys and usage in control: the store, what workers are told of keys, and the rows that they report.

Opens the store, and goes on trying while it is away; until it was read once nobody is told which keys there are. Takes
in usage rows and acknowledges what is stored. Not for: SQL (accounts/store.py), limits (lending.py) or HTTP
(admin/keys.py, admin/usage.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from llm_router import families
from llm_router.accounts.journal import UsageJournal
from llm_router.accounts.keys import KeyRing, KeySpec, digest_of, new_id, new_key
from llm_router.accounts.ledger import MICRO, Ledger, MemoryLedger
from llm_router.accounts.limits import Limits, Subject
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.usage import UsageGroup, UsageRow, UsageSlot, UsageTotal
from llm_router.config.settings import AccountsSettings
from llm_router.errors import StoreUnavailable, Unavailable
from llm_router.processes.lending import DAY_S, Lending, month_of
from llm_router.processes.news import WorkerLine
from llm_router.processes.snapshot import UsageBatch, UsageTaken
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
        self._known: list[StoredKey] = []  # `_stored` without what workers and rights do not depend on
        self.lending = Lending(self._open_ledger(), limits, self, spawn=spawn, wall=wall)
        self._may_write = threading.Event()  # the store is open, and what was used before is counted
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
                before = min(now - self._settings.usage_retention_s, now - DAY_S, month_of(now))
                await self._in_slow_thread(self._demand().prune, before)
            await asyncio.sleep(PRUNE_S)

    async def aclose(self) -> None:
        """Close the store; `run` has ended, and with it the journal."""
        await self.lending.aclose()
        for threads in (self._thread, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    async def _open(self) -> None:
        waits = itertools.chain(RETRY_S, itertools.repeat(RETRY_S[-1]))
        while not self._may_write.is_set():
            try:
                self._store = store = await self._in_thread(_open_store, self._settings.database)
                self._last_used.update(await self._in_thread(store.last_used))
                await self._read_keys()
                # No row is written before: it was lent by this ledger, and would be counted twice.
                await self.lending.open(self._may_write.set)
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
        known = [msgspec.structs.replace(key, last_used_time=None) for key in found]
        self._stored = found
        if self._ring is None or known != self._known:
            self._known = known
            self._ring = KeyRing(self.keys())
            self._on_change()

    def _warn(self) -> None:
        names = {key.id: key.name for key in self._stored}
        for warning in self.lending.ledger.warnings():
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

    def ping(self) -> None:
        """Blocks until the store has answered; for any thread. Raises: StoreUnavailable, Unavailable."""
        self._demand().ping()

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

        def keep() -> None:
            self._journal.take(batch.rows, lambda: line.tell(UsageTaken(batch.number)))

        if batch.is_late and batch.rows[0].time < self._started_time:
            self._spawn(self.lending.count_late(batch.rows, keep))
        else:
            keep()

    def left(self, line: WorkerLine) -> None:
        """A worker is gone: what it held is free."""
        self.lending.ledger.left(line.name)

    def _add_usage(self, rows: Sequence[UsageRow]) -> int:
        """In the journal's thread."""
        store = self._store if self._may_write.wait(_OPEN_WAIT_S) else None
        if store is None:
            raise StoreUnavailable(self.problem or "the store is not open yet")
        return store.add_usage(rows)

    def _trouble(self, problem: str) -> None:
        self._on_error("accounts_unavailable")

    async def usage_slots(self, since: float, slot_s: int) -> Sequence[UsageSlot]:
        return await self._in_thread(self._demand().usage_slots, since, slot_s)

    async def stored_usage(self, ids: Sequence[str]) -> frozenset[str]:
        return await self._in_thread(self._demand().stored_usage, ids)

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
                and (remaining := self.lending.ledger.remaining(Subject("key", key.id), kind)) is not None
            ]
            if left:
                yield Reading(families.BUDGET_REMAINING, (key.name,), min(left) / MICRO)


def _open_store(url: str) -> Store:
    """In a thread: loading SQLAlchemy takes 0.2 s, and more where tables are made."""
    from llm_router.accounts.store import Store

    return Store.open(url)
