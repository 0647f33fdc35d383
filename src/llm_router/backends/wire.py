"""What the requests to every backend have in common: their heads, the model's name, and our credentials in replies.

Not for: bodies of a protocol (openai_compatible.py, anthropic_messages.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import msgspec

from llm_router.chat import Endpoint, InferenceRequest
from llm_router.routing.table import BackendSpec
from llm_router.signals import RequestRecord

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
        """The whole head of a request with a body of `length` bytes; `more` are headers of the caller's request.

        `request_id` may go on with whole header lines, each with a line end before it.
        """
        start = self._heads[endpoint]
        if self._has_model:  # of Azure's deployments
            start = start.replace(_MODEL.encode(), quote(upstream_model, safe="").encode(), 1)
        if more:
            request_id += "".join(f"\r\n{name.decode()}: {value.decode()}" for name, value in more)
        return b"%s%s\r\nContent-Length: %d\r\n\r\n" % (start, request_id.encode("ascii"), length)


def trace_lines(record: RequestRecord, span_id: str) -> str:
    """The headers that tell a backend its parent `span_id`, each with a line end before it (W3C Trace Context).

    Where tracing is off, the caller's traceparent goes through as it came.
    """
    if record.span_id:
        parent = f"00-{record.trace_id}-{span_id}-{'01' if record.is_sampled else '00'}"
    else:
        parent = record.headers[b"traceparent"].decode("ascii")
    lines = f"\r\ntraceparent: {parent}"
    return f"{lines}\r\ntracestate: {record.tracestate}" if record.tracestate else lines


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
        values = [spec.api_key, *spec.headers.values()]
        values += [value.rpartition(" ")[2] for value in spec.headers.values()]  # of `Bearer …` and `Basic …`
        for part in spec.query.split("&"):
            name, _, value = part.partition("=")
            if "version" not in name.lower():  # Azure's, which errors are about
                values += [value, unquote(value)]
        found = {form for value in values if len(value) >= _SECRET_CHARACTERS for form in _forms(value)}
        # The longest first: one may be a part of another.
        self._values = tuple(sorted(found, key=len, reverse=True))

    def without(self, body: bytes) -> bytes:
        """The body with `***` in their places."""
        for value in self._values:
            body = body.replace(value, b"***")
        return body


def _forms(value: str) -> Iterator[bytes]:
    """A value as it stands in a text, in JSON, and in a URL."""
    yield value.encode()
    yield _encode_text(value)[1:-1]
    yield _encode_text(value)[1:-1].replace(b"/", b"\\/")
    yield quote(value, safe="").encode()
