"""What the README shows works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_router.config import load
from llm_router.models.registry import DEFAULT_MODEL
from support.model import default_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The one block of that language that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


def test_the_configuration_is_good(tmp_path: Path) -> None:
    path = tmp_path / "llm-router.yaml"
    path.write_text(block("yaml", "backends:"))
    settings = load(str(path), {"OPENAI_API_KEY": "x", "DATA_DIR": str(tmp_path)}, {})
    assert [model.name for model in settings.models] == ["chat", "gpt-4o-mini"]
    assert settings.models[0].fallbacks == ("gpt-4o-mini",)


@pytest.mark.model
def test_the_library_example_runs(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(default_model(), tmp_path / "models" / f"{DEFAULT_MODEL}.gguf")
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(tmp_path),
        "DATA_DIR": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", block("python", "LLMRouter")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert re.match(r"\d+ tokens\n.+", run.stdout)
