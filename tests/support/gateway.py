"""The data plane in this process: real front, core, router and pools in a thread with a loop of its own.

Keys, limits and the cache are there when they are asked for. Not for: what several processes make of it (serving.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from llm_router.accounts.access import AccessSettings
from llm_router.accounts.keys import KeySpec, digest_of
from llm_router.accounts.ledger import Ask, MemoryLedger
from llm_router.accounts.limiter import Limiter
from llm_router.accounts.limits import Limits, Subject
from llm_router.backends.connections import SWEEP_S, Connections
from llm_router.cache import open_cache
from llm_router.cache.base import Cache, CacheSettings
from llm_router.gateway.answers import Answers
from llm_router.gateway.auth import Doorman
from llm_router.gateway.core import Core
from llm_router.gateway.front import Front, FrontSettings
from llm_router.gateway.trace_context import TraceContext
from llm_router.routing.breaker import State
from llm_router.routing.router import Router
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec, RetrySpec, RoutingTable
from llm_router.signals import RequestRecord
from llm_router.testing import RecordingRecorder
from support.ask import Answer
from support.wait import until

T = TypeVar("T")


class Clock:
    """The machine's monotonic clock, which a test may move on."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds


class Asked:
    """A request that was sent, on a connection of its own."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def answer(self) -> Answer:
        """Its reply, once it is whole."""
        try:
            reply = self._connection.getresponse()
            content = reply.read()
            return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, content)
        finally:
            self._connection.close()

    def leave(self) -> None:
        """Go without having read anything."""
        self._connection.close()


class Gateway:
    """Serves a routing table on a free port of 127.0.0.1 while its context is open.

    `recorder` keeps every finished record; `seen` what was told about backends going down and up, `circuits` what was
    told about circuits; `cache_problems` what the cache complained of; `clock` is the router's and the cache's.

    Args:
        keys: text of a key to its name, or all there is to say about it; with any, one is needed.
        limits: of whom they are.
        cache: None for none.
        workers: among how many the bounds are divided.
        traces: the share of requests that are sampled; below 0 tracing is off.
    """

    def __init__(
        self,
        table: RoutingTable,
        *,
        settings: FrontSettings | None = None,
        keys: Mapping[str, str] | Sequence[KeySpec] = (),
        limits: Mapping[Subject, Limits] | None = None,
        cache: CacheSettings | None = None,
        workers: int = 1,
        traces: float = 0.0,
    ) -> None:
        self.table = table
        self._sample_ratio = traces
        self.recorder = RecordingRecorder()
        self.seen: list[tuple[str, bool]] = []
        self.circuits: list[tuple[str, State]] = []
        self.cache_problems: list[str] = []
        self.clock = Clock()
        self.port = 0
        self._settings = settings or FrontSettings()
        if isinstance(keys, Mapping):
            keys = [KeySpec(id=f"key-{name}", name=name, digest=digest_of(text)) for text, name in keys.items()]
        self._keys = tuple(keys)
        self._limits = limits or {}
        self._cache_settings = cache
        self._workers = workers
        self._lending: set[asyncio.Task[None]] = set()
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
            on_circuit=lambda name, state, until: self.circuits.append((name, state)),
            clock=self.clock,
            rng=random.Random(7),
        )
        self.router.update(self.table, self._workers)
        limiter = self._limiter()
        self.core = Core(
            self.router,
            self.recorder,
            access=AccessSettings(),
            forward=None,
            doorman=self._doorman(),
            limiter=limiter,
            traces=TraceContext(
                enabled=self._sample_ratio >= 0, sample_ratio=max(0.0, self._sample_ratio), rng=random.Random(7)
            ),
            clock=self.clock,
        )
        self.core.open_doors()
        self.cache, self.answers = self._opened_cache()
        self.core.answer_from(self.answers)
        self.front = Front(self.core, self.core.refuse, self._settings, self.recorder, loop=self._loop)
        server = await self._loop.create_server(self.front.protocol_factory, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        while not self._stop.is_set():
            await connections.sweep(time.monotonic())
            self.router.sweep(self.clock())
            if limiter is not None:
                limiter.sweep(time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), SWEEP_S)
        server.close()
        await self.front.drain(1.0)
        if self.cache is not None:
            await self.cache.aclose()
        await connections.aclose()

    def _doorman(self) -> Doorman | None:
        if not self._keys:
            return None
        doorman = Doorman(clock=time.monotonic, wall=time.time)
        doorman.update(self._keys, key_needed=True)
        return doorman

    def _limiter(self) -> Limiter | None:
        """A limiter that borrows of a ledger in this loop."""
        if not self._limits:
            return None
        ledger = MemoryLedger(clock=time.monotonic, wall=time.time)
        ledger.update(self._limits)

        def ask(asks: tuple[Ask, ...]) -> None:
            async def lend() -> None:
                limiter.granted(await ledger.lend("gateway", asks))

            task = self._loop.create_task(lend())
            self._lending.add(task)
            task.add_done_callback(self._lending.discard)

        limiter = Limiter(ask, clock=time.monotonic)
        limiter.update(self._limits)
        return limiter

    def _opened_cache(self) -> tuple[Cache | None, Answers | None]:
        settings = self._cache_settings
        if settings is None:
            return None, None
        cache = open_cache(settings, self._workers, self.cache_problems.append, clock=self.clock)
        return cache, None if cache is None else Answers(cache, settings, self.table)

    # -- for tests -------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the gateway's loop."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def follow(self, table: RoutingTable) -> None:
        """Serve another table from now on."""

        def follow() -> None:
            self.router.update(table, self._workers)
            if self.answers is not None:
                self.answers.follow(table)

        self.call(follow)

    def ask(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> Asked:
        """Send one request on a connection of its own. Header names are written with `_` for `-`."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            sent.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, data, sent)
        except BaseException:
            connection.close()
            raise
        return Asked(connection)

    def request(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> Answer:
        """One request and its reply."""
        return self.ask(method, path, body, **headers).answer()

    def ask_chat(self, model: str = "m", *, headers: Mapping[str, str] | None = None, **fields: Any) -> Asked:
        """Send a chat request."""
        body = {"model": model, "messages": [{"role": "user", "content": "one two three"}], **fields}
        return self.ask("POST", "/v1/chat/completions", body, **(headers or {}))

    def chat(self, model: str = "m", *, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """A chat request and its reply."""
        return self.ask_chat(model, headers=headers, **fields).answer()

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
    strategy: str = "round-robin",
    queue: QueueSpec | None = None,
    **fields: Any,
) -> RoutingTable:
    """One model on backends b0, b1… at these base URLs, asked in turn; `fields` go to every backend."""
    specs = tuple(BackendSpec(name=f"b{i}", url=url, **fields) for i, url in enumerate(backends))
    deployments = tuple(Deployment(spec.name, upstream_model) for spec in specs)
    return RoutingTable(
        models=(ModelSpec(name=model, deployments=deployments, strategy=strategy, queue=queue or QueueSpec()),),
        backends=specs,
        retry=retry or RetrySpec(backoff_s=0.001, backoff_max_s=0.01),
    )
