"""A real collector of traces, rotel: it takes OTLP, and its log shows every span as it understood it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.net import free_port
from support.wait import until

_SPAN = re.compile(r"^Span #\d+\n((?:[ \t]+\S.*\n|Start time.*\n|End time.*\n|Attributes:\n)*)", re.MULTILINE)


class Rotel:
    """A running collector."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def text(self) -> str:
        """All that it has shown so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def spans(self) -> list[str]:
        """What it has shown of each span so far."""
        return [found[1] for found in _SPAN.finditer(self.text())]

    def of_trace(self, trace_id: str) -> list[str]:
        """The same of one trace."""
        return [span for span in self.spans() if f"Trace ID       : {trace_id}\n" in span]

    def span(self, name: str, trace_id: str = "") -> str:
        """What it shows of the span with that name; waits for it.

        Args:
            trace_id: only of this trace.
        """

        def find() -> str:
            named = [span for span in self.spans() if f"    Name           : {name}\n" in span]
            return next((span for span in named if not trace_id or f"Trace ID       : {trace_id}\n" in span), "")

        return until(find, what=f"the span {name!r}")


@contextmanager
def collecting(folder: Path, port: int) -> Iterator[Rotel]:
    """A collector on that port of loopback, until the block ends; what it shows is in `folder`."""
    log = folder / f"rotel-{port}.log"
    command = [
        _agent(), "start", "--pid-file", str(folder / "pid"), "--otlp-http-endpoint", f"127.0.0.1:{port}",
        "--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}", "--exporter", "blackhole",
        "--debug-log", "traces", "--debug-log-verbosity", "detailed",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1/traces"
    with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            until(lambda: process.poll() is not None or _answers(url), what="the collector")
            assert process.poll() is None, log.read_text()
            yield Rotel(url, log)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def _agent() -> str:
    """The program in the wheel."""
    spec = importlib.util.find_spec("rotel")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "rotel-agent"
    if path is not None and path.exists():
        return str(path)
    reason = "rotel is not installed (pip install rotel; its wheels are for Linux and macOS)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
