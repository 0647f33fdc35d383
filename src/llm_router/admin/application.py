"""Control's HTTP application: guard, keys, request ids, error objects and routes around what the other modules answer.

One application behind three entries; which one a request came by is told by the server (server.py) and decides
what is checked. Every request is authorised here, before its path is looked at by anything else: what is not known
to be for monitoring is for administrators. Not for: sockets (server.py) or any particular route (monitoring.py,
models.py, keys.py, reload.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_router.accounts.access import Guard
from llm_router.accounts.keys import SCOPES, KeyRing, KeyScope
from llm_router.chat import NOT_JSON
from llm_router.errors import InvalidRequest, RouterError, Unavailable
from llm_router.gateway.auth import Failures, find_key, is_key_shown, lacking
from llm_router.gateway.openai import error_object, unreadable

MAX_BODY_BYTES: Final = 1024 * 1024
"""Admin requests are a name and some options."""

BODY_TIMEOUT_S: Final = 10.0
"""A body of that size takes milliseconds; a client that is slower than this holds memory for nothing."""

MAX_HEADERS: Final = 100
MAX_HEAD_BYTES: Final = 64 * 1024
"""The bounds of the app port's front; uvicorn's parser bounds only what is incomplete."""

MAX_DISCARDED_BYTES: Final = 32 * 1024 * 1024
"""Of a refused body, this much is read and thrown away: closing on a client that is still sending would destroy the
reply on its way."""

CLIENT_HEADER: Final = "x-llm-router-client"
"""Believed on the workers' socket only."""

MAX_HELD: Final = 8
"""Answers to requests without a valid key that are held back at a time. Fewer than the requests that one worker has
with control at a time (gateway/forward.py), so that they cannot keep an administrator out."""

_OPEN_PATHS: Final = frozenset(("/health/live", "/health/ready", "/health/startup"))
_MONITORING_PATHS: Final = frozenset(("/", "/metrics", "/metrics/json", "/health"))
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")

T = TypeVar("T")


class Entry(StrEnum):
    """The way by which a request reached control."""

    MONITORING = "monitoring"  # the TCP port, anybody on this machine
    CLI = "cli"  # the command line's socket; the peer's uid was checked
    FORWARD = "forward"  # a worker, for a client of the app port


class Rights(NamedTuple):
    """Who may do what, as it stands now.

    Attributes:
        ring: the keys that are valid; None while that is not known, as before the store was read: whoever needs a key
            is then asked to come back.
        closed: for which scopes callers need a key, by the way they come (`accounts.keys.closed_scopes`). A way that
            is missing is closed for all; the command line never needs a key.
    """

    ring: KeyRing | None
    closed: Mapping[Entry, frozenset[KeyScope]]


class Audit(Protocol):
    """Writes down what somebody did: the event's name and what there is to say about it."""

    def __call__(self, event: str, /, **data: Any) -> None: ...


def build(
    routes: Sequence[Route],
    guard: Callable[[], Guard],
    rights: Callable[[], Rights],
    *,
    monitoring_paths: Collection[str] = (),
    health_path: str = "/health",
    wall: Callable[[], float] = time.time,
    failures: Failures | None = None,
) -> ASGIApp:
    """The application that serves `routes`.

    Args:
        guard: the browser guard in force, asked for with each request: a reload replaces it.
        rights: asked for with each request.
        monitoring_paths: configured paths of monitoring beside the usual ones.
        health_path: where the health report is beside `/health`: to those who may not read it, whether all is well is
            told nevertheless (`is_terse`).
        wall: Unix seconds.
        failures: who failed to show a key lately.
    """
    app = Starlette(
        routes=routes,
        exception_handlers={RouterError: _router_error, HTTPException: _http_error},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False  # a redirect would name the wrong host behind a proxy
    door = _Door(
        rights,
        frozenset(monitoring_paths),
        health_path,
        wall,
        failures or Failures(clock=time.monotonic, max_held=MAX_HELD),
    )
    return _Guarded(app, guard, door)


def entry_of(scope: Scope) -> Entry:
    """The entry of a request; whatever the server did not tell is taken for the least trusted one."""
    entry: Entry = scope.get("state", {}).get("entry", Entry.MONITORING)
    return entry


def is_terse(request: Request) -> bool:
    """Whether the caller may know how the router is, but no details of it."""
    return bool(request.scope.get("is_terse", False))


def _address(text: str) -> tuple[str, int] | None:
    """The client that a worker names as `ip:port`; None if it did not know."""
    host, _, port = text.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def caller(request: Request) -> str:
    """Who is asking, for a log: by key where one was needed."""
    scope = request.scope
    if "key_name" in scope:
        return f"the key {scope['key_name']!r}"
    entry = entry_of(scope)
    return "the command line" if entry is Entry.CLI else scope["client"][0] if scope["client"] else f"the {entry} port"


def doer(request: Request) -> dict[str, str]:
    """Who is asking, for an audit line: `actor`, and where they are known `actor_id` (of a key) and `client`."""
    scope = request.scope
    found = {"actor": caller(request)}
    if "key_id" in scope:
        found["actor_id"] = scope["key_id"]
    if entry_of(scope) is not Entry.CLI and scope["client"]:
        found["client"] = scope["client"][0]
    return found


def json_response(value: object, status: int = 200, media_type: str = "application/json") -> Response:
    return Response(msgspec.json.encode(value), status, media_type=media_type)


def read_query(request: Request, names: Collection[str]) -> dict[str, str]:
    """The parameters of the request's query, of which there may only be these. Raises: InvalidRequest."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            known = f"there are {', '.join(names)}" if names else "there are none"
            raise InvalidRequest(
                f"there is no parameter {name[:100]!r}; {known}", code="unknown_parameter", param=name[:100]
            )
        if name in found:
            raise InvalidRequest(f"{name} is given twice", code="repeated_parameter", param=name)
        found[name] = value
    return found


async def read_body(request: Request, type: type[T]) -> T:
    """The request's JSON body as `type`.

    Raises: InvalidRequest, with status 413 for more than `MAX_BODY_BYTES`, 408 after `BODY_TIMEOUT_S`.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise InvalidRequest(
                        f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large"
                    )
    except TimeoutError:
        raise InvalidRequest(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408, code="request_timeout"
        ) from None
    except ClientDisconnect:
        raise InvalidRequest("the body ended early") from None
    try:
        return msgspec.json.decode(body or b"{}", type=type)
    except NOT_JSON as error:
        raise unreadable(error) from None


class _Door:
    """Lets a request in, or raises why not."""

    def __init__(
        self,
        rights: Callable[[], Rights],
        monitoring_paths: frozenset[str],
        health_path: str,
        wall: Callable[[], float],
        failures: Failures,
    ) -> None:
        self._rights = rights
        # A path of monitoring's that was configured where something else lives does not open that.
        configured = {path for path in monitoring_paths if not path.startswith("/admin")}
        self._open_paths = _OPEN_PATHS - configured
        self._monitoring_paths = _MONITORING_PATHS | configured
        # Only where nothing but the health report can be, whatever was moved where.
        others = (configured - {health_path}) | (_MONITORING_PATHS - {"/health"})
        self._terse_paths = (self._monitoring_paths & {"/health", health_path}) - others
        self._wall = wall
        self._failures = failures

    async def admit(self, scope: Scope, headers: Headers) -> None:
        """Raises: Unauthorized, late if the address failed often; Forbidden; Unavailable."""
        needed = self._scope_of(scope["path"])
        if needed is None:
            return
        rights = self._rights()
        if needed not in rights.closed.get(entry_of(scope), SCOPES):
            return
        may_be_terse = scope["path"] in self._terse_paths
        if rights.ring is None:
            if may_be_terse:
                scope["is_terse"] = True
                return
            raise Unavailable("the keys cannot be read yet; ask again in a moment")
        shown = dict(headers.raw)
        key = find_key(rights.ring, shown, self._wall())
        if may_be_terse and (not is_key_shown(shown) if key is None else not key.has(needed)):
            scope["is_terse"] = True
            return
        if key is None:
            address = scope["client"][0] if scope["client"] else ""
            error = self._failures.failed(address, was_shown=is_key_shown(shown))
            raise await self._failures.hold(error)
        if not key.has(needed):
            raise lacking(key, needed)
        scope["key_name"], scope["key_id"] = key.name, key.id

    def _scope_of(self, path: str) -> KeyScope | None:
        """The right that a path needs; the very text that the router will look for."""
        if path in self._open_paths:
            return None
        return "metrics:read" if path in self._monitoring_paths else "admin"


class _Guarded:
    """Gives each request an id, keeps foreign pages and strangers out, and adds CORS headers for configured pages."""

    def __init__(self, app: ASGIApp, guard: Callable[[], Guard], door: _Door) -> None:
        self._app = app
        self._guard = guard
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope["request_id"] = request_id
        added = [(b"x-request-id", request_id.encode())]
        body = _Body(receive)
        receive = body.receive

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *added]
            elif not message.get("more_body", False) and "expect" not in headers and not body.is_read:
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body"}
            await send(message)

        entry = entry_of(scope)
        try:
            _check_head(scope, headers)
        except InvalidRequest as error:
            await _error(error, request_id)(scope, receive, send_with_headers)
            return
        if entry is Entry.FORWARD:
            scope["client"] = _address(headers.get(CLIENT_HEADER, ""))
        if entry is not Entry.CLI:
            guard, origin = self._guard(), headers.get("origin", "").encode("latin-1")
            try:
                guard.check(
                    scope["method"],
                    headers.get("host", "").encode("latin-1"),
                    origin,
                    headers.get("sec-fetch-site", "").encode("latin-1"),
                    headers.get("content-type", "").encode("latin-1"),
                    has_body="transfer-encoding" in headers or headers.get("content-length", "0") != "0",
                )
            except InvalidRequest as error:
                await _error(error, request_id)(scope, receive, send_with_headers)
                return
            wanted = headers.get("access-control-request-headers", "").encode("latin-1")
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                added += guard.preflight(origin, wanted)
                await Response(status_code=204)(scope, receive, send_with_headers)
                return
            added += guard.cors(origin)
            try:
                await self._door.admit(scope, headers)
            except RouterError as error:
                await _error(error, request_id)(scope, receive, send_with_headers)
                return
        await self._app(scope, receive, send_with_headers)


class _Body:
    """A request's body, and whether all of it was read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_read = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read what is left, within `MAX_DISCARDED_BYTES` and `BODY_TIMEOUT_S`."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while not self.is_read and size < MAX_DISCARDED_BYTES:
                    size += len((await self.receive()).get("body", b""))


def _check_head(scope: Scope, headers: Headers) -> None:
    """Refuse what the front of the app port refuses and uvicorn's parser lets pass. Raises: InvalidRequest."""
    last = ((b"connection", b"close"),)
    if scope["http_version"] not in ("1.0", "1.1"):
        raise InvalidRequest(
            "only HTTP/1.1 is spoken here", status=505, code="http_version_not_supported", headers=last
        )
    if "content-length" in headers and "transfer-encoding" in headers:
        raise InvalidRequest(
            "malformed HTTP request: both Content-Length and Transfer-Encoding", code="malformed_http", headers=last
        )
    raw = headers.raw
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) + 4 for name, value in raw)
    if len(raw) > MAX_HEADERS or size > MAX_HEAD_BYTES:
        raise InvalidRequest(
            f"more than {MAX_HEADERS} headers, or more than {MAX_HEAD_BYTES} bytes of them",
            status=431,
            code="headers_too_large",
            headers=last,
        )


def _error(error: RouterError, request_id: str) -> Response:
    response = Response(error_object(error, request_id), error.status, media_type="application/json")
    for name, value in getattr(error, "headers", ()):
        response.headers[name.decode("latin-1")] = value.decode("latin-1")
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    return response


async def _router_error(request: Request, error: RouterError) -> Response:
    return _error(error, request.scope["request_id"])


async def _http_error(request: Request, error: HTTPException) -> Response:
    path, method = request.url.path[:200], request.method
    headers = tuple((name.encode(), value.encode()) for name, value in (error.headers or {}).items())
    if error.status_code == 404:
        problem = InvalidRequest(
            f"there is nothing at {path}; GET / lists what there is", status=404, code="not_found", headers=headers
        )
    elif error.status_code == 405:
        problem = InvalidRequest(
            f"{path} does not take {method}", status=405, code="method_not_allowed", headers=headers
        )
    else:
        problem = InvalidRequest(str(error.detail), status=error.status_code, headers=headers)
    return _error(problem, request.scope["request_id"])
