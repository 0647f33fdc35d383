"""A backend that fails too often is left alone, probed, and asked again: what callers see of it meanwhile."""

from __future__ import annotations

import json
import time

import pytest

from llm_router.routing.breaker import State
from llm_router.routing.table import BackendSpec, BreakerSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.testing import Close, Gate, Hold, ScriptedBackend, Stall, framed, json_reply, reply, stream_head
from support.chats import completion
from support.gateway import Gateway
from support.wait import until

BROKEN = json_reply({"error": {"message": "oops"}}, 500)
OK = reply(json.dumps(completion()).encode())
QUICK = BreakerSpec(min_attempts=4, window_s=10.0, cooldown_s=5.0, cooldown_max_s=60.0, probes=2)


def table(
    *backends: str,
    breaker: BreakerSpec = QUICK,
    fallback: str = "",
    attempts: int = 1,
    backend: BackendSpec | None = None,
) -> RoutingTable:
    """Model `m` on b0, b1… in turn; `spare` on the backend at `fallback`, if there is one, stands in for it."""
    specs = [BackendSpec(name=f"b{i}", url=url) for i, url in enumerate(backends)]
    if backend is not None:
        specs = [backend]
    models = [
        ModelSpec(
            name="m",
            deployments=tuple(Deployment(spec.name, "scripted") for spec in specs),
            fallbacks=("spare",) if fallback else (),
            strategy="round-robin",
        )
    ]
    if fallback:
        specs.append(BackendSpec(name="spare", url=fallback))
        models.append(ModelSpec(name="spare", deployments=(Deployment("spare", "scripted"),)))
    return RoutingTable(
        models=tuple(models),
        backends=tuple(specs),
        breaker=breaker,
        retry=RetrySpec(attempts=attempts, backoff_s=0.001, backoff_max_s=0.01),
    )


def test_a_circuit_opens_is_probed_and_closes() -> None:
    """While it is open the backend gets nothing, and callers are told at once when to come back."""
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(BROKEN)
        failed = [gateway.chat() for _ in range(4)]
        refused = gateway.chat()
        assert len(backend.requests) == 4
        gateway.clock.advance(5.0)
        assert gateway.router.circuits()["b0"][0] is State.HALF_OPEN
        backend.always(OK)
        probes = [gateway.chat() for _ in range(3)]
        records = gateway.records(8)
        assert gateway.router.circuits()["b0"] == (State.CLOSED, 0.0)
    assert [answer.status for answer in failed] == [500] * 4
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "circuit_open"
    assert 4 <= int(refused.headers["retry-after"]) <= 5
    assert "'m'" in refused.json()["error"]["message"]
    assert [answer.status for answer in probes] == [200] * 3
    assert gateway.circuits == [("b0", State.OPEN), ("b0", State.HALF_OPEN), ("b0", State.CLOSED)]
    assert (records[4].error_type, records[4].attempts) == ("circuit_open", [])


def test_a_probe_that_fails_opens_the_circuit_again_and_for_longer() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(BROKEN)
        for _ in range(4):
            gateway.chat()
        gateway.clock.advance(5.0)
        assert gateway.chat().status == 500
        refused = gateway.chat()
    assert refused.status == 503
    assert 9 <= int(refused.headers["retry-after"]) <= 10
    assert gateway.circuits == [("b0", State.OPEN), ("b0", State.HALF_OPEN), ("b0", State.OPEN)]


def test_retry_after_of_the_backend_is_kept_to() -> None:
    """It asked for 30 s: that is what callers are told, and it gets nothing before."""
    busy = json_reply({"error": {"message": "slow down"}}, 503, [("Retry-After", "30")])
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(busy)
        for _ in range(4):
            assert gateway.chat().headers["retry-after"] == "30"
        refused = gateway.chat()
        gateway.clock.advance(20.0)
        still = gateway.chat()
        gateway.clock.advance(10.0)
        backend.always(OK)
        assert gateway.chat().status == 200
    assert 29 <= int(refused.headers["retry-after"]) <= 30
    assert 9 <= int(still.headers["retry-after"]) <= 10
    assert len(backend.requests) == 5


DATE = ("Date", "Sun, 06 Nov 1994 08:49:37 GMT")


@pytest.mark.parametrize(
    ("said", "understood"),
    [
        ((("Retry-After", "Sun, 06 Nov 1994 08:50:07 GMT"), DATE), "30"),
        ((("Retry-After", "Sun, 06 Nov 1994 08:40:07 GMT"), DATE), "1"),
        ((("Retry-After", "2.5"),), "3"),
        ((("Retry-After", "-5"),), "1"),
        ((("Retry-After", "Sun, 06 Nov 1994 08:50:07 GMT"),), None),
        ((("Retry-After", "inf"),), None),
        ((("Retry-After", "nan"),), None),
        ((("Retry-After", "1e99"),), None),
        ((("Retry-After", "1700000000"),), None),
        ((("Retry-After", "soon"), DATE), None),
    ],
)
def test_whatever_a_backend_says_of_coming_back_is_understood_or_left_out(
    said: tuple[tuple[str, str], ...], understood: str | None
) -> None:
    """In an envelope of ours it is our header: whole seconds, or none."""
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(json_reply({"error": {"message": "slow down"}}, 429, said))
        answer = gateway.request("POST", "/api/generate", {"prompt": "hi"})
    assert answer.status == 429
    assert answer.headers.get("retry-after") == understood


def test_whoever_comes_back_when_told_is_let_through() -> None:
    """Retry-After is whole seconds: a rest of 1.4 s is 2, or the caller comes back in vain."""
    with (
        ScriptedBackend() as backend,
        Gateway(table(backend.base_url, breaker=BreakerSpec(min_attempts=1, cooldown_s=1.4))) as gateway,
    ):
        backend.script(BROKEN)
        gateway.chat()
        refused = gateway.chat()
        wait_s = int(refused.headers["retry-after"])
        said = refused.json()["error"]["message"]
        gateway.clock.advance(wait_s)
        assert gateway.chat().status == 200
    assert wait_s == 2
    assert "retry in 2 s" in said


def test_another_deployment_serves_while_one_is_left_alone() -> None:
    with (
        ScriptedBackend() as broken,
        ScriptedBackend() as sound,
        Gateway(table(broken.base_url, sound.base_url, attempts=2)) as gateway,
    ):
        broken.always(BROKEN)
        answers = [gateway.chat() for _ in range(20)]
        gateway.records(20)
    assert [answer.status for answer in answers] == [200] * 20
    assert len(broken.requests) == 4
    assert {answer.headers["x-llm-router-attempts"] for answer in answers[8:]} == {"1"}


def test_fallbacks_are_asked_before_anybody_is_refused() -> None:
    with (
        ScriptedBackend() as broken,
        ScriptedBackend() as spare,
        Gateway(table(broken.base_url, fallback=spare.base_url)) as gateway,
    ):
        broken.always(BROKEN)
        answers = [gateway.chat() for _ in range(6)]
        records = list(gateway.records(6))
        spare.always(BROKEN)
        refused = [gateway.chat() for _ in range(8)][-1]
    assert [answer.status for answer in answers] == [200] * 6
    assert {answer.headers["x-llm-router-model"] for answer in answers} == {"spare"}
    assert len(broken.requests) == 4
    assert [record.fallback_reasons for record in records] == [(("m", "server-error"),)] * 4 + [
        (("m", "circuit-open"),)
    ] * 2
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "circuit_open"


def test_faults_of_callers_open_nothing() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(json_reply({"error": {"message": "no such field"}}, 400))
        assert {gateway.chat().status for _ in range(8)} == {400}
        backend.always(Stall())
        asked = [gateway.ask_chat() for _ in range(8)]
        backend.wait(lambda server: len(server.requests) == 16)
        for one in asked:
            one.leave()
        gateway.records(16)
        backend.always(OK)
        assert gateway.chat().status == 200
    assert gateway.circuits == []


def test_streams_that_break_off_open_the_circuit() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(stream_head(), framed(b"data: {}\n\n"), Close())
        broken = [gateway.chat(stream=True) for _ in range(4)]
        refused = gateway.chat(stream=True)
    assert all(b"error" in answer.body and answer.status == 200 for answer in broken)
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "circuit_open"


def test_a_backend_that_is_slow_is_left_alone_too() -> None:
    """By the time to the first byte, also of those whose callers did not wait for it."""
    gate = Gate()
    slow = BreakerSpec(min_attempts=4, slow_s=0.05, slow_ratio=0.5, cooldown_s=5.0)
    with ScriptedBackend() as backend, Gateway(table(backend.base_url, breaker=slow)) as gateway:
        backend.always(Hold(gate), OK)
        asked = [gateway.ask_chat() for _ in range(4)]
        backend.wait(lambda server: len(server.requests) == 4)
        asked_at = max(request.time for request in backend.requests)
        until(lambda: time.monotonic() > asked_at + 0.06)
        asked[0].leave()
        gate.open()
        assert [one.answer().status for one in asked[1:]] == [200] * 3
        until(lambda: gateway.circuits == [("b0", State.OPEN)])
        assert gateway.chat().json()["error"]["code"] == "circuit_open"


def test_a_half_open_circuit_lets_only_its_probes_through() -> None:
    gate = Gate()
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(BROKEN)
        for _ in range(4):
            gateway.chat()
        gateway.clock.advance(5.0)
        backend.always(Hold(gate), OK)
        probes = [gateway.ask_chat() for _ in range(2)]
        backend.wait(lambda server: len(server.requests) == 6)
        refused = [gateway.chat() for _ in range(3)]
        gate.open()
        assert [probe.answer().status for probe in probes] == [200, 200]
        assert gateway.chat().status == 200
    assert [(answer.status, answer.headers["retry-after"]) for answer in refused] == [(503, "1")] * 3


def test_a_probe_whose_caller_leaves_makes_room_for_another() -> None:
    with (
        ScriptedBackend() as backend,
        Gateway(table(backend.base_url, breaker=BreakerSpec(min_attempts=1, probes=1))) as gateway,
    ):
        backend.script(BROKEN)
        gateway.chat()
        gateway.clock.advance(5.0)
        backend.script(Stall())
        probe = gateway.ask_chat()
        backend.wait(lambda server: len(server.requests) == 2)
        assert gateway.chat().status == 503
        probe.leave()
        gateway.records(3)
        assert gateway.chat().status == 200
        assert gateway.circuits[-1] == ("b0", State.CLOSED)


@pytest.mark.parametrize("stream", [False, True])
def test_a_circuit_that_opens_reaches_every_dialect(stream: bool) -> None:
    """The refusal has the form of the route that was asked."""
    with (
        ScriptedBackend() as backend,
        Gateway(table(backend.base_url, breaker=BreakerSpec(min_attempts=1))) as gateway,
    ):
        backend.script(BROKEN)
        gateway.chat()
        message = gateway.request(
            "POST", "/v1/messages", {"model": "m", "max_tokens": 9, "messages": [], "stream": stream}
        )
        generated = gateway.request("POST", "/api/generate", {"prompt": "hi"})
    assert message.status == generated.status == 503
    assert message.json()["type"] == "error"
    assert generated.json()["success"] is False
    assert message.headers["retry-after"] == generated.headers["retry-after"] == "5"
