"""`POST /api/generate`: one prompt in, one text out, in the envelope of the monitoring examples.

Turns the call into a chat request and its reply back. Not for: routing it (core.py does, as any other).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest
from llm_router.errors import BadReply, InvalidRequest
from llm_router.gateway.openai import read_request, unreadable

_HUMP = re.compile(r"(?<=[a-z0-9])([A-Z])")
_RENAMED = {"stop_sequences": "stop", "max_new_tokens": "max_tokens", "num_predict": "max_tokens"}
_OURS = ("model", "system", "system_prompt", "stream")


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    options: dict[str, Any] = {}


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0


class _Reply(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode
_encode = msgspec.json.Encoder().encode


def snake_name(name: str) -> str:
    """`max_tokens` of `maxTokens`; a name in snake_case as it is."""
    return _HUMP.sub(r"_\1", name).lower()


def snake_case(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under OpenAI's names: `maxTokens`, `stopSequences` and the like become `max_tokens` and `stop`."""
    named = {snake_name(key): value for key, value in options.items()}
    for old, new in _RENAMED.items():
        if old in named:
            named.setdefault(new, named.pop(old))
    return named


def chat_body(prompt: str, options: dict[str, Any], default_model: str) -> bytes:
    """The chat request for a prompt. Option names may be camelCase (`maxTokens`) or snake_case.

    Raises: InvalidRequest when no model is named and there is no default, or a stream is wanted.
    """
    named = snake_case(options)
    if named.get("stream"):
        raise InvalidRequest(
            "/api/generate answers whole; for a stream use POST /v1/chat/completions",
            code="unsupported",
            param="options.stream",
        )
    model = named.get("model") or default_model
    if not isinstance(model, str) or not model:
        raise InvalidRequest(
            "no model: name one in `options.model`, or configure one", code="missing_model", param="options.model"
        )
    system = named.get("system") or named.get("system_prompt")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    rest = {key: value for key, value in named.items() if key not in _OURS}
    return _encode({"model": model, "messages": messages, **rest})


def read_generate(body: bytes, default_model: str) -> InferenceRequest:
    """The chat request that a body of `/api/generate` stands for.

    Raises: InvalidRequest, naming the field.
    """
    try:
        call = _decode_body(body)
        chat = chat_body(call.prompt, call.options, default_model)
    except NOT_JSON as error:
        problem = unreadable(error)
        if isinstance(error, msgspec.ValidationError):
            problem = InvalidRequest(
                f"{problem}; the body is {{prompt, options}}", code=problem.code, param=problem.param
            )
        raise problem from None
    return read_request(Endpoint.CHAT, chat)


class Generated(msgspec.Struct, frozen=True):
    """The result of one inference: text and what it took. `latency` is in milliseconds, as in the examples."""

    text: str
    tokens: int
    model: str
    latency: float
    cached: bool
    strategy: str
    usage: dict[str, int]


def generated(
    body: bytes, backend: str, *, model: str, strategy: str, latency_ms: float, cached: bool = False
) -> Generated:
    """The result in a chat reply.

    Raises: BadReply when it holds no message.
    """
    try:
        reply = _decode_reply(body)
        text = reply.choices[0].message.content or ""
    except (*NOT_JSON, IndexError) as error:
        raise BadReply(backend, f"its chat reply holds no message: {error}") from error
    usage = reply.usage or _Usage()
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return Generated(
        text=text,
        tokens=completion,
        model=model,
        latency=round(latency_ms, 3),
        cached=cached,
        strategy=strategy,
        usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    )


def success(result: Generated, request_id: str, duration_ms: float) -> bytes:
    return _encode(
        {
            "success": True,
            "data": result,
            "metadata": {"request_id": request_id, "duration": round(duration_ms, 3)},
        }
    )


def failure(message: str, request_id: str) -> bytes:
    return _encode({"success": False, "error": message, "request_id": request_id})
