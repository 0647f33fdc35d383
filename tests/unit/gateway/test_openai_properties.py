"""A caller's body is understood as any JSON reader would, or refused: written in any way, damaged in any way."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest
from llm_router.gateway.openai import read_request

SPACE = st.sampled_from(["", "", "", " ", "\n", "\t \r"])
KEYS = st.sampled_from(
    [
        "model",
        "mod\\u0065l",
        "messages",
        "prompt",
        "input",
        "stream",
        "n\\u00e9",
        "né",
        "models",
        "strategy",
        "str\\u0061tegy",
    ]
)
VALUES = st.sampled_from(
    [
        '"m"', '"gpt-4o"', '"random"', '"mod\\u0065l"', '"\\"model\\":\\"x\\""', '"né"', '""', "5", "1e3", "null", "true", "false",
        "[]", "[ ]", '[{"role":"user","content":"\\"model\\": \\"x\\""}]', '{"model":"inner"}', '{ "model" : "inner" }',
        '{"include_usage":true}', '{"include_usage":false,"vendor":[1, 2]}',
    ]
)  # fmt: skip
NEEDED = st.sampled_from(
    ['"messages":[]', '"model":"m"', '"messages": [ ]', '"model" : "m"', '"prompt":"x"', '"input":["x"]']
)


@st.composite
def bodies(draw: st.DrawFn) -> str:
    """Objects with keys that may repeat, be escaped, be spaced out, and hold what looks like other keys."""
    pair = st.builds(
        lambda key, value, *space: f'{space[0]}"{key}"{space[1]}:{space[2]}{value}{space[3]}',
        st.one_of(KEYS, st.just("stream_options")),
        VALUES,
        *[SPACE] * 4,
    )
    pairs = draw(st.lists(st.one_of(pair, NEEDED), max_size=6))
    return f"{draw(SPACE)}{{{','.join(pairs)}}}{draw(SPACE)}"


def understood(body: bytes) -> list[tuple[str, Any]]:
    """The top-level pairs as a plain reader sees them, bytes that are no UTF-8 kept apart."""
    top: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        top[:] = pairs
        return dict(pairs)

    json.loads(body.decode("utf-8", "surrogateescape"), object_pairs_hook=remember, strict=False)
    return top


def check(request: InferenceRequest, body: bytes) -> None:
    """What was read is what a plain reader reads, and the place of the model is its place."""
    pairs = understood(body)
    plain = dict(pairs)
    assert [value for key, value in pairs if key == "model"] == [request.model]
    assert request.stream is bool(plain.get("stream"))
    start, end = request.model_span
    assert json.loads(request.body[start:end]) == request.model
    spliced = dict(understood(request.body[:start] + b'"other"' + request.body[end:]))
    expected = {**plain, "model": "other"}
    assert "strategy" not in spliced
    assert request.strategy == expected.pop("strategy", None)
    if request.asks_usage:
        assert spliced.pop("stream_options")["include_usage"] is True
        assert bool(expected.pop("stream_options").get("include_usage")) is request.wants_usage
    assert spliced == expected
    if not request.asks_usage:
        assert request.body is body or request.body.startswith(b'{"model":')


@given(st.sampled_from(list(Endpoint)), bodies())
def test_a_body_is_understood_as_by_a_plain_reader(endpoint: Endpoint, text: str) -> None:
    """Or refused; a second `model` key is never passed over."""
    body = text.encode()
    try:
        request = read_request(endpoint, body)
    except InvalidRequest:
        return
    check(request, body)


@given(bodies(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=2)), max_size=3))
def test_a_damaged_body_is_understood_or_refused(text: str, edits: list[tuple[int, int, bytes]]) -> None:
    """No bytes make it fail in another way, or mean something else to us than to the backend."""
    body = text.encode()
    for place, gone, new in edits:
        at = place % (len(body) + 1)
        body = body[:at] + new + body[at + gone :]
    try:
        request = read_request(Endpoint.CHAT, body)
    except InvalidRequest:
        return
    check(request, body)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(body: bytes) -> None:
    """Or, should they ever be a request, understood."""
    for endpoint in Endpoint:
        try:
            request = read_request(endpoint, body)
        except InvalidRequest:
            continue
        check(request, body)
