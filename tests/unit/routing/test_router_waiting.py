"""The router's queues: who waits for a slot, for how long, what those get who may not wait, and what leaving frees."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from llm_router.errors import BackendError, ModelNotFound, Overloaded, QueueFull, QueueTimeout, RouterError
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec, RetrySpec, RoutingTable
from llm_router.signals import RequestRecord
from llm_router.testing import FakeClock, Gate, Hold, ScriptedBackend, framed, json_reply, stream_head
from support.aio import run, until
from support.gateway import table
from support.routed import Routed, request, routed

OK = json_reply({"choices": []})
ONE = QueueSpec(slots=1, max_waiting=2, wait_s=10.0)


def asking(it: Routed, model: str = "m") -> asyncio.Task[RequestRecord]:
    return asyncio.create_task(it.ask(model))


async def waiting(it: Routed, count: int, model: str = "m") -> None:
    """Until so many requests wait for the model."""
    await until(lambda: it.router.queues()[model] == count, what=f"{count} waiting requests")


def with_fallback(backend: ScriptedBackend, fallback: QueueSpec) -> RoutingTable:
    """Model `m` with one slot and the fallback `other`, both on the same server."""
    routing = table(backend.base_url, queue=ONE, retry=RetrySpec(attempts=1))
    first = msgspec.structs.replace(routing.models[0], fallbacks=("other",))
    other = msgspec.structs.replace(first, name="other", fallbacks=(), queue=fallback)
    return msgspec.structs.replace(routing, models=(first, other))


def test_a_request_waits_until_another_has_ended() -> None:
    """Its record tells since when; one that need not wait has its turn at once."""

    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=ONE)) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            second = asking(it)
            await waiting(it, 1)
            assert it.router.waiting == 1
            gate.open()
            one, two = await first, await second
        assert one.queued_at == one.slot_at > 0
        assert one.queued_at < two.queued_at < two.slot_at
        assert one.attempts[0].ended_at <= two.slot_at <= two.attempts[0].started_at
        assert it.router.queues() == {"m": 0}

    with ScriptedBackend() as backend:
        run(check())


def test_a_stream_holds_its_slot_until_it_is_finished() -> None:
    async def check() -> None:
        backend.script(stream_head(), framed(b"data: {}\n\n"), framed(b"data: [DONE]\n\n"), framed(b""))
        async with routed(table(backend.base_url, queue=ONE)) as it:
            exchange = await it.router.send(request(stream=True), it.record())
            assert exchange.streaming
            second = asking(it)
            await waiting(it, 1)
            while await exchange.chunk():
                pass
            assert len(backend.requests) == 1
            exchange.finish(it.clock(), "success")
            exchange.finish(it.clock(), "success")
            assert (await second).status == 200

    with ScriptedBackend() as backend:
        run(check())


def test_one_more_than_may_wait_is_told_when_to_come_back() -> None:
    async def check() -> None:
        gate = Gate()
        backend.always(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=ONE)) as it:
            tasks = [asking(it) for _ in range(3)]
            await waiting(it, 2)
            with pytest.raises(QueueFull, match=r"'m': 2 requests wait already.*max_waiting.*retry in 1 s") as caught:
                await it.ask()
            assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
            gate.open()
            assert [record.status for record in await asyncio.gather(*tasks)] == [200] * 3

    with ScriptedBackend() as backend:
        run(check())


@pytest.mark.parametrize("queue", [QueueSpec(slots=1, max_waiting=0), QueueSpec(slots=1, wait_s=0.0)])
def test_where_nobody_may_wait_a_busy_model_is_full(queue: QueueSpec) -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=queue)) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            with pytest.raises(QueueFull):
                await it.ask()
            gate.open()
            await first

    with ScriptedBackend() as backend:
        run(check())


def test_who_waited_too_long_gets_408() -> None:
    """The wait ends with the first sweep after its time, and never before."""

    async def check() -> None:
        clock = FakeClock()
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=ONE), clock=clock) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            record = it.record()
            second = asyncio.create_task(it.ask(record=record))
            await waiting(it, 1)
            it.router.sweep(clock.advance(ONE.wait_s - 0.1))
            assert it.router.waiting == 1
            it.router.sweep(clock.advance(0.1))
            assert it.router.waiting == 0
            with pytest.raises(QueueTimeout, match="no slot became free within 10 s") as caught:
                await second
            assert caught.value.status == 408
            assert (record.queued_at, record.slot_at, record.attempts) == (1000.0, 0.0, [])
            gate.open()
            await first

    with ScriptedBackend() as backend:
        run(check())


def test_a_caller_who_leaves_frees_the_place_at_once() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=ONE)) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            leaver, stayer = asking(it), asking(it)
            await waiting(it, 2)
            leaver.cancel()
            await waiting(it, 1)
            third = asking(it)
            await waiting(it, 2)
            gate.open()
            assert [record.status for record in await asyncio.gather(first, stayer, third)] == [200] * 3
            assert leaver.cancelled()

    with ScriptedBackend() as backend:
        run(check())


def test_a_caller_who_leaves_as_the_turn_comes_passes_it_on() -> None:
    """Called and cancelled before it ran: the next one is served all the same."""

    async def check() -> None:
        async with routed(table(backend.base_url, queue=ONE)) as it:
            exchange = await it.router.send(request(stream=True), it.record())
            leaver, stayer = asking(it), asking(it)
            await waiting(it, 2)
            exchange.finish(it.clock(), "success")  # calls the first one in line
            leaver.cancel()
            assert (await stayer).status == 200
            assert leaver.cancelled()

    with ScriptedBackend() as backend:
        run(check())


def test_a_failed_request_gives_its_slot_back() -> None:
    async def check() -> None:
        routing = table("http://127.0.0.1:9/v1", queue=ONE, retry=RetrySpec(attempts=1))
        async with routed(routing) as it:
            for _ in range(3):
                with pytest.raises(BackendError):
                    await it.ask()

    run(check())


@pytest.mark.parametrize("how", ["full", "timeout"])
def test_a_fallback_is_asked_before_anybody_is_turned_away(how: str) -> None:
    async def check() -> None:
        clock = FakeClock()
        gate = Gate()
        backend.script(Hold(gate), OK)
        queue = QueueSpec(slots=1, max_waiting=0) if how == "full" else ONE
        routing = with_fallback(backend, ONE)
        first = msgspec.structs.replace(routing.models[0], queue=queue)
        routing = msgspec.structs.replace(routing, models=(first, routing.models[1]))
        async with routed(routing, clock=clock) as it:
            held = asking(it)
            await backend.until(lambda b: b.requests)
            task = asking(it)
            if how == "timeout":
                await waiting(it, 1)
                it.router.sweep(clock.advance(ONE.wait_s))
            record = await task
            assert (record.model, record.status) == ("other", 200)
            assert record.fallback_reasons == (("m", f"queue-{how}"),)
            assert record.slot_at == record.queued_at == clock()
            assert record.waits == (("m", ONE.wait_s if how == "timeout" else 0.0),)
            gate.open()
            await held

    with ScriptedBackend() as backend:
        run(check())


@pytest.mark.parametrize("how", ["full", "timeout"])
def test_a_fallback_that_would_turn_it_away_as_well_is_not_asked(how: str) -> None:
    """Who has waited once for as long as it may does not wait again."""

    async def check() -> None:
        clock = FakeClock()
        gate = Gate()
        backend.always(Hold(gate), OK)
        other = ONE if how == "timeout" else QueueSpec(slots=1, max_waiting=0)
        async with routed(with_fallback(backend, other), clock=clock) as it:
            held = [asking(it), asking(it, "other")]
            await backend.until(lambda b: len(b.requests) == 2)
            if how == "full":
                held += [asking(it), asking(it)]
                await waiting(it, 2)
            task = asking(it)
            if how == "timeout":
                await waiting(it, 1)
                it.router.sweep(clock.advance(ONE.wait_s))
            with pytest.raises(QueueTimeout if how == "timeout" else QueueFull, match="'m'"):
                await task
            gate.open()
            await asyncio.gather(*held)

    with ScriptedBackend() as backend:
        run(check())


def test_a_request_that_falls_back_holds_one_slot_at_a_time() -> None:
    """The first model's is free while the second one works."""

    async def check() -> None:
        gate = Gate()
        backend.script(json_reply({"error": {"message": "oops"}}, 500))
        backend.script(Hold(gate), OK)
        async with routed(with_fallback(backend, ONE)) as it:
            task = asking(it)
            await backend.until(lambda b: len(b.requests) == 2)
            assert (await it.ask()).status == 200
            gate.open()
            assert (await task).model == "other"

    with ScriptedBackend() as backend:
        run(check())


def test_too_many_waiting_in_all_sheds_the_next() -> None:
    """Whichever model they wait for."""

    async def check() -> None:
        gate = Gate()
        backend.always(Hold(gate), OK)
        routing = with_fallback(backend, ONE)
        first = msgspec.structs.replace(routing.models[0], fallbacks=())
        routing = msgspec.structs.replace(routing, models=(first, routing.models[1]), max_waiting=2)
        async with routed(routing) as it:
            tasks = [asking(it, model) for model in ("m", "m", "other", "other")]
            await waiting(it, 1, "m")
            await waiting(it, 1, "other")
            with pytest.raises(Overloaded, match=r"2 requests wait already for all models.*routing\.max_waiting"):
                await it.ask()
            gate.open()
            await asyncio.gather(*tasks)

    with ScriptedBackend() as backend:
        run(check())


def test_workers_divide_the_bounds_among_them() -> None:
    """Rounded up, so that each has at least one."""

    async def check() -> None:
        queue = QueueSpec(slots=5, max_waiting=6)
        routing = msgspec.structs.replace(table(backend.base_url, queue=queue), max_waiting=9)
        async with routed(routing, workers=4) as it:

            def bounds() -> tuple[int, int, int]:
                there = it.router._queues["m"]
                return there.slots, there.max_waiting, it.router._max_waiting

            assert bounds() == (2, 2, 3)
            it.router.update(routing, 8)
            assert bounds() == (1, 1, 2)
            it.router.update(routing)
            assert bounds() == (5, 6, 9)

    with ScriptedBackend() as backend:
        run(check())


def test_more_slots_in_a_new_table_serve_those_who_wait() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=ONE)) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            second = asking(it)
            await waiting(it, 1)
            it.router.update(table(backend.base_url, queue=QueueSpec(slots=2)))
            assert (await second).status == 200
            gate.open()
            await first

    with ScriptedBackend() as backend:
        run(check())


def test_who_waits_for_a_model_that_leaves_is_told() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        routing = table(backend.base_url, queue=ONE)
        async with routed(routing) as it:
            queue = it.router._queues["m"]
            first = asking(it)
            await backend.until(lambda b: b.requests)
            others = [asking(it), asking(it)]
            await waiting(it, 2)
            it.router.update(table(backend.base_url, model="n"))
            for other in others:
                with pytest.raises(ModelNotFound, match="there is 'n'"):
                    await other
            gate.open()
            assert (await first).status == 200
            assert (queue.busy, queue.waiting) == (0, 0)

    with ScriptedBackend() as backend:
        run(check())


def test_a_model_that_is_not_ready_keeps_nobody_waiting() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        routing = table(backend.base_url, queue=ONE)
        async with routed(routing) as it:
            first = asking(it)
            await backend.until(lambda b: b.requests)
            away = msgspec.structs.replace(routing.backends[0], ready=False)
            it.router.update(msgspec.structs.replace(routing, backends=(away,)))
            with pytest.raises(RouterError, match="is not ready"):
                await it.ask()
            gate.open()
            await first

    with ScriptedBackend() as backend:
        run(check())


def test_keys_take_turns_and_batch_comes_after_interactive() -> None:
    """What the request says of itself decides its place."""

    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(table(backend.base_url, queue=QueueSpec(slots=1))) as it:
            order: list[str] = []

            async def ask(name: str, key: str, *, batch: bool = False) -> None:
                inference = request()
                inference.key = key
                inference.priority = "batch" if batch else "interactive"
                await it.send(inference)
                order.append(name)

            first = asking(it)
            await backend.until(lambda b: b.requests)
            tasks = []
            for name, key, batch in (
                ("batch", "a", True),
                ("a1", "a", False),
                ("a2", "a", False),
                ("a3", "a", False),
                ("b1", "b", False),
            ):
                tasks.append(asyncio.create_task(ask(name, key, batch=batch)))
                await waiting(it, len(tasks))
            gate.open()
            await asyncio.gather(first, *tasks)
            assert order == ["a1", "b1", "a2", "a3", "batch"]

    with ScriptedBackend() as backend:
        run(check())


def test_without_a_number_of_slots_the_backends_bounds_count() -> None:
    """Those of remote ones are each worker's own; a local model's runner is shared by all workers."""

    async def check() -> None:
        def slots(*backends: BackendSpec, workers: int) -> int:
            deployments = tuple(Deployment(backend.name, "x") for backend in backends)
            models = (ModelSpec(name="m", deployments=(*deployments, Deployment(backends[0].name, "y"))),)
            made.router.update(RoutingTable(models=models, backends=backends), workers)
            return made.router._queues["m"].slots

        local = BackendSpec(name="local", url="http://127.0.0.1:9/v1", local_model="m", max_connections=6)
        remote = BackendSpec(name="remote", url="http://127.0.0.1:9/v1", max_connections=100)
        async with routed(RoutingTable()) as made:
            assert slots(remote, workers=1) == slots(remote, workers=4) == 100
            assert [slots(local, workers=workers) for workers in (1, 4, 12)] == [6, 2, 1]
            assert slots(local, remote, workers=2) == 103
            made.router.update(RoutingTable(models=(ModelSpec(name="none"),)))
            assert made.router._queues["none"].slots == 1

    run(check())
