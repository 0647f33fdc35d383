"""The checks that touch something, as control registers them: names, weights, and how long each may take.

    probes = Probes(settings.health, Sources(...), purse_path=...)
    probes.register(checks)            # an observe.health.scheduler.HealthChecks

Not for: checks of state that control knows anyway (observe/health/report.py).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from llm_router.observe.health.checks import Check
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.processes.probes.asking import TIMEOUT_S
from llm_router.processes.probes.database import DatabaseCheck
from llm_router.processes.probes.endpoints import Endpoints
from llm_router.processes.probes.external import ExternalCheck
from llm_router.processes.probes.inference import InferenceCheck
from llm_router.processes.probes.losses import LossCheck, Losses
from llm_router.processes.probes.purse import Purse
from llm_router.processes.probes.traffic import Traffic
from llm_router.processes.probes.validation import ValidationCheck
from llm_router.routing.table import RoutingTable

SELDOM_S: Final = 300.0
"""A check that runs less often than this counts at once: three failures of an hourly one would be half a morning."""


class Registry(Protocol):
    """Where checks are added, as `observe.health.scheduler.HealthChecks`."""

    def add_check(
        self,
        name: str,
        function: Callable[[], Any],
        *,
        critical: bool = False,
        interval: float | None = None,
        timeout: float | None = None,
        fall: int | None = None,
        rise: int | None = None,
    ) -> None: ...


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks look at. Those that are None have no check.

    Args:
        table: the routing table of now.
        traffic: attempts and requests in flight by backend, see `traffic.traffic_in`.
        cache: the check of it, `WorkerCaches.check` or `OwnCache.check`.
        database: a query; blocks, and raises RouterError with what is wrong.
        logs, traces: what was lost.
    """

    table: Callable[[], RoutingTable]
    traffic: Callable[[], Mapping[str, Traffic]]
    cache: Callable[[], Awaitable[Check]] | None = None
    database: Callable[[], object] | None = None
    logs: Callable[[], Losses] | None = None
    traces: Callable[[], Losses] | None = None


class Probes:
    """Every such check of one router.

    Args:
        purse_path: the file that remembers what probes cost today.
        clock, wall: monotonic and Unix seconds.

    Raises: ValueError when an expectation is no regular expression.
    """

    def __init__(
        self,
        settings: HealthSettings,
        sources: Sources,
        *,
        purse_path: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._sources = sources
        self.purse = Purse(purse_path, settings.paid_probe_daily_usd, wall=wall)
        self.endpoints = Endpoints(
            sources.table, sources.traffic, timeout_s=self._timeout_s("backends", settings.timeout_s), clock=clock
        )
        self.inference = InferenceCheck(
            sources.table,
            sources.traffic,
            endpoint=self.endpoints.problem,
            purse=self.purse,
            timeout_s=self._timeout_s("inference_capability", TIMEOUT_S),
            clock=clock,
        )
        self._validations = {
            f"model_{one.name}": (
                one,
                ValidationCheck(
                    one,
                    sources.table,
                    sources.traffic,
                    purse=self.purse,
                    timeout_s=self._timeout_s(f"model_{one.name}", TIMEOUT_S),
                    clock=clock,
                ),
            )
            for one in settings.validate
        }
        self._external = {
            f"external_{one.name}": (
                one,
                ExternalCheck(
                    one,
                    # Its own words come before the scheduler's.
                    timeout_s=0.9 * self._timeout_s(f"external_{one.name}", settings.timeout_s),
                    clock=clock,
                    wall=wall,
                ),
            )
            for one in settings.external
        }

    def __repr__(self) -> str:
        return f"<Probes {len(self._external)} external, {len(self._validations)} validations, {self.purse!r}>"

    def register(self, registry: Registry) -> None:
        """Add every check. What the settings say of a single one has the last word, in the registry.

        Raises: what `add_check` raises.
        """
        sources = self._sources
        registry.add_check("inference_capability", self.inference.check, timeout=TIMEOUT_S)
        if sources.cache is not None:
            registry.add_check("cache_functionality", sources.cache)
        if sources.database is not None:
            registry.add_check("database", DatabaseCheck(sources.database).check)
        registry.add_check("backends", self.endpoints.check)
        for name, read, what in (("logs", sources.logs, "log lines"), ("traces", sources.traces, "spans")):
            if read is not None:
                registry.add_check(name, LossCheck(what, read).check, fall=1)  # what is lost is lost for sure
        for name, (target, reach) in self._external.items():
            registry.add_check(name, reach.check, critical=target.critical)
        for name, (validation, ask) in self._validations.items():
            count = 1 if (validation.interval_s or 0.0) > SELDOM_S else None
            registry.add_check(
                name, ask.check, interval=validation.interval_s, timeout=TIMEOUT_S, fall=count, rise=count
            )

    def _timeout_s(self, name: str, usual_s: float) -> float:
        return self._settings.checks.get(name, CheckSettings()).timeout_s or usual_s
