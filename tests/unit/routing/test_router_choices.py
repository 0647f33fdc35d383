"""What the router makes of strategies, deployments, prices, speeds and dialects."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import msgspec
import pytest

from llm_router.backends.base import Backend, ReplyReader
from llm_router.chat import Endpoint, InferenceRequest, Usage
from llm_router.errors import BackendUnavailable, BadReply, ConfigError, InvalidRequest
from llm_router.models.prices import Price
from llm_router.routing.policies import Candidate
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.testing import Gate, Hold, ScriptedBackend, framed, json_reply, stream_head
from llm_router.upstream.pool import Pool
from support.aio import run, until
from support.gateway import table
from support.net import free_port
from support.routed import Routed, request, routed

OK = json_reply({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
BROKEN = json_reply({"error": {"message": "oops"}}, 500)


@pytest.fixture
def own_module() -> Any:
    """A module of the operator's with functions that take the first and the last candidate."""
    module = ModuleType("operators_policies")

    def take_last(model: str, candidates: Sequence[Candidate], need: Callable[[], object]) -> int:
        return len(candidates) - 1

    def take_first(model: str, candidates: Sequence[Candidate], need: Callable[[], object]) -> int:
        return 0

    module.__dict__.update(take_first=take_first, take_last=take_last)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def wanting(strategy: str) -> InferenceRequest:
    inference = request()
    inference.strategy = strategy
    return inference


def rated(backend: ScriptedBackend, **fields: Any) -> RoutingTable:
    """Model `m` on two backends at one server: `b0` is cheap, `b1` is good."""
    routing = table(backend.base_url, backend.base_url, **fields)
    deployments = (
        Deployment("b0", "x", quality=0.1, price=Price(input=1.0, output=1.0)),
        Deployment("b1", "x", quality=0.9, price=Price(input=9.0, output=9.0)),
    )
    return msgspec.structs.replace(
        routing, models=(msgspec.structs.replace(routing.models[0], deployments=deployments),)
    )


def test_a_request_may_want_another_strategy_for_itself() -> None:
    async def check() -> None:
        async with routed(rated(backend)) as it:
            for strategy, best, reason in (
                ("quality-first", "b1", "best-quality"),
                ("cost-optimized", "b0", "lowest-cost"),
            ):
                records = [await it.send(wanting(strategy)) for _ in range(3)]
                assert [record.attempts[0].backend for record in records] == [best] * 3
                assert {(record.strategy, record.reason) for record in records} == {(strategy, reason)}
            assert (await it.ask()).strategy == "round-robin"

    with ScriptedBackend() as backend:
        run(check())


def test_what_strategy_routes_a_model() -> None:
    async def check() -> None:
        async with routed(rated(backend)) as it:
            assert it.router.strategy_of("m") == "round-robin"
            assert it.router.strategy_of("m", "random") == "random"
            assert it.router.strategy_of("unknown", "random") == "__other__"

    with ScriptedBackend() as backend:
        run(check())


def test_the_operators_own_function_decides(own_module: ModuleType) -> None:
    async def check() -> None:
        routing = msgspec.structs.replace(rated(backend, strategy="custom"), custom="operators_policies:take_last")
        async with routed(routing) as it:
            record = await it.ask()
            assert (record.attempts[0].backend, record.strategy, record.reason) == ("b1", "custom", "custom")
            it.router.update(msgspec.structs.replace(routing, custom="operators_policies:take_first"))
            assert [(await it.ask()).attempts[0].backend for _ in range(3)] == ["b0"] * 3
            it.router.update(rated(backend))
            with pytest.raises(InvalidRequest, match="'custom' is not configured here: set routing.custom"):
                await it.send(wanting("custom"))

    with ScriptedBackend() as backend:
        run(check())


@pytest.mark.parametrize("custom", ["", "nowhere_to_be_found:function"])
def test_a_table_whose_strategy_cannot_be_had_changes_nothing(custom: str) -> None:
    async def check() -> None:
        async with routed(table(backend.base_url)) as it:
            bad = msgspec.structs.replace(rated(backend, strategy="custom"), custom=custom)
            with pytest.raises(ConfigError):
                it.router.update(bad)
            assert (await it.ask()).status == 200
            assert list(it.connections.in_use()) == ["b0"]

    with ScriptedBackend() as backend:
        run(check())


def test_the_exchange_tells_what_the_deployment_costs() -> None:
    async def check() -> None:
        async with routed(rated(backend, strategy="quality-first")) as it:
            exchange = await it.router.send(request(), it.record())
            exchange.finish(it.clock(), "")
            assert exchange.price == Price(input=9.0, output=9.0)
            assert (exchange.deployment.backend, exchange.backend) == ("b1", "b1")

    with ScriptedBackend() as backend:
        run(check())


def test_speeds_are_measured_where_there_is_a_choice() -> None:
    """From plain replies and from streams that came whole; they outlive tables, not servers."""

    async def check() -> None:
        backend.always(OK)
        async with routed(rated(backend, strategy="quality-first")) as it:

            def samples() -> list[int]:
                return [target.speed.samples for target in it.router._models["m"].candidates(Endpoint.CHAT)]

            await it.ask()
            assert samples() == [0, 1]
            for outcome in ("success", "cancelled"):
                backend.script(stream_head(), framed(b"data: {}\n\n"), framed(b""))
                record = it.record()
                exchange = await it.router.send(request(stream=True), record)
                record.output_tokens = 7
                exchange.finish(it.clock(), outcome)
            assert samples() == [0, 2]
            it.router.update(rated(backend, strategy="quality-first", stream_usage=True))
            assert samples() == [0, 2]
            it.router.update(rated(backend, strategy="quality-first", first_byte_s=77.0))
            assert samples() == [0, 0]
            it.router.update(table(backend.base_url))
            await it.ask()
            assert samples() == [0]

    with ScriptedBackend() as backend:
        run(check())


def test_another_model_at_the_same_backend_is_another_deployment() -> None:
    """A retry asks it, as it was not tried yet."""

    async def check() -> None:
        backend.script(BROKEN)
        routing = table(backend.base_url, retry=RetrySpec(backoff_s=1000.0, backoff_max_s=1000.0))
        deployments = (Deployment("b0", "one"), Deployment("b0", "two"))
        models = (msgspec.structs.replace(routing.models[0], deployments=deployments),)
        async with routed(msgspec.structs.replace(routing, models=models)) as it:
            record = await it.ask()
        assert record.status == 200
        assert sorted(sent.json()["model"] for sent in backend.requests) == ["one", "two"]

    with ScriptedBackend() as backend:
        run(check())


def test_what_a_backend_does_not_serve_it_is_not_asked_for() -> None:
    """Anthropic's protocol has chats only; where no other backend is, it is asked and says so itself."""

    async def check() -> None:
        anthropic = BackendSpec(name="claude", url="http://127.0.0.1:9", protocol="anthropic")
        chats = BackendSpec(name="chats", url="http://127.0.0.1:9/v1", embeddings=False)
        full = BackendSpec(name="full", url="http://127.0.0.1:9/v1")
        async with routed(RoutingTable()) as it:

            def asked(endpoint: Endpoint, *backends: BackendSpec) -> list[str]:
                deployments = tuple(Deployment(backend.name, "x") for backend in backends)
                models = (ModelSpec(name="m", deployments=deployments),)
                it.router.update(RoutingTable(models=models, backends=backends))
                return [target.name for target in it.router._models["m"].candidates(endpoint)]

            everybody = (anthropic, chats, full)
            assert (
                asked(Endpoint.CHAT, *everybody) == asked(Endpoint.MESSAGES, *everybody) == ["claude", "chats", "full"]
            )
            assert asked(Endpoint.COMPLETION, *everybody) == ["chats", "full"]
            assert asked(Endpoint.EMBEDDING, *everybody) == ["full"]
            assert asked(Endpoint.EMBEDDING, anthropic, chats) == ["claude", "chats"]
            assert asked(Endpoint.CHAT, msgspec.structs.replace(full, ready=False)) == []

    run(check())


# -- dialects -------------------------------------------------------------------------------------------


class Shouting:
    """Reads replies in capitals. Holds the first piece of a stream back, and adds an end to it."""

    def __init__(self, *, refuses: bool) -> None:
        self._refuses = refuses
        self._held = b""

    def plain(self, status: int, body: bytes) -> bytes:
        if self._refuses and status == 200:
            raise BadReply("b0", "not what it should be")
        return body.upper()

    def feed(self, data: bytes) -> bytes:
        if self._refuses:
            raise BadReply("b0", "not what it should be")
        held, self._held = self._held, data
        return held.upper()

    def rest(self) -> bytes:
        return self._held.upper() + b"!"


class ShoutingBackend:
    """A backend whose replies need a reader; `refuses` while they cannot be read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name = backend.name
        self.pool: Pool = backend.pool
        self.refuses = False
        self.usage_from: list[tuple[Endpoint, bytes]] = []

    @property
    def in_use(self) -> int:
        return self._backend.in_use

    def encode(
        self, request: InferenceRequest, upstream_model: str, request_id: str, trace: str = ""
    ) -> tuple[bytes, bytes]:
        return self._backend.encode(request, upstream_model, request_id, trace)

    def reader(self, request: InferenceRequest) -> ReplyReader | None:
        return Shouting(refuses=self.refuses)

    def usage_of(self, endpoint: Endpoint, body: bytes) -> Usage | None:
        self.usage_from.append((endpoint, body))
        return Usage(3, 5)

    def without_secrets(self, body: bytes) -> bytes:
        return body.replace(b"secret", b"***")

    def problem_in(self, body: bytes) -> str:
        return self._backend.problem_in(body)


def shouting(backend: ScriptedBackend, check: Callable[[Routed, ShoutingBackend], Any]) -> None:
    async def inside() -> None:
        made: list[ShoutingBackend] = []

        def opened(plain: Backend) -> Backend:
            made.append(ShoutingBackend(plain))
            return made[0]

        async with routed(table(backend.base_url, retry=RetrySpec(attempts=1)), opened=opened) as it:
            await check(it, made[0])

    run(inside())


def test_plain_replies_are_read_in_the_callers_dialect() -> None:
    """Usage is taken from what the caller gets; errors are freed of secrets before they are read."""

    async def check(it: Routed, shouts: ShoutingBackend) -> None:
        backend.script(json_reply({"text": "hello"}))
        exchange = await it.router.send(request(), it.record())
        exchange.finish(it.clock(), "")
        assert exchange.body == b'{"TEXT": "HELLO"}'
        assert exchange.usage == Usage(3, 5)
        assert shouts.usage_from == [(Endpoint.CHAT, exchange.body)]
        backend.script(json_reply({"error": "my secret"}, 400))
        exchange = await it.router.send(request(), it.record())
        exchange.finish(it.clock(), "")
        assert (exchange.status, exchange.body) == (400, b'{"ERROR": "MY ***"}')

    with ScriptedBackend() as backend:
        shouting(backend, check)


def test_streams_are_read_in_the_callers_dialect() -> None:
    """The first bytes are the first that mean something to the caller; what remains comes at the end."""

    async def check(it: Routed, shouts: ShoutingBackend) -> None:
        gate = Gate()
        backend.script(stream_head(), framed(b"data: one\n\n"), Hold(gate), framed(b"data: two\n\n"), framed(b""))
        asking = asyncio.create_task(it.router.send(request(stream=True), it.record()))
        await until(lambda: backend.connections and backend.connections[0].sent_bytes)
        gate.open()
        exchange = await asking
        assert exchange.streaming
        got = exchange.body
        while data := await exchange.chunk():
            got += data
        assert await exchange.chunk() == b""
        exchange.finish(it.clock(), "success")
        assert got == b"DATA: ONE\n\nDATA: TWO\n\n!"

    with ScriptedBackend() as backend:
        shouting(backend, check)


def test_what_the_reader_refuses_is_a_failed_attempt() -> None:
    async def check(it: Routed, shouts: ShoutingBackend) -> None:
        shouts.refuses = True
        for stream in (False, True):
            record = it.record()
            with pytest.raises(BadReply, match="not what it should be"):
                await it.router.send(request(stream=stream), record)
            assert [attempt.outcome for attempt in record.attempts] == ["provider"]
            await until(lambda: it.connections.in_use() == {"b0": 0})

    with ScriptedBackend() as backend:
        shouting(backend, check)


def test_a_model_of_backends_that_are_all_away_says_so_for_the_last_of_them() -> None:
    """Every deployment is tried once before any is tried again."""

    async def check() -> None:
        urls = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(3)]
        async with routed(table(*urls, retry=RetrySpec(attempts=3))) as it:
            record = it.record()
            with pytest.raises(BackendUnavailable):
                await it.ask(record=record)
            assert sorted(attempt.backend for attempt in record.attempts) == ["b0", "b1", "b2"]

    run(check())
