"""Prompts and completions as messages of the conventions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.tracing.content import MAX_PARTS, TEXT_CHARS, input_messages, output_messages


def asked(body: Any) -> Any:
    said = input_messages(json.dumps(body).encode())
    return json.loads(said) if said else []


def said(body: Any) -> Any:
    text = output_messages(body if isinstance(body, bytes) else json.dumps(body).encode())
    return json.loads(text) if text else []


def text(content: str) -> dict[str, str]:
    return {"type": "text", "content": content}


def test_prompts_of_every_form() -> None:
    assert asked({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]}) == [
        {"role": "system", "parts": [text("be kind")]},
        {"role": "user", "parts": [text("hi")]},
    ]
    assert asked(
        {"system": [{"type": "text", "text": "be kind"}], "messages": [{"role": "user", "content": "hi"}]}
    ) == [
        {"role": "system", "parts": [text("be kind")]},
        {"role": "user", "parts": [text("hi")]},
    ]
    assert asked({"prompt": ["a", "b"]}) == [{"role": "user", "parts": [text("a"), text("b")]}]
    assert asked({"prompt": "a", "systemPrompt": "x"}) == [{"role": "user", "parts": [text("a")]}]


def test_tools_are_calls_and_their_answers_and_pictures_are_named_only() -> None:
    call = {"id": "c1", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:secret"}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c2", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c2", "content": "sunny"}]},
    ]
    assert asked({"messages": messages}) == [
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'}],
        },
        {"role": "user", "parts": [{"type": "image_url"}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "id": "c2", "name": "f", "arguments": '{"x":1}'}]},
        {"role": "user", "parts": [{"type": "tool_call_response", "id": "c2", "response": "sunny"}]},
    ]


def test_plain_answers_of_every_form() -> None:
    expected = [{"role": "assistant", "parts": [text("hi")], "finish_reason": "stop"}]
    message = {"role": "assistant", "content": "hi"}
    assert said({"choices": [{"message": message, "finish_reason": "stop"}]}) == expected
    assert said({"choices": [{"text": "hi", "finish_reason": "stop"}]}) == expected
    anthropic = {"type": "message", "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}
    assert said(anthropic) == [{"role": "assistant", "parts": [text("hi")], "finish_reason": "end_turn"}]
    assert said({"text": "hi", "model": "m"}) == [{"role": "assistant", "parts": [text("hi")]}]


def test_streams_are_put_together() -> None:
    openai = (
        b'data: {"choices":[{"delta":{"role":"assistant","content":"h"}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"i"},"finish_reason":null}]}\n\n'
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n'
    )
    assert said(openai) == [{"role": "assistant", "parts": [text("hi")], "finish_reason": "stop"}]
    anthropic = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"hi"}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"max_tokens"}}\n\n'
    )
    assert said(anthropic) == [{"role": "assistant", "parts": [text("hi")], "finish_reason": "max_tokens"}]
    assert said(openai[:70]) == [{"role": "assistant", "parts": [text("h")]}]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": 5}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_prompt_and_no_answer_is_left_out(body: bytes) -> None:
    assert input_messages(body) == ""
    assert output_messages(body) == ""


def test_what_is_long_is_cut_and_what_is_huge_is_not_read() -> None:
    (message,) = asked({"prompt": "x" * (TEXT_CHARS * 2)})
    assert len(message["parts"][0]["content"]) < TEXT_CHARS + 100
    many = asked({"messages": [{"role": "user", "content": str(number)} for number in range(MAX_PARTS + 10)]})
    assert len(many) == MAX_PARTS
    assert many[-1]["parts"] == [text(str(MAX_PARTS + 9))]
    assert asked({"prompt": "x" * 2_000_000}) == []


def test_secrets_in_content_are_taken_out() -> None:
    assert "sk-abcdefghijklmnop" not in input_messages(b'{"prompt": "use sk-abcdefghijklmnop please"}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["messages", "content", "prompt", "system", "choices", "message", "delta", "tool_calls", "function",
             "type", "text", "role", "input", "name", "finish_reason"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_any_json_is_survived(body: Any) -> None:
    encoded = json.dumps(body).encode()
    for found in (input_messages(encoded), output_messages(encoded), output_messages(b"data: " + encoded)):
        assert not found or isinstance(json.loads(found), list)
