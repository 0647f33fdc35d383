"""Profiles written down: the sums stay true, the size is bounded, and names cannot break a line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.profiling.formats import CONTENT_TYPES, FILE_ENDINGS, render
from llm_router.observe.profiling.profile import FORMATS, Format, Frame, Profile, Stack

CPU = Profile(
    kind="cpu",
    process="worker-0",
    unit="seconds",
    began_time=1_790_000_000.0,
    seconds=10.0004,
    frames=(Frame("thread MainThread"), Frame("a:run", "/a.py", 3), Frame("b;x y\n", "/b.py", 5), Frame("thread logs")),
    stacks=(Stack((0, 1, 2), 1.5, 150), Stack((3, 1), 0.25, 25), Stack((0, 1), 0.125, 12)),
    notes={"process_cpu_seconds": 1.9},
)
MEMORY = Profile(
    kind="memory",
    process="control",
    unit="bytes",
    began_time=0.0,
    seconds=1.0,
    frames=(Frame("a.py:1", "/x/a.py", 1), Frame("b.py:2", "/x/b.py", 2)),
    stacks=(Stack((0, 1), 2048, 3), Stack((0,), 512, 1)),
)


def test_folded_stacks_are_microseconds() -> None:
    """One line each; what separates frames and lines is taken out of names."""
    assert render(CPU, "folded").decode() == (
        "thread MainThread;a:run;b:x y 1500000\nthread logs;a:run 250000\nthread MainThread;a:run 125000\n"
    )
    assert render(MEMORY, "folded") == b"a.py:1;b.py:2 2048\na.py:1 512\n"


def test_speedscope_has_a_profile_for_each_thread() -> None:
    """As its file format says: sampled profiles over shared frames, the busiest first."""
    document = json.loads(render(CPU, "speedscope"))
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    assert document["shared"]["frames"][1] == {"name": "a:run", "file": "/a.py", "line": 3}
    first, second = document["profiles"]
    assert first == {
        "type": "sampled",
        "name": "worker-0 cpu: thread MainThread",
        "unit": "seconds",
        "startValue": 0,
        "endValue": 1.625,
        "samples": [[0, 1, 2], [0, 1]],
        "weights": [1.5, 0.125],
    }
    assert (second["name"], second["endValue"]) == ("worker-0 cpu: thread logs", 0.25)
    (memory,) = json.loads(render(MEMORY, "speedscope"))["profiles"]
    assert (memory["unit"], memory["weights"]) == ("bytes", [2048, 512])


def test_json_has_everything() -> None:
    """For whoever wants to reckon."""
    document = json.loads(render(CPU, "json"))
    assert (document["total"], document["count"], document["seconds"]) == (1.875, 187, 10.0)
    assert document["notes"] == {"process_cpu_seconds": 1.9}
    assert document["stacks"][0] == {"frames": [0, 1, 2], "value": 1.5, "count": 150}


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_profile_can_be_written(format: Format) -> None:
    """A process at rest has one."""
    empty = Profile(kind="cpu", process="p", unit="seconds", began_time=0.0, seconds=1.0, frames=(), stacks=())
    body = render(empty, format)
    assert format == "folded" or json.loads(body)


def test_names_that_are_no_text_can_be_written() -> None:
    """A file name may be any bytes."""
    odd = Profile(
        kind="memory", process="p", unit="bytes", began_time=0.0, seconds=1.0,
        frames=(Frame("\udcff.py:1", "\udcff.py", 1),), stacks=(Stack((0,), 5, 1),),
    )  # fmt: skip
    assert render(odd, "folded") == b"\\udcff.py:1 5\n"
    assert json.loads(render(odd, "speedscope"))["shared"]["frames"][0]["file"] == "\\udcff.py"
    assert render(odd, "json")


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=30), st.integers(1, 10**6)), max_size=60),
    st.integers(1500, 6000),
    st.sampled_from(FORMATS),
)
def test_what_does_not_fit_is_summed(stacks: list[tuple[list[int], int]], bound: int, format: Format) -> None:
    """The body is within its bound, and the whole is the same."""
    profile = Profile(
        kind="memory",
        process="p",
        unit="bytes",
        began_time=0.0,
        seconds=1.0,
        frames=tuple(Frame(f"function_{number}" * 2, f"/a/file_{number}.py", number) for number in range(50)),
        stacks=tuple(sorted((Stack(tuple(f), v, 1) for f, v in stacks), key=lambda stack: -stack.value)),
    )
    body = render(profile, format, bound)
    assert len(body) <= max(bound, 4500)  # one stack of thirty frames may be longer than the bound
    whole = sum(value for _, value in stacks)
    if format == "folded":
        assert sum(int(line.rpartition(b" ")[2]) for line in body.splitlines()) == whole
    elif format == "json":
        assert json.loads(body)["total"] == whole
    else:
        (found,) = json.loads(body)["profiles"]
        assert sum(found["weights"]) == found["endValue"] == whole


def test_each_format_has_a_type_and_an_ending() -> None:
    """Which the reply names."""
    assert set(CONTENT_TYPES) == set(FILE_ENDINGS) == set(FORMATS)
