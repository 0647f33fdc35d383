"""Settings and runners make the routing table."""

from __future__ import annotations

import msgspec

from llm_router.accounts.limits import Limits
from llm_router.config.settings import ModelSettings, QueueSettings, RoutingSettings, Settings
from llm_router.models.launch import RunnerSpec
from llm_router.models.prices import Price
from llm_router.processes.tables import (
    MOST_ADMITTED_BACKENDS,
    MOST_ADMITTED_MODELS,
    RunnerAddress,
    admitted,
    routing_table,
)
from llm_router.routing.table import (
    BackendSpec,
    BreakerSpec,
    Deployment,
    ModelSpec,
    QueueSpec,
    RetrySpec,
    RoutingTable,
)

FREE = Price(input=0.0, output=0.0)
LISTED = Price(input=1.0, output=2.0)


def local(name: str, **fields: object) -> ModelSettings:
    runner = RunnerSpec(name=name, path=f"/m/{name}.gguf", embeddings=False)
    return ModelSettings(name=name, file=runner.path, runner=runner, **fields)  # type: ignore[arg-type]


SETTINGS = Settings(
    models=(
        local("tiny", fallbacks=("big",), strategy="least-loaded"),
        ModelSettings(name="big", deployments=(Deployment("far", "gpt"), Deployment("near", "gpt"))),
        local("mixed", deployments=(Deployment("far", "mixed"),)),
    ),
    backends=(BackendSpec(name="far", url="https://far.example/v1"), BackendSpec(name="near", url="http://n/v1")),
    routing=RoutingSettings(default_model="tiny"),
)


def test_every_model_has_its_deployments_the_local_one_first() -> None:
    """Names, fallbacks and strategies as configured; a runner is a backend like any other."""
    table = routing_table(SETTINGS, [], {"tiny": RunnerAddress(4711, "key", True)})
    assert {model.name: [d.backend for d in model.deployments] for model in table.models} == {
        "tiny": ["runner-tiny"],
        "big": ["far", "near"],
        "mixed": ["runner-mixed", "far"],
    }
    assert (table.default_model, table.models[0].fallbacks, table.models[0].strategy) == (
        "tiny",
        ("big",),
        "least-loaded",
    )
    tiny, mixed, *remote = table.backends
    assert (tiny.url, tiny.api_key, tiny.ready, tiny.embeddings) == ("http://127.0.0.1:4711/v1", "key", True, False)
    assert (mixed.ready, mixed.local_model) == (False, "mixed")
    assert tuple(remote) == SETTINGS.backends
    assert "key" not in repr(RunnerAddress(1, "key", True))


def test_models_loaded_at_run_time_are_there_too() -> None:
    """After the configured ones; without a default the first model answers."""
    table = routing_table(Settings(), [local("extra")], {"extra": RunnerAddress(1, "k", True, only_embeds=True)})
    assert (table.default_model, [model.name for model in table.models]) == ("extra", ["extra"])
    assert [backend.only_embeds for backend in table.backends] == [True]
    assert [m.name for m in routing_table(SETTINGS, [local("tiny"), local("new")], {}).models][-1] == "new"
    assert routing_table(Settings(), [], {}).default_model == ""


def named(table: RoutingTable, name: str) -> ModelSpec:
    (model,) = (model for model in table.models if model.name == name)
    return model


def test_what_a_model_is_said_to_be_holds_for_its_deployments() -> None:
    """As far as they do not say otherwise."""
    own = Price(input=3.0, output=4.0)
    model = ModelSettings(
        name="m",
        deployments=(
            Deployment("far", "a"),
            Deployment("far", "b", quality=0.0, price=own, context_tokens=10, capabilities=()),
        ),
        quality=0.5,
        price=LISTED,
        context_tokens=1000,
        capabilities=("tools",),
    )
    (spec,) = routing_table(Settings(models=(model,), backends=SETTINGS.backends), [], {}).models
    assert spec.deployments == (
        Deployment("far", "a", 0.5, LISTED, 1000, ("tools",)),
        Deployment("far", "b", 0.0, own, 10, ()),
    )


def test_prices_come_from_the_list_unless_they_are_known() -> None:
    """What runs here or on a server of one's own costs nothing; a server on this machine is in no list."""
    asked: list[tuple[str, str, str]] = []

    def find(model: str, provider: str, url: str) -> Price | None:
        asked.append((model, provider, url))
        return LISTED if model == "listed" else None

    settings = Settings(
        models=(
            ModelSettings(
                name="m",
                deployments=(
                    Deployment("cloud", "listed"),
                    Deployment("cloud", "new"),
                    Deployment("named", "listed"),
                    Deployment("own", "listed"),
                    Deployment("near", "listed"),
                    Deployment("cloud", "priced", price=LISTED),
                ),
            ),
            local("here"),
            local("sold", price=LISTED),
        ),
        backends=(
            BackendSpec(name="cloud", url="https://api.example/v1"),
            BackendSpec(name="named", url="http://127.0.0.1:4000/v1", provider="openai"),
            BackendSpec(name="own", url="http://10.0.0.1/v1", provider="local"),
            BackendSpec(name="near", url="http://[::1]:8000/v1"),
        ),
    )
    table = routing_table(settings, [], {}, prices=find)
    prices = [d.price for d in named(table, "m").deployments]
    assert prices == [LISTED, None, LISTED, FREE, None, LISTED]
    assert [named(table, name).deployments[0].price for name in ("here", "sold")] == [FREE, LISTED]
    assert asked == [
        ("listed", "", "https://api.example/v1"),
        ("new", "", "https://api.example/v1"),
        ("listed", "openai", "http://127.0.0.1:4000/v1"),
    ]
    assert named(routing_table(settings, [], {}), "m").deployments[0].price is None, "without a list"


def test_a_local_model_has_the_context_it_is_run_with() -> None:
    """At most 4,096 tokens, unless somebody says more."""
    runner = RunnerSpec(name="wide", path="/m/wide.gguf", context_size=32768)
    wide = ModelSettings(name="wide", file=runner.path, runner=runner)
    table = routing_table(Settings(models=(local("plain"), wide)), [], {})
    assert [model.deployments[0].context_tokens for model in table.models] == [4096, 32768]


def test_a_model_has_the_deployments_of_its_members() -> None:
    """Its own first, each once; of members' members too; `all` are those without members, loaded ones included."""
    settings = Settings(
        models=(
            *SETTINGS.models,
            ModelSettings(name="fast", members=("tiny", "big"), deployments=(Deployment("far", "x"),)),
            ModelSettings(name="any", members=("fast", "mixed", "big"), limits=Limits(concurrency=3)),
            ModelSettings(name="every", members="all"),
        ),
        backends=SETTINGS.backends,
    )
    table = routing_table(settings, [local("extra")], {})
    served = {model.name: [(d.backend, d.upstream_model) for d in model.deployments] for model in table.models}
    assert served["fast"] == [("far", "x"), ("runner-tiny", "tiny"), ("far", "gpt"), ("near", "gpt")]
    assert served["any"] == [*served["fast"], ("runner-mixed", "mixed"), ("far", "mixed")]
    assert served["every"] == [
        ("runner-tiny", "tiny"),
        ("far", "gpt"),
        ("near", "gpt"),
        ("runner-mixed", "mixed"),
        ("far", "mixed"),
        ("runner-extra", "extra"),
    ]
    assert (named(table, "any").limits.concurrency, named(table, "fast").limits.concurrency) == (3, 0)
    empty = routing_table(Settings(models=(ModelSettings(name="every", members="all"),)), [], {})
    assert (empty.models[0].deployments, empty.models[0].queue.slots) == ((), 1)


def test_as_many_requests_are_worked_on_as_the_backends_take() -> None:
    """Connections of all workers, slots of runners, each backend once; unless somebody says otherwise."""
    runner = RunnerSpec(name="here", path="/m/here.gguf", parallel=3)
    settings = Settings(
        models=(
            ModelSettings(name="here", file=runner.path, runner=runner, deployments=(Deployment("b", "x"),)),
            ModelSettings(name="far", deployments=(Deployment("b", "x"), Deployment("b", "y"))),
            ModelSettings(name="few", deployments=(Deployment("b", "x"),), queue=QueueSettings(slots=2, wait_s=1.0)),
            ModelSettings(name="none", deployments=(Deployment("b", "x"),), queue=QueueSettings(max_waiting=0)),
        ),
        backends=(BackendSpec(name="b", url="http://n/v1", max_connections=10),),
    )
    table = routing_table(settings, [], {}, workers=4)
    assert [model.queue for model in table.models] == [
        QueueSpec(slots=43),
        QueueSpec(slots=40),
        QueueSpec(slots=2, wait_s=1.0),
        QueueSpec(slots=40, max_waiting=0),
    ]
    narrow = msgspec.structs.replace(settings, routing=RoutingSettings(queue=QueueSpec(slots=5, max_waiting=9)))
    assert [(m.queue.slots, m.queue.max_waiting) for m in routing_table(narrow, [], {}).models] == [
        (5, 9),
        (5, 9),
        (2, 9),
        (5, 0),
    ]


def test_the_rest_of_routing_is_passed_on() -> None:
    """Every field of the table that is configured."""
    routing = RoutingSettings(
        strategy="custom",
        custom="house:choose",
        deadline_s=9.0,
        max_waiting=8,
        shed_lag_s=0.5,
        retry=RetrySpec(attempts=1),
        breaker=BreakerSpec(enabled=False),
    )
    limits = Limits(requests_per_day=7)
    assert routing_table(Settings(routing=routing, limits=limits), [], {}) == RoutingTable(
        strategy="custom",
        custom="house:choose",
        deadline_s=9.0,
        max_waiting=8,
        shed_lag_s=0.5,
        retry=RetrySpec(attempts=1),
        breaker=BreakerSpec(enabled=False),
        limits=limits,
    )


def test_label_values_are_bounded() -> None:
    """However many models and backends there are, so many are counted by name."""
    many = Settings(
        models=tuple(ModelSettings(name=f"m{n}", deployments=(Deployment("b0", "x"),)) for n in range(400)),
        backends=tuple(BackendSpec(name=f"b{n}", url="http://n/v1") for n in range(400)),
    )
    models, backends = admitted(routing_table(many, [], {}))
    assert (len(models), len(backends)) == (MOST_ADMITTED_MODELS, MOST_ADMITTED_BACKENDS)
    assert models[0] == "m0"
