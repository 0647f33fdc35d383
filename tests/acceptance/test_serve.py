"""The running program: what it counts, what survives which kill, how it ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from llm_router.testing import Gate, Hold, Pause, ScriptedBackend, Stall, framed, json_reply, stream_head
from support.net import free_port
from support.serving import SOURCES, Serving, children_of, is_alive, remote_config, rss_bytes
from support.tools import require
from support.wait import until

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
OK = json_reply({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 6}})


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


def chat(
    port: int, model: str = "m", *, stream: bool = False, connection: http.client.HTTPConnection | None = None
) -> int:
    """One chat request; its status, or 0 if the reply did not come whole."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "one two three"}]})
    try:
        own.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = own.getresponse()
        data = reply.read()
        if stream and reply.status == 200 and not data.endswith(b"data: [DONE]\n\n"):
            return 0
        return reply.status
    except (OSError, http.client.HTTPException):
        own.close()
        return 0
    finally:
        if connection is None:
            own.close()


class Load:
    """Threads that send chat requests over kept connections until stopped, counting what each saw."""

    def __init__(self, port: int, threads: int = 4) -> None:
        self.seen: Counter[int] = Counter()
        self._port = port
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        while not self._stop.is_set():
            status = chat(self._port, connection=connection)
            with self._lock:
                self.seen[status] += 1
        connection.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_every_counter_equals_what_the_clients_counted(tmp_path: Path, backend: ScriptedBackend, workers: int) -> None:
    with Serving(tmp_path, remote_config(backend.base_url), "--workers", str(workers)) as serving:
        plan = [("m", False), ("m", True), ("m", False), ("unknown", False)] * 25
        seen: Counter[tuple[str, bool, int]] = Counter()
        lock = threading.Lock()

        def run(part: list[tuple[str, bool]]) -> None:
            for model, stream in part:
                status = chat(serving.port, model, stream=stream)
                with lock:
                    seen[model, stream, status] += 1

        threads = [threading.Thread(target=run, args=(plan[i::5],)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scrape = serving.scrape()
    assert seen == {("m", False, 200): 50, ("m", True, 200): 25, ("unknown", False, 404): 25}
    total = scrape.total
    assert total("llm_router_inference_total") == 100
    assert total("llm_router_inference_total", model="m", strategy="balanced", status="success", cached="false") == 75
    assert total("llm_router_inference_total", model="__other__", status="error") == 25
    assert total("llm_router_inference_duration_seconds_count", model="m") == 75
    assert total("llm_router_tokens_generated_total", model="m") == 75 * 6
    assert total("llm_router_tokens_prompt_total", model="m") == 75 * 3
    assert total("llm_router_tokens_per_second_count", model="m") == 75
    assert total("llm_router_time_to_first_token_seconds_count", model="m") == 25
    assert total("llm_router_usage_records_total", source="provider") == 75
    assert total("llm_router_attempts_total", backend="b", outcome="success") == 75
    assert total("llm_router_routing_decisions_total", model="m", reason="only-deployment") == 75
    assert total("llm_router_overhead_seconds_count") == 75
    route = "/v1/chat/completions"
    assert total("llm_router_http_requests_total", route=route, status_code="200", method="POST") == 75
    assert total("llm_router_http_requests_total", route=route, status_code="404") == 25
    assert total("llm_router_errors_total", type="not_found", component="gateway") == 25
    assert total("llm_router_errors_total", type="worker_lost") == 0
    assert total("llm_router_requests_in_flight") == 0
    assert total("llm_router_backend_up", backend="b") == 1
    assert total("llm_router_worker_up") == workers
    # The guide's names are a second view of the same values.
    assert total("http_requests_total", method="POST", status="200") == 75
    assert total("model_inference_total", model="m") == 75
    assert total("model_tokens_generated_total", model="m") == 450
    assert total("model_inference_duration_seconds_count", model="m") == 75


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_lost_or_counted_twice_while_workers_are_killed(
    tmp_path: Path, backend: ScriptedBackend, workers: int
) -> None:
    backend.always(Pause(0.01), OK)
    kills = 4
    with Serving(tmp_path, remote_config(backend.base_url), "--workers", str(workers)) as serving:
        before: dict[tuple[str, ...], float] = {}
        in_flight = 0.0
        with Load(serving.port) as load:
            for kill in range(kills):
                served = load.seen[200]
                until(lambda: load.seen[200] > served + 20, what="requests being served")  # noqa: B023
                scrape = serving.scrape()
                now = dict(scrape.counters())
                down = {key: (value, now.get(key)) for key, value in before.items() if now.get(key, 0.0) < value}
                assert not down, "counters went down"
                before = now
                name = f"worker-{kill % workers}"
                pid = serving.signal(name, signal.SIGKILL)
                in_flight += 4
                until(lambda: not is_alive(pid), what="the kill")  # noqa: B023
                until(lambda: len([n for n in serving.children() if n.startswith("worker")]) == workers)
            served = load.seen[200]
            until(lambda: load.seen[200] > served + 20, what="requests being served after the last kill")
        scrape = serving.scrape()
        successes = load.seen[200]
        counted = scrape.total("llm_router_inference_total", model="m", status="success")
        lost = scrape.total("llm_router_errors_total", type="worker_lost")
        assert successes <= counted <= successes + in_flight
        assert lost <= in_flight
        if workers == 1:  # of two, the one that is killed may have been the one without clients
            assert lost > 0
        assert scrape.total("llm_router_worker_restarts_total", reason="killed") == kills
        assert set(load.seen) <= {0, 200}


def test_no_worker_sends_more_to_a_backend_that_is_busy_with_anothers_request(tmp_path: Path) -> None:
    """least-loaded with two workers: a second after one of them was given a request that is held, both avoid it."""
    gate = Gate()
    with ScriptedBackend() as slow, ScriptedBackend() as fast:
        slow.always(Hold(gate), OK)
        fast.always(OK)
        config = f"""
backends:
  - {{name: slow, url: "{slow.base_url}"}}
  - {{name: fast, url: "{fast.base_url}"}}
models:
  - name: m
    strategy: least-loaded
    deployments: [{{backend: slow}}, {{backend: fast}}]
"""
        with Serving(tmp_path, config, "--workers", "2") as serving:
            held = threading.Thread(target=chat, args=(serving.port,))
            held.start()
            try:
                slow.wait(lambda b: b.requests)
                in_flight = "llm_router_upstream_requests_in_flight"
                until(lambda: serving.scrape().total(in_flight, backend="slow") == 1, 1.0)
                until_seen = time.monotonic() + 0.5
                until(lambda: time.monotonic() > until_seen)  # the other worker reads what this one has written
                # Each on a connection of its own: one worker gets all of them once in 2**39 runs.
                assert [chat(serving.port) for _ in range(40)] == [200] * 40
                asked = [sum(request.method == "POST" for request in b.requests) for b in (slow, fast)]
                assert asked == [1, 40]  # health checks list models
            finally:
                gate.open()
                held.join()
            until(lambda: serving.scrape().total(in_flight) == 0)


def test_a_killed_worker_is_replaced_within_a_second(tmp_path: Path, backend: ScriptedBackend) -> None:
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        assert chat(serving.port) == 200
        serving.signal("worker-0", signal.SIGKILL)
        # The supervisor keeps the listening socket, so a request that comes now waits for the successor.
        assert chat(serving.port) == 200
        assert serving.scrape().total("llm_router_inference_total", status="success") == 2


def test_requests_go_on_while_control_is_away_and_monitoring_comes_back(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        assert chat(serving.port) == 200
        before = serving.scrape().counters()
        pid = serving.signal("control", signal.SIGKILL)
        until(lambda: not is_alive(pid))
        assert chat(serving.port) == 200
        assert serving.status("/health/ready") == 200
        until(lambda: serving.status("/metrics", monitoring=True) == 200, 3.0, "monitoring")
        scrape = serving.scrape()
        after = scrape.counters()
        assert scrape.total("llm_router_inference_total", status="success") == 2
        assert all(after.get(key, 0.0) >= value for key, value in before.items() if "scrape_duration" not in key[0])


def test_nothing_is_left_five_seconds_after_the_supervisor_was_killed(tmp_path: Path, backend: ScriptedBackend) -> None:
    with Serving(tmp_path, remote_config(backend.base_url), "--workers", "2") as serving:
        pids = list(serving.children().values())
        assert len(pids) == 3
        serving.kill()
        until(lambda: not any(is_alive(pid) for pid in pids), 5.0, "the end of every child")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", serving.port))


def test_a_hung_worker_is_replaced(tmp_path: Path, backend: ScriptedBackend) -> None:
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        hung = serving.signal("worker-0", signal.SIGSTOP)
        until(lambda: serving.children().get("worker-0", hung) != hung, 15.0, "a new worker")
        assert chat(serving.port) == 200
        assert serving.scrape().total("llm_router_worker_restarts_total", reason="hung") == 1
        assert "hung" in serving.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_replies_in_flight_finish(tmp_path: Path, backend: ScriptedBackend, number: signal.Signals) -> None:
    gate = Gate()
    backend.script(stream_head(), framed(EVENT), Hold(gate), framed(EVENT + b"data: [DONE]\n\n") + framed(b""))
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        pids = list(serving.children().values())
        statuses: list[int] = []
        streaming = threading.Thread(target=lambda: statuses.append(chat(serving.port, stream=True)))
        streaming.start()
        until(lambda: any(connection.sent_bytes for connection in backend.connections), what="a stream")
        serving.process.send_signal(number)
        until(lambda: serving.status("/health/ready", monitoring=True) == 503, 5.0, "readiness 503")
        assert serving.process.poll() is None
        gate.open()
        streaming.join(10)
        assert statuses == [200]
        assert serving.process.wait(10) == 0
        assert not any(is_alive(pid) for pid in pids)


def test_a_request_that_outlasts_the_drain_is_cut_by_the_worker_itself(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """So it is counted; a worker that was killed for it could not do that."""
    backend.always(Stall())
    config = "server: {drain: 300ms}\n" + remote_config(backend.base_url)
    with Serving(tmp_path, config) as serving:
        waiting = threading.Thread(target=chat, args=(serving.port,))
        waiting.start()
        backend.wait(lambda b: b.requests)
        serving.process.terminate()
        assert serving.process.wait(10) == 0
        waiting.join()
        assert "worker-0" in serving.log
        assert "killed" not in serving.log


def test_a_second_instance_in_the_same_folder_is_refused(tmp_path: Path, backend: ScriptedBackend) -> None:
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        other = subprocess.run(
            [sys.executable, "-m", "llm_router", "serve", "--data-dir", str(tmp_path / "data"), "--port", "0"],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(SOURCES), "HOME": str(tmp_path)},
            cwd=tmp_path,
            timeout=20,
            check=False,
        )
        assert other.returncode == 1
        assert str(serving.process.pid) in other.stderr


def test_processes_are_as_small_as_promised(tmp_path: Path, backend: ScriptedBackend) -> None:
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        for _ in range(200):
            chat(serving.port)
        serving.scrape()
        children = children_of(serving.process.pid)
        assert rss_bytes(serving.process.pid) <= 20e6
        assert rss_bytes(children["worker-0"]) <= 60e6
        assert rss_bytes(children["control"]) <= 120e6


def test_a_worker_and_the_supervisor_import_nothing_heavy() -> None:
    def modules(module: str) -> set[str]:
        code = f"import {module}, sys; print('\\n'.join(sys.modules))"
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCES)}, check=True
        )
        return {name.partition(".")[0] for name in run.stdout.split()}

    assert not modules("llm_router.processes.worker") & {
        "alembic", "genai_prices", "numpy", "psutil", "psycopg", "redis", "rich", "sqlalchemy", "starlette", "typer",
        "uvicorn", "xllamacpp", "yaml",
    }  # fmt: skip
    foreign = modules("llm_router.processes.supervisor") - set(sys.stdlib_module_names) - {"llm_router"}
    assert not {name for name in foreign if not name.startswith(("_", "sitecustomize"))}


def test_a_real_prometheus_finds_the_values(tmp_path: Path, backend: ScriptedBackend) -> None:
    prometheus = require("prometheus")
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        for _ in range(3):
            chat(serving.port)
        (tmp_path / "prometheus.yml").write_text(
            f"""
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: llm-router
    static_configs: [{{targets: ['127.0.0.1:{serving.metrics_port}']}}]
"""
        )
        port = free_port()
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stderr=subprocess.DEVNULL,
        )
        try:

            def query(expression: str) -> float | None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                try:
                    connection.request("GET", f"/api/v1/query?query={expression}")
                    found = json.loads(connection.getresponse().read())["data"]["result"]
                except (OSError, ValueError, KeyError, http.client.HTTPException):
                    return None
                finally:
                    connection.close()
                return float(found[0]["value"][1]) if found else None

            assert until(lambda: query("sum(llm_router_inference_total)"), 20.0, "a scrape") == 3
            assert query("sum(model_inference_total)") == 3
            assert query("up") == 1
            assert query("count(llm_router_build_info)") == 1
        finally:
            process.terminate()
            process.wait(10)


def test_metrics_are_valid_for_promtool(tmp_path: Path, backend: ScriptedBackend) -> None:
    promtool = require("promtool")
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:
        chat(serving.port)
        chat(serving.port, stream=True)
        text = serving.get("/metrics")
        openmetrics = serving.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
        as_json = json.loads(serving.get("/metrics/json"))
        through_the_app_port = serving.get("/metrics", monitoring=False)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = [line for line in checked.stderr.decode().splitlines() if line.startswith("llm_router_")]
    assert complaints == []
    assert openmetrics.endswith(b"# EOF\n")
    assert b'# {trace_id="' in openmetrics
    assert any(family["name"] == "llm_router_inference_total" for family in as_json)
    assert b"llm_router_inference_total" in through_the_app_port


def test_many_streams_at_once(tmp_path: Path, backend: ScriptedBackend) -> None:
    """64 clients read streams side by side; every one comes whole."""
    events = [framed(EVENT) if i % 5 else Pause(0.002) for i in range(50)]
    backend.always(stream_head(), *events, framed(b"data: [DONE]\n\n") + framed(b""))
    with Serving(tmp_path, remote_config(backend.base_url)) as serving:

        async def one() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
            body = b'{"model":"m","stream":true,"messages":[]}'
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            data = await reader.read()
            writer.close()
            await writer.wait_closed()
            return data.count(EVENT) == 40 and b"[DONE]" in data

        async def all_of_them() -> list[bool]:
            return await asyncio.gather(*(one() for _ in range(64)))

        assert all(asyncio.run(all_of_them()))
        assert serving.scrape().total("llm_router_inference_total", status="success") == 64
        assert serving.scrape().total("llm_router_active_connections", protocol="sse") == 0
