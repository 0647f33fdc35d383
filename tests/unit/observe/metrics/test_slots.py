"""Slots, one rule at a time; processes and kills are in test_slots_processes.py."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter as Tally

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llm_router.observe.metrics.slots import (
    EXEMPLAR_TEXT_BYTES,
    Exemplar,
    Reader,
    Segment,
    Writer,
    width_of,
)
from llm_router.signals import OTHER, Family, Reading
from support.fuzz import examples

REQUESTS = Family("requests_total", "counter", ("model",), "Requests.", cap=3)
SECONDS = Family("seconds", "histogram", ("model",), "Seconds.", (0.5, 1.0, 2.0), "seconds", cap=3)
OPEN = Family("open", "gauge", ("worker",), "Open.", cap=3)
PLAIN = Family("plain_total", "counter", (), "Without labels.")
DROPPED = Family("dropped_total", "counter", ("family",), "Refused label sets.")
FAMILIES = (REQUESTS, SECONDS, OPEN, PLAIN, DROPPED)


def pair(*, rows: int = 64, slots: int = 256, exemplars: int = 16) -> tuple[Segment, Writer, Reader]:
    segment = Segment.private(rows=rows, slots=slots, exemplars=exemplars)
    return segment, Writer(segment, FAMILIES, dropped=DROPPED), Reader([segment], FAMILIES)


# -- children


def test_the_same_labels_give_the_same_child() -> None:
    _, writer, _ = pair()
    assert writer.counter(REQUESTS, "a") is writer.counter(REQUESTS, "a")
    assert writer.gauge(OPEN, "a") is writer.gauge(OPEN, "a")
    assert writer.histogram(SECONDS, "a") is writer.histogram(SECONDS, "a")


@pytest.mark.parametrize(
    ("value", "bucket"), ((0.0, 0), (0.5, 0), (0.500001, 1), (1.0, 1), (2.0, 2), (2.1, 3), (1e9, 3))
)
def test_a_bound_belongs_to_its_bucket(value: float, bucket: int) -> None:
    _, writer, reader = pair()
    child = writer.histogram(SECONDS, "a")
    child.observe(value)
    row = reader.collect().row(SECONDS, "a")
    assert row is not None
    assert list(row.values[:-1]) == [float(number == bucket) for number in range(4)]
    assert (child.count, child.sum, row.values[-1]) == (1.0, value, value)


def test_a_fast_caller_can_write_slots_itself() -> None:
    """What `inc` and `observe` do may be done with local variables."""
    _, writer, reader = pair()
    values, counter, histogram = writer.values, writer.counter(REQUESTS, "a"), writer.histogram(SECONDS, "a")
    values[counter.index] += 2.0
    values[histogram.base + bisect_left(histogram.bounds, 0.75)] += 1.0
    values[histogram.sum_index] += 0.75
    collected = reader.collect()
    assert collected.value(REQUESTS, "a") == counter.value == 2.0
    assert collected.value(SECONDS, "a") == histogram.count == 1.0


def test_a_removed_gauge_is_gone_and_its_child_writes_nowhere() -> None:
    segment, writer, reader = pair()
    old = writer.gauge(OPEN, "a")
    old.set(5.0)
    old.remove()
    old.remove()
    new = writer.gauge(OPEN, "b")
    old.set(7.0)
    collected = reader.collect()
    assert [row.labels for row in collected.rows(OPEN)] == [("b",)]
    assert new.value == 0.0
    assert writer.gauge(OPEN, "a") is not old
    assert len(segment.table()) == 2 * 32  # the row of the removed one was used again


def test_misuse_is_refused_with_the_family_named() -> None:
    _, writer, _ = pair()
    with pytest.raises(ValueError, match="requests_total is a counter with the labels"):
        writer.gauge(REQUESTS, "a")
    with pytest.raises(ValueError, match="requests_total is a counter with the labels"):
        writer.counter(REQUESTS)
    with pytest.raises(ValueError, match="new_total was not declared"):
        writer.counter(REQUESTS._replace(name="new_total"), "a")
    with pytest.raises(ValueError, match="declared already, with another"):
        writer.declare(REQUESTS._replace(labels=("x",)))
    with pytest.raises(ValueError, match="must ascend"):
        writer.declare(SECONDS._replace(name="s", buckets=(2.0, 1.0)))
    with pytest.raises(ValueError, match="must be a counter with one label"):
        Writer(Segment.private(), (), dropped=PLAIN)


# -- caps and full segments


def test_beyond_the_cap_everything_counts_as_other_and_the_refusals_are_counted() -> None:
    _, writer, reader = pair()
    for number in range(10):
        writer.counter(REQUESTS, f"m{number}").inc()
        writer.histogram(SECONDS, f"m{number}").observe(1.0)
        writer.gauge(OPEN, f"m{number}").inc()
    collected = reader.collect()
    for family in (REQUESTS, SECONDS, OPEN):
        assert [row.labels[0] for row in collected.rows(family)] == [OTHER, "m0", "m1", "m2"]
        assert collected.total(family) == 10.0
        assert collected.value(family, OTHER) == 7.0
        assert collected.value(DROPPED, family.name) == 7.0


def test_a_full_segment_counts_on_under_other() -> None:
    """Every family has a row that nothing can take away, whatever came first."""
    needed = 2 * len(FAMILIES) + 1
    _, writer, reader = pair(rows=needed, slots=40)
    families = [family._replace(cap=1000) for family in FAMILIES]
    for number in range(50):
        writer.counter(REQUESTS, f"m{number}").inc()
    for number in range(50):
        writer.gauge(OPEN, f"m{number}").inc()
        writer.histogram(SECONDS, f"m{number}").observe(1.0)
    writer.counter(PLAIN).inc(50)
    collected = reader.collect()
    assert [collected.total(family) for family in families[:4]] == [50.0] * 4
    assert collected.total(DROPPED, family="seconds") == 50.0
    assert writer.statistics().rows <= needed


def test_a_label_set_too_long_for_its_row_counts_as_other() -> None:
    _, writer, reader = pair()
    writer.counter(REQUESTS, "x" * 1000).inc()
    writer.counter(REQUESTS, "ü" * 200).inc()
    assert [row.labels[0] for row in reader.collect().rows(REQUESTS)] == [OTHER, "ü" * 200]


def test_a_segment_without_room_for_one_row_per_family_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        Writer(Segment.private(rows=3), FAMILIES)
    with pytest.raises(ValueError, match="too small"):
        Writer(Segment.private(slots=5), FAMILIES)


def test_label_values_survive_whatever_they_contain() -> None:
    _, writer, reader = pair()
    values = ('q"\\\n', "\0\0", "日本語")
    for value in values:
        writer.counter(REQUESTS, value).inc()
    writer.gauge(OPEN, "\ud800").inc()
    collected = reader.collect()
    assert {row.labels[0] for row in collected.rows(REQUESTS)} == set(values)
    assert [row.labels for row in collected.rows(OPEN)] == [("?",)]


# -- adoption and torn rows


def test_a_successor_goes_on_with_counters_and_forgets_gauges() -> None:
    segment, writer, reader = pair()
    writer.counter(REQUESTS, "a").inc(3)
    writer.histogram(SECONDS, "a").observe(1.5)
    writer.gauge(OPEN, "w").set(4)
    segment.mark_left()
    left = reader.collect()
    assert (left.value(REQUESTS, "a"), left.value(SECONDS, "a"), left.rows(OPEN)) == (3.0, 1.0, [])

    successor = Writer(segment, FAMILIES, dropped=DROPPED)
    assert successor.inherited(OPEN) == {("w",): 4.0}
    assert reader.collect().rows(OPEN) == []
    successor.counter(REQUESTS, "a").inc()
    successor.histogram(SECONDS, "a").observe(1.5)
    successor.gauge(OPEN, "w").inc()
    collected = reader.collect()
    assert collected.value(REQUESTS, "a") == 4.0
    assert collected.row(SECONDS, "a") == (("a",), [0.0, 0.0, 2.0, 0.0, 3.0], ())
    assert collected.value(OPEN, "w") == 1.0


def test_the_cap_counts_rows_of_the_predecessor() -> None:
    segment, writer, reader = pair()
    for number in range(3):
        writer.counter(REQUESTS, f"m{number}").inc()
    successor = Writer(segment, FAMILIES, dropped=DROPPED)
    successor.counter(REQUESTS, "m3").inc()
    successor.counter(REQUESTS, "m2").inc()
    assert reader.collect().value(REQUESTS, OTHER) == 1.0
    assert reader.collect().value(REQUESTS, "m2") == 2.0


def test_a_torn_row_is_passed_over_and_taken_again() -> None:
    """A wrong checksum hides a row from readers; the next writer uses the place."""
    segment, writer, reader = pair()
    writer.counter(REQUESTS, "a").inc()
    writer.counter(REQUESTS, "b").inc()
    segment.raw[segment.texts_at + 2] ^= 0xFF  # in the text of the first row
    assert [row.labels for row in Reader([segment], FAMILIES).collect().rows(REQUESTS)] == [("b",)]
    successor = Writer(segment, FAMILIES, dropped=DROPPED)
    successor.counter(REQUESTS, "c").inc()
    assert len(segment.table()) == 2 * 32
    assert [row.labels for row in reader.collect().rows(REQUESTS)] == [("b",), ("c",)]


def test_a_counter_killed_in_the_last_step_of_its_making_is_shown_by_the_successor() -> None:
    """It took the row of a removed gauge: counted already, valid, and not yet live."""
    segment, writer, reader = pair()
    writer.gauge(OPEN, "w").remove()
    writer.counter(REQUESTS, "a")
    writer._set_live(0, False)
    assert reader.collect().rows(REQUESTS) == []
    Writer(segment, FAMILIES, dropped=DROPPED).counter(REQUESTS, "a").inc()
    assert reader.collect().value(REQUESTS, "a") == 1.0


def test_a_row_that_is_torn_for_a_moment_is_seen_when_it_is_whole() -> None:
    segment, writer, reader = pair()
    writer.counter(REQUESTS, "a").inc()
    segment.raw[segment.texts_at + 2] ^= 0xFF
    assert reader.collect().rows(REQUESTS) == []
    segment.raw[segment.texts_at + 2] ^= 0xFF
    assert reader.collect().value(REQUESTS, "a") == 1.0


def test_rows_of_families_that_the_reader_was_not_given_are_passed_over() -> None:
    segment, writer, _ = pair()
    writer.counter(REQUESTS, "a").inc()
    writer.counter(PLAIN).inc()
    reader = Reader([segment], (PLAIN, SECONDS._replace(buckets=(1.0,))))
    assert [(rows.family.name, rows.series) for rows in reader.collect().families] == [
        ("plain_total", 1),
        ("seconds", 0),
    ]


# -- segments


def test_a_segment_is_attached_by_its_descriptor() -> None:
    segment = Segment.create("worker-0", rows=64, slots=256)
    assert (segment.name, segment.rows, segment.slots, segment.alive) == ("worker-0", 64, 256, False)
    writer = Writer(Segment.attach(segment.fd, writable=True), FAMILIES)
    writer.counter(PLAIN).inc()
    reading = Segment.attach(segment.fd, writable=False)
    assert segment.alive
    assert Reader([reading], FAMILIES).collect().value(PLAIN) == 1.0
    assert repr(reading) == "<Segment worker-0: 1 of 64 rows, 256 slots, alive>"
    with pytest.raises(ValueError, match="for reading only"):
        Writer(reading, FAMILIES)
    assert not os.get_inheritable(segment.fd)


def test_what_is_no_segment_is_not_attached() -> None:
    segment = Segment.create("x")
    with pytest.raises(ValueError, match="at most"):
        Segment.create("x" * 64)
    with pytest.raises(OSError):
        os.ftruncate(segment.fd, 4096)  # sealed: readers cannot be killed by it
    fd = os.memfd_create("empty")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        Segment.attach(fd, writable=False)
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not hold a metric segment"):
        Segment.attach(fd, writable=False)
    os.pwrite(fd, os.pread(segment.fd, 128, 0), 0)
    with pytest.raises(ValueError, match="cut off after 4096 bytes"):
        Segment.attach(fd, writable=False)
    os.close(fd)


def test_children_of_a_closed_segment_raise() -> None:
    segment = Segment.create("x")
    child = Writer(segment, FAMILIES).counter(PLAIN)
    segment.close()
    with pytest.raises(ValueError):
        child.inc()


# -- reading


def test_equal_label_sets_are_summed_over_segments_and_readings_added() -> None:
    pairs = [pair() for _ in range(3)]
    for _, writer, _ in pairs:
        writer.counter(REQUESTS, "a").inc()
        writer.histogram(SECONDS, "a").observe(0.5)
        writer.gauge(OPEN, "a").set(2)
    reader = Reader([segment for segment, _, _ in pairs], FAMILIES)
    up = Family("up", "gauge", (), "Up.")
    collected = reader.collect([Reading(OPEN, ("a",), 1.0), Reading(OPEN, ("0",), 9.0), Reading(up, (), 1.0)])
    assert collected.value(REQUESTS, "a") == 3.0
    assert collected.row(SECONDS, "a") == (("a",), [3.0, 0.0, 0.0, 0.0, 1.5], ())
    assert [(row.labels, row.values[0]) for row in collected.rows(OPEN)] == [(("0",), 9.0), (("a",), 7.0)]
    assert collected.value(up) == 1.0
    assert collected.series == 1 + 6 + 2 + 1
    assert collected.total(OPEN, worker="a") == 7.0
    assert (collected.value(REQUESTS, "b"), collected.rows(Family("x", "gauge", (), ""))) == (None, [])


def test_exemplars_are_the_newest_of_their_bucket() -> None:
    (one, first, _), (two, second, _) = pair(), pair()
    first.histogram(SECONDS, "a").observe_with_exemplar(0.7, 'trace_id="1"', 10.0)
    second.histogram(SECONDS, "a").observe_with_exemplar(0.8, 'trace_id="2"', 20.0)
    second.histogram(SECONDS, "a").observe_with_exemplar(9.0, 'trace_id="3"', 30.0)
    second.histogram(SECONDS, "a").observe_with_exemplar(9.5, "x" * (EXEMPLAR_TEXT_BYTES + 1), 40.0)
    row = Reader([one, two], FAMILIES).collect().row(SECONDS, "a")
    assert row is not None
    assert row.exemplars == (None, Exemplar('trace_id="2"', 0.8, 20.0), None, Exemplar('trace_id="3"', 9.0, 30.0))
    assert sum(row.values[:-1]) == 4.0


def test_exemplars_have_a_bound() -> None:
    _, writer, reader = pair(exemplars=2)
    child = writer.histogram(SECONDS, "a")
    for value in (0.1, 0.6, 1.1, 2.1):
        child.observe_with_exemplar(value, 'trace_id="1"', 1.0)
    row = reader.collect().row(SECONDS, "a")
    assert row is not None
    assert [exemplar is not None for exemplar in row.exemplars] == [True, True, False, False]


def test_a_torn_exemplar_is_not_shown_and_taken_again_by_the_successor() -> None:
    segment, writer, reader = pair()
    writer.histogram(SECONDS, "a").observe_with_exemplar(0.7, 'trace_id="1"', 10.0)
    word = segment.exemplars_at // 8
    segment.words[word] += 1  # as a writer leaves it that is killed while it writes
    row = reader.collect().row(SECONDS, "a")
    assert row is not None
    assert row.exemplars == ()
    successor = Writer(segment, FAMILIES)
    successor.histogram(SECONDS, "a").observe_with_exemplar(0.7, 'trace_id="2"', 11.0)
    assert successor.statistics().exemplars == 1
    row = reader.collect().row(SECONDS, "a")
    assert row is not None
    assert row.exemplars[1] == Exemplar('trace_id="2"', 0.7, 11.0)


def test_exemplars_read_while_they_are_rewritten_are_whole() -> None:
    """A reader never mixes the parts of two of them."""
    segment, writer, _ = pair()
    child, stop = writer.histogram(SECONDS, "a"), threading.Event()

    def rewrite() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            child.observe_with_exemplar(
                0.6 + number % 7 / 100, f'trace_id="{number % 7}" ' * (1 + number % 7), number % 7
            )

    thread = threading.Thread(target=rewrite)
    thread.start()
    reader, seen = Reader([segment], FAMILIES), 0
    while seen < 2000:
        row = reader.collect().row(SECONDS, "a")
        exemplar = row.exemplars[1] if row is not None and row.exemplars else None
        if exemplar is not None:
            seen += 1
            kind = int(exemplar.time)
            assert exemplar == Exemplar(f'trace_id="{kind}" ' * (1 + kind), 0.6 + kind / 100, kind)
    stop.set()
    thread.join()


# -- against a dict

names = st.sampled_from(("a", "b", "c", "d", "e", "f"))
eighths = st.integers(0, 24).map(lambda n: n / 8)


class SlotsAgainstDict(RuleBasedStateMachine):
    """Any order of writing, removing, dying and succeeding: readers see what a dict would hold."""

    @initialize()
    def begin(self) -> None:
        self.segment, self.writer, self.reader = pair(rows=24, slots=64)
        self.counted: Tally[str] = Tally()
        self.observed: dict[str, list[float]] = {}
        self.levels: dict[str, float] = {}
        self.admitted: dict[str, set[str]] = {"c": set(), "h": set(), "g": set()}

    def admit(self, kind: str, name: str, cap: int = 3) -> str:
        admitted = self.admitted[kind]
        if name in admitted or len(admitted) < cap:
            admitted.add(name)
            return name
        return OTHER

    @rule(name=names, n=eighths)
    def count(self, name: str, n: float) -> None:
        self.writer.counter(REQUESTS, name).inc(n)
        self.counted[self.admit("c", name)] += n  # type: ignore[assignment]

    @rule(name=names, value=eighths)
    def observe(self, name: str, value: float) -> None:
        self.writer.histogram(SECONDS, name).observe(value)
        self.observed.setdefault(self.admit("h", name), []).append(value)

    @rule(name=names, value=eighths)
    def set(self, name: str, value: float) -> None:
        self.writer.gauge(OPEN, name).set(value)
        self.levels[self.admit("g", name)] = value

    @rule(name=names)
    def remove(self, name: str) -> None:
        child = self.writer.gauge(OPEN, name)
        admitted = self.admit("g", name)
        child.remove()
        self.levels.pop(admitted, None)
        self.admitted["g"].discard(name)

    @rule()
    def die_and_succeed(self) -> None:
        self.segment.mark_left()
        assert self.reader.collect().rows(OPEN) == []
        self.writer = Writer(self.segment, FAMILIES, dropped=DROPPED)
        self.levels.clear()
        self.admitted["g"].clear()

    @invariant()
    def readers_see_the_dict(self) -> None:
        for reader in (self.reader, Reader([self.segment], FAMILIES)):
            collected = reader.collect()
            assert {row.labels[0]: row.values[0] for row in collected.rows(REQUESTS)} == self.counted
            assert {row.labels[0]: row.values[0] for row in collected.rows(OPEN)} == self.levels
            seen = {row.labels[0]: (sum(row.values[:-1]), row.values[-1]) for row in collected.rows(SECONDS)}
            assert seen == {name: (len(values), sum(values)) for name, values in self.observed.items()}
        statistics = self.writer.statistics()
        assert statistics.slots <= statistics.slots_limit
        assert width_of(SECONDS) == 5


SlotsAgainstDict.TestCase.settings = settings(max_examples=examples(40), stateful_step_count=40)
TestSlotsAgainstDict = SlotsAgainstDict.TestCase


def test_a_reset_sets_what_was_counted_to_zero_and_children_go_on() -> None:
    """Levels only if that is wanted; examples of observations leave."""
    _, writer, reader = pair()
    counter, histogram, gauge = writer.counter(REQUESTS, "a"), writer.histogram(SECONDS, "a"), writer.gauge(OPEN, "w")
    counter.inc(3)
    histogram.observe_with_exemplar(0.7, 'trace_id="1"', 1.0)
    gauge.set(5)
    writer.reset(levels=False)
    collected = reader.collect()
    assert (collected.value(REQUESTS, "a"), collected.value(SECONDS, "a"), collected.value(OPEN, "w")) == (0, 0, 5)
    row = collected.row(SECONDS, "a")
    assert row is not None
    assert not any(row.exemplars)
    writer.reset(levels=True)
    counter.inc()
    histogram.observe_with_exemplar(0.7, 'trace_id="2"', 1.0)
    collected = reader.collect()
    assert (collected.value(REQUESTS, "a"), collected.value(OPEN, "w")) == (1, 0)
    row = collected.row(SECONDS, "a")
    assert row is not None
    assert [exemplar.labels for exemplar in row.exemplars if exemplar is not None] == ['trace_id="2"']
