"""The package itself: what it exports, and how little importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llm_router

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_else() -> None:
    """The supervisor imports modules of it and must stay small."""
    code = "import sys, llm_router; print([name for name in sys.modules if name.startswith('llm_router.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert result.stdout.strip() == "[]"


def test_public_names_can_be_had() -> None:
    """Each, and by `from llm_router import ...`."""
    for name in llm_router.__all__:
        assert getattr(llm_router, name) is not None
    assert dir(llm_router) == llm_router.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = llm_router.Nothing


def test_the_version_is_told_once() -> None:
    """pyproject.toml and `__version__` agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == llm_router.__version__
