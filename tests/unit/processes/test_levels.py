"""The gauges that a worker writes of what waits and what is kept."""

from __future__ import annotations

from llm_router import families
from llm_router.cache.base import Cached
from llm_router.cache.memory import MemoryCache
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.processes.levels import Levels
from llm_router.signals import Family
from llm_router.testing import FakeClock


def shown(reader: Reader, family: Family) -> dict[tuple[str, ...], float]:
    return {
        tuple(row.labels): row.values[0]
        for rows in reader.collect([]).families
        if rows.family is family
        for row in rows.rows
    }


def test_what_waits_and_what_is_kept_is_shown_and_what_is_gone_leaves() -> None:
    segment = Segment.private()
    writer = Writer(segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
    reader = Reader([segment], families.FAMILIES)
    levels = Levels(writer)
    cache = MemoryCache(max_bytes=10_000, max_entry_bytes=1000, ttl_s=60.0, clock=FakeClock())
    levels.tell({"a": 2, "b": 0}, cache)
    assert shown(reader, families.QUEUE_SIZE) == {("a",): 2.0, ("b",): 0.0}
    assert shown(reader, families.CACHE_SIZE) == {("response",): 0.0}
    cache.put(b"k", Cached(b"application/json", b"x" * 100, stream=False, backend="b"))
    levels.tell({"c": 1, "b": 3}, cache)
    assert shown(reader, families.QUEUE_SIZE) == {("b",): 3.0, ("c",): 1.0}
    assert shown(reader, families.CACHE_SIZE)["response",] >= 100
    levels.tell({"c": 1, "b": 3}, None)
    assert shown(reader, families.CACHE_SIZE) == {("response",): 0.0}
