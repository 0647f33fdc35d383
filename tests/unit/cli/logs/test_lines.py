"""How lines look: what matters of each kind in one line, safe for a terminal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.cli.logs.files import Line
from llm_router.cli.logs.lines import Renderer
from llm_router.observe.logs.redact import printable
from llm_router.observe.logs.schema import FILES, FileName, problems

STAMP = "2026-09-21T14:13:20.000Z"
BASE = {
    "@timestamp": STAMP, "log.level": "info", "message": "HTTP Request", "service": "llm-router", "version": "1.0",
    "env": "test", "hostname": "host", "pid": 7, "process": "worker-0",
}  # fmt: skip
OF_REQUEST = BASE | {"request_id": "0f64a3c97a8b12de-17", "trace.id": "ab" * 16, "span.id": "cd" * 8}
ACCESS = OF_REQUEST | {
    "request": {
        "method": "POST", "url": "/v1/chat/completions?a=1", "path": "/v1/chat/completions", "query": "a=1",
        "headers": {"userAgent": "curl/8"}, "ip": "127.0.0.1", "timestamp": STAMP,
    },
    "response": {"statusCode": 200, "contentLength": 733, "contentType": "application/json"},
    "duration": 1500.25, "route": "/v1/chat/completions", "outcome": "success", "sample_rate": 1,
    "routing": {"model": "small", "strategy": "balanced", "backend": "local", "attempts": 1, "cached": False},
    "key": {"id": "key-1", "name": "app"},
}  # fmt: skip
INFERENCE = {
    "id": "0f64a3c97a8b12de-17", "model": "small", "strategy": "balanced", "backend": "local", "key": "app",
    "input_tokens": 11, "tokens": 30, "latency": 1500.25, "attempts": 1, "cached": False, "success": True,
}  # fmt: skip


def show(file: FileName, entry: dict[str, Any], *, is_coloured: bool = False) -> str:
    """How a line that the schema allows looks."""
    assert problems(file, entry) == []
    return anything(file, entry, is_coloured=is_coloured)


def anything(file: FileName, entry: dict[str, Any], *, is_coloured: bool = False) -> str:
    raw = json.dumps(entry).encode()
    return Renderer(is_coloured=is_coloured).show(Line("", file, raw, json.loads(raw)))


def test_a_request() -> None:
    """Status, what was asked, how long it took, who served it for whom."""
    assert show("access", ACCESS) == (
        f"{STAMP} worker-0 200 POST /v1/chat/completions?a=1 1.50 s small at local, key app, from 127.0.0.1 "
        "[0f64a3c97a8b12de-17]"
    )


def test_a_request_that_failed() -> None:
    """Its error comes last."""
    failed = ACCESS | {
        "response": {"statusCode": 502, "contentLength": 10},
        "duration": 99.96,
        "routing": {"model": "small", "strategy": "balanced", "backend": "local", "attempts": 3, "cached": True},
        "error": {"name": "backend_unavailable", "message": "backend 'local' cannot be reached"},
    }
    assert show("access", failed) == (
        f"{STAMP} worker-0 502 POST /v1/chat/completions?a=1 100.0 ms small at local, 3 attempts, cached, key app, "
        "from 127.0.0.1, backend_unavailable: backend 'local' cannot be reached [0f64a3c97a8b12de-17]"
    )


def test_an_inference() -> None:
    """With its steps, tokens and cost."""
    more = {"queued": 100.0, "first_token": 500.0, "cost_usd": 0.00012, "cached": True, "request_body": '{"a": 1}'}
    full = OF_REQUEST | {"message": "Inference completed", "inference": INFERENCE | more, "sample_rate": 1}
    assert show("application", full) == (
        f"{STAMP} worker-0 INFO Inference completed: small at local, 1.50 s (queued 100.0 ms, first token 500.0 ms), "
        '11 + 30 tokens, $0.00012, cached, key app, asked {"a": 1} [0f64a3c97a8b12de-17]'
    )
    failed = OF_REQUEST | {
        "log.level": "error",
        "message": "Inference failed",
        "inference": {"model": "small", "latency": 1500.25, "key": "app", "tokens": 0, "attempts": 0},
        "error": {"name": "timeout", "message": "too slow"},
    }
    assert show("application", failed) == (
        f"{STAMP} worker-0 ERROR Inference failed: small, 1.50 s, key app, timeout: too slow [0f64a3c97a8b12de-17]"
    )


def test_what_else_happened() -> None:
    """The logger without what all have in common; what a line holds besides as name=value."""
    warning = BASE | {
        "log.level": "warning", "message": "Redis is away", "log.logger": "llm_router.cache",
        "data": {"folder": "/a b", "tries": "3"}, "model": {"name": "small"},
    }  # fmt: skip
    assert show("application", warning) == (
        f'{STAMP} worker-0 WARNING cache: Redis is away folder="/a b" tries=3 model.name=small'
    )
    own = BASE | {"message": "started", "log.logger": "llm_router.worker"}
    assert show("application", own) == f"{STAMP} worker-0 INFO started"


def test_a_traceback_follows() -> None:
    """Indented, so that one sees where the next line begins."""
    error = {"name": "ValueError", "message": "bad", "stack": "Traceback:\n  File x\nValueError: bad\n"}
    assert show("error", BASE | {"log.level": "error", "message": "it broke", "error": error}) == (
        f"{STAMP} worker-0 ERROR it broke\n    Traceback:\n      File x\n    ValueError: bad"
    )


def test_audit_and_metrics() -> None:
    """Who did what; a value with its labels."""
    audit = BASE | {
        "event": "key_created", "timestamp": STAMP, "actor": "the key 'ops'", "key_name": "my app", "success": False,
    }  # fmt: skip
    assert show("audit", audit) == f"{STAMP} worker-0 key_created failed by the key 'ops' key_name=\"my app\""
    metric = {"name": "llm_router_x", "value": 0.25, "labels": {"model": "small", "le": "+Inf"}, "timestamp": STAMP}
    assert show("metrics", BASE | {"metric": metric}) == f"{STAMP} worker-0 llm_router_x{{model=small,le=+Inf}} 0.25"
    plain = {"name": "llm_router_x", "value": 12.0, "labels": {}, "timestamp": STAMP}
    assert show("metrics", BASE | {"metric": plain}).endswith("llm_router_x 12")


def test_colours_are_only_for_terminals() -> None:
    """And say no more than the text."""
    missing = ACCESS | {"response": {"statusCode": 404, "contentLength": 3}}
    assert "\x1b[33m404\x1b[0m" in show("access", missing, is_coloured=True)
    assert "\x1b" not in show("access", missing)


@pytest.mark.parametrize("file", list(FILES))
def test_nothing_in_a_line_steers_the_terminal(file: FileName) -> None:
    """Whoever wrote it there."""
    evil = "\x1b]0;owned\x07\x9b31m\u202e\r"
    entry = {
        "@timestamp": evil, "process": evil, "log.level": evil, "message": evil, "request_id": evil, evil: evil,
        "event": evil, "actor": evil, "log.logger": evil, "error": {"name": evil, "message": evil},
        "inference": {"model": evil, "backend": evil, "key": evil, "latency": evil, "tokens": evil},
        "request": {"method": evil, "url": evil, "ip": evil}, "response": {"statusCode": evil},
        "routing": {"model": evil, "backend": evil}, "key": {"name": evil},
        "metric": {"name": evil, "value": evil, "labels": {evil: evil}},
    }  # fmt: skip
    assert anything(file, entry).isprintable()
    broken = Line("", file, b"\x1b[2J half a line \xff", None)
    assert Renderer(is_coloured=True).show(broken) == r"\x1b[2J half a line \xff"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(
    {field.name.split(".")[0] for fields in FILES.values() for field in fields} | {"log.level", "log.logger"}
)


@given(st.sampled_from(list(FILES)), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
def test_whatever_a_line_holds_is_shown(file: FileName, entry: dict[str, Any]) -> None:
    """Fields of the wrong types too: at worst the line as it stands."""
    shown = anything(file, entry)
    assert shown == printable(shown, keep_lines=True)
