"""The checker: one's own checks and the machine's, with and without a router, and its endpoints."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from llm_router import HealthChecker, LLMRouter, MetricsCollector
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import ServerSettings
from llm_router.families import INFERENCE
from llm_router.observe.health.settings import CheckSettings, HealthSettings
from llm_router.routing.table import BackendSpec, Deployment
from llm_router.testing import ScriptedBackend
from support.aio import run, until


def request(accept: str = "") -> Request:
    return Request({"type": "http", "headers": [(b"accept", accept.encode())]})


def test_checks_of_ones_own() -> None:
    """Each runs when it is asked to; what it raises is a failure, an unknown one is named."""

    async def scenario() -> None:
        health = HealthChecker(timeout=1, retries=1)
        health.add_check("jobs", lambda: {"healthy": True, "message": "12 wait", "details": {"waiting": 12}})
        health.add_check("stock", lambda: False, critical=True)

        async def boom() -> bool:
            raise ConnectionError("refused")

        health.add_check("search", boom)
        found = await health.run_check("jobs")
        assert (found["healthy"], found["message"], found["details"]) == (True, "12 wait", {"waiting": 12})
        assert (found["status"], found["success"]) == ("healthy", True)
        assert found["duration"] >= 0
        results = await health.run_all_checks()
        assert {"jobs", "stock", "search", "cpu_usage", "memory_usage", "disk_usage"} <= set(results)
        assert not {"workers", "runners", "router_initialized", "models"} & set(results)
        assert (results["search"]["success"], results["search"]["healthy"]) == (False, False)
        assert "refused" in results["search"]["error"]
        assert results["search"]["status"] == "degraded"
        document = await health.get_health_status()
        assert document["status"] == "critical"
        assert document["summary"]["unhealthy"] >= 2
        assert health.report().http_status == 503
        assert [health.is_critical(name) for name in ("stock", "jobs", "memory_usage", "disk_space")] == [
            True,
            False,
            True,
            False,
        ]
        health.remove_check("stock")
        assert (await health.get_health_status())["status"] == "degraded"
        for ask in (health.remove_check, health.is_critical):
            with pytest.raises(ValueError, match="there is no check 'nothing'; there are: "):
                ask("nothing")
        with pytest.raises(ValueError, match="there is no check 'nothing'"):
            await health.run_check("nothing")

    run(scenario())


def test_what_cannot_be_a_check_is_named() -> None:
    """Names of the machine's checks are taken; those of a router are not, where there is none."""

    async def scenario() -> None:
        health = HealthChecker()
        for name in ("cpu_usage", "disk_space", "health_checks"):
            with pytest.raises(ValueError, match=f"a check cannot be called '{name}'"):
                health.add_check(name, lambda: True)
        health.add_check("models", lambda: True)
        with pytest.raises(ValueError, match="is no function but int"):
            health.add_check("x", 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="timeout is -1; it is more than 0"):
            HealthChecker(timeout=-1)

    run(scenario())


def test_checks_run_by_themselves_until_they_are_stopped() -> None:
    """And again after that; both may be said twice."""

    async def scenario() -> None:
        seen: list[int] = []
        turned: list[str] = []
        told: list[str] = []
        health = HealthChecker(
            interval=0.01, retries=1, on_result=lambda name, seconds: told.append(name), on_transition=turned.append
        )
        is_well = True

        def check() -> bool:
            seen.append(1)
            return is_well

        health.add_check("own", check)
        await health.start()
        await health.start()
        await until(lambda: len(seen) > 1)
        is_well = False
        await until(lambda: "own" in turned)
        assert {reading.labels[0]: reading.value for reading in health.readings()}["own"] == 0.5
        await health.stop()
        await health.stop()
        assert not health.is_running
        count = len(seen)
        await health.start()
        await until(lambda: len(seen) > count)
        await health.stop()
        assert "own" in told

    run(scenario())


def test_the_endpoints(tmp_path: Path) -> None:
    """Liveness depends on nothing; the two others answer 503 while something critical fails."""

    async def scenario() -> None:
        health = HealthChecker(settings=HealthSettings(fall=1, checks={"cpu_usage": CheckSettings(enabled=False)}))
        is_well = True
        health.add_check("own", lambda: is_well, critical=True)
        pages = health.middleware()
        await health.get_health_status()
        ready = await pages.readiness(request())
        assert (ready.status_code, set(json.loads(bytes(ready.body)))) == (200, {"status", "timestamp"})
        whole = json.loads(bytes((await pages.health(request())).body))
        assert "cpu_usage" not in whole["checks"]
        is_well = False
        await health.get_health_status()
        assert [(await page(request())).status_code for page in pages] == [200, 503, 503]
        ietf = await pages.health(request("application/health+json"))
        assert (ietf.media_type, json.loads(bytes(ietf.body))["status"]) == ("application/health+json", "fail")

    run(scenario())


def test_a_router_is_checked_too(tmp_path: Path) -> None:
    """Its state, its cache and its backends, without counting as traffic."""

    async def scenario(url: str) -> None:
        settings = Settings(
            server=ServerSettings(data_dir=str(tmp_path), environment="staging"),
            models=(ModelSettings(name="m", deployments=(Deployment("b", "scripted"),)),),
            backends=(BackendSpec(name="b", url=url),),
        )
        router = LLMRouter(settings)
        health = HealthChecker(router)
        assert health.report().status == "initializing"
        assert health.report().http_status == 503
        async with router:
            document = await health.get_health_status()
            checks: dict[str, Any] = document["checks"]
            assert {"router_initialized", "models_available", "cache_functionality", "inference_capability"} <= set(
                checks
            )
            assert "workers" not in checks
            assert document["models"] == {"loaded": 1, "failed": 0, "registry_size": 1}
            assert (document["environment"], document["engine"]) == ("staging", "llama.cpp")
            assert checks["backends"]["healthy"]
            inferences = [row.values[0] for row in MetricsCollector(inside=router.inside()).collected().rows(INFERENCE)]
            assert sum(inferences) == 0  # probes are no traffic
            await router.quick("hi")
            assert (await health.run_check("inference_capability"))["healthy"]

    with ScriptedBackend() as backend:
        run(scenario(backend.base_url))


def test_what_blocks_does_not_block_the_loop() -> None:
    """A check that hangs is given up; the others have run."""

    async def scenario() -> None:
        health = HealthChecker(timeout=0.05)
        health.add_check("hangs", lambda: asyncio.Event().wait())
        health.add_check("fine", lambda: True)
        results = await health.run_all_checks()
        assert results["fine"]["healthy"]
        assert (results["hangs"]["success"], results["hangs"]["healthy"]) == (False, False)

    run(scenario())
