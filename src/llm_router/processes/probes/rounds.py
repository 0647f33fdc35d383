"""Many probes in one check: a few at once, and no new one when time is up.

Whoever was not asked this time keeps what is known of it, and is asked first the next time: the caller's order decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable


async def in_turn(jobs: Iterable[Callable[[], Awaitable[None]]], *, at_once: int, for_s: float) -> None:
    """Run jobs in their order, `at_once` at a time. None begins later than `for_s` seconds from now.

    A job must not raise but when cancelled. Cancelling this cancels those that run.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + for_s
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            if loop.time() > until:
                return
            await job()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
