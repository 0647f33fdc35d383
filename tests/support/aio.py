"""Runs a coroutine on a fresh uvloop loop and fails when it leaves tasks behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T], timeout_s: float = 20.0) -> T:
    """The coroutine's result. Raises TimeoutError after `timeout_s`, AssertionError for tasks left over."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            result = await coroutine
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left over: {left}"
        return result

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def until(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition") -> T:
    """The first true value of `predicate`, while the loop turns. Raises AssertionError when there is none in time."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not (value := predicate()):
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not come about within {timeout_s:g} s"
        await asyncio.sleep(0.001)
    return value
