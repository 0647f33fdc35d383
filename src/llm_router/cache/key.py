"""What makes two requests the same to the cache, and which requests are looked up at all.

A request is looked up by itself when its answer can be expected again: at an explicit temperature of 0, and for
embeddings; else when its caller asks for it. Its key is a SHA-256 over everything that determines the answer's bytes:

    endpoint, model, what serves the model (`Fingerprints`), strategy, whether it streams, whether it shows usage,
    headers that backends get, the owner where keys do not share answers, and every field of the body but those of
    `IGNORED_FIELDS`.

`user`, `metadata`, `seed`, `n`, `stop`, unknown fields and all others count: a backend may be an agent that answers each
user differently, and a needless miss costs time, a wrong hit shows somebody the answer of somebody else.

Two spellings of a value are one: white space, escapes in strings, `1.0` and `1e0`. The order of fields does not matter in
the body itself, in its messages and in the parts of these, whose fields the APIs define. It does further in: in
tools, schemas and arguments it is what the model gets to see, and decides in which order structured output comes. `1` and
`1.0` are two: some servers refuse the latter for a whole number. A body with a key twice in one object has no key
at all: backends differ in which one they read, so one caller could leave an answer that others get for another question.

Not for: keeping answers (memory.py, redis.py) or authorising; who may ask the model at all is decided before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from llm_router.chat import NOT_JSON, Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest
from llm_router.routing.table import BackendSpec, RoutingTable

IGNORED_FIELDS: Final = frozenset(
    {
        # Part of the key as what `InferenceRequest` says: `"stream": false` and none are the same.
        "model",
        "stream",
        # They tell the provider where to look for the beginning of the prompt; what it answers is the same.
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Top-level fields of a body that cannot change its answer, or stand in the key in another way."""

WORLDLY_FIELDS: Final = frozenset(
    # OpenAI; Anthropic; Azure OpenAI's own data; OpenRouter's plugins, like its web search.
    {"web_search_options", "mcp_servers", "container", "data_sources", "plugins"}
)
"""Fields that let the provider look at the world: temperature 0 does not make such an answer the same tomorrow."""

MOST_BYTES: Final = 256 * 1024
"""A longer body is looked up only when its caller asks for that: the key of 256 KiB takes about a millisecond, in which the
worker serves nobody else, and requests of that size hold documents or images that hardly come twice."""

_VERSION: Final = 1  # of the key; another way to make it is another version, so that a shared Redis is not mixed up
_CALLERS_TOOLS = ("function", "custom")
_TEMPERATURE = b'"temperature"'
_zero = re.compile(rb"\s*:\s*-?(?:0(?!\.[0-9]*[1-9])|[0-9.]+[eE]-)").match  # 1e-999 is one too

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class _Sampling(msgspec.Struct):
    temperature: Any = None


_decode_sampling = msgspec.json.Decoder(_Sampling).decode


# -- what the caller wishes -----------------------------------------------------------------------------


class Wish(NamedTuple):
    """What a caller wants of the cache.

    Args:
        read: whether a kept answer will do.
        write: whether the answer may be kept.
        asked: whether it asked for the cache itself, so that an answer counts as repeatable whatever its temperature.
    """

    read: bool
    write: bool
    asked: bool


USUAL: Final = Wish(read=True, write=True, asked=False)
ON: Final = Wish(read=True, write=True, asked=True)
OFF: Final = Wish(read=False, write=False, asked=False)
REFRESH: Final = Wish(read=False, write=True, asked=True)
_FRESH: Final = Wish(read=False, write=True, asked=False)

_BY_HEADER: Final = {b"on": ON, b"off": OFF, b"refresh": REFRESH}


def cache_wish(headers: Mapping[bytes, bytes]) -> Wish:
    """What the request headers say of the cache.

    `x-llm-router-cache` is on, off or refresh. `Cache-Control: no-store` is off whatever else is said; `no-cache` and
    `max-age=0` mean by HTTP that no kept answer will do.

    Args:
        headers: names in lower case, as of `gateway.seam.Request`.

    Raises: InvalidRequest for another value of `x-llm-router-cache`.
    """
    own = headers.get(b"x-llm-router-cache")
    control = headers.get(b"cache-control")
    if own is None and control is None:
        return USUAL
    wish = USUAL
    if own is not None:
        known = _BY_HEADER.get(own.strip().lower())
        if known is None:
            shown = own[:40].decode("ascii", "replace")
            raise InvalidRequest(
                f"x-llm-router-cache is on, off or refresh, not {shown!r}",
                code="invalid_header",
                param="x-llm-router-cache",
            )
        wish = known
    if control is not None:
        directives = {directive.strip() for directive in control.lower().split(b",")}
        if b"no-store" in directives:
            return OFF
        if wish.read and (b"no-cache" in directives or b"max-age=0" in directives):
            return REFRESH if wish.asked else _FRESH
    return wish


# -- what serves a model ----------------------------------------------------------------------------------


class Fingerprints:
    """What serves each model of a routing table, as 16 bytes that change whenever an answer might.

    That is how the model chooses among its deployments, and of each of these what the backend calls the model and how it
    is reached. A local model's runner is reached at a port that is another one after each start: so another file
    under the same name is another model. Prices, limits, timeouts and the provider's keys do not count.

    Each is computed when first asked for. Make a new one for each table.
    """

    def __init__(self, table: RoutingTable) -> None:
        self._table = table
        self._models = {model.name: model for model in table.models}
        self._backends = {backend.name: backend for backend in table.backends}
        self._known: dict[str, bytes] = {}

    def of(self, model: str) -> bytes:
        """The fingerprint of what serves a model; empty if there is no such model."""
        known = self._known.get(model)
        if known is None:
            spec = self._models.get(model)
            if spec is None:
                return b""  # not kept: callers could fill the memory with names
            table = self._table
            strategy = spec.strategy or table.strategy
            parts = [strategy, table.custom if strategy == "custom" else ""]
            parts += sorted(
                _encode([deployment.upstream_model, _reached(self._backends[deployment.backend])]).decode()
                for deployment in spec.deployments
            )
            known = self._known[model] = hashlib.sha256(_encode(parts)).digest()[:16]
        return known


def _reached(backend: BackendSpec) -> list[Any]:
    headers = sorted((name.lower(), value) for name, value in backend.headers.items())
    return [backend.protocol, backend.url, backend.query, headers, backend.stream_usage]


# -- the key ----------------------------------------------------------------------------------------------


def cache_key(request: InferenceRequest, fingerprint: bytes, owner: str = "", *, asked: bool = False) -> bytes | None:
    """The 32 bytes under which the answer of a request is kept; None if it is neither looked up nor kept.

    Args:
        request: as read from the caller, with the strategy it asks for.
        fingerprint: of what serves the model, see `Fingerprints`.
        owner: the id of the caller's key if each has its own answers, else empty.
        asked: whether the caller asked for the cache, see `Wish`.
    """
    body = request.body
    if not asked:
        if len(body) > MOST_BYTES:
            return None
        # Most requests end here. Whoever escapes a letter of the field's name is not cached.
        if request.endpoint is not Endpoint.EMBEDDING and not _is_cold(request):
            return None
    try:
        fields = _decode(body)
        if not isinstance(fields, dict) or not (asked or _is_closed(fields)):
            return None
        # What was decoded and encoded has each key once: if it is the body again, so has the body.
        if _encode(fields) != body and _repeats_a_key(body):
            return None
        counted = _encode(
            (
                _VERSION,
                request.endpoint,
                request.model,
                fingerprint,
                request.strategy,
                request.stream,
                request.wants_usage,
                request.headers,
                owner,
                [(name, _ordered(name, value)) for name, value in sorted(fields.items()) if name not in IGNORED_FIELDS],
            )
        )
    except NOT_JSON:  # nested so deeply that it can be read, but no more be written, is among it
        return None
    return hashlib.sha256(counted).digest()


def _may_be_cold(body: bytes) -> bool:
    """Whether a field of that name may be 0 somewhere in the body: costs a fifth of reading it."""
    at = body.rfind(_TEMPERATURE)  # from the end: most clients write the messages first
    while at >= 0:
        if _zero(body, at + len(_TEMPERATURE)):
            return True
        at = body.rfind(_TEMPERATURE, 0, at)
    return False


def _is_cold(request: InferenceRequest) -> bool:
    """Whether the temperature is 0. Not False, which equals 0 in Python."""
    try:
        if request.fields is not None:
            given = request.fields.get("temperature")
            temperature = None if given is None else _decode(given)
        else:
            temperature = _decode_sampling(request.body).temperature if _may_be_cold(request.body) else None
    except NOT_JSON:
        return False
    return type(temperature) in (int, float) and temperature == 0


def _is_closed(fields: dict[str, Any]) -> bool:
    """Whether the answer depends on nothing but the request: no provider looks anything up for it."""
    if not WORLDLY_FIELDS.isdisjoint(fields):
        return False
    tools = fields.get("tools")
    if not isinstance(tools, list):
        return True
    # Anthropic's tools of the caller have no type, or `custom`.
    return all(isinstance(tool, dict) and tool.get("type", "custom") in _CALLERS_TOOLS for tool in tools)


def _ordered(name: str, value: Any) -> Any:
    """A field's value, with the fields of messages and of their parts in one order."""
    if name != "messages" or not isinstance(value, list):
        return value
    return [_message(message) for message in value]


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        parts = [dict(sorted(part.items())) if isinstance(part, dict) else part for part in content]
        message = {**message, "content": parts}
    return dict(sorted(message.items()))


class _RepeatedKeyError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise _RepeatedKeyError


def _repeats_a_key(body: bytes) -> bool:
    """Whether any object in a body has a key twice, or nobody can tell."""
    try:
        json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return True
    return False
