"""All probes together in the real scheduler: names, weights, timeouts, and nothing that counts as traffic."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_router.observe.health.scheduler import HealthChecks
from llm_router.observe.health.settings import CheckSettings, ExternalTarget, HealthSettings, Validation
from llm_router.processes.probes.losses import Losses
from llm_router.processes.probes.standard import Probes, Sources
from llm_router.processes.probes.worker_caches import WorkerCaches
from llm_router.testing import ScriptedBackend
from support.aio import run
from support.net import free_port
from support.probed import Evidence, local, remote, table

NAMES = ("inference_capability", "cache_functionality", "database", "backends", "logs", "traces")


class Registered:
    """A registry that keeps what it is told."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}

    def add_check(self, name: str, function: Any, **options: Any) -> None:
        self.options[name] = {key: value for key, value in options.items() if value not in {None, False}}


def probes(tmp_path: Path, backend: ScriptedBackend, settings: HealthSettings) -> Probes:
    routing = table({"small": local("small", backend.base_url), "gpt": remote("openai", backend.base_url)})
    sources = Sources(
        table=lambda: routing,
        traffic=Evidence().read,
        cache=WorkerCaches(list, lambda: False).check,
        database=lambda: None,
        logs=lambda: Losses({}),
        traces=lambda: Losses({}),
    )
    return Probes(settings, sources, purse_path=str(tmp_path / "probes.json"))


def test_what_is_registered(tmp_path: Path) -> None:
    """The guide's names; more for what is configured, with its weight and interval."""
    settings = HealthSettings(
        external=(ExternalTarget(name="vault", target="tcp://127.0.0.1:1", critical=True),),
        validate=(
            Validation(name="sums", model="small", prompt="2+2?"),
            Validation(name="hourly", model="small", prompt="2+2?", interval_s=3600.0),
        ),
    )
    registered = Registered()
    with ScriptedBackend() as backend:
        probes(tmp_path, backend, settings).register(registered)
    assert registered.options.keys() == {*NAMES, "external_vault", "model_sums", "model_hourly"}
    assert registered.options["inference_capability"] == {"timeout": 30.0}
    assert registered.options["external_vault"] == {"critical": True}
    assert registered.options["model_sums"] == {"timeout": 30.0}
    assert registered.options["model_hourly"] == {"timeout": 30.0, "interval": 3600.0, "fall": 1, "rise": 1}
    assert registered.options["logs"] == {"fall": 1}


def test_what_has_no_source_has_no_check() -> None:
    """Library mode has no workers, and may have no database."""
    registered = Registered()
    sources = Sources(table=lambda: table({}), traffic=dict)
    Probes(HealthSettings(), sources, purse_path="").register(registered)
    assert registered.options.keys() == {"inference_capability", "backends"}


def test_an_expectation_that_is_none_is_refused_at_once() -> None:
    """Not when it is first checked."""
    settings = HealthSettings(validate=(Validation(name="bad", model="m", prompt="p", expect="["),))
    with pytest.raises(ValueError, match=re.escape("what is expected of 'bad'")):
        Probes(settings, Sources(table=lambda: table({}), traffic=dict), purse_path="")


def test_all_run_in_the_scheduler(tmp_path: Path) -> None:
    """Each passes on a router that is well, and says which one does not on one that is not."""
    target = f"tcp://127.0.0.1:{free_port()}"

    async def scene(backend: ScriptedBackend) -> None:
        settings = HealthSettings(
            external=(ExternalTarget(name="dead", target=target),),
            validate=(Validation(name="words", model="small", prompt="Say something"),),
            checks={"model_words": CheckSettings(timeout_s=3.0)},
        )
        checks = HealthChecks(settings, clock=time.monotonic, wall=time.time, rng=random.Random(1))
        probes(tmp_path, backend, settings).register(checks)
        results = await checks.run_all_checks()
        assert {name for name, result in results.items() if not result.check.is_healthy} == {"external_dead"}
        assert results["external_dead"].check.message.startswith(target)
        assert all(result.is_success for result in results.values())
        await checks.aclose()

    with ScriptedBackend() as backend:
        run(scene(backend))
        assert {request.method for request in backend.requests} == {"GET", "POST"}
        assert all("sk-s3cret-key" not in str(r.headers) for r in backend.requests if r.method == "POST")


def test_control_is_ready_before_what_sends_requests_is_imported() -> None:
    """All checks can be registered without it."""
    code = (
        "import sys; import llm_router.processes.control; "
        "late = {'llm_router.routing.router', 'llm_router.backends.connections'}; "
        "assert not late & sys.modules.keys(), late & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_worker_needs_of_it_is_small() -> None:
    """The probe of the cache brings neither the checks nor anything large into a worker."""
    code = (
        "import sys; import llm_router.processes.probes.cache; "
        "large = {'sqlalchemy', 'redis', 'starlette', 'yaml', 'numpy'} | "
        "{'llm_router.observe.health.checks', 'llm_router.routing.router'}; "
        "assert not large & sys.modules.keys(), large & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
