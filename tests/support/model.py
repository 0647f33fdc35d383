"""Finds the real default model, which tests of runners need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_router.models.registry import DEFAULT_MODEL

_REPOSITORY = Path(__file__).parents[2]


def default_model() -> Path:
    """The default model's file: `LLM_ROUTER_TEST_MODEL`, or where `make test` puts it.

    Without it the test is skipped, with the way out; in CI it fails, so that nothing goes untested unseen.
    """
    named = os.environ.get("LLM_ROUTER_TEST_MODEL", "")
    path = Path(named) if named else _REPOSITORY / ".cache/models" / f"{DEFAULT_MODEL}.gguf"
    if path.is_file():
        return path
    problem = f"the default model is not at {path}: run `make test`, or set LLM_ROUTER_TEST_MODEL"
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)
