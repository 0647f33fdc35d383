"""Waiting for a model: who is let in, who is refused and with what, who is next; what callers see of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec, RetrySpec, RoutingTable
from llm_router.testing import Gate, Hold, ScriptedBackend, Stall, reply
from support.chats import completion
from support.gateway import Asked, Gateway
from support.wait import until

OK = reply(json.dumps(completion()).encode())
ALICE, BOB = "sk-alice", "sk-bob"


def table(
    *backends: str,
    slots: int = 1,
    max_waiting: int = 100,
    wait_s: float = 20.0,
    in_all: int = 1000,
    spare: bool = False,
) -> RoutingTable:
    """Models m0, m1… on a backend each; with `spare` each falls back to the next."""
    queue = QueueSpec(slots=slots, max_waiting=max_waiting, wait_s=wait_s)
    return RoutingTable(
        models=tuple(
            ModelSpec(
                name=f"m{i}",
                deployments=(Deployment(f"b{i}", "scripted"),),
                queue=queue,
                fallbacks=(f"m{i + 1}",) if spare and i + 1 < len(backends) else (),
            )
            for i in range(len(backends))
        ),
        backends=tuple(BackendSpec(name=f"b{i}", url=url) for i, url in enumerate(backends)),
        retry=RetrySpec(attempts=1),
        max_waiting=in_all,
    )


class Held:
    """A gateway whose backend answers nobody until `gate` is open."""

    def __init__(self, gateway: Gateway, backend: ScriptedBackend) -> None:
        self.gate = Gate()
        self.gateway = gateway
        self.backend = backend
        self.asked: list[Asked] = []
        backend.always(Hold(self.gate), OK)

    def busy(self, count: int = 1, model: str = "m0") -> list[Asked]:
        """Requests that have a slot."""
        before = len(self.backend.requests)
        asked = [self.gateway.ask_chat(model) for _ in range(count)]
        self.backend.wait(lambda server: len(server.requests) == before + count)
        self.asked += asked
        return asked

    def waiting(self, count: int, model: str = "m0") -> None:
        """Until so many wait."""
        until(lambda: self.gateway.call(lambda: self.gateway.router.queues()[model]) == count, what=f"{count} waiting")

    def waits(self, model: str = "m0", user: str = "", **headers: str) -> Asked:
        """A request that waits."""
        before = self.gateway.call(lambda: self.gateway.router.queues()[model])
        asked = self.gateway.ask_chat(model, headers=headers, user=user)
        self.waiting(before + 1, model)
        return asked

    def served(self) -> list[str]:
        """Whose requests the backend got, in order."""
        return [request.json()["user"] for request in self.backend.requests if "user" in request.json()]


@contextlib.contextmanager
def held(routing: RoutingTable, backend: ScriptedBackend, **options: object) -> Iterator[Held]:
    with Gateway(routing, **options) as gateway:  # type: ignore[arg-type]
        made = Held(gateway, backend)
        yield made
        made.gate.open()
        for asked in made.asked:
            asked.leave()
        until(lambda: gateway.recorder.in_flight == 0)
        left = gateway.call(lambda: [(queue.busy, queue.waiting) for queue in gateway.router._queues.values()])
        assert set(left) == {(0, 0)}


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def test_whoever_finds_no_place_is_429_and_told_when_to_come_back(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url, max_waiting=2), backend) as line:
        asked = [*line.busy(), line.waits(), line.waits()]
        refused = line.gateway.chat("m0")
        line.gate.open()
        answers = [one.answer() for one in asked]
        records = line.gateway.records(4)
    assert refused.status == 429
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert "'m0'" in error["message"]
    assert "queue.max_waiting" in error["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status for answer in answers] == [200] * 3
    assert records[0].error_type == "queue_full"
    assert len(backend.requests) == 3


def test_whoever_waited_for_as_long_as_it_may_is_408(backend: ScriptedBackend) -> None:
    """The wait counts from when the request came to the queue; nothing was asked of a backend."""
    with held(table(backend.base_url, wait_s=20.0), backend) as line:
        busy = line.busy()
        waiting = line.waits()
        line.gateway.clock.advance(19.0)
        assert line.gateway.call(lambda: line.gateway.router.waiting) == 1
        line.gateway.clock.advance(1.0)
        late = waiting.answer()
        line.waiting(0)
        line.gate.open()
        assert busy[0].answer().status == 200
        record = line.gateway.records(2)[0]
    assert late.status == 408
    assert late.json()["error"]["code"] == "queue_timeout"
    assert "20 s" in late.json()["error"]["message"]
    assert int(late.headers["retry-after"]) >= 1
    assert late.headers["x-llm-router-attempts"] == "0"
    assert (record.error_type, record.slot_at, record.attempts) == ("queue_timeout", 0.0, [])
    assert record.queued_at > 0


def test_the_refusals_have_the_form_of_their_route(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url, max_waiting=0), backend) as line:
        line.busy()
        message = line.gateway.request("POST", "/v1/messages", {"model": "m0", "max_tokens": 9, "messages": []})
        generated = line.gateway.request("POST", "/api/generate", {"prompt": "hi", "options": {"model": "m0"}})
    assert message.status == generated.status == 429
    assert message.json()["error"]["type"] == "rate_limit_error"
    assert generated.json()["success"] is False


def test_more_waiting_in_all_queues_than_may_is_503(backend: ScriptedBackend) -> None:
    """Each queue has room, but the router as a whole has not."""
    with held(table(backend.base_url, backend.base_url, in_all=2), backend) as line:
        asked = [*line.busy(), *line.busy(model="m1"), line.waits(), line.waits("m1")]
        refused = line.gateway.chat("m0")
        line.gate.open()
        assert [one.answer().status for one in asked] == [200] * 4
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert "routing.max_waiting" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


def test_a_late_loop_takes_nothing_new(backend: ScriptedBackend) -> None:
    """What is in flight goes on; the probes of the process do too."""
    with held(table(backend.base_url), backend) as line:
        busy = line.busy()
        gateway = line.gateway
        gateway.call(lambda: gateway.core.is_late(1.7))
        refused = [
            gateway.chat("m0"),
            gateway.request("POST", "/v1/messages", {"model": "m0", "max_tokens": 9, "messages": []}),
        ]
        assert gateway.request("GET", "/health/live").status == 200
        gateway.call(lambda: gateway.core.is_late(0.0))
        waiting = line.waits()
        line.gate.open()
        assert [one.answer().status for one in (*busy, waiting)] == [200, 200]
        records = gateway.records(5)
    for answer in refused:
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert "1.7 s" in answer.json()["error"]["message"]
    assert [record.error_type for record in records[:2]] == ["shed"] * 2


def test_a_client_that_leaves_frees_its_place_at_once(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url, max_waiting=1), backend) as line:
        busy = line.busy()
        line.waits(user="gone").leave()
        line.waiting(0)
        waiting = line.waits(user="stays")
        line.gate.open()
        assert [one.answer().status for one in (*busy, waiting)] == [200, 200]
        records = line.gateway.records(3)
    assert line.served() == ["stays"]
    assert [(record.status, record.outcome) for record in records if record.outcome != "success"] == [
        (499, "cancelled")
    ]


def test_a_client_that_leaves_while_it_is_served_gives_its_slot_on(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(Stall())
        first = gateway.ask_chat("m0")
        backend.wait(lambda server: len(server.requests) == 1)
        second = gateway.ask_chat("m0")
        until(lambda: gateway.call(lambda: gateway.router.waiting) == 1)
        first.leave()
        assert second.answer().status == 200
        assert gateway.call(lambda: gateway.router.waiting) == 0


def test_interactive_goes_before_batch_but_does_not_starve_it(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url), backend) as line:
        busy = line.busy()
        asked = [line.waits(user="batch", x_llm_router_priority="batch") for _ in range(2)]
        asked += [line.waits(user="interactive", x_llm_router_priority="Interactive") for _ in range(2)]
        asked += [line.waits(user="interactive") for _ in range(8)]
        line.gate.open()
        assert [one.answer().status for one in (*busy, *asked)] == [200] * 13
    served = line.served()
    assert served[:7] == ["interactive"] * 7
    assert served[7] == "batch"
    assert served[8:] == ["interactive"] * 3 + ["batch"]


def test_a_priority_that_there_is_not_is_400(backend: ScriptedBackend) -> None:
    with Gateway(table(backend.base_url)) as gateway:
        answer = gateway.chat("m0", headers={"x_llm_router_priority": "urgent"})
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "x-llm-router-priority"
    assert "interactive or batch" in answer.json()["error"]["message"]


def test_keys_take_turns(backend: ScriptedBackend) -> None:
    """Whoever sends many requests delays those of another key by one each."""
    with held(table(backend.base_url), backend, keys={ALICE: "alice", BOB: "bob"}) as line:
        first = line.gateway.ask_chat("m0", headers={"authorization": f"Bearer {ALICE}"})
        line.backend.wait(lambda server: len(server.requests) == 1)
        asked = [line.waits(user="alice", authorization=f"Bearer {ALICE}") for _ in range(6)]
        asked += [line.waits(user="bob", x_api_key=BOB) for _ in range(2)]
        line.gate.open()
        assert [one.answer().status for one in (first, *asked)] == [200] * 9
        records = line.gateway.records(9)
    assert line.served() == ["alice", "bob", "alice", "bob", "alice", "alice", "alice", "alice"]
    assert {record.key for record in records} == {"alice", "bob"}


def test_fallbacks_take_whom_a_full_queue_refuses(backend: ScriptedBackend) -> None:
    with (
        ScriptedBackend() as other,
        held(table(backend.base_url, other.base_url, max_waiting=0, spare=True), backend) as line,
    ):
        line.busy()
        answer = line.gateway.chat("m0")
        line.gate.open()
        record = line.gateway.records(2)[0]
    assert answer.status == 200
    assert answer.headers["x-llm-router-model"] == "m1"
    assert record.fallback_reasons == (("m0", "queue-full"),)


def test_a_stream_keeps_its_slot_until_its_end(backend: ScriptedBackend) -> None:
    gate = Gate()
    with Gateway(table(backend.base_url)) as gateway:
        backend.script(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n", Stall())
        stream = gateway.ask_chat("m0", stream=True)
        backend.wait(lambda server: len(server.requests) == 1)
        backend.script(Hold(gate), OK)
        waiting = gateway.ask_chat("m0")
        until(lambda: gateway.call(lambda: gateway.router.waiting) == 1)
        assert len(backend.requests) == 1
        gate.open()
        stream.leave()
        assert waiting.answer().status == 200


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_divide_the_bounds(backend: ScriptedBackend, workers: int) -> None:
    """Rounded up: of four slots and two places, two workers get two and one each, three get two and one."""
    slots, places = {1: (4, 2), 2: (2, 1), 3: (2, 1)}[workers]
    with held(table(backend.base_url, slots=4, max_waiting=2), backend, workers=workers) as line:
        asked = line.busy(slots)
        asked += [line.waits() for _ in range(places)]
        assert line.gateway.chat("m0").status == 429
        line.gate.open()
        assert {one.answer().status for one in asked} == {200}


def test_a_model_that_leaves_the_table_sends_its_waiting_home(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url, backend.base_url), backend) as line:
        busy = line.busy(model="m1")
        waiting = line.waits("m1")
        line.gateway.follow(table(backend.base_url))
        gone = waiting.answer()
        line.gate.open()
        assert busy[0].answer().status == 200
    assert gone.status == 404
    assert gone.json()["error"]["code"] == "model_not_found"


def test_more_slots_of_a_newer_table_are_used_at_once(backend: ScriptedBackend) -> None:
    with held(table(backend.base_url), backend) as line:
        busy = line.busy()
        waiting = [line.waits() for _ in range(3)]
        line.gateway.follow(table(backend.base_url, slots=3))
        line.backend.wait(lambda server: len(server.requests) == 3)
        line.waiting(1)
        line.gate.open()
        assert [one.answer().status for one in (*busy, *waiting)] == [200] * 4
