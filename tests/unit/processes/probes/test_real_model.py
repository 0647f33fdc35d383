"""The probes against llama.cpp itself: it really generates, and is really validated."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_router.models.launch import RunnerSpec
from llm_router.observe.health.settings import Validation
from llm_router.processes.own_runners import OwnRunners
from llm_router.processes.probes.endpoints import Endpoints
from llm_router.processes.probes.inference import InferenceCheck
from llm_router.processes.probes.purse import Purse
from llm_router.processes.probes.validation import ValidationCheck
from support.aio import run
from support.model import default_model
from support.probed import local, table


@pytest.mark.model
@pytest.mark.slow
def test_a_real_runner_is_asked(tmp_path: Path) -> None:
    """A few tokens when it runs, a clear failure when it is gone."""
    spec = RunnerSpec(name="small", path=str(default_model()), context_size=512)
    purse = Purse(str(tmp_path / "probes.json"), 0.0)

    async def scene() -> None:
        async with OwnRunners(log_dir=str(tmp_path), on_event=lambda event: None) as runners:
            running = await runners.start(spec)
            url = f"http://127.0.0.1:{running.port}/v1"
            routing = table({"small": local("small", url, api_key=running.key)})
            endpoints = Endpoints(lambda: routing, dict, timeout_s=10.0)
            inference = InferenceCheck(lambda: routing, dict, endpoint=endpoints.problem, purse=purse)
            wanted = Validation(name="capital", model="small", prompt="Say hello.", expect="(?s).")
            validation = ValidationCheck(wanted, lambda: routing, dict, purse=purse)
            assert (await endpoints.check()).is_healthy
            check = await inference.check()
            assert check.is_healthy, check
            assert check.details["tokens"] == 4
            answered = await validation.check()
            assert answered.is_healthy, answered
            await runners.stop("small")
            assert "cannot connect" in (await inference.check()).message

    run(scene(), timeout_s=50.0)
