"""What makes two requests the same to the cache, and which are looked up at all."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.cache.key import (
    IGNORED_FIELDS,
    MOST_BYTES,
    OFF,
    ON,
    REFRESH,
    USUAL,
    Fingerprints,
    Wish,
    cache_key,
    cache_wish,
)
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest
from llm_router.gateway import openai
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RoutingTable
from support.fuzz import examples

BODY: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Grüße"}, {"type": "text", "text": "?"}], "name": "a"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a":1}'}}]},
    ],
    "temperature": 0,
    "max_tokens": 10,
    "n": 1,
    "user": "u",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}}],
}


def compact(value: Any) -> bytes:
    return msgspec.json.encode(value)


def request(body: bytes, endpoint: Endpoint = Endpoint.CHAT, **fields: Any) -> InferenceRequest:
    return msgspec.structs.replace(InferenceRequest(endpoint, "m", body, (0, 0)), **fields)


def key(body: bytes | dict[str, Any], *, asked: bool = False, **fields: Any) -> bytes | None:
    return cache_key(request(body if isinstance(body, bytes) else compact(body), **fields), b"f" * 16, asked=asked)


# -- what is looked up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (b"0", b"0.0", b"-0.0", b"0e5", b"1e-999"))
def test_an_explicit_temperature_of_zero_is_looked_up(temperature: bytes) -> None:
    """However it is spelled."""
    assert key(b'{"messages":[],"temperature":%b}' % temperature)


@pytest.mark.parametrize("temperature", (b"0.7", b"1", b"null", b"false", b'"0"', b"[0]", b"1e-300"))
def test_another_temperature_is_not(temperature: bytes) -> None:
    """Nor what only looks like a number."""
    assert key(b'{"messages":[],"temperature":%b}' % temperature) is None


def test_without_a_temperature_nothing_is_looked_up() -> None:
    """Nobody knows the backend's own."""
    assert key({"messages": []}) is None
    assert key({"messages": [{"role": "user", "content": 'the "temperature": 0'}]}) is None
    assert key({"messages": [], "options": {"temperature": 0}}) is None


def test_embeddings_are_always_looked_up() -> None:
    """They have no temperature."""
    assert key({"input": "a"}, endpoint=Endpoint.EMBEDDING)


@pytest.mark.parametrize("endpoint", tuple(Endpoint))
def test_who_asks_is_looked_up(endpoint: Endpoint) -> None:
    """Whatever the temperature."""
    assert key({"messages": [], "temperature": 1}, endpoint=endpoint, asked=True)


@pytest.mark.parametrize(
    "field",
    (
        {"web_search_options": {}},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": ["nonsense"]},
        {"mcp_servers": [{"url": "https://example.com"}]},
        {"plugins": [{"id": "web"}]},
    ),
)
def test_what_looks_at_the_world_is_looked_up_only_when_asked(field: Any) -> None:
    """A search gives another answer tomorrow, at any temperature."""
    assert key({**BODY, **field}) is None
    assert key({**BODY, **field}, asked=True)


def test_tools_of_the_caller_are_no_hindrance() -> None:
    """Neither OpenAI's nor Anthropic's."""
    assert key({**BODY, "tools": [{"name": "f", "input_schema": {}}, {"type": "custom", "custom": {}}]})


def test_a_long_body_is_looked_up_only_when_asked() -> None:
    """Its key would hold up the others."""
    long = compact({**BODY, "prompt": "x" * MOST_BYTES})
    assert key(long) is None
    assert key(long, asked=True)


@pytest.mark.parametrize(
    "body",
    (
        b'{"temperature":0,"temperature":0}',
        b'{"temperature":0, "temperature":1}',
        b'{"temperature":1,"temperature":0}',
        b'{"temperature":0,"messages":[{"role":"user","content":"a","content":"b"}]}',
        b'{"temperature":0,"messages":[{"role":"user","content":"a","\\u0063ontent":"b"}]}',
        b'{"temperature":0,"a":1e5,"a":100000.0}',
    ),
)
def test_a_repeated_key_is_never_looked_up(body: Any) -> None:
    """A backend may read the other one: its answer would be left for whoever asks the question of this one."""
    assert key(body) is None
    assert key(body, asked=True) is None


@pytest.mark.parametrize(
    "body",
    (
        b"",
        b"[]",
        b'{"temperature":0',
        b'{"temperature":0,"a":"\\ud800"}',
        b'{"temperature":0,"a":"\xff"}',
        b'{"temperature":0,"a":NaN}',
        b'{"temperature":0,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ),
)
def test_what_cannot_be_read_is_not_looked_up(body: Any) -> None:
    """It is the backend's to refuse."""
    assert key(body) is None
    assert key(body, asked=True) is None


def test_nesting_that_can_just_be_read_raises_nothing() -> None:
    """What the decoder bears, the encoder may not."""
    for depth in range(50, 1500, 10):
        body = b'{"temperature":0,"messages":' + b"[" * depth + b"]" * depth + b"}"
        assert key(body) is None or len(key(body) or b"") == 32


# -- what is the same -------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e6, 1e6) | st.text(max_size=8)
names = st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant"]),
            "content": st.text(max_size=10) | st.lists(values, max_size=3),
        },
        optional={"name": names, "tool_calls": values},
    ),
    max_size=4,
)
bodies = st.fixed_dictionaries(
    {"messages": messages, "temperature": st.just(0)},
    optional={"max_tokens": st.integers(1, 100), "stop": values, "response_format": values, "user": names, "": values},
)


def escaped(letter: str) -> str:
    """Each UTF-16 unit as \\uXXXX."""
    units = letter.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def spelled(value: Any, chance: random.Random, level: str = "body") -> str:
    """The value as JSON in one of its spellings that count as the same."""
    space = chance.choice(("", "", " ", "\n\t", " \r\n "))
    if isinstance(value, dict):
        pairs = list(value.items())
        if level in {"body", "message", "part"}:
            chance.shuffle(pairs)
        below = {"body": "top", "message": "of message"}.get(level, "deep")
        inner = [
            f"{space}{spelled(name, chance)}{space}:{space}"
            + spelled(item, chance, {("top", "messages"): "messages", ("of message", "content"): "content"}.get(
                (below, name), "deep"
            ))
            for name, item in pairs
        ]  # fmt: skip
        return "{" + f"{space},".join(inner) + space + "}"
    if isinstance(value, list):
        below = {"messages": "message", "content": "part"}.get(level, "deep")
        return "[" + f"{space},{space}".join(spelled(item, chance, below) for item in value) + space + "]"
    if isinstance(value, str):
        return '"' + "".join(escaped(c) if chance.random() < 0.3 else json.dumps(c)[1:-1] for c in value) + '"'
    if type(value) is float and chance.random() < 0.5:
        return f"{value:.17e}"
    return json.dumps(value)


@given(body=bodies, seed=st.integers(0, 2**32))
@settings(max_examples=examples(300))
def test_spelling_does_not_matter(body: Any, seed: int) -> None:
    """White space, escapes, ways to write a number, the order of fields in the body, in messages and their parts."""
    chance = random.Random(seed)
    expected = key(body)
    written = spelled(body, chance)
    if '"temperature"' in written:  # whoever escapes its letters is not cached
        assert key(written.encode()) == expected
    assert key(written.encode(), asked=True) == expected


def changes(value: Any) -> list[Any]:
    """Values that differ from `value` in one place."""
    if isinstance(value, dict):
        less = [{k: v for k, v in value.items() if k != name} for name in value]
        inside = [{**value, name: changed} for name, item in value.items() for changed in changes(item)]
        turned = [dict(reversed(value.items()))] if len(value) > 1 else []
        return [*less, *inside, *turned, {**value, "another": None}, list(value.items())]
    if isinstance(value, list):
        shorter = [value[:at] + value[at + 1 :] for at in range(len(value))]
        within = [
            [*value[:at], changed, *value[at + 1 :]] for at, item in enumerate(value) for changed in changes(item)
        ]
        return [*shorter, *within, *([value[::-1]] if value != value[::-1] else []), [*value, None], {}]
    if value is None or isinstance(value, bool):
        return [not value, 0, "null"]
    if isinstance(value, str):
        return [value + " ", value + "\u0301", [value], None]
    return [value + 1, value - 1, str(value), None]


def items(value: dict[str, Any]) -> list[str]:
    return sorted(map(repr, value.items()))


@given(field=values, content=st.lists(values, max_size=3))
@settings(max_examples=examples(100))
def test_any_other_difference_matters(field: Any, content: list[Any]) -> None:
    """In any value of any field, the order of fields further in included."""
    body = {"response_format": field, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    expected = key(body)
    assert expected is not None
    for changed in changes(field):
        assert key({**body, "response_format": changed}) != expected
    for position, part in enumerate(content):
        for changed in changes(part):
            other = [*content[:position], changed, *content[position + 1 :]]
            if isinstance(part, dict) and isinstance(changed, dict) and items(part) == items(changed):
                continue  # the same fields of a part in another order
            assert key({**body, "messages": [{"role": "user", "content": other}]}) != expected


@pytest.mark.parametrize(
    "change",
    (
        {"n": 2},
        {"user": "v"},
        {"seed": 1},
        {"max_tokens": 11},
        {"max_tokens": 10.0},
        {"max_tokens": None},
        {"temperature": 0.0},
        {"stop": ["a"]},
        {"metadata": {"a": "b"}},
        {"stream_options": {"include_usage": True}},
        {"tools": [{**BODY["tools"][0], "function": {"name": "f", "parameters": {"properties": {"b": {}, "a": {}}}}}]},
        {"messages": BODY["messages"][:2]},
        {"messages": [BODY["messages"][0], BODY["messages"][0], BODY["messages"][2]]},
        {"messages": BODY["messages"][::-1]},
        {"unknown": 0},
        {"Temperature": 1},
    ),
)
def test_these_fields_matter(change: dict[str, Any]) -> None:
    """`user` too: behind an API of this form there may be an agent that knows its users."""
    assert key({**BODY, **change}) not in {None, key(BODY)}


@pytest.mark.parametrize("field", sorted(IGNORED_FIELDS))
def test_these_fields_do_not_matter(field: Any) -> None:
    """Whether they are there, and what they say."""
    assert (
        key({**BODY, field: "x"}) == key({**BODY, field: False}) == key({k: v for k, v in BODY.items() if k != field})
    )


def test_what_the_request_says_matters() -> None:
    """Every field of it but those that speak of its way and not of its answer: a new one has to be thought about here."""
    others: dict[str, Any] = {
        "endpoint": Endpoint.MESSAGES,
        "model": "other",
        "stream": True,
        "wants_usage": True,
        "strategy": "quality-first",
        "headers": ((b"anthropic-beta", b"x"),),
    }
    irrelevant = {
        "body",
        "fields",
        "model_span",
        "asks_usage",
        "priority",
        "key",
    }  # the body's fields are looked at above
    assert others.keys() | irrelevant == set(InferenceRequest.__struct_fields__)
    keys = {key(BODY, **{name: value}) for name, value in others.items()} | {key(BODY)}
    assert len(keys) == len(others) + 1
    assert key(BODY, model_span=(3, 4), asks_usage=True, priority="batch", key="k") == key(BODY)


def test_what_serves_the_model_and_who_owns_the_answer_matter() -> None:
    """Neither can be taken for the other."""
    asked = request(compact(BODY))
    keys = {cache_key(asked, fingerprint, owner) for fingerprint in (b"", b"a", b"b") for owner in ("", "a", "b")}
    assert len(keys) == 9


@pytest.mark.parametrize(
    "body", (b'{"model":"m","messages":[],"temperature":0}', b'{ "temperature":0,"messages":[],"model":"m"}')
)
def test_requests_as_the_gateway_reads_them(body: Any) -> None:
    """With and without `"stream": false`, compact or not."""
    read = openai.read_request(Endpoint.CHAT, body)
    told = openai.read_request(Endpoint.CHAT, body[:-1] + b',"stream":false}')
    streamed = openai.read_request(Endpoint.CHAT, body[:-1] + b',"stream":true}')
    usage = openai.read_request(Endpoint.CHAT, body[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}')
    hidden = openai.read_request(Endpoint.CHAT, body[:-1] + b',"stream":true,"stream_options":{"include_usage":false}}')
    first, *others = [cache_key(asked, b"") for asked in (read, told, streamed, usage, hidden)]
    assert first == others[0]
    assert len({first, *others}) == 4
    assert first is not None


# -- what serves a model ----------------------------------------------------------------------------------

TABLE = RoutingTable(
    models=(
        ModelSpec(name="m", deployments=(Deployment("a", "up"), Deployment("b", "up"))),
        ModelSpec(name="other", deployments=(Deployment("b", "x"),)),
    ),
    backends=(
        BackendSpec(name="a", url="http://a/v1", api_key="secret", headers={"X": "1"}),
        BackendSpec(name="b", url="http://b/v1"),
    ),
)
replace = msgspec.structs.replace


def with_backend(**changes: Any) -> RoutingTable:
    return replace(TABLE, backends=(replace(TABLE.backends[0], **changes), TABLE.backends[1]))


def with_model(**changes: Any) -> RoutingTable:
    return replace(TABLE, models=(replace(TABLE.models[0], **changes), TABLE.models[1]))


@pytest.mark.parametrize(
    "table",
    (
        with_backend(url="http://c/v1"),
        with_backend(protocol="anthropic"),
        with_backend(query="api-version=2"),
        with_backend(headers={"X": "2"}),
        with_backend(stream_usage=False),
        with_model(deployments=(Deployment("a", "up"), Deployment("b", "newer"))),
        with_model(deployments=(Deployment("a", "up"),)),
        with_model(strategy="quality-first"),
        replace(TABLE, strategy="random"),
    ),
)
def test_what_may_change_answers_changes_the_fingerprint(table: RoutingTable) -> None:
    """An answer of what served the model before is not given any more."""
    before, after = Fingerprints(TABLE), Fingerprints(table)
    assert before.of("m") != after.of("m")
    assert len(after.of("m")) == 16


@pytest.mark.parametrize(
    "table",
    (
        with_backend(api_key="rotated"),
        with_backend(ready=False, max_connections=1, total_s=1.0),
        with_backend(headers={"x": "1"}),
        with_model(deployments=TABLE.models[0].deployments[::-1]),
        with_model(deployments=(Deployment("a", "up", quality=0.5), Deployment("b", "up"))),
        with_model(fallbacks=("other",), strategy="balanced"),
        replace(TABLE, models=TABLE.models[:1]),
    ),
)
def test_what_cannot_change_answers_does_not_change_the_fingerprint(table: RoutingTable) -> None:
    """A rotated key, a restart, another order: what is kept stays good."""
    assert Fingerprints(TABLE).of("m") == Fingerprints(table).of("m")


def test_fingerprints_of_models() -> None:
    """Each has its own, and unknown names take no room."""
    fingerprints = Fingerprints(TABLE)
    assert fingerprints.of("m") == fingerprints.of("m") != fingerprints.of("other")
    assert fingerprints.of("unknown") == b""
    assert set(fingerprints._known) == {"m", "other"}


def test_the_custom_function_is_a_part_of_the_fingerprint() -> None:
    """Where it is, that is; for models which use it."""
    first, second = (replace(TABLE, strategy="custom", custom=where) for where in ("a:f", "b:f"))
    assert Fingerprints(first).of("m") != Fingerprints(second).of("m")


# -- what the caller wishes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "wish"),
    (
        ({}, USUAL),
        ({b"x-llm-router-cache": b"on"}, ON),
        ({b"x-llm-router-cache": b" OFF "}, OFF),
        ({b"x-llm-router-cache": b"refresh"}, REFRESH),
        ({b"cache-control": b"no-store"}, OFF),
        ({b"cache-control": b"max-age=60, No-Store"}, OFF),
        ({b"x-llm-router-cache": b"on", b"cache-control": b"no-store"}, OFF),
        ({b"cache-control": b"no-cache"}, Wish(read=False, write=True, asked=False)),
        ({b"cache-control": b"max-age=0"}, Wish(read=False, write=True, asked=False)),
        ({b"x-llm-router-cache": b"on", b"cache-control": b"no-cache"}, REFRESH),
        ({b"x-llm-router-cache": b"off", b"cache-control": b"no-cache"}, OFF),
        ({b"cache-control": b"max-age=60"}, USUAL),
        ({b"cache-control": b""}, USUAL),
    ),
)
def test_wishes(headers: dict[bytes, bytes], wish: Wish) -> None:
    """The stricter one counts."""
    assert cache_wish(headers) == wish


@pytest.mark.parametrize("value", (b"", b"yes", b"on, off", b"\xff"))
def test_an_unknown_wish_is_refused(value: bytes) -> None:
    """With the header, the value and the way out."""
    with pytest.raises(InvalidRequest, match="x-llm-router-cache is on, off or refresh, not ") as caught:
        cache_wish({b"x-llm-router-cache": value})
    assert caught.value.param == "x-llm-router-cache"


@pytest.mark.parametrize("temperature", (0, 0.0, -0.0, 1, 0.7, None, False, "0", 1e-9))
def test_the_temperature_that_was_read_already_says_the_same(temperature: Any) -> None:
    """A request that comes with its fields has the key that its bytes have."""
    body = compact({**BODY, "temperature": temperature})
    read = openai.read_request(Endpoint.CHAT, body)
    assert read.fields is not None
    bare = msgspec.structs.replace(read, fields=None)
    assert cache_key(read, b"f") == cache_key(bare, b"f")
    assert (cache_key(read, b"f") is not None) == (type(temperature) in (int, float) and temperature == 0)
