"""ASGI middleware around somebody's application: one record for each HTTP request, told once, when its reply ends.

Middlewares that are stacked share the record: the outermost makes it, the others add who else is told. The route is the
template that the application's router matched, never the path. Not for: our own gateway, which records by itself
(gateway/core.py); whoever measures around it is told by it that a request is counted there.
"""

from __future__ import annotations

import logging
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from llm_router.gateway.asgi import COUNTED
from llm_router.gateway.trace_context import TraceContext
from llm_router.signals import CURRENT, OTHER, RequestRecord

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
RouteOf = Callable[[Scope], str]

_KEY: Final = "llm_router.request"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_MAX_ROUTE: Final = 200
_GONE: Final = 499


class Teller:
    """Who is told of requests. Every method is called in the event loop that serves the request."""

    def begin(self) -> None:
        """A request began; `finish` follows."""

    def counted(self) -> None:
        """A router of ours inside the application records it, too."""

    def finish(self, record: RequestRecord, now: float, *, is_counted: bool) -> None:
        """It ended at monotonic `now`. `is_counted`: `counted` was called for it."""


class _Request:
    """A request that is being served, and who wants to know of its end."""

    __slots__ = ("is_counted", "record", "tellers")

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.tellers: list[Teller] = []
        self.is_counted = False

    def counted(self) -> None:
        if not self.is_counted:
            self.is_counted = True
            for teller in self.tellers:
                teller.counted()

    def add(self, teller: Teller) -> None:
        teller.begin()
        self.tellers.append(teller)

    def finish(self, now: float) -> None:
        """Tell them all, once. What one of them does wrong is no reason to fail the request."""
        if self.record.finished:
            return
        self.record.finished = True
        for teller in self.tellers:
            try:
                teller.finish(self.record, now, is_counted=self.is_counted)
            except Exception:
                _log.exception("a request could not be recorded")


class Watched:
    """An application whose requests `teller` is told of. Adds `x-request-id` to replies that have none.

    Args:
        app: any ASGI 3 application; what is not HTTP passes through.
        route_of: the name that a request is counted under, asked when it has ended; one of few, as it becomes a label.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: App,
        teller: Teller,
        *,
        route_of: RouteOf | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._teller = teller
        self._route_of = route_of or route_template
        self._clock = clock
        # Every log line of a request names its trace: the one that its caller began, or a new one.
        self._traces = TraceContext(enabled=True, sample_ratio=0.0, rng=random.Random())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outer: _Request | None = scope.get(_KEY)
        if outer is not None:
            outer.add(self._teller)
            await self._app(scope, receive, send)
            return
        request = _Request(self._begun(scope))
        request.add(self._teller)
        scope[_KEY] = request
        scope[COUNTED] = request.counted
        await self._serve(request, scope, receive, send)

    async def _serve(self, request: _Request, scope: Scope, receive: Receive, send: Send) -> None:
        record, root = request.record, scope.get("root_path", "")
        id = record.request_id.encode()
        has_left = False

        async def receive_watched() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or message["type"] == "http.disconnect"
            return message

        async def send_watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                record.status = message["status"]
                record.response_type = next((value for name, value in headers if name.lower() == b"content-type"), b"")
                if all(name.lower() != b"x-request-id" for name, _ in headers):
                    message = {**message, "headers": [*headers, (b"x-request-id", id)]}
            elif message["type"] == "http.response.body":
                record.response_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    # Before the last bytes leave: a reply that the client has is always counted.
                    self._end(request, scope, root)
            await send(message)

        token = CURRENT.set(record)
        try:
            await self._app(scope, receive_watched, send_watched)
        except Exception as error:
            if not record.finished:
                record.status = record.status or 500
                record.error_type, record.error = "internal", type(error).__name__
            raise
        except BaseException:  # cancelled: the server gave up, as the client left or it shuts down
            if not record.finished:
                record.status, record.error_type = _GONE, "client_gone"
            raise
        finally:
            CURRENT.reset(token)
            if not record.finished and not record.error_type:
                if has_left:
                    record.status, record.error_type = _GONE, "client_gone"
                elif not record.status:
                    record.status, record.error_type = 500, "internal"
                    record.error = "the application gave no reply"
            self._end(request, scope, root)

    def _begun(self, scope: Scope) -> RequestRecord:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers[name] = headers[name] + b", " + value if name in headers else value
        given = headers.get(b"x-request-id", b"")
        id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = record_of(scope, headers, OTHER, id, self._clock())
        self._traces.begin(record, headers)
        return record

    def _end(self, request: _Request, scope: Scope, root: str) -> None:
        record = request.record
        if record.finished:
            return
        record.route = self._route(scope, root)
        if record.error_type == "client_gone":
            record.outcome = "cancelled"
        else:
            record.outcome = "error" if record.error_type or record.status >= 400 else "success"
        request.finish(self._clock())

    def _route(self, scope: Scope, root: str) -> str:
        try:
            if self._route_of is route_template:
                return route_template(scope, root)
            return self._route_of(scope)[:_MAX_ROUTE] or OTHER
        except Exception:  # somebody's function, about somebody's scope
            _log.exception("the route of a request cannot be told")
            return OTHER


def record_of(
    scope: Mapping[str, Any], headers: Mapping[bytes, bytes], route: str, request_id: str, started_at: float
) -> RequestRecord:
    """The record of an HTTP request, as far as its ASGI scope tells."""
    record = RequestRecord(scope["method"], route, request_id, started_at)
    record.path = scope.get("path", "")
    record.query = scope.get("query_string", b"").decode("latin-1")
    record.headers = headers
    client = scope.get("client")
    record.client = f"{client[0]}:{client[1]}" if client else ""
    return record


def route_template(scope: Scope, root: str = "") -> str:
    """The template of the route that Starlette or FastAPI matched, like `/items/{id}`; `__other__` where none did.

    Args:
        root: the root path before the application looked at the request.
    """
    route = scope.get("route") or _route_with(scope.get("endpoint"), getattr(scope.get("app"), "routes", ()))
    path = getattr(route, "path", None)
    if not isinstance(path, str):
        return OTHER
    mounted = str(scope.get("root_path", "")).removeprefix(root)
    if not hasattr(route, "endpoint"):  # a mount: of what is below it we know no templates
        path = "/*"
    # The part of a mount's path that a caller chose becomes the name of its parameter again.
    values = {str(value): name for name, value in scope.get("path_params", {}).items()}
    parts = [f"{{{values[part]}}}" if part in values else part for part in mounted.split("/")]
    return ("/".join(parts) + path)[:_MAX_ROUTE] or OTHER


def _route_with(endpoint: object, routes: Any) -> object:
    """The route of this endpoint: Starlette before 1.0 told the endpoint only."""
    if endpoint is None:
        return None
    for route in routes:
        if getattr(route, "endpoint", None) is endpoint:
            return route
        if (found := _route_with(endpoint, getattr(route, "routes", None) or ())) is not None:
            return found
    return None
