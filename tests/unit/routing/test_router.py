"""The router over scripted backends: what it does when the table changes under a request, and what it knows of load."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from llm_router.chat import Endpoint
from llm_router.errors import BackendBusy, BackendError, BackendUnavailable
from llm_router.gateway.openai import read_request
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec, RetrySpec, RoutingTable
from llm_router.signals import RequestRecord
from llm_router.testing import Gate, Hold, ScriptedBackend, json_reply
from support.aio import run, until
from support.gateway import table
from support.net import free_port
from support.routed import request, routed

OK = json_reply({"choices": []})
BROKEN = json_reply({"error": {"message": "oops"}}, 500)


def fallback_table(first: ScriptedBackend, second: BackendSpec, *, retry: RetrySpec | None = None) -> RoutingTable:
    """Model `m` on `first`, with a fallback `other` on `second`."""
    return RoutingTable(
        models=(
            ModelSpec(name="m", deployments=(Deployment("first", "x"),), fallbacks=("other",)),
            ModelSpec(name="other", deployments=(Deployment(second.name, "y"),)),
        ),
        backends=(BackendSpec(name="first", url=first.base_url), second),
        retry=retry or RetrySpec(attempts=1),
    )


def test_a_fallback_that_left_the_table_meanwhile_is_passed_over() -> None:
    """The caller gets the first model's own reply, not a fault of ours."""

    async def check() -> None:
        gate = Gate()
        first.script(Hold(gate), BROKEN)
        routing = fallback_table(first, BackendSpec(name="second", url=first.base_url))
        async with routed(routing) as it:
            asking = asyncio.create_task(it.ask())
            await first.until(lambda b: b.requests)
            it.router.update(
                msgspec.structs.replace(routing, models=(msgspec.structs.replace(routing.models[0], fallbacks=()),))
            )
            gate.open()
            assert (await asking).status == 500

    with ScriptedBackend() as first:
        run(check())


def test_a_fallback_that_is_not_ready_is_not_asked() -> None:
    """What the first model said is worth more than that the second one is away; no fallback is counted."""

    async def check() -> None:
        first.always(json_reply({"error": {"message": "slow down"}}, 429))
        away = BackendSpec(name="second", url="http://127.0.0.1:9/v1", ready=False)
        async with routed(fallback_table(first, away)) as it:
            record = await it.ask()
        assert (record.status, record.model, record.fallback_reasons) == (429, "m", ())

    with ScriptedBackend() as first:
        run(check())


def test_a_retry_goes_to_the_backends_of_the_newest_table() -> None:
    """A runner that was restarted has another port: the retry must not knock at the old one."""

    async def check() -> None:
        gate = Gate()
        old.script(Hold(gate), BROKEN)
        async with routed(table(old.base_url)) as it:
            asking = asyncio.create_task(it.ask())
            await old.until(lambda b: b.requests)
            it.router.update(table(new.base_url))
            gate.open()
            record = await asking
        assert record.status == 200
        assert (len(old.requests), len(new.requests)) == (1, 1)
        assert [attempt.outcome for attempt in record.attempts] == ["provider", "success"]

    with ScriptedBackend() as old, ScriptedBackend() as new:
        run(check())


def test_a_model_whose_backends_left_meanwhile_is_not_tried_again() -> None:
    """No retry is counted that was never made."""

    async def check() -> None:
        gate = Gate()
        backend.script(Hold(gate), BROKEN)
        routing = table(backend.base_url)
        async with routed(routing) as it:
            asking = asyncio.create_task(it.ask())
            await backend.until(lambda b: b.requests)
            away = msgspec.structs.replace(routing.backends[0], ready=False)
            it.router.update(msgspec.structs.replace(routing, backends=(away,)))
            gate.open()
            record = await asking
        assert (record.status, record.retry_reasons, len(backend.requests)) == (500, (), 1)

    with ScriptedBackend() as backend:
        run(check())


def test_a_failure_of_a_replaced_server_says_nothing_of_its_successor() -> None:
    """The failures that are counted for a backend are those of the server it has now."""

    async def check() -> None:
        async with routed(table(f"http://127.0.0.1:{free_port()}/v1", retry=RetrySpec(attempts=1))) as it:
            for _ in range(2):
                with pytest.raises(BackendUnavailable):
                    await it.ask()
            it.router.update(table(f"http://127.0.0.1:{free_port()}/v1", retry=RetrySpec(attempts=1)))
            with pytest.raises(BackendUnavailable):
                await it.ask()
            assert it.seen == []

    run(check())


def test_that_all_connections_are_in_use_is_no_sign_of_life() -> None:
    """Our own bound was met: a backend that is down stays down."""

    async def check() -> None:
        port = free_port()
        routing = table(
            f"http://127.0.0.1:{port}/v1",
            retry=RetrySpec(attempts=1),
            queue=QueueSpec(slots=2),
            max_connections=1,
            wait_s=0.0,
        )
        async with routed(routing) as it:
            for _ in range(3):
                with pytest.raises(BackendUnavailable):
                    await it.ask()
            assert it.seen == [("b0", False)]
            with ScriptedBackend(port=port) as backend:
                gate = Gate()
                backend.always(Hold(gate), OK)
                asking = asyncio.create_task(it.ask())
                await backend.until(lambda b: b.requests)
                with pytest.raises(BackendBusy):
                    await it.ask()
                assert it.seen == [("b0", False)]
                gate.open()
                await asking
            assert it.seen == [("b0", False), ("b0", True)]

    run(check())


def test_a_request_that_is_cancelled_between_two_attempts_leaves_nothing() -> None:
    """The attempts there were have ended, and their connections are free."""

    async def check() -> None:
        backend.always(BROKEN)
        routing = table(backend.base_url, retry=RetrySpec(backoff_s=1000.0, backoff_max_s=1000.0))
        async with routed(routing) as it:
            record = RequestRecord("POST", "/", "r", time.monotonic())
            asking = asyncio.create_task(it.router.send(request(), record))
            await until(lambda: record.attempts and record.attempts[0].outcome)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert [attempt.outcome for attempt in record.attempts] == ["provider"]
            assert it.connections.in_use() == {"b0": 0}

    with ScriptedBackend() as backend:
        run(check())


def test_a_stream_without_a_single_byte_is_a_bad_reply() -> None:
    """Nothing was shown to the caller yet, so it is tried again."""

    async def check() -> None:
        empty = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n\r\n"
        backend.script(empty)
        async with routed(table(backend.base_url)) as it:
            record = RequestRecord("POST", "/", "r", time.monotonic())
            streaming = read_request(Endpoint.CHAT, b'{"model":"m","messages":[],"stream":true}')
            exchange = await it.router.send(streaming, record)
            exchange.finish(time.monotonic(), "")
        assert record.retry_reasons == (("m", "bad-reply"),)
        assert record.attempts[0].outcome == "provider"

    with ScriptedBackend() as backend:
        run(check())


def test_least_loaded_adds_what_other_processes_have_in_flight() -> None:
    """Own requests are exact, those of the others are what they last said."""

    async def check() -> None:
        async with routed(table(one.base_url, two.base_url, strategy="least-loaded")) as it:

            async def choices(count: int) -> list[str]:
                return [(await it.ask()).attempts[0].backend for _ in range(count)]

            assert sorted(set(await choices(4))) == ["b0", "b1"]
            it.router.count_elsewhere({"b0": 1})
            assert await choices(4) == ["b1"] * 4
            it.router.update(it.router.table)
            assert await choices(4) == ["b1"] * 4
            it.router.count_elsewhere({"b1": 2})
            gate = Gate()
            one.script(Hold(gate), OK)
            held = asyncio.create_task(it.ask())
            await until(lambda: it.connections.in_use() == {"b0": 1, "b1": 0})
            assert await choices(2) == ["b0"] * 2
            it.router.count_elsewhere({})
            assert await choices(2) == ["b1"] * 2
            gate.open()
            await held

    with ScriptedBackend() as one, ScriptedBackend() as two:
        run(check())


def test_a_table_that_cannot_be_used_changes_nothing() -> None:
    """The router goes on with the one it has, and keeps no connection of the other."""

    async def check() -> None:
        async with routed(table(backend.base_url)) as it:
            await it.ask()
            bad = table(backend.base_url + "/other", "http://[::1/v1")
            with pytest.raises(ValueError, match="host or port"):
                it.router.update(bad)
            assert (await it.ask()).status == 200
            await it.connections.sweep(time.monotonic())
            assert len(backend.connections) == 1
            assert list(it.connections.in_use()) == ["b0"]

    with ScriptedBackend() as backend:
        run(check())


def test_errors_of_backends_are_backend_errors() -> None:
    """A backend whose authorities cannot be read fails alone, and says why."""

    async def check() -> None:
        async with routed(table("https://127.0.0.1:9/v1", tls_ca_file="/nowhere.pem")) as it:
            with pytest.raises(BackendError, match="tls_ca_file"):
                await it.ask()

    run(check())
