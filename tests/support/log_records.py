"""Records of requests for tests, and reading what was written about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_router.observe.logs.service import Service
from llm_router.signals import Attempt, RequestRecord

SERVICE = Service("llm-router", "1.2.3", "test", "host-1", 42)


def asked(request_id: str = "0123456789abcdef-7", *, began: float = 1000.0, **values: Any) -> RequestRecord:
    """A successful GET of /v1/models."""
    record = RequestRecord("GET", "/v1/models", request_id, began)
    record.path, record.client, record.status, record.outcome = "/v1/models", "192.0.2.7:50000", 200, "success"
    record.headers = {b"host": b"localhost", b"user-agent": b"curl/8"}
    record.response_type, record.response_bytes = b"application/json", 321
    for name, value in values.items():
        setattr(record, name, value)
    return record


def inferred(request_id: str = "0123456789abcdef-8", *, began: float = 1000.0, **values: Any) -> RequestRecord:
    """A successful inference."""
    record = asked(request_id, began=began)
    record.method, record.route, record.path = "POST", "/v1/chat/completions", "/v1/chat/completions"
    record.headers = {
        b"user-agent": b"OpenAI/Python",
        b"content-type": b"application/json",
        b"content-length": b"120",
        b"authorization": b"Bearer sk-llmr-0123456789",
    }
    record.is_inference = True
    record.model, record.strategy, record.reason = "smollm2", "balanced", "only"
    record.key, record.key_id = "team", "key-1"
    record.attempts = [Attempt("local", began + 0.001)]
    record.input_tokens, record.output_tokens = 12, 34
    record.trace_id, record.span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    for name, value in values.items():
        setattr(record, name, value)
    return record


def failed(request_id: str = "0123456789abcdef-9", **values: Any) -> RequestRecord:
    """An inference that failed at its backend."""
    found = {
        "status": 502,
        "outcome": "error",
        "error_type": "unreachable",
        "error": "backend 'local' refused",
        **values,
    }
    return inferred(request_id, **found)


def entries(folder: Path, file: str) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no file."""
    path = folder / f"{file}.log"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
