"""The envelope of /api/generate."""

from __future__ import annotations

import json

import pytest

from llm_router.errors import BadReply, InvalidRequest
from llm_router.gateway.generate import generated, read_generate


def test_camel_case_and_snake_case_options_mean_the_same() -> None:
    camel = read_generate(b'{"prompt":"hi","options":{"maxTokens":5,"topP":0.5,"model":"m"}}', "")
    snake = read_generate(b'{"prompt":"hi","options":{"max_tokens":5,"top_p":0.5,"model":"m"}}', "")
    assert json.loads(camel.body) == json.loads(snake.body)
    assert json.loads(camel.body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "top_p": 0.5,
    }


def test_without_a_model_the_default_is_asked() -> None:
    assert read_generate(b'{"prompt":"hi"}', "the-default").model == "the-default"


def test_a_system_prompt_comes_first() -> None:
    body = json.loads(read_generate(b'{"prompt":"hi","options":{"systemPrompt":"be brief"}}', "m").body)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{}", "prompt"),
        (b'{"prompt":5}', "prompt"),
        (b'{"prompt":"hi","option":{}}', "option"),
        (b'{"prompt":"hi","options":{"stream":true}}', "stream"),
        (b'{"prompt":"hi","options":{"model":7}}', "model"),
        (b'{"prompt":"hi"}', "model"),
        (b"nonsense", "JSON"),
    ],
)
def test_bad_calls_are_refused_by_name(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read_generate(body, "")


def test_a_reply_becomes_text_and_usage() -> None:
    body = b'{"choices":[{"message":{"content":"hello"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    result = generated(body, "b", model="m", strategy="round-robin", latency_ms=12.3456)
    assert (result.text, result.tokens, result.latency, result.cached) == ("hello", 2, 12.346, False)
    assert result.usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize("body", [b"{}", b'{"choices":[]}', b"<html>"])
def test_a_reply_without_a_message_is_a_bad_reply(body: bytes) -> None:
    with pytest.raises(BadReply, match="'b'"):
        generated(body, "b", model="m", strategy="round-robin", latency_ms=1.0)
