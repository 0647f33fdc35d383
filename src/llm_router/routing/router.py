"""Finds a backend that answers: wait for a slot, choose, try, try elsewhere, fall back to another model.

`Router.send` returns the first reply that may be shown to the caller, with its body (plain) or its first
bytes (stream): until a byte was used, another attempt is possible. The decision never waits; the only wait before
an attempt is the one for the model's slot. Every attempt is written into the request's record.
Not for: HTTP towards the caller, deadlines of whole requests (gateway) or where the table comes from (processes).
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from llm_router.backends.base import Backend
from llm_router.backends.wire import trace_lines
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import (
    BackendBusy,
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    CannotEmbed,
    CircuitOpen,
    FaultDomain,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RouterError,
    Unavailable,
)
from llm_router.routing.breaker import Breaker, State
from llm_router.routing.exchange import Exchange
from llm_router.routing.failures import NOT_AGAIN, failure_of, may_fall_back, retry_reason
from llm_router.routing.needs import need_of
from llm_router.routing.policies import CustomFunction, Policy, Reason, load_custom, make_policy
from llm_router.routing.queue import ModelQueue
from llm_router.routing.retry import RetryBudget, backoff_s
from llm_router.routing.speed import Speed
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.routing.targets import Model, Target, part_of, places_of, slots_of
from llm_router.signals import OTHER, Attempt, RequestRecord

__all__ = ["Exchange", "Router"]

_NO_SUCH_ENDPOINT = frozenset({404, 405, 501})
_DOWN_AFTER = 3  # consecutive failures to reach a backend before it is reported down: one may be chance
_EVENT_STREAM = b"text/event-stream"


def _tell_nobody(name: str, state: State, until: float) -> None:
    pass


class Router:
    """Routes requests over a table that can be swapped while requests are in flight.

    Args:
        open_backend: makes the backend (with its connections) for a spec; called once per new or changed spec.
        close_backend: called when a backend has left the table; requests in flight on it may go on.
        on_backend: called with (name, is up) when a backend that answered stops answering, or the reverse.
        on_circuit: called with (name, state, instant from which on an open one may be probed, else 0) when this
            router opened, probes or closed the circuit of a backend.
        clock: monotonic seconds.
        rng: for the jitter between retries, and for policies.
        custom: the function of the `custom` strategy where the table names none.
    """

    def __init__(
        self,
        *,
        open_backend: Callable[[BackendSpec], Backend],
        close_backend: Callable[[Backend], None],
        on_backend: Callable[[str, bool], None],
        on_circuit: Callable[[str, State, float], None] = _tell_nobody,
        clock: Callable[[], float],
        rng: random.Random,
        custom: CustomFunction | None = None,
    ) -> None:
        self._open_backend = open_backend
        self._close_backend = close_backend
        self._on_backend = on_backend
        self._on_circuit = on_circuit
        self._clock = clock
        self._rng = rng
        self._models: dict[str, Model] = {}
        self._backends: dict[str, tuple[BackendSpec, Backend]] = {}
        self._breakers: dict[str, Breaker] = {}
        self._troubled: set[str] = set()  # backends whose circuit is not closed
        self._policies: dict[str, Policy] = {}
        self._own_custom = custom
        self._custom = custom
        self._queues: dict[str, ModelQueue] = {}
        self._speeds: dict[tuple[str, str], tuple[Backend, Speed]] = {}
        self._max_waiting = 0
        self._failures: dict[str, int] = {}
        self._elsewhere: dict[str, int] = {}
        self._retry = RetrySpec()
        self._budget = RetryBudget(self._retry)
        self.table = RoutingTable()

    def __repr__(self) -> str:
        return f"<Router models={list(self._models)} waiting={self.waiting} troubled={sorted(self._troubled)}>"

    # -- the table -----------------------------------------------------------------------------------

    def update(self, table: RoutingTable, workers: int = 1) -> None:
        """Swap the table. Backends that did not change keep their connections, circuits and speeds; queues stay.

        Args:
            workers: routers that share the bounds of queues evenly, this one included.

        Raises: what `open_backend` raises; ConfigError when the custom strategy cannot be had. Nothing has changed
            then.
        """
        policies, custom = self._made_policies(table)
        backends = self._opened(table)
        self._policies, self._custom = policies, custom
        for name, (_, backend) in self._backends.items():
            if name not in backends or backends[name][1] is not backend:
                self._close_backend(backend)
                self._failures.pop(name, None)
                self._forget_circuit(name)
        self._backends = backends
        self._keep_circuits(table)
        if table.retry != self._retry:
            self._retry = table.retry
            self._budget = RetryBudget(table.retry)
        self._keep_queues(table, workers)
        self._keep_speeds(table)
        specs = {name: spec for name, (spec, _) in backends.items()}
        self._models = {
            model.name: Model(
                model,
                [self._target(deployment) for deployment in model.deployments],
                specs,
                policies[model.strategy or table.strategy],
                self._queues[model.name],
            )
            for model in table.models
        }
        for policy in policies.values():
            policy.keep(self._models)
        self.table = table

    def _made_policies(self, table: RoutingTable) -> tuple[dict[str, Policy], CustomFunction | None]:
        """Those that there are, and those that the table needs besides; and the operator's function."""
        policies = self._policies.copy()
        custom = self._custom
        if table.custom != self.table.custom:
            custom = load_custom(table.custom) if table.custom else self._own_custom
            policies.pop("custom", None)
        for strategy in (table.strategy, *(model.strategy for model in table.models)):
            if strategy and strategy not in policies:
                policies[strategy] = make_policy(strategy, rng=self._rng, clock=self._clock, custom=custom)
        return policies, custom

    def _opened(self, table: RoutingTable) -> dict[str, tuple[BackendSpec, Backend]]:
        """The backends of the table: those that there are, and new ones. What was opened is closed if one fails."""
        backends: dict[str, tuple[BackendSpec, Backend]] = {}
        opened: list[Backend] = []
        try:
            for spec in table.backends:
                old = self._backends.get(spec.name)
                if old is not None and _same_server(old[0], spec):
                    backends[spec.name] = (spec, old[1])
                else:
                    backend = self._open_backend(spec)
                    opened.append(backend)
                    backends[spec.name] = (spec, backend)
        except BaseException:
            for backend in opened:
                self._close_backend(backend)
            raise
        return backends

    def _target(self, deployment: Deployment) -> Target:
        backend = self._backends[deployment.backend][1]
        measured = self._speeds.get((deployment.backend, deployment.upstream_model))
        return Target(
            deployment,
            backend,
            self._breakers[deployment.backend],
            None if measured is None else measured[1],
            self._elsewhere,
        )

    def _keep_circuits(self, table: RoutingTable) -> None:
        if table.breaker != self.table.breaker:
            for name in tuple(self._breakers):
                self._forget_circuit(name)
        for name in self._backends:
            if name not in self._breakers:
                self._breakers[name] = Breaker(table.breaker, functools.partial(self._circuit_changed, name))

    def _keep_queues(self, table: RoutingTable, workers: int) -> None:
        """A queue for each model, with the bounds of now. Who waits for a model that has left is called, and told so."""
        self._max_waiting = part_of(table.max_waiting, workers)
        old = self._queues
        self._queues = {}
        for model in table.models:
            backends = {deployment.backend for deployment in model.deployments}
            slots = slots_of(model.queue, [self._backends[name][0] for name in backends], workers)
            places = places_of(model.queue, workers)
            queue = old.pop(model.name, None)
            if queue is None:
                queue = ModelQueue(slots, places)
            else:
                queue.resize(slots, places)
            self._queues[model.name] = queue
        for queue in old.values():
            queue.resize(queue.busy + queue.waiting, 0)

    def _keep_speeds(self, table: RoutingTable) -> None:
        """The speeds to measure: of deployments that some model has beside others. A new server has a new one."""
        old = self._speeds
        self._speeds = {}
        for model in table.models:
            if len(model.deployments) > 1:
                for deployment in model.deployments:
                    key = (deployment.backend, deployment.upstream_model)
                    backend = self._backends[deployment.backend][1]
                    kept = old.get(key)
                    self._speeds[key] = kept if kept is not None and kept[0] is backend else (backend, Speed())

    def backends(self) -> Iterator[Backend]:
        """The backends of the current table."""
        return (backend for _, backend in self._backends.values())

    def count_elsewhere(self, in_use: Mapping[str, int]) -> None:
        """Take in how many requests other processes have in flight, by backend: policies add them to ours."""
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

    def strategy_of(self, name: str, wanted: str | None = None) -> str:
        """The strategy that routes this model when a request wants `wanted`; `__other__` for unknown models."""
        model = self._models.get(name)
        return OTHER if model is None else wanted or model.policy.name

    # -- circuits ------------------------------------------------------------------------------------

    def circuits(self) -> dict[str, tuple[State, float]]:
        """By backend: the state of its circuit now, and from when on it may be probed if it is open (else 0)."""
        now = self._clock()
        return {name: (breaker.state_at(now), breaker.open_until) for name, breaker in self._breakers.items()}

    def open_circuits(self, until: Mapping[str, float]) -> None:
        """Take in which backends other processes found failing, and until when they leave them alone."""
        now = self._clock()
        for name, instant in until.items():
            breaker = self._breakers.get(name)
            if breaker is not None and breaker.adopt(instant, now):
                self._troubled.add(name)

    def _circuit_changed(self, name: str, state: State, until: float) -> None:
        if state is State.CLOSED:
            self._troubled.discard(name)
        else:
            self._troubled.add(name)
        self._on_circuit(name, state, until)

    def _forget_circuit(self, name: str) -> None:
        """The server was exchanged, or the rules: what was counted says nothing any more."""
        self._breakers.pop(name).retire()
        if name in self._troubled:
            self._circuit_changed(name, State.CLOSED, 0.0)

    # -- queues --------------------------------------------------------------------------------------

    def queues(self) -> dict[str, int]:
        """Requests that wait for a slot, by model."""
        return {name: queue.waiting for name, queue in self._queues.items()}

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, of all models."""
        return sum(queue.waiting for queue in self._queues.values())

    def sweep(self, now: float) -> None:
        """End the waits that took too long, as of `now`; to be called about every 0.1 s, which is how late it may be."""
        for queue in self._queues.values():
            if queue.waiting:
                queue.sweep(now)

    # -- requests ------------------------------------------------------------------------------------

    async def send(self, request: InferenceRequest, record: RequestRecord) -> Exchange:
        """The reply to show to the caller.

        Fills model, strategy, reason, attempts, retries, fallbacks and the instants of queueing of the record as it
        goes. A reply with an error status is returned when no other attempt is possible. Cancelling it cuts the
        upstream, or leaves the queue, at once.

        Raises: ModelNotFound; InvalidRequest for a strategy that is not configured; Unavailable when no deployment is
            ready; CircuitOpen when all are left alone; QueueFull, QueueTimeout, Overloaded; BackendError when none
            answered.
        """
        first = self._models.get(request.model)
        if first is None:
            raise ModelNotFound(self.not_found(request.model))
        wanted = None if request.strategy is None else self._wanted(request.strategy)
        now = self._clock()
        self._budget.request(now)
        exchange, failure = await self._try_model(first, wanted, request, record, now)
        if failure is not None:
            for name in first.fallbacks:
                if not may_fall_back(failure):
                    break
                model = self._models.get(name)
                if model is None or not self._can_help(model, request, failure):
                    continue  # it left with a newer table, or has nothing to say: what we have is the better answer
                now = self._clock()
                record.fallback_reasons += ((record.model, retry_reason(failure)),)
                if not record.slot_at:
                    record.waits += ((record.model, now - record.queued_at),)
                exchange, failure = await self._try_model(model, wanted, request, record, now)
                if failure is None:
                    break
        if exchange is not None:
            return exchange
        assert failure is not None
        raise failure

    def _wanted(self, strategy: str) -> Policy:
        """The policy that a request asks for. Raises: InvalidRequest for a custom one where there is none."""
        if strategy == "custom" and self._custom is None:
            raise InvalidRequest("strategy 'custom' is not configured here: set routing.custom", param="strategy")
        policy = self._policies.get(strategy)
        if policy is None:
            policy = self._policies[strategy] = make_policy(
                strategy, rng=self._rng, clock=self._clock, custom=self._custom
            )
        return policy

    def _can_help(self, model: Model, request: InferenceRequest, failure: RouterError) -> bool:
        if isinstance(failure, QueueTimeout) and not model.queue.has_slot:
            return False  # it has waited for as long as it may
        return self._refusal(model, request.endpoint) is None

    async def _try_model(
        self, model: Model, wanted: Policy | None, request: InferenceRequest, record: RequestRecord, now: float
    ) -> tuple[Exchange | None, RouterError | None]:
        """Every attempt at one model: (reply, None), (reply with a retryable error status, it) or (None, error)."""
        policy = wanted or model.policy
        record.model = model.name
        record.strategy = policy.name
        queue = model.queue
        record.queued_at = now
        if queue.take():
            record.slot_at = now
        else:
            record.slot_at = 0.0
            refusal = await self._wait(model, request, record)
            if refusal is not None:
                return None, refusal
        exchange: Exchange | None = None
        try:
            candidates = self._candidates(model, request.endpoint)
            if not candidates:
                return None, self._nobody(model, request.endpoint)
            target, record.reason = _choose(policy, model, candidates, request)
            record.routed_at = record.routed_at or self._clock()
            exchange, failure = await self._attempt(target, request, record)
            if failure is not None:
                exchange, failure = await self._try_again(exchange, failure, target, model, policy, request, record)
        finally:
            if exchange is not None and exchange.streaming:
                exchange.hold(queue, record)
            else:
                queue.release(self._clock() - record.slot_at)
        return exchange, failure

    async def _try_again(
        self,
        exchange: Exchange | None,
        failure: RouterError,
        target: Target,
        model: Model,
        policy: Policy,
        request: InferenceRequest,
        record: RequestRecord,
    ) -> tuple[Exchange | None, RouterError | None]:
        """What `_try_model` returns after a first attempt that failed, while its slot is held."""
        tried: set[tuple[str, str]] = set()
        retry = 0
        while True:
            retry += 1
            tried.add(target.key)
            candidates = self._candidates(model, request.endpoint)
            has_other = any(other.key not in tried for other in candidates)
            if not candidates or not self._may_retry(failure, retry, has_other=has_other):
                return exchange, failure
            if not has_other:
                await asyncio.sleep(backoff_s(self._retry, retry, self._rng))
                candidates = self._candidates(model, request.endpoint)
                if not candidates:
                    return exchange, failure
            record.retry_reasons += ((model.name, retry_reason(failure)),)
            choices = [other for other in candidates if other.key not in tried] or candidates
            target, _ = _choose(policy, model, choices, request)
            exchange, again = await self._attempt(target, request, record)
            if again is None:
                return exchange, None
            failure = again

    def _candidates(self, model: Model, endpoint: Endpoint) -> Sequence[Target]:
        """The deployments that may be asked now, of the newest table: the connections of an older one are closed."""
        candidates = self._models.get(model.name, model).candidates(endpoint)
        if not self._troubled:
            return candidates
        now = self._clock()
        return [target for target in candidates if target.breaker.may(now)]

    def _may_retry(self, failure: RouterError, retry: int, *, has_other: bool) -> bool:
        """Another backend may be tried after any retryable fault; the same one only if it may have recovered.

        A backend that said "too many" or did not answer for minutes is not asked again: its Retry-After goes
        to the caller. Neither is one that cannot embed.
        """
        if not failure.retryable or retry >= self._retry.attempts:
            return False
        if not has_other and isinstance(failure, NOT_AGAIN):
            return False
        return self._budget.spend(self._clock())

    async def _attempt(
        self, target: Target, request: InferenceRequest, record: RequestRecord
    ) -> tuple[Exchange | None, RouterError | None]:
        """One try. A reply with a retryable error status comes back together with the error it stands for."""
        backend, breaker = target.backend, target.breaker
        span_id = trace = ""
        if record.trace_id:  # without a span of ours the caller's goes through as it came
            span_id = f"{self._rng.getrandbits(64) or 1:016x}" if record.span_id else record.parent_id
            trace = trace_lines(record, span_id)
        head, body = backend.encode(request, target.upstream_model, record.request_id, trace)
        now = self._clock()
        ticket = breaker.allow(now)
        attempt = Attempt(target.name, now, span_id, target.upstream_model)
        record.attempts.append(attempt)
        exchange: Exchange | None = None
        try:
            reply = await backend.pool.send(head, body)
            attempt.status = reply.status
            exchange = Exchange(target, ticket, attempt, reply, backend.reader(request), self._clock())
            failure = await self._receive(exchange, backend, request)
        except BackendError as error:
            now = attempt.ended_at = self._clock()
            attempt.outcome = error.domain
            if exchange is not None:
                exchange.reply.close()
            if isinstance(error, BackendBusy | CannotEmbed):  # our own bound; a request that it does not serve
                breaker.release(ticket)
            else:
                breaker.record(ticket, now, failed=True, took_s=now - attempt.started_at)
            if not isinstance(error, BackendBusy):
                self._seen(backend, answered=not isinstance(error, BackendUnavailable | BackendTimeout))
            return None, error
        except BaseException:
            now = attempt.ended_at = self._clock()
            attempt.outcome = attempt.outcome or "cancelled"
            if exchange is not None:
                exchange.reply.close()
            breaker.give_up(ticket, now, waited_s=now - attempt.started_at)
            raise
        if self._failures:
            self._seen(backend, answered=True)
        took_s = exchange.first_byte_at - now
        if failure is not None:
            breaker.record(ticket, attempt.ended_at, failed=True, took_s=took_s, retry_after_s=exchange.retry_after_s)
        elif exchange.status == 200:
            breaker.record(ticket, exchange.first_byte_at, failed=False, took_s=took_s)
        else:
            breaker.release(ticket)
        return exchange, failure

    async def _receive(self, exchange: Exchange, backend: Backend, request: InferenceRequest) -> RouterError | None:
        reply = exchange.reply
        status = reply.status
        if status == 200 and request.stream and exchange.header(b"content-type").startswith(_EVENT_STREAM):
            exchange.body = await exchange.chunk()
            if not exchange.body:
                raise BadReply(exchange.backend, "the stream ended before its first event")
            exchange.first_byte_at = self._clock()
            exchange.streaming = True
            return None
        body = await reply.read()
        if status != 200:
            body = backend.without_secrets(body)
        reader = exchange.reader
        exchange.body = body if reader is None else reader.plain(status, body)
        if status in _NO_SUCH_ENDPOINT and request.endpoint is Endpoint.EMBEDDING:
            said = backend.problem_in(exchange.body)
            raise CannotEmbed(
                exchange.backend, f"cannot embed (it answered {status}{': ' if said else ''}{said}); ask another model"
            )
        now = self._clock()
        if status == 200:
            usage = exchange.usage = backend.usage_of(request.endpoint, exchange.body)
            exchange.finish(now, "success")
            exchange.measure(now, 0 if usage is None else usage.output_tokens)
            return None
        failure = failure_of(exchange)
        exchange.finish(now, FaultDomain.CALLER if failure is None else failure.domain)
        return failure

    # -- waiting for a slot ------------------------------------------------------------------------------

    async def _wait(self, model: Model, request: InferenceRequest, record: RequestRecord) -> RouterError | None:
        """Wait for a slot of the model. Returns: None with the slot taken and its instant in the record, or why not."""
        refusal = self._refusal(model, request.endpoint)
        if refusal is not None:
            return refusal
        queue = model.queue
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def wake(has_come: bool) -> None:
            if not turn.done():  # else it was cancelled, and leaves as soon as its task runs
                turn.set_result(has_come)

        place = queue.join(request.key, request.priority, record.queued_at + model.wait_s, wake)
        try:
            has_come = await turn
        except BaseException:
            queue.leave(place)
            raise
        if not has_come:
            retry_after_s = queue.retry_after_s(model.wait_s)
            return QueueTimeout(
                f"model {model.name!r}: no slot became free within {model.wait_s:g} s; {queue.waiting} requests wait; "
                f"retry in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        if model.name not in self._models:
            queue.leave(place)
            return ModelNotFound(self.not_found(model.name))
        record.slot_at = self._clock()
        return None

    def _refusal(self, model: Model, endpoint: Endpoint) -> RouterError | None:
        """Why a request for the model need not come now; None if it is served or may wait."""
        if not self._candidates(model, endpoint):
            return self._nobody(model, endpoint)
        queue = model.queue
        if queue.has_slot:
            return None
        retry_after_s = queue.retry_after_s(model.wait_s)
        if queue.waiting >= queue.max_waiting:
            return QueueFull(
                f"model {model.name!r}: {queue.waiting} requests wait already, and no more than {queue.max_waiting} may "
                f"(queue.max_waiting); retry in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        waiting = self.waiting
        if waiting >= self._max_waiting:
            return Overloaded(
                f"{waiting} requests wait already for all models, and no more than {self._max_waiting} may "
                f"(routing.max_waiting); retry in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        return None

    def _nobody(self, model: Model, endpoint: Endpoint) -> RouterError:
        """Why no deployment of the model may be asked."""
        breakers = [target.breaker for target in self._models.get(model.name, model).candidates(endpoint)]
        if not breakers:
            return Unavailable(
                f"model {model.name!r} is not ready: no backend of it is up; GET /admin/models or "
                "`llm-router models list` tells more; or retry shortly"
            )
        # Where probes are under way, open_until is 0: the next instant may bring news.
        retry_after_s = max(1.0, min(breaker.open_until for breaker in breakers) - self._clock())
        return CircuitOpen(
            f"model {model.name!r}: each of its backends failed too often lately and is left alone for a while; "
            f"retry in {math.ceil(retry_after_s)} s",
            retry_after_s=retry_after_s,
        )

    # -- what is known of backends ---------------------------------------------------------------------

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


def _choose(
    policy: Policy, model: Model, candidates: Sequence[Target], request: InferenceRequest
) -> tuple[Target, Reason]:
    """The target of the next attempt, and why."""
    if len(candidates) == 1:
        return candidates[0], Reason.ONLY_DEPLOYMENT
    index, reason = policy.choose(model.name, candidates, functools.partial(need_of, request))
    return candidates[index], reason


def _same_server(old: BackendSpec, new: BackendSpec) -> bool:
    """Whether connections opened for `old` can serve `new`: only readiness may differ."""
    return msgspec.structs.replace(old, ready=True) == msgspec.structs.replace(new, ready=True)
