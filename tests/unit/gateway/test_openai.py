"""Reading callers' bodies: what routing takes from them, and what is refused."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.chat import Endpoint
from llm_router.errors import InvalidRequest, ModelNotFound
from llm_router.gateway.openai import error_object, read_request

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def test_the_span_of_the_model_is_its_json_string() -> None:
    request = read_request(Endpoint.CHAT, chat(model="gpt-4"))
    start, end = request.model_span
    assert request.body[start:end] == b'"gpt-4"'


@given(
    extra=st.dictionaries(st.text().filter(lambda key: key != "model"), JSON_VALUES, max_size=5),
    name=st.text(min_size=1),
)
def test_replacing_the_span_changes_the_model_and_nothing_else(extra: dict[str, Any], name: str) -> None:
    """Whatever else the body holds, nested and quoted `model` keys included."""
    for key in ("stream", "stream_options"):
        extra.pop(key, None)
    extra["nested"] = {"model": "inner", "text": '"model":"quoted"'}
    for ascii_only, separators in product((True, False), ((",", ":"), (", ", ": "))):
        fields = {**extra, "messages": [], "model": name}
        body = json.dumps(fields, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass")
        try:
            request = read_request(Endpoint.CHAT, body)
        except InvalidRequest:
            # A lone surrogate is no Unicode text: refusing it is right, changing it would not be.
            assert any(0xD800 <= ord(c) <= 0xDFFF for c in json.dumps(fields, ensure_ascii=False))
            continue
        start, end = request.model_span
        spliced = request.body[:start] + b'"other"' + request.body[end:]
        assert json.loads(spliced) == {**fields, "model": "other"}


def test_an_untouched_body_is_forwarded_byte_for_byte() -> None:
    body = b' { "messages" : [ ] ,\n "vendor_field": 1e3, "model" :  "m" } '
    request = read_request(Endpoint.CHAT, body)
    assert request.body is body
    start, end = request.model_span
    assert body[start:end] == b'"m"'


@pytest.mark.parametrize("key", ["model", "mod\\u0065l", "\\u006dodel"])
@pytest.mark.parametrize("space", [b"", b" "])
def test_two_model_keys_are_refused_however_they_are_written(key: str, space: bytes) -> None:
    body = b'{"messages":[],"model":%b"cheap","%b":"dear"}' % (space, key.encode())
    with pytest.raises(InvalidRequest, match="two `model` keys"):
        read_request(Endpoint.CHAT, body)


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"", "invalid_json", "JSON"),
        (b"{", "invalid_json", "JSON"),
        (b"[]", "invalid_type", "object"),
        (b'"text"', "invalid_type", "object"),
        (b'{"model":"m"}', "invalid_type", "messages"),
        (b'{"messages":[]}', "missing_model", "model"),
        (b'{"messages":[],"model":""}', "missing_model", "model"),
        (b'{"messages":[],"model":null}', "missing_model", "model"),
        (b'{"messages":[],"model":5}', "invalid_type", "model"),
        (b'{"messages":"hi","model":"m"}', "invalid_type", "messages"),
        (b'{"messages":[],"model":"m","stream":"yes"}', "invalid_type", "stream"),
        (b'{"messages":[],"model":"m","stream_options":3}', "invalid_type", "stream_options"),
        (b'{"messages":' + b"[" * 500_000 + b"]" * 500_000 + b',"model":"m"}', "invalid_json", "deep"),
        (b"\xff\xfe", "invalid_json", "JSON"),
    ],
)
def test_bad_bodies_are_refused_by_name(body: bytes, code: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_request(Endpoint.CHAT, body)
    assert refused.value.code == code
    assert refused.value.status == 400
    assert says in refused.value.message


def test_a_caller_that_asks_for_usage_keeps_it() -> None:
    request = read_request(Endpoint.CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert (request.wants_usage, request.asks_usage) == (True, True)


def test_a_caller_that_declines_usage_does_not_hide_it_from_us() -> None:
    request = read_request(Endpoint.CHAT, chat(stream=True, stream_options={"include_usage": False, "vendor": 1}))
    assert (request.wants_usage, request.asks_usage) == (False, True)
    assert json.loads(request.body)["stream_options"] == {"include_usage": True, "vendor": 1}
    start, end = request.model_span
    assert request.body[start:end] == b'"m"'


def test_each_endpoint_names_the_field_it_needs() -> None:
    for endpoint, field in (
        (Endpoint.CHAT, "messages"),
        (Endpoint.COMPLETION, "prompt"),
        (Endpoint.EMBEDDING, "input"),
        (Endpoint.MESSAGES, "messages"),
    ):
        with pytest.raises(InvalidRequest, match=field):
            read_request(endpoint, b'{"model":"m"}')


@pytest.mark.parametrize("space", [b"", b" "])
def test_a_strategy_is_for_us_and_no_backend_sees_it(space: bytes) -> None:
    body = b'{"messages":[],%b"strategy":"cost-optimized","model":"m","x":{"strategy":1}}' % space
    request = read_request(Endpoint.CHAT, body)
    assert request.strategy == "cost-optimized"
    assert json.loads(request.body) == {"messages": [], "model": "m", "x": {"strategy": 1}}
    start, end = request.model_span
    assert request.body[start:end] == b'"m"'
    request = read_request(Endpoint.CHAT, chat(strategy=None))
    assert (request.strategy, "strategy" in json.loads(request.body)) == (None, False)


@pytest.mark.parametrize(("strategy", "says"), [("best", "quality-first"), (5, "strategy"), (["random"], "strategy")])
def test_a_strategy_that_does_not_exist_is_refused(strategy: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        read_request(Endpoint.CHAT, chat(strategy=strategy))
    assert refused.value.param == "strategy"


def test_the_error_object_is_the_one_clients_parse() -> None:
    error = json.loads(error_object(ModelNotFound("model 'x' does not exist"), "req-1"))["error"]
    assert error == {
        "message": "model 'x' does not exist",
        "type": "not_found_error",
        "param": None,
        "code": "model_not_found",
        "request_id": "req-1",
    }


@given(
    st.sampled_from(
        (
            b'{"model":"m","messages":[],"stream":true,"stream_options":{"a":1},"x":"y"}',
            b'{ "messages": [], "m\\u006fdel": "m", "x": {"model": "n"} }',
        )
    ),
    st.integers(0, 80),
    st.integers(0, 3),
    st.binary(max_size=4),
)
def test_a_damaged_body_is_the_callers_fault_or_none(body: bytes, at: int, lost: int, put: bytes) -> None:
    """Whatever the bytes: text that is not UTF-8 too."""
    damaged = body[:at] + put + body[at + lost :]
    try:
        request = read_request(Endpoint.CHAT, damaged)
    except InvalidRequest as error:
        assert error.message
    else:
        start, end = request.model_span
        assert json.loads(request.body[start:end]) == request.model
