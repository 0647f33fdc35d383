"""The monitored router with a real model: what is loaded, generated, checked and written is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llm_router import MonitoredLLMRouter, MonitoringSystem, StructuredLogger, families
from llm_router.config import ModelSettings, Settings
from llm_router.config.settings import ServerSettings
from llm_router.models.launch import RunnerSpec
from llm_router.models.registry import FORMAT
from llm_router.observe.logs.schema import problems
from support.aio import run
from support.model import default_model

NAME = "smollm2-135m-instruct"


def local(folder: Path) -> Settings:
    path = folder / "models" / f"{NAME}.gguf"
    path.parent.mkdir(parents=True)
    shutil.copy(default_model(), path)
    runner = RunnerSpec(name=NAME, path=str(path), context_size=512)
    return Settings(
        server=ServerSettings(data_dir=str(folder)), models=(ModelSettings(name=NAME, file=str(path), runner=runner),)
    )


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_is_observed(tmp_path: Path) -> None:
    """Loaded, asked once, checked by a generation that is no traffic, and unloaded."""

    async def scenario() -> None:
        logger = StructuredLogger(log_dir=tmp_path / "logs", console="off", env={})
        router = MonitoredLLMRouter(local(tmp_path), logger=logger)
        async with router, MonitoringSystem(router=router, interval=0.05) as monitoring:
            assert monitoring.metrics is router.metrics
            collected = router.metrics.collected()
            assert collected.value(families.MODELS_LOADED, FORMAT, "small") == 1
            assert (collected.value(families.MODEL_MEMORY, NAME, FORMAT) or 0) > 1e7
            assert collected.value(families.MODEL_LOAD_DURATION, NAME, FORMAT) == 1
            await router.quick("hi", maxTokens=4)
            found = await router.health.run_check("inference_capability")
            assert found["healthy"], found
            assert router.metrics.collected().total(families.INFERENCE) == 1
            document = await router.health.get_health_status()
            assert document["checks"]["models_available"]["healthy"]
            await router.unload(NAME)
            assert router.metrics.collected().value(families.MODELS_LOADED, FORMAT, "small") == 0
        logger.close()

    run(scenario(), timeout_s=55)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "application.log").read_text().splitlines()]
    assert [problems("application", line) for line in lines] == [[]] * len(lines)
    messages = [line["message"] for line in lines]
    assert [messages.count(text) for text in ("Model loaded", "Inference completed", "Model unloaded")] == [1, 1, 1]
    audit = [json.loads(line)["event"] for line in (tmp_path / "logs" / "audit.log").read_text().splitlines()]
    assert audit == ["model_load", "model_unload"]
