"""The thread that writes: takes the lines that wait and appends them to files, many at a time.

Whoever has a line appends it to the queue of its file, which costs a tenth of a microsecond, and wakes the thread only
if it sleeps; while there is traffic it looks by itself fifty times a second. Lines are bytes when they come here: what
waits must not be objects that the garbage collector walks through (decision 0013).
Not for: what lines look like, or which there are.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

from llm_router.observe.logs.files import RETRY_S, LogFile
from llm_router.observe.logs.schema import FileName

TICK_S: Final = 0.02
"""How long lines gather. A line is in its file this long after it happened, and in a kill this much of them is lost."""

BATCH: Final = 512
"""Lines of one write. Taking them off the queue holds the interpreter's lock for some 30 us; the write does not."""

LARGE_BYTES: Final = 4096
"""Lines that are larger count by their bytes too: `large_bytes`."""

_WAIT_S: Final = 60.0
"""Longest sleep while nothing happens: an upper bound for what only time reveals."""


class Writer:
    """Owns the thread. `queues`, `wake` and `is_idle` are for whoever writes; anything may be called from any thread.

    How much may wait is the affair of whoever appends: it looks first, at `waiting` and `large_bytes`.
    """

    def __init__(self, files: Mapping[FileName, LogFile]) -> None:
        self.queues: dict[FileName, deque[bytes]] = {name: deque() for name in files}
        self.is_idle = False
        """Whether the thread sleeps: whoever appends then has to `wake` it."""
        self.cpu_s = 0.0
        """CPU seconds that the thread has used."""
        self.large_bytes = 0
        """Bytes of the large lines that wait; whoever appends one adds them, under `lock`."""
        self.lock = threading.Lock()
        self._files = files
        self._news = threading.Event()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return sum(map(len, self.queues.values()))

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """End the thread's sleep."""
        self.is_idle = False
        self._news.set()

    def close(self, timeout_s: float) -> bool:
        """Write what waits and end the thread. False if it did not come to that in time: a disk that hangs."""
        self._ends = True
        self._news.set()
        if self._thread.ident is None:
            self._drain()
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ends:
            if not self.waiting:
                self._sleep()
            if not self._ends:
                time.sleep(TICK_S)
            self._drain()
            self.cpu_s = time.thread_time()

    def _sleep(self) -> None:
        self._news.clear()
        self.is_idle = True
        # Whoever appended before it could see that we sleep has left something in the queue.
        if not self.waiting and not self._ends:
            is_well = not any(file.problem for file in self._files.values())
            self._news.wait(_WAIT_S if is_well else RETRY_S)
        self.is_idle = False

    def _drain(self) -> None:
        for file in self._files.values():
            file.retry()
        for name, queue in self.queues.items():
            while queue:
                # What is appended meanwhile comes with the next batch: nobody else takes lines out.
                lines = [queue.popleft() for _ in range(min(len(queue), BATCH))]
                large = sum(len(line) for line in lines if len(line) > LARGE_BYTES)
                if large:
                    with self.lock:
                        self.large_bytes -= large
                self._files[name].write(lines)
