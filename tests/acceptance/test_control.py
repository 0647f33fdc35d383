"""Control in the running program: what it tells, what it does when told, and that it can be killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_router.testing import ScriptedBackend
from support.model import default_model
from support.net import free_port
from support.serving import Scrape, Serving, remote_config, rss_bytes
from support.tools import require
from support.wait import until


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def call(
    serving: Serving, method: str, path: str, body: Any = None, *, on: str = "cli", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a request to the command line's socket, the monitoring port or the app port."""
    connection: http.client.HTTPConnection
    if on == "cli":
        connection = _Unix(serving.folder / "data" / "control.sock")
    else:
        port = serving.metrics_port if on == "monitoring" else serving.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = None if body is None else json.dumps(body)
    sent = {} if body is None else {"content-type": "application/json"}
    with contextlib.closing(connection):
        connection.request(
            method, path, data, {**sent, **{key.replace("_", "-"): value for key, value in headers.items()}}
        )
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def chat(serving: Serving, model: str) -> int:
    messages = [{"role": "user", "content": "Hi"}]
    return call(
        serving, "POST", "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 4}, on="app"
    )[0]


def value(scrape: Scrape, name: str, **labels: str) -> float | None:
    """The one sample of that name with these labels; None if there is none."""
    found = [v for n, have, v in scrape.samples if n == f"llm_router_{name}" and labels.items() <= have.items()]
    return found[0] if found else None


def model_file(folder: Path, name: str) -> Path:
    """The real default model in the models folder of a router to be started in `folder`."""
    models = folder / "data" / "models"
    models.mkdir(parents=True, exist_ok=True)
    path = models / f"{name}.gguf"
    try:
        os.link(default_model(), path)
    except OSError:
        shutil.copy(default_model(), path)
    return path


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def test_both_ports_and_the_socket_tell_the_same(tmp_path: Path, backend: ScriptedBackend) -> None:
    """Health, index, metrics and errors, straight from control or through a worker."""
    with Serving(tmp_path, remote_config(backend.base_url), env={"ENVIRONMENT": "staging"}) as serving:
        for on in ("app", "monitoring", "cli"):
            status, health = call(serving, "GET", "/health", on=on)
            assert health["environment"] == "staging"
            assert (status, health["checks"]["workers"]["details"]) == (200, {"up": 1, "wanted": 1})
            assert health["models"] == {"loaded": 1, "failed": 0, "registry_size": 1}
            assert call(serving, "GET", "/health", on=on, accept="application/health+json")[1]["releaseId"]
            assert call(serving, "GET", "/admin/models", on=on) == (200, {"models": []})
            status, answer = call(serving, "GET", "/admin/nothing", on=on)
            assert (status, answer["error"]["code"]) == (404, "not_found")
            status, answer = call(serving, "DELETE", "/admin/reload", on=on)
            assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
            assert call(serving, "GET", "/metrics/json", on=on)[0] == 200
        for on in ("app", "monitoring"):
            assert call(serving, "GET", "/metrics", on=on, host="evil.example")[0] == 421
            assert call(serving, "POST", "/admin/reload", {}, on=on, origin="https://evil.example")[0] == 403
        assert b"POST /admin/reload" in serving.get("/", monitoring=False)


def test_metrics_please_promtool_and_have_their_zeros(tmp_path: Path, backend: ScriptedBackend) -> None:
    """From the first scrape, in both formats."""
    promtool = require("promtool")
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        text = serving.get("/metrics")
        done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert serving.get("/metrics", accept="application/openmetrics-text").endswith(b"# EOF\n")
        scrape = serving.scrape()
        until(lambda: value(serving.scrape(), "backend_up", backend="b") == 1, what="the first probe")
        assert value(scrape, "models_loaded", format="gguf", size_category="small") == 0
        assert value(scrape, "worker_up", worker="worker-0") == 1
        assert value(scrape, "config_last_reload_successful") == 1
        for process in ("supervisor", "control", "worker-0"):
            assert (value(scrape, "process_resident_memory_bytes", process=process) or 0) > 1e6


def test_a_backend_that_goes_down_shows_and_comes_back(tmp_path: Path) -> None:
    """By what workers saw or by a free probe; nothing that costs is asked for it."""
    port = free_port()
    with ScriptedBackend(port=port) as backend, Serving(tmp_path, remote_config(backend.base_url)) as serving:
        until(lambda: value(serving.scrape(), "backend_up", backend="b") == 1)
        assert value(serving.scrape(), "models_loaded", format="remote") == 1
        backend.stop()
        until(lambda: value(serving.scrape(), "backend_up", backend="b") == 0, 15)
        status, health = call(serving, "GET", "/health")
        assert (status, health["status"]) == (503, "critical")
        assert value(serving.scrape(), "models_loaded", format="remote") == 0
        with ScriptedBackend(port=port) as again:
            until(lambda: value(serving.scrape(), "backend_up", backend="b") == 1, 15)
            assert {request.target for request in again.requests} <= {"/v1/models"}  # a health check lists them
        assert {request.target for request in backend.requests} <= {"/v1/models"}


def test_reload_is_all_or_nothing(tmp_path: Path, backend: ScriptedBackend) -> None:
    """By HTTP and by SIGHUP: a good file is in force at once, a bad one changes nothing and says why."""
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        path, config = tmp_path / "llm-router.yaml", remote_config(backend.base_url)
        loaded_time = value(serving.scrape(), "config_last_reload_timestamp_seconds")
        path.write_text(config.replace("name: m", "name: renamed") + "\naccess:\n  allowed_hosts: [llm.example]\n")
        assert call(serving, "POST", "/admin/reload", {}) == (200, {"reloaded": True, "needs_restart": []})
        until(lambda: chat(serving, "renamed") == 200)
        assert chat(serving, "m") == 404
        assert call(serving, "GET", "/health", on="app", host="llm.example")[0] == 200
        assert (value(serving.scrape(), "config_last_reload_timestamp_seconds") or 0) > (loaded_time or 0)

        path.write_text(config.replace("name: m", "nam: m"))
        status, answer = call(serving, "POST", "/admin/reload", {})
        assert (status, answer["error"]["code"]) == (422, "config_error")
        assert "nam" in answer["error"]["message"] and "name" in answer["error"]["message"]
        assert value(serving.scrape(), "config_last_reload_successful") == 0
        assert chat(serving, "renamed") == 200

        path.write_text(config + "\nmetrics:\n  guide_names: false\n")
        os.kill(serving.process.pid, signal.SIGHUP)
        until(lambda: chat(serving, "m") == 200)
        assert value(serving.scrape(), "config_last_reload_successful") == 1
        assert call(serving, "POST", "/admin/reload", {})[1]["needs_restart"] == ["metrics"]


def test_a_real_model_is_loaded_used_and_unloaded(tmp_path: Path, backend: ScriptedBackend) -> None:
    """At run time, by its name; with its measurements; and a file that is no model is refused."""
    model_file(tmp_path, "tiny")
    (tmp_path / "data" / "models" / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        assert chat(serving, "tiny") == 404
        for name, code in (("broken", "bad_model_file"), ("nothing", "model_not_found"), ("../x", "invalid_request")):
            status, answer = call(serving, "POST", "/admin/models/load", {"name": name})
            assert (status in (400, 404), answer["error"]["code"]) == (True, code)
        assert value(serving.scrape(), "errors_total", type="model_load") == 1

        options = {"parallel": 1, "context_size": 512}
        status, answer = call(
            serving, "POST", "/admin/models/load", {"name": "tiny", "options": options}, on="monitoring"
        )
        assert (status, answer["model"]["state"], answer["model"]["options"]["parallel"]) == (200, "loaded", 1)
        until(lambda: chat(serving, "tiny") == 200)
        scrape = serving.scrape()
        assert value(scrape, "models_loaded", format="gguf", size_category="small") == 1
        assert (value(scrape, "model_memory_bytes", model="tiny") or 0) > 50e6
        assert value(scrape, "model_load_duration_seconds_count", model="tiny") == 1
        assert value(scrape, "backend_up", backend="runner-tiny") == 1
        assert value(scrape, "process_open_fds", process="runner-tiny") is not None

        assert call(serving, "POST", "/admin/models/unload", {"name": "tiny"})[1]["model"]["state"] == "available"
        until(lambda: chat(serving, "tiny") == 404)
        scrape = serving.scrape()
        assert value(scrape, "models_loaded", format="gguf", size_category="small") == 0
        for gone in ("model_memory_bytes", "backend_up", "process_open_fds"):
            assert not [v for n, have, v in scrape.samples if n == f"llm_router_{gone}" and "tiny" in str(have)]


def test_a_killed_control_comes_back_with_everything(tmp_path: Path) -> None:
    """Within three seconds, with totals and models as they were; requests go on meanwhile."""
    path = model_file(tmp_path, "tiny")
    config = f"models:\n  - name: tiny\n    file: {path}\n    runner: {{context_size: 512, parallel: 1}}\n"
    with Serving(tmp_path, config) as serving:
        assert chat(serving, "tiny") == 200
        before, runner = serving.scrape().counters(), serving.children()["runner-0"]
        for _ in range(2):
            serving.signal("control", signal.SIGKILL)
            killed_at = time.monotonic()
            assert chat(serving, "tiny") == 200
            until(lambda: serving.status("/health", monitoring=True) == 200, 3.0, "monitoring")
            assert time.monotonic() - killed_at < 3.0
        after = serving.scrape().counters()
        assert {key: (count, after.get(key)) for key, count in before.items() if after.get(key, -1.0) < count} == {}
        moved = {key[0] for key, count in after.items() if count > before.get(key, 0.0)}
        assert value(serving.scrape(), "inference_total", model="tiny", status="success") == 3
        assert "llm_router_model_load_duration_seconds_count" not in moved
        assert serving.children()["runner-0"] == runner
        assert serving.log.count("is ready.") == 1


def test_a_killed_runner_is_routed_around_and_returns(tmp_path: Path) -> None:
    """Its model is not ready at once, and serves again when it is back."""
    path = model_file(tmp_path, "tiny")
    with Serving(
        tmp_path, f"models:\n  - name: tiny\n    file: {path}\n    runner: {{context_size: 512}}\n"
    ) as serving:
        serving.signal("runner-0", signal.SIGKILL)
        until(lambda: chat(serving, "tiny") == 200, 15)
        scrape = serving.scrape()
        assert value(scrape, "runner_restarts_total", model="tiny", reason="killed") == 1
        assert value(scrape, "errors_total", type="runner_lost") == 1
        assert value(scrape, "model_load_duration_seconds_count", model="tiny") == 2


def test_readiness_follows_the_router(tmp_path: Path) -> None:
    """503 with the word for it while nothing serves or everything leaves; liveness stays."""
    path = model_file(tmp_path, "tiny")
    with Serving(tmp_path, f"models:\n  - name: tiny\n    file: {path}\n", ready=False) as serving:
        words: set[str] = set()

        def is_ready() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = call(serving, "GET", "/health/ready", on="monitoring")
                words.add(answer["status"])
                assert (status == 200) == (answer["status"] == "ready")
                assert serving.status("/health/live", monitoring=True) == 200
                return status == 200
            return False

        until(is_ready, 20)
        assert "initializing" in words
        until(lambda: "is ready." in serving.log)
        health = call(serving, "GET", "/health")[1]
        assert (health["engine"], health["models"]["loaded"]) == ("llama.cpp", 1)
        assert rss_bytes(serving.children()["control"]) < 120e6
