"""Bounds what llama.cpp writes into LOG_DIR/runner-NAME.log, which is no log of ours: plain text, without rotation.

The runner's descriptor appends, so the file can be emptied under it; what is written between copying and emptying is lost.
Not for: opening the file (runner.py), or the log files of the router (observe/logs).
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Final

_log = logging.getLogger("llm_router.control")

MAX_BYTES: Final = 16 * 1024 * 1024
"""Of one file; a former one of the same size is kept beside it. Two warnings for each request fill it in 80,000 requests."""


def bound_runner_logs(folder: str, max_bytes: int = MAX_BYTES) -> None:
    """Empty each file that is larger, after a copy to `.log.1`. Blocks; a folder that cannot be written stays as it is."""
    for path in sorted(Path(folder).glob("runner-*.log")):
        try:
            if path.stat().st_size > max_bytes:
                shutil.copyfile(path, path.with_suffix(".log.1"))
                os.truncate(path, 0)
        except OSError as error:
            _log.warning("%s is too large and cannot be emptied: %s", path, error.strerror)
