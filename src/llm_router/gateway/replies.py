"""The headers of our replies, and which of a backend's headers pass; what an error is called in metrics.

Not for: bodies (openai.py, anthropic.py, generate.py) or deciding anything.
"""

from __future__ import annotations

import math

from llm_router.accounts.access import Guard
from llm_router.errors import (
    BackendBusy,
    BackendError,
    BackendOverloaded,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    CannotEmbed,
    CircuitOpen,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RouterError,
    ShuttingDown,
    Unauthorized,
    Unavailable,
)
from llm_router.gateway.seam import HeaderList, Request
from llm_router.signals import RequestRecord

JSON = (b"content-type", b"application/json")
CACHED = (b"x-llm-router-cached", b"true")
MESSAGES = "/v1/messages"
_TIMING = b"x-llm-router-timing"
COUNT_TOKENS = "/v1/messages/count_tokens"
_ANTHROPIC_ROUTES = frozenset({MESSAGES, COUNT_TOKENS})
"""Their clients look for the request's id in `request-id`."""

_ROUTES_KEPT = 1000
# Of an upstream's reply headers these are not for callers: framing and connection are ours to set, cookies and
# CORS would be the provider's word about our origin, the rest tells of the machine behind.
_NOT_PASSED = frozenset(
    b"content-length server date via set-cookie alt-svc strict-transport-security x-request-id keep-alive vary "
    b"access-control-allow-origin access-control-allow-credentials access-control-allow-headers "
    b"access-control-allow-methods access-control-expose-headers access-control-max-age x-powered-by "
    # A router behind this one speaks of itself.
    b"x-llm-router-model x-llm-router-backend x-llm-router-strategy x-llm-router-attempts "
    b"x-llm-router-overhead-ms x-llm-router-cached "
    # The provider's limits are those of our key with it, not the caller's.
    b"x-ratelimit-limit-requests x-ratelimit-limit-tokens x-ratelimit-remaining-requests "
    b"x-ratelimit-remaining-tokens x-ratelimit-reset-requests x-ratelimit-reset-tokens request-id".split()
)
_NOT_PASSED_PREFIX = b"anthropic-ratelimit-"


def passed(headers: HeaderList) -> HeaderList:
    """Those of a backend's reply headers that callers get."""
    return [
        header for header in headers if header[0] not in _NOT_PASSED and not header[0].startswith(_NOT_PASSED_PREFIX)
    ]


class ReplyHeaders:
    """Makes the headers that every reply has. `guard` may be exchanged at any time."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._routes: dict[tuple[str, str, str, int], HeaderList] = {}

    def plain(self, record: RequestRecord, request: Request) -> HeaderList:
        """Of a reply that is no inference: its id, and CORS for configured pages."""
        headers = [(b"x-request-id", record.request_id.encode())]
        if record.route in _ANTHROPIC_ROUTES:
            headers.append((b"request-id", record.request_id.encode()))
        origin = request.headers.get(b"origin")
        if origin is not None:
            headers += self.guard.cors(origin)
        return headers

    def inference(self, record: RequestRecord, now: float, request: Request) -> HeaderList:
        """Of an inference: where it went, how often it was tried, and our share of the time."""
        attempts = record.attempts
        upstream_s = 0.0
        for attempt in attempts:
            upstream_s += (attempt.ended_at or now) - attempt.started_at
        overhead_ms = (now - record.started_at - upstream_s) * 1000
        route = (record.model, attempts[-1].backend if attempts else "none", record.strategy, len(attempts))
        headers = [
            (b"x-request-id", record.request_id.encode()),
            (b"x-llm-router-overhead-ms", b"%.3f" % (overhead_ms if overhead_ms > 0 else 0.0)),
            *(self._routes.get(route) or self._new_route(route)),
        ]
        if record.route in _ANTHROPIC_ROUTES:
            headers.append((b"request-id", record.request_id.encode()))
        asked = request.headers
        if _TIMING in asked and asked[_TIMING].strip().lower() == b"on":
            headers.append((b"server-timing", server_timing(record, now)))
        origin = asked.get(b"origin")
        if origin is not None:
            headers += self.guard.cors(origin)
        return headers

    def _new_route(self, route: tuple[str, str, str, int]) -> HeaderList:
        """The headers that are the same for every request that went this way; kept, as there are few ways."""
        model, backend, strategy, attempts = route
        if len(self._routes) >= _ROUTES_KEPT:
            self._routes.clear()
        headers = self._routes[route] = [
            (b"x-llm-router-model", _header_value(model)),
            (b"x-llm-router-backend", _header_value(backend)),
            (b"x-llm-router-strategy", strategy.encode()),
            (b"x-llm-router-attempts", b"%d" % attempts),
        ]
        return headers


def server_timing(record: RequestRecord, now: float) -> bytes:
    """The value of `Server-Timing`: milliseconds of each step that the request has behind it.

    Source: https://www.w3.org/TR/server-timing/.
    """
    steps = [("receive", record.started_at, record.begun_at), ("auth", record.begun_at, record.identified_at)]
    if record.allowed_at:
        steps.append(("limits", record.identified_at, record.allowed_at))
    if record.looked_up_at:
        steps.append(("cache", record.allowed_at or record.identified_at, record.looked_up_at))
    if record.slot_at:
        steps.append(("queue", record.queued_at, record.slot_at))
    if record.routed_at:
        steps.append(("route", record.slot_at, record.routed_at))
    steps += [("upstream", attempt.started_at, attempt.ended_at or now) for attempt in record.attempts]
    if record.first_token_at:
        steps.append(("first-token", record.started_at, record.first_token_at))
    steps.append(("total", record.started_at, now))
    return ", ".join(
        f"{name};dur={(end - begin) * 1000:.3f}" for name, begin, end in steps if begin and end >= begin
    ).encode()


def of_error(error: RouterError) -> HeaderList:
    """The headers that an error brings along: content type, Allow, limits, and when to come back."""
    headers = [JSON, *getattr(error, "headers", ())]
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers.append(
            (b"retry-after", b"%d" % max(1, math.ceil(retry_after_s)))
        )  # whoever comes earlier, comes in vain
    return headers


_ERROR_TYPES: tuple[tuple[type[RouterError], str], ...] = (
    (BadReply, "bad_reply"),
    (CannotEmbed, "rejected"),
    (BackendTimeout, "timeout"),
    (BackendOverloaded, "overloaded"),
    (BackendBusy, "limit"),
    (BackendUnavailable, "unreachable"),
    (BackendError, "inference_error"),
    (ModelNotFound, "not_found"),
    (Unauthorized, "unauthorized"),
    (Forbidden, "forbidden"),
    (LimitExceeded, "limit"),
    (QueueFull, "queue_full"),
    (QueueTimeout, "queue_timeout"),
    (CircuitOpen, "circuit_open"),
    (DeadlineExceeded, "deadline"),
    (Overloaded, "shed"),
    (ShuttingDown, "unavailable"),
    (Unavailable, "unavailable"),
)


def error_type(error: RouterError) -> str:
    """The key of `families.ERROR_KINDS` for an error."""
    if isinstance(error, InvalidRequest):
        return request_error_type(error.status)
    for kind, name in _ERROR_TYPES:
        if isinstance(error, kind):
            return name
    return "internal"


def request_error_type(status: int) -> str:
    """The same for a refused request of that status."""
    kinds = {401: "unauthorized", 403: "forbidden", 404: "not_found", 421: "forbidden", 429: "limit", 503: "limit"}
    return kinds.get(status, "bad_request")


def upstream_error_type(status: int) -> str:
    """The same for an error status of a backend that is passed on."""
    if status in (429, 503):
        return "overloaded"
    return "inference_error" if status >= 500 else "rejected"


def _header_value(name: str) -> bytes:
    """A configured name as a header value; characters that no header may hold become `?`."""
    return name.encode("latin-1", "replace") if name.isprintable() else b"?"
