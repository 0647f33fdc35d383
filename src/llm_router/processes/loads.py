"""What the workers of one router tell each other: how many requests each has in flight at every backend.

Each writes its own numbers into its metric segment and reads those of the others, ten times a second and never per
request. So what is known of the others is up to two tenths of a second old; what a worker has itself is exact.
Not for: choosing (routing/policies.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from llm_router import families
from llm_router.observe.metrics.slots import Gauge, Reader, Segment, Writer


class Loads:
    """One worker's numbers, and the sum of the others'. Belongs to the thread that made it.

    Args:
        writer: of this worker's segment.
        others: the segments of the other workers, attached for reading. Those of dead workers are passed over.
    """

    def __init__(self, writer: Writer, others: Iterable[Segment]) -> None:
        self._writer = writer
        self._gauges: dict[str, Gauge] = {}
        self._reader = Reader(others, [families.UPSTREAM_IN_FLIGHT])

    def tell(self, in_use: Mapping[str, int], admitted: Collection[str]) -> None:
        """Write our own requests in flight, by backend; backends that may not be label values are left out."""
        for name, count in in_use.items():
            if name in admitted:
                gauge = self._gauges.get(name)
                if gauge is None:
                    gauge = self._gauges[name] = self._writer.gauge(families.UPSTREAM_IN_FLIGHT, name)
                gauge.set(count)
        for name in [name for name in self._gauges if name not in in_use or name not in admitted]:
            self._gauges.pop(name).remove()

    def elsewhere(self) -> dict[str, int]:
        """The other workers' requests in flight, by backend."""
        rows = self._reader.collect().rows(families.UPSTREAM_IN_FLIGHT)
        return {row.labels[0]: int(row.values[0]) for row in rows}
