"""Prompts with expectations: what passes, what does not, who is asked, and what it may cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_router.observe.health.checks import Check
from llm_router.observe.health.settings import Validation
from llm_router.processes.probes.purse import Purse
from llm_router.processes.probes.validation import MOST_CHARACTERS, ValidationCheck
from llm_router.routing.table import Deployment, ModelSpec, RoutingTable
from llm_router.testing import FakeClock, ScriptedBackend, Stall, json_reply
from support.aio import run
from support.net import free_port
from support.probed import FREE, PAID, Evidence, local, remote, table

NOON = 20_000 * 86_400.0 + 43_200.0


@pytest.fixture
def server() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


class Validated:
    def __init__(
        self,
        tmp_path: Path,
        routing: RoutingTable,
        *,
        expect: str = "4|four",
        model: str = "small",
        usd: float = 0.0,
        timeout_s: float = 5.0,
    ) -> None:
        self.evidence = Evidence()
        self.purse = Purse(str(tmp_path / "probes.json"), usd, wall=FakeClock(NOON))
        self.validation = ValidationCheck(
            Validation(name="sums", model=model, prompt="What is 2 + 2?", expect=expect, max_tokens=8),
            lambda: routing,
            self.evidence.read,
            purse=self.purse,
            timeout_s=timeout_s,
        )

    def check(self) -> Check:
        return run(self.validation.check())


def says(text: str) -> bytes:
    return json_reply(
        {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    )


@pytest.mark.parametrize(
    ("text", "expect", "is_well", "said"),
    (
        ("It is 4.", "4|four", True, "small answers as expected"),
        ("It is\nfour", "^It.*four$", True, "small answers as expected"),
        ("It is 5.", "4|four", False, "small answered 'It is 5.', which is not '4|four'"),
        ("x\x1b[2J" + "y" * 200, "4", False, "'x\\x1b[2J" + "y" * 75 + "…'"),
        ("anything", "", True, "small answers"),
        (" \n", "", False, "small answered nothing"),
        ("y" * MOST_CHARACTERS + "4", "4", False, "which is not '4'"),
    ),
)
def test_an_answer_is_as_expected_or_not(
    tmp_path: Path, server: ScriptedBackend, text: str, expect: str, is_well: bool, said: str
) -> None:
    """The expression may match anywhere; without one any text will do. Control characters do not reach the page."""
    server.always(says(text))
    check = Validated(tmp_path, table({"small": local("small", server.base_url)}), expect=expect).check()
    assert check.is_healthy == is_well
    assert said in check.message
    assert check.details["tokens"] == 2
    assert check.details["backend"] == "runner-small"
    (asked,) = server.requests
    assert asked.json()["messages"] == [{"role": "user", "content": "What is 2 + 2?"}]
    assert asked.json()["max_tokens"] == 8


def test_an_expectation_that_is_none(tmp_path: Path) -> None:
    """Told at once, with its name."""
    with pytest.raises(ValueError, match="what is expected of 'sums' is no regular expression: '\\('"):
        Validated(tmp_path, table({}), expect="(")


def test_a_model_that_is_not_there_or_not_ready(tmp_path: Path, server: ScriptedBackend) -> None:
    """Its users get no answer either."""
    for routing in (table({}), table({"small": local("small", server.base_url, ready=False)})):
        check = Validated(tmp_path, routing).check()
        assert (check.is_healthy, check.message) == (False, "small is not ready: nobody can be asked")


def test_the_next_deployment_is_asked_when_one_fails(tmp_path: Path, server: ScriptedBackend) -> None:
    """As for a request; when all fail, each one's reason is told."""
    server.script(says("4"))
    server.always(json_reply({"error": {"message": "out of memory"}}, 500))
    dead, spec = local("dead", f"http://127.0.0.1:{free_port()}/v1"), local("small", server.base_url)
    model = ModelSpec(
        name="small", deployments=tuple(Deployment(one.name, "small", price=FREE) for one in (dead, spec))
    )
    stage = Validated(tmp_path, RoutingTable(models=(model,), backends=(dead, spec)))
    assert stage.check().is_healthy
    check = stage.check()
    assert "runner-dead: cannot connect" in check.message
    assert "runner-small: answered 500: out of memory" in check.message


def test_a_model_that_embeds_answers_no_prompt(tmp_path: Path, server: ScriptedBackend) -> None:
    """The validation is a mistake, and says so."""
    check = Validated(tmp_path, table({"small": local("small", server.base_url, only_embeds=True)})).check()
    assert "only embeds" in check.message
    assert server.requests == []


def test_a_busy_runner_may_be_late(tmp_path: Path, server: ScriptedBackend) -> None:
    """Users' requests come first; one that is idle and does not answer is failing."""
    server.always(Stall())
    stage = Validated(tmp_path, table({"small": local("small", server.base_url)}), timeout_s=0.2)
    stage.evidence.in_flight("runner-small", 1)
    check = stage.check()
    assert check.is_healthy
    assert "busy" in check.message
    stage.evidence.in_flight("runner-small", 0)
    assert "no answer in time" in stage.check().message


# -- money --------------------------------------------------------------------------------------------------


def test_a_paid_model_is_not_asked_without_money(tmp_path: Path, server: ScriptedBackend) -> None:
    """And says why, without being unhappy about what is not known."""
    check = Validated(tmp_path, table({"small": remote("openai", server.base_url)})).check()
    assert check.is_healthy
    assert check.message == "small was not asked: it costs money, and health.paid_probe_daily_usd is 0"
    unknown = Validated(tmp_path, table({"small": remote("openai", server.base_url)}, {"small": None}), usd=1.0)
    assert "its price is not known" in unknown.check().message
    assert server.requests == []


def test_the_last_result_stays_while_there_is_no_money(tmp_path: Path, server: ScriptedBackend) -> None:
    """A wrong answer is not forgotten because asking again would cost something."""
    server.always(says("5"))
    stage = Validated(tmp_path, table({"small": remote("openai", server.base_url)}), usd=0.001)
    assert not stage.check().is_healthy
    assert stage.purse.spent_usd() == pytest.approx((9 * PAID.input + 2 * PAID.output) / 1e6)
    stage.purse.take(0.0006)
    check = stage.check()
    assert not check.is_healthy
    assert check.message.endswith("(not asked this time: the money for probes is spread over the day)")
    assert len(server.requests) == 1


def test_a_refusal_costs_nothing(tmp_path: Path, server: ScriptedBackend) -> None:
    """Providers charge for answers. The key is not shown."""
    server.always(json_reply({"error": {"message": "bad key sk-s3cret-key"}}, 401))
    stage = Validated(tmp_path, table({"small": remote("openai", server.base_url)}), usd=1.0)
    assert stage.check().message == "small did not answer: openai: answered 401: bad key ***"
    assert stage.purse.spent_usd() == 0.0
