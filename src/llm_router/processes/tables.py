"""Turns settings and the state of runners into the routing table that workers use. Pure.

Not for: reading settings (config) or finding out whether backends answer (backends.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from llm_router import families
from llm_router.config.settings import ModelSettings, Settings
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RoutingTable

MOST_ADMITTED_MODELS = families.INFERENCE.cap // 6
"""Models that are label values: three statuses, cached or not, are six rows of `inference_total` each."""

MOST_ADMITTED_BACKENDS = families.ATTEMPTS.cap // 6
"""Backends that are label values: `attempts_total` has a row for success, cancelled and four fault domains."""


class RunnerAddress(msgspec.Struct, frozen=True):
    """Where the runner of a model listens. `is_ready` is False while it loads, restarts or leaves."""

    port: int = 0
    key: str = ""
    is_ready: bool = False

    def __repr__(self) -> str:
        return f"RunnerAddress(port={self.port}, is_ready={self.is_ready})"


def runner_backend(model: str) -> str:
    """The name of the backend that a local model's runner is; also its `process` label."""
    return f"runner-{model}"


def routing_table(
    settings: Settings, loaded: Iterable[ModelSettings], runners: Mapping[str, RunnerAddress]
) -> RoutingTable:
    """The table for these settings.

    Args:
        loaded: local models that are not in the settings, loaded at run time.
        runners: by model name; one that is missing is not ready.
    """
    configured = {model.name for model in settings.models}
    models = [*settings.models, *(model for model in loaded if model.name not in configured)]
    local = [_runner_spec(model, runners.get(model.name, RunnerAddress())) for model in models if model.file]
    taken = {spec.name for spec in local}
    return RoutingTable(
        models=tuple(_model_spec(model) for model in models),
        backends=(*local, *(spec for spec in settings.backends if spec.name not in taken)),
        default_model=settings.routing.default_model or (models[0].name if models else ""),
        strategy=settings.routing.strategy,
        retry=settings.routing.retry,
    )


def admitted(table: RoutingTable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The models and the backends whose names may be label values: the first ones, up to the bounds above."""
    models = tuple(model.name for model in table.models[:MOST_ADMITTED_MODELS])
    return models, tuple(backend.name for backend in table.backends[:MOST_ADMITTED_BACKENDS])


def _model_spec(model: ModelSettings) -> ModelSpec:
    local = (Deployment(runner_backend(model.name), model.name),) if model.file else ()
    return ModelSpec(
        name=model.name,
        deployments=local + model.deployments,
        fallbacks=model.fallbacks,
        strategy=model.strategy or "",
    )


def _runner_spec(model: ModelSettings, address: RunnerAddress) -> BackendSpec:
    return BackendSpec(
        name=runner_backend(model.name),
        url=f"http://127.0.0.1:{address.port}/v1",
        api_key=address.key,
        connect_s=2.0,  # loopback
        embeddings=model.runner.embeddings if model.runner is not None else None,
        local_model=model.name,
        ready=address.is_ready,
    )
