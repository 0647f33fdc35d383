"""Measures the garbage collections of a process.

Not for: tuning them.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from typing import Any

from llm_router import families
from llm_router.observe.metrics.slots import Writer


class Collections:
    """Measures this process's garbage collections.

    A collection may run in any thread, and only the loop's thread may write metrics: so durations wait in a bounded
    queue until `flush`.
    """

    def __init__(self, writer: Writer, process: str) -> None:
        self._durations = [writer.histogram(families.GC_DURATION, process, str(i)) for i in range(3)]
        self._waiting: deque[tuple[int, float]] = deque(maxlen=4096)  # a scrape or tick comes long before
        self._started_at = 0.0

    def start(self) -> None:
        gc.callbacks.append(self._on_collection)

    def stop(self) -> None:
        gc.callbacks.remove(self._on_collection)

    def flush(self) -> None:
        """Count what has been waiting."""
        while self._waiting:
            generation, duration_s = self._waiting.popleft()
            self._durations[generation].observe(duration_s)

    def _on_collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._started_at = time.perf_counter()
        else:
            self._waiting.append((info["generation"], time.perf_counter() - self._started_at))
