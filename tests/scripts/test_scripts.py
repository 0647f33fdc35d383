"""Runs the cases of this folder: each `.txt` file holds files, commands and their exact output.

A file begins with a sentence that states the rule. Then come blocks:

    --- file NAME            the lines that follow are the file NAME of the case's own folder
    --- $ VAR=x COMMAND      a command, with variables; the lines that follow are all it may print, to stdout or stderr
    --- exit N               the exit status of the command above, 0 if it does not say

`{here}` stands for the case's folder. To write a new case, leave the output empty and look at the failure.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[1] / "src"


class Step(NamedTuple):
    """One command of a case and what is expected of it."""

    command: str
    output: str
    status: int


def blocks(text: str) -> list[tuple[str, str]]:
    """The heads of a case, like `file r.yaml` or `$ llm-router check`, each with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("--- "):
            found.append((line[4:], []))
        elif found:
            found[-1][1].append(line)
    return [(head, "\n".join(lines).strip("\n")) for head, lines in found]


def prepare(case: Path, folder: Path) -> list[Step]:
    """Write the files of a case into `folder`; its commands."""
    steps: list[Step] = []
    for head, body in blocks(case.read_text(encoding="utf-8")):
        kind, _, rest = head.partition(" ")
        if kind == "file":
            (folder / rest).write_text(body + "\n", encoding="utf-8")
        elif kind == "$":
            steps.append(Step(rest, body.replace("{here}", str(folder)), 0))
        elif kind == "exit":
            steps[-1] = steps[-1]._replace(status=int(rest))
        else:
            raise AssertionError(f"{case.name}: no such block: {head}")
    assert steps, f"{case.name} runs nothing"
    return steps


def run(step: Step, folder: Path) -> tuple[str, int]:
    """What a command prints, without spaces at line ends, and its exit status."""
    words = shlex.split(step.command)
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    assert words.pop(0) == "llm-router", step.command
    env = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "DATA_DIR": str(folder / "data"),
        "PYTHONPATH": str(SOURCES),
        "COLUMNS": "100",
        "TERM": "dumb",
        "NO_COLOR": "1",
        **variables,
    }
    result = subprocess.run(
        [sys.executable, "-m", "llm_router", *words],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=30,
        check=False,
    )
    printed = result.stdout.decode()
    return "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n"), result.returncode


@pytest.mark.parametrize("case", sorted(FOLDER.glob("*.txt")), ids=lambda case: case.stem)
def test_commands_print_exactly_this(case: Path, tmp_path: Path) -> None:
    """Input, command and output stand in one file."""
    for step in prepare(case, tmp_path):
        printed, status = run(step, tmp_path)
        assert printed == step.output, f"{case.name}: $ {step.command}\n{printed}"
        assert status == step.status, f"{case.name}: $ {step.command}"
