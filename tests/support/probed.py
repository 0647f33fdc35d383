"""Tables and evidence for the probes of health checks: scripted backends as runners and as paid providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_router.models.prices import Price
from llm_router.processes.probes.traffic import Traffic
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RoutingTable

FREE = Price(input=0.0, output=0.0)
PAID = Price(input=1.0, output=2.0)


def local(name: str, url: str, **fields: Any) -> BackendSpec:
    """The runner of a local model."""
    return BackendSpec(
        name=f"runner-{name}", url=url, **{"local_model": name, "provider": "local", "api_key": "runner-k3y", **fields}
    )


def remote(name: str, url: str, **fields: Any) -> BackendSpec:
    return BackendSpec(name=name, url=url, **{"api_key": "sk-s3cret-key", **fields})


def table(backends: Mapping[str, BackendSpec], prices: Mapping[str, Price | None] | None = None) -> RoutingTable:
    """A model for each backend, by the model's name. Those of runners are free, others are `PAID` unless told."""
    return RoutingTable(
        models=tuple(
            ModelSpec(
                name=name,
                deployments=(
                    Deployment(spec.name, name, price=(prices or {}).get(name, FREE if spec.local_model else PAID)),
                ),
            )
            for name, spec in backends.items()
        ),
        backends=tuple(backends.values()),
    )


class Evidence:
    """Traffic that a test makes up; `read` is what probes are given."""

    def __init__(self) -> None:
        self._by_backend: dict[str, Traffic] = {}

    def read(self) -> dict[str, Traffic]:
        return dict(self._by_backend)

    def add(self, backend: str, successes: float = 0.0, failures: float = 0.0) -> None:
        before = self._by_backend.get(backend, Traffic())
        self._by_backend[backend] = before._replace(
            successes=before.successes + successes, failures=before.failures + failures
        )

    def in_flight(self, backend: str, count: float) -> None:
        self._by_backend[backend] = self._by_backend.get(backend, Traffic())._replace(in_flight=count)
