"""The how-to guides can be followed, and links in the documentation lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from llm_router.cli.commands import build
from llm_router.config import load

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "howto").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links to them have them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_configurations_are_good(guide: Path, tmp_path: Path) -> None:
    """With a backend for those that show another section only."""
    env = {"DATA_DIR": str(tmp_path), "OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
    for block in blocks(guide, "yaml"):
        backend = "" if "backends:" in block else "backends: [{name: openai, preset: openai, api_key: k}]\n"
        (tmp_path / "shown.yaml").write_text(backend + block)
        assert load(str(tmp_path / "shown.yaml"), env, {}).backends


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_commands_are_understood(guide: Path) -> None:
    """Every `llm-router` line has a command, options and arguments that there are."""
    for block in blocks(guide, "console"):
        for line in re.findall(r"^\$ llm-router (.*)$", block, re.MULTILINE):
            words = shlex.split(line.partition(" > ")[0])
            command = get_command(build())
            while words and hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context("llm-router", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
