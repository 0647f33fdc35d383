"""The lines of a request say what its record says, whatever is in it, and fit the schema."""

from __future__ import annotations

import json
import logging
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.logs.entry import Entries
from llm_router.observe.logs.redact import REDACTED, printable
from llm_router.observe.logs.request_lines import _REMEMBERED, RequestLines
from llm_router.observe.logs.schema import FILES, FileName, problems
from llm_router.signals import Attempt, RequestRecord
from support.log_records import SERVICE, asked, failed, inferred

OFFSET_S = 1_769_857_200.0 - 1000.0  # instant 1000 is 2026-01-31T11:00:00Z


def maker(*, line_bytes: int = 32768, field_chars: int = 8192, **values: Any) -> RequestLines:
    entries = Entries(SERVICE, "worker-0", max_line_bytes=line_bytes, max_field_chars=field_chars)
    return RequestLines(
        entries,
        **{"access": True, "level": logging.INFO, "content": False, "severities": {"limit": "warning"}, **values},
    )


def queues() -> dict[FileName, deque[bytes]]:
    return {name: deque() for name in FILES}


def made(lines: RequestLines, record: RequestRecord, *, now: float = 1000.25, rate: float = 1.0) -> dict[str, Any]:
    """File to its only line; every line is checked against the schema."""
    found = queues()
    lines.add(record, now, OFFSET_S, rate, found)
    return {file: parsed(file, *encoded) for file, encoded in found.items() if encoded}


def parsed(file: FileName, line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    entry: dict[str, Any] = json.loads(line)
    assert problems(file, entry) == []
    return entry


def test_access_line_of_a_plain_request() -> None:
    """Has the fields of the request and of the reply."""
    assert made(maker(), asked(query="a=1&key=abc")) == {
        "access": {
            "@timestamp": "2026-01-31T11:00:00.250Z",
            "log.level": "info",
            "message": "HTTP Request",
            "service": "llm-router",
            "version": "1.2.3",
            "env": "test",
            "hostname": "host-1",
            "pid": 42,
            "process": "worker-0",
            "request_id": "0123456789abcdef-7",
            "request": {
                "method": "GET",
                "url": f"/v1/models?a=1&key={REDACTED}",
                "path": "/v1/models",
                "query": f"a=1&key={REDACTED}",
                "headers": {"userAgent": "curl/8"},
                "ip": "192.0.2.7",
                "timestamp": "2026-01-31T11:00:00.000Z",
            },
            "response": {"statusCode": 200, "contentLength": 321, "contentType": "application/json"},
            "duration": 250.0,
            "route": "/v1/models",
            "outcome": "success",
            "sample_rate": 1,
        }
    }


def test_lines_of_an_inference() -> None:
    """One in each file; they share the ids."""
    record = inferred(first_token_at=1000.1, queued_at=1000.01, slot_at=1000.06, cost_status="exact", cost_usd=0.00012)
    record.cached_tokens, record.reasoning_tokens = 5, 6
    lines = made(maker(), record, rate=0.1)
    assert lines["application"]["inference"] == {
        "id": "0123456789abcdef-8",
        "model": "smollm2",
        "strategy": "balanced",
        "reason": "only",
        "key": "team",
        "prompt_length": 120,
        "tokens": 34,
        "input_tokens": 12,
        "cached_tokens": 5,
        "reasoning_tokens": 6,
        "latency": 250.0,
        "first_token": 100.0,
        "queued": 50.0,
        "cost_usd": 0.00012,
        "attempts": 1,
        "cached": False,
        "backend": "local",
        "success": True,
    }
    access = lines["access"]
    assert access["request"]["headers"] == {
        "userAgent": "OpenAI/Python",
        "contentType": "application/json",
        "authorization": REDACTED,
        "contentLength": 120,
    }
    assert access["routing"] == {
        "model": "smollm2",
        "strategy": "balanced",
        "attempts": 1,
        "cached": False,
        "backend": "local",
    }
    assert access["key"] == {"id": "key-1", "name": "team"}
    for line in lines.values():
        assert line["trace.id"] == record.trace_id
        assert line["span.id"] == record.span_id
        assert line["sample_rate"] == 0.1


def test_failure_has_its_error() -> None:
    """In the line that is made at once and in the access line; there is no line of a completion."""
    lines, record = maker(), failed()
    error = {"name": "unreachable", "message": "backend 'local' refused"}
    entry = parsed("error", lines.failed(record, 1000.25, OFFSET_S, "error"))
    assert (entry["error"], entry["inference"]["success"], entry["log.level"]) == (error, False, "error")
    found = made(lines, record)
    assert list(found) == ["access"]
    assert (found["access"]["error"], found["access"]["log.level"]) == (error, "error")


def test_the_callers_own_failures_are_warnings() -> None:
    """In the lines of the batch; they are no errors of ours."""
    found = made(maker(), failed(error_type="limit", error="too many requests", status=429))
    assert found["application"]["message"] == "Inference failed"
    assert found["application"]["log.level"] == found["access"]["log.level"] == "warning"
    assert found["application"]["error"] == {"name": "limit", "message": "too many requests"}
    assert list(made(maker(level=logging.ERROR), failed(error_type="limit"))) == ["access"]


def test_levels_decide_about_the_lines_of_inferences() -> None:
    """Debug adds the beginning, stamped with it; warning leaves all out."""
    debug = queues()
    maker(level=logging.DEBUG).add(inferred(), 1000.25, OFFSET_S, 1.0, debug)
    begun, completed = (parsed("application", line) for line in debug["application"])
    assert (begun["message"], begun["log.level"]) == ("Inference started", "debug")
    assert begun["@timestamp"] == "2026-01-31T11:00:00.000Z"
    assert begun["inference"]["prompt_length"] == 120
    assert completed["message"] == "Inference completed"
    assert list(made(maker(level=logging.WARNING), inferred())) == ["access"]


def test_bodies_are_written_only_if_content_is_wanted() -> None:
    """And then without secrets."""
    bodies: dict[str, Any] = {
        "request_body": b'{"prompt":"my key is sk-0123456789abcdef"}',
        "response_body": b"hi\n\xff",
    }
    assert "prompt" not in str(made(maker(), inferred(**bodies))["application"]).replace("prompt_length", "")
    inference = made(maker(content=True), inferred(**bodies))["application"]["inference"]
    assert inference["request_body"] == f'{{"prompt":"my key is {REDACTED}"}}'
    assert inference["response_body"] == "hi\\x0a\ufffd"


@pytest.mark.parametrize(
    "values",
    [
        {"path": "/sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"query": "x=sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"query": "api_key=Zx9Qm4Lr7Tb2Wc8Y"},
        {"request_id": "sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"method": "SK-sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"route": "sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"model": "sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"key": "sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"strategy": "sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"error_type": "internal", "error": "key sk-Zx9Qm4Lr7Tb2Wc8Y is wrong"},
        {"response_type": b"text/sk-Zx9Qm4Lr7Tb2Wc8Y"},
        {"headers": {b"user-agent": b"sk-Zx9Qm4Lr7Tb2Wc8Y"}},
        {"headers": {b"referer": b"https://x/?token=Zx9Qm4Lr7Tb2Wc8Y"}},
        {"headers": {b"referer": b"https://me:Zx9Qm4Lr7Tb2Wc8Y@x/?a=1&key=Zx9Qm4Lr7Tb2Wc8Y"}},
        {"headers": {b"content-type": b"sk-Zx9Qm4Lr7Tb2Wc8Y"}},
        {"headers": {b"cookie": b"Zx9Qm4Lr7Tb2Wc8Y"}},
    ],
)
def test_a_secret_in_any_field_is_not_written(values: dict[str, Any]) -> None:
    """Wherever a caller may put one."""
    lines, record = maker(level=logging.DEBUG), inferred(**values)
    found = queues()
    found["error"].append(lines.failed(record, 1000.25, OFFSET_S, "error"))
    lines.add(record, 1000.25, OFFSET_S, 1.0, found)
    assert b"Zx9Qm4Lr7Tb2Wc8Y" not in b"".join(line for file in found.values() for line in file)


@pytest.mark.parametrize(
    ("client", "ip"),
    [
        ("192.0.2.7:5000", "192.0.2.7"),
        ("[2001:db8::1]:5000", "2001:db8::1"),
        ("", ""),
        ('evil", "x": "sk-Zx9Qm4Lr7Tb2Wc8Y:80', f'evil", "x": "{REDACTED}:80'),
        ("\x1b[2J:80", "\\x1b:80"),
    ],
)
def test_addresses_are_those_of_the_peer(client: str, ip: str) -> None:
    """Without port and brackets; inside of another server they may be anything, and break no line."""
    assert made(maker(), asked(client=client))["access"]["request"]["ip"] == ip


@pytest.mark.parametrize("length", [b"", b"007", b"-1", b"1e5", b"9" * 16, "²".encode("latin-1")])
def test_lengths_that_are_none_break_no_line(length: bytes) -> None:
    """What a caller announces is a number in the line, or nothing."""
    headers = made(maker(), asked(headers={b"content-length": length}))["access"]["request"]["headers"]
    assert headers.get("contentLength", 7) == 7


ANY = st.text(st.characters(), max_size=40)


@given(
    st.fixed_dictionaries(
        dict.fromkeys(
            ("path", "query", "method", "route", "model", "strategy", "reason", "key", "key_id", "error"), ANY
        )
    ),
    st.dictionaries(
        st.sampled_from([b"user-agent", b"referer", b"content-type", b"content-length", b"x-api-key"]),
        st.binary(max_size=40),
    ),
    st.binary(max_size=30),
    ANY,
    st.booleans(),
    st.integers(64, 500),
)
def test_any_record_makes_lines_of_the_schema(
    texts: dict[str, Any], headers: dict[bytes, bytes], type: bytes, request_id: str, fails: bool, field_chars: int
) -> None:
    """Whatever texts are in it: one line of valid JSON each, printable, typed as declared."""
    record = inferred(request_id, headers=headers, response_type=type, **texts)
    record.error_type = "internal" if fails else ""
    record.attempts.append(Attempt(texts["model"], 1000.0))
    lines = maker(level=logging.DEBUG, field_chars=field_chars)
    found = queues()
    found["error"].append(lines.failed(record, 1000.25, OFFSET_S, "error"))
    lines.add(record, 1000.25, OFFSET_S, 1.0, found)
    for file, encoded in found.items():
        for line in encoded:
            entry = parsed(file, line)
            assert printable(str(entry)) == str(entry)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("kind", ["", "limit", "internal"])
@pytest.mark.parametrize("access", [True, False])
def test_the_number_of_lines_is_known_before_they_are_made(level: int, kind: str, access: bool) -> None:
    """So that a full queue counts what it really loses."""
    lines = maker(level=level, access=access)
    for record in (inferred(error_type=kind), asked(error_type=kind)):
        found = queues()
        lines.add(record, 1000.25, OFFSET_S, 1.0, found)
        assert lines.number(record) == sum(map(len, found.values()))


def test_lines_are_bounded() -> None:
    """Long texts are cut, then cut shorter, and the line says so."""
    lines = maker(line_bytes=2048)
    record = failed(path="/" + "a" * 9000, query="q=" + "é" * 9000, error="e" * 9000)
    found = queues()
    found["error"].append(lines.failed(record, 1000.25, OFFSET_S, "error"))
    lines.add(record, 1000.25, OFFSET_S, 1.0, found)
    for file, (line,) in ((file, encoded) for file, encoded in found.items() if encoded):
        assert len(line) <= 2048
        assert parsed(file, line)["truncated"] is True


def test_what_is_remembered_is_bounded() -> None:
    """However many different requests come, and however long their texts are."""
    lines = maker()
    for number in range(3 * _REMEMBERED):
        made(lines, asked(path=f"/{number}"))
    assert len(lines._shapes) <= _REMEMBERED
    before = len(lines._shapes)
    made(lines, asked(path="/" + "a" * 5000))
    assert len(lines._shapes) == before


def test_what_is_remembered_does_not_mix() -> None:
    """Requests that differ in one thing have lines that differ in it."""
    lines = maker()
    first = made(lines, asked())["access"]
    second = made(lines, asked(status=404, outcome="error", error_type="not_found", error="no"))["access"]
    third = made(lines, asked(headers={b"user-agent": b"curl/8", b"content-length": b"3"}))["access"]
    assert (first["response"]["statusCode"], second["response"]["statusCode"]) == (200, 404)
    assert (first["log.level"], second["log.level"]) == ("info", "warning")
    assert "contentLength" not in first["request"]["headers"]
    assert third["request"]["headers"]["contentLength"] == 3
