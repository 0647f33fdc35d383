"""Answers that are kept: who gets one, who does not, and what is counted; with memory, and with a Redis that goes away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from llm_router.accounts.keys import KeySpec, digest_of
from llm_router.accounts.limits import Limits, Subject
from llm_router.cache.base import CacheSettings
from llm_router.models.prices import Price
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.testing import Close, Gate, Hold, ScriptedBackend, Stall, framed, json_reply, reply, stream_head
from support import anthropic
from support.ask import Answer
from support.chats import completion, stream
from support.gateway import Gateway, table
from support.redis import RedisServer
from support.wait import until

MEMORY = CacheSettings()
OK = reply(json.dumps(completion()).encode())
EVENT = framed(b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n')
MESSAGE: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "temperature": 0,
    "messages": [{"role": "user", "content": "x"}],
}


MESSAGE_STREAM = anthropic.stream(anthropic.message(anthropic.text()))


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
def gateway(backend: ScriptedBackend) -> Iterator[Gateway]:
    with Gateway(table(backend.base_url), cache=MEMORY) as gateway:
        yield gateway


def is_cached(answer: Answer) -> bool:
    assert answer.status == 200, answer.body
    said = answer.headers.get("x-llm-router-cached")
    assert said in {None, "true"}
    return said == "true"


def numbered(backend: ScriptedBackend, *numbers: int) -> None:
    """The next answers say these numbers."""
    for number in numbers:
        backend.script(json_reply(completion(f"number {number}")))


def test_the_same_question_at_temperature_0_is_answered_from_memory(backend: ScriptedBackend, gateway: Gateway) -> None:
    numbered(backend, 1)
    first = gateway.chat(temperature=0)
    second = gateway.chat(temperature=0.0)
    assert (first.status, is_cached(first)) == (200, False)
    third = gateway.chat(temperature=0)
    assert (is_cached(second), is_cached(third)) == (False, True)
    assert third.body == first.body != second.body
    assert third.headers["content-type"] == "application/json"
    assert third.headers["x-llm-router-attempts"] == "0"
    assert len(backend.requests) == 2


def test_a_cached_answer_counts_as_such_and_costs_nothing(backend: ScriptedBackend) -> None:
    routing = table(backend.base_url)
    deployment = Deployment("b0", "scripted", price=Price(input=1.0, output=1.0))
    routing = msgspec.structs.replace(routing, models=(ModelSpec(name="m", deployments=(deployment,)),))
    with Gateway(routing, cache=MEMORY) as gateway:
        for _ in range(2):
            gateway.chat(temperature=0)
        gateway.chat()
        asked, cached, other = gateway.records(3)
    assert (asked.cached, asked.cache_type) == (False, "response")
    assert asked.cost_usd > 0
    assert (cached.cached, cached.cache_type, cached.status, cached.outcome) == (True, "response", 200, "success")
    assert (cached.model, cached.strategy) == (asked.model, asked.strategy)
    assert (cached.input_tokens, cached.output_tokens, cached.usage_source) == (0, 0, "none")
    assert (cached.cost_usd, cached.cost_status, cached.attempts, cached.queued_at) == (0.0, "", [], 0.0)
    assert (other.cached, other.cache_type) == (False, "")


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7}, {"temperature": None}, {"temperature": False}])
def test_other_questions_are_cached_only_when_the_caller_asks(
    backend: ScriptedBackend, gateway: Gateway, fields: dict[str, Any]
) -> None:
    on = {"x_llm_router_cache": "on"}
    assert [is_cached(gateway.chat(**fields)) for _ in range(2)] == [False, False]
    assert [is_cached(gateway.chat(headers=on, **fields)) for _ in range(3)] == [False, True, True]
    assert not is_cached(gateway.chat(**fields)), "another caller does not get it unasked"
    assert len(backend.requests) == 4


@pytest.mark.parametrize(
    "headers", [{"x_llm_router_cache": "off"}, {"cache_control": "no-store"}, {"cache_control": "private, No-Store"}]
)
def test_who_wants_no_cache_neither_gets_nor_leaves_an_answer(
    backend: ScriptedBackend, gateway: Gateway, headers: dict[str, str]
) -> None:
    numbered(backend, 1, 2, 3)
    secret = gateway.chat(temperature=0, headers=headers)
    first = gateway.chat(temperature=0)
    again = gateway.chat(temperature=0, headers=headers)
    kept = gateway.chat(temperature=0)
    assert [is_cached(answer) for answer in (secret, first, again, kept)] == [False, False, False, True]
    assert kept.body == first.body
    assert [record.cache_type for record in gateway.records(4)] == ["", "response", "", "response"]


@pytest.mark.parametrize(
    "headers", [{"x_llm_router_cache": "refresh"}, {"cache_control": "no-cache"}, {"cache_control": "max-age=0"}]
)
def test_who_wants_a_fresh_answer_leaves_it_for_the_others(
    backend: ScriptedBackend, gateway: Gateway, headers: dict[str, str]
) -> None:
    numbered(backend, 1, 2)
    first = gateway.chat(temperature=0)
    fresh = gateway.chat(temperature=0, headers=headers)
    kept = gateway.chat(temperature=0)
    assert [is_cached(answer) for answer in (first, fresh, kept)] == [False, False, True]
    assert kept.body == fresh.body != first.body


def test_a_wish_that_is_none_is_400(backend: ScriptedBackend, gateway: Gateway) -> None:
    answer = gateway.chat(headers={"x_llm_router_cache": "always"})
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "x-llm-router-cache"
    assert "on, off or refresh" in answer.json()["error"]["message"]


# -- every dialect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_replayed_as_a_stream_byte_for_byte(
    backend: ScriptedBackend, gateway: Gateway, usage: bool
) -> None:
    """With the usage event for whom asked for it; plain callers have an answer of their own."""
    backend.always(stream_head(), *(framed(part) for part in _split(stream(completion()))), framed(b""))
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    first = gateway.chat(temperature=0, stream=True, **options)
    second = gateway.chat(temperature=0, stream=True, **options)
    assert (is_cached(first), is_cached(second)) == (False, True)
    assert second.body == first.body
    assert second.body.endswith(b"data: [DONE]\n\n")
    assert (b"prompt_tokens" in second.body) is usage
    assert second.headers["content-type"].startswith("text/event-stream")
    assert len(backend.requests) == 1
    backend.always(OK)
    assert not is_cached(gateway.chat(temperature=0))


def _split(data: bytes, size: int = 50) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "hi", "temperature": 0}),
        ("/v1/completions", {"model": "m", "prompt": "hi", "temperature": 0, "stream": True}),
        ("/v1/embeddings", {"model": "m", "input": "hi"}),
        ("/v1/messages", MESSAGE),
        ("/v1/messages", {**MESSAGE, "stream": True}),
    ],
)
def test_every_inference_endpoint_is_cached(
    backend: ScriptedBackend, gateway: Gateway, path: str, body: dict[str, Any]
) -> None:
    if path == "/v1/messages" and "stream" not in body:
        backend.always(OK)
    first, second = (gateway.request("POST", path, body) for _ in range(2))
    assert (is_cached(first), is_cached(second)) == (False, True)
    assert second.body == first.body
    assert second.headers["content-type"] == first.headers["content-type"]
    assert len(backend.requests) == 1


def test_a_native_stream_of_messages_is_replayed(backend: ScriptedBackend) -> None:
    routing = table(backend.base_url, protocol="anthropic")
    backend.always(stream_head(), framed(MESSAGE_STREAM), framed(b""))
    with Gateway(routing, cache=MEMORY) as gateway:
        first, second = (gateway.request("POST", "/v1/messages", {**MESSAGE, "stream": True}) for _ in range(2))
    assert (is_cached(first), is_cached(second)) == (False, True)
    assert first.body == second.body == MESSAGE_STREAM


def test_generate_says_that_its_answer_was_cached(backend: ScriptedBackend, gateway: Gateway) -> None:
    body = {"prompt": "hi", "options": {"temperature": 0}}
    first, second = (gateway.request("POST", "/api/generate", body) for _ in range(2))
    assert (is_cached(first), is_cached(second)) == (False, True)
    said, again = first.json()["data"], second.json()["data"]
    assert (said["cached"], again["cached"]) == (False, True)
    assert again["text"] == said["text"]
    assert again["usage"] == said["usage"]
    assert second.json()["metadata"]["request_id"] == second.headers["x-request-id"]
    assert len(backend.requests) == 1


# -- single flight ---------------------------------------------------------------------------------------


def test_of_a_hundred_equal_requests_one_asks_the_backend(backend: ScriptedBackend, gateway: Gateway) -> None:
    gate = Gate()
    backend.script(Hold(gate), OK)
    asked = [gateway.ask_chat(temperature=0) for _ in range(100)]
    until(lambda: gateway.recorder.in_flight == 100)
    gate.open()
    answers = [one.answer() for one in asked]
    assert sum(is_cached(answer) for answer in answers) == 99
    assert len({answer.body for answer in answers}) == 1
    assert len(backend.requests) == 1
    assert sum(record.cached for record in gateway.records(100)) == 99


def test_if_the_one_that_asks_leaves_another_one_asks(backend: ScriptedBackend, gateway: Gateway) -> None:
    gate = Gate()
    backend.script(Stall())
    backend.script(Hold(gate), OK)
    leader = gateway.ask_chat(temperature=0)
    backend.wait(lambda server: len(server.requests) == 1)
    others = [gateway.ask_chat(temperature=0) for _ in range(5)]
    until(lambda: gateway.recorder.in_flight == 6)
    leader.leave()
    backend.wait(lambda server: len(server.requests) == 2)
    gate.open()
    answers = [one.answer() for one in others]
    assert sum(is_cached(answer) for answer in answers) == 4
    assert len(backend.requests) == 2


def test_one_that_waits_may_leave(backend: ScriptedBackend, gateway: Gateway) -> None:
    gate = Gate()
    backend.script(Hold(gate), OK)
    leader = gateway.ask_chat(temperature=0)
    backend.wait(lambda server: len(server.requests) == 1)
    waiting = [gateway.ask_chat(temperature=0) for _ in range(2)]
    until(lambda: gateway.recorder.in_flight == 3)
    waiting[0].leave()
    until(lambda: gateway.recorder.in_flight == 2)
    gate.open()
    assert not is_cached(leader.answer())
    assert is_cached(waiting[1].answer())


def test_a_refusal_is_everybodys_own(backend: ScriptedBackend, gateway: Gateway) -> None:
    """An equal request is asked for each caller: what a backend refuses is no answer."""
    gate = Gate()
    backend.always(Hold(gate), json_reply({"error": {"message": "no"}}, 400))
    asked = [gateway.ask_chat(temperature=0) for _ in range(5)]
    until(lambda: gateway.recorder.in_flight == 5)
    gate.open()
    assert [one.answer().status for one in asked] == [400] * 5
    assert len(backend.requests) == 5


def test_streams_do_not_wait_for_each_other(backend: ScriptedBackend, gateway: Gateway) -> None:
    """Whoever streams wants the first words soon, and another's stream may be slow."""
    gate = Gate()
    backend.script(stream_head(), EVENT, Hold(gate), framed(b"data: [DONE]\n\n"), framed(b""))
    slow = gateway.ask_chat(temperature=0, stream=True)
    backend.wait(lambda server: len(server.requests) == 1)
    quick = gateway.chat(temperature=0, stream=True)
    assert not is_cached(quick)
    gate.open()
    assert slow.answer().body.endswith(b"data: [DONE]\n\n")


# -- what is not kept ------------------------------------------------------------------------------------


def test_errors_are_not_kept(backend: ScriptedBackend, gateway: Gateway) -> None:
    for status in (400, 429, 422):
        backend.script(json_reply({"error": {"message": "oops"}}, status))
        assert gateway.chat(temperature=0).status == status
    assert [is_cached(gateway.chat(temperature=0)) for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    "steps",
    [
        (stream_head(), EVENT, Close()),
        (stream_head(), EVENT, framed(b"")),
        (stream_head(), EVENT, framed(b'data: {"error":{"message":"oops"}}\n\n'), framed(b"")),
        (stream_head(), EVENT, framed(b'data: {"error":{"message":"oops"}}\n\ndata: [DONE]\n\n'), framed(b"")),
    ],
    ids=["cut", "no end mark", "error", "error and end mark"],
)
def test_streams_that_went_wrong_are_not_kept(
    backend: ScriptedBackend, gateway: Gateway, steps: tuple[Any, ...]
) -> None:
    backend.script(*steps)
    gateway.chat(temperature=0, stream=True)
    assert not is_cached(gateway.chat(temperature=0, stream=True))


def test_a_native_stream_that_ends_with_an_error_is_not_kept(backend: ScriptedBackend) -> None:
    error = anthropic.event(anthropic.error("overloaded_error"))
    start = MESSAGE_STREAM.partition(b"event: content_block_start")[0]
    backend.script(stream_head(), framed(start + error), framed(b""))
    backend.always(stream_head(), framed(MESSAGE_STREAM), framed(b""))
    with Gateway(table(backend.base_url, protocol="anthropic"), cache=MEMORY) as gateway:
        answers = [gateway.request("POST", "/v1/messages", {**MESSAGE, "stream": True}) for _ in range(3)]
    assert [is_cached(answer) for answer in answers] == [False, False, True]


def test_a_stream_whose_reader_leaves_is_not_kept(backend: ScriptedBackend, gateway: Gateway) -> None:
    backend.script(stream_head(), EVENT, Stall())
    asked = gateway.ask_chat(temperature=0, stream=True)
    backend.wait(lambda server: len(server.requests) == 1)
    asked.leave()
    gateway.records(1)
    assert not is_cached(gateway.chat(temperature=0, stream=True))


def test_what_a_fallback_answered_is_not_kept(backend: ScriptedBackend) -> None:
    """Next time the model that was asked for may answer; whoever waited meanwhile asks too."""
    with ScriptedBackend() as broken:
        broken.always(json_reply({"error": {"message": "oops"}}, 500))
        models = (
            ModelSpec(name="m", deployments=(Deployment("broken", "scripted"),), fallbacks=("spare",)),
            ModelSpec(name="spare", deployments=(Deployment("spare", "scripted"),)),
        )
        backends = (BackendSpec(name="broken", url=broken.base_url), BackendSpec(name="spare", url=backend.base_url))
        routing = RoutingTable(models=models, backends=backends, retry=RetrySpec(attempts=1))
        with Gateway(routing, cache=MEMORY) as gateway:
            for streams in (False, True):
                answers = [gateway.chat(temperature=0, stream=streams) for _ in range(2)]
                assert [is_cached(answer) for answer in answers] == [False, False]
                assert {answer.headers["x-llm-router-model"] for answer in answers} == {"spare"}
            assert [is_cached(gateway.chat("spare", temperature=0)) for _ in range(2)] == [False, True]
            broken.always(OK)
            answers = [gateway.chat(temperature=0) for _ in range(2)]
    assert [(is_cached(answer), answer.headers["x-llm-router-model"]) for answer in answers] == [
        (False, "m"),
        (True, "m"),
    ]


def test_what_is_larger_than_an_entry_may_be_is_not_kept(backend: ScriptedBackend) -> None:
    backend.always(json_reply(completion("x" * 2000)))
    with Gateway(table(backend.base_url), cache=CacheSettings(max_entry_bytes=1000)) as gateway:
        assert [is_cached(gateway.chat(temperature=0)) for _ in range(2)] == [False, False]
        backend.always(stream_head(), framed(stream(completion("x" * 2000))), framed(b""))
        assert [is_cached(gateway.chat(temperature=0, stream=True)) for _ in range(2)] == [False, False]


def test_an_answer_is_kept_for_so_long(gateway: Gateway) -> None:
    assert [is_cached(gateway.chat(temperature=0)) for _ in range(2)] == [False, True]
    gateway.clock.advance(MEMORY.ttl_s + 1)
    assert not is_cached(gateway.chat(temperature=0))


def test_what_served_the_model_before_answers_no_more(backend: ScriptedBackend, gateway: Gateway) -> None:
    """Other prices or limits change nothing; another name at the backend does."""
    assert [is_cached(gateway.chat(temperature=0)) for _ in range(2)] == [False, True]
    gateway.follow(table(backend.base_url, first_byte_s=10.0))
    assert is_cached(gateway.chat(temperature=0))
    gateway.follow(table(backend.base_url, upstream_model="scripted"))
    assert is_cached(gateway.chat(temperature=0))
    gateway.follow(table(backend.base_url, upstream_model="another"))
    assert not is_cached(gateway.chat(temperature=0))


# -- keys and limits -------------------------------------------------------------------------------------


def test_keys_share_answers_unless_each_is_to_have_its_own(backend: ScriptedBackend) -> None:
    keys = {"sk-a": "alice", "sk-b": "bob"}
    for settings, shared in ((MEMORY, True), (CacheSettings(per_key=True), False)):
        with Gateway(table(backend.base_url), keys=keys, cache=settings) as gateway:
            answers = [gateway.chat(temperature=0, headers={"x_api_key": key}) for key in ("sk-a", "sk-b", "sk-a")]
        assert [is_cached(answer) for answer in answers] == [False, shared, True]


def test_a_key_that_takes_over_a_name_does_not_take_over_the_answers(backend: ScriptedBackend) -> None:
    """`bob` was revoked, and somebody else is called so now."""
    keys = [KeySpec(id=f"key-{text}", name="bob", digest=digest_of(text)) for text in ("sk-old", "sk-new")]
    with Gateway(table(backend.base_url), keys=keys, cache=CacheSettings(per_key=True)) as gateway:
        answers = [gateway.chat(temperature=0, headers={"x_api_key": key}) for key in ("sk-old", "sk-new")]
    assert [is_cached(answer) for answer in answers] == [False, False]


def test_who_may_not_ask_a_model_does_not_get_its_answers(backend: ScriptedBackend) -> None:
    keys = [
        KeySpec(id="key-1", name="alice", digest=digest_of("sk-a")),
        KeySpec(id="key-2", name="bob", digest=digest_of("sk-b"), models=("other",)),
    ]
    with Gateway(table(backend.base_url), keys=keys, cache=MEMORY) as gateway:
        assert gateway.chat(temperature=0, headers={"x_api_key": "sk-a"}).status == 200
        assert gateway.chat(temperature=0, headers={"x_api_key": "sk-b"}).status == 403
        assert gateway.chat(temperature=0).status == 401


def test_cached_answers_count_against_limits_of_requests_but_not_of_tokens(backend: ScriptedBackend) -> None:
    limits = {Subject("global", ""): Limits(requests_per_minute=100, tokens_per_minute=10_000)}
    with Gateway(table(backend.base_url), limits=limits, cache=MEMORY) as gateway:
        answers = [gateway.chat(temperature=0) for _ in range(4)]
        gateway.records(4)
        last = gateway.chat(temperature=0)
    assert [is_cached(answer) for answer in answers] == [False, True, True, True]
    left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in (*answers, last)]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == 5
    tokens = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in (answers[2], last)]
    assert abs(tokens[0] - tokens[1]) <= 1


# -- Redis -----------------------------------------------------------------------------------------------


def test_routers_share_a_redis_and_go_on_without_it(backend: ScriptedBackend) -> None:
    """When it is killed every request is answered, it is told once, and when it is back it is used again."""
    routing = table(backend.base_url)
    with RedisServer() as redis:
        settings = CacheSettings(url=redis.url)
        with Gateway(routing, cache=settings) as first, Gateway(routing, cache=settings) as second:
            assert not is_cached(first.chat(temperature=0))
            until(lambda: is_cached(second.chat(temperature=0)))
            assert second.recorder.finished[-1].cache_type == "redis"
            backend.script(stream_head(), framed(stream(completion())), framed(b""))
            streamed = first.chat(temperature=0, stream=True)
            cache = first.cache
            assert cache is not None
            # Written in the background: a second answer before that would take its place.
            until(lambda: first.call(cache.statistics).entries == 0)
            (replayed,) = until(lambda: _if_cached(second.chat(temperature=0, stream=True)))
            assert replayed.body == streamed.body
            redis.kill()
            answers = [gateway.chat(temperature=0) for gateway in (first, second) for _ in range(3)]
            assert [is_cached(answer) for answer in answers] == [False] * 6
            assert [len(gateway.cache_problems) for gateway in (first, second)] == [1, 1]
            assert "does not answer" in first.cache_problems[0]
            redis.start()
            until(lambda: is_cached(first.chat(temperature=0)))
            until(lambda: is_cached(second.chat(temperature=0)))
            assert [len(gateway.cache_problems) for gateway in (first, second)] == [1, 1]


def _if_cached(answer: Answer) -> list[Answer]:
    return [answer] if is_cached(answer) else []


def test_single_flight_holds_with_redis_too(backend: ScriptedBackend) -> None:
    gate = Gate()
    with RedisServer() as redis, Gateway(table(backend.base_url), cache=CacheSettings(url=redis.url)) as gateway:
        backend.script(Hold(gate), OK)
        asked = [gateway.ask_chat(temperature=0) for _ in range(100)]
        until(lambda: gateway.recorder.in_flight == 100)
        backend.wait(lambda server: len(server.requests) == 1)
        gateway.call(lambda: None)
        gate.open()
        answers = [one.answer() for one in asked]
    assert sum(is_cached(answer) for answer in answers) == 99
    assert len(backend.requests) == 1


def test_a_redis_that_hangs_delays_few_requests_and_fails_none(backend: ScriptedBackend) -> None:
    with RedisServer() as redis, Gateway(table(backend.base_url), cache=CacheSettings(url=redis.url)) as gateway:
        until(lambda: is_cached(gateway.chat(temperature=0)))
        redis.freeze()
        assert [gateway.chat(temperature=0, seed=number).status for number in range(10)] == [200] * 10
        assert len(gateway.cache_problems) == 1
        redis.thaw()
        until(lambda: is_cached(gateway.chat(temperature=0)))
