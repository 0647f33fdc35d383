"""The example of somebody else's application works, and the pages about the library are true."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import llm_router
from llm_router.library import metrics as metrics_module
from llm_router.observe.logs.schema import FILES, FileName, problems
from support.net import free_port
from support.wait import until

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference" / "library.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "howto" / "monitor-your-own-application.md").read_text(encoding="utf-8")


class Shop:
    """The example, running as a program of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int, logs: Path) -> None:
        self.process = process
        self.logs = logs
        self._base = f"http://127.0.0.1:{port}"

    def ask(self, path: str, method: str = "GET") -> tuple[int, bytes]:
        request = urllib.request.Request(self._base + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                body = reply.read()
                return reply.status, gzip.decompress(body) if reply.headers["content-encoding"] == "gzip" else body
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        with contextlib.suppress(OSError):
            return self.ask("/books/none/sell", "POST")[0] == 409
        return False

    def json(self, path: str) -> Any:
        return json.loads(self.ask(path)[1])

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        text = self.ask("/metrics")[1].decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def lines(self, file: FileName) -> list[dict[str, Any]]:
        path = self.logs / f"{file}.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def shop(folder: Path, **env: str) -> Iterator[Shop]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "bookshop.py")],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "src"),
            "PORT": str(port),
            "LOG_DIR": str(folder / "logs"),
            **env,
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        running = Shop(process, port, folder / "logs")
        until(running.is_up, what="the bookshop")
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_bookshop_is_observed(tmp_path: Path) -> None:
    """Its requests, its own metrics, its check, its alert and its log files; and it ends as it should."""
    with shop(tmp_path) as running:
        assert [running.ask("/books/poetry/sell", "POST")[0] for _ in range(4)] == [200, 200, 200, 409]
        assert running.ask("/books/%2e/nothing/here")[0] == 404
        samples = running.samples()
        labels = frozenset({("method", "POST"), ("route", "/books/{shelf}/sell"), ("status_code", "200")})
        assert samples["llm_router_http_requests_total", labels] == 3
        assert samples["bookshop_books_sold_total", frozenset({("shelf", "poetry")})] == 3
        unknown = frozenset({("method", "GET"), ("route", "__other__"), ("status_code", "404")})
        assert samples["llm_router_http_requests_total", unknown] == 1
        assert any(name == "llm_router_process_resident_memory_bytes" for name, _ in samples)
        until(lambda: running.json("/alerts")["FewBooks"] == "firing", what="the alert")
        health = running.json("/health")
        assert "cpu_usage" in health["checks"]
        assert health["checks"]["shelves"]["status"] in ("healthy", "degraded")
        assert "workers" not in health["checks"]
        running.process.send_signal(signal.SIGTERM)
        output = running.process.communicate(timeout=15)
        assert running.process.returncode in (0, -signal.SIGTERM), output
        for file in FILES:
            for line in running.lines(file):
                assert problems(file, line) == [], (file, line)
        accesses = running.lines("access")
        paths = [line["request"]["path"] for line in accesses]
        assert paths.count("/books/poetry/sell") == 4
        assert [line["event"] for line in running.lines("audit")] == ["book_sold"] * 3
        assert "The bookshop is open" in [line["message"] for line in running.lines("application")]
        # What was said while a request was served names it.
        warned = [line for line in running.lines("application") if line["message"] == "Nothing to sell"]
        assert {line["request_id"] for line in warned} <= {line["request_id"] for line in accesses}


def test_the_bookshop_without_monitoring(tmp_path: Path) -> None:
    """Off means no route; what the application counts goes nowhere and harms nobody."""
    with shop(tmp_path, MONITORING_ENABLED="false") as running:
        assert running.ask("/books/poetry/sell", "POST")[0] == 200
        assert [running.ask(path)[0] for path in ("/metrics", "/health", "/health/live")] == [404, 404, 404]
        assert running.json("/alerts") == {"FewBooks": "waiting"}


def test_the_bookshop_with_other_paths(tmp_path: Path) -> None:
    """METRICS_ENDPOINT and HEALTH_ENDPOINT move the pages, HEALTH_CHECK_ENABLED takes one away."""
    with shop(tmp_path, METRICS_ENDPOINT="/intern/metrics", HEALTH_CHECK_ENABLED="off") as running:
        assert running.ask("/intern/metrics")[0] == 200
        assert running.ask("/health")[0] == 404


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
def test_the_examples_of_the_guide_run(example: str, tmp_path: Path) -> None:
    """Each as a program of its own, with the output that it announces in a comment at its end."""
    expected = "".join(
        line.removeprefix("# ") for line in example.splitlines(keepends=True) if line.startswith("# -> ")
    )
    result = subprocess.run(
        [sys.executable, "-c", example],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected.replace("-> ", "")


def test_every_public_method_is_in_the_reference() -> None:
    """Of every class of the library that the package exports, and every event."""
    for name in llm_router.__all__:
        home = llm_router._HOMES.get(name, "")
        if not home.startswith("llm_router.library"):
            continue
        assert f"## {name}" in REFERENCE, name
        section = REFERENCE.partition(f"## {name}\n")[2].partition("\n## ")[0]
        for method, value in vars(getattr(llm_router, name)).items():
            if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                assert re.search(rf"\b{method}\b", section), f"{name}.{method}"
    for event in metrics_module._EVENTS:
        assert f"`{event}`" in REFERENCE, event
