"""What the requests to every backend have in common: their heads, the model's name, and our credentials in replies.

Not for: bodies of a protocol (openai_compatible.py, anthropic_messages.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

from llm_router.chat import Endpoint, InferenceRequest
from llm_router.routing.table import BackendSpec

_MODEL: Final = "{model}"
_SECRET_CHARACTERS: Final = 8
"""Shorter values of configured headers are flags and versions, and would be found in any text."""
_encode_text = msgspec.json.Encoder().encode


class Heads:
    """The heads of requests, but for their id and length.

    A path of the backend's URL that holds `{model}` gets the name of the model there, as Azure's deployments need it.

    Args:
        authority: value of the Host header.
        paths: what follows the path of the backend's URL, by endpoint.
    """

    def __init__(self, spec: BackendSpec, authority: str, paths: Mapping[Endpoint, str]) -> None:
        prefix = urlsplit(spec.url).path.rstrip("/")
        headers = {
            "Host": authority,
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
        }
        if spec.api_key:
            if spec.auth == "bearer":
                headers["Authorization"] = f"Bearer {spec.api_key}"
            else:
                headers[spec.auth] = spec.api_key
        lines = "".join(f"{name}: {value}\r\n" for name, value in (*headers.items(), *spec.headers.items()))
        query = f"?{spec.query}" if spec.query else ""
        self._heads = {
            endpoint: f"POST {prefix}{path}{query} HTTP/1.1\r\n{lines}X-Request-Id: ".encode("latin-1")
            for endpoint, path in paths.items()
        }
        self._has_model = _MODEL in prefix

    def head(
        self,
        endpoint: Endpoint,
        upstream_model: str,
        request_id: str,
        length: int,
        more: Iterable[tuple[bytes, bytes]] = (),
    ) -> bytes:
        """The whole head of a request with a body of `length` bytes; `more` are headers of the caller's request."""
        start = self._heads[endpoint]
        if self._has_model:  # of Azure's deployments
            start = start.replace(_MODEL.encode(), quote(upstream_model, safe="").encode(), 1)
        if more:
            request_id += "".join(f"\r\n{name.decode()}: {value.decode()}" for name, value in more)
        return b"%s%s\r\nContent-Length: %d\r\n\r\n" % (start, request_id.encode("ascii"), length)


class ModelNames:
    """Exchanges the model's name in a body that is forwarded as it came."""

    def __init__(self) -> None:
        self._names: dict[str, bytes] = {}

    def body(self, request: InferenceRequest, upstream_model: str) -> bytes:
        """The caller's body, asking for `upstream_model`."""
        if upstream_model == request.model:
            return request.body
        name = self._names.get(upstream_model)
        if name is None:
            name = self._names[upstream_model] = _encode_text(upstream_model)
        start, end = request.model_span
        return request.body[:start] + name + request.body[end:]


class Secrets:
    """The credentials that a backend gets from us, to be taken out of what it quotes."""

    def __init__(self, spec: BackendSpec) -> None:
        self._values = tuple(
            value.encode() for value in (spec.api_key, *spec.headers.values()) if len(value) >= _SECRET_CHARACTERS
        )

    def without(self, body: bytes) -> bytes:
        """The body with `***` in their places."""
        for value in self._values:
            body = body.replace(value, b"***")
        return body
