"""What workers tell each other of their requests in flight."""

from __future__ import annotations

from llm_router import families
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.processes.loads import Loads

NAMES = frozenset({"a", "b"})


class Workers:
    """Three workers over segments in shared memory."""

    def __init__(self) -> None:
        self.segments = [Segment.create(f"worker-{index}", rows=64, slots=512) for index in range(3)]
        self.loads = [self.start(index) for index in range(3)]

    def start(self, index: int) -> Loads:
        """A worker that adopts its segment and reads those of the others."""
        writer = Writer(self.segments[index], [families.UPSTREAM_IN_FLIGHT])
        others = [
            Segment.attach(segment.fd, writable=False) for other, segment in enumerate(self.segments) if other != index
        ]
        return Loads(writer, others)

    def exported(self) -> dict[str, float]:
        """What a scrape would show."""
        rows = Reader(self.segments, [families.UPSTREAM_IN_FLIGHT]).collect().rows(families.UPSTREAM_IN_FLIGHT)
        return {row.labels[0]: row.values[0] for row in rows}


def test_elsewhere_is_the_sum_over_the_other_workers() -> None:
    """A worker's own count is not in it: that one is known exactly."""
    workers = Workers()
    for count, loads in enumerate(workers.loads, 1):
        loads.tell({"a": count, "b": 10 * count}, NAMES)
    assert [loads.elsewhere() for loads in workers.loads] == [{"a": 5, "b": 50}, {"a": 4, "b": 40}, {"a": 3, "b": 30}]
    assert workers.exported() == {"a": 6, "b": 60}
    workers.loads[2].tell({"a": 0, "b": 0}, NAMES)
    assert workers.loads[0].elsewhere() == {"a": 2, "b": 20}


def test_a_dead_worker_counts_for_nothing() -> None:
    """Neither when it died nor when its successor has not told anything yet."""
    workers = Workers()
    workers.loads[1].tell({"a": 7}, NAMES)
    assert workers.loads[0].elsewhere() == {"a": 7}
    workers.segments[1].mark_left()
    assert workers.loads[0].elsewhere() == {}
    successor = workers.start(1)
    assert workers.loads[0].elsewhere() == {}
    successor.tell({"a": 1}, NAMES)
    assert workers.loads[0].elsewhere() == {"a": 1}


def test_a_series_leaves_with_its_backend() -> None:
    """And comes back with it."""
    workers = Workers()
    loads = workers.loads[0]
    loads.tell({"a": 1, "b": 2}, NAMES)
    loads.tell({"b": 3}, NAMES)
    assert workers.exported() == {"b": 3}
    loads.tell({"a": 4, "b": 3}, NAMES)
    assert workers.exported() == {"a": 4, "b": 3}


def test_what_is_not_admitted_is_no_label_value() -> None:
    """Beyond the cap, a worker knows its own requests only."""
    workers = Workers()
    workers.loads[0].tell({"a": 1, "z": 2}, NAMES)
    workers.loads[0].tell({"a": 1, "z": 2}, frozenset({"z"}))
    assert workers.exported() == {"z": 2}


def test_one_worker_alone_reads_nothing() -> None:
    """There is nobody to add."""
    segment = Segment.private(rows=64, slots=512)
    loads = Loads(Writer(segment, [families.UPSTREAM_IN_FLIGHT]), [])
    loads.tell({"a": 1}, NAMES)
    assert loads.elsewhere() == {}
