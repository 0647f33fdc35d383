"""The error tree of the router: everything that can go wrong, with what each layer needs to react to it.

Each error knows its `code` (JSON, logs, metrics), HTTP `status`, whether another attempt may help
(`retryable`) and whose fault it is (`domain`). Messages name the thing, the value and the way out.
Not for: rendering errors (gateway), counting them (instruments).
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class FaultDomain(StrEnum):
    """Whose fault a failure is. Closed: the values are label values of `attempts_total`."""

    CALLER = "caller"
    POLICY = "policy"
    GATEWAY = "gateway"
    PROVIDER = "provider"
    NETWORK = "network"


class RouterError(Exception):
    """Root of every error this package raises on purpose."""

    code: ClassVar[str] = "internal_error"
    status: int = 500
    retryable: ClassVar[bool] = False
    domain: ClassVar[FaultDomain] = FaultDomain.GATEWAY

    @property
    def message(self) -> str:
        return str(self)


class ConfigError(RouterError):
    """The configuration cannot be used.

    Args:
        key: path of the offending key, like `models[0].backends`; empty for the file as a whole.
        problem: what is wrong, with the value and, where there is one, the way out.
    """

    code = "config_error"
    status = 422  # of a reload; at a start nobody is there to be answered

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


# -- the caller's request ---------------------------------------------------------------------------


class RequestError(RouterError):
    """The request cannot be served as it is; sending it again unchanged will not help."""

    code = "invalid_request"
    status = 400
    domain = FaultDomain.CALLER


class InvalidRequest(RequestError):
    """Malformed or unacceptable input.

    Args:
        status: the precise HTTP status (400, 405, 408, 413, 415, 421, 431, 505...).
        code: a narrower code than `invalid_request`, from a closed list in the call sites.
        param: the field of the body at fault, for clients that show it.
        headers: extra reply headers, like `Allow`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code  # type: ignore[misc]  # narrower than the class's own
        self.param = param
        self.headers = headers


class ModelNotFound(RequestError):
    """No such model is configured; close names are in the message."""

    code = "model_not_found"
    status = 404


class Unauthorized(RequestError):
    """A key is needed and none, or none that is valid, was given; it does not say which keys exist.

    Args:
        delay_s: how long to wait before answering, because this address failed often.
    """

    code = "unauthorized"
    status = 401

    def __init__(self, message: str, *, delay_s: float = 0.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s
        self.headers: tuple[tuple[bytes, bytes], ...] = ((b"www-authenticate", b"Bearer"),)


class TooManyFailures(Unauthorized):
    """An address goes on asking without a valid key; one that is valid gets through at any time."""

    code = "too_many_failures"
    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = ()


class Forbidden(RequestError):
    """The key is valid and may not do this: wrong scope, or a model that it is not meant for."""

    code = "forbidden"
    status = 403


class LimitExceeded(RequestError):
    """A limit of requests, tokens or concurrency is reached.

    Args:
        scope: key, model or global: whose limit it is.
        limit: which one, a key of `accounts.limits.KINDS`.
        retry_after_s: when a request of this size has a chance again.
        headers: the `x-ratelimit-*` headers.
    """

    code = "rate_limit_exceeded"
    status = 429
    domain = FaultDomain.POLICY

    def __init__(
        self,
        message: str,
        *,
        scope: str,
        limit: str,
        retry_after_s: float,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.scope = scope
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.headers = headers


class BudgetExceeded(LimitExceeded):
    """The money that a key may spend in a day or month is spent."""

    code = "budget_exceeded"


class TurnedAway(RouterError):
    """There is no room for the request now. `retry_after_s`: when to come back."""

    code = "turned_away"
    status = 503
    domain = FaultDomain.POLICY

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(TurnedAway):
    """As many requests as may wait for a model are waiting already."""

    code = "queue_full"
    status = 429


class QueueTimeout(TurnedAway):
    """The request waited for its turn at a model for as long as it may."""

    code = "queue_timeout"
    status = 408


class CircuitOpen(TurnedAway):
    """Every backend that could answer failed so much lately that it is left alone for a while."""

    code = "circuit_open"


class Overloaded(TurnedAway):
    """This worker cannot take more: its loop is late, or too many requests wait in all."""

    code = "overloaded"
    domain = FaultDomain.GATEWAY


class DeadlineExceeded(RouterError):
    """The time that a request may take in all, with every attempt, is over."""

    code = "deadline_exceeded"
    status = 504
    domain = FaultDomain.POLICY


class ShuttingDown(RouterError):
    """The process is draining: in-flight work ends, nothing new begins."""

    code = "shutting_down"
    status = 503
    retry_after_s = 1.0


class Unavailable(RouterError):
    """A part of the router that this request needs is away (control, a model still loading)."""

    code = "unavailable"
    status = 503
    retry_after_s = 1.0


class StoreUnavailable(RouterError):
    """The database of keys and usage cannot be used now: away, locked, read-only, damaged, or of another version.

    Trying again later may help. The message never holds a password.
    """

    code = "accounts_unavailable"
    status = 503
    retry_after_s = 1.0


class StoreRefused(RouterError):
    """The database takes these rows neither now nor later: a number or text that it cannot hold."""

    code = "accounts_refused"


# -- backends ---------------------------------------------------------------------------------------


class BackendError(RouterError):
    """A backend failed. `backend` is its configured name, never its address or key."""

    code = "backend_error"
    status = 502
    retryable = True
    domain = FaultDomain.PROVIDER

    def __init__(self, backend: str, problem: str) -> None:
        super().__init__(f"backend {backend!r}: {problem}")
        self.backend = backend
        self.problem = problem


class BackendUnavailable(BackendError):
    """It cannot be reached, or the connection broke before a whole reply came."""

    code = "backend_unavailable"
    status = 502
    domain = FaultDomain.NETWORK
    retry_after_s = 1.0


class BackendBusy(BackendError):
    """Every connection to it is in use and none became free in time: our bound, not its fault."""

    code = "backend_busy"
    status = 503
    domain = FaultDomain.GATEWAY
    retry_after_s = 1.0


class BackendTimeout(BackendError):
    """It did not answer in time. `phase` is one of connect, first_byte, gap, total."""

    code = "backend_timeout"
    status = 504
    domain = FaultDomain.PROVIDER

    def __init__(self, backend: str, phase: str, after_s: float) -> None:
        super().__init__(backend, f"no answer in time ({phase} timeout of {after_s:g} s)")
        self.phase = phase
        self.after_s = after_s


class BackendOverloaded(BackendError):
    """It answered 429 or 503 and said, or did not say, when to come back."""

    code = "backend_overloaded"
    status = 429

    def __init__(self, backend: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(backend, f"answered {status}")
        self.status = status
        self.retry_after_s = retry_after_s


class BackendRejected(BackendError):
    """It answered with an error status of its own, which is kept."""

    code = "backend_rejected"

    def __init__(self, backend: str, status: int, problem: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(backend, problem or f"answered {status}")
        self.status = status
        self.retry_after_s = retry_after_s


class CannotEmbed(BackendError):
    """It serves no embeddings. Another backend may; asking this one again will not help."""

    code = "unsupported"
    status = 400
    domain = FaultDomain.CALLER


class BadReply(BackendError):
    """It answered with something that is not valid HTTP, or not what the protocol promises."""

    code = "bad_reply"
    status = 502


# -- models -----------------------------------------------------------------------------------------


class ModelError(RouterError):
    """A local model cannot be used."""

    code = "model_error"
    status = 400
    domain = FaultDomain.CALLER


class BadModelFile(ModelError):
    """The file is no usable GGUF: missing, truncated, corrupt or of another format."""

    code = "bad_model_file"


class BadOptions(ModelError):
    """A model cannot be run with such numbers: context, slots, threads, layers."""

    code = "bad_options"


class OutOfMemory(ModelError):
    """The model does not fit into the memory that is free."""

    code = "out_of_memory"
    status = 507


class PullFailed(ModelError):
    """A model file could not be fetched: unknown source, no network, no room, or not what was promised."""

    code = "pull_failed"
    status = 502
    domain = FaultDomain.NETWORK


class RunnerFailed(ModelError):
    """The runner process of a model did not become ready."""

    code = "runner_failed"
    status = 502
    domain = FaultDomain.GATEWAY
