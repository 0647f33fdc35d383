"""The monitored router: everything once, whatever way it came."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from llm_router import BackendError, ConfigError, MonitoredLLMRouter, StructuredLogger, families
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import MetricsSettings, RoutingSettings, ServerSettings
from llm_router.library.listener import Listener
from llm_router.observe.health.settings import HealthSettings
from llm_router.observe.logs.schema import problems
from llm_router.routing.table import BackendSpec, Deployment, RetrySpec
from llm_router.testing import ScriptedBackend, json_reply
from support.aio import run
from support.ask import ask


def settings(url: str, folder: Path, **changes: Any) -> Settings:
    return Settings(
        **{
            "server": ServerSettings(data_dir=str(folder), log_dir=str(folder / "logs"), drain_s=5.0),
            "models": (ModelSettings(name="m", deployments=(Deployment("b", "scripted"),)),),
            "backends": (BackendSpec(name="b", url=url),),
            **changes,
        }
    )


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def total(router: MonitoredLLMRouter, family: Any, **where: str) -> float:
    return router.metrics.collected().total(family, **where)


def test_quick_is_counted_once(backend: ScriptedBackend, tmp_path: Path) -> None:
    """Beside what the program counts itself; failures too. `metrics` is the collector, called it is the text."""

    async def scenario() -> None:
        made = settings(backend.base_url, tmp_path, routing=RoutingSettings(retry=RetrySpec(attempts=1)))
        async with MonitoredLLMRouter(made) as router:
            await router.quick("hi", maxTokens=3)
            backend.always(json_reply({"error": {"message": "bad"}}, 400))
            with pytest.raises(BackendError):
                await router.quick("hi")
            router.metrics.counter("orders").inc()
            router.metrics.queue_size_change("mine", 4)
            assert total(router, families.INFERENCE, status="success") == 1
            assert total(router, families.INFERENCE) == 2
            assert total(router, families.TOKENS_GENERATED) == 3
            text = router.metrics().decode()
            assert "orders_total 1.0" in text
            assert 'llm_router_queue_size{queue_type="mine"} 4.0' in text
            assert 'llm_router_models_loaded{format="remote",size_category="remote"} 1.0' in text
            router.metrics.reset()
            assert total(router, families.INFERENCE) == 0
            assert "orders_total 0.0" in router.metrics.get_metrics()

    run(scenario())


def test_the_metrics_server(backend: ScriptedBackend, tmp_path: Path) -> None:
    """Metrics, health with the figures of the examples, debug; once, and not for foreign pages."""

    async def scenario() -> None:
        router = MonitoredLLMRouter(settings(backend.base_url, tmp_path))
        listener = await router.start_metrics_server(port=0)
        assert await router.start_metrics_server(port=0) is listener
        address = ("127.0.0.1", listener.port)
        starting = await ask(address, "/health")
        assert (starting.status, starting.json()["status"]) == (503, "initializing")
        async with router:
            await router.quick("hi")
            assert "llm_router_inference_total{" in (await ask(address, "/metrics")).text
            assert any(f["name"] == "llm_router_inference_total" for f in (await ask(address, "/metrics/json")).json())
            await router.health.run_all_checks()
            health = (await ask(address, "/health")).json()
            assert health["status"] in ("healthy", "degraded")
            assert {"uptime", "memory", "models", "engine", "version", "environment", "summary"} <= set(health)
            assert (await ask(address, "/health/ready")).status == 200
            debug = (await ask(address, "/debug")).json()
            assert (debug["status"]["models"], debug["traces"]) == ({"m": "loaded"}, None)
            (model,) = (await ask(address, "/debug/models?model=m")).json()["models"]
            assert model["requests"]["success"] == 1
            assert (await ask(address, "/debug/models?model=x")).status == 404
            refused = await ask(address, "/metrics", headers={"host": "evil.example"})
            assert refused.status == 421
            with pytest.raises(ConfigError, match="taken by another program"):
                await MonitoredLLMRouter(settings(backend.base_url, tmp_path)).start_metrics_server(listener.port)
        with pytest.raises(ConnectionRefusedError):
            await ask(address, "/metrics")
        await router.stop_metrics_server()

    run(scenario())


def test_other_machines_need_somebody_who_knows(tmp_path: Path, backend: ScriptedBackend) -> None:
    """And get no `/debug` even then."""

    async def scenario() -> None:
        router = MonitoredLLMRouter(settings(backend.base_url, tmp_path))
        with pytest.raises(ConfigError, match="insecure=True"):
            await router.start_metrics_server(0, "0.0.0.0")
        with pytest.raises(ConfigError, match="99999 is no port"):
            await router.start_metrics_server(99_999)
        with pytest.raises(ConfigError, match="cannot listen on 192.0.2.1"):
            await router.start_metrics_server(0, "192.0.2.1", insecure=True)
        assert router._listener is None
        listener = await router.start_metrics_server(0, "0.0.0.0", insecure=True)
        assert (await ask(("127.0.0.1", listener.port), "/metrics")).status == 200
        assert (await ask(("127.0.0.1", listener.port), "/debug")).status == 404
        await router.cleanup()

    run(scenario())


def test_inside_somebodys_application_it_is_counted_once(backend: ScriptedBackend, tmp_path: Path) -> None:
    """Though a middleware of the same collector measures around it; log lines are written once, too."""

    async def scenario() -> None:
        logger = StructuredLogger(log_dir=tmp_path / "logs", console="off", env={})
        router = MonitoredLLMRouter(settings(backend.base_url, tmp_path), logger=logger)
        router.tell(logger)  # a second time does nothing
        async with router:
            app = Starlette(
                routes=[Mount("/llm", app=router.asgi())],
                middleware=[Middleware(logger.middleware), Middleware(router.metrics.middleware)],
            )
            listener = Listener(app, host="127.0.0.1", port=0)
            await listener.start()
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            address = ("127.0.0.1", listener.port)
            assert (await ask(address, "/llm/v1/chat/completions", method="POST", body=body)).status == 200
            assert (await ask(address, "/elsewhere")).status == 404
            await router.quick("hi")
            assert total(router, families.HTTP_REQUESTS, route="/v1/chat/completions") == 1
            assert total(router, families.HTTP_REQUESTS) == 3  # with the 404, and `quick` under the route `library`
            assert total(router, families.REQUESTS_IN_FLIGHT) == 0
            assert total(router, families.INFERENCE) == 2
            await listener.aclose()
        logger.close()
        lines = {
            name: [json.loads(line) for line in (tmp_path / "logs" / f"{name}.log").read_text().splitlines()]
            for name in ("access", "application")
        }
        assert [line["request"]["path"] for line in lines["access"]] == ["/v1/chat/completions", "/elsewhere"]
        done = [line for line in lines["application"] if line["message"] == "Inference completed"]
        assert [line["inference"]["tokens"] for line in done] == [6, 6]
        assert [problems("application", line) for line in lines["application"]] == [[]] * len(lines["application"])

    run(scenario())


def test_what_the_configuration_switches_off_is_off(backend: ScriptedBackend, tmp_path: Path) -> None:
    """No route for it."""

    async def scenario() -> None:
        made = settings(
            backend.base_url,
            tmp_path,
            metrics=MetricsSettings(enabled=False),
            health=HealthSettings(enabled=False),
        )
        async with MonitoredLLMRouter(made) as router:
            await router.quick("hi")
            listener = await router.start_metrics_server(0)
            answers = [(await ask(("127.0.0.1", listener.port), path)).status for path in ("/metrics", "/health")]
            assert answers == [404, 404]
            assert router.metrics() == b""
            assert not router.health.is_running

    run(scenario())


def test_a_failed_call_is_logged_once(backend: ScriptedBackend, tmp_path: Path) -> None:
    """As an error where it is the backend's fault."""
    backend.always(json_reply({"error": {"message": "bad"}}, 500))

    async def scenario() -> None:
        logger = StructuredLogger(log_dir=tmp_path / "logs", console="off", env={})
        async with MonitoredLLMRouter(settings(backend.base_url, tmp_path), logger=logger) as router:
            with pytest.raises(BackendError):
                await router.quick("hi")
        logger.close()
        (line,) = [
            json.loads(line)
            for line in (tmp_path / "logs" / "error.log").read_text().splitlines()
            if json.loads(line)["message"] == "Inference failed"
        ]
        assert problems("error", line) == []
        assert (line["inference"]["success"], line["inference"]["backend"]) == (False, "b")

    run(scenario())


def test_ports_are_given_back(backend: ScriptedBackend, tmp_path: Path) -> None:
    """Stopped, the address is free again."""

    async def scenario() -> None:
        async with MonitoredLLMRouter(settings(backend.base_url, tmp_path)) as router:
            listener = await router.start_metrics_server(0)
            await router.stop_metrics_server()
            socket.create_server(("127.0.0.1", listener.port)).close()

    run(scenario())
