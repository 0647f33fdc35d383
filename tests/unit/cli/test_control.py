"""The command line's way to control: HTTP over a Unix socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llm_router.cli.control import NotRunning, Refused, call
from llm_router.processes.plan import unix_address
from llm_router.testing import Close, ScriptedBackend, json_reply, reply


def test_answers_come_back_as_data(tmp_path: Path) -> None:
    """What control says, whatever the length of the socket's path."""
    folder = tmp_path / ("deep" * 20)
    folder.mkdir()
    path = str(folder / "control.sock")
    with ScriptedBackend(path=unix_address(path)) as control:
        control.script(json_reply({"models": []}))
        assert call(path, "GET", "/admin/models") == {"models": []}
        control.script(json_reply({"reloaded": True}))
        assert call(path, "POST", "/admin/reload", {}) == {"reloaded": True}
        assert control.requests[1].headers["content-type"] == "application/json"
        assert control.requests[1].json() == {}


def test_what_control_refuses_is_shown_in_its_words(tmp_path: Path) -> None:
    """Not as a status."""
    path = str(tmp_path / "control.sock")
    with ScriptedBackend(path=path) as control:
        control.script(json_reply({"error": {"message": "no model 'x'"}}, 404))
        with pytest.raises(Refused, match="no model 'x'"):
            call(path, "GET", "/admin/models")
        control.script(json_reply([], 500))
        with pytest.raises(Refused, match="answered 500"):
            call(path, "GET", "/admin/models")
        control.script(reply(b"<html>", 200, "text/html"))
        with pytest.raises(Refused, match="not JSON"):
            call(path, "GET", "/admin/models")
        control.script(Close())
        with pytest.raises(NotRunning, match="does not answer"):
            call(path, "GET", "/admin/models")


def test_no_router_is_one_sentence(tmp_path: Path) -> None:
    """Neither a missing socket, nor one that was left behind, nor a missing folder."""
    left = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(left)
    for path in (str(tmp_path / "control.sock"), left, str(tmp_path / "none" / "control.sock")):
        with pytest.raises(NotRunning, match="start one with `llm-router serve`"):
            call(path, "GET", "/admin/models")
