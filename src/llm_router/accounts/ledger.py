"""Who may still use how much: the one place where limits are counted exactly, and what is lent out of it.

Units are requests, tokens, inferences in flight, or millionths of a US dollar, by the kind of limit. Whoever admits
requests (limiter.py) borrows units in parts of at most a sixteenth of the limit and gives back what it does not use.
What is lent counts as used; how long depends on the kind:

- Requests and tokens are counted in short slots of time. A lease counts in the slot in which it expires, the latest in
  which it can be used, and what its borrower reports as used counts in the slot of the report. A slot leaves when
  its end is a whole window ago. So in no window more is let through than the limit, wherever the window begins.
- Inferences in flight count for each borrower by what it says it has; when it leaves they are free again.
- Money counts from when it is lent until the day or month (UTC) is over.

Every ledger has an epoch. A borrower whose epoch is another one borrowed from somebody else (this process started anew,
or Redis lost its memory): what it holds is added, and what it says of slots is not looked at, because they are not ours.

Not for: the request path (limiter.py) or messages (processes).
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

import msgspec
from msgspec import structs

from llm_router.accounts.limits import KINDS, Limits, Scope, Subject

LEASE_SHARE = 16
"""At most this part of a limit is lent at once: the bound of what one borrower can keep from the others."""

MICRO: Final = 1_000_000
"""Units of money in a US dollar."""


class Window(NamedTuple):
    """How a sliding limit is counted, all in seconds.

    Args:
        length_s: of the window.
        slot_s: time is counted in steps of this; units may leave the window so much later than they could.
        life_s: of a lease. Control may be away for so long without anybody who has a lease noticing.
    """

    length_s: float
    slot_s: float
    life_s: float


WINDOWS: Final = {
    "requests_per_minute": Window(60.0, 0.5, 15.0),
    "tokens_per_minute": Window(60.0, 0.5, 15.0),
    "requests_per_day": Window(86_400.0, 300.0, 60.0),
    "tokens_per_day": Window(86_400.0, 300.0, 60.0),
}
BUDGETS: Final = ("usd_per_day", "usd_per_month")
BUDGET_LIFE_S: Final = 60.0
"""Of a lease of money, which also ends with its day or month."""

_LEVEL_RETRY_S: Final = 1.0
"""Nobody knows when an inference ends: come back in a second."""
_PATIENCE_S: Final = 0.5
"""How long a new ledger waits for all borrowers to say what they hold; less than a request waits for a lease."""


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """One borrower's report and wish. Every number is in units.

    Args:
        scope, name, kind: whose limit, and which of `limits.KINDS`.
        want: as many as are welcome, `need` included; 0 to ask for none.
        need: what the requests that wait for an answer lack together. May be more than a lease: they use it at once.
        least: what the first of them lacks; less is refused.
        held: in reservations that are not settled.
        left: lent and in no reservation; they are lent again, with a new expiry. Of concurrency: kept.
        slot: where `left` and `used` are counted: the `slot` of the last grant.
        used: reserved out of the lease since the last ask.
        spent: used beyond what was lent (estimates that were too low).
        unused: (slot, units) given back.
        epoch: of the last grant; empty before the first.
    """

    scope: Scope
    name: str
    kind: str
    want: int = 0
    need: int = 0
    least: int = 0
    held: int = 0
    left: int = 0
    slot: int = 0
    used: int = 0
    spent: int = 0
    unused: tuple[tuple[int, int], ...] = ()
    epoch: str = ""


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """The answer to an ask; each ask gets one.

    Args:
        units: lent now; 0 refuses, if anything was wanted.
        expires_s: counted from when the ask was sent, what is lent may be used for so long; 0 for `concurrency`, which
            is kept until it is given back.
        remaining: units of the limit that nobody has borrowed, after this grant.
        retry_after_s: when units as asked for will be free; 0 when granted.
        reset_s: when everything will be free again, if nothing else is used.
        slot: where the borrower's idle units are counted from now on.
        used_slot: where what it reported as used, held or spent is counted.
        epoch: of the ledger that answers.
    """

    scope: Scope
    name: str
    kind: str
    units: int
    expires_s: float = 0.0
    remaining: int = 0
    retry_after_s: float = 0.0
    reset_s: float = 0.0
    slot: int = 0
    used_slot: int = 0
    epoch: str = ""


class Account(NamedTuple):
    """One limit that is counted: whose, and which of `limits.KINDS`."""

    subject: Subject
    kind: str


class BudgetWarning(NamedTuple):
    """A budget of which the share `warn_ratio` is spent or lent. Money in US dollars."""

    subject: Subject
    kind: str
    spent_usd: float
    limit_usd: float


class Ledger(Protocol):
    """Counts and lends. One per router, or one for several routers. For use in one event loop."""

    def update(self, limits: Mapping[Subject, Limits]) -> tuple[Account, ...]:
        """These limits hold from now on. Call it before any borrower is told of them.

        Returns: those that were not counted until now: `charge` at once what usage rows know of their window or period.
        """

    async def lend(self, borrower: str, asks: tuple[Ask, ...]) -> tuple[Grant, ...]:
        """Take in what `borrower` reports and lend; grants are in the order of the asks."""

    def left(self, borrower: str) -> None:
        """It is gone for good: the inferences it had in flight are no more. Other leases stay counted."""

    def charge(self, subject: Subject, kind: str, units: int, at: float) -> None:
        """Count `units` that were used at Unix time `at`. Without effect if that is not limited, or too long ago."""

    def remaining(self, subject: Subject, kind: str) -> int | None:
        """Units nobody has borrowed, as last known, 0 at least; None if it is not limited."""

    def warnings(self) -> tuple[BudgetWarning, ...]:
        """Budgets that reached their warning share since the last call; each once in its day or month."""

    async def aclose(self) -> None:
        """Let go of connections. What is lent stays lent."""


def lease_of(limit: int) -> int:
    """Units of `limit` that are lent at once, unless a single request needs more."""
    return max(1, limit // LEASE_SHARE)


def limit_of(limits: Limits, kind: str) -> int:
    """A limit in units; 0 for none. A budget of less than a unit is one of a unit, not none."""
    bound = getattr(limits, kind)
    return max(1, round(bound * MICRO)) if bound and kind in BUDGETS else int(bound)


def accounts_of(limits: Mapping[Subject, Limits]) -> dict[Account, int]:
    """Every limit there is, in units."""
    return {
        Account(subject, kind): bound
        for subject, limit in limits.items()
        for kind in KINDS
        if (bound := limit_of(limit, kind)) > 0
    }


class MemoryLedger:
    """Counts in this process. Forgets at its end: rebuild it with `charge`.

    Args:
        clock: monotonic seconds.
        wall: Unix seconds, for the calendar.
        borrowers: how many will come. Until each has asked once (or half a second has passed) nothing is lent, so
            that what they still hold of a ledger before this one is known first.
        warner: remembers which budgets were warned of; its own if None.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        borrowers: int = 0,
        warner: Warner | None = None,
    ) -> None:
        self.epoch = uuid.uuid4().hex
        self._clock = clock
        self._wall = wall
        self._accounts: dict[Account, _Window | _Level | _Budget] = {}
        self._limits: Mapping[Subject, Limits] = {}
        self._warner = warner or Warner(wall)
        self._awaited = borrowers
        self._borrowers: set[str] = set()
        self._complete = asyncio.Event()
        if not borrowers:
            self._complete.set()

    def __repr__(self) -> str:
        return f"MemoryLedger({len(self._accounts)} accounts, {len(self._borrowers)} borrowers)"

    def update(self, limits: Mapping[Subject, Limits]) -> tuple[Account, ...]:
        self._limits = limits
        wanted = accounts_of(limits)
        for account in [account for account in self._accounts if account not in wanted]:
            del self._accounts[account]
        opened = []
        for account, bound in wanted.items():
            book = self._accounts.get(account)
            if book is None:
                self._accounts[account] = self._open(account.kind, bound)
                opened.append(account)
            else:
                book.limit = bound
        return tuple(opened)

    async def lend(self, borrower: str, asks: tuple[Ask, ...]) -> tuple[Grant, ...]:
        self._note(borrower)
        if self._complete.is_set() or not asks:
            return self.lend_now(borrower, asks)
        reports = self.lend_now(borrower, tuple(structs.replace(ask, want=0, need=0, least=0) for ask in asks))
        try:
            await asyncio.wait_for(self._complete.wait(), _PATIENCE_S)
        except TimeoutError:
            self._complete.set()
        wishes = tuple(
            structs.replace(ask, used=0, left=0, spent=0, unused=(), slot=report.slot, epoch=self.epoch)
            for ask, report in zip(asks, reports, strict=True)
        )
        return tuple(
            structs.replace(grant, used_slot=report.used_slot)
            for grant, report in zip(self.lend_now(borrower, wishes), reports, strict=True)
        )

    def lend_now(self, borrower: str, asks: tuple[Ask, ...]) -> tuple[Grant, ...]:
        """`lend` without a loop, and without waiting for other borrowers."""
        return tuple(self._answer(borrower, ask) for ask in asks)

    def left(self, borrower: str) -> None:
        for book in self._accounts.values():
            book.forget(borrower)

    def charge(self, subject: Subject, kind: str, units: int, at: float) -> None:
        account = Account(subject, kind)
        book = self._accounts.get(account)
        if book is not None:
            book.charge(units, self._wall() - at)
            self._warn(account, book)

    def remaining(self, subject: Subject, kind: str) -> int | None:
        book = self._accounts.get(Account(subject, kind))
        return None if book is None else max(0, book.free())

    def counted(self) -> dict[Account, int]:
        """What is counted as used now, where it is not 0."""
        return {account: used for account, book in self._accounts.items() if (used := book.limit - book.free()) > 0}

    def warnings(self) -> tuple[BudgetWarning, ...]:
        return self._warner.take()

    async def aclose(self) -> None:
        """Nothing to let go of."""

    def _open(self, kind: str, bound: int) -> _Window | _Level | _Budget:
        if kind in WINDOWS:
            return _Window(bound, WINDOWS[kind], self._clock)
        if kind in BUDGETS:
            return _Budget(bound, kind, self._wall)
        return _Level(bound)

    def _note(self, borrower: str) -> None:
        if not self._complete.is_set():
            self._borrowers.add(borrower)
            if len(self._borrowers) >= self._awaited:
                self._complete.set()

    def _answer(self, borrower: str, ask: Ask) -> Grant:
        account = Account(Subject(ask.scope, ask.name), ask.kind)
        book = self._accounts.get(account)
        if book is None:  # not limited any more; the borrower will be told so in a moment
            return Grant(ask.scope, ask.name, ask.kind, ask.want, expires_s=1.0, remaining=ask.want, epoch=self.epoch)
        used_slot = book.receive(borrower, ask, ask.epoch == self.epoch)
        free = book.free()
        units = granted_units(ask, free, book.limit)
        slot, expires_s = book.lend(borrower, units)
        self._warn(account, book)
        refused = ask.want > 0 and units == 0
        return Grant(
            ask.scope,
            ask.name,
            ask.kind,
            units,
            expires_s=expires_s,
            remaining=max(0, free - units),
            retry_after_s=book.wait_s(max(1, ask.least)) if refused else 0.0,
            reset_s=book.reset_s(),
            slot=slot,
            used_slot=used_slot,
            epoch=self.epoch,
        )

    def _warn(self, account: Account, book: _Window | _Level | _Budget) -> None:
        if isinstance(book, _Budget):
            ratio = self._limits[account.subject].warn_ratio
            self._warner.look(account, book.limit, book.limit - book.free(), ratio)


def granted_units(ask: Ask, free: int, limit: int) -> int:
    """How much of `free` an ask gets: nothing if the first request could not use it, at most a lease or what is needed."""
    if ask.want <= 0 or free < max(1, ask.least):
        return 0
    return min(free, ask.want, max(ask.need, lease_of(limit)))


class Warner:
    """Tells once in a budget's day or month that the warning share is reached."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._warned: dict[Account, int] = {}
        self._news: list[BudgetWarning] = []

    def look(self, account: Account, limit: int, spent: int, ratio: float) -> None:
        """`spent` of `limit` units are gone."""
        if spent < ratio * limit:
            return
        period = period_of(account.kind, self._wall())
        if self._warned.get(account) != period:
            self._warned[account] = period
            self._news.append(BudgetWarning(account.subject, account.kind, spent / MICRO, limit / MICRO))

    def take(self) -> tuple[BudgetWarning, ...]:
        """What became known since the last call."""
        news = tuple(self._news)
        self._news.clear()
        return news


def period_of(kind: str, wall: float) -> int:
    """The number of the day, or month, that Unix time `wall` is in; a later one has a greater number."""
    if kind == "usd_per_day":
        return int(wall // 86_400)
    day = datetime.fromtimestamp(wall, UTC)
    return day.year * 12 + day.month - 1


def period_end(kind: str, period: int) -> float:
    """When it is over, Unix seconds."""
    if kind == "usd_per_day":
        return (period + 1) * 86_400.0
    year, month = divmod(period + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


class _Window:
    """A sliding limit. Memory: a number for each slot in which something happened, window and life of a lease long."""

    __slots__ = ("_clock", "_newest", "_oldest", "_slots", "_total", "_window", "limit")

    def __init__(self, limit: int, window: Window, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._window = window
        self._clock = clock
        self._slots: dict[int, int] = {}
        self._total = 0
        self._newest = self._slot(clock())
        self._oldest = self._slot(clock() - window.length_s)

    def receive(self, borrower: str, ask: Ask, known: bool) -> int:
        here = self._slide()
        if known:
            for slot, units in ask.unused:
                self._remove(slot, units)
            self._remove(ask.slot, ask.used + ask.left)
            self._add(here, ask.used)
            self._add(self._slot(self._clock() + self._window.life_s), ask.left)
        else:
            self._add(here, ask.held)
        self._add(here, ask.spent)
        return here

    def lend(self, borrower: str, units: int) -> tuple[int, float]:
        slot = self._slot(self._clock() + self._window.life_s)
        self._add(slot, units)
        return slot, self._window.life_s

    def forget(self, borrower: str) -> None:
        """What it was lent may have been used: it stays counted."""

    def free(self) -> int:
        self._slide()
        return self.limit - self._total

    def wait_s(self, units: int) -> float:
        lacking = units - (self.limit - self._total)
        for slot in sorted(self._slots):
            lacking -= self._slots[slot]
            if lacking <= 0:
                return self._leaves_at(slot) - self._clock()
        return self._window.length_s  # more than the limit: never, but a time has to be said

    def reset_s(self) -> float:
        return max(0.0, self._leaves_at(self._newest) - self._clock()) if self._total else 0.0

    def charge(self, units: int, age_s: float) -> None:
        slot = self._slot(self._clock() - max(0.0, age_s))
        self._slide()
        if slot >= self._oldest:
            self._add(slot, units)

    def _slot(self, at: float) -> int:
        return math.floor(at / self._window.slot_s)

    def _leaves_at(self, slot: int) -> float:
        """When nothing that happened in `slot` is within a window that includes this instant."""
        return (slot + 1) * self._window.slot_s + self._window.length_s

    def _slide(self) -> int:
        """Let go what has left the window; returns the slot of this instant."""
        now = self._clock()
        oldest = self._slot(now - self._window.length_s)  # the first whose end is less than a window ago
        if oldest > self._newest:
            self._slots.clear()
            self._total = 0
        else:
            for slot in range(self._oldest, oldest):
                self._total -= self._slots.pop(slot, 0)
        self._oldest = max(self._oldest, oldest)
        return self._slot(now)

    def _add(self, slot: int, units: int) -> None:
        if units > 0:
            self._slots[slot] = self._slots.get(slot, 0) + units
            self._total += units
            self._newest = max(self._newest, slot)

    def _remove(self, slot: int, units: int) -> None:
        there = self._slots.get(slot, 0)
        gone = min(there, units)
        if gone > 0:
            self._slots[slot] = there - gone
            self._total -= gone


class _Level:
    """A bound of what is held at once."""

    __slots__ = ("_lent", "_total", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lent: dict[str, int] = {}
        self._total = 0

    def receive(self, borrower: str, ask: Ask, known: bool) -> int:
        self.forget(borrower)
        self._hold(borrower, ask.held + (ask.left if known else 0))
        return 0

    def lend(self, borrower: str, units: int) -> tuple[int, float]:
        self._hold(borrower, units)
        return 0, 0.0

    def forget(self, borrower: str) -> None:
        self._total -= self._lent.pop(borrower, 0)

    def free(self) -> int:
        return self.limit - self._total

    def wait_s(self, units: int) -> float:
        return _LEVEL_RETRY_S

    def reset_s(self) -> float:
        return _LEVEL_RETRY_S if self._total else 0.0

    def charge(self, units: int, age_s: float) -> None:
        """What is over is not in flight."""

    def _hold(self, borrower: str, units: int) -> None:
        if units > 0:
            self._lent[borrower] = self._lent.get(borrower, 0) + units
            self._total += units


class _Budget:
    """What may be spent in a day or month of the calendar."""

    __slots__ = ("_kind", "_period", "_spent", "_wall", "limit")

    def __init__(self, limit: int, kind: str, wall: Callable[[], float]) -> None:
        self.limit = limit
        self._kind = kind
        self._wall = wall
        self._period = period_of(kind, wall())
        self._spent = 0

    def receive(self, borrower: str, ask: Ask, known: bool) -> int:
        self._turn()
        if known:
            for period, units in ask.unused:
                if period == self._period:
                    self._spent -= min(units, self._spent)
            if ask.slot != self._period:  # what was left of the period before is lent out of this one
                self._spent += ask.left
        else:
            self._spent += ask.held
        self._spent += ask.spent
        return self._period

    def lend(self, borrower: str, units: int) -> tuple[int, float]:
        self._spent += units
        return self._period, max(0.0, min(BUDGET_LIFE_S, self.reset_s()))

    def forget(self, borrower: str) -> None:
        """What it was lent may have been spent: it stays counted until the period is over."""

    def free(self) -> int:
        self._turn()
        return self.limit - self._spent

    def wait_s(self, units: int) -> float:
        return self.reset_s()

    def reset_s(self) -> float:
        return period_end(self._kind, self._period) - self._wall()

    def charge(self, units: int, age_s: float) -> None:
        self._turn()
        if period_of(self._kind, self._wall() - age_s) >= self._period:
            self._spent += units

    def _turn(self) -> None:
        period = period_of(self._kind, self._wall())
        if period > self._period:  # a clock that is put back does not give the money back
            self._period = period
            self._spent = 0
