"""The caller's side of the OpenAI protocol: reading request bodies, error objects, the model list.

A body is decoded once, into the few fields that routing needs; everything else stays as it came.
Not for: talking to backends (backends) or serving (core.py).
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest, RequestError, RouterError
from llm_router.routing.table import ModelSpec, RoutingTable

_MODEL_KEY = b'"model"'
_ESCAPED_LETTER = b"\\u006"  # every letter of "model" is \u006x when escaped: no encoder does, an attacker may
_SPACE = b" \t\r\n"


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Chat(msgspec.Struct):
    messages: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Completion(msgspec.Struct):
    prompt: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Embedding(msgspec.Struct):
    input: msgspec.Raw
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


_DECODERS: dict[Endpoint, Any] = {
    Endpoint.CHAT: msgspec.json.Decoder(_Chat).decode,
    Endpoint.COMPLETION: msgspec.json.Decoder(_Completion).decode,
    Endpoint.EMBEDDING: msgspec.json.Decoder(_Embedding).decode,
}
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def read_request(endpoint: Endpoint, body: bytes) -> InferenceRequest:
    """What routing needs of a caller's body.

    Raises: InvalidRequest that names the field, when the body is no JSON object, lacks a field that the endpoint
        needs, has one of the wrong type, or has two top-level `model` keys.
    """
    try:
        fields = _DECODERS[endpoint](body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(*_explain(error), code="invalid_type") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None
    if endpoint is Endpoint.CHAT and memoryview(fields.messages)[0] != 0x5B:  # "["
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
    span = _model_span(body, model)
    if span is None or (stream and options is not None and not wants_usage):
        body, span = _rewrite(body, ask_usage=stream and options is not None)
        asks_usage = stream and options is not None
    return InferenceRequest(endpoint, model, body, span, stream, wants_usage, asks_usage)


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
    """The same object with `model` in front, so that its place is known; other values stay as they came.

    Raises: InvalidRequest for two top-level `model` keys: the backend might read the other one.
    """
    top: list[tuple[str, Any]] = []

    def remember(pairs: list[tuple[str, Any]]) -> None:
        top[:] = pairs  # the outermost object is closed last

    try:
        json.loads(body, object_pairs_hook=remember)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if sum(key == "model" for key, _ in top) > 1:
        raise InvalidRequest("the body has two `model` keys; send one", code="duplicate_model", param="model")
    fields = _decode_object(body)
    model = bytes(fields.pop("model"))
    if ask_usage:
        options = msgspec.json.decode(fields.pop("stream_options"), type=dict[str, Any])
        fields["stream_options"] = msgspec.Raw(_encode({**options, "include_usage": True}))
    head = b'{"model":' + model
    rest = _encode(fields)
    start = len(b'{"model":')
    return head + (b"," + rest[1:] if fields else b"}"), (start, start + len(model))


def _explain(error: msgspec.ValidationError) -> tuple[str]:
    """msgspec's own text names type and path (`Expected `str`, got `int` - at `$.model``); the path is made ours."""
    text = str(error)
    if text.startswith("Object missing required field"):
        field = text.split("`")[1]
        return (f"the body lacks the field {field!r}",)
    return (text.replace("$.", "").replace("`$`", "the body"),)


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


def model_list(table: RoutingTable) -> bytes:
    """The body of `GET /v1/models`."""
    return _encode({"object": "list", "data": [model_object(model) for model in table.models]})
