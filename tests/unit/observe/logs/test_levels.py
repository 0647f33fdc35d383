"""Levels of loggers, and levels that are changed while the router runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llm_router
from llm_router.observe.logs.levels import ROOT, ChangedLevels, is_logger, level_of, loggers
from llm_router.observe.logs.settings import LogSettings
from llm_router.testing import FakeClock

SOURCES = Path(llm_router.__file__).parent
CONFIGURED = LogSettings(level="warning", levels={"llm_router.gateway": "error"})


def test_every_logger_of_ours_is_known() -> None:
    """Whether it is called as its module or otherwise."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        module = ".".join(("llm_router", *path.relative_to(SOURCES).with_suffix("").parts)).removesuffix(".__init__")
        for name in re.findall(r"getLogger\((__name__|\"[^\"]*\")\)", path.read_text(encoding="utf-8")):
            found.add(module if name == "__name__" else ast.literal_eval(name))
    found -= {"alembic"}
    assert len(found) > 15
    # What the logs say about themselves goes to stderr only, and asks no level.
    assert {name for name in found if not is_logger(name)} <= {"llm_router.logs"}
    assert all(is_logger(name) for name in loggers())


@pytest.mark.parametrize(
    "name", ["", "llm_router.", "llm_router.nothing", "llm_router.../etc", "uvicorn", "llm_router.a b"]
)
def test_others_are_not(name: str) -> None:
    """A level for them would have no effect."""
    assert not is_logger(name)


def test_the_longest_name_decides() -> None:
    """Of those that the logger has or is below."""
    settings = LogSettings(level="info", levels={"llm_router.gateway": "error", "llm_router.gateway.front": "debug"})
    assert level_of(settings, "llm_router.gateway.front") == "debug"
    assert level_of(settings, "llm_router.gateway.core") == "error"
    assert level_of(settings, "llm_router.gatewayx") == "info"
    assert level_of(settings, ROOT) == "info"


def test_a_change_holds_until_its_time_is_over() -> None:
    """Or until it is taken back; what is configured then holds again."""
    clock = FakeClock()
    levels = ChangedLevels(clock)
    assert levels.in_force(CONFIGURED) is CONFIGURED
    for_a_while = levels.change("llm_router.gateway", "debug", 60.0)
    for_good = levels.change(ROOT, "info")
    in_force = levels.in_force(CONFIGURED)
    assert (in_force.level, in_force.levels) == ("info", {"llm_router.gateway": "debug"})
    assert levels.changes == (for_a_while, for_good)
    clock.advance(59.9)
    assert levels.end_due() == ()
    clock.advance(0.1)
    assert levels.end_due() == (for_a_while,)
    assert levels.end_due() == ()
    in_force = levels.in_force(CONFIGURED)
    assert (in_force.level, in_force.levels) == ("info", {"llm_router.gateway": "error"})
    assert levels.take_back(ROOT)
    assert not levels.take_back(ROOT)
    assert levels.in_force(CONFIGURED) == CONFIGURED


def test_a_later_change_replaces_the_former() -> None:
    """Its end too."""
    clock = FakeClock()
    levels = ChangedLevels(clock)
    levels.change(ROOT, "debug", 1.0)
    levels.change(ROOT, "error")
    clock.advance(2.0)
    assert levels.end_due() == ()
    assert levels.in_force(CONFIGURED).level == "error"
