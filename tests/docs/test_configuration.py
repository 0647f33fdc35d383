"""The configuration reference and the examples are true."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from llm_router.config import load
from llm_router.config.load import _ENVIRONMENT
from llm_router.config.presets import _PRESETS, Preset
from llm_router.config.settings import SECTIONS, Settings
from llm_router.config.shape import keys
from llm_router.routing.table import STRATEGIES

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """The cells of every table row, by what its first cell names."""
    table = (line.strip("|").split("|") for line in REFERENCE.splitlines() if line.startswith("| `"))
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in table}


def test_every_key_has_a_row_with_its_type_and_default() -> None:
    """And no row describes a key that does not exist."""
    expected = {
        key.path: (key.type, "needed" if key.default is None else f"`{key.default}`" if key.default else "")
        for key in keys(Settings, SECTIONS)
    }
    found = {name: (cells[0], cells[1]) for name, cells in rows().items() if len(cells) == 3}
    assert found == expected


def test_every_row_says_what_the_key_means() -> None:
    """In a sentence."""
    assert [name for name, cells in rows().items() if len(cells) == 3 and not cells[2].endswith(".")] == []


def test_every_variable_of_the_environment_is_listed() -> None:
    """With the key that it stands over."""
    assert {name: cells[0].strip("`") for name, cells in rows().items() if len(cells) == 1} == _ENVIRONMENT


def test_every_preset_has_a_row_with_its_address() -> None:
    """Azure has none."""
    found = dict(re.findall(r"^\| ([a-z-]+) \| (?:`(http\S+)`|none: .*?) \|", REFERENCE, re.MULTILINE))
    assert found == {preset: _PRESETS[preset].get("url", "") for preset in typing.get_args(Preset)}


def test_every_strategy_is_explained() -> None:
    """By its name, in a row of its own."""
    for strategy in STRATEGIES:
        assert re.search(rf"^\| {strategy} \|", REFERENCE, re.MULTILINE), strategy


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL))
def test_what_is_shown_can_be_used(block: str, tmp_path: Path) -> None:
    """With a backend for those that show models only."""
    backend = "" if "backends:" in block else "backends: [{name: openai, preset: openai, api_key: k}]\n"
    (tmp_path / "shown.yaml").write_text(backend + block)
    env = {"DATA_DIR": str(tmp_path), "ANTHROPIC_API_KEY": "k", "AZURE_API_KEY": "k"}
    settings = load(str(tmp_path / "shown.yaml"), env, {})
    assert settings.models or settings.backends


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_can_be_used(example: Path, tmp_path: Path) -> None:
    """As they are, with the variables that they say they need."""
    model = tmp_path / "models" / "smollm2-135m-instruct.gguf"
    model.parent.mkdir()
    model.write_bytes(b"GGUF")
    settings = load(str(example), {"DATA_DIR": str(tmp_path), "OPENAI_API_KEY": "k"}, {})
    assert settings.models
    assert settings.notes == ()
    assert example.name in REFERENCE
