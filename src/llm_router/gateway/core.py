"""Serves one request: check, read, route, answer, and write down once what happened.

Knows the request and the responder of a front, the router and the recorder; knows no sockets, no ASGI and nothing
of alerts, dashboards or files. The record of a request is finished before its last bytes are handed to the front,
so that a reply which a client received whole is always counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from urllib.parse import unquote

import msgspec

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.backends.openai_compatible import message_in
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import (
    BackendBusy,
    BackendError,
    BackendOverloaded,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    BadReply,
    CannotEmbed,
    InvalidRequest,
    ModelNotFound,
    RouterError,
    ShuttingDown,
    Unavailable,
)
from llm_router.gateway import generate, openai
from llm_router.gateway.seam import ClientGone, HeaderList, Refusal, RefusalReply, Request, Responder
from llm_router.gateway.sse import StreamWatch
from llm_router.routing.router import Exchange, Router
from llm_router.signals import OTHER, Recorder, RequestRecord
from llm_router.upstream.pool import Reply

_log = logging.getLogger("llm_router.gateway")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}").fullmatch
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; never sent, only counted
_GAPS_KEPT = 256
_END_AFTER_DONE_S = 1.0
_ROUTES_KEPT = 1000
_JSON = (b"content-type", b"application/json")
# Of an upstream's reply headers these are not for callers: framing and connection are ours to set, cookies and
# CORS would be the provider's word about our origin, the rest tells of the machine behind.
_NOT_PASSED = frozenset(
    b"content-length server date via set-cookie alt-svc strict-transport-security x-request-id keep-alive vary "
    b"access-control-allow-origin access-control-allow-credentials access-control-allow-headers "
    b"access-control-allow-methods access-control-expose-headers access-control-max-age x-powered-by "
    # A router behind this one speaks of itself.
    b"x-llm-router-model x-llm-router-backend x-llm-router-strategy x-llm-router-attempts "
    b"x-llm-router-overhead-ms".split()
)

# What control serves, as route templates: a path outside this list is `__other__`.
_FORWARDED_PATHS = frozenset({"/", "/metrics", "/metrics/json", "/health", "/admin/models"})
_FORWARDED_PREFIXES = ("/metrics/", "/health/", "/debug", "/admin/", "/api/v1/", "/api/v2/", "/-/")

Handler = Callable[[Request, Responder, RequestRecord], Awaitable[None]]
Forward = Callable[[Request, Responder], Awaitable[int]]


class Core:
    """The request path between a front and the router.

    Args:
        router: finds a backend that answers.
        recorder: receives every finished request.
        access: which hosts and pages may call.
        forward: serves the monitoring and admin paths; None where there are none (library mode).
        monitoring_paths: configured paths that `forward` serves beside the usual ones.
        clock: monotonic seconds, with better than millisecond resolution.
    """

    def __init__(
        self,
        router: Router,
        recorder: Recorder,
        *,
        access: AccessSettings,
        forward: Forward | None,
        monitoring_paths: frozenset[str] = frozenset(),
        clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._recorder = recorder
        self._guard = Guard(access)
        self._forward = forward
        self._monitoring_paths = monitoring_paths
        self._clock = clock
        self._id_prefix = secrets.token_hex(8) + "-"
        self._ids = itertools.count(1)
        self._route_headers: dict[tuple[str, str, str, int], HeaderList] = {}
        self.draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        chat, completions = self._inference(Endpoint.CHAT), self._inference(Endpoint.COMPLETION)
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", chat),
            "/v1/completions": ("POST", completions),
            "/v1/embeddings": ("POST", self._inference(Endpoint.EMBEDDING)),
            "/api/generate": ("POST", self._generate),
            "/v1/models": ("GET", self._models),
            "/health/live": ("GET", self._live),
            "/health/ready": ("GET", self._ready),
        }

    def allow(self, access: AccessSettings) -> None:
        """Use other access settings from the next request on."""
        self._guard = Guard(access)

    # -- entry -----------------------------------------------------------------------------------------

    async def __call__(self, request: Request, responder: Responder) -> None:
        """Serve one request. Raises nothing but CancelledError, when the client left."""
        headers = request.headers
        given = headers.get(b"x-request-id")
        if given is None or _REQUEST_ID(given) is None:
            request_id = f"{self._id_prefix}{next(self._ids)}"
        else:
            request_id = given.decode("ascii")
        route, method, handler = self._find(request.path)
        record = RequestRecord(request.method, route, request_id, request.received_at)
        self._recorder.begin()
        self._in_flight += 1
        try:
            self._guard.check(
                request.method,
                headers.get(b"host", b""),
                headers.get(b"origin", b""),
                headers.get(b"sec-fetch-site", b""),
                headers.get(b"content-type", b""),
                has_body=bool(request.body),
            )
            if method not in (request.method, "*") and not (method == "GET" and request.method == "HEAD"):
                handler = self._other_method
            await handler(request, responder, record)
        except RouterError as error:
            self._fail(error, request, responder, record)
        except (ClientGone, asyncio.CancelledError) as error:
            record.status = _CLIENT_CLOSED_REQUEST
            record.outcome = "cancelled"
            record.error_type = "client_gone"
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception:
            _log.exception("request %s failed: a fault of the router itself", request_id)
            self._fail(RouterError("internal error; the log has the details"), request, responder, record)
        finally:
            self._in_flight -= 1
            if self.draining and not self._in_flight:
                self._idle.set()
            if not record.finished:
                self._recorder.finish(record, self._clock())

    async def drain(self) -> None:
        """Refuse new inferences from now on; return when every request in flight has ended."""
        self.draining = True
        if self._in_flight:
            await self._idle.wait()

    def refuse(self, refusal: Refusal) -> RefusalReply:
        """The reply to what the front could not accept as a request; counts it."""
        given = refusal.request_id
        request_id = given.decode("ascii") if _REQUEST_ID(given) else f"{self._id_prefix}{next(self._ids)}"
        route = self._find(refusal.path)[0] if refusal.path else OTHER
        record = RequestRecord(refusal.method or OTHER, route, request_id, refusal.received_at)
        self._recorder.begin()
        record.status = refusal.error.status
        record.error_type = error_type(refusal.error)
        self._recorder.finish(record, self._clock())
        headers = [_JSON, (b"x-request-id", request_id.encode()), *refusal.error.headers]
        return RefusalReply(refusal.error.status, headers, _error_body(refusal.error, route, request_id))

    def _find(self, path: str) -> tuple[str, str, Handler]:
        """Route template, allowed method (`*` for any) and handler of a path."""
        found = self._routes.get(path)
        if found is not None:
            return path, found[0], found[1]
        if path.startswith("/v1/models/"):
            return "/v1/models/{id}", "GET", self._model
        if self._forward is not None:
            if path in _FORWARDED_PATHS or path in self._monitoring_paths:
                return path, "*", self._forwarded
            for prefix in _FORWARDED_PREFIXES:
                if path.startswith(prefix):
                    return prefix.rstrip("/") + "/*", "*", self._forwarded
        return OTHER, "*", self._unknown

    # -- inference -------------------------------------------------------------------------------------

    def _inference(self, endpoint: Endpoint) -> Handler:
        async def handle(request: Request, responder: Responder, record: RequestRecord) -> None:
            if self.draining:
                raise ShuttingDown("the router is shutting down; retry elsewhere or in a moment")
            inference = openai.read_request(endpoint, request.body)
            self._begin_inference(inference, record)
            exchange = await self._router.send(inference, record)
            try:
                if exchange.streaming:
                    await self._stream(exchange, inference, request, responder, record)
                else:
                    self._answer(exchange, request, responder, record)
            finally:
                exchange.finish(self._clock(), "cancelled")

        return handle

    def _begin_inference(self, inference: InferenceRequest, record: RequestRecord) -> None:
        record.is_inference = True
        record.strategy = self._router.strategy_of(inference.model)

    def _answer(self, exchange: Exchange, request: Request, responder: Responder, record: RequestRecord) -> None:
        """A plain reply, or the backend's own error, as it came."""
        status = exchange.status
        if status == 200:
            self._succeed(exchange, record)
        else:
            if not _is_json_object(exchange.body):
                raise _unreadable(exchange)
            record.status = status
            record.error_type = _upstream_error_type(status)
        now = self._clock()
        headers = self._headers(record, now, request)
        headers += [header for header in exchange.reply.headers if header[0] not in _NOT_PASSED]
        self._recorder.finish(record, now)
        responder.start(status, headers)
        responder.end(exchange.body)

    def _succeed(self, exchange: Exchange, record: RequestRecord) -> None:
        record.status = 200
        record.outcome = "success"
        if exchange.usage is not None:
            record.input_tokens = exchange.usage.input_tokens
            record.output_tokens = exchange.usage.output_tokens
            record.usage_source = "provider"

    async def _stream(
        self,
        exchange: Exchange,
        inference: InferenceRequest,
        request: Request,
        responder: Responder,
        record: RequestRecord,
    ) -> None:
        """Pass the events on as they come. What goes wrong after the head becomes an error event."""
        clock = self._clock
        reply = exchange.reply
        watch = StreamWatch(hide_usage=not inference.wants_usage)
        record.status = 200
        record.gaps_s = []
        record.first_token_at = last = clock()
        headers = self._headers(record, last, request)
        headers += [header for header in reply.headers if header[0] not in _NOT_PASSED]
        responder.mark_stream()
        responder.start(200, headers)
        gaps = record.gaps_s
        data = exchange.body
        out = b""
        try:
            while data:
                out = watch.feed(data)
                if watch.done:
                    break
                if out:
                    waiting = responder.write(out)
                    if waiting is not None:
                        await waiting
                data = await reply.chunk()
                if data:
                    now = clock()
                    gaps.append(now - last)
                    last = now
                    if len(gaps) >= _GAPS_KEPT:
                        self._recorder.gaps(record)
            else:
                out = watch.rest()
        except BackendError as error:
            self._cut(error, exchange, watch, responder, record)
            return
        except BaseException:
            take_usage(watch, record, whole=False)
            raise
        record.outcome = "success"
        take_usage(watch, record, whole=True)
        exchange.attempt.ended_at, exchange.attempt.outcome = clock(), "success"
        self._recorder.finish(record, exchange.attempt.ended_at)
        responder.end(out)
        if not reply.complete:
            await _drain(reply)

    def _cut(
        self, error: BackendError, exchange: Exchange, watch: StreamWatch, responder: Responder, record: RequestRecord
    ) -> None:
        """The backend failed after the head was sent: the client learns it by an error event and no [DONE]."""
        now = self._clock()
        exchange.finish(now, error.domain)
        record.error_type = error_type(error)
        take_usage(watch, record, whole=False)
        self._recorder.finish(record, now)
        responder.end(b"data: %s\n\n" % openai.error_object(error, record.request_id))

    async def _generate(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        if self.draining:
            raise ShuttingDown("the router is shutting down; retry elsewhere or in a moment")
        inference = generate.read_generate(request.body, self._router.default_model())
        self._begin_inference(inference, record)
        exchange = await self._router.send(inference, record)
        try:
            self._envelop(exchange, request, responder, record)
        finally:
            exchange.finish(self._clock(), "cancelled")

    def _envelop(self, exchange: Exchange, request: Request, responder: Responder, record: RequestRecord) -> None:
        """A chat reply in the envelope of /api/generate; the backend's error as an error of ours."""
        if exchange.status != 200:
            problem = message_in(exchange.body) or f"answered {exchange.status}"
            raise BackendRejected(exchange.backend, exchange.status, problem, exchange.retry_after_s)
        now = self._clock()
        latency_ms = (now - record.started_at) * 1000
        result = generate.generated(
            exchange.body, exchange.backend, model=record.model, strategy=record.strategy, latency_ms=latency_ms
        )
        self._succeed(exchange, record)
        headers = [_JSON, *self._headers(record, now, request)]
        self._recorder.finish(record, now)
        responder.start(200, headers)
        responder.end(generate.success(result, record.request_id, latency_ms))

    def _headers(self, record: RequestRecord, now: float, request: Request) -> HeaderList:
        """The headers of every inference reply: where it went, how often it was tried, and our share of the time."""
        attempts = record.attempts
        upstream_s = 0.0
        for attempt in attempts:
            upstream_s += (attempt.ended_at or now) - attempt.started_at
        overhead_ms = (now - record.started_at - upstream_s) * 1000
        route = (record.model, attempts[-1].backend if attempts else "none", record.strategy, len(attempts))
        headers = [
            (b"x-request-id", record.request_id.encode()),
            (b"x-llm-router-overhead-ms", b"%.3f" % (overhead_ms if overhead_ms > 0 else 0.0)),
            *(self._route_headers.get(route) or self._new_route_headers(route)),
        ]
        origin = request.headers.get(b"origin")
        if origin is not None:
            headers += self._guard.cors(origin)
        return headers

    def _new_route_headers(self, route: tuple[str, str, str, int]) -> HeaderList:
        """The headers that are the same for every request that went this way; kept, as there are few ways."""
        model, backend, strategy, attempts = route
        if len(self._route_headers) >= _ROUTES_KEPT:
            self._route_headers.clear()
        headers = self._route_headers[route] = [
            (b"x-llm-router-model", _header_value(model)),
            (b"x-llm-router-backend", _header_value(backend)),
            (b"x-llm-router-strategy", strategy.encode()),
            (b"x-llm-router-attempts", b"%d" % attempts),
        ]
        return headers

    # -- everything else -------------------------------------------------------------------------------

    async def _models(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        self._reply(responder, record, request, 200, openai.model_list(self._router.table))

    async def _model(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        name = unquote(request.path.removeprefix("/v1/models/"))
        model = self._router.known(name)
        if model is None:
            raise ModelNotFound(self._router.not_found(name))
        self._reply(responder, record, request, 200, msgspec.json.encode(openai.model_object(model)))

    async def _live(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        body = msgspec.json.encode({"status": "alive", "timestamp": _timestamp(), "ready": self._router.is_ready()})
        self._reply(responder, record, request, 200, body)

    async def _ready(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        """This worker's own readiness, so that it holds while control is away."""
        if self.draining:
            status, word = 503, "draining"
        elif self._router.is_ready() or not self._router.table.models:
            status, word = 200, "ready"
        else:
            status, word = 503, "initializing"
        self._reply(
            responder, record, request, status, msgspec.json.encode({"status": word, "timestamp": _timestamp()})
        )

    def _reply(self, responder: Responder, record: RequestRecord, request: Request, status: int, body: bytes) -> None:
        record.status = status
        record.outcome = "success"
        headers = [_JSON, (b"x-request-id", record.request_id.encode())]
        origin = request.headers.get(b"origin")
        if origin is not None:
            headers += self._guard.cors(origin)
        self._recorder.finish(record, self._clock())
        responder.start(status, headers)
        responder.end(body)

    async def _forwarded(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        assert self._forward is not None
        record.status = status = await self._forward(request, responder)
        if 400 <= status < 500:
            record.error_type = _request_error_type(status)

    async def _unknown(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        shown = request.path if len(request.path) <= 200 else request.path[:200] + "…"
        raise InvalidRequest(f"there is no {shown!r} here; GET / lists the endpoints", status=404, code="not_found")

    async def _other_method(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        """A CORS preflight of a configured page; anything else is 405 with Allow."""
        headers = request.headers
        if request.method == "OPTIONS":
            asked = headers.get(b"access-control-request-headers", b"")
            preflight = self._guard.preflight(headers.get(b"origin", b""), asked)
            if preflight:
                record.status = 204
                self._recorder.finish(record, self._clock())
                responder.start(204, [(b"x-request-id", record.request_id.encode()), *preflight])
                responder.end()
                return
        allow = self._find(request.path)[1]
        if allow == "GET":
            allow = "GET, HEAD"
        raise InvalidRequest(
            f"{request.path} takes {allow}, not {request.method[:20]}",
            status=405,
            code="method_not_allowed",
            headers=((b"allow", allow.encode()),),
        )

    # -- failure ---------------------------------------------------------------------------------------

    def _fail(self, error: RouterError, request: Request, responder: Responder, record: RequestRecord) -> None:
        """Answer with the error object, if the reply has not begun; count it either way."""
        record.status = error.status
        record.outcome = "error"
        record.error_type = error_type(error)
        now = self._clock()
        request_id = record.request_id
        if record.is_inference:
            headers = self._headers(record, now, request)
        else:
            headers = [(b"x-request-id", request_id.encode())]
            origin = request.headers.get(b"origin")
            if origin is not None:
                headers += self._guard.cors(origin)
        headers.append(_JSON)
        headers += getattr(error, "headers", ())
        retry_after_s = getattr(error, "retry_after_s", None)
        if retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
        body = _error_body(error, record.route, request_id)
        if not record.finished:
            self._recorder.finish(record, now)
        if not responder.started and not responder.gone:
            responder.start(error.status, headers)
            responder.end(body)


_ERROR_TYPES: tuple[tuple[type[RouterError], str], ...] = (
    (BadReply, "bad_reply"),
    (CannotEmbed, "rejected"),
    (BackendTimeout, "timeout"),
    (BackendOverloaded, "overloaded"),
    (BackendBusy, "limit"),
    (BackendUnavailable, "unreachable"),
    (BackendError, "inference_error"),
    (ModelNotFound, "not_found"),
    (ShuttingDown, "unavailable"),
    (Unavailable, "unavailable"),
)


def error_type(error: RouterError) -> str:
    """The key of `families.ERROR_KINDS` for an error."""
    if isinstance(error, InvalidRequest):
        return _request_error_type(error.status)
    for kind, name in _ERROR_TYPES:
        if isinstance(error, kind):
            return name
    return "internal"


def _request_error_type(status: int) -> str:
    return {404: "not_found", 403: "forbidden", 421: "forbidden", 503: "limit"}.get(status, "bad_request")


def _error_body(error: RouterError, route: str, request_id: str) -> bytes:
    """The error in the form of the route's replies."""
    if route == "/api/generate":
        return generate.failure(error.message, request_id)
    return openai.error_object(error, request_id)


def _upstream_error_type(status: int) -> str:
    if status in (429, 503):
        return "overloaded"
    return "inference_error" if status >= 500 else "rejected"


def _unreadable(exchange: Exchange) -> BackendError:
    """The error for an error reply that is no JSON, like a proxy's page: only what it says by status is kept."""
    shown = exchange.body[:80].decode("utf-8", "replace")
    problem = f"answered {exchange.status} with no JSON: {shown!r}"
    if exchange.status in (429, 503):
        return BackendRejected(exchange.backend, exchange.status, problem, exchange.retry_after_s)
    return BadReply(exchange.backend, problem)


async def _drain(reply: Reply) -> None:
    """Wait for the end that should follow [DONE]: a connection that is drained can serve again.

    Whoever goes on sending, or does not end, gets one second; the caller has its answer already.
    """
    with contextlib.suppress(TimeoutError, BackendError):
        async with asyncio.timeout(_END_AFTER_DONE_S):
            while await reply.chunk():
                pass


def _is_json_object(body: bytes) -> bool:
    return body.lstrip()[:1] == b"{"


def take_usage(watch: StreamWatch, record: RequestRecord, *, whole: bool) -> None:
    """Tokens of a stream: what the backend said, else the events that passed."""
    if watch.usage is not None:
        record.input_tokens = watch.usage.input_tokens
        record.output_tokens = watch.usage.output_tokens
        record.usage_source = "provider"
    else:
        record.output_tokens = watch.events
        record.usage_source = "estimated" if whole else "partial"


def _header_value(name: str) -> bytes:
    """A configured name as a header value; characters that no header may hold become `?`."""
    return name.encode("latin-1", "replace") if name.isprintable() else b"?"


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
