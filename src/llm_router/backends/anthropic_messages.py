"""Backends that speak Anthropic's Messages API.

Requests in that form are forwarded as they came, so that prompt caching, thinking and whatever comes next work; only
the model's name is exchanged. Chats of OpenAI's form are translated (chat_as_messages.py).
Not for: the caller's side of the protocol (gateway).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from llm_router.backends import chat_as_messages
from llm_router.backends.base import ReplyReader
from llm_router.backends.openai_compatible import message_in
from llm_router.backends.usage import usage_in
from llm_router.backends.wire import Heads, ModelNames, Secrets
from llm_router.chat import Endpoint, InferenceRequest, Usage
from llm_router.errors import InvalidRequest
from llm_router.routing.table import BackendSpec
from llm_router.upstream.pool import Pool

_PATHS: Final = {Endpoint.MESSAGES: "/messages", Endpoint.CHAT: "/messages"}
_VERSION: Final = b"anthropic-version"
_DEFAULT_VERSION: Final = b"2023-06-01"
"""Of the API, for requests that do not name one. The next, 2026-10-21, refuses `temperature` and its like, which OpenAI's
callers send and older models take. A backend whose configured headers name a newer one is not sent them."""


class AnthropicMessages:
    """A backend that is spoken to over HTTP/1.1 in Anthropic's protocol. Owns its connection pool.

    Args:
        wall: seconds since the epoch, for what OpenAI's replies call `created`.
    """

    def __init__(self, spec: BackendSpec, pool: Pool, *, wall: Callable[[], float] = time.time) -> None:
        self.name = spec.name
        self.pool = pool
        self._heads = Heads(spec, pool.origin.authority, _PATHS)
        self._configured = {name.lower().encode("latin-1"): value for name, value in spec.headers.items()}
        self._has_sampling = self._configured.get(_VERSION, "") <= _DEFAULT_VERSION.decode()
        self._model_names = ModelNames()
        self._secrets = Secrets(spec)
        self._wall = wall

    def __repr__(self) -> str:
        return f"AnthropicMessages({self.name!r}, in_use={self.in_use})"

    @property
    def in_use(self) -> int:
        return self.pool.in_use

    def encode(
        self, request: InferenceRequest, upstream_model: str, request_id: str, trace: str = ""
    ) -> tuple[bytes, bytes]:
        endpoint = request.endpoint
        if endpoint is Endpoint.MESSAGES:
            body = self._model_names.body(request, upstream_model)
        elif endpoint is Endpoint.CHAT:
            body = chat_as_messages.messages_body(request, upstream_model, has_sampling=self._has_sampling)
        else:
            what = "embed" if endpoint is Endpoint.EMBEDDING else "complete a text"
            raise InvalidRequest(
                f"model {request.model!r} cannot {what}: its backend {self.name!r} answers chats only",
                code="unsupported",
                param="model",
            )
        return self._heads.head(endpoint, upstream_model, request_id + trace, len(body), self._own(request)), body

    def _own(self, request: InferenceRequest) -> list[tuple[bytes, bytes]]:
        """The headers of the protocol; what is configured counts more than what the caller says."""
        headers = dict(((_VERSION, _DEFAULT_VERSION), *request.headers))
        return [header for header in headers.items() if header[0] not in self._configured]

    def reader(self, request: InferenceRequest) -> ReplyReader | None:
        if request.endpoint is Endpoint.MESSAGES:
            return None
        return chat_as_messages.Reader(self.name, self._wall)

    def usage_of(self, endpoint: Endpoint, body: bytes) -> Usage | None:
        return usage_in(endpoint, body, self.name, self._secrets)

    def without_secrets(self, body: bytes) -> bytes:
        return self._secrets.without(body)

    def problem_in(self, body: bytes) -> str:
        return message_in(body)
