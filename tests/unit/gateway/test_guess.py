"""An answer without usage is estimated by the text in it, whoever's form it has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_router.gateway.guess import output_tokens


@pytest.mark.parametrize(
    ("answer", "tokens"),
    (
        ({"choices": [{"message": {"content": "x" * 40}}]}, 10),
        ({"choices": [{"message": {"content": "x" * 4}}, {"message": {"content": "x"}}]}, 2),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"id": "c"}]}}]}, 3),
        ({"choices": [{"text": "éé"}]}, 1),
        ({"content": [{"type": "text", "text": "x" * 8}, {"type": "tool_use", "input": {"a": 1}}]}, 4),
        ({"choices": []}, 0),
        ({"data": [{"embedding": [0.1] * 100}]}, 0),
    ),
)
def test_text_and_calls_count(answer: dict[str, Any], tokens: int) -> None:
    assert output_tokens(json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()) == tokens


@pytest.mark.parametrize(
    "body", (b"", b"[]", b'{"choices":"many"}', b'{"choices":[{"message":{"content":["x"]}}]}', b"\xff")
)
def test_what_is_no_answer_has_no_tokens(body: bytes) -> None:
    assert output_tokens(body) == 0
