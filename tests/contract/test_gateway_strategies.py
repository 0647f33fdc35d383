"""How a deployment is chosen, as callers see it: by the model's strategy, or by the one that a single request asks for."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from llm_router.errors import ConfigError
from llm_router.models.prices import Price
from llm_router.routing.policies import ENTRY_POINTS
from llm_router.routing.table import (
    STRATEGIES,
    BackendSpec,
    Capability,
    Deployment,
    ModelSpec,
    RetrySpec,
    RoutingTable,
)
from llm_router.testing import Gate, Hold, Pause, ScriptedBackend, json_reply, reply
from support.ask import Answer
from support.chats import completion
from support.gateway import Gateway

NAMES = ("able", "best", "cheap", "plain")


class Fleet:
    """Four deployments of one model, each the best by another measure; `able` sees, `plain` is known to do nothing else."""

    def __init__(self, servers: dict[str, ScriptedBackend]) -> None:
        self.servers = servers

    def table(self, strategy: str = "round-robin", custom: str = "", names: tuple[str, ...] = NAMES) -> RoutingTable:
        everything: tuple[Capability, ...] = ("tools", "vision", "json")
        some: tuple[Capability, ...] = ("tools", "json")
        known = {
            "able": Deployment("able", "m-able", 0.5, Price(input=2.0, output=4.0), 8000, everything),
            "best": Deployment("best", "m-best", 0.9, Price(input=5.0, output=15.0), 8000, some),
            "cheap": Deployment("cheap", "m-cheap", 0.3, Price(input=0.1, output=0.2), 8000, some),
            "plain": Deployment("plain", "m-plain", 0.4, Price(input=1.0, output=2.0), 8000, ()),
        }
        return RoutingTable(
            models=(ModelSpec(name="m", deployments=tuple(known[name] for name in names), strategy=strategy),),
            backends=tuple(BackendSpec(name=name, url=self.servers[name].base_url) for name in NAMES),
            retry=RetrySpec(backoff_s=0.001, backoff_max_s=0.01),
            custom=custom,
        )


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        yield Fleet({name: stack.enter_context(ScriptedBackend()) for name in NAMES})


def backend_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return answer.headers["x-llm-router-backend"]


@pytest.mark.parametrize(
    ("strategy", "backend", "reason"),
    [
        ("quality-first", "best", "best-quality"),
        ("cost-optimized", "cheap", "lowest-cost"),
        ("capability-match", "plain", "best-fit"),
    ],
)
def test_a_header_chooses_the_strategy_of_one_request_and_of_no_other(
    fleet: Fleet, strategy: str, backend: str, reason: str
) -> None:
    """In between, and for everybody else, the model's own strategy goes on as if nothing had been."""
    with Gateway(fleet.table("round-robin")) as gateway:
        wish = {"x_llm_router_strategy": strategy}
        asked, others = [], []
        for _ in range(4):
            asked.append(gateway.chat(headers=wish))
            others.append(gateway.chat())
        records = gateway.records(8)
    assert [backend_of(answer) for answer in asked] == [backend] * 4
    assert {answer.headers["x-llm-router-strategy"] for answer in asked} == {strategy}
    assert [(record.strategy, record.reason) for record in records[::2]] == [(strategy, reason)] * 4
    assert [backend_of(answer) for answer in others] == list(NAMES)
    assert {answer.headers["x-llm-router-strategy"] for answer in others} == {"round-robin"}


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "custom"])
def test_every_strategy_answers_and_is_counted_under_its_name(fleet: Fleet, strategy: str) -> None:
    with Gateway(fleet.table()) as gateway:
        answers = [gateway.chat(headers={"x_llm_router_strategy": strategy.upper()}) for _ in range(3)]
        records = gateway.records(3)
    assert [answer.status for answer in answers] == [200] * 3
    assert {(record.strategy, bool(record.reason)) for record in records} == {(strategy, True)}


def test_a_body_chooses_the_strategy_in_each_dialect(fleet: Fleet) -> None:
    """The option is ours: no backend gets it. A header wins over it."""
    prompt: dict[str, Any] = {"model": "m", "prompt": "hi"}
    messages: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    fleet.servers["best"].always(json_reply(completion()))
    with Gateway(fleet.table()) as gateway:
        answers = [
            gateway.chat(strategy="quality-first"),
            gateway.chat(strategy="quality-first", stream=True),
            gateway.request("POST", "/v1/completions", {**prompt, "strategy": "quality-first"}),
            gateway.request("POST", "/v1/messages", {**messages, "strategy": "quality-first"}),
            gateway.request("POST", "/v1/embeddings", {"model": "m", "input": "hi", "strategy": "quality-first"}),
        ]
        generated = gateway.request("POST", "/api/generate", {"prompt": "hi", "options": {"strategy": "quality-first"}})
        header_wins = gateway.chat(headers={"x_llm_router_strategy": "cost-optimized"}, strategy="quality-first")
    assert [backend_of(answer) for answer in answers] == ["best"] * 5
    assert backend_of(generated) == "best"
    assert generated.json()["data"]["strategy"] == "quality-first"
    assert backend_of(header_wins) == "cheap"
    for server in fleet.servers.values():
        assert all(b"strategy" not in request.body for request in server.requests)


def test_official_clients_choose_a_strategy(fleet: Fleet) -> None:
    fleet.servers["best"].always(json_reply(completion()))
    with Gateway(fleet.table()) as gateway:
        with openai.OpenAI(base_url=gateway.base_url, api_key="none") as client:
            chat = client.chat.completions.with_raw_response.create(
                model="m", messages=[{"role": "user", "content": "hi"}], extra_body={"strategy": "quality-first"}
            )
        url = f"http://127.0.0.1:{gateway.port}"
        with anthropic.Anthropic(base_url=url, api_key="none") as other:
            message = other.messages.with_raw_response.create(
                model="m",
                max_tokens=9,
                messages=[{"role": "user", "content": "hi"}],
                extra_headers={"x-llm-router-strategy": "quality-first"},
            )
    assert [reply.headers["x-llm-router-backend"] for reply in (chat, message)] == ["best", "best"]


def test_a_strategy_that_there_is_not_is_400_with_the_list(fleet: Fleet) -> None:
    with Gateway(fleet.table()) as gateway:
        by_header = gateway.chat(headers={"x_llm_router_strategy": "fastest"})
        by_body = gateway.chat(strategy="fastest")
        generated = gateway.request("POST", "/api/generate", {"prompt": "hi", "options": {"strategy": "fastest"}})
        message = gateway.request(
            "POST", "/v1/messages", {"model": "m", "max_tokens": 9, "messages": [], "strategy": "fastest"}
        )
        custom = gateway.chat(strategy="custom")
        records = gateway.records(5)
    for answer in (by_header, by_body, generated, message):
        assert answer.status == 400
        assert "fastest" in answer.body.decode()
        assert all(name in answer.body.decode() for name in STRATEGIES)
    assert by_header.json()["error"]["param"] == "x-llm-router-strategy"
    assert by_body.json()["error"]["param"] == "strategy"
    assert generated.json()["success"] is False
    assert message.json()["error"]["type"] == "invalid_request_error"
    assert custom.status == 400
    assert "routing.custom" in custom.json()["error"]["message"]
    assert {record.error_type for record in records} == {"bad_request"}
    assert not any(server.requests for server in fleet.servers.values())


def test_the_capabilities_of_a_request_choose_who_has_them(fleet: Fleet) -> None:
    """An image goes to the only one that sees, and so it does under strategies that score."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    seeing = [{"role": "user", "content": [picture]}]
    with Gateway(fleet.table("capability-match")) as gateway:
        asked = [gateway.chat(messages=seeing, strategy=name) for name in ("capability-match", "cost-optimized")]
        tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
        with_tool = gateway.chat(tools=[tool])
    assert [backend_of(answer) for answer in asked] == ["able", "able"]
    assert backend_of(with_tool) in {"best", "cheap"}


def test_least_loaded_goes_around_whoever_is_busy(fleet: Fleet) -> None:
    gate = Gate()
    fleet.servers["able"].script(Hold(gate), reply(json.dumps(completion()).encode()))
    with Gateway(fleet.table("least-loaded", names=("able", "best"))) as gateway:
        busy = gateway.ask_chat()
        fleet.servers["able"].wait(lambda server: bool(server.requests))
        answers = [gateway.chat() for _ in range(6)]
        gate.open()
        assert backend_of(busy.answer()) == "able"
        records = gateway.records(7)
    assert [backend_of(answer) for answer in answers] == ["best"] * 6
    assert {record.reason for record in records} == {"least-loaded"}


def test_speed_priority_learns_who_is_fast(fleet: Fleet) -> None:
    """Whoever was never measured gets a try; from then on the faster one serves."""
    body = json.dumps(completion()).encode()
    fleet.servers["able"].always(Pause(0.05), reply(body))
    fleet.servers["best"].always(reply(body))
    with Gateway(fleet.table("speed-priority", names=("able", "best"))) as gateway:
        answers = [gateway.chat() for _ in range(20)]
        records = gateway.records(20)
    counts = Counter(backend_of(answer) for answer in answers)
    assert counts["able"] >= 1, "it is explored, not starved"
    assert counts["best"] >= 15
    assert {record.reason for record in records} >= {"explored", "fastest"}


def test_balanced_is_the_default_and_explores_what_was_never_measured(fleet: Fleet) -> None:
    """A deployment that comes later gets a part of the traffic, no rush, although what is known is good."""
    body = json.dumps(completion()).encode()
    for server in fleet.servers.values():
        server.always(reply(body))
    alone = fleet.table("", names=("best",))
    assert alone.strategy == "balanced"
    with Gateway(alone) as gateway:
        first = [gateway.chat() for _ in range(5)]
        gateway.follow(fleet.table("", names=("best", "able")))
        answers = [gateway.chat() for _ in range(40)]
        records = gateway.records(45)
    assert {backend_of(answer) for answer in first} == {"best"}
    assert {record.strategy for record in records} == {"balanced"}
    counts = Counter(backend_of(answer) for answer in answers)
    assert min(counts["best"], counts["able"]) >= 1
    assert "explored" in {record.reason for record in records[5:]} or counts["able"] >= 10


def test_a_group_has_the_deployments_of_all_its_members(fleet: Fleet) -> None:
    """What answers is one of them; speeds and circuits of a deployment are the same ones in the group and outside."""
    first, second = (ModelSpec(name=name, deployments=(Deployment(name, f"m-{name}"),)) for name in ("able", "best"))
    group = ModelSpec(name="any", deployments=(*first.deployments, *second.deployments), strategy="round-robin")
    table = RoutingTable(
        models=(first, second, group),
        backends=tuple(BackendSpec(name=name, url=fleet.servers[name].base_url) for name in ("able", "best")),
    )
    with Gateway(table) as gateway:
        answers = [gateway.chat("any") for _ in range(4)]
        alone = gateway.chat("best")
    assert [backend_of(answer) for answer in answers] == ["able", "best"] * 2
    assert backend_of(alone) == "best"
    assert fleet.servers["best"].requests[0].json()["model"] == "m-best"


# -- the operator's own ------------------------------------------------------------------------------------

CHOICE = """
calls = []

def last(model, candidates, need):
    calls.append((model, [candidate.name for candidate in candidates], need().input_tokens))
    return candidates[-1].name

def broken(model, candidates, need):
    raise RuntimeError("no idea")
"""


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with functions for the strategy `custom`, and an entry point `the-last` for one of them."""
    name = "choice_of_a_test"
    (tmp_path / f"{name}.py").write_text(CHOICE)
    info = tmp_path / "choice_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: choice-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nthe-last = {name}:last\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("where", ["choice_of_a_test:last", "the-last"])
def test_a_function_of_the_operator_chooses(fleet: Fleet, choice: str, where: str) -> None:
    """By module and name, or by entry point; for the models that say so and for requests that ask for it."""
    with Gateway(fleet.table("custom", custom=where)) as gateway:
        answers = [gateway.chat() for _ in range(2)]
        others = [gateway.chat(strategy="round-robin") for _ in range(2)]
        records = gateway.records(4)
    assert [backend_of(answer) for answer in answers] == ["plain"] * 2
    assert [backend_of(answer) for answer in others] == ["able", "best"]
    assert [(record.strategy, record.reason) for record in records[:2]] == [("custom", "custom")] * 2
    assert [call[:2] for call in sys.modules[choice].calls] == [("m", list(NAMES))] * 2
    assert all(call[2] > 0 for call in sys.modules[choice].calls)


def test_a_function_that_fails_leaves_the_choice_to_balanced(fleet: Fleet, choice: str) -> None:
    with Gateway(fleet.table("round-robin", custom=f"{choice}:broken")) as gateway:
        answer = gateway.chat(headers={"x_llm_router_strategy": "custom"})
        record = gateway.record()
    assert answer.status == 200
    assert (record.strategy, record.reason) == ("custom", "custom-failed")


def test_a_function_that_cannot_be_had_changes_nothing(fleet: Fleet) -> None:
    """The table before it stays in force."""
    with Gateway(fleet.table("quality-first")) as gateway:
        with pytest.raises(ConfigError, match=r"routing\.custom"):
            gateway.follow(fleet.table("custom", custom="no_such_module:function"))
        assert backend_of(gateway.chat()) == "best"
