"""Prompts and completions in the shape of OpenTelemetry's GenAI conventions; only where the operator asked for them.

A message is `{"role": ..., "parts": [{"type": "text", "content": ...}, ...]}`, in a JSON list in one text. Read from what callers sent
and got: OpenAI's chat and completions, Anthropic's messages, `/api/generate`, plain or as events. Images and sounds are named, not kept.
Secrets are taken out of texts by what they look like; what is too long is cut. Not for: deciding whether content is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from llm_router.observe.logs.redact import clean

TEXT_CHARS: Final = 8192
"""Of each part."""

MAX_PARTS: Final = 64
"""Of a prompt: the last ones, which are the newest; of an answer, the first ones."""

_MAX_BODY_BYTES: Final = 1024 * 1024
"""A larger body is not read: that would hold up what else the process does for milliseconds."""


def input_messages(body: bytes) -> str:
    """The messages in the body of a request; empty if it has none that we can read."""
    asked = _decoded(body)
    if not isinstance(asked, dict):
        return ""
    messages: list[dict[str, Any]] = []
    system = asked.get("system", asked.get("system_prompt"))
    if system:
        messages.append({"role": "system", "parts": list(_parts(system))})
    given = asked.get("messages")
    if isinstance(given, list):
        messages += [_message(message) for message in given[-MAX_PARTS:] if isinstance(message, dict)]
    elif "prompt" in asked:
        messages.append({"role": "user", "parts": list(_parts(asked["prompt"]))})
    return _encoded(messages)


def output_messages(body: bytes | bytearray) -> str:
    """The messages in a reply, whole or as events; empty if it has none that we can read."""
    if body.lstrip()[:1] == b"{":
        reply = _decoded(body)
        return _encoded(list(_said(reply))) if isinstance(reply, dict) else ""
    return _encoded(_streamed(body))


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """One of OpenAI's or Anthropic's, asked or answered."""
    parts = list(_parts(message.get("content")))
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        for call in calls[:MAX_PARTS]:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                parts.append(_call(call.get("id"), function.get("name"), function.get("arguments")))
    return {"role": _text(message.get("role", "user"))[:32], "parts": parts[-MAX_PARTS:]}


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        yield {"type": "text", "content": _text(content)}
        return
    if not isinstance(content, list):
        return
    for part in content[-MAX_PARTS:]:
        if isinstance(part, str):
            yield {"type": "text", "content": _text(part)}
        elif isinstance(part, dict):
            type = part.get("type")
            if type == "tool_use":
                yield _call(part.get("id"), part.get("name"), part.get("input"))
            elif type == "tool_result":
                said = " ".join(_texts(part.get("content")))
                yield {"type": "tool_call_response", "id": _text(part.get("tool_use_id", "")), "response": _text(said)}
            elif isinstance(part.get("text"), str):
                yield {"type": "text", "content": _text(part["text"])}
            else:
                yield {"type": _text(type or "unknown")[:32]}


def _texts(content: Any) -> Iterator[str]:
    for part in _parts(content):
        if "content" in part:
            yield part["content"]


def _call(id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    return {"type": "tool_call", "id": _text(id or ""), "name": _text(name or ""), "arguments": _text(arguments)}


def _said(reply: dict[str, Any]) -> Iterator[dict[str, Any]]:
    choices = reply.get("choices")
    if isinstance(choices, list):
        for choice in choices[:MAX_PARTS]:
            if isinstance(choice, dict):
                message = choice.get("message")
                if not isinstance(message, dict):
                    message = {"content": choice.get("text")}
                yield _answer(_message({"role": "assistant", **message}), choice.get("finish_reason"))
    elif reply.get("type") == "message":
        yield _answer(_message({"role": "assistant", "content": reply.get("content")}), reply.get("stop_reason"))
    else:
        said = reply.get("text", reply.get("response"))
        if isinstance(said, str):
            yield _answer(_message({"role": "assistant", "content": said}), None)


def _answer(message: dict[str, Any], finish_reason: Any) -> dict[str, Any]:
    return {**message, "finish_reason": _text(finish_reason)[:32]} if isinstance(finish_reason, str) else message


def _streamed(body: bytes | bytearray) -> list[dict[str, Any]]:
    """The text of the first choice, put together from its events, as far as they came."""
    if len(body) > _MAX_BODY_BYTES:
        return []
    texts: list[str] = []
    finish_reason: Any = None
    for line in body.splitlines():
        if not line.startswith(b"data:"):
            continue
        event = _decoded(line[5:])
        if not isinstance(event, dict):
            continue
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            choice = choices[0]
            delta = choice.get("delta")
            said = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            finish_reason = choice.get("finish_reason") or finish_reason
        else:
            delta = event.get("delta")
            said = delta.get("text") if isinstance(delta, dict) else None
            finish_reason = (delta.get("stop_reason") if isinstance(delta, dict) else None) or finish_reason
        if isinstance(said, str):
            texts.append(said)
    if not texts:
        return []
    return [_answer(_message({"role": "assistant", "content": "".join(texts)}), finish_reason)]


def _decoded(body: bytes | bytearray) -> Any:
    if not body or len(body) > _MAX_BODY_BYTES:
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _encoded(messages: list[dict[str, Any]]) -> str:
    return msgspec.json.encode(messages).decode() if messages else ""


def _text(value: Any) -> str:
    return clean(value if isinstance(value, str) else str(value), TEXT_CHARS, keep_lines=True)
