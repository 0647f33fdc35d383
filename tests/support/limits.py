"""Limiters that borrow from a ledger without processes between them, and a record of what they admitted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

from llm_router.accounts.ledger import Ask, MemoryLedger
from llm_router.accounts.limiter import Limiter, Reservation
from llm_router.accounts.limits import Limits, Subject
from llm_router.errors import LimitExceeded, Unavailable
from llm_router.testing import FakeClock

KEY = Subject("key", "k1")
MODEL = Subject("model", "tiny")
GLOBAL = Subject("global", "")


def clock() -> FakeClock:
    """Noon of 14 November 2023: steps of an eighth of a second stay exact."""
    return FakeClock(1_699_963_200.0)


class Admission:
    """What was admitted at `at`, and what it came to (what was reserved, until it is settled)."""

    def __init__(self, at: float, reservation: Reservation) -> None:
        self.at = at
        self.reservation = reservation
        self.tokens = reservation.tokens
        self.micro_usd = reservation.micro_usd
        self.is_open = True
        self.settled_at = 0.0

    def settle(self, at: float, tokens: int, micro_usd: int = 0) -> None:
        self.is_open = False
        self.settled_at = at
        self.tokens = tokens
        self.micro_usd = micro_usd
        self.reservation.settle(tokens, micro_usd)


class Refusal(NamedTuple):
    at: float
    borrower: int
    tokens: int
    error: LimitExceeded | Unavailable


class Borrowers:
    """`count` limiters with one ledger. Their asks are answered at once, or by `deliver` if `at_once` is False."""

    def __init__(self, limits: dict[Subject, Limits], now: FakeClock, *, count: int = 1, at_once: bool = True) -> None:
        self.clock = now
        self.limits = limits
        self.ledger = MemoryLedger(clock=now, wall=now)
        self.ledger.update(limits)
        self.at_once = at_once
        self.in_transit: list[tuple[int, tuple[Ask, ...]]] = []
        self.asks: list[Ask] = []
        self.limiters = [self._limiter(number) for number in range(count)]
        self.admitted: list[Admission] = []
        self.refused: list[Refusal] = []
        self._waiting: set[asyncio.Task[None]] = set()

    def _limiter(self, number: int) -> Limiter:
        limiter = Limiter(lambda asks: self._ask(number, asks), clock=self.clock)
        limiter.update(self.limits)
        return limiter

    def _ask(self, number: int, asks: tuple[Ask, ...]) -> None:
        self.asks += asks
        self.in_transit.append((number, asks))
        if self.at_once:
            self._answer()

    def _answer(self) -> None:
        while self.in_transit:
            number, asks = self.in_transit.pop(0)
            self.limiters[number].granted(self.ledger.lend_now(f"worker-{number}", asks))

    async def deliver(self) -> None:
        """Answer what is asked, and let whoever waited for it go on."""
        while self.in_transit:
            messages, self.in_transit = self.in_transit, []
            answers = await asyncio.gather(*(self.ledger.lend(f"worker-{n}", asks) for n, asks in messages))
            for (number, _), grants in zip(messages, answers, strict=True):
                self.limiters[number].granted(grants)
        for _ in range(3):
            await asyncio.sleep(0)

    def admit(self, tokens: int = 0, micro_usd: int = 0, *, borrower: int = 0, key: str = "k1") -> Admission | None:
        """Reserve now, or in a task if that has to wait; None if it was refused or waits."""
        limiter = self.limiters[borrower]
        plan = limiter.plan(key, "tiny")
        assert plan is not None, "nothing limits this"
        try:
            got = limiter.reserve(plan, tokens, micro_usd)
        except (LimitExceeded, Unavailable) as error:
            self.refused.append(Refusal(self.clock(), borrower, tokens, error))
            return None
        if isinstance(got, Reservation):
            self.admitted.append(Admission(self.clock(), got))
            return self.admitted[-1]

        async def wait() -> None:
            try:
                self.admitted.append(Admission(self.clock(), await got))
            except (LimitExceeded, Unavailable) as error:
                self.refused.append(Refusal(self.clock(), borrower, tokens, error))

        task = asyncio.get_running_loop().create_task(wait())
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return None

    def advance(self, seconds: float) -> None:
        """Let time pass; every limiter is swept as its owner would, but for longer steps."""
        while seconds > 0:
            step = min(seconds, 0.125)
            self.clock.advance(step)
            seconds -= step
            self.sweep()

    def sweep(self) -> None:
        for limiter in self.limiters:
            limiter.sweep(self.clock())

    def replace_ledger(self) -> None:
        """Control is killed and comes back knowing what usage rows know: what was settled."""
        for limiter in self.limiters:
            limiter.control_lost()
        self.in_transit.clear()
        self.ledger = MemoryLedger(clock=self.clock, wall=self.clock, borrowers=len(self.limiters))
        self.ledger.update(self.limits)
        for one in self.admitted:
            if not one.is_open:
                for subject in self.limits:
                    for kind, units in (("requests_per_minute", 1), ("tokens_per_minute", one.tokens)):
                        self.ledger.charge(subject, kind, units, one.settled_at)
        for limiter in self.limiters:
            limiter.control_found()

    def open(self) -> list[Admission]:
        return [one for one in self.admitted if one.is_open]

    def windows(self, length_s: float) -> Iterator[tuple[int, int]]:
        """Requests and tokens in every window of `length_s` that begins with an admission."""
        for first in self.admitted:
            inside = [one for one in self.admitted if first.at <= one.at < first.at + length_s]
            yield len(inside), sum(one.tokens for one in inside)
