"""Finds a backend that answers: choose, try, try elsewhere, fall back to another model. The decision never waits.

`Router.send` returns the first reply that may be shown to the caller, with its body (plain) or its first
bytes (stream): until a byte was used, another attempt is possible. Every attempt is written into the
request's record. Not for: HTTP towards the caller (gateway) or where the table comes from (processes).
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import random
from collections.abc import Callable, Iterator
from enum import StrEnum

import msgspec

from llm_router.backends.base import Backend
from llm_router.chat import InferenceRequest, Usage
from llm_router.errors import (
    BackendBusy,
    BackendError,
    BackendOverloaded,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    FaultDomain,
    ModelNotFound,
    RouterError,
    Unavailable,
)
from llm_router.routing.policies import POLICIES, Policy
from llm_router.routing.retry import RetryBudget, backoff_s
from llm_router.routing.table import BackendSpec, ModelSpec, RetrySpec, RoutingTable
from llm_router.signals import OTHER, Attempt, RequestRecord
from llm_router.upstream.pool import Reply

_RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_ERROR_BODY = 64 * 1024
_DOWN_AFTER = 3  # consecutive failures to reach a backend before it is reported down: one may be chance
_EVENT_STREAM = b"text/event-stream"


class RetryReason(StrEnum):
    """Why another attempt was made, or another model asked. Closed: label values of retries and fallbacks."""

    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    BUSY = "busy"
    OVERLOADED = "overloaded"
    BAD_REPLY = "bad-reply"
    SERVER_ERROR = "server-error"
    NOT_READY = "not-ready"


class Exchange:
    """A reply that may be shown. Close it in a `finally`; closing an unfinished one cuts the upstream at once.

    Attributes:
        body: the whole body of a plain reply; the first bytes of a stream.
        streaming: whether more may follow: read it with `reply.chunk()`.
        usage: of a plain successful reply, None if the backend gave none.
    """

    __slots__ = ("attempt", "backend", "body", "reply", "streaming", "usage")

    def __init__(self, backend: str, attempt: Attempt, reply: Reply) -> None:
        self.backend = backend
        self.attempt = attempt
        self.reply = reply
        self.body = b""
        self.streaming = False
        self.usage: Usage | None = None

    @property
    def status(self) -> int:
        return self.reply.status

    def header(self, name: bytes) -> bytes:
        """Value of a reply header (lower-case name), empty if absent."""
        for key, value in self.reply.headers:
            if key == name:
                return value
        return b""

    @property
    def retry_after_s(self) -> float | None:
        """What the backend's Retry-After says in seconds; None without one, or for a date."""
        with contextlib.suppress(ValueError):
            return max(0.0, float(self.header(b"retry-after")))
        return None

    def finish(self, now: float, outcome: str) -> None:
        """The attempt ended at `now`; only the first call counts."""
        if not self.attempt.outcome:
            self.attempt.ended_at = now
            self.attempt.outcome = outcome
        self.reply.close()


class _Target:
    """A deployment: its backend, and the model's name there."""

    __slots__ = ("backend", "name", "ready", "upstream_model")

    def __init__(self, backend: Backend, upstream_model: str, *, ready: bool) -> None:
        self.backend = backend
        self.name = backend.name
        self.upstream_model = upstream_model
        self.ready = ready

    @property
    def in_use(self) -> int:
        return self.backend.in_use


class _Model:
    __slots__ = ("fallbacks", "name", "policy", "spec", "targets")

    def __init__(self, spec: ModelSpec, targets: tuple[_Target, ...], policy: Policy) -> None:
        self.spec = spec
        self.name = spec.name
        self.targets = targets
        self.policy = policy
        self.fallbacks = spec.fallbacks


class Router:
    """Routes requests over a table that can be swapped while requests are in flight.

    Args:
        open_backend: makes the backend (with its connections) for a spec; called once per new or changed spec.
        close_backend: called when a backend has left the table; requests in flight on it may go on.
        on_backend: called with (name, is up) when a backend that answered stops answering, or the reverse.
        clock: monotonic seconds.
        rng: for the jitter between retries.
    """

    def __init__(
        self,
        *,
        open_backend: Callable[[BackendSpec], Backend],
        close_backend: Callable[[Backend], None],
        on_backend: Callable[[str, bool], None],
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._open_backend = open_backend
        self._close_backend = close_backend
        self._on_backend = on_backend
        self._clock = clock
        self._rng = rng
        self._models: dict[str, _Model] = {}
        self._backends: dict[str, tuple[BackendSpec, Backend]] = {}
        self._policies: dict[str, Policy] = {}
        self._failures: dict[str, int] = {}
        self._retry = RetrySpec()
        self._budget = RetryBudget(self._retry)
        self.table = RoutingTable()

    # -- the table -----------------------------------------------------------------------------------

    def update(self, table: RoutingTable) -> None:
        """Swap the table. Backends that did not change keep their connections."""
        before, self._backends = self._backends, {}
        for spec in table.backends:
            old = before.get(spec.name)
            if old is not None and _same_server(old[0], spec):
                del before[spec.name]
                self._backends[spec.name] = (spec, old[1])
            else:
                self._backends[spec.name] = (spec, self._open_backend(spec))
        for _, backend in before.values():
            self._close_backend(backend)
        self._failures = {name: count for name, count in self._failures.items() if name in self._backends}
        if table.retry != self._retry:
            self._retry = table.retry
            self._budget = RetryBudget(table.retry)
        self._models = {}
        for model in table.models:
            targets = []
            for deployment in model.deployments:
                spec, backend = self._backends[deployment.backend]
                targets.append(_Target(backend, deployment.upstream_model, ready=spec.ready))
            strategy = model.strategy or table.strategy
            policy = self._policies.get(strategy)
            if policy is None:
                policy = self._policies[strategy] = POLICIES[strategy]()
            self._models[model.name] = _Model(model, tuple(targets), policy)
        self.table = table

    def backends(self) -> Iterator[Backend]:
        """The backends of the current table."""
        return (backend for _, backend in self._backends.values())

    def is_ready(self) -> bool:
        """Whether at least one model can be asked now."""
        return any(target.ready for model in self._models.values() for target in model.targets)

    def default_model(self) -> str:
        """The model of callers that name none; the only one there is, if no default is configured."""
        if self.table.default_model or len(self._models) != 1:
            return self.table.default_model
        return next(iter(self._models))

    def known(self, name: str) -> ModelSpec | None:
        model = self._models.get(name)
        return model.spec if model else None

    def strategy_of(self, name: str) -> str:
        """The strategy that routes this model; `__other__` for unknown models."""
        model = self._models.get(name)
        return model.policy.name if model else OTHER

    # -- requests ------------------------------------------------------------------------------------

    async def send(self, request: InferenceRequest, record: RequestRecord) -> Exchange:
        """The reply to show to the caller.

        Fills model, strategy, reason, attempts, retries and fallbacks of the record as it goes. A reply with
        an error status is returned when no other attempt is possible. Cancelling it cuts the upstream at once.

        Raises: ModelNotFound; Unavailable when no deployment is ready; BackendError when none answered.
        """
        name = request.model
        first = self._models.get(name)
        if first is None:
            raise ModelNotFound(self.not_found(name))
        self._budget.request(self._clock())
        exchange, failure = await self._try_model(first, request, record)
        if failure is None and exchange is not None:
            return exchange
        for name in first.fallbacks:
            if failure is not None and not failure.retryable and not isinstance(failure, Unavailable):
                break
            if exchange is not None:
                exchange.finish(self._clock(), exchange.attempt.outcome)
            record.fallback_reasons += ((record.model, _reason(failure, exchange)),)
            exchange, failure = await self._try_model(self._models[name], request, record)
            if failure is None and exchange is not None:
                return exchange
        if exchange is not None:
            return exchange
        assert failure is not None
        raise failure

    async def _try_model(
        self, model: _Model, request: InferenceRequest, record: RequestRecord
    ) -> tuple[Exchange | None, RouterError | None]:
        """Every attempt at one model: (reply, None), (reply with a retryable error status, it) or (None, error)."""
        record.model = model.name
        record.strategy = model.policy.name
        candidates = [target for target in model.targets if target.ready]
        if not candidates:
            return None, Unavailable(
                f"model {model.name!r} is not ready: no backend of it is up; see /admin/models, or retry shortly"
            )
        tried: set[str] = set()
        retry = 0
        while True:
            index, reason = model.policy.choose(model.name, candidates)
            target = candidates[index]
            if retry == 0:
                record.reason = reason
            exchange, failure = await self._attempt(target, request, record)
            if failure is None:
                return exchange, None
            retry += 1
            tried.add(target.name)
            elsewhere = [other for other in candidates if other.name not in tried]
            if not self._may_retry(failure, retry, has_other=bool(elsewhere)):
                return exchange, failure
            if exchange is not None:
                exchange.finish(self._clock(), "")
            record.retry_reasons += (_reason(failure, exchange),)
            if elsewhere:
                candidates = elsewhere
            else:
                await asyncio.sleep(backoff_s(self._retry, retry, self._rng))

    def _may_retry(self, failure: RouterError, retry: int, *, has_other: bool) -> bool:
        """Another backend may be tried after any retryable fault; the same one only if it may have recovered.

        A backend that said "too many" or did not answer for minutes is not asked again: its Retry-After goes
        to the caller.
        """
        if not failure.retryable or retry >= self._retry.attempts:
            return False
        if not has_other and isinstance(failure, BackendTimeout | BackendOverloaded | BackendBusy):
            return False
        return self._budget.spend(self._clock())

    async def _attempt(
        self, target: _Target, request: InferenceRequest, record: RequestRecord
    ) -> tuple[Exchange | None, RouterError | None]:
        """One try. A reply with a retryable error status comes back together with the error it stands for."""
        backend = target.backend
        head, body = backend.encode(request, target.upstream_model, record.request_id)
        attempt = Attempt(target.name, self._clock())
        record.attempts.append(attempt)
        exchange: Exchange | None = None
        try:
            reply = await backend.pool.send(head, body)
            exchange = Exchange(target.name, attempt, reply)
            failure = await self._receive(exchange, backend, request)
        except BackendError as error:
            attempt.ended_at = self._clock()
            attempt.outcome = error.domain
            if exchange is not None:
                exchange.reply.close()
            self._seen(target.name, answered=not isinstance(error, BackendUnavailable | BackendTimeout))
            return None, error
        except BaseException:
            attempt.ended_at = self._clock()
            attempt.outcome = attempt.outcome or "cancelled"
            if exchange is not None:
                exchange.reply.close()
            raise
        if self._failures:
            self._seen(target.name, answered=True)
        return exchange, failure

    async def _receive(self, exchange: Exchange, backend: Backend, request: InferenceRequest) -> RouterError | None:
        reply = exchange.reply
        status = reply.status
        if status == 200 and request.stream and exchange.header(b"content-type").startswith(_EVENT_STREAM):
            exchange.body = await reply.chunk()
            exchange.streaming = True
            return None
        exchange.body = await reply.read()
        if status == 200:
            exchange.usage = backend.usage_of(exchange.body)
            exchange.finish(self._clock(), "success")
            return None
        failure = _failure_of(exchange)
        outcome = FaultDomain.CALLER if failure is None else failure.domain
        exchange.finish(self._clock(), outcome)
        return failure

    def _seen(self, backend: str, *, answered: bool) -> None:
        """Counts consecutive failures to reach a backend; tells when it goes down or comes back."""
        if answered:
            if self._failures.pop(backend, 0) >= _DOWN_AFTER:
                self._on_backend(backend, True)
        else:
            count = self._failures[backend] = self._failures.get(backend, 0) + 1
            if count == _DOWN_AFTER:
                self._on_backend(backend, False)

    def not_found(self, name: str) -> str:
        """The message for a model that does not exist, with close names."""
        shown = name if len(name) <= 100 else name[:100] + "…"
        close = difflib.get_close_matches(shown, self._models, n=3, cutoff=0.5)
        if close:
            hint = "did you mean " + " or ".join(repr(match) for match in close) + "?"
        elif self._models:
            hint = f"GET /v1/models lists the {len(self._models)} there are"
        else:
            hint = "no model is configured yet; see `llm-router models --help`"
        return f"model {shown!r} does not exist; {hint}"


def _same_server(old: BackendSpec, new: BackendSpec) -> bool:
    """Whether connections opened for `old` can serve `new`: only readiness may differ."""
    return msgspec.structs.replace(old, ready=True) == msgspec.structs.replace(new, ready=True)


def _failure_of(exchange: Exchange) -> RouterError | None:
    """The error that a reply's status stands for; None when it is the caller's own (400, 401, 422…)."""
    status = exchange.status
    backend = exchange.backend
    if status in (429, 503):
        return BackendOverloaded(backend, status, exchange.retry_after_s)
    if status in _RETRYABLE_STATUSES or status >= 500:
        return BackendRejected(backend, status)
    if status < 400:
        return BadReply(backend, f"answered {status}, which is no answer to an inference")
    return None


def _reason(failure: RouterError | None, exchange: Exchange | None) -> RetryReason:
    match failure:
        case BackendTimeout():
            return RetryReason.TIMEOUT
        case BackendBusy():
            return RetryReason.BUSY
        case BackendOverloaded():
            return RetryReason.OVERLOADED
        case BadReply():
            return RetryReason.BAD_REPLY
        case BackendUnavailable():
            return RetryReason.UNAVAILABLE
        case Unavailable():
            return RetryReason.NOT_READY
        case _:
            return RetryReason.SERVER_ERROR
