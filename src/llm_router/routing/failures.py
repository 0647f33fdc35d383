"""What went wrong with an attempt, in the words of the router: which error a reply stands for, and what may follow.

Not for: whether there is budget for another attempt (retry.py) or making it (router.py).
"""

from __future__ import annotations

from enum import StrEnum

from llm_router.errors import (
    BackendBusy,
    BackendOverloaded,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    CannotEmbed,
    CircuitOpen,
    QueueFull,
    QueueTimeout,
    RouterError,
    Unavailable,
)
from llm_router.routing.exchange import Exchange

_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

NOT_AGAIN = BackendTimeout | BackendOverloaded | BackendBusy | CannotEmbed
"""After these another deployment may be asked, but not the same one once more."""


class RetryReason(StrEnum):
    """Why another attempt was made, or another model asked. Closed: label values of retries and fallbacks."""

    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    BUSY = "busy"
    OVERLOADED = "overloaded"
    BAD_REPLY = "bad-reply"
    UNSUPPORTED = "unsupported"
    SERVER_ERROR = "server-error"
    NOT_READY = "not-ready"
    CIRCUIT_OPEN = "circuit-open"
    QUEUE_FULL = "queue-full"
    QUEUE_TIMEOUT = "queue-timeout"


_REASONS: tuple[tuple[type[RouterError], RetryReason], ...] = (
    (BackendTimeout, RetryReason.TIMEOUT),
    (BackendBusy, RetryReason.BUSY),
    (BackendOverloaded, RetryReason.OVERLOADED),
    (BadReply, RetryReason.BAD_REPLY),
    (CannotEmbed, RetryReason.UNSUPPORTED),
    (BackendUnavailable, RetryReason.UNAVAILABLE),
    (Unavailable, RetryReason.NOT_READY),
    (CircuitOpen, RetryReason.CIRCUIT_OPEN),
    (QueueFull, RetryReason.QUEUE_FULL),
    (QueueTimeout, RetryReason.QUEUE_TIMEOUT),
)


def failure_of(exchange: Exchange) -> RouterError | None:
    """The error that a reply's status stands for; None when it is the caller's own (400, 401, 422, 501…)."""
    status = exchange.status
    backend = exchange.backend
    if status in (429, 503):
        return BackendOverloaded(backend, status, exchange.retry_after_s)
    if status in _RETRYABLE_STATUSES or (status >= 500 and status != 501):
        return BackendRejected(backend, status)
    if status < 400:
        return BadReply(backend, f"answered {status}, which is no answer to an inference")
    return None


def may_fall_back(failure: RouterError) -> bool:
    """Whether another model may answer where this one failed, or kept its callers out."""
    return failure.retryable or isinstance(failure, Unavailable | CircuitOpen | QueueFull | QueueTimeout)


def retry_reason(failure: RouterError) -> RetryReason:
    for kind, reason in _REASONS:
        if isinstance(failure, kind):
            return reason
    return RetryReason.SERVER_ERROR
