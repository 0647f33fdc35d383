"""`llm-router profile` as it is typed, against a control that answers from a script."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_router.testing import ScriptedBackend, json_reply
from support.command import llm_router

SOURCES = Path(__file__).parents[3] / "src"
CPU: dict[str, Any] = {
    "kind": "cpu",
    "process": "worker-0",
    "unit": "seconds",
    "began": 1790000000.0,
    "seconds": 10.0,
    "total": 2.5,
    "count": 250,
    "notes": {},
    "frames": [{"name": "thread MainThread"}, {"name": "a:run"}, {"name": "b:work"}],
    "stacks": [
        {"frames": [0, 1, 2], "value": 1.5, "count": 150},
        {"frames": [0, 1, 2, 1], "value": 0.75, "count": 75},
        {"frames": [0, 1], "value": 0.25, "count": 25},
    ],
}
MEMORY = CPU | {
    "kind": "memory",
    "unit": "bytes",
    "total": 3_000_500,
    "count": 40,
    "frames": [{"name": "a.py:1"}, {"name": "b.py:2"}],
    "stacks": [{"frames": [0, 1], "value": 3_000_000, "count": 39}, {"frames": [0], "value": 500, "count": 1}],
}


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ScriptedBackend]:
    """The control socket of a data folder."""
    with ScriptedBackend(path=str(tmp_path / "control.sock")) as backend:
        yield backend


def profile(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return llm_router(folder, "profile", *words)


def test_the_heaviest_functions_are_shown(control: ScriptedBackend, tmp_path: Path) -> None:
    """By what they took themselves; one that is in a stack twice counts once."""
    control.script(json_reply(CPU))
    result = profile(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "worker-0, cpu, 10.0 s: 2.50 s of CPU time (25% of one CPU), 250 samples",
        "",
        "    self            total          function",
        "1,500 ms  60.0%  2,250 ms   90.0%  b:work",
        "1,000 ms  40.0%  2,500 ms  100.0%  a:run",
    ]
    request = control.requests[0]
    assert (request.method, request.target) == ("POST", "/debug/profile?process=worker-0&kind=cpu&format=json")


def test_memory_is_shown_by_line(control: ScriptedBackend, tmp_path: Path) -> None:
    """With as many lines as wanted."""
    control.script(json_reply(MEMORY))
    result = profile(tmp_path, "control", "--kind", "memory", "--seconds", "2.5", "--lines", "1")
    assert result.stdout.splitlines() == [
        "worker-0, memory, 10.0 s: 3.0 MB more than before, in 40 blocks",
        "",
        "  self           total          line",
        "3.0 MB  100.0%  3.0 MB  100.0%  b.py:2",
        "                                ... and 1 more; --lines shows more, --output all",
    ]
    assert control.requests[0].target == "/debug/profile?process=control&kind=memory&format=json&seconds=2.5"


def test_it_can_be_written_to_a_file(control: ScriptedBackend, tmp_path: Path) -> None:
    """As it came, in the format that is asked for."""
    control.script(json_reply({"a": 1}))
    control.script(json_reply({"a": 1}))
    result = profile(tmp_path, "--output", "p.json")
    assert (result.returncode, result.stdout) == (0, "p.json: 0.0 kB\n")
    assert (tmp_path / "p.json").read_bytes().replace(b" ", b"") == b'{"a":1}'
    result = profile(tmp_path, "--output", "-", "--format", "folded")
    assert result.stdout.replace(" ", "") == '{"a":1}'
    assert [request.target.rpartition("=")[2] for request in control.requests] == ["speedscope", "folded"]


def test_a_process_at_rest_is_one_line(control: ScriptedBackend, tmp_path: Path) -> None:
    """There is nothing to list."""
    control.script(json_reply(CPU | {"total": 0, "count": 0, "frames": [], "stacks": []}))
    assert profile(tmp_path).stdout == "worker-0, cpu, 10.0 s: 0.00 s of CPU time (0% of one CPU), 0 samples\n"


def test_a_router_without_profiles_says_how_to_have_them(control: ScriptedBackend, tmp_path: Path) -> None:
    """The route is not there then."""
    control.script(json_reply({"error": {"message": "there is nothing at /debug/profile", "code": "not_found"}}, 404))
    result = profile(tmp_path)
    assert result.returncode == 1
    assert "PROFILER_ENABLED=true" in result.stderr


def test_what_the_router_refuses_is_shown(control: ScriptedBackend, tmp_path: Path) -> None:
    """In its words."""
    control.script(json_reply({"error": {"message": "there is no process 'x'", "code": "process_not_found"}}, 404))
    result = profile(tmp_path, "x")
    assert (result.returncode, result.stderr) == (1, "llm-router: there is no process 'x'\n")


def test_a_file_that_cannot_be_written_is_said_so(control: ScriptedBackend, tmp_path: Path) -> None:
    """With its name."""
    control.script(json_reply({"a": 1}))
    result = profile(tmp_path, "--output", "no/such/file")
    assert result.returncode == 1
    assert result.stderr == "llm-router: the profile cannot be written to no/such/file: No such file or directory\n"
