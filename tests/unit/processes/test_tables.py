"""Settings and runners make the routing table."""

from __future__ import annotations

from llm_router.config.settings import ModelSettings, RoutingSettings, Settings
from llm_router.models.launch import RunnerSpec
from llm_router.processes.tables import (
    MOST_ADMITTED_BACKENDS,
    MOST_ADMITTED_MODELS,
    RunnerAddress,
    admitted,
    routing_table,
)
from llm_router.routing.table import BackendSpec, Deployment


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
    table = routing_table(Settings(), [local("extra")], {"extra": RunnerAddress(1, "k", True)})
    assert (table.default_model, [model.name for model in table.models]) == ("extra", ["extra"])
    assert [m.name for m in routing_table(SETTINGS, [local("tiny"), local("new")], {}).models][-1] == "new"
    assert routing_table(Settings(), [], {}).default_model == ""


def test_label_values_are_bounded() -> None:
    """However many models and backends there are, so many are counted by name."""
    many = Settings(
        models=tuple(ModelSettings(name=f"m{n}", deployments=(Deployment("b0", "x"),)) for n in range(400)),
        backends=tuple(BackendSpec(name=f"b{n}", url="http://n/v1") for n in range(400)),
    )
    models, backends = admitted(routing_table(many, [], {}))
    assert (len(models), len(backends)) == (MOST_ADMITTED_MODELS, MOST_ADMITTED_BACKENDS)
    assert models[0] == "m0"
