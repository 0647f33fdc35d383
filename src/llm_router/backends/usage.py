"""Token usage as OpenAI's and Anthropic's replies write it, and what it is to us.

OpenAI's `prompt_tokens` include what came from a prompt cache; Anthropic's `input_tokens` do not. Ours do.
Not for: counting tokens, or what they cost.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from llm_router.backends.wire import Secrets
from llm_router.chat import NOT_JSON, Endpoint, TokenCount, Usage
from llm_router.errors import BadReply


class _PromptDetails(msgspec.Struct):
    cached_tokens: TokenCount | None = 0
    cache_write_tokens: TokenCount | None = 0  # OpenRouter's; and ours, of translated replies
    cache_write_1h_tokens: TokenCount | None = 0  # only ours


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: TokenCount | None = 0


class ChatUsage(msgspec.Struct):
    """The `usage` object of OpenAI's replies and of the last event of its streams."""

    prompt_tokens: TokenCount | None = 0
    completion_tokens: TokenCount | None = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None

    def usage(self) -> Usage:
        """The same in our words."""
        prompt, completion = self.prompt_tokens_details, self.completion_tokens_details
        if prompt is None and completion is None:
            return Usage(self.prompt_tokens or 0, self.completion_tokens or 0)
        return Usage(
            self.prompt_tokens or 0,
            self.completion_tokens or 0,
            0 if prompt is None else prompt.cached_tokens or 0,
            0 if completion is None else completion.reasoning_tokens or 0,
            0 if prompt is None else prompt.cache_write_tokens or 0,
            0 if prompt is None else prompt.cache_write_1h_tokens or 0,
        )


class _OutputDetails(msgspec.Struct):
    thinking_tokens: TokenCount | None = 0


class _CacheCreation(msgspec.Struct):
    ephemeral_1h_input_tokens: TokenCount | None = 0


class MessagesUsage(msgspec.Struct):
    """The `usage` object of Anthropic's replies, and of the first and the last event of its streams."""

    input_tokens: TokenCount | None = None
    output_tokens: TokenCount | None = None
    cache_read_input_tokens: TokenCount | None = None
    cache_creation_input_tokens: TokenCount | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens_details: _OutputDetails | None = None

    def updated(self, newer: MessagesUsage) -> MessagesUsage:
        """What a stream has said when `newer` came after this: the numbers are running totals, those left out stay."""
        said = {name: value for name, value in msgspec.structs.asdict(newer).items() if value is not None}
        return msgspec.structs.replace(self, **said)

    def usage(self) -> Usage | None:
        """The same in our words; None if it says nothing. Zeros are a translation's way to say that: see `as_messages`."""
        read = self.cache_read_input_tokens or 0
        written = self.cache_creation_input_tokens or 0
        input_tokens = (self.input_tokens or 0) + read + written
        output_tokens = self.output_tokens or 0
        if not input_tokens and not output_tokens:
            return None
        details, creation = self.output_tokens_details, self.cache_creation
        return Usage(
            input_tokens,
            output_tokens,
            read,
            0 if details is None else details.thinking_tokens or 0,
            written,
            0 if creation is None else creation.ephemeral_1h_input_tokens or 0,
        )


def as_chat(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object. What was written to the provider's cache has no word of OpenAI's; OpenRouter has one."""
    prompt = {"cached_tokens": usage.cached_tokens}
    if usage.cache_write_tokens:
        prompt["cache_write_tokens"] = usage.cache_write_tokens
    if usage.cache_write_1h_tokens:
        prompt["cache_write_1h_tokens"] = usage.cache_write_1h_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def as_messages(usage: Usage | None) -> dict[str, Any]:
    """Anthropic's `usage` object. It must be there: unknown usage is written as zeros, which no inference takes."""
    if usage is None:
        usage = Usage()
    cached = min(usage.cached_tokens, usage.input_tokens)
    created = min(usage.cache_write_tokens, usage.input_tokens - cached)
    written: dict[str, Any] = {
        "input_tokens": usage.input_tokens - cached - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
    }
    if usage.reasoning_tokens:
        written["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return written


class _ChatReply(msgspec.Struct):
    usage: ChatUsage | None = None


class _MessagesReply(msgspec.Struct):
    usage: MessagesUsage | None = None


_MESSAGES: Final = Endpoint.MESSAGES
_decode_chat = msgspec.json.Decoder(_ChatReply).decode
_decode_messages = msgspec.json.Decoder(_MessagesReply).decode


def usage_in(endpoint: Endpoint, body: bytes, backend: str, secrets: Secrets) -> Usage | None:
    """Token usage in a whole reply in the form of `endpoint`; None when it gives none.

    Args:
        backend, secrets: whose reply it is, and what an error must not show.

    Raises: BadReply when the body is no JSON object.
    """
    try:
        usage = (_decode_messages if endpoint is _MESSAGES else _decode_chat)(body).usage
    except NOT_JSON as error:
        if isinstance(error, msgspec.ValidationError) and body.lstrip().startswith(b"{"):
            return None  # an answer whose usage is no usage: worth more than none
        shown = secrets.without(body)[:60].decode("utf-8", "replace")
        raise BadReply(backend, f"answered 200 with something that is no JSON object: {shown!r}") from error
    return None if usage is None else usage.usage()
