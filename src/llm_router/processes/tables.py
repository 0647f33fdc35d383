"""Turns settings and the state of runners into the routing table that workers use. Pure.

Not for: reading settings (config), finding prices (models/price_list.py) or finding out whether backends answer
(backends.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from llm_router import families
from llm_router.config.exposure import is_loopback
from llm_router.config.presets import LOCAL
from llm_router.config.settings import ModelSettings, Settings
from llm_router.models.launch import MOST_CONTEXT
from llm_router.models.prices import Price
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec, RoutingTable

MOST_ADMITTED_MODELS = families.INFERENCE.cap // 6
"""Models that are label values: three statuses, cached or not, are six rows of `inference_total` each."""

MOST_ADMITTED_BACKENDS = families.ATTEMPTS.cap // 6
"""Backends that are label values: `attempts_total` has a row for success, cancelled and four fault domains."""

PriceFinder = Callable[[str, str, str], Price | None]
"""What a model costs: its name at the backend, whose price list counts (empty: by the address), the backend's URL."""

_FREE = Price(input=0.0, output=0.0)


class RunnerAddress(msgspec.Struct, frozen=True):
    """Where the runner of a model listens. `is_ready` is False while it loads, restarts or leaves; `only_embeds` is True
    for a model that answers no prompts."""

    port: int = 0
    key: str = ""
    is_ready: bool = False
    only_embeds: bool = False

    def __repr__(self) -> str:
        return f"RunnerAddress(port={self.port}, is_ready={self.is_ready})"


def runner_backend(model: str) -> str:
    """The name of the backend that a local model's runner is; also its `process` label."""
    return f"runner-{model}"


def no_prices(model: str, provider: str, url: str) -> Price | None:
    """A `PriceFinder` without a list: only what is configured, or runs here, has a price."""
    return None


def routing_table(
    settings: Settings,
    loaded: Iterable[ModelSettings],
    runners: Mapping[str, RunnerAddress],
    *,
    prices: PriceFinder = no_prices,
    workers: int = 1,
) -> RoutingTable:
    """The table for these settings.

    Args:
        loaded: local models that are not in the settings, loaded at run time.
        runners: by model name; one that is missing is not ready.
        prices: asked for each deployment that has no price of its own and does not run here.
        workers: how many connect to the backends, each with its own `max_connections`.
    """
    configured = {model.name for model in settings.models}
    models = [*settings.models, *(model for model in loaded if model.name not in configured)]
    local = [_runner_spec(model, runners.get(model.name, RunnerAddress())) for model in models if model.file]
    taken = {spec.name for spec in local}
    backends = (*local, *(spec for spec in settings.backends if spec.name not in taken))
    return _Build(settings, models, backends, prices, workers).table()


def admitted(table: RoutingTable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The models and the backends whose names may be label values: the first ones, up to the bounds above."""
    models = tuple(model.name for model in table.models[:MOST_ADMITTED_MODELS])
    return models, tuple(backend.name for backend in table.backends[:MOST_ADMITTED_BACKENDS])


class _Build:
    """One making of a table."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[ModelSettings],
        backends: tuple[BackendSpec, ...],
        prices: PriceFinder,
        workers: int,
    ) -> None:
        self._settings = settings
        self._models = {model.name: model for model in models}
        self._backends = backends
        self._prices = prices
        specs = {spec.name: spec for spec in backends}
        self._specs = specs
        self._slots = {name: self._slots_of(spec, workers) for name, spec in specs.items()}
        self._own = {model.name: self._own_deployments(model) for model in models}

    def table(self) -> RoutingTable:
        routing = self._settings.routing
        return RoutingTable(
            models=tuple(self._model(model) for model in self._models.values()),
            backends=self._backends,
            default_model=routing.default_model or next(iter(self._models), ""),
            strategy=routing.strategy,
            custom=routing.custom,
            retry=routing.retry,
            breaker=routing.breaker,
            deadline_s=routing.deadline_s,
            max_waiting=routing.max_waiting,
            shed_lag_s=routing.shed_lag_s,
            limits=self._settings.limits,
        )

    def _model(self, model: ModelSettings) -> ModelSpec:
        # Two members may have the same deployment; a dict keeps the order.
        deployments = tuple(
            {(one.backend, one.upstream_model): one for one in self._deployments(model, set())}.values()
        )
        return ModelSpec(
            name=model.name,
            deployments=deployments,
            fallbacks=model.fallbacks,
            strategy=model.strategy or "",
            queue=self._queue(model, deployments),
            limits=model.limits,
        )

    def _deployments(self, model: ModelSettings, seen: set[str]) -> Iterator[Deployment]:
        """Its own and its members', each model's once."""
        seen.add(model.name)
        yield from self._own[model.name]
        if model.members == "all":
            members = [name for name, other in self._models.items() if not other.members]
        else:
            members = list(model.members)
        for name in members:
            if name not in seen:
                yield from self._deployments(self._models[name], seen)

    def _own_deployments(self, model: ModelSettings) -> tuple[Deployment, ...]:
        here: tuple[Deployment, ...] = ()
        if model.runner is not None:
            here = (
                Deployment(
                    runner_backend(model.name),
                    model.name,
                    quality=model.quality,
                    price=model.price or _FREE,
                    # What it was trained for may be less, which its header would say.
                    context_tokens=model.context_tokens or model.runner.context_size or MOST_CONTEXT,
                    capabilities=model.capabilities,
                ),
            )
        return here + tuple(
            Deployment(
                one.backend,
                one.upstream_model,
                quality=model.quality if one.quality is None else one.quality,
                price=one.price or model.price or self._price(one),
                context_tokens=one.context_tokens or model.context_tokens,
                capabilities=model.capabilities if one.capabilities is None else one.capabilities,
            )
            for one in model.deployments
        )

    def _price(self, deployment: Deployment) -> Price | None:
        spec = self._specs[deployment.backend]
        if spec.provider == LOCAL:
            return _FREE
        if not spec.provider and is_loopback(urlsplit(spec.url).hostname or ""):
            return None  # no provider has its address on this machine; and the list is large
        return self._prices(deployment.upstream_model, spec.provider, spec.url)

    def _queue(self, model: ModelSettings, deployments: Iterable[Deployment]) -> QueueSpec:
        queue = model.queue.over(self._settings.routing.queue)
        if queue.slots:
            return queue
        backends = {one.backend for one in deployments}
        return msgspec.structs.replace(queue, slots=max(1, sum(self._slots[name] for name in backends)))

    def _slots_of(self, spec: BackendSpec, workers: int) -> int:
        """Requests that a backend works on at once."""
        model = self._models.get(spec.local_model)
        if model is not None and model.runner is not None:
            return model.runner.parallel
        return spec.max_connections * workers


def _runner_spec(model: ModelSettings, address: RunnerAddress) -> BackendSpec:
    return BackendSpec(
        name=runner_backend(model.name),
        url=f"http://127.0.0.1:{address.port}/v1",
        api_key=address.key,
        connect_s=2.0,  # loopback
        embeddings=model.runner.embeddings if model.runner is not None else None,
        provider=LOCAL,
        local_model=model.name,
        only_embeds=address.only_embeds,
        ready=address.is_ready,
    )
