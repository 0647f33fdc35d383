"""What a process allocated between two moments and still holds, by the stack that allocated it.

By tracemalloc, which sees what goes through Python's allocators: not the memory of C libraries. While it runs,
allocating costs some thirty times as much, so it runs for the time of the profile only. Not for: CPU time (cpu.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import tracemalloc
from typing import Final, NamedTuple

MAX_FRAMES: Final = 8
"""Innermost frames that are kept for each block. Each costs time: to write and read JSON takes 20 times as long with
one, 48 times with eight, 102 times with sixteen."""

MAX_TRACING_BYTES: Final = 32 * 1024 * 1024
"""What the bookkeeping may hold; a profile that needs more ends early. To copy that much takes 0.3 s, during which
the process does nothing else."""

_LOOK_S: Final = 0.25  # between two looks at how much it holds
_STEP: Final = 500  # blocks that are looked at before others get their turn: half a millisecond

_OURS: Final = os.path.dirname(__file__) + os.sep

Lines = tuple[tuple[str, int], ...]
"""Files and lines, the outermost first."""


class Growth(NamedTuple):
    """Blocks and bytes by stack, and how much Python's allocators gave in all and at the peak while this was traced."""

    stacks: list[tuple[Lines, int, int]]
    traced_bytes: int
    peak_bytes: int
    tracing_bytes: int


async def growth(seconds: float, max_tracing_bytes: int = MAX_TRACING_BYTES) -> Growth:
    """Trace for `seconds`, then tell what is held of what was allocated meanwhile, the largest first.

    Ends early when the bookkeeping holds `max_tracing_bytes`.

    If something else traces already it goes on afterwards, and what was freed meanwhile counts against what was
    allocated. When cancelled, tracing ends. The threads that count hold the interpreter lock for moments only, but for
    one copy of the list of blocks.
    """
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start(MAX_FRAMES)
    try:
        before = await asyncio.to_thread(lambda: _blocks(tracemalloc.take_snapshot())) if was_tracing else {}
        ends_at = time.monotonic() + seconds
        while tracemalloc.get_tracemalloc_memory() < max_tracing_bytes:
            left_s = ends_at - time.monotonic()
            if left_s <= 0.0:
                break
            await asyncio.sleep(min(left_s, _LOOK_S))
        snapshot = await asyncio.to_thread(tracemalloc.take_snapshot)
        traced, peak = tracemalloc.get_traced_memory()
        tracing = tracemalloc.get_tracemalloc_memory()
    finally:
        if not was_tracing:
            tracemalloc.stop()  # before the counting, which would be traced too
    return Growth(await asyncio.to_thread(_grown, before, snapshot), traced, peak, tracing)


def _grown(before: dict[Lines, list[int]], snapshot: tracemalloc.Snapshot) -> list[tuple[Lines, int, int]]:
    after = _blocks(snapshot)
    found = []
    for stack, (size, count) in after.items():
        size_before, count_before = before.get(stack, (0, 0))
        if size > size_before:
            found.append((stack, size - size_before, max(0, count - count_before)))
    return sorted(found, key=lambda row: -row[1])


def _blocks(snapshot: tracemalloc.Snapshot) -> dict[Lines, list[int]]:
    """Bytes and blocks by stack, without what profiles themselves hold."""
    sums: dict[tracemalloc.Traceback, list[int]] = {}
    for number, trace in enumerate(snapshot.traces):
        if number % _STEP == _STEP - 1:
            time.sleep(0)  # gives the interpreter lock to whoever waits for it
        entry = sums.setdefault(trace.traceback, [0, 0])
        entry[0] += trace.size
        entry[1] += 1
    found: dict[Lines, list[int]] = {}
    for traceback, (size, count) in sums.items():
        lines = tuple((frame.filename, frame.lineno) for frame in traceback)
        if lines and lines[-1][0] != tracemalloc.__file__ and not lines[-1][0].startswith(_OURS):
            entry = found.setdefault(lines, [0, 0])
            entry[0] += size
            entry[1] += count
    return found


def short(path: str) -> str:
    """The path of a source file as an import would find it."""
    folders = [folder for folder in sys.path if folder and path.startswith(folder.rstrip("/") + "/")]
    return path[len(max(folders, key=len).rstrip("/")) + 1 :] if folders else path
