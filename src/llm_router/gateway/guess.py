"""Estimates the tokens of a whole answer whose backend tells no usage, by the text in it.

Not for: answers with usage (backends/usage.py), or what a request will come to (routing/needs.py).
"""

from __future__ import annotations

import msgspec

from llm_router.chat import NOT_JSON
from llm_router.routing.needs import BYTES_PER_TOKEN


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class _Part(msgspec.Struct):
    text: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"")


class _Answer(msgspec.Struct):
    """OpenAI's chats and completions have `choices`, Anthropic's messages `content`."""

    choices: list[_Choice] = []
    content: list[_Part] = []


_decode = msgspec.json.Decoder(_Answer).decode


def output_tokens(body: bytes) -> int:
    """An estimate of the tokens that were generated: of text and calls of tools. 0 for embeddings, and for what is no answer."""
    try:
        answer = _decode(body)
    except NOT_JSON:
        return 0
    size = 0
    for choice in answer.choices:
        message = choice.message
        if message is not None:
            size += len((message.content or "").encode()) + len(memoryview(message.tool_calls))
        size += len((choice.text or "").encode())
    for part in answer.content:
        size += len((part.text or "").encode()) + len(memoryview(part.input))
    return -(-size // BYTES_PER_TOKEN)
