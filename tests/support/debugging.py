"""What a running router tells whoever looks for a fault: kept requests, models in figures, log lines, its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from support.callers import Reply, request
from support.serving import SOURCES, Serving
from support.wait import until


class Debug:
    """Asks the monitoring port for `/debug`. `key` where one is needed."""

    def __init__(self, serving: Serving, key: str = "") -> None:
        self._serving = serving
        self._key = key

    def reply(self, path: str = "", *, method: str = "GET", **query: str | float) -> Reply:
        """The reply of `/debug` and what follows it."""
        asked = f"/debug{path}" + (f"?{urlencode(query)}" if query else "")
        return request(self._serving.metrics_port, method, asked, key=self._key)

    def get(self, path: str = "", **query: str | float) -> Any:
        """The document there; it must be there."""
        reply = self.reply(path, method="GET", **query)
        assert reply.status == 200, (path, query, reply.status, reply.body)
        return reply.json()

    def listed(self, **query: str | float) -> list[Any]:
        """The requests of `/debug/requests`."""
        found: list[Any] = self.get("/requests", **query)["requests"]
        return found

    def is_kept(self, id: str) -> bool:
        """Whether a request with this id, or one of a trace with it, is kept now."""
        return self.reply(f"/requests/{id}").status == 200

    def trace(self, id: str) -> Any:
        """The only request with this id, or of the trace with it; waits until it is kept."""
        until(lambda: self.is_kept(id), what=f"the trace of {id}")
        (found,) = self.get(f"/requests/{id}")["requests"]
        return found


def lines(serving: Serving, file: str) -> list[dict[str, Any]]:
    """The lines of a log file of the router; none if there is no such file."""
    path = serving.folder / "data" / "logs" / f"{file}.log"
    # The last one may be half written.
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def line_of(serving: Serving, file: str, request_id: str) -> dict[str, Any]:
    """The first line about this request in a file; waits for it."""
    found = until(
        lambda: [line for line in lines(serving, file) if line.get("request_id") == request_id],
        what=f"a line of {request_id} in {file}.log",
    )
    return found[0]


def command(
    serving: Serving, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`llm-router ARGUMENTS` for this router, ended."""
    return subprocess.run(
        [sys.executable, "-m", "llm_router", *arguments, "--data-dir", str(serving.folder / "data")],
        env={"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"], "HOME": str(serving.folder), **(env or {})},
        cwd=serving.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
