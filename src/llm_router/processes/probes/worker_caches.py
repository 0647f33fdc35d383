"""The check `cache_functionality`: control has every worker probe its cache (cache.py), and waits for the answers.

    control ──CacheProbe(number)──▶ every worker ──CacheProbed(number, problem, seconds)──▶ control

Each worker has a cache of its own in memory, or its own connections to the Redis that all share, so each is asked.
Not for: the probe itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from llm_router.observe.health.checks import Check, failed, passed
from llm_router.processes.snapshot import CacheProbe, CacheProbed

ANSWER_S: Final = 3.0
"""A probe ends within two seconds (cache.TIMEOUT_S); a worker that says nothing after three has another problem."""


class Line(Protocol):
    """A connected worker, as `news.WorkerLine`."""

    name: str

    def tell(self, word: CacheProbe) -> None: ...


class WorkerCaches:
    """Asks, and gathers the answers. Of one event loop.

    Args:
        lines: the workers that are connected now.
        is_enabled: whether a cache is configured.
        answer_s: how long to wait for the last answer.
    """

    def __init__(
        self, lines: Callable[[], Iterable[Line]], is_enabled: Callable[[], bool], *, answer_s: float = ANSWER_S
    ) -> None:
        self._lines = lines
        self._is_enabled = is_enabled
        self._answer_s = answer_s
        self._number = 0
        self._awaited: dict[str, asyncio.Future[CacheProbed | None]] = {}

    def __repr__(self) -> str:
        return f"<WorkerCaches round {self._number}, {len(self._awaited)} answers to come>"

    def saw(self, line: Line, fact: CacheProbed) -> None:
        """A worker's answer. One to an earlier question is passed over."""
        answer = self._awaited.get(line.name)
        if answer is not None and fact.number == self._number and not answer.done():
            answer.set_result(fact)

    def left(self, line: Line) -> None:
        """A worker is gone; whoever waits for it need not."""
        answer = self._awaited.get(line.name)
        if answer is not None and not answer.done():
            answer.set_result(None)

    async def check(self) -> Check:
        """Ask every worker now. `value` is how many caches work, `threshold` how many were asked.

        One round at a time: a second one that begins meanwhile makes the first one's answers late.
        """
        if not self._is_enabled():
            return passed("The cache is off: there is nothing to check", value=0.0, threshold=0.0, unit="caches")
        self._number += 1
        loop = asyncio.get_running_loop()
        lines = tuple(self._lines())
        asked: dict[str, asyncio.Future[CacheProbed | None]] = {line.name: loop.create_future() for line in lines}
        self._awaited = asked
        for line in lines:
            line.tell(CacheProbe(self._number))
        try:
            if asked:
                await asyncio.wait(asked.values(), timeout=self._answer_s)
        finally:
            if self._awaited is asked:
                self._awaited = {}
        return self._judged(asked)

    def _judged(self, asked: dict[str, asyncio.Future[CacheProbed | None]]) -> Check:
        problems: dict[str, str] = {}
        seconds = 0.0
        working = 0
        for name, answer in asked.items():
            fact = answer.result() if answer.done() else None
            if answer.done() and fact is None:
                continue  # it left: the check of workers tells
            if fact is None:
                problems[name] = f"it did not answer within {self._answer_s:g} s"
            elif fact.problem:
                problems[name] = fact.problem
            else:
                working += 1
                seconds = max(seconds, fact.seconds)
        details: dict[str, Any] = {"slowest_ms": round(seconds * 1000, 3)}
        total = working + len(problems)
        if not total:
            return failed("No worker is there whose cache could be checked", unit="caches", threshold=1.0)
        if not problems:
            return passed(
                "Cache functionality verified", value=working, threshold=total, details=details, unit="caches"
            )
        # Of a Redis all say the same.
        said = sorted(set(problems.values()))
        return failed(
            f"{len(problems)} of {total} workers' caches do not work: {'; '.join(said)}",
            status="degraded" if working else "critical",
            value=working,
            threshold=total,
            details={**details, "problems": said[:10]},
            unit="caches",
        )
