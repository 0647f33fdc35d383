"""The whole program: models' API, monitoring and routes of one's own, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from llm_router import ConfigError, MonitoredApplication, families
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import ServerSettings
from llm_router.library.listener import Listener
from llm_router.observe.logs.schema import FILES, problems
from llm_router.routing.table import BackendSpec, Deployment
from llm_router.testing import Gate, Hold, ScriptedBackend, json_reply
from support.aio import run, until
from support.ask import ask

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def settings(url: str, folder: Path) -> Settings:
    return Settings(
        server=ServerSettings(data_dir=str(folder), log_dir=str(folder / "logs"), drain_s=5.0, environment="test"),
        models=(ModelSettings(name="m", deployments=(Deployment("b", "scripted"),)),),
        backends=(BackendSpec(name="b", url=url),),
    )


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def application(backend: ScriptedBackend, folder: Path, **options: Any) -> MonitoredApplication:
    return MonitoredApplication(settings(backend.base_url, folder), **{"logging": {"console": "off"}, **options})


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line, each as its file's schema says."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in FILES:
        path = folder / "logs" / f"{name}.log"
        found[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert [problems(name, line) for line in found[name]] == [[]] * len(found[name])
    return found


def test_everything_is_there_and_counted_once(backend: ScriptedBackend, tmp_path: Path) -> None:
    """The routes of the examples, the models' API, and a route of one's own."""

    async def scenario() -> None:
        made = application(backend, tmp_path)

        async def hello(request: Request) -> PlainTextResponse:
            return PlainTextResponse("hello")

        made.app.add_route("/hello/{name}", hello)
        await made.start(port=0, handle_signals=False)
        await made.start(port=0)
        address = ("127.0.0.1", made.port)
        generate = await ask(
            address, "/api/generate", method="POST", body={"prompt": "hi", "options": {"maxTokens": 3}}
        )
        answer = generate.json()
        assert (answer["success"], answer["data"]["tokens"]) == (True, 3)
        assert {"request_id", "duration"} <= set(answer["metadata"])
        assert (await ask(address, "/v1/chat/completions", method="POST", body=CHAT)).status == 200
        assert (await ask(address, "/hello/you")).text == "hello"
        assert (await ask(address, "/nothing")).status == 404
        await made.health.run_all_checks()
        assert (await ask(address, "/health")).json()["status"] in ("healthy", "degraded")
        assert (await ask(address, "/health/live")).json()["status"] == "alive"
        assert (await ask(address, "/health/ready")).status == 200
        status = made.metrics.collected().value(families.HEALTH_CHECK_STATUS, "router_initialized")
        assert status == 1.0  # shown once
        debug = (await ask(address, "/debug")).json()
        assert {"status", "health", "metrics", "environment"} <= set(debug)
        assert debug["environment"]["env"] == "test"
        text = (await ask(address, "/metrics")).text
        assert 'llm_router_http_requests_total{method="GET",route="/hello/{name}",status_code="200"} 1.0' in text
        collected = made.metrics.collected()
        assert collected.total(families.INFERENCE) == 2
        assert collected.total(families.HTTP_REQUESTS, route="/api/generate") == 1
        assert set(made.monitoring.status().values()) == {"running", "off"}
        await made.shutdown()
        await made.shutdown()
        await made.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await ask(address, "/hello/you")

    run(scenario())
    found = lines(tmp_path)
    paths = [line["request"]["path"] for line in found["access"]]
    assert paths.count("/api/generate") == paths.count("/v1/chat/completions") == paths.count("/hello/you") == 1
    messages = [line["message"] for line in found["application"]]
    assert [message for message in messages if message.startswith(("Application", "Shutting", "Shutdown"))] == [
        "Application started",
        "Shutting down gracefully",
        "Shutdown complete",
    ]
    assert messages.count("Inference completed") == 2


def test_a_signal_lets_requests_in_flight_end(backend: ScriptedBackend, tmp_path: Path) -> None:
    """New ones find nobody; the lines of the last are in the files."""

    async def scenario() -> None:
        gate = Gate()
        made = application(backend, tmp_path)
        await made.start(port=0)
        address = ("127.0.0.1", made.port)
        backend.script(Hold(gate), *json_reply({"choices": [{"message": {"content": "late"}}], "usage": None}))
        asking = asyncio.create_task(ask(address, "/v1/chat/completions", method="POST", body=CHAT))
        await until(lambda: made._in_flight == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: made._ending is not None)

        async def is_refused() -> bool:
            try:
                (await asyncio.open_connection(*address))[1].close()
            except OSError:
                return True
            return False

        while not await is_refused():
            await asyncio.sleep(0.001)
        assert not asking.done()
        gate.open()
        assert (await asking).status == 200
        await made.wait_closed()
        await made.shutdown()

    run(scenario())
    found = lines(tmp_path)
    assert [line["response"]["statusCode"] for line in found["access"]] == [200]
    (ending,) = [line for line in found["application"] if line["message"] == "Shutting down gracefully"]
    assert ending["data"] == {"signal": "SIGTERM"}


def test_what_cannot_start_ends_what_did(backend: ScriptedBackend, tmp_path: Path) -> None:
    """And says so, in error.log too."""

    async def scenario() -> None:
        first = application(backend, tmp_path / "a")
        await first.start(port=0, handle_signals=False)
        second = application(backend, tmp_path)
        with pytest.raises(ConfigError, match="is taken by another program"):
            await second.start(port=first.port)
        await second.wait_closed()
        third = application(backend, tmp_path / "c")
        with pytest.raises(ConfigError, match="insecure=True"):
            await third.start(port=0, host="0.0.0.0")
        await first.shutdown()

    run(scenario())
    assert [line["message"] for line in lines(tmp_path)["error"]] == ["Failed to start application"]


def test_in_a_server_of_ones_own(backend: ScriptedBackend, tmp_path: Path) -> None:
    """It is an ASGI application; parts that are off have no route."""

    async def scenario() -> None:
        made = application(backend, tmp_path, components={"prometheus": False})
        async with made:
            listener = Listener(made, host="127.0.0.1", port=0)
            await listener.start()
            address = ("127.0.0.1", listener.port)
            assert (await ask(address, "/metrics")).status == 404
            assert (await ask(address, "/v1/models")).json()["data"][0]["id"] == "m"
            await listener.aclose()

    run(scenario())
