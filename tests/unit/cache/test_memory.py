"""The memory cache keeps its bounds, whatever is put into it, and forgets in the right order."""

from __future__ import annotations

import tracemalloc
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.cache.base import Cached
from llm_router.cache.memory import ENTRY_BYTES, MemoryCache
from llm_router.testing import FakeClock
from support.aio import run
from support.fuzz import examples

TTL_S = 10.0
ROOM = 5 * (ENTRY_BYTES + 100)


def answer(size_bytes: int, mark: int = 0) -> Cached:
    return Cached(b"", bytes([mark % 256]) * size_bytes, False, "b")


def cache(clock: FakeClock, *, max_bytes: int = ROOM, max_entry_bytes: int = 1000) -> MemoryCache:
    return MemoryCache(max_bytes=max_bytes, max_entry_bytes=max_entry_bytes, ttl_s=TTL_S, clock=clock)


def size(kept: Cached) -> int:
    return len(kept.body) + ENTRY_BYTES


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 1200)),
        st.tuples(st.just("get"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 9.5, 10.0])),
    ),
    max_size=80,
)


@given(steps)
@settings(max_examples=examples(300))
def test_it_is_what_a_list_in_order_of_use_would_be(script: list[tuple[Any, ...]]) -> None:
    """LRU among what is young enough, never more bytes than allowed, never an answer that is too old or another's."""
    clock = FakeClock()
    kept = cache(clock)
    model: list[tuple[int, Cached, float]] = []  # key, answer, kept at; the least recently used first

    async def play() -> None:
        evicted = 0
        for mark, (what, *arguments) in enumerate(script):
            if what == "wait":
                clock.advance(arguments[0])
                continue
            key: Any = arguments[0]
            found = next((entry for entry in model if entry[0] == key), None)
            if what == "get":
                young = found is not None and clock() - found[2] < TTL_S
                got = await kept.get(bytes([key]))
                assert (got is found[1]) if found is not None and young else got is None
                if found is not None:
                    model.remove(found)
                    model.extend([found] if young else [])
            else:
                new = answer(arguments[1], mark)
                kept.put(bytes([key]), new)
                model[:] = [entry for entry in model if entry[0] != key and clock() - entry[2] < TTL_S]
                if arguments[1] <= 1000:
                    while sum(size(entry[1]) for entry in model) + size(new) > ROOM:
                        model.pop(0)
                        evicted += 1
                    model.append((key, new, clock()))
            statistics = kept.statistics()
            assert statistics.entries == len(model)
            assert statistics.size_bytes == sum(size(entry[1]) for entry in model) <= ROOM
            assert statistics.evicted == evicted

    run(play())


def test_an_answer_larger_than_everything_pushes_nothing_out() -> None:
    """It is not kept, and what is there stays."""

    async def play() -> None:
        kept = cache(FakeClock(), max_entry_bytes=ROOM)
        kept.put(b"a", answer(10))
        kept.put(b"b", answer(ROOM))
        assert await kept.get(b"b") is None
        assert await kept.get(b"a") is not None

    run(play())


def test_an_answer_that_cannot_be_kept_takes_the_old_one_along() -> None:
    """Else the older one would be given from now on."""

    async def play() -> None:
        kept = cache(FakeClock())
        kept.put(b"a", answer(10))
        kept.put(b"a", answer(1001))
        assert await kept.get(b"a") is None
        assert kept.statistics() == (0, 0, 0, 0)

    run(play())


def test_what_grew_too_old_goes_before_what_was_used_long_ago() -> None:
    """Though it was asked for last."""
    clock = FakeClock()

    async def play() -> None:
        kept = cache(clock)
        kept.put(b"old", answer(100))
        clock.advance(TTL_S / 2)
        for name in b"abcd":
            kept.put(bytes([name]), answer(100))
        assert await kept.get(b"old") is not None
        clock.advance(TTL_S / 2)
        kept.put(b"new", answer(100))
        for name in b"abcd":
            assert await kept.get(bytes([name])) is not None
        assert kept.statistics().evicted == 0

    run(play())


def test_the_estimate_of_an_entry_is_what_it_takes() -> None:
    """So that `max_bytes` bounds real memory."""
    kept = cache(FakeClock(), max_bytes=2**40)
    count, body = 10_000, 500
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(count):
            # As in life: each key, body and content type is an object of its own; the backend's name is shared.
            key = number.to_bytes(32, "big")
            kept.put(key, Cached(b"application/json " + key[-1:], b"%0500d" % number, False, "b"))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    real = (after - before) / count
    said = kept.statistics().size_bytes / count
    assert abs(said - body - ENTRY_BYTES) < 30
    assert 0.85 * said < real <= said, f"{real:.0f} bytes an entry, {said:.0f} by the estimate"


def test_its_state_is_visible() -> None:
    """In the repr, for whoever debugs."""
    kept = cache(FakeClock())
    kept.put(b"a", answer(10))
    assert repr(kept) == f"<MemoryCache 1 answers, {ENTRY_BYTES + 10} of {ROOM} bytes>"
