"""What a request needs of a model: room, and abilities beyond answering text with text. Estimates, read off its bytes.

Costs microseconds, so it is done only when somebody asks: policies that compare unlike deployments, limits of tokens.
Not for: the usage that is billed (the backend says that), or checking bodies (gateway).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest

BYTES_PER_TOKEN: Final = 4
"""Of JSON text. OpenAI's rule of thumb is four characters of English a token; other languages need more tokens and
more bytes a character, which roughly cancels out."""

MEDIA_TOKENS: Final = 1000
"""For an image, sound or document, whose bytes say nothing: an image of 1024 x 1024 is 765 tokens to OpenAI and 1,398
to Anthropic, by their documentation."""

TYPICAL_OUTPUT_TOKENS: Final = 256
"""What an answer is reckoned with when the request does not bound it."""

_MOST_TOKENS: Final = 2**31
_MOST_ANSWERS: Final = 128  # OpenAI's own bound of `n`
_NOTHING: Final[frozenset[str]] = frozenset()
_ABSENT: Final = msgspec.Raw(b"")
_BRACKET: Final = 0x5B
_COUNTED: Final = ("system", "tools", "functions", "response_format")
_PROMPTS: Final = ("prompt", "input")
_OFF: Final = (b"null", b"[]", b"false", b'"none"', b"{}")
_MEDIA: Final = frozenset({"image_url", "image", "input_audio", "file", "document"})
_IMAGES: Final = frozenset({"image_url", "image"})
_DEEPEST: Final = 3
"""Messages, their parts, and the parts of tool results. No protocol nests deeper, and each level reads the text again."""


_Fields = Mapping[str, msgspec.Raw]


class Need(msgspec.Struct, frozen=True):
    """What a request asks of a deployment.

    Args:
        input_tokens: an estimate.
        output_tokens: what the request bounds the answers to, all of them together; 0 when it does not.
        capabilities: of `table.CAPABILITIES`.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    capabilities: frozenset[str] = _NOTHING

    @property
    def tokens(self) -> int:
        """The room that it takes at most, as far as it says."""
        return self.input_tokens + self.output_tokens


class _Holder(msgspec.Struct, gc=False):
    """A message, or a part of one that has parts itself (an Anthropic tool result)."""

    type: str = ""
    content: msgspec.Raw = _ABSENT


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_holder = msgspec.json.Decoder(_Holder).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def need_of(request: InferenceRequest) -> Need:
    """What the request needs. Never fails: a body that cannot be read needs its length."""
    try:
        fields = _fields(request)
    except NOT_JSON:
        return Need(_tokens(len(request.body)))
    input_tokens, images = _input(fields)
    if request.endpoint is Endpoint.EMBEDDING:
        return Need(input_tokens, 0, frozenset({"embeddings"}))
    wanted = []
    if _is_on(fields.get("tools")) or _is_on(fields.get("functions")):
        wanted.append("tools")
    if images:
        wanted.append("vision")
    if _wants_json(fields.get("response_format")) or _wants_json(fields.get("output_config")):
        wanted.append("json")
    if _is_on(fields.get("reasoning_effort")) or _is_on(fields.get("reasoning")) or _thinks(fields.get("thinking")):
        wanted.append("reasoning")
    return Need(input_tokens, _output(fields), frozenset(wanted) if wanted else _NOTHING)


def estimate_tokens(request: InferenceRequest) -> int:
    """Input and output tokens that the request may come to: what a limit reserves before the usage is known."""
    try:
        fields = _fields(request)
    except NOT_JSON:
        return _tokens(len(request.body)) + TYPICAL_OUTPUT_TOKENS
    input_tokens, _ = _input(fields)
    if request.endpoint is Endpoint.EMBEDDING:
        return input_tokens
    return input_tokens + (_output(fields) or TYPICAL_OUTPUT_TOKENS)


def estimate_input_tokens(request: InferenceRequest) -> int:
    """Its part of the above: the input of a request whose answer came without usage."""
    try:
        return _input(_fields(request))[0]
    except NOT_JSON:
        return _tokens(len(request.body))


def _tokens(size_bytes: int) -> int:
    return -(-size_bytes // BYTES_PER_TOKEN)


def _fields(request: InferenceRequest) -> _Fields:
    """The top-level fields of any of the endpoints, unread: what is wrong in them is for the backend to say."""
    return _decode_fields(request.body) if request.fields is None else request.fields


def _input(fields: _Fields) -> tuple[int, int]:
    """(estimated input tokens, images among them)."""
    size = tokens = images = 0
    messages = fields.get("messages")
    if messages is not None:
        text = bytes(messages)
        size = len(text)
        # Content that is plain text has no such key; in a text its quotes would be escaped.
        if b'"type"' in text and (b'"image' in text or b"base64" in text or b'"input_audio"' in text):
            media_bytes, media, images = _media(text)
            size -= media_bytes
            tokens = media * MEDIA_TOKENS
    for name in _COUNTED:
        if name in fields:
            size += len(memoryview(fields[name]))
    for name in _PROMPTS:
        if name in fields:
            tokens += _plain(bytes(fields[name]))
    return tokens + _tokens(size), images


def _plain(text: bytes) -> int:
    """Tokens of a prompt: a text, several, or lists of tokens already."""
    if text.startswith(b"[") and b'"' not in text:
        return 0 if len(text) < 3 else text.count(b",") + 1
    return _tokens(len(text))


def _media(messages: bytes) -> tuple[int, int, int]:
    """(bytes, number, images among them) of the parts of messages that are no text."""
    size = media = images = 0
    try:
        parts = _decode_list(messages)
        for _ in range(_DEEPEST):
            inner: list[msgspec.Raw] = []
            for part in parts:
                holder = _decode_holder(part)
                if holder.type in _MEDIA:
                    size += len(memoryview(part))
                    media += 1
                    images += holder.type in _IMAGES
                elif holder.content is not _ABSENT and memoryview(holder.content)[0] == _BRACKET:
                    inner += _decode_list(holder.content)
            parts = inner
    except NOT_JSON:
        pass  # no messages as any of the protocols has them: what was understood so far must do
    return size, media, images


def _output(fields: _Fields) -> int:
    most = _number(fields.get("max_completion_tokens")) or _number(fields.get("max_tokens"))
    if most and "n" in fields:
        most *= min(_MOST_ANSWERS, max(1, _number(fields["n"])))
    return most


def _number(value: msgspec.Raw | None) -> int:
    """A whole number of JSON; 0 for anything else."""
    if value is None:
        return 0
    text = bytes(value)
    return min(_MOST_TOKENS, int(text)) if text.isdigit() and len(text) < 20 else 0


def _is_on(value: msgspec.Raw | None) -> bool:
    return value is not None and bytes(value) not in _OFF


def _wants_json(value: msgspec.Raw | None) -> bool:
    """OpenAI's `json_object` and `json_schema`, Anthropic's `json_schema`."""
    return value is not None and b'"json_' in bytes(value)


def _thinks(value: msgspec.Raw | None) -> bool:
    return value is not None and _is_on(value) and b'"disabled"' not in bytes(value)
