"""The router's circuits: which attempts count, who is left alone, who probes, and what others are told."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from llm_router.errors import BackendBusy, BackendUnavailable, CircuitOpen
from llm_router.routing.breaker import State
from llm_router.routing.table import BreakerSpec, ModelSpec, QueueSpec, RetrySpec, RoutingTable
from llm_router.testing import Close, FakeClock, Gate, Hold, ScriptedBackend, framed, json_reply, stream_head
from support.aio import run, until
from support.gateway import table
from support.net import free_port
from support.routed import Routed, request, routed

OK = json_reply({"choices": []})
BROKEN = json_reply({"error": {"message": "oops"}}, 500)
BREAKER = BreakerSpec(min_attempts=3, cooldown_s=5.0, probes=1)
ONCE = RetrySpec(attempts=1)


def circuit_table(
    *urls: str, breaker: BreakerSpec = BREAKER, retry: RetrySpec = ONCE, queue: QueueSpec | None = None
) -> RoutingTable:
    return msgspec.structs.replace(table(*urls, retry=retry, queue=queue), breaker=breaker)


async def fail(it: Routed, times: int = 3) -> None:
    """So many requests whose only attempt fails with 500."""
    for _ in range(times):
        assert (await it.ask()).status == 500


def test_a_backend_that_fails_too_often_is_left_alone() -> None:
    async def check() -> None:
        backend.always(BROKEN)
        async with routed(circuit_table(backend.base_url), clock=FakeClock()) as it:
            await fail(it)
            assert it.router.circuits() == {"b0": (State.OPEN, 1005.0)}
            record = it.record()
            with pytest.raises(CircuitOpen, match=r"'m'.*left alone.*retry in 5 s") as caught:
                await it.ask(record=record)
            assert (caught.value.status, caught.value.retry_after_s) == (503, 5.0)
            assert (len(backend.requests), record.attempts, it.circuits) == (3, [], [("b0", State.OPEN)])

    with ScriptedBackend() as backend:
        run(check())


def test_another_deployment_is_asked_meanwhile() -> None:
    """Without an attempt at the one that is left alone, and without a retry."""

    async def check() -> None:
        sick.always(BROKEN)
        async with routed(circuit_table(sick.base_url, well.base_url), clock=FakeClock()) as it:
            while it.router.circuits()["b0"][0] is State.CLOSED:
                await it.ask()
            records = [await it.ask() for _ in range(5)]
            assert [[attempt.backend for attempt in record.attempts] for record in records] == [["b1"]] * 5
            assert {record.reason for record in records} == {"only-deployment"}

    with ScriptedBackend() as sick, ScriptedBackend() as well:
        run(check())


def test_the_retry_of_the_request_that_opened_a_circuit_goes_elsewhere_or_is_not_made() -> None:
    async def check() -> None:
        backend.always(BROKEN)
        routing = circuit_table(backend.base_url, retry=RetrySpec(backoff_s=0.0, attempts=9))
        async with routed(routing, clock=FakeClock()) as it:
            record = await it.ask()
            assert (record.status, len(record.attempts), len(record.retry_reasons)) == (500, 3, 2)
            assert repr(it.router._budget) == "RetryBudget(requests=1, retries=2)"

    with ScriptedBackend() as backend:
        run(check())


def test_a_fallback_is_asked_for_a_model_whose_circuits_are_open() -> None:
    async def check() -> None:
        sick.always(BROKEN)
        routing = circuit_table(sick.base_url, well.base_url)
        first, second = routing.models[0].deployments
        models = (
            ModelSpec(name="m", deployments=(first,), fallbacks=("other",)),
            ModelSpec(name="other", deployments=(second,)),
        )
        async with routed(msgspec.structs.replace(routing, models=models), clock=FakeClock()) as it:
            for _ in range(3):
                assert (await it.ask()).fallback_reasons == (("m", "server-error"),)
            record = await it.ask()
            assert (record.model, record.fallback_reasons) == ("other", (("m", "circuit-open"),))
            assert len(record.attempts) == 1

    with ScriptedBackend() as sick, ScriptedBackend() as well:
        run(check())


def test_a_fallback_whose_circuit_is_open_is_not_asked() -> None:
    """What the first model said is worth more."""

    async def check() -> None:
        first.always(json_reply({"error": {"message": "slow down"}}, 429))
        second.always(BROKEN)
        routing = circuit_table(first.base_url, second.base_url)
        one, two = routing.models[0].deployments
        models = (
            ModelSpec(name="m", deployments=(one,), fallbacks=("other",)),
            ModelSpec(name="other", deployments=(two,)),
        )
        async with routed(msgspec.structs.replace(routing, models=models), clock=FakeClock()) as it:
            it.router.open_circuits({"b1": it.clock() + 3.0})
            record = await it.ask()
            assert (record.status, record.model, record.fallback_reasons) == (429, "m", ())
            assert second.requests == []

    with ScriptedBackend() as first, ScriptedBackend() as second:
        run(check())


def test_after_the_cooldown_one_request_probes_and_its_success_closes() -> None:
    async def check() -> None:
        clock = FakeClock()
        gate = Gate()
        backend.always(BROKEN)
        async with routed(circuit_table(backend.base_url), clock=clock) as it:
            await fail(it)
            clock.advance(BREAKER.cooldown_s)
            assert it.router.circuits()["b0"] == (State.HALF_OPEN, 1005.0)
            backend.script(Hold(gate), OK)
            probe = asyncio.create_task(it.ask())
            await backend.until(lambda b: len(b.requests) == 4)
            with pytest.raises(CircuitOpen, match="retry in 1 s"):
                await it.ask()
            gate.open()
            assert (await probe).status == 200
            assert it.circuits == [("b0", State.OPEN), ("b0", State.HALF_OPEN), ("b0", State.CLOSED)]
            backend.always(OK)
            assert (await it.ask()).status == 200

    with ScriptedBackend() as backend:
        run(check())


def test_a_probe_that_is_cancelled_lets_the_next_one_through() -> None:
    async def check() -> None:
        clock = FakeClock()
        gate = Gate()
        backend.always(BROKEN)
        async with routed(circuit_table(backend.base_url), clock=clock) as it:
            await fail(it)
            clock.advance(BREAKER.cooldown_s)
            backend.script(Hold(gate), OK)
            probe = asyncio.create_task(it.ask())
            await backend.until(lambda b: len(b.requests) == 4)
            probe.cancel()
            await asyncio.wait([probe])
            backend.always(OK)
            assert (await it.ask()).status == 200
            assert it.router.circuits()["b0"][0] is State.CLOSED

    with ScriptedBackend() as backend:
        run(check())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
def test_the_callers_own_faults_do_not_count(status: int) -> None:
    async def check() -> None:
        backend.always(json_reply({"error": {"message": "bad"}}, status))
        async with routed(circuit_table(backend.base_url)) as it:
            for _ in range(6):
                assert (await it.ask()).status == status
            assert it.circuits == []

    with ScriptedBackend() as backend:
        run(check())


def test_a_probe_that_was_the_callers_own_fault_lets_the_next_one_through() -> None:
    async def check() -> None:
        clock = FakeClock()
        backend.always(BROKEN)
        async with routed(circuit_table(backend.base_url), clock=clock) as it:
            await fail(it)
            clock.advance(BREAKER.cooldown_s)
            backend.always(json_reply({"error": {"message": "bad"}}, 400))
            assert [(await it.ask()).status for _ in range(3)] == [400] * 3
            assert it.router.circuits()["b0"][0] is State.HALF_OPEN

    with ScriptedBackend() as backend:
        run(check())


def test_our_own_bounds_and_callers_who_leave_do_not_count() -> None:
    async def check() -> None:
        gate = Gate()
        backend.always(Hold(gate), OK)
        routing = table(
            backend.base_url, retry=ONCE, queue=QueueSpec(slots=9), max_connections=1, wait_s=0.0, stream_usage=False
        )
        async with routed(msgspec.structs.replace(routing, breaker=BREAKER)) as it:
            leavers = [asyncio.create_task(it.ask())]
            await backend.until(lambda b: b.requests)
            for _ in range(5):
                with pytest.raises(BackendBusy):
                    await it.ask()
            for _ in range(4):
                leavers[-1].cancel()
                await asyncio.wait(leavers)
                sent = len(backend.requests)
                leavers.append(asyncio.create_task(it.ask()))
                await backend.until(lambda b, sent=sent: len(b.requests) > sent)  # type: ignore[misc]
            gate.open()
            await leavers[-1]
            assert it.circuits == []

    with ScriptedBackend() as backend:
        run(check())


def test_retry_after_keeps_the_circuit_open() -> None:
    async def check() -> None:
        backend.always(json_reply({"error": {"message": "slow down"}}, 429, [("Retry-After", "40")]))
        async with routed(circuit_table(backend.base_url), clock=FakeClock()) as it:
            for _ in range(3):
                assert (await it.ask()).status == 429
            assert it.router.circuits()["b0"] == (State.OPEN, 1040.0)

    with ScriptedBackend() as backend:
        run(check())


def test_a_backend_that_cannot_be_reached_is_left_alone() -> None:
    async def check() -> None:
        async with routed(circuit_table(f"http://127.0.0.1:{free_port()}/v1"), clock=FakeClock()) as it:
            for _ in range(3):
                with pytest.raises(BackendUnavailable):
                    await it.ask()
            with pytest.raises(CircuitOpen):
                await it.ask()

    run(check())


def test_slow_backends_are_left_alone_where_slowness_is_bounded() -> None:
    async def check() -> None:
        clock = FakeClock()
        slow = msgspec.structs.replace(BREAKER, slow_s=2.0, slow_ratio=1.0)
        async with routed(circuit_table(backend.base_url, breaker=slow), clock=clock) as it:
            for _ in range(3):
                gate = Gate()
                backend.script(Hold(gate), OK)
                sent = len(backend.requests)
                asking = asyncio.create_task(it.ask())
                await backend.until(lambda b, sent=sent: len(b.requests) > sent)  # type: ignore[misc]
                clock.advance(2.5)
                gate.open()
                assert (await asking).status == 200
            assert it.circuits == [("b0", State.OPEN)]

    with ScriptedBackend() as backend:
        run(check())


def test_streams_that_break_off_count() -> None:
    """Their first bytes were a success; that they ended early is a failure."""

    async def check() -> None:
        backend.always(stream_head(), framed(b"data: {}\n\n"), Close())
        async with routed(circuit_table(backend.base_url)) as it:
            for _ in range(3):
                exchange = await it.router.send(request(stream=True), it.record())
                with pytest.raises(BackendUnavailable) as caught:
                    while await exchange.chunk():
                        pass
                exchange.finish(it.clock(), caught.value.domain)
            assert it.circuits == [("b0", State.OPEN)]

    with ScriptedBackend() as backend:
        run(check())


def test_streams_that_end_or_are_left_by_their_callers_do_not_count_as_failed() -> None:
    async def check() -> None:
        async with routed(circuit_table(backend.base_url)) as it:
            for outcome in ("success", "cancelled") * 3:
                exchange = await it.router.send(request(stream=True), it.record())
                exchange.finish(it.clock(), outcome)
            assert it.circuits == []

    with ScriptedBackend() as backend:
        run(check())


def test_what_other_processes_found_counts_here_and_is_not_told_again() -> None:
    async def check() -> None:
        clock = FakeClock()
        async with routed(circuit_table(backend.base_url), clock=clock) as it:
            it.router.open_circuits({"b0": clock() + 8.0, "unknown": clock() + 8.0})
            with pytest.raises(CircuitOpen, match="retry in 8 s"):
                await it.ask()
            assert it.circuits == []
            clock.advance(8.0)
            assert (await it.ask()).status == 200
            it.router.open_circuits({"b0": clock()})  # the same news again, which is old by now
            assert (await it.ask()).status == 200
            assert it.circuits == [("b0", State.HALF_OPEN), ("b0", State.CLOSED)]

    with ScriptedBackend() as backend:
        run(check())


def test_a_circuit_outlives_tables_but_not_its_server_or_its_rules() -> None:
    async def check() -> None:
        backend.always(BROKEN)
        routing = circuit_table(backend.base_url)
        async with routed(routing, clock=FakeClock()) as it:
            await fail(it)
            away = msgspec.structs.replace(routing.backends[0], ready=False)
            it.router.update(msgspec.structs.replace(routing, backends=(away,)))
            it.router.update(routing)
            with pytest.raises(CircuitOpen):
                await it.ask()
            it.router.update(circuit_table(other.base_url))
            assert it.circuits == [("b0", State.OPEN), ("b0", State.CLOSED)]
            assert (await it.ask()).status == 200
            it.router.update(routing)
            await fail(it)
            it.router.update(circuit_table(backend.base_url, breaker=BreakerSpec(enabled=False)))
            await fail(it, 5)
            assert it.circuits[2:] == [("b0", State.OPEN), ("b0", State.CLOSED)]

    with ScriptedBackend() as backend, ScriptedBackend() as other:
        run(check())


def test_what_a_replaced_server_still_answers_is_not_told_of_its_successor() -> None:
    async def check() -> None:
        gate = Gate()
        old.always(Hold(gate), BROKEN)
        async with routed(circuit_table(old.base_url)) as it:
            tasks = [asyncio.create_task(it.ask()) for _ in range(4)]
            await old.until(lambda b: len(b.requests) == 4)
            it.router.update(circuit_table(new.base_url))
            gate.open()
            assert [record.status for record in await asyncio.gather(*tasks)] == [500] * 4
            assert (it.circuits, it.router.circuits()) == ([], {"b0": (State.CLOSED, 0.0)})
            assert (await it.ask()).status == 200

    with ScriptedBackend() as old, ScriptedBackend() as new:
        run(check())


def test_who_could_only_wait_for_a_circuit_does_not_wait_for_a_slot() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(circuit_table(backend.base_url, queue=QueueSpec(slots=1))) as it:
            first = asyncio.create_task(it.ask())
            await backend.until(lambda b: b.requests)
            it.router.open_circuits({"b0": time.monotonic() + 5.0})
            with pytest.raises(CircuitOpen):
                await it.ask()
            gate.open()
            await first

    with ScriptedBackend() as backend:
        run(check())


def test_requests_that_waited_are_told_when_the_circuit_opened_meanwhile() -> None:
    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), OK)
        async with routed(circuit_table(backend.base_url, queue=QueueSpec(slots=1))) as it:
            first = asyncio.create_task(it.ask())
            await backend.until(lambda b: b.requests)
            second = asyncio.create_task(it.ask())
            await until(lambda: it.router.waiting == 1)
            it.router.open_circuits({"b0": time.monotonic() + 5.0})
            gate.open()
            await first
            with pytest.raises(CircuitOpen):
                await second
            assert len(backend.requests) == 1

    with ScriptedBackend() as backend:
        run(check())
