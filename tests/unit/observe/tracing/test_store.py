"""The kept traces: what stays, what has to go, and how they are found again."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.tracing.store import SHOWS, SLOWEST_S, Ambiguous, TraceStore
from llm_router.observe.tracing.trace import Trace
from llm_router.testing import FakeClock
from support.traces import span, trace

ALL = 10_000


def store_of(*traces: Trace, max_traces: int = 100, wall: FakeClock | None = None) -> TraceStore:
    store = TraceStore(max_traces, wall=wall or FakeClock(1000.0))
    for one in traces:
        store.add(one)
    return store


def ids(traces: list[Trace]) -> list[str]:
    return [one.request_id for one in traces]


def test_what_is_kept_comes_back_as_it_was() -> None:
    """Every field and span of it."""
    kept = trace(
        steps=(span("queue", 1, 5, error="full", attributes={"depth": 3, "ratio": 0.5, "late": True, "why": "busy"}),)
    )
    store = store_of(kept)
    assert store.select("recent", limit=1) == [kept]
    assert store.find(kept.trace_id, limit=1) == [kept]


def test_recent_ones_are_shown_newest_first() -> None:
    """By their ends, in whatever order workers told them."""
    store = store_of(*(trace(end_s=1000.0 - age, request_id=f"r{age}") for age in (3, 1, 2)))
    assert ids(store.select("recent", limit=ALL)) == ["r1", "r2", "r3"]
    assert ids(store.select("recent", limit=2)) == ["r1", "r2"]


def test_the_slowest_are_those_of_the_last_hour() -> None:
    """An hour after its end even the slowest one is forgotten."""
    wall = FakeClock(10_000.0)
    store = store_of(
        trace(end_s=10_000.0 - SLOWEST_S - 1, seconds=90, request_id="too old"),
        trace(end_s=10_000.0 - 1800, seconds=20, request_id="slow"),
        trace(end_s=10_000.0, seconds=30, request_id="slower"),
        trace(end_s=10_000.0, seconds=1, request_id="quick"),
        wall=wall,
    )
    assert ids(store.select("slowest", limit=ALL)) == ["slower", "slow", "quick"]
    wall.advance(1801)
    assert ids(store.select("slowest", limit=ALL)) == ["slower", "quick"]
    wall.advance(1800)
    assert store.select("slowest", limit=ALL) == []


def test_slow_ones_of_the_past_make_room() -> None:
    """What is no longer shown among the slowest takes no place from what is."""
    wall = FakeClock(10_000.0)
    store = store_of(*(trace(end_s=10_000.0, seconds=50 + n) for n in range(10)), max_traces=40, wall=wall)
    wall.advance(SLOWEST_S + 1)
    for n in range(10):
        store.add(trace(end_s=wall.now, seconds=1 + n))
    assert [one.duration_s for one in store.select("slowest", limit=ALL)] == [float(n) for n in range(10, 0, -1)]


def test_failed_ones_are_those_that_the_router_failed() -> None:
    """A client that went away did not see a failure."""
    store = store_of(
        trace(request_id="fine"),
        trace(request_id="broken", error_type="unreachable", status=502),
        trace(request_id="gone", error_type="client_gone", outcome="cancelled"),
    )
    assert ids(store.select("failed", limit=ALL)) == ["broken"]


def test_a_flood_of_new_ones_leaves_the_failed_and_the_slowest() -> None:
    """They have places of their own."""
    store = store_of(
        trace(request_id="broken", error_type="unreachable"),
        trace(request_id="slow", seconds=60),
        *(trace(seconds=0.01) for _ in range(1000)),
        max_traces=40,
    )
    assert ids(store.select("failed", limit=ALL)) == ["broken"]
    assert ids(store.select("slowest", limit=1)) == ["slow"]
    assert len(store.select("recent", limit=ALL)) == 20
    assert store.statistics().traces <= 40
    assert store.statistics().evicted == 1002 - store.statistics().traces


def test_a_busy_model_does_not_push_out_a_quiet_one() -> None:
    """Whoever has most on a shelf gives way; equal shares in the end."""
    quiet = [trace(model="quiet", end_s=900.0 + n) for n in range(5)]
    busy = [trace(model="busy", end_s=950.0 + n / 100) for n in range(1000)]
    store = store_of(*quiet, *busy, max_traces=40)
    assert len(store.select("recent", model="quiet", limit=ALL)) == 5
    assert store.select("recent", model="busy", limit=ALL) == busy[:-16:-1]
    for n in range(100):
        store.add(trace(model="quiet", end_s=990.0 + n / 100))
    assert [len(store.select("recent", model=model, limit=ALL)) for model in ("quiet", "busy")] == [10, 10]


def test_more_kinds_than_places_keep_the_newest_ones() -> None:
    """The bound holds whatever callers do."""
    store = store_of(*(trace(model=f"m{n}", end_s=900.0 + n / 10) for n in range(500)), max_traces=20)
    assert [one.model for one in store.select("recent", limit=ALL)] == [f"m{n}" for n in range(499, 489, -1)]
    assert len(store.groups()) <= 20


def test_selecting_by_route_and_model() -> None:
    """Each alone, or both."""
    store = store_of(
        trace(route="/a", model="x", request_id="ax", error_type="internal"),
        trace(route="/a", model="y", request_id="ay"),
        trace(route="/b", model="x", request_id="bx"),
    )
    assert sorted(ids(store.select("recent", route="/a", limit=ALL))) == ["ax", "ay"]
    assert sorted(ids(store.select("slowest", model="x", limit=ALL))) == ["ax", "bx"]
    assert ids(store.select("recent", route="/b", model="x", limit=ALL)) == ["bx"]
    assert store.select("failed", route="/b", limit=ALL) == []
    assert store.select("recent", route="/c", limit=ALL) == []


def test_groups_sum_up_what_is_kept() -> None:
    """By route and model, a trace once however many shelves it is on."""
    store = store_of(
        trace(model="x", seconds=2.0, error_type="internal", end_s=998.0),
        trace(model="x", end_s=999.0),
        trace(model="y"),
    )
    x, y = store.groups()
    assert (x.group, x.traces, x.failed) == (("/v1/chat/completions", "x"), 2, 1)
    assert (x.newest_ns, x.slowest_ns) == (999_000_000_000, 2_000_000_000)
    assert (y.group.model, y.traces, y.failed) == ("y", 1, 0)


# -- finding --------------------------------------------------------------------------------------------


def test_a_request_is_found_by_its_ids_and_their_beginnings() -> None:
    """Upper case is the same in a trace id, and not in a request id."""
    one = trace(trace_id="4bf92f3577b34da6a3ce929d0e0e4736", request_id="Order-17")
    store = store_of(one, trace(trace_id="a" * 32, request_id="b" * 32))
    for id in (one.trace_id, one.trace_id.upper(), "4bf9", "4BF92f", "Order-17", "Orde"):
        assert store.find(id, limit=9) == [one], id
    for id in ("4bf", "Ord", "order-17", "f92f", ""):
        assert store.find(id, limit=9) == [], id


def test_all_requests_of_a_trace_are_found_newest_first() -> None:
    """An agent sends several with the same trace id; the beginning of it means the same."""
    store = store_of(*(trace(trace_id="c" * 32, request_id=f"r{n}", end_s=900.0 + n) for n in range(5)))
    assert ids(store.find("c" * 32, limit=3)) == ["r4", "r3", "r2"]
    assert ids(store.find("cccc", limit=9)) == ["r4", "r3", "r2", "r1", "r0"]


def test_the_beginning_of_several_ids_is_no_id() -> None:
    """It says which ones begin so; a whole id is never ambiguous."""
    store = store_of(
        trace(trace_id="abcd" + "0" * 28, request_id="r-1", end_s=998.0),
        trace(trace_id="abcd" + "1" * 28, request_id="r-1", end_s=999.0),
        trace(trace_id="d" * 32, request_id="abcdef", end_s=997.0),
    )
    with pytest.raises(Ambiguous) as caught:
        store.find("abcd", limit=9)
    assert caught.value.ids == ["abcd" + "1" * 28, "abcd" + "0" * 28, "abcdef"]
    assert [one.trace_id[4] for one in store.find("r-1", limit=9)] == ["1", "0"]
    assert ids(store.find("abcdef", limit=9)) == ["abcdef"]


# -- bounds ---------------------------------------------------------------------------------------------


def test_large_traces_are_cut() -> None:
    """Prompts are shortened; what still is too large loses its attributes and its last spans."""
    store = store_of(
        trace(steps=(span("x", error="e" * 5000, attributes={"prompt": "p" * 100_000, "model": "small"}),))
    )
    (found,) = store.select("recent", limit=1)
    attributes = found.spans[1].attributes
    assert attributes["prompt"] == "p" * 2048 + "… (97952 more characters)"
    assert attributes["model"] == "small"
    assert found.spans[1].error.endswith("… (2952 more characters)")
    steps = tuple(
        span(f"step {n}", error="e" * 1000, attributes={f"a{m}": "v" * 500 for m in range(20)}) for n in range(500)
    )
    store.add(trace(request_id="monster", steps=steps))
    (found,) = store.find("monster", limit=1)
    assert (len(found.spans), found.spans[1].attributes) == (200, {})
    assert store.statistics().bytes < 128 * 1024


def test_bytes_are_bounded_too() -> None:
    """A large trace takes the room of several small ones, of its own group first."""
    store = TraceStore(1000, max_bytes=200_000, wall=FakeClock(1000.0))
    small = [trace(model="small") for _ in range(20)]
    for one in small:
        store.add(one)
    for _ in range(50):
        store.add(trace(model="large", steps=(span("x", attributes={"prompt": "p" * 20_000}),)))
    statistics = store.statistics()
    assert statistics.bytes <= statistics.bytes_limit == 200_000
    assert len(store.select("recent", model="small", limit=ALL)) == 20
    assert len(store.select("recent", model="large", limit=ALL)) >= 3


@pytest.mark.parametrize("max_traces", [0, 1, 2, 3, 4, 5])
def test_a_small_store_is_a_store(max_traces: int) -> None:
    """The newest come first when there is next to no room."""
    store = store_of(*(trace(end_s=900.0 + n, error_type="internal") for n in range(10)), max_traces=max_traces)
    assert store.statistics().traces <= max_traces
    assert len(store.select("recent", limit=ALL)) == max_traces - 2 * (max_traces // 4)
    assert [one.end_ns for one in store.select("recent", limit=1)] == [909_000_000_000][:max_traces]


def test_another_size_keeps_what_still_fits() -> None:
    """A reload may make it smaller and larger."""
    store = store_of(*(trace(end_s=900.0 + n, request_id=f"r{n}") for n in range(100)), max_traces=100)
    store.resize(8)
    assert ids(store.select("recent", limit=ALL)) == ["r99", "r98", "r97", "r96"]
    store.resize(100)
    store.add(trace(request_id="new"))
    assert ids(store.select("recent", limit=2)) == ["new", "r99"]
    assert store.statistics().traces_limit == 100
    assert "of 100 traces" in repr(store)


Made = tuple[int, int, float, float, bool]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.0, 8000.0), st.floats(0.001, 100.0), st.booleans()),
        max_size=60,
    ),
    st.integers(0, 24),
)
def test_the_books_are_right_after_anything(made: list[Made], max_traces: int) -> None:
    """Never more than allowed, fairly shared, counted right, and best first."""
    wall = FakeClock(8000.0)
    store = TraceStore(max_traces, wall=wall)
    for route, model, end_s, seconds, failed in made:
        store.add(
            trace(
                route=f"/{route}", model=f"m{model}", end_s=end_s, seconds=seconds,
                error_type="internal" if failed else "",
            )
        )  # fmt: skip
        wall.advance(30.0)
    shown = {show: store.select(show, limit=ALL) for show in SHOWS}
    different = {one.request_id: one for traces in shown.values() for one in traces}
    statistics = store.statistics()
    assert len(different) <= statistics.traces <= max_traces
    assert statistics.traces + statistics.evicted <= len(made)
    for traces in shown.values():
        assert len(set(ids(traces))) == len(traces)
    for show in ("recent", "failed"):
        ends = [one.end_ns for one in shown[show]]
        assert ends == sorted(ends, reverse=True)
    assert all(one.error_type for one in shown["failed"])
    durations = [one.end_ns - one.start_ns for one in shown["slowest"]]
    assert durations == sorted(durations, reverse=True)
    assert all(one.end_ns >= (wall.now - SLOWEST_S) * 1e9 - 1 for one in shown["slowest"])
    assert sum(group.traces for group in store.groups()) == statistics.traces
    assert statistics.bytes == sum(len(kept.body) for kept in store._kept.values())
    offered = Counter((f"/{route}", f"m{model}") for route, model, *_ in made)
    recent = Counter((one.route, one.model) for one in shown["recent"])
    assert sum(recent.values()) == min(len(made), max_traces - 2 * (max_traces // 4))
    for group, number in offered.items():
        assert recent[group] == number or recent[group] >= max(recent.values(), default=0) - 1
