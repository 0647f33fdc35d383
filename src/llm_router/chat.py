"""Domain records of an inference: what every layer below the gateway means by a request and its usage.

Not for: the wire words of OpenAI (gateway, backends) or what is measured (signals).
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Endpoint(StrEnum):
    """What a caller asks a model to do."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one inference."""

    input_tokens: int = 0
    output_tokens: int = 0


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a streamed answer. `finish_reason` is set on the last one: stop, length, tool_calls…"""

    text: str
    finish_reason: str | None = None

    def __str__(self) -> str:
        return self.text


class InferenceRequest(msgspec.Struct):
    """What routing needs to know of a request; the rest of the body stays bytes.

    Args:
        body: the caller's JSON object as it came, UTF-8.
        model_span: byte range of the JSON string value of the top-level `model` key in `body`.
        wants_usage: in a stream, whether the caller asked for the usage chunk itself.
        asks_usage: whether `body` already asks the backend for it.
    """

    endpoint: Endpoint
    model: str
    body: bytes
    model_span: tuple[int, int]
    stream: bool = False
    wants_usage: bool = False
    asks_usage: bool = False
    strategy: str | None = None
