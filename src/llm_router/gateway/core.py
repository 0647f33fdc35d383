"""Serves one request: check, read, route, answer, and write down once what happened.

Knows the request and the responder of a front, the router and the recorder; knows no sockets, no ASGI and nothing
of alerts, dashboards or files. The record of a request is finished before its last bytes are handed to the front,
so that a reply which a client received whole is always counted.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from urllib.parse import unquote

import msgspec

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.limiter import Limiter
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import BackendError, InvalidRequest, ModelNotFound, RouterError
from llm_router.gateway import anthropic, generate, openai
from llm_router.gateway.answers import Answers
from llm_router.gateway.auth import Doorman
from llm_router.gateway.forward import Forwarded
from llm_router.gateway.inference import Answer, Form, Inference
from llm_router.gateway.quotes import without_quotes
from llm_router.gateway.replies import (
    COUNT_TOKENS,
    JSON,
    MESSAGES,
    ReplyHeaders,
    error_type,
    of_error,
    request_error_type,
)
from llm_router.gateway.seam import ClientGone, Refusal, RefusalReply, Request, Responder
from llm_router.gateway.trace_context import TraceContext
from llm_router.routing.needs import estimate_input_tokens
from llm_router.routing.router import Router
from llm_router.signals import CURRENT, OTHER, Recorder, RequestRecord

_log = logging.getLogger("llm_router.gateway")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}").fullmatch
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; never sent, only counted

# What control serves, as route templates: a path outside this list is `__other__`.
_FORWARDED_PATHS = frozenset({"/", "/metrics", "/metrics/json", "/health", "/admin/models"})
_FORWARDED_PREFIXES = ("/metrics/", "/health/", "/debug", "/admin/", "/api/v1/", "/api/v2/", "/-/")

Handler = Callable[[Request, Responder, RequestRecord], Awaitable[None]]
Forward = Callable[[Request, Responder], Awaitable[Forwarded]]


class Core:
    """The request path between a front and the router.

    Args:
        router: finds a backend that answers.
        recorder: receives every finished request.
        access: which hosts and pages may call.
        forward: serves the monitoring and admin paths; None where there are none (library mode).
        monitoring_paths: configured paths that `forward` serves beside the usual ones.
        doorman: knows the keys; None where somebody else authorises (library mode).
        limiter: knows the limits; None where there are none.
        traces: begins or continues the trace of each request; None where there are none.
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
        doorman: Doorman | None = None,
        limiter: Limiter | None = None,
        traces: TraceContext | None = None,
        clock: Callable[[], float],
    ) -> None:
        self._traces = traces
        self._router = router
        self._recorder = recorder
        self._forward = forward
        self._monitoring_paths = monitoring_paths
        self._clock = clock
        self._id_prefix = secrets.token_hex(8) + "-"
        self._ids = itertools.count(1)
        self._headers = ReplyHeaders(Guard(access))
        self._inference = Inference(router, recorder, self._headers, doorman=doorman, limiter=limiter, clock=clock)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self._serving(_openai(Endpoint.CHAT))),
            "/v1/completions": ("POST", self._serving(_openai(Endpoint.COMPLETION))),
            "/v1/embeddings": ("POST", self._serving(_openai(Endpoint.EMBEDDING))),
            MESSAGES: ("POST", self._serving(_MESSAGES)),
            COUNT_TOKENS: ("POST", self._count_tokens),
            "/api/generate": ("POST", self._serving(Form(self._read_generate, _no_event, _envelope))),
            "/v1/models": ("GET", self._models),
            "/health/live": ("GET", self._live),
            "/health/ready": ("GET", self._ready),
        }

    def allow(self, access: AccessSettings) -> None:
        """Use other access settings from the next request on."""
        self._headers.guard = Guard(access)

    def answer_from(self, answers: Answers | None) -> None:
        """Use this cache from the next request on."""
        self._inference.answers = answers

    def is_late(self, late_s: float) -> None:
        """The loop is so late that new inferences are refused; 0: it no longer is."""
        self._inference.late_s = late_s

    def open_doors(self) -> None:
        """The keys are known: whoever has one is let in from now on, or everybody if none is needed."""
        self._inference.knows_keys = True

    def keep_content(self, keeps: bool) -> None:
        """Whether records get the bodies of inferences from the next request on."""
        self._inference.keeps_content = keeps

    @property
    def draining(self) -> bool:
        """Whether new inferences are refused because this process ends."""
        return self._inference.draining

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
        record.path, record.query = request.path, request.query
        record.headers, record.client = headers, request.client
        if self._traces is not None:
            self._traces.begin(record, headers)
        record.begun_at = self._clock()
        CURRENT.set(record)  # each request has a task, and so a context, of its own
        self._recorder.begin()
        self._in_flight += 1
        try:
            self._headers.guard.check(
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
            record.error = "the client left before its reply was complete"
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
        self._inference.draining = True
        if self._in_flight:
            await self._idle.wait()

    def refuse(self, refusal: Refusal) -> RefusalReply:
        """The reply to what the front could not accept as a request; counts it."""
        given = refusal.request_id
        request_id = given.decode("ascii") if _REQUEST_ID(given) else f"{self._id_prefix}{next(self._ids)}"
        route = self._find(refusal.path)[0] if refusal.path else OTHER
        record = RequestRecord(refusal.method or OTHER, route, request_id, refusal.received_at)
        self._recorder.begin()
        error = refusal.error
        body = _error_body(error, route, request_id)
        record.path, record.client = refusal.path, refusal.client
        record.status, record.error_type, record.error = error.status, error_type(error), error.message
        record.response_type, record.response_bytes = JSON[1], len(body)
        self._recorder.finish(record, self._clock())
        return RefusalReply(error.status, [JSON, (b"x-request-id", request_id.encode()), *error.headers], body)

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

    def _serving(self, form: Form) -> Handler:
        return functools.partial(self._inference.serve, form)

    def _read_generate(self, body: bytes) -> InferenceRequest:
        return generate.read_generate(body, self._router.default_model())

    # -- everything else -------------------------------------------------------------------------------

    async def _models(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        key = await self._inference.identify(request)
        models = self._router.table.models
        if key is not None and key.models:
            models = tuple(model for model in models if model.name in key.models)
        self._reply(responder, record, request, 200, openai.model_list(models))

    async def _model(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        key = await self._inference.identify(request)
        name = unquote(request.path.removeprefix("/v1/models/"))
        model = self._router.known(name)
        if model is None or (key is not None and key.models and name not in key.models):
            raise ModelNotFound(self._router.not_found(name))
        self._reply(responder, record, request, 200, msgspec.json.encode(openai.model_object(model)))

    async def _count_tokens(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        """An estimate, as limits are reserved by: no backend is asked, and no model's own tokenizer is at hand."""
        key = await self._inference.identify(request)
        inference = anthropic.read_messages(request.body)
        Doorman.check_model(key, inference.model)
        if self._router.known(inference.model) is None:
            raise ModelNotFound(self._router.not_found(inference.model))
        self._reply(responder, record, request, 200, anthropic.token_count(estimate_input_tokens(inference)))

    async def _live(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        body = msgspec.json.encode({"status": "alive", "timestamp": _timestamp(), "ready": self._router.is_ready()})
        self._reply(responder, record, request, 200, body)

    async def _ready(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        """This worker's own readiness, so that it holds while control is away."""
        if self.draining:
            status, word = 503, "draining"
        elif not self._inference.knows_keys:
            status, word = 503, "initializing"
        elif self._router.is_ready() or not self._router.table.models:
            status, word = 200, "ready"
        else:
            status, word = 503, "initializing"
        self._reply(
            responder, record, request, status, msgspec.json.encode({"status": word, "timestamp": _timestamp()})
        )

    def _reply(self, responder: Responder, record: RequestRecord, request: Request, status: int, body: bytes) -> None:
        record.status = status
        record.outcome = "success" if status < 400 else "error"
        record.response_type, record.response_bytes = JSON[1], len(body)
        headers = [JSON, *self._headers.plain(record, request)]
        self._recorder.finish(record, self._clock())
        responder.start(status, headers)
        responder.end(body)

    async def _forwarded(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        assert self._forward is not None
        # Control names its reply by this: whoever has it finds the line here.
        request.headers[b"x-request-id"] = record.request_id.encode()
        status, record.response_bytes, record.response_type = await self._forward(request, responder)
        record.status = status
        if status < 400:
            record.outcome = "success"
        elif status < 500:
            record.error_type = request_error_type(status)

    async def _unknown(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        shown = request.path if len(request.path) <= 200 else request.path[:200] + "…"
        raise InvalidRequest(f"there is no {shown!r} here; GET / lists the endpoints", status=404, code="not_found")

    async def _other_method(self, request: Request, responder: Responder, record: RequestRecord) -> None:
        """A CORS preflight of a configured page; anything else is 405 with Allow."""
        headers = request.headers
        if request.method == "OPTIONS":
            asked = headers.get(b"access-control-request-headers", b"")
            preflight = self._headers.guard.preflight(headers.get(b"origin", b""), asked)
            if preflight:
                record.status, record.outcome = 204, "success"
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
        record.error = error.message
        if isinstance(error, BackendError):  # in words of the backend's
            record.error = without_quotes(error.message, request.body)
        now = self._clock()
        request_id = record.request_id
        make = self._headers.inference if record.is_inference else None
        headers = self._headers.plain(record, request) if make is None else make(record, now, request)
        headers += of_error(error)
        body = _error_body(error, record.route, request_id)
        if not responder.started:
            record.response_type, record.response_bytes = JSON[1], len(body)
        if not record.finished:
            self._recorder.finish(record, now)
        if not responder.started and not responder.gone:
            responder.start(error.status, headers)
            responder.end(body)


def _error_body(error: RouterError, route: str, request_id: str) -> bytes:
    """The error in the form of the route's replies."""
    if route == "/api/generate":
        return generate.failure(error.message, request_id)
    if route in {MESSAGES, COUNT_TOKENS}:
        return anthropic.error_object(error, request_id)
    return openai.error_object(error, request_id)


_MESSAGES = Form(anthropic.read_messages, anthropic.error_event, take_headers=anthropic.take_headers)


def _openai(endpoint: Endpoint) -> Form:
    return Form(functools.partial(openai.read_request, endpoint), _openai_event)


def _openai_event(error: RouterError, request_id: str) -> bytes:
    return b"data: %s\n\n" % openai.error_object(error, request_id)


def _no_event(error: RouterError, request_id: str) -> bytes:
    raise AssertionError("this form has no streams") from error


def _envelope(answer: Answer, record: RequestRecord, now: float) -> bytes:
    """A chat reply in the envelope of /api/generate."""
    latency_ms = (now - record.started_at) * 1000
    result = generate.generated(
        answer.body,
        answer.backend,
        model=record.model,
        strategy=record.strategy,
        latency_ms=latency_ms,
        cached=answer.is_cached,
    )
    return generate.success(result, record.request_id, latency_ms)


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
