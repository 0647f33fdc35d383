"""What a server of OpenAI's chat completions sends, by its public protocol: completions, streams of chunks, errors."""

from __future__ import annotations

import json
from typing import Any

USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 7,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
TEXT = "Hello from the scripted model."


def call(name: str, arguments: str, id: str = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def completion(
    content: str | None = TEXT, *, finish_reason: str = "stop", usage: dict[str, Any] | None = USAGE, **said: Any
) -> dict[str, Any]:
    """A whole reply; `said` are more fields of its message."""
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, **said},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
    }
    return reply if usage is None else {**reply, "usage": usage}


def chunks(reply: dict[str, Any], piece: int = 5) -> list[dict[str, Any]]:
    """The chunks of a stream that says the same as a whole reply, with its usage in one of its own."""
    choice = reply["choices"][0]
    said = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for field in ("reasoning_content", "content", "refusal"):
        text = said.get(field) or ""
        deltas += [{field: text[at : at + piece]} for at in range(0, len(text), piece)]
    for index, made in enumerate(said.get("tool_calls") or ()):
        function = made["function"]
        start = {**made, "index": index, "function": {"name": function["name"], "arguments": ""}}
        deltas.append({"tool_calls": [start]})
        arguments = function["arguments"]
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": arguments[at : at + piece]}}]}
            for at in range(0, len(arguments), piece)
        ]
    common = {**{key: reply[key] for key in ("id", "created", "model")}, "object": "chat.completion.chunk"}
    told = [{**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    told.append({**common, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if "usage" in reply:
        told.append({**common, "choices": [], "usage": reply["usage"]})
    return told


def stream(reply: dict[str, Any], piece: int = 5, newline: str = "\n") -> bytes:
    """The same as bytes."""
    lines = [json.dumps(chunk) for chunk in chunks(reply, piece)]
    return "".join(f"data: {line}{newline}{newline}" for line in (*lines, "[DONE]")).encode()


def gathered(data: bytes) -> dict[str, Any]:
    """What a client makes of a stream: text, thoughts, tool calls, finish reason, usage, and whether it ended."""
    told: dict[str, Any] = {"text": "", "thoughts": "", "calls": [], "finish": None, "usage": None, "done": False}
    for line in data.splitlines():
        if line == b"data: [DONE]":
            told["done"] = True
        elif line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            told["usage"] = chunk.get("usage") or told["usage"]
            for choice in chunk["choices"]:
                delta = choice["delta"]
                told["text"] += delta.get("content") or ""
                told["thoughts"] += delta.get("reasoning_content") or ""
                for piece in delta.get("tool_calls") or ():
                    _add(told["calls"], piece)
                told["finish"] = choice["finish_reason"] or told["finish"]
    return told


def _add(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    if piece["index"] == len(calls):
        calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
    calls[piece["index"]]["arguments"] += piece["function"].get("arguments") or ""
