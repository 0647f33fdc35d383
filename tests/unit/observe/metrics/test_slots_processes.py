"""Several real processes write, one of them is killed, one reads all the while, and a plain dict knows what is right."""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_router.observe.metrics.slots import Reader, Segment
from support import slot_processes as sp
from support.fuzz import examples
from support.wait import until

N = 400


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.too_slow])
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3), kill_after=st.integers(0, N - 1))
def test_totals_are_those_of_a_plain_dict_with_a_writer_killed_and_replaced(
    seeds: tuple[int, int, int], kill_after: int
) -> None:
    """Nothing is lost but the operation in hand, nothing counted twice, and no total ever goes down."""
    steady, doomed = Segment.create("steady"), Segment.create("doomed")
    reading = sp.start("read", [steady, doomed])
    assert reading.stdout is not None
    assert reading.stdout.readline() == b"reading\n"
    first = sp.start("write", [steady], seed=seeds[0], n=N)
    second = sp.start("write", [doomed], seed=seeds[1], n=N)

    acknowledged = 0
    assert second.stdout is not None
    while acknowledged < kill_after:
        acknowledged += len(os.read(second.stdout.fileno(), kill_after - acknowledged))
    second.kill()
    acknowledged += len(second.communicate()[0])
    doomed.mark_left()
    reader = Reader([steady, doomed], sp.FAMILIES)

    third = sp.start("write", [doomed], seed=seeds[2], n=N)
    assert len(first.communicate()[0]) == N
    assert len(third.communicate()[0]) == N
    report = json.loads(reading.communicate()[0])
    assert report["faults"] == []
    assert report["rounds"] > 0

    certain = sp.added(*(sp.totals_of(sp.operations(seed, N)) for seed in (seeds[0], seeds[2])))
    done = [sp.added(certain, sp.totals_of(sp.operations(seeds[1], n))) for n in (acknowledged, acknowledged + 1)]
    read = sp.totals_read(reader.collect())
    # Killed between its two additions, an observation is in its bucket and not yet in the sum.
    for key in read.keys() | done[1].keys():
        assert read.get(key, 0.0) in (done[0].get(key, 0.0), done[1].get(key, 0.0)), key
    for segment in (steady, doomed):
        segment.close()


def test_a_successor_in_another_process_goes_on_where_the_killed_one_stopped() -> None:
    """While nobody writes, readers see the counters and not the gauges; then totals go on."""
    segment = Segment.create("worker-0")
    reader = Reader([segment], sp.FAMILIES)
    doomed = sp.start("write", [segment], seed=1, n=10**6)
    until(lambda: reader.collect().total(sp.REQUESTS) > 20)
    assert reader.collect().value(sp.OPEN, "w") == 1.0
    doomed.kill()
    doomed.communicate()
    segment.mark_left()
    left = reader.collect()
    assert left.rows(sp.OPEN) == []
    assert left.total(sp.REQUESTS) > 20

    sp.start("write", [segment], seed=2, n=100).communicate()
    after = reader.collect()
    grown = sum(value for key, value in sp.totals_of(sp.operations(2, 100)).items() if key[0] == sp.REQUESTS.name)
    assert after.total(sp.REQUESTS) == left.total(sp.REQUESTS) + grown
    assert after.value(sp.OPEN, "w") == 1.0
    segment.close()
