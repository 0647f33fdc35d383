"""`llm-router trace` as it is typed, against control's own endpoints on a socket of the test's."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import KeyRing
from llm_router.admin import debug
from llm_router.admin.application import Rights, build
from llm_router.admin.debug import ModelFacts, RouterStatus
from llm_router.cli.trace import bar, duration, tree
from llm_router.observe.metrics.slots import Collected
from llm_router.observe.tracing import names
from llm_router.observe.tracing.store import TraceStore
from llm_router.observe.tracing.trace import Trace
from llm_router.testing import FakeClock
from support.admin import serving
from support.aio import run
from support.traces import span, trace

SOURCES = Path(__file__).parents[3] / "src"
NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Unasked:
    """A router of which nothing but its traces is wanted."""

    def status(self) -> RouterStatus:
        self._fail()

    def health_document(self) -> Mapping[str, Any] | None:
        self._fail()

    def collected(self) -> Collected:
        self._fail()

    async def model_facts(self) -> Sequence[ModelFacts]:
        self._fail()

    def _fail(self) -> NoReturn:
        raise AssertionError("not for this")


def shown(folder: Path, words: Sequence[str], *traces: Trace, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the command prints where these traces are kept."""
    store = TraceStore(100, wall=FakeClock(NOW))
    for one in traces:
        store.add(one)
    routes = debug.routes(Unasked(), traces=lambda: store, version="1", now=lambda: NOW)
    app = build(routes, lambda: Guard(AccessSettings()), lambda: Rights(KeyRing([]), {}))
    env = {
        "PATH": os.defpath, "HOME": str(folder), "DATA_DIR": str(folder), "PYTHONPATH": str(SOURCES), "COLUMNS": "80",
        **variables,
    }  # fmt: skip

    async def ask() -> subprocess.CompletedProcess[str]:
        async with serving(app, folder) as doors:
            (folder / "control.sock").symlink_to(doors.cli)
            return await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "llm_router", "trace", *words],
                cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip

    return run(ask())


def failed_request() -> Trace:
    """Two tries; the first one failed, the second too."""
    start = NOW - 1.25
    steps = (
        span("queue", 0.4, 200, of_s=start, parent="0" * 16),
        span("chat gpt-4o", 201, 400, of_s=start, id="a" * 16, kind="client", error="near: connection refused",
             attributes={names.BACKEND: "near"}),
        span("dial", 201, 399, of_s=start, parent="a" * 16),
        span(
            "chat gpt-4o", 450, 1249, of_s=start, kind="client", error="far: 500 \x07bell",
            attributes={"server.port": 443, names.BACKEND: "far"},
        ),
    )  # fmt: skip
    return trace(
        end_s=NOW, seconds=1.25, trace_id=TRACE_ID, request_id="req-17", model="gpt-4o", status=502,
        error_type="rejected", error="no backend answered", kept="error", steps=steps,
    )  # fmt: skip


def test_a_request_is_drawn(tmp_path: Path) -> None:
    """A row for each step, below the one it is part of, where and as long as it was; errors below their step."""
    result = shown(tmp_path, ["4bf9"], failed_request(), trace())
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.rstrip() for line in result.stdout.splitlines()] == [
        "POST /v1/chat/completions  502  1.25 s  gpt-4o at near",
        f"trace {TRACE_ID}, request req-17, 2026-09-21 14:13:18.750Z, worker-0, key app, kept: error",
        "",
        "POST /v1/chat/completions  ███████████████████████████████████████████    1.25 s",
        "  no backend answered",
        "  queue                    ██████▉                                      199.6 ms",
        "  chat gpt-4o at near            ██████▉                                199.0 ms",
        "    near: connection refused",
        "    dial                         ██████▊                                198.0 ms",
        "  chat gpt-4o at far                      ███████████████████████████▌  799.0 ms",
        r"    far: 500 \x07bell",
    ]


def test_what_the_cache_answered_says_so(tmp_path: Path) -> None:
    """There is no backend to name."""
    kept = trace(request_id="req-18", model="gpt-4o")
    cached = msgspec.structs.replace(kept.spans[0], attributes={names.CACHED: True})
    result = shown(tmp_path, ["req-18"], msgspec.structs.replace(kept, backend="", spans=(cached, *kept.spans[1:])))
    assert result.stdout.splitlines()[0].rstrip() == "POST /v1/chat/completions  200  250.0 ms  gpt-4o from the cache"


def test_attributes_are_listed_when_asked_for(tmp_path: Path) -> None:
    """Below their step, by name."""
    result = shown(tmp_path, ["req-17", "--attributes"], failed_request())
    assert f'\n    {names.BACKEND} = "far"\n    server.port = 443\n' in result.stdout


def test_the_requests_of_a_trace_follow_each_other(tmp_path: Path) -> None:
    """In the order in which they were made."""
    traces = [trace(trace_id=TRACE_ID, request_id=f"r{n}", end_s=NOW - n) for n in range(3)]
    lines = shown(tmp_path, [TRACE_ID], *traces).stdout.splitlines()
    assert [line.split(", ")[1] for line in lines if line.startswith("trace ")] == [
        "request r2",
        "request r1",
        "request r0",
    ]


def test_a_terminal_that_knows_ascii_only_gets_that(tmp_path: Path) -> None:
    """The bars are the only characters of ours that are none."""
    result = shown(tmp_path, ["4bf9"], failed_request(), PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    assert "#######" in result.stdout


def test_kept_requests_are_listed(tmp_path: Path) -> None:
    """A line each, nothing folded, names as they are; the id leads to the request."""
    odd = trace(end_s=NOW - 60, model="a [bold]name[/bold]\x1b[2J", seconds=0.0004, route="/v1/messages")
    result = shown(tmp_path, [], failed_request(), odd)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines() if line.strip()]
    assert lines == [
        "time took status request model backend problem kept trace",
        "2026-09-21 14:13:18.750Z 1.25 s 502 POST /v1/chat/completions gpt-4o near rejected error 4bf92f3577b3",
        "2026-09-21 14:12:19.999Z 400 µs 200 POST /v1/messages a [bold]name[/bold]\\x1b[2J near sampled "
        + odd.trace_id[:12],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ["new", "slow", "bad"]),
        (("--slowest",), ["slow", "bad", "new"]),
        (("--slowest", "--model", "large"), ["slow"]),
        (("--failed",), ["bad"]),
        (("--route", "/v1/messages"), ["new"]),
        (("-n", "1"), ["new"]),
        (("--failed", "-m", "large"), []),
    ],
)
def test_lists_are_chosen(tmp_path: Path, words: tuple[str, ...], expected: list[str]) -> None:
    """For programs as the router's own JSON."""
    traces = (
        trace(request_id="bad", end_s=NOW - 3, seconds=5, error_type="internal", status=500),
        trace(request_id="slow", end_s=NOW - 2, seconds=9, model="large"),
        trace(request_id="new", end_s=NOW - 1, seconds=1, route="/v1/messages"),
    )
    answer = json.loads(shown(tmp_path, [*words, "--json"], *traces).stdout)
    assert [request["request_id"] for request in answer["requests"]] == expected


def test_a_request_can_be_had_as_json(tmp_path: Path) -> None:
    """With every span."""
    answer = json.loads(shown(tmp_path, ["req-17", "--json"], failed_request()).stdout)
    assert [len(request["spans"]) for request in answer["requests"]] == [5]


def test_nothing_is_said_in_words(tmp_path: Path) -> None:
    """Not by an empty table; and with what there is, if there is anything."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert shown(tmp_path / "a", []).stdout == "no request is kept yet\n"
    result = shown(tmp_path / "b", ["--failed"], trace(model="small"), trace(model="large", route="/v1/messages"))
    assert (result.returncode, result.stdout) == (0, "none is kept; there are requests for small, large\n")


def test_ids_that_lead_nowhere_are_refused_in_the_router_s_words(tmp_path: Path) -> None:
    """Exit status 1."""
    result = shown(tmp_path, ["nothing"], failed_request())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("llm-router: no request with the id 'nothing' is kept")


@pytest.mark.parametrize(
    "words",
    [("4bf9", "--failed"), ("4bf9", "-m", "x"), ("--failed", "--slowest"), ("-n", "0"), ("-n", "201"), ("a", "b")],
)
def test_wrong_usage_asks_nobody(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Exit status 2."""
    env = {"PATH": os.defpath, "HOME": str(tmp_path), "DATA_DIR": str(tmp_path), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "llm_router", "trace", *words]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2


# -- pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start_s", "duration_s", "expected"),
    [
        (0.0, 10.0, "██████████"),
        (0.0, 5.0, "█████     "),
        (2.5, 5.25, "  █████▎  "),
        (0.0, 0.0, "▏         "),
        (9.99, 0.001, "         ▏"),
        (10.0, 0.0, "         ▏"),
        (9.0, 50.0, "         █"),
        (-5.0, 1.0, "█         "),
    ],
)
def test_a_bar_lies_where_the_span_does(start_s: float, duration_s: float, expected: str) -> None:
    """In ten columns for ten seconds; nothing is so short that it is not seen."""
    assert bar(start_s, duration_s, 10.0, 10) == expected


times = st.floats(-10.0, 1e6, allow_nan=False)


@given(times, times, st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), st.integers(1, 300))
def test_a_bar_has_its_width_and_something_in_it(start_s: float, duration_s: float, total_s: float, width: int) -> None:
    """Whatever the clocks of a machine told."""
    drawn = bar(start_s, duration_s, total_s, width)
    assert len(drawn) == width
    assert drawn.strip()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=12))
def test_a_tree_has_every_span_once(made: list[tuple[int, int]]) -> None:
    """Orphans, twins and parents of each other too."""
    spans = [{"span_id": str(own), "parent_id": str(parent)} for own, parent in made]
    rows = list(tree(spans))
    assert sorted(id(row.span) for row in rows) == sorted(map(id, spans))
    assert [row.depth for row in rows][:1] == [0] * bool(spans)
    assert all(row.depth >= 1 for row in rows[1:])


def test_a_tree_lists_children_below_their_parent() -> None:
    """In the order in which they came."""
    spans = [
        {"span_id": own, "parent_id": parent}
        for own, parent in (("r", "caller"), ("a", "r"), ("b", "r"), ("a1", "a"), ("lost", "?"), ("a2", "a"))
    ]
    assert [(row.span["span_id"], row.depth) for row in tree(spans)] == [
        ("r", 0), ("a", 1), ("a1", 2), ("a2", 2), ("b", 1), ("lost", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0 µs"), (0.000085, "85 µs"), (0.0123, "12.3 ms"), (1.234, "1.23 s"), (600.0, "600 s")],
)
def test_times_have_the_unit_that_fits(seconds: float, expected: str) -> None:
    """Three digits or so."""
    assert duration(seconds) == expected
