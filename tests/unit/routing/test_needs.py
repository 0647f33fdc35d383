"""What a request needs, read off its bytes."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.chat import Endpoint, InferenceRequest
from llm_router.gateway.openai import read_request
from llm_router.routing.needs import (
    MEDIA_TOKENS,
    TYPICAL_OUTPUT_TOKENS,
    Need,
    estimate_input_tokens,
    estimate_tokens,
    need_of,
)
from llm_router.routing.table import CAPABILITIES

PICTURE = "data:image/png;base64," + base64.b64encode(bytes(300_000)).decode()


def raw(endpoint: Endpoint, body: bytes) -> InferenceRequest:
    return InferenceRequest(endpoint, "m", body, (0, 0))


def request(endpoint: Endpoint = Endpoint.CHAT, **fields: Any) -> InferenceRequest:
    return raw(endpoint, json.dumps({"model": "m", **fields}).encode())


def chat(content: Any = "hello", **fields: Any) -> InferenceRequest:
    return request(messages=[{"role": "user", "content": content}], **fields)


def messages(content: Any = "hello", **fields: Any) -> InferenceRequest:
    return request(Endpoint.MESSAGES, messages=[{"role": "user", "content": content}], **fields)


def test_text_is_four_bytes_a_token() -> None:
    """With little on top for roles."""
    need = need_of(chat("word " * 800))
    assert 1000 <= need.input_tokens <= 1015
    assert need.output_tokens == 0
    assert need.capabilities == frozenset()


@pytest.mark.parametrize(
    ("fields", "output_tokens"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_completion_tokens": 60}, 60),
        ({"max_tokens": 50, "max_completion_tokens": 60}, 60),
        ({"max_tokens": 50, "n": 3}, 150),
        ({"max_tokens": 50, "n": None}, 50),
        ({"max_tokens": None}, 0),
        ({"max_tokens": -5}, 0),
        ({"max_tokens": "50"}, 0),
        ({"max_tokens": 1.5}, 0),
        ({"max_tokens": [1]}, 0),
        ({"n": 3}, 0),
    ],
)
def test_the_answer_is_bounded_as_the_request_says(fields: dict[str, Any], output_tokens: int) -> None:
    """Of every answer that it asks for; what is no number is for the backend to refuse."""
    assert need_of(chat(**fields)).output_tokens == output_tokens


def test_a_limit_reserves_what_a_request_may_come_to() -> None:
    """Input and output; the usual length where the request does not bound it; no answer to embeddings."""
    bounded = chat("word " * 800, max_tokens=5000)
    assert estimate_tokens(bounded) == need_of(bounded).tokens == need_of(bounded).input_tokens + 5000
    assert estimate_tokens(chat("hi")) == estimate_input_tokens(chat("hi")) + TYPICAL_OUTPUT_TOKENS
    embedding = request(Endpoint.EMBEDDING, input="word " * 80, max_tokens=5000)
    assert estimate_tokens(embedding) == estimate_input_tokens(embedding) == need_of(embedding).tokens
    assert 100 <= estimate_tokens(embedding) <= 101


def test_no_number_is_beyond_reason() -> None:
    """Sums of estimates stay numbers that can be stored and sent."""
    assert estimate_tokens(raw(Endpoint.CHAT, b'{"messages":[],"n":99999,"max_tokens":%s}' % (b"9" * 19))) < 2**40
    assert need_of(raw(Endpoint.CHAT, b'{"messages":[],"max_tokens":%s}' % (b"9" * 5000))).output_tokens == 0


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        ((), chat()),
        ((), chat(tools=[], functions=None, response_format={"type": "text"}, reasoning_effort="none")),
        (("tools",), chat(tools=[{"type": "function", "function": {"name": "image"}}])),
        (("tools",), chat(functions=[{"name": "f"}])),
        (("json",), chat(response_format={"type": "json_object"})),
        (("json",), chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}})),
        (("json",), messages(output_config={"format": {"type": "json_schema", "schema": {}}})),
        ((), messages(output_config={"effort": "low"})),
        (("reasoning",), chat(reasoning_effort="low")),
        (("reasoning",), chat(reasoning={"effort": "high"})),
        (("reasoning",), messages(thinking={"type": "enabled", "budget_tokens": 2000})),
        (("reasoning",), messages(thinking={"type": "adaptive"})),
        ((), messages(thinking={"type": "disabled"})),
        (("vision",), chat([{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": PICTURE}}])),
        (("vision",), chat([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])),
        (
            ("vision",),
            messages([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}]),
        ),
        (
            ("vision",),
            messages(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "content": [{"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}],
                    }
                ]
            ),
        ),
        (("embeddings",), request(Endpoint.EMBEDDING, input="x")),
        (("json", "tools"), chat(tools=[{"type": "function"}], response_format={"type": "json_object"})),
    ],
)
def test_abilities_are_those_that_the_request_makes_use_of(wanted: tuple[str, ...], asked: InferenceRequest) -> None:
    """In the words of both protocols."""
    assert need_of(asked).capabilities == frozenset(wanted)
    assert set(wanted) <= set(CAPABILITIES)


@pytest.mark.parametrize("text", ['{"type":"image_url"}', "image_url", '"image"', "data:image/png;base64,AAAA"])
def test_what_a_text_speaks_of_is_no_image(text: str) -> None:
    """Only parts of messages are."""
    assert need_of(chat(text)).capabilities == frozenset()
    assert need_of(chat([{"type": "text", "text": text}])).capabilities == frozenset()
    assert need_of(chat([{"type": "text", "text": text}])).input_tokens < 40


def test_an_image_is_not_counted_by_its_bytes() -> None:
    """400 kB of Base64 are about a thousand tokens, not a hundred thousand; the text beside it is counted."""
    one = need_of(chat([{"type": "image_url", "image_url": {"url": PICTURE}}])).input_tokens
    assert MEDIA_TOKENS <= one < MEDIA_TOKENS + 30
    both = [{"type": "text", "text": "word " * 800}, *[{"type": "image_url", "image_url": {"url": PICTURE}}] * 2]
    assert 2 * MEDIA_TOKENS + 1000 <= need_of(chat(both)).input_tokens < 2 * MEDIA_TOKENS + 1060
    sound = [{"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}}]
    assert need_of(chat(sound)).input_tokens < MEDIA_TOKENS + 30
    assert need_of(chat(sound)).capabilities == frozenset()
    paper = [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PICTURE}}]
    assert need_of(messages(paper)).input_tokens < MEDIA_TOKENS + 30


def test_no_nesting_is_followed_for_long() -> None:
    """Each level reads what is below it once more: a few hundred levels of it would hold up everybody."""
    depth = 400
    text = b'[{"type":"tool_result","content":' * depth + b'[{"type":"image"}]' + b"}]" * depth
    body = raw(Endpoint.MESSAGES, b'{"messages":%s,"model":"m"}' % text)
    assert need_of(body).capabilities == frozenset()
    assert need_of(body).input_tokens > 100


@pytest.mark.parametrize(
    ("value", "tokens"),
    [("word " * 40, 51), (["word " * 40] * 2, 103), ([1, 2, 3, 4], 4), ([[1, 2], [3, 4, 5]], 5), ([], 0)],
)
def test_prompts_are_texts_or_tokens(value: Any, tokens: int) -> None:
    """One or several, for completions and embeddings."""
    assert abs(need_of(request(Endpoint.COMPLETION, prompt=value)).input_tokens - tokens) <= 1
    assert abs(need_of(request(Endpoint.EMBEDDING, input=value)).input_tokens - tokens) <= 1


def test_tools_and_system_prompts_are_input() -> None:
    """They are sent with every request of an agent, and are often the most of it."""
    tools = [{"type": "function", "function": {"name": "f", "description": "word " * 800}}]
    assert need_of(chat(tools=tools)).input_tokens > 1000
    assert need_of(messages(system="word " * 800)).input_tokens > 1000


@given(st.binary(max_size=200), st.sampled_from(list(Endpoint)))
def test_any_bytes_need_something(body: bytes, endpoint: Endpoint) -> None:
    """A need never fails: refusing a request is not its task."""
    asked = raw(endpoint, body)
    need = need_of(asked)
    assert isinstance(need, Need)
    assert estimate_tokens(asked) >= estimate_input_tokens(asked) == need.input_tokens >= 0


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=5),
        st.sampled_from(["image", "image_url", "base64", "input_audio", "tool_result"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "content", "text", "role", "image_url"]), inner, max_size=3),
    ),
    max_leaves=12,
)
fields_of_bodies = st.sampled_from(
    ["messages", "prompt", "input", "system", "tools", "max_tokens", "n", "response_format", "thinking", "reasoning"]
)


@given(st.dictionaries(fields_of_bodies, anything), st.sampled_from(list(Endpoint)))
def test_any_object_needs_something(fields: dict[str, Any], endpoint: Endpoint) -> None:
    """Fields of a wrong type are for the backend to refuse, with its own words."""
    asked = request(endpoint, **fields)
    need = need_of(asked)
    assert estimate_tokens(asked) >= need.input_tokens >= 0
    assert need.capabilities <= set(CAPABILITIES)


@pytest.mark.parametrize(
    "fields",
    (
        {"messages": [{"role": "user", "content": "a b c"}]},
        {
            "messages": [{"role": "user", "content": "x" * 500}],
            "max_tokens": 70,
            "n": 2,
            "tools": [{"type": "function"}],
        },
        {"messages": [], "max_completion_tokens": 5, "response_format": {"type": "json_object"}},
    ),
)
def test_what_was_read_already_is_not_read_again(fields: dict[str, Any]) -> None:
    """A request that comes with its fields needs what its bytes say."""
    body = msgspec.json.encode({"model": "m", **fields})
    read = read_request(Endpoint.CHAT, body)
    bare = InferenceRequest(Endpoint.CHAT, "m", body, read.model_span)
    assert read.fields is not None
    assert need_of(read) == need_of(bare)
    assert estimate_tokens(read) == estimate_tokens(bare)
    assert estimate_input_tokens(read) == estimate_input_tokens(bare)
