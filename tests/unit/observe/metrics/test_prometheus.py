"""A real Prometheus scrapes what we render, and its queries find the values and the exemplars."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_router import families
from llm_router.observe.metrics.exposition import (
    CONTENT_TYPE_OPENMETRICS,
    CONTENT_TYPE_TEXT,
    Renderer,
    negotiate,
)
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from support.net import free_port
from support.tools import require
from support.wait import until

CONFIG = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs:
  - job_name: llm-router
    static_configs: [{targets: ["127.0.0.1:%d"]}]
"""


class Exporter:
    """Serves rendered metrics over HTTP from a thread of its own, which alone touches the reader."""

    def __init__(self, segment: Segment) -> None:
        reader, renderer = Reader([segment], families.FAMILIES), Renderer(families.GUIDE_VIEWS)
        self.accepted: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 - self is the exporter here
                self.accepted.append(handler.headers["Accept"])
                openmetrics = negotiate(handler.headers["Accept"])
                body = renderer.render(reader.collect(), openmetrics=openmetrics)
                handler.send_response(200)
                handler.send_header("Content-Type", CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_TEXT)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *arguments: object) -> None:  # noqa: N805
                """Silence on stderr."""

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Prometheus:
    """A running server with an empty store."""

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        config = folder / "prometheus.yml"
        config.write_text(CONFIG % target)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    require("prometheus"),
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--enable-feature=exemplar-storage",
                ],
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=5) as reply:
                return json.load(reply)["data"]
        except OSError:
            return None

    def query(self, expression: str) -> dict[str, float]:
        """label values joined by a comma -> value."""
        data = self.get("query", query=expression) or {"result": []}
        hidden = ("__name__", "instance", "job")
        return {
            ",".join(value for name, value in sorted(series["metric"].items()) if name not in hidden): float(
                series["value"][1]
            )
            for series in data["result"]
        }

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def written() -> Writer:
    segment = Segment.private()
    writer = Writer(segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
    writer.counter(families.INFERENCE, "small", "round-robin", "success", "false").inc(41)
    writer.counter(families.INFERENCE, "small", "least-loaded", "error", "false").inc(1)
    writer.gauge(families.BACKEND_UP, 'odd "name"\\').set(1)
    child = writer.histogram(families.INFERENCE_DURATION, "small", "round-robin")
    for value in (0.05, 0.3, 0.3, 45.0, 500.0):
        child.observe(value)
    child.observe_with_exemplar(0.7, 'trace_id="4bf92f3577b34da6"', time.time())
    return writer


@pytest.fixture
def prometheus(written: Writer, tmp_path: Path) -> Iterator[Prometheus]:
    require("prometheus")
    exporter = Exporter(written.segment)
    server = Prometheus(tmp_path, exporter.port)
    yield server
    server.close()
    exporter.close()
    assert all("application/openmetrics-text" in accept for accept in exporter.accepted)


@pytest.mark.slow
def test_prometheus_finds_values_views_and_exemplars(prometheus: Prometheus) -> None:
    until(lambda: prometheus.query("llm_router_inference_total"), 20, "the first scrape")
    assert prometheus.query("up") == {"": 1.0}
    assert prometheus.query("sum(llm_router_inference_total)") == {"": 42.0}
    assert prometheus.query("model_inference_total") == {"small": 42.0}
    assert prometheus.query("llm_router_backend_up") == {'odd "name"\\': 1.0}
    assert prometheus.query("llm_router_inference_duration_seconds_count") == {"small,round-robin": 6.0}
    assert prometheus.query('llm_router_inference_duration_seconds_bucket{le="60.0"}') == {
        "60.0,small,round-robin": 5.0
    }
    assert prometheus.query("histogram_quantile(0.5, llm_router_inference_duration_seconds_bucket)") == {
        "small,round-robin": 0.5
    }
    assert prometheus.query("model_inference_duration_seconds_sum") == {"small": 546.35}

    found = prometheus.get(
        "query_exemplars",
        query="llm_router_inference_duration_seconds_bucket",
        start=str(time.time() - 60),
        end=str(time.time()),
    )
    assert [e["labels"] for series in found for e in series["exemplars"]] == [{"trace_id": "4bf92f3577b34da6"}]
    units = prometheus.get("metadata", metric="llm_router_inference_duration_seconds")
    assert units["llm_router_inference_duration_seconds"][0]["unit"] == "seconds"
