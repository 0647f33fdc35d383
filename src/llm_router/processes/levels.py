"""A worker's levels that are read off now and then: requests that wait, bytes that the cache takes.

Not for: what happens per request (instruments.py) or requests in flight (loads.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_router import families
from llm_router.cache.base import Cache
from llm_router.observe.metrics.slots import Gauge, Writer


class Levels:
    """Writes the gauges of one worker; what several workers write is summed up when it is read."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._queues: dict[str, Gauge] = {}
        self._caches: dict[str, Gauge] = {}

    def tell(self, queues: Mapping[str, int], cache: Cache | None) -> None:
        """Set what waits in each queue, and what the cache holds; what is gone leaves."""
        for model, waiting in queues.items():
            gauge = self._queues.get(model)
            if gauge is None:
                gauge = self._queues[model] = self._writer.gauge(families.QUEUE_SIZE, model)
            gauge.set(waiting)
        if len(self._queues) > len(queues):
            for model in self._queues.keys() - queues.keys():
                self._queues.pop(model).remove()
        if cache is not None and cache.type not in self._caches:
            self._caches[cache.type] = self._writer.gauge(families.CACHE_SIZE, cache.type)
        for type, gauge in self._caches.items():
            gauge.set(cache.statistics().size_bytes if cache is not None and cache.type == type else 0.0)
