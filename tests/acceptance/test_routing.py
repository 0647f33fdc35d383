"""Strategies, circuits, queues and the cache in the running program: what several workers make of them, and its metrics.

One program with two workers serves the tests of this file; each has models of its own, so that counters are its own too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import genai_prices
import pytest

from llm_router import LLMRouter
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import RoutingSettings
from llm_router.errors import BackendError, DeadlineExceeded, InvalidRequest
from llm_router.gateway.asgi import AsgiFront
from llm_router.routing.policies import ENTRY_POINTS
from llm_router.routing.table import STRATEGIES, BackendSpec, Deployment
from llm_router.testing import Gate, Hold, ScriptedBackend, Stall, framed, json_reply, stream_head
from support.aio import run
from support.aio import until as until_async
from support.callers import Reply, chat, crowd, request, statuses
from support.redis import RedisServer
from support.serving import SOURCES, Scrape, Serving
from support.wait import until

INPUT, OUTPUT = 3, 6
"""Tokens of every chat here, as the scripted backend counts them."""

OK = json_reply({"choices": [], "usage": {"prompt_tokens": INPUT, "completion_tokens": OUTPUT}})
BROKEN = json_reply({"error": {"message": "oops"}}, 500)

CONFIG = """
health: {enabled: false}  # its checks would be counted, and take replies of the script
backends:
  - {name: plain, url: "%(plain)s"}
  - {name: other, url: "%(other)s"}
  - {name: frail, url: "%(frail)s"}
  - {name: held, url: "%(held)s"}
  - {name: priced, url: "%(plain)s", provider: openai}
models:
  - name: several
    strategy: round-robin
    deployments:
      - {backend: plain, model: scripted, quality: 0.2, price: {input: 1, output: 1}}
      - {backend: other, model: scripted, quality: 0.9, price: {input: 9, output: 9}}
  - {name: one, deployments: [{backend: plain, model: scripted}]}
  - {name: two, deployments: [{backend: other, model: scripted}]}
  - {name: both, members: [one, two], strategy: round-robin}
  - {name: own, strategy: custom, members: [one, two]}
  - {name: balanced, members: [one, two]}
  - {name: sold, deployments: [{backend: priced, model: gpt-4o-mini}]}
  - {name: frail, deployments: [{backend: frail, model: scripted}]}
  - {name: queued, deployments: [{backend: held, model: scripted}], queue: {slots: 2, max_waiting: 2}}
  - {name: hurried, deployments: [{backend: held, model: scripted}], queue: {slots: 2, max_waiting: 2, wait: 200ms}}
  - {name: cached, deployments: [{backend: plain, model: scripted, price: {input: 1, output: 1}}]}
routing:
  custom: last-of-them
  retry: {attempts: 1}
  breaker: {min_attempts: 4, cooldown: 3s, probes: 1}
"""

CHOICE = """
def last(model, candidates, need):
    return candidates[-1]
"""


class World(NamedTuple):
    serving: Serving
    plain: ScriptedBackend
    other: ScriptedBackend
    frail: ScriptedBackend
    held: ScriptedBackend

    def total(self, name: str, **labels: str) -> float:
        return self.serving.scrape().total(f"llm_router_{name}", **labels)

    def chat(self, model: str, **more: Any) -> Reply:
        return chat(self.serving.port, model=model, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("routing")
    packages = folder / "packages"
    info = packages / "choice_of_a_test-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "choice_of_a_test.py").write_text(CHOICE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: choice-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nlast-of-them = choice_of_a_test:last\n")
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(ScriptedBackend()) for name in ("plain", "other", "frail", "held")}
        config = CONFIG % {name: server.base_url for name, server in servers.items()}
        env = {"PYTHONPATH": f"{SOURCES}:{packages}"}
        serving = stack.enter_context(Serving(folder, config, "--workers", "2", env=env))
        yield World(serving, **servers)


def backend_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return reply.headers["x-llm-router-backend"]


# -- strategies --------------------------------------------------------------------------------------------


def test_a_request_chooses_its_strategy_and_the_metrics_say_so(world: World) -> None:
    wish = {"x-llm-router-strategy": "quality-first"}
    assert [backend_of(world.chat("several", headers=wish)) for _ in range(5)] == ["other"] * 5
    assert [backend_of(world.chat("several", strategy="cost-optimized")) for _ in range(5)] == ["plain"] * 5
    options = {"model": "several", "strategy": "quality-first"}
    generated = request(world.serving.port, "POST", "/api/generate", {"prompt": "hi", "options": options})
    assert backend_of(generated) == "other"
    refused = world.chat("several", headers={"x-llm-router-strategy": "best"})
    assert refused.status == 400
    assert all(name in refused.message for name in STRATEGIES)
    counted = world.serving.scrape()
    decisions = "llm_router_routing_decisions_total"
    assert counted.total(decisions, model="several", strategy="quality-first", reason="best-quality") == 6
    assert counted.total(decisions, model="several", strategy="cost-optimized", reason="lowest-cost") == 5
    assert counted.total("llm_router_inference_total", model="several", strategy="quality-first") == 6


def test_an_entry_point_of_another_package_chooses(world: World) -> None:
    assert {backend_of(world.chat("own")) for _ in range(6)} == {"other"}
    asked = world.chat("both", strategy="custom")
    assert (backend_of(asked), asked.headers["x-llm-router-strategy"]) == ("other", "custom")
    assert world.total("routing_decisions_total", model="own", strategy="custom", reason="custom") == 6


def test_a_group_is_served_by_its_members(world: World) -> None:
    seen = Counter(backend_of(reply) for reply in crowd(20, lambda _: world.chat("both")))
    assert seen.keys() == {"plain", "other"}
    seen = Counter(backend_of(reply) for reply in crowd(40, lambda _: world.chat("balanced")))
    assert seen.keys() == {"plain", "other"}, "balanced starves nobody"
    assert world.total("inference_total", model="balanced", strategy="balanced", status="success") == 40


def test_prices_of_the_list_are_in_the_cost(world: World) -> None:
    """The list is read after the start; from then on each inference costs what its tokens do."""

    def costs() -> float:
        assert world.chat("sold").status == 200
        return world.total("cost_usd_total", model="sold", status="exact")

    before = until(costs)
    after = costs()
    assert after - before == pytest.approx(_listed_usd())
    assert world.total("cost_usd_total", model="one") == 0


def _listed_usd() -> float:
    """What the list says that a chat of this file costs with gpt-4o-mini."""
    usage = genai_prices.Usage(input_tokens=INPUT, output_tokens=OUTPUT)
    return float(genai_prices.calc_price(usage, model_ref="gpt-4o-mini", provider_id="openai").total_price)


# -- circuits ----------------------------------------------------------------------------------------------


def test_a_circuit_that_one_worker_opens_is_open_in_the_other(world: World) -> None:
    """All failures go over one connection, so to one worker; then every connection is refused, and later none."""
    for _ in range(4):
        world.frail.script(BROKEN)
    connection = http.client.HTTPConnection("127.0.0.1", world.serving.port, timeout=20)
    assert [world.chat("frail", connection=connection).status for _ in range(4)] == [500] * 4
    connection.close()
    until(lambda: world.total("circuit_state", backend="frail") == 2)
    refusals = until(lambda: _all_refused(crowd(20, lambda _: world.chat("frail"))), what="a refusal by both workers")
    assert {reply.json()["error"]["code"] for reply in refusals} == {"circuit_open"}
    assert {reply.retry_after_s for reply in refusals} <= {1, 2, 3}
    until(lambda: world.total("circuit_state", backend="frail") == 1, what="a circuit that may be probed")
    until(
        lambda: (
            statuses(crowd(20, lambda _: world.chat("frail"))) == {200: 20}
            and world.total("circuit_state", backend="frail") == 0
        ),
        what="closed circuits",
    )
    assert world.total("errors_total", type="circuit_open") >= 20
    assert world.total("circuit_state", backend="plain") == 0


def _all_refused(replies: list[Reply]) -> list[Reply]:
    return replies if statuses(replies) == {503: len(replies)} else []


# -- queues ------------------------------------------------------------------------------------------------


class Sent:
    """A chat on a connection of its own, whose reply was not read yet."""

    def __init__(self, port: int, model: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "one two three"}]})
        self._connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})

    def status(self) -> int:
        try:
            return self._connection.getresponse().status
        finally:
            self._connection.close()

    def is_answered(self) -> bool:
        """Whether something can be read."""
        self._connection.sock.setblocking(False)
        try:
            return bool(self._connection.sock.recv(1, 2))  # MSG_PEEK
        except BlockingIOError:
            return False
        finally:
            self._connection.sock.settimeout(20)

    def leave(self) -> None:
        self._connection.close()


def _fill(world: World, model: str) -> tuple[list[Sent], list[int]]:
    """Connect until both workers have as many requests of the model as they may: those, and how others were refused."""
    inside: list[Sent] = []
    refused: list[int] = []
    before = len(world.held.requests)

    def is_settled(newest: list[Sent]) -> bool:
        """Whether all that were not answered yet are known to be at the backend or in a queue."""
        open_ = len(inside) + sum(not one.is_answered() for one in newest)
        return open_ == len(world.held.requests) - before + world.total("queue_size", queue_type=model)

    while len(inside) < 4:
        newest = [Sent(world.serving.port, model) for _ in range(8)]
        until(functools.partial(is_settled, newest), what="every request inside or refused")
        for one in newest:
            if one.is_answered():
                refused.append(one.status())
            else:
                inside.append(one)
    return inside, refused


def test_workers_divide_slots_and_places_and_the_metrics_move(world: World) -> None:
    """Two slots and two places are one of each for each worker: four are inside, two of them at the backend."""
    gate = Gate()
    world.held.always(Hold(gate), OK)
    inside, refused = _fill(world, "queued")
    assert set(refused) == {429}
    assert len(world.held.requests) == 2
    assert world.total("queue_size", queue_type="queued") == 2
    assert world.total("requests_in_flight") == 4
    gate.open()
    assert [one.status() for one in inside] == [200] * 4
    until(lambda: world.total("queue_size", queue_type="queued") == 0)
    counted = world.serving.scrape()
    assert counted.total("llm_router_queue_wait_seconds_count", model="queued") == 4 + len(refused)
    assert counted.total("llm_router_queue_wait_seconds_sum", model="queued") > 0
    assert counted.total("llm_router_queue_processing_seconds_count", queue_type="queued") == 4
    assert counted.total("llm_router_errors_total", type="queue_full") == len(refused)


def test_who_leaves_the_queue_frees_its_place_and_who_stays_too_long_is_sent_away(world: World) -> None:
    gate = Gate()
    world.held.always(Hold(gate), OK)
    inside, _ = _fill(world, "queued")
    for one in inside:
        one.leave()
    until(lambda: world.total("queue_size", queue_type="queued") == 0)
    until(lambda: world.total("requests_in_flight") == 0)
    late = [Sent(world.serving.port, "hurried") for _ in range(12)]
    until(lambda: sum(one.is_answered() for one in late) >= 10)
    gate.open()
    seen = Counter(one.status() for one in late)
    assert seen[408] in {1, 2}
    assert seen[408] + seen[429] + seen[200] == 12
    assert world.total("errors_total", type="queue_timeout") == seen[408]


def test_workers_that_were_held_up_take_nothing_new_until_they_have_caught_up(world: World) -> None:
    workers = [name for name in world.serving.children() if name.startswith("worker")]
    for name in workers:
        world.serving.signal(name, signal.SIGSTOP)
    stopped_at = time.monotonic()
    sent = [Sent(world.serving.port, "one") for _ in range(10)]
    until(lambda: time.monotonic() > stopped_at + 1.3)
    for name in workers:
        world.serving.signal(name, signal.SIGCONT)
    seen = Counter(one.status() for one in sent)
    assert seen[503] > 0
    assert seen[503] + seen[200] == 10
    until(lambda: statuses(crowd(10, lambda _: world.chat("one"))) == {200: 10})
    assert world.total("errors_total", type="shed") >= seen[503]


# -- the cache ---------------------------------------------------------------------------------------------


def test_cached_answers_are_counted_apart(world: World) -> None:
    """Each worker has a memory of its own: two ask the backend at most. Tokens, cost and duration are theirs alone."""
    before = world.serving.scrape()
    replies = crowd(40, lambda _: world.chat("cached", temperature=0))
    assert statuses(replies) == {200: 40}
    assert len({reply.body for reply in replies}) == 1
    hits = sum(reply.headers.get("x-llm-router-cached") == "true" for reply in replies)
    asked = 40 - hits
    assert 1 <= asked <= 2
    counted = world.serving.scrape()
    inferences = "llm_router_inference_total"
    assert counted.total(inferences, model="cached", status="success", cached="true") == hits
    assert counted.total(inferences, model="cached", cached="false") == asked
    assert counted.total("llm_router_inference_duration_seconds_count", model="cached") == asked
    assert counted.total("llm_router_tokens_generated_total", model="cached") == asked * OUTPUT
    assert counted.total("llm_router_cost_usd_total", model="cached") == pytest.approx(asked * (INPUT + OUTPUT) / 1e6)
    for name, count in (("llm_router_cache_hits_total", hits), ("llm_router_cache_misses_total", asked)):
        assert counted.total(name, cache_type="response") - before.total(name, cache_type="response") == count
    until(lambda: world.total("cache_size_bytes", cache_type="response") > 0)
    stream = [world.chat("cached", temperature=0, stream=True) for _ in range(6)]
    assert len({reply.body for reply in stream}) == 1
    assert stream[-1].body.endswith(b"data: [DONE]\n\n")


def test_workers_share_a_redis_and_go_on_without_it(tmp_path: Path) -> None:
    config = """
backends:
  - {name: b, url: "%s"}
models:
  - {name: m, deployments: [{backend: b, model: scripted}]}
cache: {url: "%s"}
"""
    with (
        ScriptedBackend() as backend,
        RedisServer() as redis,
        Serving(tmp_path, config % (backend.base_url, redis.url), "--workers", "2") as serving,
    ):

        def ask(count: int = 20, seed: int = 0) -> int:
            """How many of so many equal requests were answered by the cache; all must be answered."""
            replies = crowd(count, lambda _: chat(serving.port, temperature=0, seed=seed))
            assert statuses(replies) == {200: count}
            return sum(reply.headers.get("x-llm-router-cached") == "true" for reply in replies)

        assert ask(1) == 0
        until(lambda: ask() == 20, what="answers of the cache in both workers")
        hits = serving.scrape().total("llm_router_cache_hits_total", cache_type="redis")
        assert hits >= 20
        redis.kill()
        for seed in range(3):
            ask(10, seed)
        until(lambda: serving.scrape().total("llm_router_errors_total", type="cache_unavailable") == 2)
        assert serving.log.count("does not answer") == 2
        redis.start()
        until(lambda: ask() == 20, what="answers of the cache that came back")
        assert serving.scrape().total("llm_router_errors_total", type="cache_unavailable") == 2


# -- the library -------------------------------------------------------------------------------------------


def _settings(*backends: str, deadline_s: float = 0.0) -> Settings:
    deployments = tuple(
        Deployment(f"b{i}", "scripted", quality=quality)
        for i, quality in zip(range(len(backends)), (0.9, 0.2), strict=False)
    )
    return Settings(
        models=(ModelSettings(name="m", deployments=deployments, strategy="round-robin"),),
        backends=tuple(BackendSpec(name=f"b{i}", url=url) for i, url in enumerate(backends)),
        routing=RoutingSettings(deadline_s=deadline_s),
    )


def test_the_library_takes_a_strategy_for_each_call() -> None:
    async def scenario() -> None:
        with ScriptedBackend() as best, ScriptedBackend() as other:
            async with LLMRouter(_settings(best.base_url, other.base_url)) as router:
                for _ in range(3):
                    result = await router.quick("hi", strategy="quality-first")
                    assert result.strategy == "quality-first"
                assert [chunk async for chunk in router.stream("hi", strategy="quality-first")]
                assert (len(best.requests), len(other.requests)) == (4, 0)
                assert (await router.quick("hi")).strategy == "round-robin"
                with pytest.raises(InvalidRequest, match="round-robin"):
                    await router.quick("hi", strategy="best")

    run(scenario())


def test_the_library_tells_of_hits_and_misses() -> None:
    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url)) as router:
                told: list[tuple[str, str]] = []
                for event in ("cache-hit", "cache-miss"):
                    router.on(event, lambda cache, event=event: told.append((event, cache)))
                results = [await router.quick("hi", temperature=0) for _ in range(2)]
                await router.quick("hi")
                texts = [[chunk async for chunk in router.stream("hi", temperature=0)] for _ in range(2)]
                assert [result.cached for result in results] == [False, True]
                assert results[0].text == results[1].text
                assert texts[0] == texts[1]
                assert told == [("cache-miss", "response"), ("cache-hit", "response")] * 2
                assert len(backend.requests) == 3
                exposition = router.metrics().decode()
                assert 'llm_router_cache_hits_total{cache_type="response"} 2' in exposition
                assert 'llm_router_cache_misses_total{cache_type="response"} 2' in exposition

    run(scenario())


def test_the_library_knows_the_prices_of_the_list() -> None:
    """The list is read in the background, once it is known that it is wanted."""

    async def scenario() -> None:
        with ScriptedBackend() as backend:
            settings = Settings(
                models=(ModelSettings(name="m", deployments=(Deployment("b", "gpt-4o-mini"),)),),
                backends=(BackendSpec(name="b", url=backend.base_url, provider="openai"),),
            )
            async with LLMRouter(settings) as router:

                def cost() -> float:
                    return Scrape(router.metrics().decode()).total("llm_router_cost_usd_total", status="exact")

                await until_async(lambda: router._reading is not None and router._reading.done())
                before = cost()
                await router.quick("one two three")
                assert cost() - before == pytest.approx(_listed_usd())

    run(scenario())


def test_the_library_shows_circuits_queues_and_the_cache() -> None:
    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url)) as router:
                await router.quick("hi", temperature=0)
                text = router.metrics().decode()
                assert 'llm_router_circuit_state{backend="b0"} 0' in text
                assert 'llm_router_queue_size{queue_type="m"} 0' in text
                assert Scrape(text).total("llm_router_cache_size_bytes", cache_type="response") > 0

    run(scenario())


def test_the_library_hears_a_backend_say_that_it_failed() -> None:
    """In the middle of a stream that ends as if nothing had been: no answer, and not kept."""

    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url)) as router:
                broken = framed(b'data: {"error":{"message":"oops"}}\n\ndata: [DONE]\n\n')
                for _ in range(2):
                    backend.script(stream_head(), broken, framed(b""))
                    with pytest.raises(BackendError, match="in the middle"):
                        assert [chunk async for chunk in router.stream("hi", temperature=0)] == []
                assert [chunk async for chunk in router.stream("hi", temperature=0)]

    run(scenario())


def test_an_application_that_mounts_the_library_has_its_cache() -> None:
    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url)) as router:
                application = router.asgi()
                for is_cached in (False, True):
                    status, headers = await _chat_with(application, {"model": "m", "messages": [], "temperature": 0})
                    assert status == 200
                    assert ((b"x-llm-router-cached", b"true") in headers) is is_cached

    run(scenario())


def test_a_stream_that_the_library_kept_shows_no_client_more_than_it_asked_for() -> None:
    """The library always wants the usage of a stream; a client of the application that did not ask gets none."""

    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url)) as router:
                told: list[Any] = []
                router.on("inference-complete", lambda result, context: told.append((result.cached, result.usage)))
                fields: dict[str, Any] = {"temperature": 0, "stream": True}
                body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
                for _ in range(2):
                    assert [chunk async for chunk in router.stream("hi", temperature=0)]
                application = router.asgi()
                for is_cached in (False, True):
                    sent = await _sent_by(application, body)
                    assert ((b"x-llm-router-cached", b"true") in sent[0]["headers"]) is is_cached
                    events = b"".join(message.get("body", b"") for message in sent)
                    assert events.endswith(b"data: [DONE]\n\n")
                    assert b'"choices":[]' not in events.replace(b" ", b"")
                assert [chunk async for chunk in router.stream("hi", temperature=0)]
                assert [is_cached for is_cached, _ in told] == [False, True, True]
                assert all(usage == told[0][1] and usage["completion_tokens"] for _, usage in told)

    run(scenario())


async def _chat_with(application: AsgiFront, body: dict[str, Any]) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers of the reply of an ASGI application to a chat."""
    start = (await _sent_by(application, body))[0]
    return start["status"], start["headers"]


async def _sent_by(application: AsgiFront, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What an ASGI application answers to a chat."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }
    come: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    come.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await application(scope, come.get, send)
    return sent


def test_the_library_keeps_to_the_deadline() -> None:
    async def scenario() -> None:
        with ScriptedBackend() as backend:
            async with LLMRouter(_settings(backend.base_url, deadline_s=0.1)) as router:
                backend.script(Stall())
                with pytest.raises(DeadlineExceeded):
                    await router.quick("hi")
                backend.script(Stall())
                with pytest.raises(DeadlineExceeded):
                    async for _ in router.stream("hi"):
                        pass
                assert (await router.quick("hi")).text

    run(scenario())
