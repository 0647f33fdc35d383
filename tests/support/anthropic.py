"""What a server of Anthropic's Messages API sends, by its public protocol: messages, streams of events, errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

USAGE = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 2,
    "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 1},
    "cache_read_input_tokens": 3,
    "output_tokens": 7,
    "output_tokens_details": {"thinking_tokens": 4},
    "service_tier": "standard",
}
TEXT = "Hello from the scripted model."


def text(text: str = TEXT) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": "c2lnbmVk"}


def tool_use(name: str, tool_input: dict[str, Any], id: str = "toolu_1") -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": tool_input}


def message(*content: dict[str, Any], stop_reason: str = "end_turn", **fields: Any) -> dict[str, Any]:
    """A whole reply; without content it says `TEXT`."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-scripted",
        "content": list(content or (text(),)),
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": USAGE,
        **fields,
    }


def error(kind: str = "invalid_request_error", says: str = "said so") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": says}, "request_id": "req_1"}


def event(value: dict[str, Any], newline: str = "\n") -> bytes:
    return f"event: {value['type']}{newline}data: {json.dumps(value)}{newline}{newline}".encode()


def events(reply: dict[str, Any], piece: int = 5) -> list[dict[str, Any]]:
    """The events of a stream that says the same as a whole reply, in pieces of so many characters."""
    usage = reply["usage"]
    start = {**reply, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    start["usage"].pop("output_tokens_details", None)
    told: list[dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(reply["content"]):
        empty, deltas = _block(block, piece)
        told.append({"type": "content_block_start", "index": index, "content_block": empty})
        told += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        told.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": reply["stop_reason"], "stop_sequence": reply["stop_sequence"]}
    told.append({"type": "message_delta", "delta": delta, "usage": usage})
    return [*told, {"type": "message_stop"}]


def stream(reply: dict[str, Any], piece: int = 5, newline: str = "\n") -> bytes:
    """The same as bytes."""
    return b"".join(event(value, newline) for value in events(reply, piece))


def _block(block: dict[str, Any], piece: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    match block["type"]:
        case "text":
            pieces = [{"type": "text_delta", "text": part} for part in _pieces(block["text"], piece)]
            return {"type": "text", "text": ""}, pieces
        case "thinking":
            pieces = [{"type": "thinking_delta", "thinking": part} for part in _pieces(block["thinking"], piece)]
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return {"type": "thinking", "thinking": "", "signature": ""}, [*pieces, signed]
        case "tool_use":
            written = json.dumps(block["input"]) if block["input"] else ""
            pieces = [{"type": "input_json_delta", "partial_json": part} for part in ("", *_pieces(written, piece))]
            return {**block, "input": {}}, pieces
    raise AssertionError(f"no block of a reply: {block['type']!r}")


def _pieces(whole: str, piece: int) -> Iterator[str]:
    return (whole[at : at + piece] for at in range(0, len(whole), piece))


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The bytes cut at these places, each counted modulo the length."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]
