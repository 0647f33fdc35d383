"""`--help` as it is typed: what a person reads before anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "src"
COMMANDS: tuple[list[str], ...] = (
    [],
    ["serve"],
    ["chat"],
    ["check"],
    ["reload"],
    ["bench"],
    ["models"],
    ["models", "list"],
    ["models", "load"],
    ["models", "unload"],
    ["models", "pull"],
)


def run(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.defpath, "HOME": str(folder), "PYTHONPATH": str(SOURCES), "COLUMNS": "110", **env}
    command = [sys.executable, "-m", "llm_router", *words]
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches(command: list[str], tmp_path: Path) -> None:
    """Every command says what it is for; a switch does not look as if it wanted a value."""
    shown = run(tmp_path, *command, "--help")
    assert shown.returncode == 0
    assert "Usage: llm-router" in shown.stdout
    assert "<bool>" not in shown.stdout


def test_completion_is_there_for_every_usual_shell(tmp_path: Path) -> None:
    """The script that a shell sources, and the words it then asks for."""
    for shell in ("bash", "zsh", "fish"):
        script = run(tmp_path, "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
        assert "_LLM_ROUTER_COMPLETE" in script.stdout, script.stderr
    words = run(tmp_path, _LLM_ROUTER_COMPLETE="complete_bash", COMP_WORDS="llm-router models ", COMP_CWORD="2")
    assert words.stdout.split() == ["list", "load", "unload", "pull"]
