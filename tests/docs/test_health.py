"""The guide about health is true: its example runs, and it names every check there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from llm_router.config.surfaces import CHECKS
from llm_router.observe.health.report import SCHEDULER_CHECK
from llm_router.observe.health.state import ALIASES, STATE_CHECKS

GUIDE = (Path(__file__).parents[2] / "docs" / "howto" / "health.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    """As a program of its own, and says what its checks found."""
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "queue_depth healthy 12 jobs wait\ndisk_is_there healthy mounted\n"
    assert result.stderr == ""


def test_every_check_is_named() -> None:
    """In the tables; those of the state in theirs."""
    rows = re.findall(r"^\| (`[a-zA-Z_`, ]+`) \|", GUIDE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-zA-Z_]+)`", row)}
    assert named >= {*STATE_CHECKS, *(set(CHECKS) - set(ALIASES)), SCHEDULER_CHECK}
