"""The official OpenAI client, unchanged, through front, core, router and pool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from llm_router.testing import Gate, Hold, ScriptedBackend, Stall, framed, json_reply, reply, stream_head
from support.gateway import Gateway, table
from support.wait import until

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "one two three"}]
TEXT = "Hello from the scripted backend."


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
def gateway(backend: ScriptedBackend) -> Iterator[Gateway]:
    with Gateway(table(backend.base_url)) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend) -> None:
    completion = client.chat.completions.create(model="m", messages=MESSAGES)
    assert completion.choices[0].message.content == TEXT
    assert backend.requests[0].json()["model"] == "scripted"
    record = gateway.record()
    assert (record.outcome, record.status, record.model, record.strategy) == ("success", 200, "m", "round-robin")
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (3, 6, "provider")
    assert [(attempt.backend, attempt.outcome) for attempt in record.attempts] == [("b0", "success")]


def test_streaming_hides_the_usage_that_only_we_asked_for(
    client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend
) -> None:
    chunks = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert all(chunk.usage is None for chunk in chunks)
    assert backend.requests[0].json()["stream_options"] == {"include_usage": True}
    record = gateway.record()
    assert (record.outcome, record.output_tokens, record.usage_source) == ("success", 6, "provider")
    assert record.first_token_at >= record.started_at


def test_a_caller_that_asks_for_usage_gets_it(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_completions_and_embeddings(client: openai.OpenAI, gateway: Gateway) -> None:
    assert client.completions.create(model="m", prompt="one two").choices[0].text == TEXT
    streamed = client.completions.create(model="m", prompt="one two", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == TEXT
    vectors = client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    assert [len(item.embedding) for item in vectors.data] == [8, 8]
    assert {record.route for record in gateway.records(3)} == {"/v1/completions", "/v1/embeddings"}


def test_tools_response_format_and_vendor_fields_pass_untouched(
    client: openai.OpenAI, backend: ScriptedBackend
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
    backend.script(
        json_reply({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
    )
    tool: ChatCompletionFunctionToolParam = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object"}},
    }
    completion = client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        tools=[tool],
        response_format={"type": "json_object"},
        extra_body={"mirostat": 2, "nested": {"model": "inner"}},
    )
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    sent = backend.requests[0].json()
    assert (sent["tools"], sent["response_format"]) == ([tool], {"type": "json_object"})
    assert (sent["mirostat"], sent["nested"]) == (2, {"model": "inner"})


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").owned_by == "llm-router"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("n")


def test_an_unknown_model_is_not_found_and_close_names_are_suggested(gateway: Gateway, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'm'") as refused:
        client.chat.completions.create(model="mm", messages=MESSAGES)
    assert refused.value.code == "model_not_found"
    record = gateway.record()
    assert (record.is_inference, record.model, record.strategy, record.outcome) == (
        True,
        "__other__",
        "__other__",
        "error",
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_the_backends_errors_are_the_clients_own_classes(
    status: int, kind: type[openai.APIStatusError], client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend
) -> None:
    backend.always(json_reply({"error": {"message": "said so", "type": "t", "code": "c"}}, status))
    with pytest.raises(kind, match="said so") as failed:
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert failed.value.request_id
    assert failed.value.response.headers["x-llm-router-backend"] == "b0"
    record = gateway.record()
    assert (record.outcome, record.status) == ("error", status)
    expected = "caller" if status < 429 else "provider"
    assert {attempt.outcome for attempt in record.attempts} == {expected}


def test_a_client_timeout_closes_the_upstream(gateway: Gateway, backend: ScriptedBackend) -> None:
    backend.always(Stall())
    with (
        openai.OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0, timeout=0.3) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(model="m", messages=MESSAGES)
    backend.wait(lambda b: b.connections[0].closed_by == "client")
    record = gateway.record()
    assert (record.outcome, record.status, record.error_type) == ("cancelled", 499, "client_gone")
    assert record.attempts[0].outcome == "cancelled"


def test_leaving_a_stream_closes_the_upstream_and_counts_what_was_generated(
    client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend
) -> None:
    event = b'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
    backend.script(stream_head(), framed(event), framed(event), framed(event), Stall())
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(3)] == ["w"] * 3
    stream.close()
    backend.wait(lambda b: b.connections[0].closed_by == "client")
    record = gateway.record()
    assert (record.outcome, record.usage_source, record.output_tokens) == ("cancelled", "partial", 3)


def test_cancelling_the_async_client_closes_the_upstream(gateway: Gateway, backend: ScriptedBackend) -> None:
    gate = Gate()
    backend.always(Hold(gate), json_reply({}))

    async def cancel_midway() -> None:
        async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
            asking = asyncio.create_task(client.chat.completions.create(model="m", messages=MESSAGES))
            await backend.until(lambda b: b.requests)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(cancel_midway())
    backend.wait(lambda b: b.connections[0].closed_by == "client")
    assert gateway.record().outcome == "cancelled"


def test_an_error_in_mid_stream_is_an_error_for_the_client(
    client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend
) -> None:
    event = b'data: {"id":"x","object":"chat.completion.chunk","created":0,"model":"m","choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
    from llm_router.testing import Reset

    backend.script(stream_head(), framed(event), Reset())
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert next(stream).choices[0].delta.content == "w"
    with pytest.raises(openai.APIError, match="b0"):
        next(stream)
    record = gateway.record()
    assert (record.outcome, record.usage_source, record.output_tokens) == ("error", "partial", 1)
    assert record.attempts[0].outcome == "network"


def test_generate_answers_in_its_envelope(gateway: Gateway, backend: ScriptedBackend) -> None:
    answer = gateway.request(
        "POST", "/api/generate", {"prompt": "one two", "options": {"maxTokens": 2}}, x_request_id="abc-1"
    )
    body = answer.json()
    assert body["success"] is True
    assert body["data"]["text"] == "Hello from"
    assert body["data"]["tokens"] == 2
    assert body["data"]["model"] == "m"
    assert body["data"]["cached"] is False
    assert body["data"]["strategy"] == "round-robin"
    assert body["data"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert body["metadata"]["request_id"] == "abc-1"
    assert body["metadata"]["duration"] >= body["data"]["latency"] > 0
    assert backend.requests[0].json()["max_tokens"] == 2
    assert gateway.record().output_tokens == 2


def test_generate_fails_in_its_envelope(gateway: Gateway, backend: ScriptedBackend) -> None:
    backend.always(json_reply({"error": {"message": "too long"}}, 400))
    answer = gateway.request("POST", "/api/generate", {"prompt": "x"}, x_request_id="abc-2")
    assert answer.status == 400
    assert answer.json() == {"success": False, "error": "backend 'b0': too long", "request_id": "abc-2"}
    assert gateway.record().outcome == "error"


def test_every_inference_reply_says_where_it_went(gateway: Gateway, backend: ScriptedBackend) -> None:
    plain = gateway.chat()
    streamed = gateway.chat(stream=True)
    backend.always(reply(b"<html>", 502, "text/html"))
    failed = gateway.chat()
    unknown = gateway.chat(model="nope")
    for answer, model, backend_name, attempts in (
        (plain, "m", "b0", 1),
        (streamed, "m", "b0", 1),
        (failed, "m", "b0", 3),
        (unknown, "__other__", "none", 0),
    ):
        headers = answer.headers
        assert headers["x-llm-router-model"] == model
        assert headers["x-llm-router-backend"] == backend_name
        assert headers["x-llm-router-attempts"] == str(attempts)
        assert headers["x-llm-router-strategy"] in ("round-robin", "__other__")
        assert float(headers["x-llm-router-overhead-ms"]) >= 0
        assert headers["x-request-id"]


def test_a_request_id_is_taken_if_it_is_well_formed(gateway: Gateway, backend: ScriptedBackend) -> None:
    given = gateway.request("GET", "/v1/models", x_request_id="Ab9._-")
    assert given.headers["x-request-id"] == "Ab9._-"
    for bad in ("with space", "x" * 129, "ünïcode".encode("latin-1").decode("latin-1")):
        made = gateway.request("GET", "/v1/models", x_request_id=bad)
        assert made.headers["x-request-id"] != bad
    answer = gateway.request("POST", "/v1/chat/completions", {"model": "m", "messages": []}, x_request_id="to-upstream")
    assert answer.status == 200
    assert backend.requests[0].headers["x-request-id"] == "to-upstream"


def test_the_callers_key_and_cookies_stay_with_us(gateway: Gateway, backend: ScriptedBackend) -> None:
    gateway.request(
        "POST",
        "/v1/chat/completions",
        {"model": "m", "messages": []},
        authorization="Bearer sk-caller",
        cookie="a=b",
    )
    assert "authorization" not in backend.requests[0].headers
    assert "cookie" not in backend.requests[0].headers


def test_a_drained_stream_gives_its_connection_back(
    client: openai.OpenAI, gateway: Gateway, backend: ScriptedBackend
) -> None:
    for _ in range(3):
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    gateway.records(3)
    until(lambda: len(backend.connections) == 1, what="one upstream connection for three streams")
