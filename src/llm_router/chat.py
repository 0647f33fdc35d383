"""Domain records of an inference: what every layer below the gateway means by a request and its usage.

Not for: the wire words of OpenAI (gateway, backends) or what is measured (signals).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding foreign bytes may raise. msgspec has an error of its own only for syntax and types: text that is not
UTF-8, and nesting beyond Python's bound, come as Python's errors."""


class Endpoint(StrEnum):
    """What a caller asks a model to do."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    MESSAGES = "messages"
    """Anthropic's form of a chat. The bytes of such a request, and of what answers it, are in that form."""


Priority = Literal["interactive", "batch"]

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""What a backend may say about tokens: a number that a counter can be raised by, exactly."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one inference. `reasoning_tokens` are part of the output, `cached_tokens` of the input.

    So are `cache_write_tokens`, which the provider wrote to its cache; `cache_write_1h_tokens`, those that it keeps for an
    hour, are part of these.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0


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
        strategy: what the caller wants instead of the model's own; None for that.
        priority: the class in which it waits for its turn.
        key: name of the caller's key; empty without one. Requests of different keys wait fairly.
        headers: of the caller's request, lower-case names, that belong to its dialect like `anthropic-beta`: a backend
            that speaks it gets them.
        fields: the top-level fields of `body`, unread, where reading it came by them; None where not.
    """

    endpoint: Endpoint
    model: str
    body: bytes
    model_span: tuple[int, int]
    stream: bool = False
    wants_usage: bool = False
    asks_usage: bool = False
    strategy: str | None = None
    priority: Priority = "interactive"
    key: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    fields: dict[str, msgspec.Raw] | None = None
