"""Anthropic's messages for a backend of OpenAI's: what is asked, what is refused, what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import completion_create_params
from pydantic import TypeAdapter

from llm_router.backends import chat_as_messages
from llm_router.backends.messages_as_chat import Reader, chat_body, is_openai
from llm_router.errors import BackendRejected, BadReply, InvalidRequest
from llm_router.gateway.anthropic import read_messages
from support import anthropic, chats

PARAMS = TypeAdapter(completion_create_params.CompletionCreateParamsNonStreaming)
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def body_of(**fields: Any) -> bytes:
    return json.dumps(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    ).encode()


def asked(*, is_openai: bool = False, **fields: Any) -> dict[str, Any]:
    """What the backend is asked for these messages; OpenAI's own types must take it."""
    request = read_messages(body_of(**fields))
    sent = json.loads(chat_body(request, "gpt-x", ask_usage=True, is_openai=is_openai))
    PARAMS.validate_python({**sent, "stream": False})
    return dict(sent)


def reader(**fields: Any) -> Reader:
    return Reader("b", read_messages(body_of(**fields)))


THINKING: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


def test_a_plain_chat() -> None:
    assert asked(system="be brief") == {
        "model": "gpt-x",
        "max_tokens": 9,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    }


def test_a_round_of_tools() -> None:
    """Each result is a message of its own, before what the user says; an image of a tool is shown by the user."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    sent = asked(
        messages=[
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": [
                    anthropic.thinking("hm"),
                    {"type": "text", "text": "let me see"},
                    anthropic.tool_use("weather", {"city": "Oslo"}),
                    anthropic.tool_use("camera", {}, "toolu_2"),
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_2",
                        "content": [image, {"type": "text", "text": "t"}],
                    },
                    {"type": "text", "text": "well?"},
                ],
            },
        ],
        tools=[{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    assert sent["messages"][1:] == [
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                chats.call("weather", '{"city": "Oslo"}', "toolu_1"),
                chats.call("camera", "{}", "toolu_2"),
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "t"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
                {"type": "text", "text": "well?"},
            ],
        },
    ]
    function = {"name": "weather", "parameters": {"type": "object"}, "description": "d"}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("required", False)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_the_choice_of_tools(choice: dict[str, Any], expected: Any) -> None:
    assert asked(tools=[{"name": "f", "input_schema": {}}], tool_choice=choice)["tool_choice"] == expected


def test_options_have_their_names_there() -> None:
    fields: dict[str, Any] = {
        "stop_sequences": ["END"],
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "metadata": {"user_id": "u"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "stream": True,
    }
    sent = asked(**fields)
    del sent["messages"], sent["model"]
    expected = {
        "max_tokens": 9,
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert sent == expected
    sent = asked(is_openai=True, **fields)
    assert ("top_k" in sent, "max_tokens" in sent, sent["max_completion_tokens"]) == (False, False, 9)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("api.openai.com", True), ("r.openai.azure.com", True), ("api.openai.com.example", False), ("127.0.0.1", False)],
)
def test_openais_own_servers_are_known_by_name(host: str, expected: bool) -> None:
    assert is_openai(host) is expected


def test_documents() -> None:
    def document(**source: str) -> dict[str, Any]:
        return {"type": "document", "title": "a.pdf", "source": source}

    content = [
        document(type="text", media_type="text/plain", data="plain"),
        document(type="base64", media_type="application/pdf", data="JVBERg=="),
    ]
    assert asked(messages=[{"role": "user", "content": content}])["messages"][0]["content"] == [
        {"type": "text", "text": "plain"},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]},
            "messages[0].content[0].type",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(**fields)
    assert refused.value.param == param


def whole(reply: dict[str, Any], **fields: Any) -> dict[str, Any]:
    told = json.loads(reader(**fields).plain(200, json.dumps(reply).encode()))
    Message.model_validate(told)
    return dict(told)


def translated(data: bytes, cuts: tuple[int, ...] = (), **fields: Any) -> bytes:
    into = reader(**fields)
    return b"".join(into.feed(piece) for piece in anthropic.split(data, cuts)) + into.rest()


def gathered(data: bytes) -> dict[str, Any]:
    """What a client makes of a stream of Anthropic's: the message, checked event by event for the protocol's order."""
    told: dict[str, Any] = {}
    opened = -1
    for block in data.decode().split("\n\n")[:-1]:
        name, _, said = block.partition("\n")
        value = json.loads(said.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        EVENT.validate_python(value)
        match value["type"]:
            case "message_start":
                assert not told
                told = value["message"]
            case "content_block_start":
                assert opened == -1
                opened = value["index"]
                assert opened == len(told["content"])
                told["content"].append({**value["content_block"], "json": ""})
            case "content_block_delta":
                assert value["index"] == opened
                delta = value["delta"]
                last = told["content"][-1]
                field = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
                last[field] += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
            case "content_block_stop":
                assert value["index"] == opened
                opened = -1
                last = told["content"][-1]
                written = last.pop("json")
                if last["type"] == "tool_use":
                    last["input"] = json.loads(written or "{}")
            case "message_delta":
                assert opened == -1
                told |= {**value["delta"], "usage": value["usage"]}
            case "message_stop":
                told["stopped"] = True
    return told


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("content_filter", "refusal"),
        ("tool_calls", "tool_use"),
        ("a reason to come", "end_turn"),
    ],
)
def test_stop_reasons(finish_reason: str, stop_reason: str) -> None:
    reply = chats.completion(finish_reason=finish_reason)
    assert whole(reply)["stop_reason"] == stop_reason
    assert gathered(translated(chats.stream(reply)))["stop_reason"] == stop_reason


def test_calls_that_are_said_to_have_stopped_are_tool_use() -> None:
    reply = chats.completion(None, finish_reason="stop", tool_calls=[chats.call("f", "{}")])
    assert whole(reply)["stop_reason"] == "tool_use"
    assert gathered(translated(chats.stream(reply)))["stop_reason"] == "tool_use"


def test_a_stop_sequence_is_named_where_the_backend_does() -> None:
    reply = chats.completion()
    reply["choices"][0]["stop_reason"] = "END"
    told = whole(reply)
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", "END")


def test_a_refusal() -> None:
    reply = chats.completion(None, refusal="I will not")
    assert (whole(reply)["stop_reason"], whole(reply)["content"][0]["text"]) == ("refusal", "I will not")
    told = gathered(translated(chats.stream(reply)))
    assert (told["stop_reason"], told["content"][0]["text"]) == ("refusal", "I will not")


def test_thoughts_are_for_callers_that_asked_for_them() -> None:
    reply = chats.completion(reasoning_content="hm")
    assert [block["type"] for block in whole(reply)["content"]] == ["text"]
    told = whole(reply, **THINKING)
    assert told["content"][0] == {"type": "thinking", "thinking": "hm", "signature": ""}
    data = chats.stream(reply)
    assert [block["type"] for block in gathered(translated(data))["content"]] == ["text"]
    assert gathered(translated(data, **THINKING))["content"] == told["content"]


def test_usage() -> None:
    """What came from the cache is not part of `input_tokens` there."""
    assert whole(chats.completion())["usage"] == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 4},
    }


def test_usage_of_a_server_that_tells_what_it_wrote_to_its_cache() -> None:
    """As OpenRouter does."""
    details = {"cached_tokens": 3, "cache_write_tokens": 5}
    usage = {"prompt_tokens": 10, "completion_tokens": 7, "prompt_tokens_details": details}
    assert whole(chats.completion(usage=usage))["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 5,
        "cache_read_input_tokens": 3,
        "output_tokens": 7,
    }


CALLS = st.lists(
    st.builds(
        chats.call,
        st.sampled_from(["weather", "now"]),
        st.dictionaries(st.text(max_size=5), st.text() | st.integers(-9, 9), max_size=3).map(json.dumps),
        st.uuids().map(lambda uuid: f"call_{uuid.hex}"),
    ),
    max_size=3,
)


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    calls = draw(CALLS)
    said: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if draw(st.booleans()):
        said["reasoning_content"] = draw(st.text(min_size=1))
    finish = "tool_calls" if calls else draw(st.sampled_from(["stop", "length", "content_filter"]))
    text = draw(st.none() | st.text(min_size=1)) if calls else draw(st.text())
    prompt, output = draw(st.integers(1, 10**6)), draw(st.integers(0, 10**6))
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": draw(st.integers(0, prompt))},
        "completion_tokens_details": {"reasoning_tokens": draw(st.integers(0, output))},
    }
    return chats.completion(text, finish_reason=finish, usage=usage, **said)


@given(completions())
def test_there_and_back_nothing_is_lost(reply: dict[str, Any]) -> None:
    """OpenAI's reply as Anthropic's as OpenAI's: text, thoughts, tool calls, finish reason and usage are the same."""
    there = reader(**THINKING).plain(200, json.dumps(reply).encode())
    back = json.loads(chat_as_messages.Reader("b", lambda: 1.0).plain(200, there))
    before, after = reply["choices"][0], back["choices"][0]
    assert after["finish_reason"] == before["finish_reason"]
    assert back["usage"] == reply["usage"]
    assert (after["message"]["content"] or "") == (before["message"]["content"] or "")
    assert after["message"].get("tool_calls") == before["message"].get("tool_calls")
    assert after["message"].get("reasoning_content") == before["message"].get("reasoning_content")


@given(completions(), st.integers(1, 9), st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(0, 9999), max_size=5))
def test_streams_there_and_back(reply: dict[str, Any], piece: int, newline: str, cuts: list[int]) -> None:
    there = translated(chats.stream(reply, piece, newline), tuple(cuts), **THINKING)
    as_whole = whole(reply, **THINKING)
    told = gathered(there)
    assert told.pop("stopped")
    assert told == as_whole
    into = chat_as_messages.Reader("b", lambda: 1.0)
    back = chats.gathered(into.feed(there) + into.rest())
    before = chats.gathered(chats.stream(reply, piece))
    assert {**back, "calls": _parsed(back)} == {**before, "calls": _parsed(before)}


def _parsed(told: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(call["id"], call["name"], json.loads(call["arguments"])) for call in told["calls"]]


def test_a_stream_split_at_every_byte_says_the_same() -> None:
    calls = [chats.call("f", '{"a": "ö"}'), chats.call("g", "{}", "call_2")]
    reply = chats.completion("åäö ✓", finish_reason="tool_calls", reasoning_content="hm ✓", tool_calls=calls)
    for newline in ("\n", "\r\n"):
        data = chats.stream(reply, 2, newline)
        expected = translated(data, **THINKING)
        assert all(translated(data, (cut,), **THINKING) == expected for cut in range(len(data)))
        assert translated(data, tuple(range(len(data))), **THINKING) == expected


def test_a_stream_may_end_without_done() -> None:
    data = chats.stream(chats.completion())
    assert gathered(translated(data.removesuffix(b"data: [DONE]\n\n")))["stopped"]
    assert gathered(translated(data.removesuffix(b"\n")))["stopped"]


def test_a_stream_that_stops_in_the_middle_is_a_fault() -> None:
    data = chats.stream(chats.completion())
    into = reader()
    assert into.feed(data[: data.index(b'finish_reason": "stop')].rpartition(b"\n\n")[0] + b"\n\n")
    with pytest.raises(BadReply, match="in the middle"):
        into.rest()
    with pytest.raises(BadReply, match="before its first event"):
        reader().feed(b"data: [DONE]\n\n")


def test_an_error_in_a_stream_is_raised_after_what_came_before_it() -> None:
    data = chats.stream(chats.completion())
    failed = b'data: {"error":{"message":"out of memory","code":500}}\n\n'
    into = reader()
    assert into.feed(data[: data.index(b"\n\n") + 2] + failed)
    with pytest.raises(BackendRejected, match="out of memory"):
        into.rest()
    with pytest.raises(BackendRejected, match="out of memory"):
        reader().feed(failed)


def chunk(*calls: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"tool_calls": calls}}]}).encode()


def test_a_call_may_lack_its_id_and_come_in_odd_pieces() -> None:
    """Results are matched by the id, so that one is made; the name may come late."""
    data = (
        chunk({"index": 0, "function": {"arguments": "{"}})
        + chunk({"index": 0, "function": {"name": "f", "arguments": "}"}}, {"index": 1, "function": {"name": "g"}})
        + b'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    )
    content = gathered(translated(data))["content"]
    assert [(block["name"], block["input"]) for block in content] == [("f", {}), ("g", {})]
    assert len({block["id"] for block in content}) == 2


def test_azures_first_chunk_has_no_id_and_no_choices() -> None:
    filters = b'data: {"choices":[],"id":"","model":"","object":"","prompt_filter_results":[]}\n\n'
    data = chats.stream(chats.completion())
    assert translated(filters + data) == translated(data)


def test_mixed_pieces_of_calls_are_a_fault() -> None:
    into = reader()
    into.feed(chunk({"index": 0, "function": {"name": "f"}}, {"index": 1, "function": {"name": "g"}}))
    with pytest.raises(BadReply, match="mixed"):
        into.feed(chunk({"index": 0, "function": {"arguments": "{}"}}))


def test_arguments_that_are_no_object() -> None:
    calls = [chats.call("f", '{"a": ')]
    with pytest.raises(BadReply, match="arguments"):
        whole(chats.completion(None, finish_reason="tool_calls", tool_calls=calls))
    assert whole(chats.completion(None, finish_reason="length", tool_calls=calls))["content"][0]["input"] == {}


@pytest.mark.parametrize("body", [b"{}", b'{"choices":[]}', b"[]", b"nonsense", b'{"choices":[{"index":0}]}'])
def test_a_reply_of_something_else_is_a_fault(body: bytes) -> None:
    with pytest.raises(BadReply):
        reader().plain(200, body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (429, "rate_limit_error"), (500, "api_error")],
)
def test_errors(status: int, kind: str) -> None:
    told = json.loads(reader().plain(status, b'{"error":{"message":"said so","type":"t","code":"c"}}'))
    assert told == {"type": "error", "error": {"type": kind, "message": "said so"}}


def test_errors_of_odd_shapes() -> None:
    assert json.loads(reader().plain(500, b'{"error":"said so"}'))["error"]["message"] == "said so"
    assert json.loads(reader().plain(500, b'{"detail":[]}'))["error"]["message"] == "the backend answered 500"
    assert reader().plain(502, b"<html>") == b"<html>"
