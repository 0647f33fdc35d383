"""The caller's side of the OpenAI protocol: reading request bodies, error objects, the model list.

A body is decoded once, into the few fields that routing needs; everything else stays as it came. Bodies of Anthropic's
form are read here too (by way of anthropic.py): what routing needs stands in the same place.
Not for: talking to backends (backends) or serving (core.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import msgspec

from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest, RequestError, RouterError
from llm_router.routing.table import STRATEGIES, ModelSpec

_MODEL_KEY = b'"model"'
_ESCAPED_LETTER = b"\\u006"  # every letter of "model" is \u006x when escaped: no encoder does, an attacker may
_SPACE = b" \t\r\n"
_QUOTE = 0x22
_BRACKET = 0x5B
_NEEDED = {
    Endpoint.CHAT: "messages",
    Endpoint.COMPLETION: "prompt",
    Endpoint.EMBEDDING: "input",
    Endpoint.MESSAGES: "messages",
}


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Chat(msgspec.Struct):
    messages: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    strategy: str | msgspec.UnsetType | None = msgspec.UNSET


class _Messages(msgspec.Struct):
    messages: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    strategy: str | msgspec.UnsetType | None = msgspec.UNSET
    stream_options: ClassVar[_StreamOptions | None] = None  # there is no such thing: a field of that name just passes


class _Completion(msgspec.Struct):
    prompt: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    strategy: str | msgspec.UnsetType | None = msgspec.UNSET


class _Embedding(msgspec.Struct):
    input: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    strategy: str | msgspec.UnsetType | None = msgspec.UNSET


_DECODERS: dict[Endpoint, Any] = {
    Endpoint.CHAT: msgspec.json.Decoder(_Chat).decode,
    Endpoint.COMPLETION: msgspec.json.Decoder(_Completion).decode,
    Endpoint.EMBEDDING: msgspec.json.Decoder(_Embedding).decode,
    Endpoint.MESSAGES: msgspec.json.Decoder(_Messages).decode,
}
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def read_request(endpoint: Endpoint, body: bytes) -> InferenceRequest:
    """What routing needs of a caller's body.

    A top-level `strategy` is meant for us: no backend gets it.

    Raises: InvalidRequest that names the field, when the body is no JSON object, lacks a field that the endpoint
        needs, has one of the wrong type, names no strategy there is, or has two top-level `model` keys.
    """
    return _read_compact(endpoint, body) or _read_any(endpoint, body)


def _read_compact(endpoint: Endpoint, body: bytes) -> InferenceRequest | None:
    """The request in a body without white space between its top-level parts, as most clients write it; else None.

    Half the cost of `_read_any`, and as exact: every top-level pair is `"key":value` and one byte of punctuation. A
    second `model` key, an escaped key or white space would make the body longer than that, and nothing makes it shorter.
    """
    try:
        fields = _decode_object(body)
    except NOT_JSON:
        return None  # the other way has the better message
    at = 1
    start = end = 0
    for key, value in fields.items():
        at += len(key) + 3
        if key == "model":
            start = at
            end = at = at + len(memoryview(value))
        else:
            at += len(memoryview(value))
        at += 1
    model = body[start + 1 : end - 1]
    if at != len(body) or not model or b"\\" in model or body[start] != _QUOTE:
        return None
    if "stream_options" in fields or "strategy" in fields:
        return None
    field = _NEEDED[endpoint]
    needed = fields.get(field)
    if needed is None or (field == "messages" and memoryview(needed)[0] != _BRACKET):
        return None
    stream = bytes(fields.get("stream", b"false"))
    if stream not in (b"false", b"true"):
        return None
    try:
        name = model.decode()
    except UnicodeDecodeError:
        return None
    return InferenceRequest(endpoint, name, body, (start, end), stream == b"true", fields=fields)


def _read_any(endpoint: Endpoint, body: bytes) -> InferenceRequest:
    try:
        fields = _DECODERS[endpoint](body)
    except NOT_JSON as error:
        raise unreadable(error) from None
    if _NEEDED[endpoint] == "messages" and memoryview(fields.messages)[0] != _BRACKET:
        raise InvalidRequest("messages must be an array", code="invalid_type", param="messages")
    model = fields.model
    if not model:
        raise InvalidRequest(
            "the body names no model: add a `model` field; GET /v1/models lists the names",
            code="missing_model",
            param="model",
        )
    stream = bool(fields.stream)
    options = fields.stream_options
    if not stream or options is None:
        wants_usage = asks_usage = False
    else:
        wants_usage = asks_usage = bool(options.include_usage)
    strategy = fields.strategy
    span = _model_span(body, model)
    if span is None or strategy is not msgspec.UNSET or (stream and options is not None and not wants_usage):
        body, span = _rewrite(body, ask_usage=stream and options is not None)
        asks_usage = stream and options is not None
    request = InferenceRequest(endpoint, model, body, span, stream, wants_usage, asks_usage)
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise InvalidRequest(
                f"there is no strategy {strategy[:40]!r}: it is one of {', '.join(STRATEGIES)}",
                code="unknown_strategy",
                param="strategy",
            )
        request.strategy = strategy
    return request


def _model_span(body: bytes, model: str) -> tuple[int, int] | None:
    """Where the value of the top-level `model` key stands; None when a look at the bytes cannot tell.

    The decoder found a top-level model. If its key stands literally and once in the body, no other place can be
    meant: inside a string the quotes would be escaped.
    """
    if body.count(_MODEL_KEY) != 1 or _ESCAPED_LETTER in body:
        return None
    at = body.index(_MODEL_KEY) + len(_MODEL_KEY)
    while body[at] in _SPACE:
        at += 1
    if body[at] != 0x3A:  # ":"
        return None
    at += 1
    while body[at] in _SPACE:
        at += 1
    value = b'"%s"' % model.encode()
    end = at + len(value)
    return (at, end) if body[at:end] == value else None


def _rewrite(body: bytes, *, ask_usage: bool) -> tuple[bytes, tuple[int, int]]:
    """The same object with `model` in front, so that its place is known, and without `strategy`; other values stay.

    Raises: InvalidRequest for two top-level `model` keys: the backend might read the other one.
    """
    top: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        top[:] = pairs  # the outermost object is closed last

    try:
        json.loads(body, object_pairs_hook=remember)
        fields = _decode_object(body)
    except (ValueError, *NOT_JSON) as error:
        raise unreadable(error) from None
    if sum(key == "model" for key, _ in top) > 1:
        raise InvalidRequest("the body has two `model` keys; send one", code="duplicate_model", param="model")
    model = bytes(fields.pop("model"))
    fields.pop("strategy", None)
    if ask_usage:
        options = _decode_object(fields.pop("stream_options"))
        fields["stream_options"] = msgspec.Raw(_encode({**options, "include_usage": msgspec.Raw(b"true")}))
    head = b'{"model":' + model
    rest = _encode(fields)
    start = len(b'{"model":')
    return head + (b"," + rest[1:] if fields else b"}"), (start, start + len(model))


def unreadable(error: Exception) -> InvalidRequest:
    """The caller's view of a body that could not be decoded (`NOT_JSON`), naming the field if one is at fault."""
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        # msgspec names type and path (Expected `str`, got `int` - at `$.model`); the path is made ours.
        if text.startswith("Object missing required field"):
            field = text.split("`")[1]
            return InvalidRequest(f"the body lacks the field {field!r}", code="invalid_type", param=field)
        message, _, path = text.partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        if not path:
            return InvalidRequest(f"the body is of the wrong type: {message}", code="invalid_type")
        return InvalidRequest(f"{message} - at `{path}`", code="invalid_type", param=path)
    if isinstance(error, RecursionError):
        return InvalidRequest("the body is nested too deeply", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return InvalidRequest(
            f"the body is not valid JSON: a text in it is not UTF-8 ({error.reason})", code="invalid_json"
        )
    return InvalidRequest(f"the body is not valid JSON: {text}", code="invalid_json")


# -- what callers get -------------------------------------------------------------------------------

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def error_object(error: RouterError, request_id: str) -> bytes:
    """The error as OpenAI's clients expect it, with our code and the request's id. UTF-8 JSON."""
    kind = _TYPES.get(error.status) or ("invalid_request_error" if isinstance(error, RequestError) else "api_error")
    return _encode(
        {
            "error": {
                "message": error.message,
                "type": kind,
                "param": getattr(error, "param", None),
                "code": error.code,
                "request_id": request_id,
            }
        }
    )


def model_object(model: ModelSpec) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": model.owned_by}


def model_list(models: Iterable[ModelSpec]) -> bytes:
    """The body of `GET /v1/models`."""
    return _encode({"object": "list", "data": [model_object(model) for model in models]})
