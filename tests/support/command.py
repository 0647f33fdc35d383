"""`llm-router` as a person runs it who has nothing in the environment but a data folder. Not for: `serve` (serving.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src"


def llm_router(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it in `folder`, which is its DATA_DIR too, to its end."""
    env = {"PATH": os.defpath, "HOME": str(folder), "DATA_DIR": str(folder), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "llm_router", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False)
