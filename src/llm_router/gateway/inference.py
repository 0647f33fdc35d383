"""One inference from the caller's body to the last byte of its answer.

Who asks, what they may, whether the answer is known already, which backend gives it, and how it reaches the caller:
in this order, each step handed in. Knows nothing of paths and methods (core.py) or of what is made of the record.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llm_router.accounts.keys import KeySpec
from llm_router.accounts.limiter import Limiter, Plan, Reservation
from llm_router.backends.openai_compatible import message_in
from llm_router.cache.base import Cached
from llm_router.chat import InferenceRequest, Usage
from llm_router.errors import (
    BackendError,
    BackendRejected,
    BadReply,
    DeadlineExceeded,
    LimitExceeded,
    ModelNotFound,
    Overloaded,
    RouterError,
    ShuttingDown,
    Unauthorized,
    Unavailable,
)
from llm_router.gateway.answers import Answers, Keeper
from llm_router.gateway.auth import Doorman
from llm_router.gateway.guess import output_tokens
from llm_router.gateway.quotes import without_quotes
from llm_router.gateway.replies import CACHED, JSON, ReplyHeaders, error_type, passed, upstream_error_type
from llm_router.gateway.seam import HeaderList, Request, Responder
from llm_router.gateway.sse import Watch, watch_for
from llm_router.gateway.wishes import take_wishes
from llm_router.models.prices import Price
from llm_router.routing.needs import estimate_input_tokens, estimate_tokens
from llm_router.routing.router import Exchange, Router
from llm_router.routing.table import ModelSpec, RoutingTable
from llm_router.signals import Recorder, RequestRecord

_GAPS_KEPT = 256
_END_AFTER_DONE_S = 1.0
_MICRO = 1_000_000
_CONTENT_KEPT_BYTES = 256 * 1024  # of a stream, where the operator wants to see what was said


class Answer(NamedTuple):
    """A whole answer, for who puts it into an envelope of its own. `backend` gave it, now or when it was cached."""

    body: bytes
    backend: str
    is_cached: bool


class Form(NamedTuple):
    """How one kind of callers speaks.

    Args:
        read: the request in a body. Raises: InvalidRequest.
        error_event: the last event of a stream that broke, from the error and the request's id.
        envelope: what callers get for a whole answer, from it, the record and the seconds it took; None: as it is.
            Raises: BadReply. With an envelope an error of the backend becomes one of ours.
        take_headers: keeps headers that belong to the request in its dialect. Raises: InvalidRequest.
    """

    read: Callable[[bytes], InferenceRequest]
    error_event: Callable[[RouterError, str], bytes]
    envelope: Callable[[Answer, RequestRecord, float], bytes] | None = None
    take_headers: Callable[[Mapping[bytes, bytes], InferenceRequest], None] | None = None


class _Turn(NamedTuple):
    """One request on its way. `allowed` are the headers that tell what limits are left."""

    form: Form
    inference: InferenceRequest
    request: Request
    responder: Responder
    record: RequestRecord
    allowed: Sequence[tuple[bytes, bytes]]


class Inference:
    """Serves inferences. What it is made of may be exchanged between requests.

    Args:
        router: finds a backend that answers.
        recorder: receives every finished request.
        headers: makes the headers of replies.
        doorman: knows the keys; None where somebody else authorises (library mode).
        limiter: knows the limits; None where there are none.
        clock: monotonic seconds.

    Attributes:
        draining: nothing new is accepted.
        late_s: how late the loop is, when that is too late to accept anything; else 0.
        answers: the cache; None for none.
        knows_keys: whether the doorman was told which keys there are; true without one.
        keeps_content: whether records get the bodies of request and reply.
    """

    def __init__(
        self,
        router: Router,
        recorder: Recorder,
        headers: ReplyHeaders,
        *,
        doorman: Doorman | None,
        limiter: Limiter | None,
        clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._recorder = recorder
        self._headers = headers
        self._doorman = doorman
        self._limiter = limiter
        self._clock = clock
        self._priced = RoutingTable()
        self._prices: dict[str, float] = {}
        self.draining = False
        self.late_s = 0.0
        self.answers: Answers | None = None
        self.knows_keys = doorman is None
        self.keeps_content = False

    async def identify(self, request: Request) -> KeySpec | None:
        """Whose key the request shows. Raises: Unauthorized, late if the address failed often; Forbidden."""
        if self._doorman is None:
            return None
        if not self.knows_keys:
            raise Unavailable("the router has not read yet which keys there are; retry in a second")
        try:
            return self._doorman.identify(request.headers, request.client)
        except Unauthorized as error:
            request.body = b""  # a refusal may be held back for seconds, and needs it no more
            raise await self._doorman.hold(error) from None

    async def serve(self, form: Form, request: Request, responder: Responder, record: RequestRecord) -> None:
        """Answer one request. Raises: RouterError while nothing was sent yet; ClientGone."""
        if self.draining:
            raise ShuttingDown("the router is shutting down; retry elsewhere or in a moment")
        if self.late_s:
            raise Overloaded(f"this worker is {self.late_s:.1f} s behind and takes nothing new; retry in a second")
        key = await self.identify(request)
        record.identified_at = self._clock()
        if self.keeps_content:
            record.request_body = request.body
        inference = form.read(request.body)
        if form.take_headers is not None:
            form.take_headers(request.headers, inference)
        record.is_inference = True
        if key is not None:
            record.key, record.key_id, inference.key = key.name, key.id, key.name
            Doorman.check_model(key, inference.model)
        timeout_s = take_wishes(request.headers, inference, self._router.table.deadline_s)
        record.strategy = self._router.strategy_of(inference.model, inference.strategy)
        if self._router.known(inference.model) is None:
            raise ModelNotFound(self._router.not_found(inference.model))
        plan = None if self._limiter is None else self._limiter.plan(record.key_id, inference.model)
        if plan is None and not timeout_s:
            await self._answer(_Turn(form, inference, request, responder, record, ()))
            return
        reservation = None
        if plan is not None:
            reservation = await self._reserve(plan, inference, record)
            record.allowed_at = self._clock()
        try:
            allowed = () if reservation is None else reservation.headers()
            turn = _Turn(form, inference, request, responder, record, allowed)
            if timeout_s:
                await self._answer_within(timeout_s, turn)
            else:
                await self._answer(turn)
        finally:
            if reservation is not None:
                self._settle(reservation, inference, record)

    # -- limits ----------------------------------------------------------------------------------------

    async def _reserve(self, plan: Plan, inference: InferenceRequest, record: RequestRecord) -> Reservation:
        assert self._limiter is not None
        tokens = estimate_tokens(inference) if plan.needs_tokens or plan.needs_usd else 0
        micro_usd = self._worst_price(inference.model, tokens) if plan.needs_usd else 0
        try:
            reservation = self._limiter.reserve(plan, tokens, micro_usd)
            return reservation if isinstance(reservation, Reservation) else await reservation
        except LimitExceeded as error:
            record.limit_hit = (error.scope, error.limit)
            record.model = inference.model
            raise

    def _worst_price(self, model: str, tokens: int) -> int:
        """Millionths of a dollar that an inference may cost at the dearest deployment, fallbacks' included; 0 if no
        price is known."""
        if self._priced is not self._router.table:
            self._priced = self._router.table
            own = {spec.name: _dearest(spec) for spec in self._priced.models}
            self._prices = {
                spec.name: max(own.get(name, 0.0) for name in (spec.name, *spec.fallbacks))
                for spec in self._priced.models
            }
        # Dollars per million tokens are millionths of a dollar per token.
        return round(self._prices.get(model, 0.0) * tokens)

    def _settle(self, reservation: Reservation, inference: InferenceRequest, record: RequestRecord) -> None:
        """What was really used. Whoever left before anybody knew is taken to have used what was asked for."""
        tokens = record.input_tokens + record.output_tokens
        micro_usd = round(record.cost_usd * _MICRO)
        attempts = record.attempts
        if record.usage_source == "none" and attempts and attempts[-1].outcome == "cancelled":
            tokens = estimate_tokens(inference)
            micro_usd = self._worst_price(inference.model, tokens)
        reservation.settle(tokens, micro_usd)

    # -- the answer --------------------------------------------------------------------------------------

    async def _answer_within(self, timeout_s: float, turn: _Turn) -> None:
        """As `_answer`, but for so long at most. Raises: DeadlineExceeded, if nothing was sent yet."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._answer(turn)
        except TimeoutError:
            responder, record = turn.responder, turn.record
            error = DeadlineExceeded(f"the request took longer than the {timeout_s:g} s that it may take in all")
            if not responder.started:
                raise error from None
            if not record.finished:
                record.outcome, record.error_type, record.error = "error", error_type(error), error.message
                self._recorder.finish(record, self._clock())
                responder.end(turn.form.error_event(error, record.request_id))

    async def _answer(self, turn: _Turn) -> None:
        """From the cache, or from a backend."""
        inference, record = turn.inference, turn.record
        keeper: Keeper | None = None
        if self.answers is not None:
            found = await self.answers.find(inference, turn.request.headers, record)
            if record.cache_type:  # otherwise it was not asked
                record.looked_up_at = self._clock()
            if isinstance(found, Cached):
                self._replay(turn, found)
                return
            keeper = found
        try:
            exchange = await self._router.send(inference, record)
            try:
                if exchange.streaming:
                    await self._stream(turn, exchange, keeper)
                else:
                    self._whole(turn, exchange, keeper)
            finally:
                exchange.finish(self._clock(), "cancelled")
        finally:
            if keeper is not None:
                keeper.close()

    def _replay(self, turn: _Turn, found: Cached) -> None:
        form, inference, request, responder, record, allowed = turn
        record.model = inference.model
        record.status, record.outcome, record.cached = 200, "success", True
        now = self._clock()
        body, content_type = found.body, found.content_type
        if form.envelope is not None:
            body, content_type = form.envelope(Answer(body, found.backend, True), record, now), JSON[1]
        headers = [*self._headers.inference(record, now, request), CACHED, (b"content-type", content_type), *allowed]
        self._note_reply(record, content_type, body)
        self._recorder.finish(record, now)
        if found.stream:
            responder.mark_stream()
        responder.start(200, headers)
        responder.end(body)

    def _whole(self, turn: _Turn, exchange: Exchange, keeper: Keeper | None) -> None:
        """A plain reply, or the backend's own error, as it came, or in the envelope of the form."""
        form, inference, request, responder, record, allowed = turn
        status, body = exchange.status, exchange.body
        now = self._clock()
        if status != 200:
            if keeper is not None:
                keeper.refuse()
            self._refused(form, exchange, request, record)
        elif form.envelope is not None:
            body = form.envelope(Answer(body, exchange.backend, False), record, now)
        if status == 200:
            record.status, record.outcome = 200, "success"
            if exchange.usage is not None:
                account(exchange.usage, exchange.price, record)
            else:
                guess(exchange, inference, record)
            if keeper is not None:
                keeper.keep(exchange.header(b"content-type"), exchange.body, exchange.backend, record)
        headers = [*self._headers.inference(record, now, request), *allowed]
        if form.envelope is not None:
            headers.append(JSON)
        elif status == 200:
            headers += passed(exchange.reply.headers)
        else:
            headers += [(name, exchange.without_secrets(value)) for name, value in passed(exchange.reply.headers)]
        self._note_reply(record, exchange.header(b"content-type") if form.envelope is None else JSON[1], body)
        self._recorder.finish(record, now)
        responder.start(status, headers)
        responder.end(body)

    def _note_reply(self, record: RequestRecord, content_type: bytes, body: bytes) -> None:
        record.response_type, record.response_bytes = content_type, len(body)
        if self.keeps_content:
            record.response_body = body

    def _refused(self, form: Form, exchange: Exchange, request: Request, record: RequestRecord) -> None:
        """The backend answered with an error. Raises: BackendError where callers do not get it as it is."""
        if form.envelope is not None:
            problem = message_in(exchange.body) or f"answered {exchange.status}"
            raise BackendRejected(exchange.backend, exchange.status, problem, exchange.retry_after_s)
        if exchange.body.lstrip()[:1] != b"{":
            raise _unreadable(exchange)
        record.status = exchange.status
        record.error_type = upstream_error_type(exchange.status)
        said = without_quotes(message_in(exchange.body), request.body)
        record.error = said or f"backend {exchange.backend!r} answered {exchange.status}"

    async def _stream(self, turn: _Turn, exchange: Exchange, keeper: Keeper | None) -> None:
        """Pass the events on as they come. What goes wrong after the head becomes an error event."""
        form, inference, request, responder, record, allowed = turn
        clock = self._clock
        watch = watch_for(inference.endpoint, hide_usage=not inference.wants_usage)
        record.status = 200
        record.gaps_s = []
        record.first_token_at = last = clock()
        headers: HeaderList = [*self._headers.inference(record, last, request), *allowed]
        headers += passed(exchange.reply.headers)
        record.response_type = exchange.header(b"content-type")
        content = record.response_body = bytearray() if self.keeps_content else None
        responder.mark_stream()
        responder.start(200, headers)
        gaps = record.gaps_s
        data = exchange.body
        out = b""
        try:
            while data:
                out = watch.feed(data)
                if watch.failed:  # in words of the backend's, which may quote what we sent
                    out = exchange.without_secrets(out)
                if watch.done:
                    break
                if out:
                    record.response_bytes += len(out)
                    if keeper is not None:
                        keeper.add(out)
                    if content is not None and len(content) < _CONTENT_KEPT_BYTES:
                        content += out
                    waiting = responder.write(out)
                    if waiting is not None:
                        await waiting
                data = await exchange.chunk()
                if data:
                    now = clock()
                    gaps.append(now - last)
                    last = now
                    if len(gaps) >= _GAPS_KEPT:
                        self._recorder.gaps(record)
            else:
                out = exchange.without_secrets(watch.rest())
        except BackendError as error:
            self._cut(turn, error, exchange, watch, form.error_event(error, record.request_id))
            return
        except BaseException:
            take_usage(watch, inference, exchange.price, record, whole=False)
            raise
        if watch.failed:  # the backend said so itself, in an event that passed as it came
            broken = BackendError(exchange.backend, "failed in the middle of a stream")
            self._cut(turn, broken, exchange, watch, out)
            return
        record.outcome = "success"
        take_usage(watch, inference, exchange.price, record, whole=True)
        if keeper is not None and watch.done:
            keeper.add(out)
            keeper.keep(exchange.header(b"content-type"), None, exchange.backend, record)
        now = clock()
        exchange.attempt.ended_at, exchange.attempt.outcome = now, "success"
        record.response_bytes += len(out)
        if content is not None:
            content += out
        self._recorder.finish(record, now)
        responder.end(out)
        if not exchange.reply.complete:
            await _drain(exchange)

    def _cut(self, turn: _Turn, error: BackendError, exchange: Exchange, watch: Watch, last: bytes) -> None:
        """The backend failed after the head was sent: the client learns it by the event `last`, and no end mark."""
        now, record = self._clock(), turn.record
        exchange.finish(now, error.domain)
        record.outcome, record.error_type = "error", error_type(error)
        record.error = without_quotes(error.message, turn.request.body)
        record.response_bytes += len(last)
        take_usage(watch, turn.inference, exchange.price, record, whole=False)
        self._recorder.finish(record, now)
        turn.responder.end(last)


def _dearest(spec: ModelSpec) -> float:
    """US dollars per million tokens at the dearest deployment; 0 if no price is known."""
    return max(
        (deployment.price.dearest() for deployment in spec.deployments if deployment.price is not None), default=0.0
    )


def account(usage: Usage, price: Price | None, record: RequestRecord, *, is_known: bool = True) -> None:
    """Write tokens and cost into the record. `is_known`: the usage is the provider's word, no estimate."""
    record.input_tokens = usage.input_tokens
    record.output_tokens = usage.output_tokens
    record.cached_tokens = usage.cached_tokens
    record.reasoning_tokens = usage.reasoning_tokens
    if is_known:
        record.usage_source = "provider"
    if price is not None:
        record.cost_usd = price.cost_usd(usage)
        record.cost_status = "exact" if is_known else "estimated"


def guess(exchange: Exchange, inference: InferenceRequest, record: RequestRecord) -> None:
    """Write estimates into the record of a plain answer whose backend tells no usage."""
    usage = Usage(estimate_input_tokens(inference), output_tokens(exchange.body))
    account(usage, exchange.price, record, is_known=False)
    record.usage_source = "estimated"


def take_usage(
    watch: Watch, inference: InferenceRequest, price: Price | None, record: RequestRecord, *, whole: bool
) -> None:
    """Tokens of a stream: what the backend said, else the events that passed and a guess at the input."""
    if watch.usage is not None and (whole or watch.done):
        account(watch.usage, price, record)
        return
    usage = Usage(estimate_input_tokens(inference), watch.events)
    account(watch.usage or usage, price, record, is_known=False)
    record.usage_source = "estimated" if whole else "partial"


def _unreadable(exchange: Exchange) -> BackendError:
    """The error for an error reply that is no JSON, like a proxy's page: only what it says by status is kept."""
    shown = exchange.body[:80].decode("utf-8", "replace")
    problem = f"answered {exchange.status} with no JSON: {shown!r}"
    if exchange.status in (429, 503):
        return BackendRejected(exchange.backend, exchange.status, problem, exchange.retry_after_s)
    return BadReply(exchange.backend, problem)


async def _drain(exchange: Exchange) -> None:
    """Wait for the end that should follow the end mark: a connection that is drained can serve again.

    Whoever goes on sending, or does not end, gets one second; the caller has its answer already.
    """
    with contextlib.suppress(TimeoutError, BackendError):
        async with asyncio.timeout(_END_AFTER_DONE_S):
            while await exchange.reply.chunk():
                pass
