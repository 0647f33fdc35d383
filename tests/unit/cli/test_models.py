"""`llm-router models` as it is typed, against a control that answers from a script."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_router.testing import ScriptedBackend, json_reply
from support.command import llm_router

SOURCES = Path(__file__).parents[3] / "src"
MODEL = {
    "name": "m",
    "file": "m.gguf",
    "size_bytes": 98_000_000,
    "format": "gguf",
    "size_category": "small",
    "state": "loaded",
    "load_s": 1.23,
    "memory_bytes": 240_000_000,
    "error": "",
}


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ScriptedBackend]:
    """The control socket of a data folder."""
    with ScriptedBackend(path=str(tmp_path / "control.sock")) as backend:
        yield backend


def models(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return llm_router(folder, "models", *words)


def test_list_shows_state_and_memory(control: ScriptedBackend, tmp_path: Path) -> None:
    """Why a model cannot run, too, below the table; nothing is folded."""
    problem = "starts with b'This': " + "x " * 120 + "end"
    failed = MODEL | {"name": "n", "state": "failed", "memory_bytes": None, "error": problem}
    unusable = failed | {"name": "o", "state": "available", "size_bytes": 1234, "error": "is empty"}
    large = MODEL | {"name": "org/large", "size_bytes": 4_700_000_000, "memory_bytes": 6_100_000_000}
    control.script(json_reply({"models": [MODEL, failed, unusable, large]}))
    result = models(tmp_path, "list")
    lines = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0].split() == ["model", "state", "file", "size", "memory"]
    assert lines[1].split() == ["m", "loaded", "m.gguf", "98", "MB", "240", "MB"]
    assert lines[2].split() == ["n", "failed", "m.gguf", "98", "MB"]
    assert lines[3].split() == ["o", "unusable", "m.gguf", "2", "kB"]
    assert lines[4].split() == ["org/large", "loaded", "m.gguf", "4.7", "GB", "6.1", "GB"]
    assert lines[5:] == [f"n: {problem}", "o: is empty"]


def test_list_of_nothing_says_how_to_get_a_model(control: ScriptedBackend, tmp_path: Path) -> None:
    """Not an empty table."""
    control.script(json_reply({"models": []}))
    assert "models pull" in models(tmp_path, "list").stdout


def test_load_sends_options_with_their_types(control: ScriptedBackend, tmp_path: Path) -> None:
    """And says what it took."""
    control.script(json_reply({"model": MODEL}))
    result = models(tmp_path, "load", "m", "-o", "parallel=4", "--option", "embeddings=false")
    assert result.stdout == "m: loaded in 1.2 s, 240 MB\n"
    assert control.requests[0].json() == {"name": "m", "options": {"parallel": 4, "embeddings": False}}


def test_unload_and_refusals(control: ScriptedBackend, tmp_path: Path) -> None:
    """Exit status 1 with control's own words."""
    control.script(json_reply({"model": MODEL | {"state": "available"}}))
    assert models(tmp_path, "unload", "m").stdout == "m: unloaded\n"
    control.script(json_reply({"error": {"message": "model 'm' is not loaded"}}, 404))
    result = models(tmp_path, "unload", "m")
    assert (result.returncode, result.stderr) == (1, "llm-router: model 'm' is not loaded\n")


def test_reload_tells_what_needs_a_restart(control: ScriptedBackend, tmp_path: Path) -> None:
    """It is a command of its own, over the same socket."""
    control.script(json_reply({"reloaded": True, "needs_restart": ["server.port"]}))
    env = {"PATH": os.defpath, "HOME": str(tmp_path), "DATA_DIR": str(tmp_path), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "llm_router", "reload"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert result.stdout == "reloaded\nserver.port takes effect after a restart\n"


class _NoModel(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_pull_of_what_is_no_model_leaves_nothing(tmp_path: Path) -> None:
    """One line says what came instead."""
    with http.server.HTTPServer(("127.0.0.1", 0), _NoModel) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        result = models(tmp_path, "pull", f"http://127.0.0.1:{server.server_port}/m.gguf")
        server.shutdown()
        thread.join()
    assert result.returncode == 1
    assert result.stderr.startswith("llm-router: ")
    assert len(result.stderr.splitlines()) == 1
    assert list((tmp_path / "models").iterdir()) == []


def test_pull_does_not_need_the_files_that_the_configuration_names(tmp_path: Path) -> None:
    """One of them may be what is to be fetched."""
    (tmp_path / "llm-router.yaml").write_text("models: [{name: m, file: m.gguf}]\n")
    result = models(tmp_path, "pull", "ftp://h/m.gguf")
    assert "no model that can be pulled" in result.stderr
