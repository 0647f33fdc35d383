"""Admits requests by limits and budgets, in the process that serves them.

What may be admitted is borrowed from a ledger (ledger.py) some units at a time, so that a request costs a few additions
and asks nobody. It waits only when a lease has to be fetched, for a second at most. A request reserves what it may use
and settles with what it did use: the difference goes back into the lease if the units came out of the one that is valid
now, else to the ledger, under the slot of time in which the units are counted there (a *mark* remembers it).

`sweep` reports what was used, about once a second for each lease that is in use, renews it, fetches more before it is
used up, and gives back what lies idle until it expires. No timers, no tasks.

Not for: counting over all processes (ledger.py) or knowing prices and tokens (gateway).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NamedTuple

from llm_router.accounts.ledger import (
    MICRO,
    WINDOWS,
    Account,
    Ask,
    Grant,
    accounts_of,
    lease_of,
)
from llm_router.accounts.limits import Limits, Subject
from llm_router.errors import BudgetExceeded, LimitExceeded, Unavailable

WAIT_S: Final = 1.0
"""How long a request waits for a lease at most."""

_SWEEP_S: Final = 0.1
_RETURN_S: Final = 0.25
"""What settled requests did not use goes to the ledger after this."""
_REPORT_S: Final = 1.0
"""What was used within a minute's window is reported after this: it leaves the window at most so much later."""
_REPORT_SLOW_S: Final = 10.0
"""The same for days and budgets; and in-flight inferences are confirmed so often while there are any."""
_IDLE_LEVEL_S: Final = 5.0
"""Places that stay free for this long are given back."""
_REFUSED_S: Final = 0.25
"""A refusal holds for this long without asking again, so that a caller who hammers costs nobody else anything."""
_TOP_UP_FROM: Final = 4
"""Leases of fewer units are borrowed one request at a time: keeping one back would be a large part of the limit."""
_PLANS: Final = 4096
"""Pairs of key and model remembered; beyond it they are looked up anew (about 2 us)."""
_FOREVER: Final = math.inf
_PLENTY: Final = 1 << 60

Headers = list[tuple[bytes, bytes]]
_Names = tuple[bytes, bytes, bytes]


class LimiterStatistics(NamedTuple):
    """`leases` are those with anything in them; `refused` counts requests; `unreachable` those that waited in vain."""

    leases: int
    waiting: int
    asks: int
    refused: int
    unreachable: int


class Plan:
    """The limits that hold for a key and a model.

    Args:
        needs_tokens, needs_usd: whether `reserve` has to be told how many tokens, and what cost, to expect.
    """

    __slots__ = ("budgets", "levels", "needs_tokens", "needs_usd", "ones", "requests", "tokens")

    def __init__(self, leases: Iterable[_Lease]) -> None:
        by_kind: dict[str, list[_Lease]] = {}
        for lease in leases:
            by_kind.setdefault(lease.measure, []).append(lease)
        self.requests = tuple(by_kind.get("requests", ()))
        self.levels = tuple(by_kind.get("concurrency", ()))
        self.tokens = tuple(by_kind.get("tokens", ()))
        self.budgets = tuple(by_kind.get("usd", ()))
        self.ones = self.requests + self.levels
        self.needs_tokens = bool(self.tokens)
        self.needs_usd = bool(self.budgets)

    def __repr__(self) -> str:
        return f"Plan({', '.join(repr(lease) for lease in (*self.ones, *self.tokens, *self.budgets))})"

    def needs(self, tokens: int, micro_usd: int) -> Iterable[tuple[_Lease, int]]:
        """Every lease that a request draws on, and how many units."""
        for lease in self.ones:
            yield lease, 1
        for lease in self.tokens:
            yield lease, tokens
        for lease in self.budgets:
            yield lease, micro_usd


class Reservation:
    """A request's part of its limits. To be settled once, whatever becomes of the request."""

    __slots__ = ("_limiter", "_settled", "_turn", "micro_usd", "plan", "tokens")

    def __init__(self, limiter: Limiter, plan: Plan, tokens: int, micro_usd: int, turn: int) -> None:
        self._limiter = limiter
        self._turn = turn
        self._settled = False
        self.plan = plan
        self.tokens = tokens
        self.micro_usd = micro_usd

    def __repr__(self) -> str:
        state = "settled" if self._settled else "open"
        return f"Reservation({self.tokens} tokens, {self.micro_usd / MICRO:g} USD, {state})"

    def settle(self, tokens: int, micro_usd: int) -> None:
        """Say what was really used, 0 and 0 if nothing was. The place is free at once; a request stays counted.

        Only the first call has an effect. More than was reserved is charged, though it may exceed the limit.
        """
        if self._settled:
            return
        self._settled = True
        plan = self.plan
        turn = self._turn
        for lease in plan.levels:
            lease.left += 1
        for lease in plan.requests:
            lease.settled += 1
        for lease in plan.tokens:
            unused = self.tokens - tokens
            if unused >= 0 and lease.since <= turn:
                lease.left += unused
                lease.settled += tokens
            else:
                lease.settle_late(self.tokens, unused, turn)
        for lease in plan.budgets:
            unused = self.micro_usd - micro_usd
            if unused >= 0 and lease.since <= turn:
                lease.left += unused
                lease.settled += micro_usd
            else:
                lease.settle_late(self.micro_usd, unused, turn)

    def headers(self) -> Headers:
        """`x-ratelimit-limit|remaining|reset-requests|tokens` of the limits of which least is left."""
        return headers_of(self.plan, self._limiter.now())


class Limiter:
    """Admits requests by what it has borrowed. For use in one event loop; call `sweep` about ten times a second.

    Args:
        ask: sends asks to the ledger; the answers come through `granted`, before it returns or later, in any order.
            Fewer answers than asks are made up for by `control_lost`.
        clock: monotonic seconds.
    """

    def __init__(
        self, ask: Callable[[tuple[Ask, ...]], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.now = clock
        self._ask = ask
        self._leases: dict[Account, _Lease] = {}
        self._busy: dict[_Lease, None] = {}  # those with anything to look after, in the order of their first use
        self._plans: dict[tuple[str, str], Plan | None] = {}
        self._waiting: dict[_Waiter, None] = {}
        self._turn = 1  # grows with every ask: tells reservations from before it from those after it
        self._lost_at = -_FOREVER
        self._is_lost = False
        self._next_sweep = -_FOREVER
        self._asks = 0
        self._refused = 0
        self._unreachable = 0

    def __repr__(self) -> str:
        return f"Limiter({self.statistics()!r})"

    def statistics(self) -> LimiterStatistics:
        return LimiterStatistics(len(self._busy), len(self._waiting), self._asks, self._refused, self._unreachable)

    def update(self, limits: Mapping[Subject, Limits]) -> None:
        """These limits hold from now on; what is borrowed stays so, but for what a lower limit would not lend."""
        wanted = accounts_of(limits)
        for account in [account for account in self._leases if account not in wanted]:
            lease = self._leases.pop(account)
            self._busy.pop(lease, None)
            lease.abolish()
        for account, bound in wanted.items():
            lease_there = self._leases.get(account)
            if lease_there is None:
                self._leases[account] = _Lease(account, bound)
            elif lease_there.limit != bound:
                lease_there.change(bound)
        self._plans.clear()
        self._serve(tuple(self._waiting), self.now())

    def plan(self, key_id: str, model: str) -> Plan | None:
        """What limits a request; None if nothing does. `key_id` is empty for a caller without a key."""
        if not self._leases:
            return None
        try:
            return self._plans[key_id, model]
        except KeyError:
            plan = self._make_plan(key_id, model)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._plans[key_id, model] = plan
        return plan

    def reserve(self, plan: Plan, tokens: int, micro_usd: int) -> Reservation | Awaitable[Reservation]:
        """Take one request, one place and so many tokens and millionths of a dollar; all of it or nothing.

        Returns: an awaitable if a lease has to be fetched. Cancelling it leaves nothing behind but the request
        counted, if it was admitted already.
        Raises: LimitExceeded, BudgetExceeded; Unavailable if the ledger cannot be asked. The awaitable does too.
        """
        now = self.now()
        for lease in plan.ones:
            if lease.left < 1 or now >= lease.until:
                return self._reserve_slowly(plan, tokens, micro_usd, now)
        for lease in plan.tokens:
            if lease.left < tokens or now >= lease.until:
                return self._reserve_slowly(plan, tokens, micro_usd, now)
        if micro_usd:
            for lease in plan.budgets:
                if lease.left < micro_usd or now >= lease.until:
                    return self._reserve_slowly(plan, tokens, micro_usd, now)
            for lease in plan.budgets:
                lease.left -= micro_usd
        for lease in plan.ones:
            lease.left -= 1
        for lease in plan.tokens:
            lease.left -= tokens
        return Reservation(self, plan, tokens, micro_usd, self._turn)

    def granted(self, grants: Iterable[Grant]) -> None:
        """The ledger's answers: whoever waited for them goes on, is refused, or asks for the rest."""
        now = self.now()
        touched: dict[_Waiter, None] = {}
        for grant in grants:
            lease = self._leases.get(Account(Subject(grant.scope, grant.name), grant.kind))
            if lease is None or lease.sent is None:
                continue  # abolished, or asked before the connection was lost
            sent = lease.sent
            lease.take_in(grant, now)
            if sent.want and not grant.units:
                lease.refuse(max(1, sent.least), grant.retry_after_s, now)
            touched.update(dict.fromkeys(lease.waiting))
        self._serve(touched, now)

    def control_lost(self) -> None:
        """The ledger cannot be asked. What is borrowed may be used until it expires."""
        self._is_lost = True
        self._lost_at = self.now()
        for lease in self._leases.values():
            lease.lose()

    def control_found(self) -> None:
        """A ledger can be asked, maybe another one: tell it at once what is held, and ask again for those who wait."""
        self._is_lost = False
        for lease in self._busy:
            lease.lose()
            lease.give_back(lease.left)
            lease.refused_until = -_FOREVER
        if self._busy:
            self._send(list(self._busy), self.now())
        else:
            self._ask(())  # a new ledger waits until it has heard of every borrower

    def sweep(self, now: float) -> None:
        """Report, renew, fetch, give back; end waits that took too long. Returns at once if it was called just now."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + _SWEEP_S
        if self._waiting:
            self._end_waits(now)
        if self._is_lost:
            return
        due, idle = [], []
        for lease in self._busy:
            if lease.sent is None:
                if lease.is_due(now):
                    due.append(lease)
                elif lease.is_empty():
                    idle.append(lease)
        for lease in idle:
            lease.rest()
            del self._busy[lease]
        self._send(due, now)

    def give_back(self) -> None:
        """Give back everything that is not in use, for an orderly end."""
        for lease in self._busy:
            lease.give_back(lease.left)
        self._send([lease for lease in self._busy if lease.sent is None], self.now(), tops_up=False)

    def idle(self, account: Account) -> int:
        """Units borrowed and not reserved."""
        lease = self._leases.get(account)
        return 0 if lease is None else lease.left

    # -- the slow path ---------------------------------------------------------------------------------------

    def _make_plan(self, key_id: str, model: str) -> Plan | None:
        subjects = (*((Subject("key", key_id),) if key_id else ()), Subject("model", model), Subject("global", ""))
        leases = [lease for account, lease in self._leases.items() if account.subject in subjects]
        return Plan(leases) if leases else None

    def _reserve_slowly(
        self, plan: Plan, tokens: int, micro_usd: int, now: float
    ) -> Reservation | Awaitable[Reservation]:
        waiter = _Waiter(plan, tokens, micro_usd, now + WAIT_S)
        self._serve((waiter,), now)
        outcome = waiter.outcome
        if isinstance(outcome, Reservation):
            return outcome
        if outcome is not None:
            raise outcome
        return self._wait(waiter)

    async def _wait(self, waiter: _Waiter) -> Reservation:
        waiter.future = asyncio.get_running_loop().create_future()
        try:
            if not waiter.is_done():
                await waiter.future
        except asyncio.CancelledError:
            self._dismiss(waiter)
            waiter.undo()
            raise
        outcome = waiter.outcome
        if isinstance(outcome, Reservation):
            return outcome
        assert outcome is not None, "a waiter is woken with an outcome"
        raise outcome

    def _serve(self, waiters: Iterable[_Waiter], now: float) -> None:
        """Admit or refuse those who wait, as far as that is known; ask for what the others lack."""
        ask: dict[_Lease, None] = {}
        for waiter in waiters:
            lacking = self._try(waiter, now)
            if waiter.outcome is not None:
                self._dismiss(waiter)
                continue
            self._waiting[waiter] = None
            for lease, need in lacking:
                lease.waiting[waiter] = need
                if lease.sent is None:
                    ask[lease] = None
        if ask and not self._is_lost:
            self._send(list(ask), now)

    def _try(self, waiter: _Waiter, now: float) -> list[tuple[_Lease, int]]:
        """Give the waiter its outcome, or return what it lacks."""
        lacking = []
        plan = waiter.plan
        for lease, need in plan.needs(waiter.tokens, waiter.micro_usd):
            if not need:
                continue
            if now >= lease.until and lease.left > 0 and lease.sent is None:
                lease.give_back(lease.left)
            if lease.left >= need and now < lease.until:
                continue
            if need > lease.limit:
                waiter.outcome = self._refusal(waiter, lease, need, lease.length_s, now)
                return []
            if now < lease.refused_until and need - max(0, lease.left) >= lease.refused_need:
                waiter.outcome = self._refusal(waiter, lease, need, lease.retry_at - now, now)
                return []
            lacking.append((lease, need))
        if not lacking:
            for lease, need in plan.needs(waiter.tokens, waiter.micro_usd):
                lease.left -= need
            waiter.outcome = Reservation(self, plan, waiter.tokens, waiter.micro_usd, self._turn)
        elif self._is_lost and now - self._lost_at >= WAIT_S:
            waiter.outcome = self._away(lacking[0][0])
        return lacking

    def _dismiss(self, waiter: _Waiter) -> None:
        self._waiting.pop(waiter, None)
        for lease, _ in waiter.plan.needs(0, 0):
            lease.waiting.pop(waiter, None)
        if waiter.future is not None and not waiter.future.done():
            waiter.future.set_result(None)

    def _end_waits(self, now: float) -> None:
        for waiter in [waiter for waiter in self._waiting if now >= waiter.deadline]:
            lacking = self._try(waiter, now)
            if waiter.outcome is None:
                waiter.outcome = self._away(lacking[0][0])
            self._dismiss(waiter)

    def _send(self, leases: list[_Lease], now: float, *, tops_up: bool = True) -> None:
        asks = tuple(lease.compose(self._turn + 1, now, tops_up) for lease in leases)
        if not asks:
            return
        self._turn += 1
        self._asks += len(asks)
        for lease in leases:
            self._busy[lease] = None
        self._ask(asks)

    # -- refusals ----------------------------------------------------------------------------------------------

    def _away(self, lease: _Lease) -> Unavailable:
        self._unreachable += 1
        return Unavailable(
            f"{lease} cannot be checked now: what this worker may give out of it is used up, and the process that "
            f"counts it does not answer; try again in 1 s"
        )

    def _refusal(self, waiter: _Waiter, lease: _Lease, need: int, retry_after_s: float, now: float) -> LimitExceeded:
        self._refused += 1
        retry_after_s = max(0.0, retry_after_s)
        kind = BudgetExceeded if lease.measure == "usd" else LimitExceeded
        return kind(
            lease.why_not(need, retry_after_s),
            scope=lease.account.subject.scope,
            limit=lease.account.kind,
            retry_after_s=retry_after_s,
            headers=tuple(headers_of(waiter.plan, now)),
        )


class _Waiter:
    """A request that waits for leases: first come, first served with each of them."""

    __slots__ = ("deadline", "future", "micro_usd", "outcome", "plan", "tokens")

    def __init__(self, plan: Plan, tokens: int, micro_usd: int, deadline: float) -> None:
        self.plan = plan
        self.tokens = tokens
        self.micro_usd = micro_usd
        self.deadline = deadline
        self.future: asyncio.Future[None] | None = None
        self.outcome: Reservation | LimitExceeded | Unavailable | None = None

    def is_done(self) -> bool:
        return self.outcome is not None

    def undo(self) -> None:
        """Whoever waited has left: what it got meanwhile goes back."""
        if isinstance(self.outcome, Reservation):
            self.outcome.settle(0, 0)


class _Mark:
    """Units that were reserved between two asks, from turn `since` on, and where the ledger counts them."""

    __slots__ = ("back", "closed_at", "since", "slot")

    def __init__(self, since: int, slot: int) -> None:
        self.since = since
        self.slot = slot
        self.back = 0  # to be given back under `slot`
        self.closed_at = _FOREVER


class _Lease:
    """What is borrowed of one limit.

    `left` may be used until `until`. `base` is what `left` was when the current mark began, together with what was
    granted since: `base - left` is what was reserved since then (and not settled with less). Of concurrency `base` is
    all that is borrowed, in use or not. `since` is the turn from which on reservations belong to the current mark.
    """

    __slots__ = (
        "_asked_at",
        "_away_settled",
        "_closed",
        "_epoch",
        "_granted_at",
        "_idle_before",
        "_idle_looked_at",
        "_limit_header",
        "_mark",
        "_remaining",
        "_report_s",
        "_reported_at",
        "_reset_s",
        "_spent",
        "_taken",
        "account",
        "base",
        "cap",
        "left",
        "length_s",
        "limit",
        "measure",
        "refused_need",
        "refused_until",
        "retry_at",
        "sent",
        "settled",
        "since",
        "until",
        "waiting",
    )

    def __init__(self, account: Account, limit: int) -> None:
        kind = account.kind
        self.account = account
        self.measure = kind.partition("_")[0]  # requests, tokens, usd, concurrency
        window = WINDOWS.get(kind)
        self.length_s = 86_400.0 if window is None else window.length_s
        self._report_s = _REPORT_S if window is not None and window.length_s <= 60 else _REPORT_SLOW_S
        self.limit = limit
        self.cap = lease_of(limit)
        self.left = 0
        self.base = 0
        self.until = _FOREVER if self.measure == "concurrency" else -_FOREVER
        self.since = 0
        self.settled = 0
        self.sent: Ask | None = None
        self.waiting: dict[_Waiter, int] = {}
        self.refused_need = _PLENTY
        self.refused_until = self.retry_at = -_FOREVER
        self._mark = _Mark(0, 0)
        self._closed: deque[_Mark] = deque()
        self._taken = 0
        self._spent = 0
        self._away_settled: int | None = None
        self._epoch = ""
        self._asked_at = self._reported_at = self._idle_looked_at = -_FOREVER
        self._granted_at = 0.0
        self._idle_before = 0
        self._remaining = limit
        self._reset_s = 0.0
        self._limit_header = b"%d" % limit

    def __repr__(self) -> str:
        return f"<{self.account.kind} of {self.account.subject}: {self.left} left of {self.base}>"

    def __str__(self) -> str:
        scope, name = self.account.subject
        whose = {"key": "this key", "model": f"model {name!r}"}.get(scope, "all callers together")
        noun = "budget" if self.measure == "usd" else "limit"
        return f"the {noun} {self.account.kind} of {whose}"

    # -- units ---------------------------------------------------------------------------------------------------

    def give_back(self, units: int) -> None:
        """Of what is left, with the next ask."""
        if units > 0:
            self.left -= units
            self.base -= units
            self._mark.back += units

    def settle_late(self, reserved: int, unused: int, turn: int) -> None:
        """Settle units of an earlier mark, or with more than was reserved (`unused` < 0)."""
        if unused < 0:
            more = min(-unused, max(0, self.left))
            self.left -= more
            self.settled += reserved + more
            self._spent += -unused - more
            return
        self.settled += reserved
        for mark in reversed(self._closed):
            if mark.since <= turn:
                mark.back += unused
                return
        # counted in a window that is over

    def change(self, limit: int) -> None:
        """Another bound: what would not be lent under it goes back."""
        self.limit = limit
        self.cap = lease_of(limit)
        self._limit_header = b"%d" % limit
        self.refused_until = -_FOREVER
        self.give_back(self.left - self.cap)

    def abolish(self) -> None:
        """The limit is no more: nobody who still has it in a plan is held up."""
        self.left = _PLENTY
        self.until = _FOREVER
        self.sent = None

    def refuse(self, need: int, retry_after_s: float, now: float) -> None:
        """The ledger does not have so many units."""
        self.refused_need = need
        self.retry_at = now + retry_after_s
        self.refused_until = now + min(retry_after_s, _REFUSED_S)

    # -- asks ----------------------------------------------------------------------------------------------------

    def is_due(self, now: float) -> bool:
        """Whether the ledger should hear something."""
        since_report = now - self._reported_at
        if self.waiting:
            return True
        if self.measure == "concurrency":
            self._return_places(now)
            return self._mark.back > 0 or (self.base > 0 and since_report >= _REPORT_SLOW_S)
        if self.left > 0 and now >= self.until:
            self.give_back(self.left)
        elif self.left > self.cap:
            self.give_back(self.left - self.cap)
        if since_report < _RETURN_S:
            return False
        if self._spent or self._has_back():
            return True
        used = self.base - self.left
        if used <= 0:
            return False
        return since_report >= self._report_s or (
            self._tops_up() and self.left < self.cap // 2 and not self._is_refused(now)
        )

    def is_empty(self) -> bool:
        """Whether there is nothing to look after: nothing borrowed, in use, or to be told."""
        if self.left or self.base or self.waiting or self._spent or self._has_back():
            return False
        return self.measure == "concurrency" or self._taken == self.settled

    def rest(self) -> None:
        """Nothing refers to earlier marks any more."""
        self._closed.clear()

    def compose(self, turn: int, now: float, tops_up: bool) -> Ask:
        """What there is to say to the ledger, and whether a whole lease is welcome. A new mark begins with `turn`."""
        scope, name = self.account.subject
        needs = list(self.waiting.values())
        idle = max(0, self.left)
        need = max(0, sum(needs) - idle)
        want = need
        active = bool(needs) or self.base > self.left
        if tops_up and active and self._tops_up() and not (self._is_refused(now) and not needs):
            want = max(need, sum(needs) + self.cap - idle)
        settled = self.settled if self._away_settled is None else self._away_settled
        is_level = self.measure == "concurrency"
        used = 0 if is_level else self.base - self.left
        held = self.base - self.left if is_level else self._taken + used - settled
        self.sent = Ask(
            scope,
            name,
            self.account.kind,
            want=want,
            need=need,
            least=max(0, needs[0] - idle) if needs else 0,
            held=max(0, held),
            left=idle,
            slot=self._mark.slot,
            used=max(0, used),
            spent=self._spent,
            unused=() if is_level else self._returned(),
            epoch=self._epoch,
        )
        self._asked_at = self._reported_at = now
        self._spent = 0
        if is_level:
            self._mark.back = 0
        else:
            self._taken += used
            self.left = self.base = idle  # fewer than none were left of a ledger that is no more: now it is told
            self._close_mark(turn, now)
        return self.sent

    def take_in(self, grant: Grant, now: float) -> None:
        """The answer to what was sent."""
        sent = self.sent
        assert sent is not None, "an answer without an ask"
        self.sent = None
        if grant.epoch != self._epoch:  # another ledger: it counts what was held, and has not lent what was left
            self._epoch = grant.epoch
            self._closed.clear()
            if self.measure != "concurrency":
                old = _Mark(0, grant.used_slot)
                old.closed_at = now
                self._closed.append(old)
            self.left -= sent.left
            self.base -= sent.left
        elif self._closed:
            self._closed[-1].slot = grant.used_slot
            self._merge_marks()
        self._away_settled = None
        self._mark.slot = grant.slot
        self.left += grant.units
        self.base += grant.units
        if self.measure != "concurrency":
            self.until = self._asked_at + grant.expires_s
        self._remaining = grant.remaining
        self._reset_s = grant.reset_s
        self._granted_at = now
        if grant.units:
            self.refused_until = -_FOREVER

    def lose(self) -> None:
        """The ledger may or may not have heard what was sent: take it as is worse for us."""
        if self._away_settled is None:
            self._away_settled = self.settled
        if self.sent is not None:
            self._spent += self.sent.spent
            self.sent = None

    def _has_back(self) -> bool:
        return self._mark.back > 0 or any(mark.back for mark in self._closed)

    def _returned(self) -> tuple[tuple[int, int], ...]:
        returned = [(mark.slot, mark.back) for mark in (*self._closed, self._mark) if mark.back]
        for mark in (*self._closed, self._mark):
            mark.back = 0
        return tuple(returned)

    def _close_mark(self, turn: int, now: float) -> None:
        self._mark.closed_at = now
        self._closed.append(self._mark)
        self._mark = _Mark(turn, self._mark.slot)
        self.since = turn
        window = WINDOWS.get(self.account.kind)
        if window is not None:
            gone = now - window.length_s - window.life_s - window.slot_s
            while self._closed[0].closed_at < gone:
                self._closed.popleft()

    def _merge_marks(self) -> None:
        """Neighbours that are counted in the same slot need not be told apart."""
        closed = self._closed
        if len(closed) > 1 and closed[-1].slot == closed[-2].slot:
            last = closed.pop()
            closed[-1].back += last.back
            closed[-1].closed_at = last.closed_at

    def _return_places(self, now: float) -> None:
        """Places that lie idle: at once if there is one at most to lend, or more than a lease, else after a while."""
        if self.left <= 0:
            idle = 0
        elif self.cap == 1 or self.left > self.cap:
            idle = self.left - (0 if self.cap == 1 else self.cap)
        elif now - self._idle_looked_at >= _IDLE_LEVEL_S:
            self._idle_looked_at = now
            idle = min(self.left, self._idle_before)
            self._idle_before = self.left - idle
        else:
            idle = 0
        self.give_back(idle)

    def _tops_up(self) -> bool:
        return self.cap >= _TOP_UP_FROM

    def _is_refused(self, now: float) -> bool:
        return now < self.refused_until

    # -- what callers are told -----------------------------------------------------------------------------------

    def remaining(self) -> int:
        """Units that are left as far as is known here."""
        units = self._remaining + self.left
        if units <= 0:
            return 0
        return min(self.limit, units)

    def tell(self, headers: Headers, names: _Names, remaining: int, now: float) -> None:
        """Add the three `x-ratelimit-*` of this limit."""
        limit, left, reset = names
        reset_s = self._reset_s + self._granted_at - now
        headers.append((limit, self._limit_header))
        headers.append((left, b"%d" % remaining))
        headers.append((reset, b"%ds" % math.ceil(reset_s) if reset_s > 0 else b"0s"))

    def why_not(self, need: int, retry_after_s: float) -> str:
        """The refusal of `need` units in words: which limit, whose, and when to come back."""
        again = f"try again in {_span(retry_after_s)}"
        if self.measure == "usd":
            bound = f"{self}, {self.limit / MICRO:.2f} USD,"
            left = self.remaining() / MICRO
            if need > self.limit:
                return f"{bound} is less than this request may cost ({need / MICRO:.4f} USD); ask for less output"
            if left <= 0:
                return f"{bound} is spent; {again}"
            return f"{bound} leaves {left:.4f} USD, and this request may cost {need / MICRO:.4f} USD; {again}"
        if self.measure == "tokens":
            if need > self.limit:
                return (
                    f"{self}, {self.limit}, is less than this request may use ({need} tokens, input and the output "
                    f"that it allows); send less, or lower max_tokens"
                )
            return f"{self}, {self.limit}, leaves {self.remaining()}, and this request may use {need}; {again}"
        return f"{self}, {self.limit}, is reached; {again}"


_REQUESTS: Final = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKENS: Final = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")


def headers_of(plan: Plan, now: float) -> Headers:
    """`x-ratelimit-*` of a plan: of requests and of tokens the limit of which least is left."""
    headers: Headers = []
    for leases, names in ((plan.requests, _REQUESTS), (plan.tokens, _TOKENS)):
        if leases:
            tightest, remaining = leases[0], leases[0].remaining()
            for lease in leases[1:]:
                units = lease.remaining()
                if units < remaining:
                    tightest, remaining = lease, units
            tightest.tell(headers, names, remaining, now)
    return headers


def _span(seconds: float) -> str:
    """A time to wait, rounded up: `12 s`, `3 min`, `5 h`, `2 d`."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds > 2 * length:
            return f"{math.ceil(seconds / length)} {unit}"
    return f"{max(1, math.ceil(seconds))} s"
