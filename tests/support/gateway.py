"""The data plane in this process: real front, core, router and pools in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import uvloop

from llm_router.accounts.access import AccessSettings
from llm_router.backends.connections import SWEEP_S, Connections
from llm_router.gateway.core import Core
from llm_router.gateway.front import Front, FrontSettings
from llm_router.routing.router import Router
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.signals import RequestRecord
from llm_router.testing import RecordingRecorder
from support.wait import until

T = TypeVar("T")


class Answer(NamedTuple):
    """A reply as a client saw it; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Gateway:
    """Serves a routing table on a free port of 127.0.0.1 while its context is open.

    `recorder` keeps every finished record; `seen` what was told about backends going down and up.
    """

    def __init__(self, table: RoutingTable, *, settings: FrontSettings | None = None) -> None:
        self.table = table
        self.recorder = RecordingRecorder()
        self.seen: list[tuple[str, bool]] = []
        self.port = 0
        self._settings = settings or FrontSettings()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        connections = Connections(self.recorder)
        self.router = Router(
            open_backend=connections.open,
            close_backend=connections.retire,
            on_backend=lambda name, up: self.seen.append((name, up)),
            clock=time.monotonic,
            rng=random.Random(7),
        )
        self.router.update(self.table)
        self.core = Core(self.router, self.recorder, access=AccessSettings(), forward=None, clock=time.monotonic)
        self.front = Front(self.core, self.core.refuse, self._settings, self.recorder, loop=self._loop)
        server = await self._loop.create_server(self.front.protocol_factory, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        while not self._stop.is_set():
            await connections.sweep(time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), SWEEP_S)
        server.close()
        await self.front.drain(1.0)
        await connections.aclose()

    # -- for tests -------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the gateway's loop."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def request(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> Answer:
        """One request on a connection of its own. Header names are written with `_` for `-`."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            sent.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, data, sent)
            reply = connection.getresponse()
            content = reply.read()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, content)
        finally:
            connection.close()

    def chat(self, model: str = "m", **fields: Any) -> Answer:
        """A chat request."""
        body = {"model": model, "messages": [{"role": "user", "content": "one two three"}], **fields}
        return self.request("POST", "/v1/chat/completions", body)

    def records(self, count: int) -> list[RequestRecord]:
        """All finished records, once there are `count` of them and nothing is in flight."""
        until(
            lambda: len(self.recorder.finished) >= count and self.recorder.in_flight == 0,
            what=f"{count} finished requests (there are {len(self.recorder.finished)})",
        )
        assert len(self.recorder.finished) == count
        return self.recorder.finished

    def record(self) -> RequestRecord:
        """The record of the only request there was."""
        return self.records(1)[0]


def table(
    *backends: str,
    model: str = "m",
    upstream_model: str = "scripted",
    retry: RetrySpec | None = None,
    strategy: str = "",
    **fields: Any,
) -> RoutingTable:
    """One model on backends b0, b1… at these base URLs; `fields` go to every backend."""
    specs = tuple(BackendSpec(name=f"b{i}", url=url, **fields) for i, url in enumerate(backends))
    deployments = tuple(Deployment(spec.name, upstream_model) for spec in specs)
    return RoutingTable(
        models=(ModelSpec(name=model, deployments=deployments, strategy=strategy),),
        backends=specs,
        retry=retry or RetrySpec(backoff_s=0.001, backoff_max_s=0.01),
    )
