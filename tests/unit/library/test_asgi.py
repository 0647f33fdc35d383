"""Requests of somebody's application: one record each, by route template, however they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from llm_router import MetricsCollector
from llm_router.library.asgi import Teller, Watched, route_template
from llm_router.library.metrics import _Counting
from llm_router.signals import CURRENT, OTHER, RequestRecord
from llm_router.testing import FakeClock
from support.aio import run


class Kept(Teller):
    def __init__(self) -> None:
        self.open = 0
        self.records: list[RequestRecord] = []

    def begin(self) -> None:
        self.open += 1

    def finish(self, record: RequestRecord, now: float, *, is_counted: bool) -> None:
        self.open -= 1
        self.records.append(record)


async def show(request: Request) -> Response:
    record = CURRENT.get()
    assert record is not None
    return PlainTextResponse(record.request_id)


async def fail(request: Request) -> Response:
    raise RuntimeError("no")


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    return StreamingResponse(parts())


def starlette() -> Starlette:
    return Starlette(
        routes=[
            Route("/items/{id:int}", show),
            Route("/fail", fail),
            Route("/stream", stream),
            Mount("/shops/{shop}", routes=[Route("/orders/{order}", show)]),
            Mount("/files", app=PlainTextResponse("a file")),
        ]
    )


async def call(
    app: Any, path: str, *, method: str = "GET", headers: tuple[tuple[bytes, bytes], ...] = (), leaves: bool = False
) -> list[dict[str, Any]]:
    """The messages that the application sends."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"a=1",
        "root_path": "",
        "headers": list(headers),
        "client": ("192.0.2.7", 5),
        "server": ("test", 80),
        "scheme": "http",
    }
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize(
    "path, route, status",
    (
        ("/items/7", "/items/{id:int}", 200),
        ("/stream", "/stream", 200),
        ("/shops/main/orders/12", "/shops/{shop}/orders/{order}", 200),
        ("/files/a/b", "/files/*", 200),
        ("/nothing/here", OTHER, 404),
    ),
)
def test_a_request_is_one_record_by_its_route(path: str, route: str, status: int) -> None:
    """Never by its path: whoever calls cannot make series."""
    kept = Kept()
    run(call(Watched(starlette(), kept), path))
    (record,) = kept.records
    assert (record.route, record.status, record.method, record.path) == (route, status, "GET", path)
    assert (record.client, record.query) == ("192.0.2.7:5", "a=1")
    assert record.outcome == ("success" if status == 200 else "error")
    assert kept.open == 0


def test_the_body_is_measured_whole() -> None:
    """And the record told before the last bytes leave."""
    kept = Kept()
    sent = run(call(Watched(starlette(), kept), "/stream"))
    assert kept.records[0].response_bytes == 6
    assert b"".join(message.get("body", b"") for message in sent) == b"onetwo"


def test_an_id_of_the_caller_is_kept_if_it_is_one() -> None:
    """Else a new one is made; it is in the reply, and what runs meanwhile sees it."""
    kept = Kept()
    app = Watched(starlette(), kept)
    for given in (b"abc-1", b"x" * 200, b"new\nline"):
        sent = run(call(app, "/items/1", headers=((b"x-request-id", given),)))
        id = dict(sent[0]["headers"])[b"x-request-id"]
        assert (id == given) == (given == b"abc-1")
        assert sent[1]["body"] == id
        assert kept.records[-1].request_id == id.decode()
    assert CURRENT.get() is None


def test_the_callers_trace_goes_on() -> None:
    """So that log lines of several services can be put together."""
    kept = Kept()
    parent = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
    run(call(Watched(starlette(), kept), "/items/1", headers=((b"traceparent", parent),)))
    assert (kept.records[0].trace_id, kept.records[0].parent_id) == ("a" * 32, "b" * 16)


def test_an_application_that_raises_is_a_500() -> None:
    """And the exception goes on to the server."""
    kept = Kept()
    inner = Starlette(routes=[Route("/fail", fail)])
    with pytest.raises(RuntimeError):
        run(call(Watched(inner.router, kept), "/fail"))
    assert (kept.records[0].status, kept.records[0].error_type) == (500, "internal")
    kept.records.clear()
    with contextlib.suppress(RuntimeError):
        run(call(Watched(inner, kept), "/fail"))  # Starlette answers by itself, and raises then
    assert [(record.status, record.route) for record in kept.records] == [(500, "/fail")]


def test_a_client_that_leaves_is_a_499() -> None:
    """Whether the application notices, or is cancelled by its server."""
    kept = Kept()

    async def wait_for_it(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    run(call(Watched(wait_for_it, kept), "/", leaves=True))

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def cancelled() -> None:
        task = asyncio.create_task(call(Watched(hang, kept), "/"))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    run(cancelled())
    assert [(record.status, record.outcome) for record in kept.records] == [(499, "cancelled")] * 2


def test_an_application_without_a_reply_is_a_500() -> None:
    """It is told once all the same."""
    kept = Kept()

    async def silent(scope: Any, receive: Any, send: Any) -> None: ...

    run(call(Watched(silent, kept), "/"))
    assert [record.status for record in kept.records] == [500]


def test_stacked_middlewares_share_one_record() -> None:
    """Also where a framework is in between; each is told once."""
    first, second = Kept(), Kept()
    app = Starlette(
        routes=[Route("/items/{id}", show)],
        middleware=[Middleware(Watched, teller=first), Middleware(Watched, teller=second)],
    )
    run(call(app, "/items/1"))
    assert first.records[0] is second.records[0]
    assert (first.open, second.open) == (0, 0)


def test_one_teller_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Nor the request."""

    class Broken(Teller):
        def finish(self, record: RequestRecord, now: float, *, is_counted: bool) -> None:
            raise ValueError("broken")

    kept = Kept()
    sent = run(call(Watched(Watched(starlette(), kept), Broken()), "/items/1"))
    assert sent[0]["status"] == 200
    assert len(kept.records) == 1
    assert "could not be recorded" in caplog.text


def test_a_function_tells_routes_of_other_frameworks(caplog: pytest.LogCaptureFixture) -> None:
    """One that raises costs the route's name only."""
    kept = Kept()
    app = PlainTextResponse("x")
    run(call(Watched(app, kept, route_of=lambda scope: "/first/" + scope["path"].split("/")[1]), "/a/b"))
    run(call(Watched(app, kept, route_of=lambda scope: scope["missing"]), "/a/b"))
    run(call(Watched(app, kept), "/a/b"))
    assert [record.route for record in kept.records] == ["/first/a", OTHER, OTHER]


def test_the_route_is_found_by_its_endpoint() -> None:
    """Where Starlette tells no route."""
    app = starlette()
    assert route_template({"app": app, "endpoint": show, "path_params": {}}) == "/items/{id:int}"
    assert route_template({"app": app, "endpoint": test_stacked_middlewares_share_one_record}) == OTHER


def test_metrics_count_what_was_watched() -> None:
    """With the time that it took, and what is in flight meanwhile."""
    metrics = MetricsCollector(guide_names=False)
    clock = FakeClock()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        clock.advance(2.0)
        assert "llm_router_requests_in_flight 1.0" in metrics.get_metrics()
        await PlainTextResponse("x")(scope, receive, send)

    run(call(Watched(slow, _Counting(metrics), clock=clock), "/x"))
    text = metrics.get_metrics()
    labels = f'method="GET",route="{OTHER}",status_code="200"'
    assert f"llm_router_http_request_duration_seconds_sum{{{labels}}} 2.0" in text
    assert "llm_router_requests_in_flight 0.0" in text


def test_what_is_not_http_passes() -> None:
    """Lifespan and websockets are no requests."""
    kept = Kept()
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any: ...

    run(Watched(app, kept)({"type": "lifespan"}, nothing, nothing))
    assert (seen, kept.records) == (["lifespan"], [])
