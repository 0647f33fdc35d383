"""`llm-router keys` as it is typed, against a control that answers from a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm_router.accounts.limits import Limits
from llm_router.testing import ScriptedBackend, json_reply

SOURCES = Path(__file__).parents[3] / "src"
SECRET = "sk-llmr-" + "x" * 43
KEY: dict[str, Any] = {
    "id": "key-0123456789abcdef",
    "name": "app",
    "state": "valid",
    "scopes": ["inference"],
    "models": [],
    "limits": msgspec.to_builtins(Limits()),
    "created": "2026-01-31T08:00:00.000Z",
    "expires": None,
    "revoked": None,
    "last_used": None,
}
OTHER = KEY | {
    "id": "key-aaaaaaaaaaaaaaaa",
    "name": "a [bold]name[/bold]",
    "scopes": ["metrics:read", "admin"],
    "models": ["small", "org/large"],
    "limits": msgspec.to_builtins(Limits(requests_per_minute=60, usd_per_month=12.5)),
    "expires": "2027-01-31T08:00:00.000Z",
    "last_used": "2026-02-01T09:10:11.000Z",
}


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ScriptedBackend]:
    """The control socket of a data folder."""
    with ScriptedBackend(path=str(tmp_path / "control.sock")) as backend:
        yield backend


def answers(control: ScriptedBackend, *bodies: dict[str, Any]) -> None:
    """One for each of the next requests."""
    for body in bodies:
        control.script(json_reply(body))


def keys(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.defpath, "HOME": str(folder), "DATA_DIR": str(folder), "PYTHONPATH": str(SOURCES), "TZ": "UTC"}
    command = [sys.executable, "-m", "llm_router", "keys", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_a_new_key_stands_alone_on_stdout(control: ScriptedBackend, tmp_path: Path) -> None:
    """So that it can go into a file; what people want to read goes to stderr, without it."""
    control.script(json_reply({"key": OTHER, "secret": SECRET, "closes": ["metrics:read", "admin"]}, 201))
    result = keys(
        tmp_path, "create", "--name", "n", "--scope", "admin", "--scope", "metrics:read", "--model", "small",
        "--expires", "2027-01-31", "--limit", "requests_per_minute=60", "--limit", "usd_per_month=12.5",
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, SECRET + "\n")
    assert result.stderr == (
        "key a [bold]name[/bold] (key-aaaaaaaaaaaaaaaa): metrics:read admin, models small org/large, "
        "requests_per_minute=60, usd_per_month=12.5, warn_ratio=0.8, until 2027-01-31 08:00Z. It is not shown again.\n"
        "It is the first one for metrics:read and admin: without a key that is closed now.\n"
    )
    request = control.requests[0]
    assert (request.method, request.target) == ("POST", "/admin/keys")
    assert request.json() == {
        "name": "n",
        "scopes": ["admin", "metrics:read"],
        "models": ["small"],
        "expires": "2027-01-31T00:00:00+00:00",
        "limits": {"requests_per_minute": 60, "usd_per_month": 12.5},
    }


def test_a_name_is_enough(control: ScriptedBackend, tmp_path: Path) -> None:
    """What was not said is left to the router; for programs the whole reply."""
    answer = {"key": KEY, "secret": SECRET}
    control.script(json_reply(answer, 201))
    result = keys(tmp_path, "create", "--name", "app", "--json")
    assert (json.loads(result.stdout), result.stderr) == (answer, "")
    assert control.requests[0].json() == {"name": "app", "models": [], "limits": {}}


@pytest.mark.parametrize(("text", "days"), [("30d", 30.0), ("36h", 1.5), ("never", None)])
def test_when_a_key_expires_can_be_said_from_now(
    control: ScriptedBackend, tmp_path: Path, text: str, days: float | None
) -> None:
    """Or that it does not."""
    control.script(json_reply({"key": KEY, "secret": SECRET}, 201))
    assert keys(tmp_path, "create", "--name", "app", "--expires", text).returncode == 0
    expires = control.requests[0].json()["expires"]
    if days is None:
        assert expires is None
    else:
        assert abs(datetime.fromisoformat(expires).timestamp() - time.time() - days * 86_400) < 60


def test_list_shows_what_keys_are_for(control: ScriptedBackend, tmp_path: Path) -> None:
    """A line each, nothing folded, names as they are."""
    answers(control, {"keys": [KEY, OTHER]}, {"keys": [KEY]})
    lines = [" ".join(line.split()) for line in keys(tmp_path, "list").stdout.splitlines() if line.strip()]
    other = "a [bold]name[/bold] key-aaaaaaaaaaaaaaaa valid metrics:read admin small org/large"
    assert lines == [
        "name id state scopes models limits expires last used",
        "app key-0123456789abcdef valid inference all none never never",
        f"{other} requests_per_minute=60 usd_per_month=12.5 warn_ratio=0.8 2027-01-31 08:00Z 2026-02-01 09:10Z",
    ]
    assert json.loads(keys(tmp_path, "list", "--all", "--json").stdout) == {"keys": [KEY]}
    assert [request.target for request in control.requests] == ["/admin/keys", "/admin/keys?all=true"]


def test_no_keys_is_said_with_the_way_to_one(control: ScriptedBackend, tmp_path: Path) -> None:
    """Not by an empty table."""
    control.script(json_reply({"keys": []}))
    assert "keys create --name" in keys(tmp_path, "list").stdout


@pytest.mark.parametrize(
    ("words", "method", "body"),
    [
        (("rename", "app", "new"), "PATCH", {"name": "new"}),
        (("limit", "app", "concurrency=0", "usd_per_day=2.5"), "PATCH", {"limits": {"concurrency": 0, "usd_per_day": 2.5}}),
        (("change", "app", "--scope", "admin", "--all-models"), "PATCH", {"scopes": ["admin"], "models": []}),
        (("change", "app", "--model", "m", "--expires", "never"), "PATCH", {"models": ["m"], "expires": None}),
        (("revoke", "app"), "DELETE", None),
        (("revoke", "key-0123456789abcdef"), "DELETE", None),
    ],
)  # fmt: skip
def test_a_key_is_meant_by_name_or_id(
    control: ScriptedBackend, tmp_path: Path, words: tuple[str, ...], method: str, body: Any
) -> None:
    """The id is asked for first, as names change."""
    named_like_it = KEY | {"id": "key-bbbbbbbbbbbbbbbb", "name": KEY["id"]}
    answers(control, {"keys": [named_like_it, KEY]}, {"key": KEY})
    result = keys(tmp_path, *words)
    done = "key app (key-0123456789abcdef) is revoked" if body is None else "key app (key-0123456789abcdef): inference"
    assert (result.returncode, result.stdout) == (0, done + "\n")
    request = control.requests[1]
    assert (request.method, request.target) == (method, "/admin/keys/key-0123456789abcdef")
    assert (request.json() if request.body else None) == body


def test_refusals_are_shown_in_the_router_s_words(control: ScriptedBackend, tmp_path: Path) -> None:
    """Exit status 1; for a key that is not there nothing but the list is asked for."""
    control.script(json_reply({"error": {"message": "there is a key 'app' already"}}, 409))
    answers(control, {"keys": [KEY]})
    result = keys(tmp_path, "create", "--name", "app")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "llm-router: there is a key 'app' already\n"
    result = keys(tmp_path, "revoke", "nobody")
    assert (result.returncode, result.stderr) == (
        1,
        "llm-router: there is no key 'nobody'; `llm-router keys list` shows them\n",
    )
    assert len(control.requests) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("create",),
        ("create", "--name", "a", "--expires", "soon"),
        ("create", "--name", "a", "--expires", "99999999999d"),
        ("create", "--name", "a", "--limit", "concurrency"),
        ("create", "--name", "a", "--limit", "=4"),
        ("limit", "app"),
        ("limit", "app", "usd_per_day=nan"),
        ("limit", "app", "concurrency=1e999"),
        ("change", "app"),
        ("change", "app", "--model", "a", "--all-models"),
    ],
)
def test_wrong_usage_asks_nobody(control: ScriptedBackend, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Exit status 2."""
    assert keys(tmp_path, *words).returncode == 2
    assert not control.requests
