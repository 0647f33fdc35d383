"""Backends that speak the OpenAI protocol: llama.cpp, vLLM, SGLang, Ollama, OpenRouter, Azure, OpenAI and most others.

Requests are forwarded as they came; only the model's name is exchanged, and a stream is asked for its
token usage. Requests in Anthropic's form are translated (messages_as_chat.py).
Not for: the caller's side of the protocol (gateway).
"""

from __future__ import annotations

from typing import Final

import msgspec

from llm_router.backends import messages_as_chat
from llm_router.backends.base import ReplyReader
from llm_router.backends.usage import usage_in
from llm_router.backends.wire import Heads, ModelNames, Secrets
from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest, Usage
from llm_router.errors import InvalidRequest
from llm_router.routing.table import BackendSpec
from llm_router.upstream.pool import Pool

_PATHS: Final = {
    Endpoint.CHAT: "/chat/completions",
    Endpoint.COMPLETION: "/completions",
    Endpoint.EMBEDDING: "/embeddings",
    Endpoint.MESSAGES: "/chat/completions",
}
_MESSAGES: Final = Endpoint.MESSAGES  # a member's name costs more to look up than all else here that asks for it
_EMBEDDING: Final = Endpoint.EMBEDDING
_ASK_USAGE: Final = b'"stream_options":{"include_usage":true},'


class _ErrorMessage(msgspec.Struct):
    message: str = ""


class _ErrorReply(msgspec.Struct):
    error: _ErrorMessage | str | None = None


_decode_error = msgspec.json.Decoder(_ErrorReply).decode


class OpenAICompatible:
    """A backend that is spoken to over HTTP/1.1 in OpenAI's protocol. Owns its connection pool."""

    def __init__(self, spec: BackendSpec, pool: Pool) -> None:
        self.name = spec.name
        self.pool = pool
        self._spec = spec
        self._heads = Heads(spec, pool.origin.authority, _PATHS)
        self._model_names = ModelNames()
        self._secrets = Secrets(spec)
        self._is_openai = messages_as_chat.is_openai(pool.origin.host)

    def __repr__(self) -> str:
        return f"OpenAICompatible({self.name!r}, in_use={self.in_use})"

    @property
    def in_use(self) -> int:
        return self.pool.in_use

    def encode(
        self, request: InferenceRequest, upstream_model: str, request_id: str, trace: str = ""
    ) -> tuple[bytes, bytes]:
        endpoint = request.endpoint
        if endpoint is _MESSAGES:
            body = messages_as_chat.chat_body(
                request, upstream_model, ask_usage=self._spec.stream_usage, is_openai=self._is_openai
            )
            return self._heads.head(endpoint, upstream_model, request_id + trace, len(body)), body
        if endpoint is _EMBEDDING and self._spec.embeddings is False:
            raise InvalidRequest(
                f"model {request.model!r} cannot embed: its backend {self.name!r} serves no embeddings; "
                "load an embedding model with `embeddings: true`",
                code="unsupported",
                param="model",
            )
        body = self._model_names.body(request, upstream_model)
        if request.stream and not request.asks_usage and self._spec.stream_usage:
            brace = body.index(b"{") + 1
            body = body[:brace] + _ASK_USAGE + body[brace:]
        return self._heads.head(endpoint, upstream_model, request_id + trace, len(body)), body

    def reader(self, request: InferenceRequest) -> ReplyReader | None:
        if request.endpoint is not _MESSAGES:
            return None
        return messages_as_chat.Reader(self.name, request)

    def usage_of(self, endpoint: Endpoint, body: bytes) -> Usage | None:
        return usage_in(endpoint, body, self.name, self._secrets)

    def without_secrets(self, body: bytes) -> bytes:
        return self._secrets.without(body)

    def problem_in(self, body: bytes) -> str:
        return message_in(body)


def message_in(body: bytes) -> str:
    """The message of an error object, OpenAI's or Anthropic's; empty if it is none."""
    try:
        error = _decode_error(body).error
    except NOT_JSON:
        return ""
    return error.message if isinstance(error, _ErrorMessage) else error or ""
