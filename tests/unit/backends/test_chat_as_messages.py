"""OpenAI's chats for a backend of Anthropic's: what is asked, what is refused, what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from anthropic.types import message_create_params
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from llm_router.backends.chat_as_messages import Reader, messages_body
from llm_router.chat import Endpoint
from llm_router.errors import BackendRejected, BadReply, InvalidRequest
from llm_router.gateway.openai import read_request
from support import anthropic, chats

PARAMS = TypeAdapter(message_create_params.MessageCreateParamsNonStreaming)
PNG = "data:image/png;base64,iVBORw0KGgo="


def asked(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the backend is asked for a chat; Anthropic's own types must take it."""
    body = {"model": "m", "messages": list(messages or ({"role": "user", "content": "hi"},)), **fields}
    request = read_request(Endpoint.CHAT, json.dumps(body).encode())
    sent = json.loads(messages_body(request, "claude-x"))
    PARAMS.validate_python({**sent, "stream": False})
    return dict(sent)


def reader() -> Reader:
    return Reader("b", lambda: 1234.5)


def test_a_plain_chat() -> None:
    assert asked() == {
        "model": "claude-x",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    }


def test_system_prompts_are_one_wherever_they_stand() -> None:
    sent = asked(
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": [{"type": "text", "text": "and kind"}]},
    )
    assert [block["text"] for block in sent["system"]] == ["be brief", "and kind"]
    assert [turn["role"] for turn in sent["messages"]] == ["user"]


def test_a_round_of_tools() -> None:
    """Results are the user's turn, together with what the user says next; ids get letters that are allowed there."""
    sent = asked(
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                chats.call("weather", '{"city": "Oslo"}', "functions.weather:0"),
                chats.call("now", "", "c2"),
            ],
        },
        {"role": "tool", "tool_call_id": "functions.weather:0", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "user", "content": "well?"},
        tools=[
            {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
        ],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
    )
    assert sent["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "tool_use", "id": "functions_weather_0", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "functions_weather_0", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "noon"}]},
                {"type": "text", "text": "well?"},
            ],
        },
    ]
    assert sent["tools"] == [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}]
    assert sent["tool_choice"] == {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({}, None),
    ],
)
def test_the_choice_of_tools(fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    sent = asked(tools=[{"type": "function", "function": {"name": "f"}}], **fields)
    assert sent.get("tool_choice") == expected


def test_images_files_and_cache_marks() -> None:
    sent = asked(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": ""},
                {"type": "image_url", "image_url": {"url": PNG}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}},
            ],
        }
    )
    assert sent["messages"][0]["content"] == [
        {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
            "title": "a.pdf",
        },
    ]


def test_options_have_their_names_there() -> None:
    sent = asked(
        max_tokens=5,
        max_completion_tokens=6,
        stop="END",
        temperature=1.7,
        top_p=0.5,
        user="u1",
        reasoning_effort="minimal",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        thinking={"type": "adaptive"},
        seed=1,
        presence_penalty=0.5,
        stream=True,
    )
    del sent["messages"], sent["model"]
    assert sent == {
        "max_tokens": 6,
        "stop_sequences": ["END"],
        "temperature": 1.0,
        "top_p": 0.5,
        "metadata": {"user_id": "u1"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "thinking": {"type": "adaptive"},
        "stream": True,
    }


def test_json_mode_is_asked_for_in_words() -> None:
    assert "JSON" in asked(response_format={"type": "json_object"})["system"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [], "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://x"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [chats.call("f", "[1]")]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(**{"messages": [{"role": "user", "content": "hi"}], **fields})
    assert refused.value.param == param
    assert refused.value.code in ("unsupported", "invalid_type")


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_calls"),
        ("a reason to come", "stop"),
    ],
)
def test_stop_reasons(stop_reason: str, finish_reason: str) -> None:
    reply = anthropic.message(stop_reason=stop_reason)
    whole = json.loads(reader().plain(200, json.dumps(reply).encode()))
    assert whole["choices"][0]["finish_reason"] == finish_reason
    assert chats.gathered(translated(anthropic.stream(reply)))["finish"] == finish_reason


BLOCKS = st.one_of(
    st.builds(anthropic.text, st.text(min_size=1)),
    st.builds(anthropic.thinking, st.text(min_size=1)),
    st.builds(
        anthropic.tool_use,
        st.sampled_from(["weather", "now"]),
        st.dictionaries(st.text(max_size=5), st.text() | st.integers(-9, 9) | st.lists(st.booleans()), max_size=3),
        st.uuids().map(lambda uuid: f"toolu_{uuid.hex}"),
    ),
)


def translated(data: bytes, cuts: tuple[int, ...] = ()) -> bytes:
    into = reader()
    return b"".join(into.feed(piece) for piece in anthropic.split(data, cuts)) + into.rest()


@given(
    blocks=st.lists(BLOCKS, min_size=1, max_size=4), piece=st.integers(1, 9), newline=st.sampled_from(["\n", "\r\n"])
)
def test_a_stream_says_what_the_whole_reply_says(blocks: list[dict[str, Any]], piece: int, newline: str) -> None:
    reply = anthropic.message(*blocks)
    whole = json.loads(reader().plain(200, json.dumps(reply).encode()))
    ChatCompletion.model_validate(whole)
    said = whole["choices"][0]["message"]
    data = translated(anthropic.stream(reply, piece, newline))
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            ChatCompletionChunk.model_validate_json(line[6:])
    told = chats.gathered(data)
    assert told["done"]
    assert told["text"] == (said["content"] or "")
    assert told["thoughts"] == said.get("reasoning_content", "")
    assert told["usage"] == whole["usage"]
    assert [(call["id"], call["name"], json.loads(call["arguments"])) for call in told["calls"]] == [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in said.get("tool_calls", ())
    ]


def test_a_stream_split_at_every_byte_says_the_same() -> None:
    reply = anthropic.message(
        anthropic.thinking("hm ✓"),
        anthropic.text("åäö"),
        anthropic.tool_use("f", {"a": "ö"}),
        anthropic.tool_use("g", {}),
    )
    for newline in ("\n", "\r\n"):
        data = anthropic.stream(reply, 2, newline)
        expected = translated(data)
        assert all(translated(data, (cut,)) == expected for cut in range(len(data)))
        assert translated(data, tuple(range(len(data)))) == expected


def test_usage_in_our_callers_words() -> None:
    """What was read from a cache and what was written to it is part of the prompt."""
    whole = json.loads(reader().plain(200, json.dumps(anthropic.message()).encode()))
    assert whole["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2, "cache_write_1h_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    assert whole["created"] == 1234


def test_a_reply_without_usage_has_none() -> None:
    reply = anthropic.message(usage={"input_tokens": -5})
    assert "usage" not in json.loads(reader().plain(200, json.dumps(reply).encode()))


def test_a_tools_input_may_come_with_its_start() -> None:
    """As some servers write it: whole, and no pieces."""
    events = anthropic.events(anthropic.message(anthropic.tool_use("f", {"a": 1}), stop_reason="tool_use"))
    whole = [value for value in events if value["type"] != "content_block_delta"]
    whole[2]["content_block"]["input"] = {"a": 1}
    told = chats.gathered(translated(b"".join(map(anthropic.event, whole))))
    assert json.loads(told["calls"][0]["arguments"]) == {"a": 1}


def test_a_stream_may_lack_its_last_event() -> None:
    data = anthropic.stream(anthropic.message())
    cut = data[: data.index(b"event: message_stop")]
    told = chats.gathered(translated(cut))
    assert (told["done"], told["finish"], told["text"]) == (True, "stop", anthropic.TEXT)


def test_a_stream_that_stops_in_the_middle_is_a_fault() -> None:
    data = anthropic.stream(anthropic.message())
    into = reader()
    assert into.feed(data[: data.index(b"event: message_delta")])
    with pytest.raises(BadReply, match="in the middle"):
        into.rest()


def test_an_error_in_a_stream_is_raised_after_what_came_before_it() -> None:
    start = anthropic.event(anthropic.events(anthropic.message())[0])
    failed = anthropic.event(anthropic.error("overloaded_error", "Overloaded"))
    into = reader()
    assert b"assistant" in into.feed(start + failed)
    steps: list[Callable[[], bytes]] = [lambda: into.feed(b""), into.rest]
    for step in steps:
        with pytest.raises(BackendRejected, match="Overloaded") as raised:
            step()
        assert raised.value.status == 529
    with pytest.raises(BackendRejected, match="Overloaded"):
        reader().feed(failed)


@pytest.mark.parametrize(
    "data", [b"data: {}\n\n", b"data: nonsense\n\n", b'data: {"type":"content_block_stop","index":0}\n\n']
)
def test_a_stream_of_something_else_is_a_fault(data: bytes) -> None:
    with pytest.raises(BadReply):
        reader().feed(data)


def test_kinds_of_events_to_come_mean_nothing() -> None:
    events = anthropic.events(anthropic.message())
    events.insert(3, {"type": "a_kind_to_come", "index": 0})
    assert translated(b"".join(map(anthropic.event, events))) == translated(anthropic.stream(anthropic.message()))


def test_errors() -> None:
    body = json.dumps(anthropic.error("rate_limit_error", "slow down")).encode()
    assert json.loads(reader().plain(429, body)) == {
        "error": {"message": "slow down", "type": "rate_limit_error", "param": None, "code": None}
    }
    assert json.loads(reader().plain(500, b"{}"))["error"]["message"] == "the backend answered 500"
    assert reader().plain(502, b"<html>") == b"<html>"
    with pytest.raises(BadReply, match="no message"):
        reader().plain(200, b"{}")
