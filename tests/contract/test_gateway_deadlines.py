"""The time that a request may take in all: attempts, waits and streams included."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import msgspec
import pytest

from llm_router.accounts.limits import Limits, Subject
from llm_router.cache.base import CacheSettings
from llm_router.routing.table import QueueSpec, RetrySpec, RoutingTable
from llm_router.testing import Gate, Hold, ScriptedBackend, Stall, framed, json_reply, reply, stream_head
from support.chats import completion
from support.gateway import Asked, Gateway, table
from support.wait import until

OK = reply(json.dumps(completion()).encode())
EVENT = framed(b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n')
SOON = {"x_llm_router_timeout": "150ms"}


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def bounded(routing: RoutingTable, deadline_s: float = 0.15) -> RoutingTable:
    return msgspec.structs.replace(routing, deadline_s=deadline_s)


@pytest.mark.parametrize("said", ["150ms", "0.15", "0.15s", " 150MS "])
def test_a_caller_says_how_long_it_waits(backend: ScriptedBackend, said: str) -> None:
    """Then it is 504, and the backend is told to stop."""
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(Stall())
        answer = gateway.chat(headers={"x_llm_router_timeout": said})
        record = gateway.record()
        backend.wait(lambda server: server.connections[0].closed_by == "client")
        assert gateway.chat(headers={"x_llm_router_timeout": "20s"}).status == 200
    assert answer.status == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert "0.15 s" in answer.json()["error"]["message"]
    assert (record.status, record.outcome, record.error_type) == (504, "error", "deadline")
    assert [attempt.outcome for attempt in record.attempts] == ["cancelled"]


def test_the_configuration_bounds_every_dialect(backend: ScriptedBackend) -> None:
    with Gateway(bounded(table(backend.base_url))) as gateway:
        backend.always(Stall())
        chat = gateway.chat()
        message = gateway.request("POST", "/v1/messages", {"model": "m", "max_tokens": 9, "messages": []})
        generated = gateway.request("POST", "/api/generate", {"prompt": "hi"})
        embedded = gateway.request("POST", "/v1/embeddings", {"model": "m", "input": "hi"})
    assert {answer.status for answer in (chat, message, generated, embedded)} == {504}
    assert message.json()["type"] == "error"
    assert generated.json()["success"] is False


def test_a_caller_may_ask_for_less_time_and_not_for_more(backend: ScriptedBackend) -> None:
    """The operator's bound holds for everybody."""
    with Gateway(bounded(table(backend.base_url), 0.2)) as gateway:
        backend.always(Stall())
        less = gateway.chat(headers=SOON)
        more = gateway.chat(headers={"x_llm_router_timeout": "3600s"})
    assert [answer.status for answer in (less, more)] == [504, 504]
    assert "0.15 s" in less.json()["error"]["message"]
    assert "0.2 s" in more.json()["error"]["message"]


@pytest.mark.parametrize("said", ["soon", "", "0", "-1s", "nan", "inf", "1e9", "5 minutes"])
def test_a_time_that_is_none_is_400(backend: ScriptedBackend, said: str) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        answer = gateway.chat(headers={"x_llm_router_timeout": said})
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "x-llm-router-timeout"
    assert "30s" in answer.json()["error"]["message"]
    assert not backend.requests


def test_a_stream_that_takes_too_long_ends_with_an_error_event(backend: ScriptedBackend) -> None:
    """What came until then is the client's; it is counted as an error, with the tokens that passed."""
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), EVENT, EVENT, Stall())
        answer = gateway.chat(stream=True, headers=SOON)
        record = gateway.record()
        backend.wait(lambda server: server.connections[0].closed_by == "client")
    *events, last, rest = answer.body.split(b"\n\n")
    assert answer.status == 200
    assert len(events) == 2
    assert rest == b""
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "deadline_exceeded"
    assert b"[DONE]" not in answer.body
    assert (record.status, record.outcome, record.error_type) == (200, "error", "deadline")
    assert (record.output_tokens, record.usage_source) == (2, "partial")
    assert [attempt.outcome for attempt in record.attempts] == ["cancelled"]


def test_a_stream_of_messages_that_takes_too_long_ends_with_an_event_of_its_dialect(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), EVENT, Stall())
        body = {"model": "m", "max_tokens": 9, "messages": [], "stream": True}
        answer = gateway.request("POST", "/v1/messages", body, **SOON)
        record = gateway.record()
    assert b"event: error\n" in answer.body
    assert b"message_stop" not in answer.body
    assert (record.outcome, record.error_type) == ("error", "deadline")


def test_a_stream_that_ends_in_time_is_not_touched(backend: ScriptedBackend) -> None:
    """Even if its backend leaves the connection open for longer than the request may take."""
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), EVENT, framed(b"data: [DONE]\n\n"), Stall())
        answer = gateway.chat(stream=True, headers=SOON)
        record = gateway.record()
        backend.wait(lambda server: server.connections[0].closed_by == "client")
        until(lambda: gateway.call(lambda: gateway.router._queues["m"].busy) == 0)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert b"error" not in answer.body
    assert (record.outcome, record.attempts[0].outcome) == ("success", "success")


def test_the_wait_for_a_slot_counts(backend: ScriptedBackend) -> None:
    """Who is too late while it waits leaves the queue, and no backend is asked."""
    with Gateway(table(backend.base_url, queue=QueueSpec(slots=1))) as gateway:
        gate = Gate()
        backend.script(Hold(gate), OK)
        busy = gateway.ask_chat()
        backend.wait(lambda server: len(server.requests) == 1)
        late = gateway.chat(headers=SOON)
        (record,) = gateway.recorder.finished
        assert gateway.call(lambda: gateway.router.waiting) == 0
        gate.open()
        assert busy.answer().status == 200
    assert late.status == 504
    assert (record.error_type, record.attempts, record.slot_at) == ("deadline", [], 0.0)
    assert len(backend.requests) == 1


def test_attempts_and_the_waits_between_them_count(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url, retry=RetrySpec(attempts=50, backoff_s=0.1, budget_min=50))) as gateway:
        backend.always(json_reply({"error": {"message": "oops"}}, 500))
        answer = gateway.chat(headers=SOON)
        record = gateway.record()
    assert answer.status == 504
    assert len(record.attempts) >= 1
    assert record.error_type == "deadline"


def test_whoever_waits_for_an_equal_request_waits_no_longer_than_it_may(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url), cache=CacheSettings()) as gateway:
        gate = Gate()
        backend.script(Hold(gate), OK)
        leader = gateway.ask_chat(temperature=0)
        backend.wait(lambda server: len(server.requests) == 1)
        late = gateway.chat(temperature=0, headers=SOON)
        gate.open()
        assert leader.answer().status == 200
    assert late.status == 504
    assert len(backend.requests) == 1


def test_a_request_that_was_too_late_gives_back_what_it_had_reserved(backend: ScriptedBackend) -> None:
    """Its place among those in flight is free again."""
    with Gateway(
        bounded(table(backend.base_url)), limits={Subject("global", ""): Limits(concurrency=1, requests_per_minute=100)}
    ) as gateway:
        backend.script(Stall())
        assert gateway.chat().status == 504
        answer = gateway.chat()
    assert answer.status == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "100"


def test_many_that_are_too_late_leave_nothing_behind(backend: ScriptedBackend) -> None:
    with (
        Gateway(bounded(table(backend.base_url, queue=QueueSpec(slots=3)))) as gateway,
        contextlib.ExitStack() as stack,
    ):
        backend.always(Stall())
        asked: list[Asked] = [gateway.ask_chat(stream=number % 2 == 0) for number in range(30)]
        for one in asked:
            stack.callback(one.leave)
        assert {one.answer().status for one in asked} == {504}
        gateway.records(30)
        queue = gateway.call(lambda: (gateway.router._queues["m"].busy, gateway.router.waiting))
        assert queue == (0, 0)
        backend.always(OK)
        assert gateway.chat().status == 200
