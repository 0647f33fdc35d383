"""Whether models answer: real generations where they cost nothing, evidence where not, money only as allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_router.models.prices import Price
from llm_router.observe.health.checks import Check
from llm_router.processes.probes.asking import most_usd
from llm_router.processes.probes.inference import MOST_SHOWN, PAID_MAX_TOKENS, PROMPT, InferenceCheck
from llm_router.processes.probes.purse import Purse
from llm_router.routing.table import Deployment, ModelSpec, RoutingTable
from llm_router.testing import FakeClock, ScriptedBackend, Stall, json_reply, reply
from support.aio import run
from support.net import free_port
from support.probed import FREE, PAID, Evidence, local, remote, table
from support.wait import until

NOON = 20_000 * 86_400.0 + 43_200.0


@pytest.fixture
def server() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


class Checked:
    """The check over a table, with evidence, endpoints and money that the test decides about."""

    def __init__(self, tmp_path: Path, routing: RoutingTable, *, usd: float = 0.0, timeout_s: float = 5.0) -> None:
        self.table = routing
        self.evidence = Evidence()
        self.endpoints: dict[str, str] = {}
        self.wall = FakeClock(NOON)
        self.clock = FakeClock()
        self.purse = Purse(str(tmp_path / "probes.json"), usd, wall=self.wall)
        self.inference = InferenceCheck(
            lambda: self.table,
            self.evidence.read,
            endpoint=self.endpoints.get,
            purse=self.purse,
            timeout_s=timeout_s,
            clock=self.clock,
        )

    def check(self) -> Check:
        self.clock.advance(30.0)
        return run(self.inference.check())


# -- models that run here -----------------------------------------------------------------------------------


def test_an_idle_runner_is_asked_for_a_generation(tmp_path: Path, server: ScriptedBackend) -> None:
    """Each time; with the runner's key and a few tokens; the keys of the result are those of the guide."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url)}))
    check = stage.check()
    assert check.status == "healthy"
    assert check.message == "Inference capability verified: 1 model answers"
    assert (check.value, check.threshold) == (1.0, 1.0)
    assert check.details["model"] == "small"
    assert check.details["tokens"] > 0
    assert check.details["latency"] > 0
    assert check.details["models"]["small"]["by"] == "generation"
    stage.check()
    first, second = server.requests
    assert first.method == "POST"
    assert first.headers["authorization"] == "Bearer runner-k3y"
    assert first.json() == {"model": "small", "messages": [{"role": "user", "content": "test"}], "max_tokens": 4}
    assert "traceparent" not in first.headers
    assert second.json() == first.json()


def test_a_runner_with_traffic_is_not_asked(tmp_path: Path, server: ScriptedBackend) -> None:
    """Requests were answered since the last time: that is better evidence, and disturbs nobody."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url)}))
    stage.check()
    stage.evidence.add("runner-small", successes=12, failures=1)
    check = stage.check()
    assert check.status == "healthy"
    assert check.details["models"]["small"]["said"] == "12 requests answered since the last check"
    assert len(server.requests) == 1
    stage.check()  # quiet again
    assert len(server.requests) == 2


def test_what_was_counted_before_the_first_check_is_no_evidence(tmp_path: Path, server: ScriptedBackend) -> None:
    """A control that starts anew does not know how old it is."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url)}))
    stage.evidence.add("runner-small", successes=1000)
    stage.check()
    assert len(server.requests) == 1


def test_a_runner_at_work_is_left_alone(tmp_path: Path, server: ScriptedBackend) -> None:
    """A long answer is in flight: a probe would wait behind it and seem to fail."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url)}))
    stage.evidence.in_flight("runner-small", 1)
    check = stage.check()
    assert server.requests == []
    assert check.status == "healthy"
    assert check.details["not_judged"] == ["small"]


def test_failures_of_requests_are_confirmed_by_a_generation(tmp_path: Path, server: ScriptedBackend) -> None:
    """It may be well again, or the requests were strange; else it is failing for sure."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url)}))
    stage.check()
    stage.evidence.add("runner-small", successes=1, failures=9)
    assert stage.check().status == "healthy"
    server.always(json_reply({"error": {"message": "out of\nslots"}}, 500))
    stage.evidence.add("runner-small", failures=3)
    check = stage.check()
    assert check.status == "critical"
    assert check.message == "Inference test failed: small: answered 500: out of slots"


@pytest.mark.parametrize(
    ("answer", "problem"),
    (
        (reply(b"hello", content_type="text/plain"), "no JSON object"),
        (json_reply({"choices": []}), "holds no message"),
        (json_reply({"error": "no"}, 400), "answered 400: no"),
    ),
)
def test_an_answer_that_is_none(tmp_path: Path, server: ScriptedBackend, answer: bytes, problem: str) -> None:
    """A runner that talks nonsense does not answer."""
    server.always(answer)
    check = Checked(tmp_path, table({"small": local("small", server.base_url)})).check()
    assert check.status == "critical"
    assert problem in check.message


def test_one_that_hangs_does_not_hide_the_others(tmp_path: Path, server: ScriptedBackend) -> None:
    """It has its share of the time; the connection is cut then, so that it need not work on."""
    with ScriptedBackend() as hanging:
        hanging.always(Stall())
        stage = Checked(
            tmp_path,
            table({"stuck": local("stuck", hanging.base_url), "small": local("small", server.base_url)}),
            timeout_s=0.5,
        )
        check = stage.check()
        assert check.status == "degraded"
        assert check.message == "Inference test failed: stuck: no answer in time (total timeout of 0.225 s)"
        assert (check.value, check.threshold) == (1.0, 2.0)
        until(lambda: [connection.closed_by for connection in hanging.connections] == ["client"])


def test_a_dead_runner(tmp_path: Path) -> None:
    """Nothing listens where it should."""
    check = Checked(tmp_path, table({"small": local("small", f"http://127.0.0.1:{free_port()}/v1")})).check()
    assert check.status == "critical"
    assert "small: cannot connect: Connection refused" in check.message


def test_a_runner_that_is_not_ready_is_not_judged(tmp_path: Path, server: ScriptedBackend) -> None:
    """That is what the check of models is for. Without any model there is nothing to say."""
    check = Checked(tmp_path, table({"small": local("small", server.base_url, ready=False)})).check()
    assert (check.status, check.message) == ("healthy", "No model is ready: nothing to ask")
    assert server.requests == []


def test_a_runner_that_embeds_too_is_asked_a_prompt(tmp_path: Path, server: ScriptedBackend) -> None:
    """Runners can unless told otherwise, and nobody loads a model that chats for that."""
    stage = Checked(tmp_path, table({"small": local("small", server.base_url, embeddings=True)}))
    assert stage.check().status == "healthy"
    assert [request.target for request in server.requests] == ["/v1/chat/completions"]


def test_a_runner_that_only_embeds_is_asked_to_embed(tmp_path: Path, server: ScriptedBackend) -> None:
    stage = Checked(tmp_path, table({"e": local("e", server.base_url, only_embeds=True)}))
    assert stage.check().status == "healthy"
    assert [request.target for request in server.requests] == ["/v1/embeddings"]
    server.always(json_reply({"data": []}))
    assert "holds no embedding" in stage.check().message


def test_a_deployment_that_models_share_is_asked_once(tmp_path: Path, server: ScriptedBackend) -> None:
    """And a model with another deployment that answers is well."""
    spec, dead = local("small", server.base_url), local("dead", f"http://127.0.0.1:{free_port()}/v1")
    one, other = Deployment(spec.name, "small", price=FREE), Deployment(dead.name, "dead", price=FREE)
    models = (
        ModelSpec(name="small", deployments=(one,)),
        ModelSpec(name="auto", deployments=(other, one)),
        ModelSpec(name="dead", deployments=(other,)),
    )
    check = Checked(tmp_path, RoutingTable(models=models, backends=(spec, dead))).check()
    assert len(server.requests) == 1
    assert check.details["models"]["auto"]["said"].startswith("4 tokens in")
    assert (check.status, check.value, check.threshold) == ("degraded", 2.0, 3.0)


def test_a_model_that_left_is_forgotten(tmp_path: Path, server: ScriptedBackend) -> None:
    """Its failure does not stay behind."""
    stage = Checked(tmp_path, table({"dead": local("dead", f"http://127.0.0.1:{free_port()}/v1")}))
    assert stage.check().status == "critical"
    stage.table = table({"small": local("small", server.base_url)})
    assert stage.check().status == "healthy"


def test_the_details_stay_small(tmp_path: Path, server: ScriptedBackend) -> None:
    """However many models there are, and whatever they say; the scheduler would leave larger ones out."""
    server.always(json_reply({"error": {"message": "x" * 10_000}}, 500))
    models = {f"model-{number}": local(f"model-{number}", server.base_url) for number in range(MOST_SHOWN * 2)}
    check = Checked(tmp_path, table(models)).check()
    assert len(check.details["models"]) == MOST_SHOWN
    assert len(repr(check.details)) < 4000


# -- models that cost money -------------------------------------------------------------------------------


def test_a_paid_model_is_never_asked_by_default(tmp_path: Path, server: ScriptedBackend) -> None:
    """It is judged by its traffic."""
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}))
    check = stage.check()
    assert (check.status, check.details["not_judged"]) == ("healthy", ["gpt"])
    assert check.message == "Nothing speaks against inference; 1 had no traffic yet to judge by"
    stage.evidence.add("openai", successes=3)
    assert stage.check().message == "Inference capability verified: 1 model answers"
    stage.evidence.add("openai", failures=3, successes=2)
    check = stage.check()
    assert check.status == "critical"
    assert check.message == "Inference test failed: gpt: 3 of 5 attempts failed since the last check"
    assert server.requests == []


def test_a_quiet_paid_model_is_judged_by_its_free_endpoint(tmp_path: Path, server: ScriptedBackend) -> None:
    """A key that is refused there is refused for inference; one that is taken clears failures of before."""
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}))
    stage.check()
    stage.evidence.add("openai", failures=3)
    assert stage.check().status == "critical"
    stage.endpoints["openai"] = ""
    assert stage.check().status == "healthy"
    stage.endpoints["openai"] = "it does not take our key (401): look at its api_key"
    assert "does not take our key" in stage.check().message
    assert server.requests == []


def test_money_buys_a_generation_of_an_idle_paid_model(tmp_path: Path, server: ScriptedBackend) -> None:
    """It is paid by what the answer's usage costs; then the purse says when the next one may be."""
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}), usd=0.001)
    check = stage.check()
    assert check.details["models"]["gpt"]["by"] == "generation"
    assert len(server.requests) == 1
    assert server.requests[0].json()["max_tokens"] == PAID_MAX_TOKENS
    assert 0 < stage.purse.spent_usd() < most_usd(PAID, PROMPT, PAID_MAX_TOKENS)
    assert check.details["probes_usd_today"] == round(stage.purse.spent_usd(), 6)
    while stage.purse.spent_usd() < 0.0005 and len(server.requests) < 100:
        stage.check()
    asked = len(server.requests)
    stage.check()
    assert len(server.requests) == asked  # at noon half of the money is gone
    stage.wall.advance(86_400.0)
    stage.check()
    assert len(server.requests) == asked + 1


def test_all_probes_of_a_day_cost_no_more_than_allowed(tmp_path: Path, server: ScriptedBackend) -> None:
    """Also when answers tell no usage, so that each counts as the dearest that it can be."""
    server.always(json_reply({"choices": [{"message": {"content": "x"}}]}))
    most = most_usd(PAID, PROMPT, PAID_MAX_TOKENS)
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}), usd=most * 3.5)
    stage.wall.now = NOON + 43_000.0
    for _ in range(10):
        stage.check()
    assert len(server.requests) == 3


def test_paid_models_take_turns(tmp_path: Path, server: ScriptedBackend) -> None:
    """One at a time, the one that was not asked for longest first; one with traffic costs nothing."""
    backends = {name: remote(name, server.base_url) for name in ("a", "b", "c")}
    stage = Checked(tmp_path, table(backends), usd=1.0)
    for _ in range(4):
        stage.evidence.add("c", successes=1)
        stage.check()
    assert [request.json()["model"] for request in server.requests] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("price", (None, FREE), ids=("unknown", "nothing"))
def test_a_remote_model_without_a_price_is_not_asked(
    tmp_path: Path, server: ScriptedBackend, price: Price | None
) -> None:
    """What it costs cannot be bounded; and a server of one's own may load a model for being asked."""
    stage = Checked(tmp_path, table({"m": remote("other", server.base_url)}, {"m": price}), usd=1.0)
    assert stage.check().status == "healthy"
    assert server.requests == []


def test_a_refused_paid_probe_costs_nothing(tmp_path: Path, server: ScriptedBackend) -> None:
    """Wrong keys and unknown models are told; a model that takes no such request is not at fault."""
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}), usd=1.0)
    server.always(json_reply({"error": {"message": "no such model for sk-s3cret-key"}}, 404))
    check = stage.check()
    assert check.message == "Inference test failed: gpt: answered 404: no such model for ***"
    stage.endpoints["openai"] = ""
    stage.wall.now = NOON
    server.always(json_reply({"error": {"message": "max_tokens is too small"}}, 400))
    assert stage.check().status == "healthy"
    assert stage.purse.spent_usd() == 0.0


def test_a_failed_paid_generation_counts_more_than_a_list_of_models(tmp_path: Path, server: ScriptedBackend) -> None:
    """The endpoint answers, and still nobody gets an answer: an account without money, say."""
    stage = Checked(tmp_path, table({"gpt": remote("openai", server.base_url)}), usd=0.001)
    stage.endpoints["openai"] = ""
    server.always(json_reply({"error": {"message": "insufficient quota"}}, 429))
    stage.check()
    stage.purse.take(0.0006)  # no money for another one now
    check = stage.check()
    assert len(server.requests) == 1
    assert "gpt: answered 429: insufficient quota" in check.message
    stage.evidence.add("openai", successes=1)
    assert stage.check().status == "healthy"
