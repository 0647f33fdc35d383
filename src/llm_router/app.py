"""Library mode: a router inside the caller's own event loop, without supervisor, workers or control.

`LLMRouter` is its composition root: the same router, pools and instruments as a worker, over one private metric
store; local models are runner processes that leave with this one. Not for: serving HTTP (`llm-router serve`, or
`LLMRouter.asgi()` to mount the API into an application of yours).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from llm_router import families
from llm_router.backends.connections import SWEEP_S, Connections
from llm_router.backends.openai_compatible import message_in
from llm_router.cache import open_cache
from llm_router.cache.base import Cache, Cached
from llm_router.chat import Chunk, Endpoint, InferenceRequest, Usage
from llm_router.config import ModelSettings, Settings, load
from llm_router.errors import BackendError, BackendRejected, DeadlineExceeded, ModelNotFound, RouterError
from llm_router.gateway.answers import Answers, Keeper
from llm_router.gateway.asgi import AsgiFront
from llm_router.gateway.core import Core
from llm_router.gateway.generate import Generated, chat_body, generated, snake_case
from llm_router.gateway.inference import account, guess, take_usage
from llm_router.gateway.openai import read_request
from llm_router.gateway.replies import error_type
from llm_router.gateway.sse import deltas, watch_for
from llm_router.instruments import Instruments
from llm_router.models import price_list
from llm_router.models.launch import RunnerSpec
from llm_router.models.prices import Price
from llm_router.models.registry import FORMAT, ModelsFolder, size_category
from llm_router.observe.metrics.exposition import Renderer
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.processes.own_runners import OwnRunners, RunnerEvent
from llm_router.processes.tables import PriceFinder, RunnerAddress, routing_table
from llm_router.routing.policies import CustomFunction
from llm_router.routing.router import Exchange, Router
from llm_router.routing.table import RoutingTable
from llm_router.signals import Reading, Recorder, RequestRecord

_log = logging.getLogger("llm_router")

T = TypeVar("T")

EVENTS = (
    "model-loaded",
    "model-unloaded",
    "inference-start",
    "inference-complete",
    "inference-error",
    "cache-hit",
    "cache-miss",
)

Handler = Callable[..., Any]
Message = Mapping[str, Any]


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the registry. `status` is loaded, loading, unloaded, failed, or remote; sizes in bytes."""

    id: str
    name: str
    status: str
    format: str
    size: int = 0
    load_duration: float = 0.0
    memory: int = 0


class Registry:
    """What models a router has. `list` is cheap and never waits."""

    def __init__(self, entries: Callable[[], list[LoadedModel]]) -> None:
        self._entries = entries

    def list(self) -> list[LoadedModel]:
        """Every model, in the order of the configuration."""
        return self._entries()

    def get(self, id: str) -> LoadedModel | None:
        """The model of that name; None if there is none."""
        return next((entry for entry in self._entries() if entry.id == id), None)

    @property
    def size(self) -> int:
        return len(self._entries())

    def __repr__(self) -> str:
        return f"Registry({[entry.id for entry in self._entries()]})"


class Inside(NamedTuple):
    """What those look at who observe a router from within its process.

    Attributes:
        writer: of the segment that it counts in; the loop's thread alone may use it.
        levels: what is read at the moment of asking; in the loop's thread.
        table: the routing table of now.
        cache: that of now; None where it is off.
    """

    writer: Writer
    levels: Callable[[], Iterable[Reading]]
    table: Callable[[], RoutingTable]
    cache: Callable[[], Cache | None]


class LLMRouter:
    """Runs models and routes requests to them. An async context manager; belongs to one event loop.

    Args:
        config: path of an `llm-router.yaml`, settings, or None for `./llm-router.yaml` if there is one, else the
            default model.
        env: environment that the configuration may refer to; the process's own by default.
        data_dir: overrides where models and state live.
        policy: chooses among the deployments of a model, as the `custom` strategy: called with the model's name, the
            candidates and what the request needs; returns an index, a backend's name or a candidate. See
            `llm_router.routing.policies`.

    Raises: ConfigError, with the key path, when the configuration cannot be used.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Settings | None = None,
        *,
        env: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        policy: CustomFunction | None = None,
    ) -> None:
        if isinstance(config, Settings):
            self.settings = config
        else:
            overrides = {} if data_dir is None else {"data_dir": os.fspath(data_dir)}
            path = None if config is None else os.fspath(config)
            self.settings = load(path, os.environ if env is None else env, overrides)
        if policy is not None:
            routing = msgspec.structs.replace(self.settings.routing, strategy="custom")
            self.settings = msgspec.structs.replace(self.settings, routing=routing)
        self._handlers: dict[str, list[Handler]] = {event: [] for event in EVENTS}
        self._folder = ModelsFolder(self.settings.server.models_dir)
        self._loaded: dict[str, ModelSettings] = {}
        self._failed: dict[str, str] = {}
        self._addresses: dict[str, RunnerAddress] = {}
        self._known: dict[str, LoadedModel] = {}
        self._segment = Segment.private()
        self._writer = Writer(self._segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self._instruments = Instruments(self._writer)
        self._recorder: Recorder = self._instruments  # a subclass may have others told, too
        self._reader = Reader([self._segment], families.FAMILIES)
        self._renderer = Renderer(families.GUIDE_VIEWS)
        self._connections = Connections(self._instruments)
        self._router = Router(
            open_backend=self._connections.open,
            close_backend=self._connections.retire,
            on_backend=lambda name, is_up: None,
            on_circuit=lambda name, state, until: None,
            clock=time.monotonic,
            rng=random.Random(),
            custom=policy,
        )
        self._id_prefix = secrets.token_hex(8) + "-"
        self._ids = itertools.count(1)
        self._following: set[asyncio.Future[None]] = set()  # coroutines of handlers; asyncio keeps weak references
        self._cache: Cache | None = None
        self._answers: Answers | None = None
        self._prices: PriceFinder = self._not_yet
        self._reading: asyncio.Task[None] | None = None
        self._stack: contextlib.AsyncExitStack | None = None
        self._runners: OwnRunners | None = None
        self._started_at = 0.0
        self.registry = Registry(self._entries)

    def __repr__(self) -> str:
        state = "initialized" if self._stack is not None else "not initialized"
        return f"<LLMRouter {state}, {self.registry!r}>"

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cleanup()

    # -- life ------------------------------------------------------------------------------------------

    async def initialize(self) -> None:
        """Start the configured models and begin to route. Doing it twice does nothing.

        A local model that cannot be loaded does not stop the others: `get_status()["failed"]` has the reason.
        """
        if self._stack is not None:
            return
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._connections.aclose)
            self._runners = await stack.enter_async_context(
                OwnRunners(log_dir=self.settings.server.log_dir, on_event=self._on_runner)
            )
            self._cache = open_cache(self.settings.cache, 1, self._cache_failed)
            if self._cache is not None:
                stack.push_async_callback(self._cache.aclose)
            sweeping = asyncio.create_task(self._sweep(), name="llm-router sweep")
            stack.push_async_callback(_end, sweeping)
            stack.push_async_callback(self._stop_reading)
            self._started_at = time.monotonic()
            self._route()
            for model in self.settings.models:
                if model.runner is not None and model.load:
                    try:
                        await self._start(model)
                    except RouterError as error:
                        self._failed[model.name] = error.message
                        self._instruments.error("model_load")
                        _log.error("model %s could not be loaded: %s", model.name, error.message)
            self._stack = stack.pop_all()

    async def cleanup(self) -> None:
        """End runners, connections and background work. Doing it twice does nothing."""
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()
            self._addresses.clear()
            if self._following:
                await asyncio.wait(self._following)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            await self._connections.sweep(now)
            self._router.sweep(now)

    def _not_yet(self, model: str, provider: str, url: str) -> Price | None:
        """No price, before the list of prices is read; now it is wanted."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_price_list(), name="llm-router price list")
        return None

    async def _read_price_list(self) -> None:
        """Loading it takes a quarter of a second: calls are answered meanwhile, without prices that are not configured."""
        await asyncio.to_thread(price_list.find, "", "", "")
        self._prices = price_list.find
        self._route()

    async def _stop_reading(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            await _end(reading)

    def _cache_failed(self, problem: str) -> None:
        _log.warning("%s", problem)
        self._instruments.error("cache_unavailable")

    # -- models ----------------------------------------------------------------------------------------

    async def load(self, spec: str | os.PathLike[str] | RunnerSpec) -> LoadedModel:
        """Load a local model and route to it.

        Args:
            spec: the name of a file in the models folder, a path, or all there is to say about the runner.

        Raises: ModelError (BadModelFile, BadOptions, OutOfMemory, RunnerFailed), ModelNotFound.
        """
        self._demand()
        if not isinstance(spec, RunnerSpec):
            path = await asyncio.to_thread(self._folder.locate, os.fspath(spec))
            spec = RunnerSpec(name=path.name.removesuffix(".gguf"), path=str(path))
        model = ModelSettings(name=spec.name, file=spec.path, runner=spec)
        await self._start(model)
        return self._known[spec.name]

    async def unload(self, id: str) -> None:
        """End a model's runner. It stays in the registry if it is configured.

        Raises: ModelNotFound when no such model is loaded.
        """
        runners = self._demand()
        if id not in self._addresses:
            raise ModelNotFound(f"model {id!r} is not loaded; loaded are: {', '.join(self._addresses) or 'none'}")
        del self._addresses[id]
        self._loaded.pop(id, None)
        entry = self._known.pop(id)
        self._route()  # from now on nobody is sent there; what is in flight may end
        await runners.stop(id)
        self._emit("model-unloaded", msgspec.structs.replace(entry, status="unloaded"))

    async def _start(self, model: ModelSettings) -> None:
        assert model.runner is not None
        runners = self._demand_runners()
        running = await runners.start(model.runner)
        size = await asyncio.to_thread(os.path.getsize, model.file)
        self._failed.pop(model.name, None)
        self._loaded[model.name] = model
        self._known[model.name] = LoadedModel(
            id=model.name,
            name=model.name,
            status="loaded",
            format=FORMAT,
            size=size,
            load_duration=running.load_s,
            memory=running.memory_bytes,
        )
        self._addresses[model.name] = RunnerAddress(running.port, running.key, True, running.only_embeds)
        self._writer.histogram(families.MODEL_LOAD_DURATION, model.name, FORMAT).observe(running.load_s)
        self._route()
        self._emit("model-loaded", self._known[model.name])

    def _on_runner(self, event: RunnerEvent) -> None:
        """A runner died or came back: its address follows, so that requests go elsewhere meanwhile."""
        if event.name not in self._addresses:
            return
        running = event.running
        if running is not None:
            self._addresses[event.name] = RunnerAddress(running.port, running.key, True, running.only_embeds)
        else:
            self._addresses[event.name] = RunnerAddress()
            if event.state == "backoff":
                self._writer.counter(families.RUNNER_RESTARTS, event.name, "exited").inc()
                self._instruments.error("runner_lost")
        self._route()

    def _route(self) -> None:
        table = routing_table(self.settings, self._loaded.values(), self._addresses, prices=self._prices)
        self._router.update(table)
        if self._cache is not None and self._answers is None:
            self._answers = Answers(self._cache, self.settings.cache, table)
        elif self._answers is not None:
            self._answers.follow(table)
        self._instruments.admit((model.name, self._router.strategy_of(model.name)) for model in table.models)

    def _entries(self) -> list[LoadedModel]:
        entries: list[LoadedModel] = []
        for model in (*self.settings.models, *self._loaded.values()):
            if any(entry.id == model.name for entry in entries):
                continue
            known = self._known.get(model.name)
            if known is not None:
                entries.append(known)
            elif model.runner is None:
                entries.append(LoadedModel(id=model.name, name=model.name, status="remote", format="remote"))
            else:
                status = "failed" if model.name in self._failed else "unloaded"
                entries.append(LoadedModel(id=model.name, name=model.name, status=status, format=FORMAT))
        return entries

    def _demand(self) -> OwnRunners:
        if self._stack is None:
            raise RuntimeError("the router is not initialized: `await router.initialize()`, or use `async with`")
        return self._demand_runners()

    def _demand_runners(self) -> OwnRunners:
        assert self._runners is not None
        return self._runners

    # -- inference -------------------------------------------------------------------------------------

    async def quick(self, prompt: str, **options: Any) -> Generated:
        """The answer to one prompt. Options as in the API, camelCase or snake_case: `max_tokens`, `model`…

        Raises: RequestError, BackendError.
        """
        self._demand()
        return await self._ask(chat_body(prompt, options, self._router.default_model()))

    async def chat(self, messages: Sequence[Message], **options: Any) -> Generated:
        """The answer to a conversation. Raises: RequestError, BackendError."""
        return await self._ask(self._body(messages, options))

    def stream(self, prompt: str | Sequence[Message], **options: Any) -> AsyncIterator[Chunk]:
        """The answer piece by piece. Leaving the loop early (`aclose`) stops the model.

        Raises, while iterating: RequestError, BackendError.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._stream(self._body(messages, {**options, "stream": True}))

    def _body(self, messages: Sequence[Message], options: Mapping[str, Any]) -> bytes:
        self._demand()
        named = snake_case(options)
        model = named.pop("model", None) or self._router.default_model()
        return msgspec.json.encode({"model": model, "messages": list(messages), **named})

    async def _ask(self, body: bytes) -> Generated:
        request, record = self._begin(body)
        clock = _Deadline(self._router.table.deadline_s)
        exchange: Exchange | None = None
        keeper: Keeper | None = None
        try:
            found = await clock.bound(self._look_up(request, record))
            if isinstance(found, Cached):
                answer, backend = found.body, found.backend
            else:
                keeper = found
                exchange = await clock.bound(self._router.send(request, record))
                _demand_success(exchange)
                answer, backend = exchange.body, exchange.backend
            latency_ms = (time.monotonic() - record.started_at) * 1000
            result = generated(
                answer,
                backend,
                model=record.model,
                strategy=record.strategy,
                latency_ms=latency_ms,
                cached=record.cached,
            )
            record.status, record.outcome = 200, "success"
            if exchange is not None and exchange.usage is not None:
                account(exchange.usage, exchange.price, record)
            elif exchange is not None:
                guess(exchange, request, record)
            if exchange is not None and keeper is not None:
                keeper.keep(exchange.header(b"content-type"), answer, backend, record)
        except BaseException as error:
            self._fail(record, error)
            raise
        finally:
            if exchange is not None:
                exchange.finish(time.monotonic(), "cancelled")
            if keeper is not None:
                keeper.close()
            self._finish(record)
        self._emit("inference-complete", result, _context(record))
        return result

    async def _stream(self, body: bytes) -> AsyncIterator[Chunk]:
        request, record = self._begin(body)
        clock = _Deadline(self._router.table.deadline_s)
        watch = watch_for(request.endpoint, hide_usage=False)
        exchange: Exchange | None = None
        keeper: Keeper | None = None
        text: list[str] = []
        try:
            found = await clock.bound(self._look_up(request, record))
            if isinstance(found, Cached):
                for chunk in deltas(found.body):
                    text.append(chunk.text)
                    yield chunk
                watch.feed(found.body)
                record.status, record.outcome = 200, "success"
            else:
                keeper = found
                exchange = await clock.bound(self._router.send(request, record))
                _demand_success(exchange)
                record.status = 200
                record.first_token_at = last = time.monotonic()
                record.gaps_s = []
                data = exchange.body
                while data:
                    events = watch.feed(data)
                    if keeper is not None:
                        keeper.add(events)
                    for chunk in deltas(events):
                        text.append(chunk.text)
                        yield chunk
                    data = await clock.bound(exchange.chunk()) if exchange.streaming else b""
                    now = time.monotonic()
                    if data:
                        record.gaps_s.append(now - last)
                        last = now
                        self._instruments.gaps(record)
                if watch.failed:
                    raise BackendError(exchange.backend, "failed in the middle of a stream")
                record.outcome = "success"
                take_usage(watch, request, exchange.price, record, whole=True)
                if keeper is not None and watch.done:
                    keeper.keep(exchange.header(b"content-type"), None, exchange.backend, record)
                exchange.finish(time.monotonic(), "success")
        except GeneratorExit:
            take_usage(watch, request, None if exchange is None else exchange.price, record, whole=False)
            record.status, record.outcome = 499, "cancelled"
            raise
        except BaseException as error:
            if exchange is not None:
                take_usage(watch, request, exchange.price, record, whole=False)
            self._fail(record, error)
            raise
        finally:
            if exchange is not None:
                exchange.finish(time.monotonic(), "cancelled")
            if keeper is not None:
                keeper.close()
            self._finish(record)
        usage_of = watch.usage or Usage(record.input_tokens, record.output_tokens)
        usage = {
            "prompt_tokens": usage_of.input_tokens,
            "completion_tokens": usage_of.output_tokens,
            "total_tokens": usage_of.input_tokens + usage_of.output_tokens,
        }
        result = Generated(
            text="".join(text),
            tokens=usage_of.output_tokens,
            model=record.model,
            latency=round((time.monotonic() - record.started_at) * 1000, 3),
            cached=record.cached,
            strategy=record.strategy,
            usage=usage,
        )
        self._emit("inference-complete", result, _context(record))

    async def _look_up(self, request: InferenceRequest, record: RequestRecord) -> Cached | Keeper | None:
        """The cached answer, or what keeps the one that is to come; None where nothing is cached."""
        if self._answers is None:
            return None
        # A stream is kept with its usage, which a client of `asgi()` that did not ask for it must not be shown.
        wanted = msgspec.structs.replace(request, wants_usage=True) if request.stream else request
        found = await self._answers.find(wanted, {}, record)
        if isinstance(found, Cached):
            record.model, record.cached = request.model, True
        if record.cache_type:
            self._emit("cache-hit" if record.cached else "cache-miss", record.cache_type)
        return found

    def _begin(self, body: bytes) -> tuple[InferenceRequest, RequestRecord]:
        request = read_request(Endpoint.CHAT, body)
        record = RequestRecord("CALL", "library", f"{self._id_prefix}{next(self._ids)}", time.monotonic())
        record.is_inference = True
        record.strategy = self._router.strategy_of(request.model, request.strategy)
        self._recorder.begin()
        self._emit("inference-start", {**_context(record), "model": request.model})
        return request, record

    def _fail(self, record: RequestRecord, error: BaseException) -> None:
        if isinstance(error, RouterError):
            record.status, record.outcome, record.error_type = error.status, "error", error_type(error)
            record.error = error.message
        elif isinstance(error, asyncio.CancelledError):
            record.status, record.outcome = 499, "cancelled"
        else:
            record.status, record.outcome, record.error_type = 500, "error", "internal"
        self._emit("inference-error", error, _context(record))

    def _finish(self, record: RequestRecord) -> None:
        self._recorder.finish(record, time.monotonic())

    # -- looking ---------------------------------------------------------------------------------------

    def on(self, event: str, handler: Handler) -> Callable[[], None]:
        """Have `handler` called on an event; returns a function that takes it out again.

        model-loaded(model), model-unloaded(model), inference-start(context), inference-complete(result, context),
        inference-error(error, context), cache-hit(cache type), cache-miss(cache type). A handler that raises is logged; a coroutine it returns runs as a task.

        Raises: ValueError for a name that is none of these.
        """
        if event not in self._handlers:
            raise ValueError(f"there is no event {event!r}; there are {', '.join(EVENTS)}")
        self._handlers[event].append(handler)
        return lambda: self._handlers[event].remove(handler)

    def _emit(self, event: str, *arguments: Any) -> None:
        for handler in tuple(self._handlers[event]):
            try:
                result = handler(*arguments)
                if inspect.isawaitable(result):
                    self._follow(event, result)
            except Exception:
                _log.exception("a handler of %s failed", event)

    def _follow(self, event: str, awaitable: Awaitable[Any]) -> None:
        async def follow() -> None:
            try:
                await awaitable
            except Exception:
                _log.exception("a handler of %s failed", event)

        task = asyncio.ensure_future(follow())
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    def get_status(self) -> dict[str, Any]:
        """What the router is doing: initialized, engine, models loaded and failed, strategy, uptime in seconds."""
        entries = self._entries()
        return {
            "initialized": self._stack is not None,
            "engine": "llama.cpp",
            "strategy": self._router.table.strategy,
            "modelsLoaded": sum(entry.status in ("loaded", "remote") for entry in entries),
            "registrySize": len(entries),
            "failed": dict(self._failed),
            "uptime": time.monotonic() - self._started_at if self._stack is not None else 0.0,
        }

    def metrics(self, *, openmetrics: bool = False) -> bytes:
        """What this process has counted, in the text format of Prometheus."""
        collected = self._reader.collect(self._levels())
        return self._renderer.render(collected, openmetrics=openmetrics)

    def _levels(self) -> Iterable[Reading]:
        counts = {(FORMAT, category): 0 for category in families.SIZE_CATEGORIES if category != "remote"}
        counts["remote", "remote"] = 0
        for entry in self._entries():
            if entry.status == "loaded":
                counts[FORMAT, size_category(entry.size)] += 1
                yield Reading(families.MODEL_MEMORY, (entry.name, FORMAT), float(entry.memory))
            elif entry.status == "remote":
                counts["remote", "remote"] += 1
        for labels, count in counts.items():
            yield Reading(families.MODELS_LOADED, labels, float(count))
        for backend, in_use in self._connections.in_use().items():
            yield Reading(families.UPSTREAM_IN_FLIGHT, (backend,), float(in_use))
        for model, waiting in self._router.queues().items():
            yield Reading(families.QUEUE_SIZE, (model,), float(waiting))
        for backend, (state, _) in self._router.circuits().items():
            yield Reading(families.CIRCUIT_STATE, (backend,), float(state))
        if self._cache is not None:
            yield Reading(families.CACHE_SIZE, (self._cache.type,), float(self._cache.statistics().size_bytes))

    def inside(self) -> Inside:
        """What those look at who observe this router."""
        return Inside(self._writer, self._levels, lambda: self._router.table, lambda: self._cache)

    def asgi(self) -> AsgiFront:
        """The inference API as an ASGI application, to be mounted into one of yours. Initialize the router first."""
        core = Core(self._router, self._recorder, access=self.settings.access, forward=None, clock=time.monotonic)
        core.answer_from(self._answers)
        return AsgiFront(core, core.refuse, self.settings.front)


class _Deadline:
    """What is left of the time that a call may take in all, from now on; `timeout_s` of 0 is no bound."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._due_at = asyncio.get_running_loop().time() + timeout_s if timeout_s else None

    async def bound(self, work: Awaitable[T]) -> T:
        """What `work` gives. Raises: DeadlineExceeded, when it takes too long; then it is cancelled."""
        try:
            async with asyncio.timeout_at(self._due_at):
                return await work
        except TimeoutError:
            problem = f"the request took longer than the {self._timeout_s:g} s that it may take in all"
            raise DeadlineExceeded(problem) from None


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _context(record: RequestRecord) -> dict[str, Any]:
    return {"id": record.request_id, "model": record.model, "strategy": record.strategy}


def _demand_success(exchange: Exchange) -> None:
    """Raises BackendRejected with the backend's own message unless it answered 200."""
    if exchange.status != 200:
        problem = message_in(exchange.body) or f"answered {exchange.status}"
        raise BackendRejected(exchange.backend, exchange.status, problem, exchange.retry_after_s)
