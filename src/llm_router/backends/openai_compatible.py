"""Backends that speak the OpenAI protocol: llama.cpp, vLLM, SGLang, OpenAI itself and most others.

Requests are forwarded as they came; only the model's name is exchanged, and a stream is asked for its
token usage. Not for: the caller's side of the protocol (gateway).
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest, TokenCount, Usage
from llm_router.errors import BadReply, InvalidRequest
from llm_router.routing.table import BackendSpec
from llm_router.upstream.pool import Pool

_PATHS = {
    Endpoint.CHAT: "/chat/completions",
    Endpoint.COMPLETION: "/completions",
    Endpoint.EMBEDDING: "/embeddings",
}
_SECRET_CHARACTERS = 8
"""Shorter values of configured headers are flags and versions, and would be found in any text."""
_ASK_USAGE = b'"stream_options":{"include_usage":true},'


class _UsageObject(msgspec.Struct):
    prompt_tokens: TokenCount | None = 0
    completion_tokens: TokenCount | None = 0


class _Reply(msgspec.Struct):
    usage: _UsageObject | None = None


class _ErrorMessage(msgspec.Struct):
    message: str = ""


class _ErrorReply(msgspec.Struct):
    error: _ErrorMessage | str | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode
_decode_error = msgspec.json.Decoder(_ErrorReply).decode
_encode_text = msgspec.json.Encoder().encode


class OpenAICompatible:
    """A backend that is spoken to over HTTP/1.1 in OpenAI's protocol. Owns its connection pool."""

    def __init__(self, spec: BackendSpec, pool: Pool) -> None:
        self.name = spec.name
        self.pool = pool
        self._spec = spec
        path_prefix = urlsplit(spec.url).path.rstrip("/")
        fixed = f"Host: {pool.origin.authority}\r\nContent-Type: application/json\r\nAccept: application/json, text/event-stream\r\n"
        if spec.api_key:
            fixed += f"Authorization: Bearer {spec.api_key}\r\n"
        fixed += "".join(f"{name}: {value}\r\n" for name, value in spec.headers.items())
        self._heads = {
            endpoint: f"POST {path_prefix}{path} HTTP/1.1\r\n{fixed}X-Request-Id: ".encode("latin-1")
            for endpoint, path in _PATHS.items()
        }
        self._names: dict[str, bytes] = {}
        self._secrets = tuple(
            value.encode() for value in (spec.api_key, *spec.headers.values()) if len(value) >= _SECRET_CHARACTERS
        )

    def __repr__(self) -> str:
        return f"OpenAICompatible({self.name!r}, in_use={self.in_use})"

    @property
    def in_use(self) -> int:
        return self.pool.in_use

    def encode(self, request: InferenceRequest, upstream_model: str, request_id: str) -> tuple[bytes, bytes]:
        if request.endpoint is Endpoint.EMBEDDING and self._spec.embeddings is False:
            raise InvalidRequest(
                f"model {request.model!r} cannot embed: its backend {self.name!r} serves no embeddings; "
                "load an embedding model with `embeddings: true`",
                code="unsupported",
                param="model",
            )
        body = request.body
        if upstream_model != request.model:
            name = self._names.get(upstream_model)
            if name is None:
                name = self._names[upstream_model] = _encode_text(upstream_model)
            start, end = request.model_span
            body = body[:start] + name + body[end:]
        if request.stream and not request.asks_usage and self._spec.stream_usage:
            brace = body.index(b"{") + 1
            body = body[:brace] + _ASK_USAGE + body[brace:]
        head = b"%s%s\r\nContent-Length: %d\r\n\r\n" % (
            self._heads[request.endpoint],
            request_id.encode("ascii"),
            len(body),
        )
        return head, body

    def usage_of(self, body: bytes) -> Usage | None:
        try:
            usage = _decode_reply(body).usage
        except NOT_JSON as error:
            if isinstance(error, msgspec.ValidationError) and body.lstrip().startswith(b"{"):
                return None  # an answer whose usage is no usage: worth more than none
            shown = self.without_secrets(body)[:60].decode("utf-8", "replace")
            raise BadReply(self.name, f"answered 200 with something that is no JSON object: {shown!r}") from error
        if usage is None:
            return None
        return Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def without_secrets(self, body: bytes) -> bytes:
        for secret in self._secrets:
            body = body.replace(secret, b"***")
        return body

    def problem_in(self, body: bytes) -> str:
        return message_in(body)


def message_in(body: bytes) -> str:
    """The message of an OpenAI error object; empty if it is none."""
    try:
        error = _decode_error(body).error
    except NOT_JSON:
        return ""
    return error.message if isinstance(error, _ErrorMessage) else error or ""
