"""Programs that tests need and that pip does not install: promtool, prometheus, nginx, redis-server."""

from __future__ import annotations

import os
import shutil

import pytest


def require(tool: str) -> str:
    """The path of a program. Where CI is set, a missing one fails the test; elsewhere it skips it, with the reason."""
    path = shutil.which(tool)
    if path is not None:
        return path
    reason = f"{tool} is not installed (on Debian: apt-get install {_PACKAGES.get(tool, tool)})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


_PACKAGES = {"promtool": "prometheus", "amtool": "prometheus-alertmanager", "alertmanager": "prometheus-alertmanager"}
