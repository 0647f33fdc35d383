"""The router as a library: inside the caller's loop, with the real default model and with scripted backends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_router import BackendError, LLMRouter, RequestError
from llm_router.app import EVENTS
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import ServerSettings
from llm_router.errors import BadModelFile, ModelNotFound, Unavailable
from llm_router.models.launch import RunnerSpec
from llm_router.routing.table import BackendSpec, Deployment, RetrySpec
from llm_router.testing import ScriptedBackend, Stall, framed, json_reply, stream_head
from support.aio import run
from support.model import default_model

NAME = "smollm2-135m-instruct"


def remote(url: str) -> Settings:
    return Settings(
        models=(ModelSettings(name="m", deployments=(Deployment("b", "scripted"),)),),
        backends=(BackendSpec(name="b", url=url),),
    )


def local(folder: Path, **changes: Any) -> Settings:
    models = folder / "models"
    models.mkdir(parents=True)
    path = models / f"{NAME}.gguf"
    shutil.copy(default_model(), path)
    runner = RunnerSpec(name=NAME, path=str(path), context_size=512, **changes)
    return Settings(
        server=ServerSettings(data_dir=str(folder)), models=(ModelSettings(name=NAME, file=str(path), runner=runner),)
    )


def counted(router: LLMRouter) -> dict[str, float]:
    """Samples of the exposition by name, summed over labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(router.metrics().decode()):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def test_quick_chat_and_stream_over_a_remote_backend(backend: ScriptedBackend) -> None:
    async def scenario() -> None:
        async with LLMRouter(remote(backend.base_url)) as router:
            result = await router.quick("one two", maxTokens=3)
            assert (result.text, result.tokens, result.model) == ("Hello from the", 3, "m")
            assert (result.cached, result.strategy) == (False, "balanced")
            assert result.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
            assert result.latency > 0
            assert (await router.chat([{"role": "user", "content": "hi"}], model="m")).tokens == 6
            text = "".join([chunk.text async for chunk in router.stream("hi")])
            assert text == "Hello from the scripted backend."
            sums = counted(router)
            assert sums["llm_router_inference_total"] == 3
            assert sums["llm_router_tokens_generated_total"] == 15
            assert sums["llm_router_requests_in_flight"] == 0

    run(scenario())


def test_events_tell_each_inference_once(backend: ScriptedBackend) -> None:
    async def scenario() -> None:
        async with LLMRouter(remote(backend.base_url)) as router:
            seen: list[str] = []
            for event in EVENTS:
                router.on(event, lambda *_, event=event: seen.append(event))

            async def slow(result: object, context: object) -> None:
                seen.append("awaited")

            stop = router.on("inference-complete", slow)
            router.on("inference-start", lambda context: 1 / 0)  # logged, harms nobody
            await router.quick("hi")
            await asyncio.sleep(0)
            assert seen == ["inference-start", "inference-complete", "awaited"]
            stop()
            seen.clear()
            backend.always(json_reply({"error": {"message": "bad"}}, 400))
            with pytest.raises(BackendError, match="bad"):
                await router.quick("hi")
            assert seen == ["inference-start", "inference-error"]
            with pytest.raises(ValueError, match="model-loaded"):
                router.on("model_loaded", print)

    run(scenario())


def test_what_goes_wrong_has_the_errors_of_the_tree(backend: ScriptedBackend) -> None:
    async def scenario() -> None:
        router = LLMRouter(remote(backend.base_url))
        with pytest.raises(RuntimeError, match="not initialized"):
            await router.quick("hi")
        async with router:
            with pytest.raises(RequestError, match="does not exist"):
                await router.quick("hi", model="mm")
            with pytest.raises(ModelNotFound):
                await router.unload("nothing")
        await router.cleanup()  # a second time does nothing
        assert router.get_status()["initialized"] is False

    run(scenario())


def test_leaving_a_stream_early_closes_the_upstream(backend: ScriptedBackend) -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
    backend.script(stream_head(), framed(event), framed(event), Stall())

    async def scenario() -> None:
        async with LLMRouter(remote(backend.base_url)) as router:
            stream = router.stream("hi")
            assert (await anext(stream)).text == "w"
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
            await backend.until(lambda b: b.connections[0].closed_by == "client")
            assert counted(router)["llm_router_inference_total"] == 1

    run(scenario())


@pytest.mark.model
def test_the_real_model_answers_and_leaves_with_its_owner(tmp_path: Path) -> None:
    async def scenario() -> None:
        loaded: list[str] = []
        router = LLMRouter(local(tmp_path))
        router.on("model-loaded", lambda model: loaded.append(model.id))
        async with router:
            assert loaded == [NAME]
            entry = router.registry.get(NAME)
            assert entry is not None
            assert (entry.status, entry.format, entry.size) == ("loaded", "gguf", default_model().stat().st_size)
            assert entry.load_duration > 0
            assert entry.memory > 50e6
            status = router.get_status()
            assert (status["initialized"], status["modelsLoaded"], status["engine"]) == (True, 1, "llama.cpp")
            result = await router.quick("Say hello.", maxTokens=6, temperature=0)
            assert result.text
            assert result.tokens == 6
            pieces = [chunk async for chunk in router.stream("Say hello.", max_tokens=6, temperature=0)]
            assert "".join(chunk.text for chunk in pieces) == result.text
            assert pieces[-1].finish_reason == "length"
            sums = counted(router)
            assert sums["llm_router_models_loaded"] == 1
            assert sums["llm_router_model_load_duration_seconds_count"] == 1
            assert sums["llm_router_tokens_generated_total"] == 12
            runner = psutil.Process().children()[-1].pid
        assert not psutil.pid_exists(runner)

    run(scenario(), timeout_s=50)


@pytest.mark.model
def test_models_load_and_unload_at_run_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = local(tmp_path)
        idle = msgspec.structs.replace(settings.models[0], load=False)
        async with LLMRouter(msgspec.structs.replace(settings, models=(idle,))) as router:
            assert [entry.status for entry in router.registry.list()] == ["unloaded"]
            with pytest.raises(Unavailable, match="not ready"):
                await router.quick("hi")
            entry = await router.load(NAME)
            assert entry.status == "loaded"
            assert (await router.quick("hi", maxTokens=2)).tokens == 2
            gone: list[str] = []
            router.on("model-unloaded", lambda model: gone.append(model.status))
            unloading = asyncio.create_task(router.unload(NAME))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="not ready"):  # at once, not when the runner has gone
                await router.quick("hi")
            with pytest.raises(ModelNotFound, match="not loaded"):
                await router.unload(NAME)
            await unloading
            assert gone == ["unloaded"]
            assert [entry.status for entry in router.registry.list()] == ["unloaded"]
            (tmp_path / "models" / "bad.gguf").write_bytes(b"GGUF but not for long")
            with pytest.raises(BadModelFile, match=r"bad\.gguf"):
                await router.load("bad")

    run(scenario(), timeout_s=50)


@pytest.mark.model
def test_a_killed_runner_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = local(tmp_path)
        patient = msgspec.structs.replace(settings.routing, retry=RetrySpec(attempts=1))
        async with LLMRouter(msgspec.structs.replace(settings, routing=patient)) as router:
            assert (await router.quick("hi", maxTokens=2)).tokens == 2
            os.kill(psutil.Process().children()[-1].pid, signal.SIGKILL)
            answered = False
            while not answered:
                try:
                    answered = (await router.quick("hi", maxTokens=2)).tokens == 2
                except (BackendError, Unavailable):
                    await asyncio.sleep(0.05)  # it restarts
            sums = counted(router)
            assert sums["llm_router_runner_restarts_total"] == 1
            assert sums["llm_router_models_loaded"] == 1

    run(scenario(), timeout_s=50)
