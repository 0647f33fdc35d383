"""The official clients of both protocols, unchanged, through the whole gateway to servers of both protocols."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic as anthropic_sdk
import openai
import pytest
from anthropic.types import Message, MessageParam, ToolParam
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolUnionParam

from llm_router.testing import Reset, ScriptedBackend, framed, json_reply, stream_head
from support import anthropic, chats
from support.gateway import Gateway, table

HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
SAY_HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
TOOL: ToolParam = {"name": "weather", "input_schema": {"type": "object"}}
FUNCTION: ChatCompletionToolUnionParam = {"type": "function", "function": {"name": "weather"}}
CALLS = [chats.call("weather", '{"city":"Oslo"}'), chats.call("now", "{}", "call_2")]
USES = [anthropic.tool_use("weather", {"city": "Oslo"}), anthropic.tool_use("now", {}, "toolu_2")]


@pytest.fixture
def server() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as server:
        yield server


@pytest.fixture
def openai_gateway(server: ScriptedBackend) -> Iterator[Gateway]:
    """In front of a server of OpenAI's protocol."""
    with Gateway(table(server.base_url)) as gateway:
        yield gateway


@pytest.fixture
def anthropic_gateway(server: ScriptedBackend) -> Iterator[Gateway]:
    """In front of a server of Anthropic's protocol."""
    with Gateway(table(server.base_url, protocol="anthropic", auth="x-api-key", api_key="sk-upstream")) as gateway:
        yield gateway


@pytest.fixture(params=["openai", "anthropic"])
def either(request: pytest.FixtureRequest) -> tuple[str, Gateway]:
    gateway = request.getfixturevalue(f"{request.param}_gateway")
    assert isinstance(gateway, Gateway)
    return request.param, gateway


def claude(gateway: Gateway) -> anthropic_sdk.Anthropic:
    base_url = gateway.base_url.removesuffix("/v1")
    return anthropic_sdk.Anthropic(base_url=base_url, api_key="any", max_retries=0)


def gpt(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0)


def says(server: ScriptedBackend, protocol: str, *, tools: bool = False, stream: bool = False) -> None:
    """Make the server answer, in its protocol: with a text, or with two calls of tools."""
    if protocol == "openai":
        whole = chats.completion(None, finish_reason="tool_calls", tool_calls=CALLS) if tools else chats.completion()
        data = chats.stream(whole)
    else:
        whole = anthropic.message(*USES, stop_reason="tool_use") if tools else anthropic.message()
        data = anthropic.stream(whole)
    if stream:
        pieces = [framed(data[at : at + 11]) for at in range(0, len(data), 11)]
        server.script(stream_head(), *pieces, framed(b""))
    else:
        server.script(json_reply(whole))


# -- Anthropic's client -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_claudes_client_gets_a_text(either: tuple[str, Gateway], server: ScriptedBackend, stream: bool) -> None:
    protocol, gateway = either
    says(server, protocol, stream=stream)
    with claude(gateway) as client:
        if stream:
            with client.messages.stream(model="m", max_tokens=9, messages=HI) as told:
                assert "".join(told.text_stream) == anthropic.TEXT
                message: Message = told.get_final_message()
        else:
            message = client.messages.create(model="m", max_tokens=9, messages=HI, system="be brief")
    assert message.content[0].type == "text"
    assert (message.content[0].text, message.stop_reason) == (anthropic.TEXT, "end_turn")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0) == 10
    assert (usage.output_tokens, usage.cache_read_input_tokens) == (7, 3)
    record = gateway.record()
    assert (record.outcome, record.route, record.usage_source) == ("success", "/v1/messages", "provider")
    assert (record.input_tokens, record.output_tokens) == (10, 7)
    assert (record.cached_tokens, record.reasoning_tokens) == (3, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_claudes_client_gets_tool_calls(either: tuple[str, Gateway], server: ScriptedBackend, stream: bool) -> None:
    protocol, gateway = either
    says(server, protocol, tools=True, stream=stream)
    with claude(gateway) as client:
        if stream:
            with client.messages.stream(model="m", max_tokens=9, messages=HI, tools=[TOOL]) as told:
                message: Message = told.get_final_message()
        else:
            message = client.messages.create(model="m", max_tokens=9, messages=HI, tools=[TOOL])
    assert message.stop_reason == "tool_use"
    assert [(use.name, use.input) for use in message.content if use.type == "tool_use"] == [
        ("weather", {"city": "Oslo"}),
        ("now", {}),
    ]
    sent = server.requests[0].json()["tools"][0]
    assert (sent["name"] if protocol == "anthropic" else sent["function"]["name"]) == "weather"


def test_what_claudes_client_says_reaches_its_own_server_as_it_came(
    anthropic_gateway: Gateway, server: ScriptedBackend
) -> None:
    """Whatever comes next in the protocol, its beta headers included; the caller's key does not."""
    says(server, "anthropic")
    cached = {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}
    with claude(anthropic_gateway) as client:
        client.messages.create(
            model="m",
            max_tokens=9,
            messages=HI,
            system=[cached],  # type: ignore[list-item]
            extra_body={"a_field_to_come": {"x": 1}},
            extra_headers={"anthropic-beta": "something-2099"},
        )
    sent = server.requests[0]
    assert (sent.target, sent.headers["x-api-key"]) == ("/v1/messages", "sk-upstream")
    version = client.default_headers["anthropic-version"]
    assert (sent.headers["anthropic-beta"], sent.headers["anthropic-version"]) == ("something-2099", version)
    assert (sent.json()["system"], sent.json()["a_field_to_come"]) == ([cached], {"x": 1})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic_sdk.BadRequestError),
        (401, anthropic_sdk.AuthenticationError),
        (429, anthropic_sdk.RateLimitError),
        (500, anthropic_sdk.InternalServerError),
    ],
)
def test_errors_are_the_classes_of_claudes_client(
    either: tuple[str, Gateway],
    server: ScriptedBackend,
    status: int,
    kind: type[anthropic_sdk.APIStatusError],
) -> None:
    protocol, gateway = either
    error = {"error": {"message": "said so", "type": "t"}} if protocol == "openai" else anthropic.error("api_error")
    server.always(json_reply(error, status))
    with claude(gateway) as client, pytest.raises(kind, match="said so") as failed:
        client.messages.create(model="m", max_tokens=9, messages=HI)
    assert failed.value.type is not None
    with claude(gateway) as client, pytest.raises(anthropic_sdk.NotFoundError, match="does not exist") as unknown:
        client.messages.create(model="nope", max_tokens=9, messages=HI)
    assert unknown.value.type == "not_found_error"


def test_a_broken_stream_is_an_error_for_claudes_client(either: tuple[str, Gateway], server: ScriptedBackend) -> None:
    protocol, gateway = either
    whole = chats.stream(chats.completion()) if protocol == "openai" else anthropic.stream(anthropic.message())
    server.script(stream_head(), framed(whole[: len(whole) // 2]), Reset())
    with (
        claude(gateway) as client,
        pytest.raises(anthropic_sdk.APIStatusError, match="b0"),
        client.messages.stream(model="m", max_tokens=9, messages=HI) as told,
    ):
        told.get_final_message()
    record = gateway.record()
    assert (record.outcome, record.usage_source) == ("error", "partial")


# -- OpenAI's client --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_gpts_client_gets_a_text_from_claudes_server(
    anthropic_gateway: Gateway, server: ScriptedBackend, stream: bool
) -> None:
    says(server, "anthropic", stream=stream)
    with gpt(anthropic_gateway) as client:
        if stream:
            with client.chat.completions.stream(
                model="m", messages=SAY_HI, stream_options={"include_usage": True}
            ) as told:
                completion: Any = told.get_final_completion()
        else:
            completion = client.chat.completions.create(model="m", messages=SAY_HI)
    choice = completion.choices[0]
    assert (choice.message.content, choice.finish_reason) == (anthropic.TEXT, "stop")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 7)
    assert completion.usage.prompt_tokens_details.cached_tokens == 3
    sent = server.requests[0]
    assert (sent.target, sent.json()["max_tokens"], sent.json()["model"]) == ("/v1/messages", 4096, "scripted")
    record = anthropic_gateway.record()
    assert (record.outcome, record.usage_source, record.cached_tokens) == ("success", "provider", 3)


def test_usage_of_claudes_stream_is_hidden_from_those_who_did_not_ask(
    anthropic_gateway: Gateway, server: ScriptedBackend
) -> None:
    says(server, "anthropic", stream=True)
    with gpt(anthropic_gateway) as client:
        chunks = list(client.chat.completions.create(model="m", messages=SAY_HI, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert anthropic_gateway.record().output_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_gpts_client_gets_tool_calls_from_claudes_server(
    anthropic_gateway: Gateway, server: ScriptedBackend, stream: bool
) -> None:
    says(server, "anthropic", tools=True, stream=stream)
    with gpt(anthropic_gateway) as client:
        if stream:
            with client.chat.completions.stream(model="m", messages=SAY_HI, tools=[FUNCTION]) as told:
                choice: Any = told.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(model="m", messages=SAY_HI, tools=[FUNCTION]).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("weather", {"city": "Oslo"}), ("now", {})]


def test_errors_of_claudes_server_are_the_classes_of_gpts_client(
    anthropic_gateway: Gateway, server: ScriptedBackend
) -> None:
    server.always(json_reply(anthropic.error("invalid_request_error", "max_tokens: too large"), 400))
    with gpt(anthropic_gateway) as client, pytest.raises(openai.BadRequestError, match="too large"):
        client.chat.completions.create(model="m", messages=SAY_HI)


def test_an_overload_in_claudes_stream_is_an_error_for_gpts_client(
    anthropic_gateway: Gateway, server: ScriptedBackend
) -> None:
    begun = b"".join(anthropic.event(value) for value in anthropic.events(anthropic.message())[:4])
    failed = anthropic.event(anthropic.error("overloaded_error", "Overloaded"))
    server.script(stream_head(), framed(begun), framed(failed), framed(b""))
    with gpt(anthropic_gateway) as client, pytest.raises(openai.APIError, match="Overloaded"):
        list(client.chat.completions.create(model="m", messages=SAY_HI, stream=True))
    assert anthropic_gateway.record().outcome == "error"


def test_an_overload_before_the_first_word_is_tried_again(anthropic_gateway: Gateway, server: ScriptedBackend) -> None:
    failed = anthropic.event(anthropic.error("overloaded_error", "Overloaded"))
    server.script(stream_head(), framed(failed), framed(b""))
    says(server, "anthropic", stream=True)
    with gpt(anthropic_gateway) as client:
        chunks = list(client.chat.completions.create(model="m", messages=SAY_HI, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == anthropic.TEXT
    assert len(anthropic_gateway.record().attempts) == 2
