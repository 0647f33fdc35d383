"""Finds a backend that answers: choose, try, try elsewhere, fall back to another model. The decision never waits.

`Router.send` returns the first reply that may be shown to the caller, with its body (plain) or its first
bytes (stream): until a byte was used, another attempt is possible. Every attempt is written into the
request's record. Not for: HTTP towards the caller (gateway) or where the table comes from (processes).
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum

import msgspec

from llm_router.backends.base import Backend
from llm_router.chat import Endpoint, InferenceRequest, Usage
from llm_router.errors import (
    BackendBusy,
    BackendError,
    BackendOverloaded,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    CannotEmbed,
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
_NO_SUCH_ENDPOINT = frozenset({404, 405, 501})
_DOWN_AFTER = 3  # consecutive failures to reach a backend before it is reported down: one may be chance
_EVENT_STREAM = b"text/event-stream"
_NOT_AGAIN = BackendTimeout | BackendOverloaded | BackendBusy | CannotEmbed


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

    __slots__ = ("_elsewhere", "backend", "may_embed", "name", "ready", "upstream_model")

    def __init__(self, backend: Backend, upstream_model: str, spec: BackendSpec, elsewhere: Mapping[str, int]) -> None:
        self._elsewhere = elsewhere
        self.backend = backend
        self.name = backend.name
        self.upstream_model = upstream_model
        self.ready = spec.ready
        self.may_embed = spec.embeddings is not False

    @property
    def in_use(self) -> int:
        return self.backend.in_use + self._elsewhere.get(self.name, 0)


class _Model:
    __slots__ = ("fallbacks", "name", "policy", "spec", "targets")

    def __init__(self, spec: ModelSpec, targets: tuple[_Target, ...], policy: Policy) -> None:
        self.spec = spec
        self.name = spec.name
        self.targets = targets
        self.policy = policy
        self.fallbacks = spec.fallbacks

    @property
    def is_ready(self) -> bool:
        return any(target.ready for target in self.targets)

    def candidates(self, endpoint: Endpoint) -> list[_Target]:
        """The deployments that may be asked now; none while no backend of the model is up."""
        ready = [target for target in self.targets if target.ready]
        if endpoint is Endpoint.EMBEDDING:
            # If none may, the first one explains why not.
            return [target for target in ready if target.may_embed] or ready
        return ready


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
        self._elsewhere: dict[str, int] = {}
        self._retry = RetrySpec()
        self._budget = RetryBudget(self._retry)
        self.table = RoutingTable()

    # -- the table -----------------------------------------------------------------------------------

    def update(self, table: RoutingTable) -> None:
        """Swap the table. Backends that did not change keep their connections.

        Raises: what `open_backend` raises; nothing has changed then.
        """
        backends: dict[str, tuple[BackendSpec, Backend]] = {}
        opened: dict[str, Backend] = {}
        try:
            for spec in table.backends:
                old = self._backends.get(spec.name)
                if old is not None and _same_server(old[0], spec):
                    backends[spec.name] = (spec, old[1])
                else:
                    opened[spec.name] = self._open_backend(spec)
                    backends[spec.name] = (spec, opened[spec.name])
        except BaseException:
            for backend in opened.values():
                self._close_backend(backend)
            raise
        for name, (_, backend) in self._backends.items():
            if name in opened or name not in backends:
                self._close_backend(backend)
                self._failures.pop(name, None)
        self._backends = backends
        if table.retry != self._retry:
            self._retry = table.retry
            self._budget = RetryBudget(table.retry)
        self._models = {}
        for model in table.models:
            targets = []
            for deployment in model.deployments:
                spec, backend = self._backends[deployment.backend]
                targets.append(_Target(backend, deployment.upstream_model, spec, self._elsewhere))
            strategy = model.strategy or table.strategy
            policy = self._policies.get(strategy)
            if policy is None:
                policy = self._policies[strategy] = POLICIES[strategy]()
            self._models[model.name] = _Model(model, tuple(targets), policy)
        self.table = table

    def backends(self) -> Iterator[Backend]:
        """The backends of the current table."""
        return (backend for _, backend in self._backends.values())

    def count_elsewhere(self, in_use: Mapping[str, int]) -> None:
        """Take in how many requests other processes have in flight, by backend: `least-loaded` adds them to ours."""
        self._elsewhere.clear()
        self._elsewhere.update(in_use)

    def is_ready(self) -> bool:
        """Whether at least one model can be asked now."""
        return any(model.is_ready for model in self._models.values())

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
        first = self._models.get(request.model)
        if first is None:
            raise ModelNotFound(self.not_found(request.model))
        self._budget.request(self._clock())
        exchange, failure = await self._try_model(first, request, record)
        for name in first.fallbacks:
            if failure is None or not (failure.retryable or isinstance(failure, Unavailable)):
                break
            model = self._models.get(name)
            if model is None or not model.is_ready:
                continue  # it left with a newer table, or has nothing to say: what we have is the better answer
            record.fallback_reasons += ((record.model, _reason(failure)),)
            exchange, failure = await self._try_model(model, request, record)
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
        exchange: Exchange | None = None
        failure: RouterError | None = None
        tried: set[str] = set()
        retry = 0
        while True:
            # The table may have been swapped since the last attempt: the connections of the old one are closed.
            model = self._models.get(model.name, model)
            candidates = model.candidates(request.endpoint)
            if not candidates:
                return exchange, failure or Unavailable(
                    f"model {model.name!r} is not ready: no backend of it is up; GET /admin/models or "
                    "`llm-router models list` tells more; or retry shortly"
                )
            choices = [target for target in candidates if target.name not in tried] or candidates
            index, reason = model.policy.choose(model.name, choices)
            target = choices[index]
            if failure is None:
                record.reason = reason
            else:
                record.retry_reasons += ((model.name, _reason(failure)),)
            exchange, failure = await self._attempt(target, request, record)
            if failure is None:
                return exchange, None
            retry += 1
            tried.add(target.name)
            has_other = any(other.name not in tried for other in candidates)
            if not self._may_retry(failure, retry, has_other=has_other):
                return exchange, failure
            if not has_other:
                await asyncio.sleep(backoff_s(self._retry, retry, self._rng))

    def _may_retry(self, failure: RouterError, retry: int, *, has_other: bool) -> bool:
        """Another backend may be tried after any retryable fault; the same one only if it may have recovered.

        A backend that said "too many" or did not answer for minutes is not asked again: its Retry-After goes
        to the caller. Neither is one that cannot embed.
        """
        if not failure.retryable or retry >= self._retry.attempts:
            return False
        if not has_other and isinstance(failure, _NOT_AGAIN):
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
            if not isinstance(error, BackendBusy):  # that was our own bound
                self._seen(backend, answered=not isinstance(error, BackendUnavailable | BackendTimeout))
            return None, error
        except BaseException:
            attempt.ended_at = self._clock()
            attempt.outcome = attempt.outcome or "cancelled"
            if exchange is not None:
                exchange.reply.close()
            raise
        if self._failures:
            self._seen(backend, answered=True)
        return exchange, failure

    async def _receive(self, exchange: Exchange, backend: Backend, request: InferenceRequest) -> RouterError | None:
        reply = exchange.reply
        status = reply.status
        if status == 200 and request.stream and exchange.header(b"content-type").startswith(_EVENT_STREAM):
            exchange.body = await reply.chunk()
            if not exchange.body:
                raise BadReply(exchange.backend, "the stream ended before its first event")
            exchange.streaming = True
            return None
        body = await reply.read()
        exchange.body = body if status == 200 else backend.without_secrets(body)
        if status in _NO_SUCH_ENDPOINT and request.endpoint is Endpoint.EMBEDDING:
            said = backend.problem_in(exchange.body)
            raise CannotEmbed(
                exchange.backend, f"cannot embed (it answered {status}{': ' if said else ''}{said}); ask another model"
            )
        if status == 200:
            exchange.usage = backend.usage_of(exchange.body)
            exchange.finish(self._clock(), "success")
            return None
        failure = _failure_of(exchange)
        outcome = FaultDomain.CALLER if failure is None else failure.domain
        exchange.finish(self._clock(), outcome)
        return failure

    def _seen(self, backend: Backend, *, answered: bool) -> None:
        """Counts consecutive failures to reach a backend; tells when it goes down or comes back."""
        name = backend.name
        current = self._backends.get(name)
        if current is None or current[1] is not backend:
            return  # it was replaced meanwhile: that says nothing of its successor
        if answered:
            if self._failures.pop(name, 0) >= _DOWN_AFTER:
                self._on_backend(name, True)
        else:
            count = self._failures[name] = self._failures.get(name, 0) + 1
            if count == _DOWN_AFTER:
                self._on_backend(name, False)

    def not_found(self, name: str) -> str:
        """The message for a model that does not exist, with close names."""
        shown = name if len(name) <= 100 else name[:100] + "…"
        close = difflib.get_close_matches(shown, self._models, n=3, cutoff=0.5)
        if close:
            hint = "did you mean " + " or ".join(repr(match) for match in close) + "?"
        elif self._models:
            names = ", ".join(repr(other) for other in itertools.islice(self._models, 4))
            hint = f"there {'is' if len(self._models) == 1 else 'are'} {names}"
            if len(self._models) > 4:
                hint += f" and {len(self._models) - 4} more: GET /v1/models lists them"
        else:
            hint = "no model is configured yet; see `llm-router models --help`"
        return f"model {shown!r} does not exist; {hint}"


def _same_server(old: BackendSpec, new: BackendSpec) -> bool:
    """Whether connections opened for `old` can serve `new`: only readiness may differ."""
    return msgspec.structs.replace(old, ready=True) == msgspec.structs.replace(new, ready=True)


def _failure_of(exchange: Exchange) -> RouterError | None:
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


def _reason(failure: RouterError) -> RetryReason:
    match failure:
        case BackendTimeout():
            return RetryReason.TIMEOUT
        case BackendBusy():
            return RetryReason.BUSY
        case BackendOverloaded():
            return RetryReason.OVERLOADED
        case BadReply():
            return RetryReason.BAD_REPLY
        case CannotEmbed():
            return RetryReason.UNSUPPORTED
        case BackendUnavailable():
            return RetryReason.UNAVAILABLE
        case Unavailable():
            return RetryReason.NOT_READY
        case _:
            return RetryReason.SERVER_ERROR
