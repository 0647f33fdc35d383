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
from typing import Any, Self

import msgspec

from llm_router import families
from llm_router.backends.connections import SWEEP_S, Connections
from llm_router.backends.openai_compatible import message_in
from llm_router.chat import Chunk, Endpoint, InferenceRequest
from llm_router.config import ModelSettings, Settings, load
from llm_router.errors import BackendRejected, ModelNotFound, RouterError
from llm_router.gateway.asgi import AsgiFront
from llm_router.gateway.core import Core, error_type, take_usage
from llm_router.gateway.generate import Generated, chat_body, generated, snake_case
from llm_router.gateway.openai import read_request
from llm_router.gateway.sse import StreamWatch, deltas
from llm_router.instruments import Instruments
from llm_router.models.launch import RunnerSpec
from llm_router.models.registry import FORMAT, ModelsFolder, size_category
from llm_router.observe.metrics.exposition import Renderer
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.processes.own_runners import OwnRunners, RunnerEvent
from llm_router.processes.tables import RunnerAddress, routing_table
from llm_router.routing.router import Exchange, Router
from llm_router.signals import Reading, RequestRecord

_log = logging.getLogger("llm_router")

EVENTS = ("model-loaded", "model-unloaded", "inference-start", "inference-complete", "inference-error")

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


class LLMRouter:
    """Runs models and routes requests to them. An async context manager; belongs to one event loop.

    Args:
        config: path of an `llm-router.yaml`, settings, or None for `./llm-router.yaml` if there is one, else the
            default model.
        env: environment that the configuration may refer to; the process's own by default.
        data_dir: overrides where models and state live.

    Raises: ConfigError, with the key path, when the configuration cannot be used.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Settings | None = None,
        *,
        env: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(config, Settings):
            self.settings = config
        else:
            overrides = {} if data_dir is None else {"data_dir": os.fspath(data_dir)}
            path = None if config is None else os.fspath(config)
            self.settings = load(path, os.environ if env is None else env, overrides)
        self._handlers: dict[str, list[Handler]] = {event: [] for event in EVENTS}
        self._folder = ModelsFolder(self.settings.server.models_dir)
        self._loaded: dict[str, ModelSettings] = {}
        self._failed: dict[str, str] = {}
        self._addresses: dict[str, RunnerAddress] = {}
        self._known: dict[str, LoadedModel] = {}
        self._segment = Segment.private()
        self._writer = Writer(self._segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self._instruments = Instruments(self._writer)
        self._reader = Reader([self._segment], families.FAMILIES)
        self._renderer = Renderer(families.GUIDE_VIEWS)
        self._connections = Connections(self._instruments)
        self._router = Router(
            open_backend=self._connections.open,
            close_backend=self._connections.retire,
            on_backend=lambda name, is_up: None,
            clock=time.monotonic,
            rng=random.Random(),
        )
        self._id_prefix = secrets.token_hex(8) + "-"
        self._ids = itertools.count(1)
        self._following: set[asyncio.Future[None]] = set()  # coroutines of handlers; asyncio keeps weak references
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
            sweeping = asyncio.create_task(self._sweep(), name="llm-router sweep")
            stack.push_async_callback(_end, sweeping)
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
            await self._connections.sweep(time.monotonic())

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
        self._addresses[model.name] = RunnerAddress(running.port, running.key, True)
        self._writer.histogram(families.MODEL_LOAD_DURATION, model.name, FORMAT).observe(running.load_s)
        self._route()
        self._emit("model-loaded", self._known[model.name])

    def _on_runner(self, event: RunnerEvent) -> None:
        """A runner died or came back: its address follows, so that requests go elsewhere meanwhile."""
        if event.name not in self._addresses:
            return
        running = event.running
        if running is not None:
            self._addresses[event.name] = RunnerAddress(running.port, running.key, True)
        else:
            self._addresses[event.name] = RunnerAddress()
            if event.state == "backoff":
                self._writer.counter(families.RUNNER_RESTARTS, event.name, "exited").inc()
                self._instruments.error("runner_lost")
        self._route()

    def _route(self) -> None:
        table = routing_table(self.settings, self._loaded.values(), self._addresses)
        self._router.update(table)
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
        exchange: Exchange | None = None
        try:
            exchange = await self._router.send(request, record)
            _demand_success(exchange)
            latency_ms = (time.monotonic() - record.started_at) * 1000
            result = generated(
                exchange.body, exchange.backend, model=record.model, strategy=record.strategy, latency_ms=latency_ms
            )
            record.status, record.outcome = 200, "success"
            if exchange.usage is not None:
                record.input_tokens = exchange.usage.input_tokens
                record.output_tokens = exchange.usage.output_tokens
                record.usage_source = "provider"
        except BaseException as error:
            self._fail(record, error)
            raise
        finally:
            if exchange is not None:
                exchange.finish(time.monotonic(), "cancelled")
            self._finish(record)
        self._emit("inference-complete", result, _context(record))
        return result

    async def _stream(self, body: bytes) -> AsyncIterator[Chunk]:
        request, record = self._begin(body)
        watch = StreamWatch(hide_usage=False)
        exchange: Exchange | None = None
        text: list[str] = []
        try:
            exchange = await self._router.send(request, record)
            _demand_success(exchange)
            record.status = 200
            record.first_token_at = last = time.monotonic()
            record.gaps_s = []
            data = exchange.body
            while data:
                for chunk in deltas(watch.feed(data)):
                    text.append(chunk.text)
                    yield chunk
                data = await exchange.reply.chunk() if exchange.streaming else b""
                now = time.monotonic()
                if data:
                    record.gaps_s.append(now - last)
                    last = now
                    self._instruments.gaps(record)
            record.outcome = "success"
            take_usage(watch, record, whole=True)
            exchange.finish(time.monotonic(), "success")
        except GeneratorExit:
            take_usage(watch, record, whole=False)
            record.status, record.outcome = 499, "cancelled"
            raise
        except BaseException as error:
            take_usage(watch, record, whole=False)
            self._fail(record, error)
            raise
        finally:
            if exchange is not None:
                exchange.finish(time.monotonic(), "cancelled")
            self._finish(record)
        usage = {
            "prompt_tokens": record.input_tokens,
            "completion_tokens": record.output_tokens,
            "total_tokens": record.input_tokens + record.output_tokens,
        }
        result = Generated(
            text="".join(text),
            tokens=record.output_tokens,
            model=record.model,
            latency=round((time.monotonic() - record.started_at) * 1000, 3),
            cached=False,
            strategy=record.strategy,
            usage=usage,
        )
        self._emit("inference-complete", result, _context(record))

    def _begin(self, body: bytes) -> tuple[InferenceRequest, RequestRecord]:
        request = read_request(Endpoint.CHAT, body)
        record = RequestRecord("CALL", "library", f"{self._id_prefix}{next(self._ids)}", time.monotonic())
        record.is_inference = True
        record.strategy = self._router.strategy_of(request.model)
        self._instruments.begin()
        self._emit("inference-start", {**_context(record), "model": request.model})
        return request, record

    def _fail(self, record: RequestRecord, error: BaseException) -> None:
        if isinstance(error, RouterError):
            record.status, record.outcome, record.error_type = error.status, "error", error_type(error)
        elif isinstance(error, asyncio.CancelledError):
            record.status, record.outcome = 499, "cancelled"
        else:
            record.status, record.outcome, record.error_type = 500, "error", "internal"
        self._emit("inference-error", error, _context(record))

    def _finish(self, record: RequestRecord) -> None:
        self._instruments.finish(record, time.monotonic())

    # -- looking ---------------------------------------------------------------------------------------

    def on(self, event: str, handler: Handler) -> Callable[[], None]:
        """Have `handler` called on an event; returns a function that takes it out again.

        model-loaded(model), model-unloaded(model), inference-start(context), inference-complete(result, context),
        inference-error(error, context). A handler that raises is logged; a coroutine it returns runs as a task.

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

    def asgi(self) -> AsgiFront:
        """The inference API as an ASGI application, to be mounted into one of yours. Initialize the router first."""
        core = Core(self._router, self._instruments, access=self.settings.access, forward=None, clock=time.monotonic)
        return AsgiFront(core, core.refuse, self.settings.front)


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
