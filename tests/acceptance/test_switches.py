"""The switches of monitoring in the running program: what is off is not there and costs nothing, what is set is heeded.

Environment and file at the start, the file again at a reload, and log levels at run time. Not for: what each part does when
it is on (test_health.py, test_logs.py, test_traces.py, test_profiles.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_router.testing import RecordedRequest, ScriptedBackend
from support.callers import Reply, chat, request, rows
from support.health import HealthPage
from support.log_records import entries
from support.serving import SOURCES, Serving
from support.wait import until

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LIVE = ("/health/live", "/health/ready", "/health/startup")

CONFIG = """
backends: [{name: b, url: "%(url)s", provider: local}]
models: [{name: m, deployments: [{backend: b, model: scripted}]}]
cache: {enabled: false}
"""


class Router(NamedTuple):
    """A router with one worker, and its backend."""

    serving: Serving
    backend: ScriptedBackend

    def on_both(self, method: str, path: str, body: object = None) -> set[int]:
        """The statuses of a request on the monitoring port and on the app port."""
        return {request(port, method, path, body).status for port in (self.serving.metrics_port, self.serving.port)}

    def chat(self, **more: Any) -> tuple[Reply, RecordedRequest]:
        """The reply to a chat, and what the backend was sent for it."""
        reply = chat(self.serving.port, **more)
        assert reply.status == 200, reply.body
        return reply, next(one for one in reversed(self.backend.requests) if one.method == "POST")

    def admin(self, method: str, path: str, body: object = None) -> Reply:
        return request(self.serving.metrics_port, method, path, body)

    def lines(self, file: str, folder: Path | None = None) -> list[dict[str, Any]]:
        return entries(folder or self.serving.folder / "data" / "logs", file)

    def about(self, reply: Reply, folder: Path | None = None) -> list[str]:
        """What application.log says of a chat, once it tells its end; by the levels."""
        id = reply.headers["x-request-id"]

        def told() -> list[str]:
            lines = [line for line in self.lines("application", folder) if line.get("request_id") == id]
            levels = [line["log.level"] for line in lines]
            return levels if "info" in levels else []

        return until(told, what="the line of a chat")

    def rewrite(self, more: str) -> None:
        """Change the configuration file; nobody is told."""
        path = self.serving.folder / "llm-router.yaml"
        path.write_text(CONFIG % {"url": self.backend.base_url} + more)


@contextlib.contextmanager
def routing(folder: Path, more: str = "", **env: str) -> Iterator[Router]:
    with ScriptedBackend() as backend:
        config = CONFIG % {"url": backend.base_url} + more
        with Serving(folder, config, "--workers", "1", env=env) as serving:
            yield Router(serving, backend)


def router(more: str = "", **env: str) -> Callable[..., Iterator[Router]]:
    """A fixture for the whole module."""

    @pytest.fixture(scope="module")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
        with routing(tmp_path_factory.mktemp("router"), more, **env) as router:
            yield router

    return made


quiet = router(
    "health: {interval: 200ms, paid_probe_daily_usd: 1}\nlogs: {metrics_interval: 1s}\n",
    MONITORING_ENABLED="false",
    PROFILER_ENABLED="true",
    HEALTH_CHECK_ENABLED="1",
)
uncounted = router("health: {interval: 200ms}\n", PROMETHEUS_ENABLED="no")
unchecked = router("metrics: {sample: {/v1/embeddings: 10}}\n", HEALTH_CHECK_ENABLED="0", ALERTING_ENABLED="off")


# -- off -----------------------------------------------------------------------------------------------------


def test_without_monitoring_nothing_of_it_is_there(quiet: Router) -> None:
    """`MONITORING_ENABLED=false` overrules the other switches, and says so."""
    for path in ("/metrics", "/metrics/json", "/health"):
        assert quiet.on_both("GET", path) == {404}, path
    assert quiet.on_both("POST", "/debug/profile?process=worker-0&seconds=1") == {404}
    for path in LIVE:
        assert quiet.on_both("GET", path) == {200}, path
    index = quiet.serving.get("/").decode()
    for absent in ("/metrics", "GET  /health ", "/debug/profile"):
        assert absent not in index
    assert "/health/live" in index
    debug = quiet.admin("GET", "/debug").json()
    assert debug["health"] is None
    log = quiet.serving.log
    assert "health is off although it is enabled: monitoring.enabled is false" in log
    assert "profiler is off although it is enabled: monitoring.enabled is false" in log
    assert not re.search(r"^  (metrics|health) ", log, re.MULTILINE), "the banner names no address where nothing is"


def test_without_monitoring_no_trace_begins_and_a_callers_own_goes_through(quiet: Router) -> None:
    _, sent = quiet.chat()
    assert "traceparent" not in sent.headers
    _, sent = quiet.chat(headers={"traceparent": TRACE, "tracestate": "a=b"})
    assert (sent.headers["traceparent"], sent.headers["tracestate"]) == (TRACE, "a=b")
    refused = request(quiet.serving.port, "GET", "/debug/requests")
    assert refused.status == 404 or refused.json()["requests"] == []


def test_without_monitoring_nothing_is_probed_counted_or_remembered(quiet: Router) -> None:
    quiet.chat()
    assert not [one for one in quiet.backend.requests if one.method == "GET"], "nobody asked the backend how it is"
    assert not (quiet.serving.folder / "data" / "probes.json").exists()
    assert not quiet.lines("metrics")
    models = quiet.admin("GET", "/debug/models").json()["models"]
    assert all(not model["requests"]["total"] for model in models), models


def test_logs_usage_and_answers_go_on_without_monitoring(quiet: Router) -> None:
    """They are not the monitoring's: one is the operator's, the other what things cost."""
    reply, _ = quiet.chat()
    assert quiet.about(reply) == ["info"]
    id = reply.headers["x-request-id"]
    line = until(lambda: [line for line in quiet.lines("access") if line["request_id"] == id], what="a line")[0]
    assert "trace.id" not in line
    until(lambda: [row for row in rows(quiet.serving.folder) if row["request_id"] == id], what="the usage row")


def test_without_metrics_health_is_there_and_checks_run(uncounted: Router) -> None:
    for path in ("/metrics", "/metrics/json"):
        assert uncounted.on_both("GET", path) == {404}
    page = HealthPage(uncounted.serving)
    page.until("backends", "healthy")
    page.until("cache_functionality", "healthy")
    assert uncounted.on_both("GET", "/health") == {200}
    uncounted.chat()
    models = uncounted.admin("GET", "/debug/models").json()["models"]
    assert all(not model["requests"]["total"] for model in models), models
    assert not re.search(r"^  metrics ", uncounted.serving.log, re.MULTILINE)
    assert re.search(r"^  health ", uncounted.serving.log, re.MULTILINE)


def test_without_health_checks_only_the_probes_of_orchestrators_answer(unchecked: Router) -> None:
    assert unchecked.on_both("GET", "/health") == {404}
    for path in LIVE:
        assert unchecked.on_both("GET", path) == {200}
    assert unchecked.on_both("GET", "/metrics") == {200}
    unchecked.chat()
    scrape = unchecked.serving.scrape()
    assert scrape.total("llm_router_inference_total") >= 1
    assert not [name for name, _, _ in scrape.samples if "health_check" in name], "no series of a check"
    assert not [one for one in unchecked.backend.requests if one.method == "GET"]
    assert unchecked.admin("GET", "/debug").json()["health"] is None


def test_a_profiler_that_is_off_has_no_endpoint_and_samples_nothing(unchecked: Router, tmp_path: Path) -> None:
    """One that is on samples in every process, driven by a signal; control and workers alike."""
    assert unchecked.on_both("POST", "/debug/profile?process=worker-0&seconds=1") == {404}
    assert not any(is_sampled(pid) for pid in unchecked.serving.children().values())
    with routing(tmp_path, HEALTH_CHECK_ENABLED="0", PROFILER_ENABLED="yes") as profiled:
        assert all(is_sampled(pid) for pid in profiled.serving.children().values())
        answer = profiled.admin("POST", "/debug/profile?process=worker-0&seconds=0.2&format=folded")
        assert answer.status == 200, answer.body


def is_sampled(pid: int) -> bool:
    """Whether a process waits for the signal of its profiler; Linux."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGPROF - 1) & 1)


def test_a_sampled_route_is_counted_exactly_and_observed_now_and_then(unchecked: Router) -> None:
    before = unchecked.serving.scrape()
    for _ in range(30):
        body = {"model": "m", "input": "text"}
        assert request(unchecked.serving.port, "POST", "/v1/embeddings", body).status == 200
        assert unchecked.chat()[0].status == 200
    after = unchecked.serving.scrape()

    def moved(name: str, **labels: str) -> float:
        return after.total(f"llm_router_{name}", **labels) - before.total(f"llm_router_{name}", **labels)

    for route, observed in (("/v1/embeddings", 3), ("/v1/chat/completions", 30)):
        assert moved("http_requests_total", route=route) == 30
        assert moved("http_request_duration_seconds_count", route=route) == observed
    assert moved("inference_total") == 60
    assert moved("inference_duration_seconds_count") == 33
    assert moved("overhead_seconds_count") == 33


# -- set by the environment ----------------------------------------------------------------------------------


def test_paths_levels_folders_and_the_name_of_the_environment(tmp_path: Path) -> None:
    logs = tmp_path / "elsewhere" / "logs"
    env = {
        "METRICS_ENDPOINT": "/internal/metrics",
        "HEALTH_ENDPOINT": "/internal/health",
        "LOG_LEVEL": "DEBUG",
        "LOG_DIR": str(logs),
        "ENVIRONMENT": "staging",
        "MONITORING_ENABLED": "on",
    }
    with routing(tmp_path, "logs: {level: error}\n", **env) as router:
        for path in ("/metrics", "/internal/metrics", "/health", "/internal/health"):
            assert router.on_both("GET", path) == {200}, path
        page = HealthPage(router.serving)
        assert page.reply("/internal/health").json()["environment"] == "staging"
        assert router.serving.get("/internal/metrics").startswith(b"# ")
        index = router.serving.get("/").decode()
        assert "/internal/metrics" in index
        assert "/internal/health" in index
        assert re.search(r"^  health .*/internal/health$", router.serving.log, re.MULTILINE)
        reply, _ = router.chat()
        assert "debug" in router.about(reply, logs)
        found = router.lines("application", logs)
        assert {line["env"] for line in found} == {"staging"}
        assert {line["process"] for line in found} >= {"supervisor", "worker-0"}
        assert not (tmp_path / "data" / "logs").exists()
        assert router.admin("GET", "/debug").json()["environment"]["env"] == "staging"


def test_a_log_folder_that_cannot_be_written_degrades_health_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with routing(tmp_path, "health: {interval: 300ms}\n", LOG_DIR=str(tmp_path / "file" / "logs")) as router:
        router.chat()
        check = HealthPage(router.serving).until("logs", "degraded")
        assert f"{tmp_path}/file/logs: " in check["message"]
        assert "Not a directory" in check["message"]
        router.chat()
        assert HealthPage(router.serving).reply().status == 200
        assert router.serving.log.count("cannot be written") <= len(router.serving.children()) + 1


# -- at run time ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with routing(tmp_path_factory.mktemp("changing")) as router:
        yield router


def levels_until(router: Router, wanted: set[str]) -> None:
    """Returns when a chat has lines of these levels: workers learn of a change in a moment."""
    until(lambda: set(router.about(router.chat()[0])) == wanted, what=f"lines of the levels {wanted}")


def test_a_level_that_is_set_for_a_while_reaches_workers_and_ends_by_itself(changing: Router) -> None:
    levels_until(changing, {"info"})
    answer = changing.admin("PUT", "/admin/log-level", {"level": "debug", "for": "2s"})
    assert answer.status == 200, answer.body
    assert answer.json()["level"] == "debug"
    assert answer.json()["changes"][0]["until"] is not None
    levels_until(changing, {"debug", "info"})
    until(lambda: not changing.admin("GET", "/admin/log-level").json()["changes"], what="the end of the change")
    assert changing.admin("GET", "/admin/log-level").json()["level"] == "info"
    levels_until(changing, {"info"})
    events = [line["event"] for line in changing.lines("audit")]
    assert events[-2:] == ["log_level_changed", "log_level_ended"]


def test_a_level_of_one_logger_leaves_the_others(changing: Router) -> None:
    answer = changing.admin("PUT", "/admin/log-level", {"level": "warning", "logger": "control"})
    assert answer.json()["loggers"] == {"llm_router.control": "warning"}
    levels_until(changing, {"info"})
    answer = changing.admin("PUT", "/admin/log-level", {"level": None, "logger": "llm_router.control"})
    assert answer.json()["loggers"] == {}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    (
        ({"level": "loud"}, "unknown_level", "'loud' is no level; there are debug, info, warning, error, critical"),
        ({"level": "debug", "logger": "gatway"}, "unknown_logger", "did you mean 'llm_router.gateway'?"),
        ({"level": "debug", "for": "soon"}, "", "should be a time like 30s, 10m or 2h"),
        ({"level": "debug", "for": "100d"}, "", "of 1s to 7d"),
        ({"level": 3}, "", "level"),
        ({"lvl": "debug"}, "", "lvl"),
        ({}, "", "level"),
    ),
)
def test_a_level_that_is_none_changes_nothing(changing: Router, body: object, code: str, said: str) -> None:
    answer = changing.admin("PUT", "/admin/log-level", body)
    assert answer.status == 400
    assert said in answer.message
    assert not code or answer.json()["error"]["code"] == code
    assert changing.admin("GET", "/admin/log-level").json()["changes"] == []


def test_a_reload_by_signal_takes_levels_and_tracing(changing: Router) -> None:
    _, sent = changing.chat()
    assert "traceparent" in sent.headers
    changing.rewrite("logs: {level: debug, levels: {llm_router.control: error}}\ntracing: {enabled: false}\n")
    changing.serving.process.send_signal(signal.SIGHUP)
    levels_until(changing, {"debug", "info"})
    until(lambda: "traceparent" not in changing.chat()[1].headers, what="chats without a trace")
    assert changing.admin("GET", "/admin/log-level").json()["configured"] == {
        "level": "debug",
        "loggers": {"llm_router.control": "error"},
    }


def test_a_reload_by_request_takes_levels_and_tracing_and_names_what_must_wait(changing: Router) -> None:
    changing.rewrite("tracing: {sample_ratio: 1}\n")
    answer = changing.admin("POST", "/admin/reload", {})
    assert (answer.status, answer.json()["needs_restart"]) == (200, [])
    levels_until(changing, {"info"})
    sampled = until(lambda: changing.chat()[1].headers.get("traceparent", "").endswith("-01"), what="sampled traces")
    assert sampled
    changing.rewrite("health: {enabled: false}\nmetrics: {enabled: false}\nprofiler: {enabled: true}\n")
    answer = changing.admin("POST", "/admin/reload", {})
    assert answer.json()["needs_restart"] == ["metrics", "health", "profiler"]
    assert changing.on_both("GET", "/health") == changing.on_both("GET", "/metrics") == {200}
    changing.rewrite("monitoring: {enabled: false}\n")
    assert changing.admin("POST", "/admin/reload", {}).json()["needs_restart"] == ["metrics", "health"]
    until(lambda: "traceparent" not in changing.chat()[1].headers, what="traces to be off with all the rest")


def test_a_reload_of_a_bad_file_changes_nothing(changing: Router) -> None:
    changing.rewrite("logs: {level: debug}\n")
    assert changing.admin("POST", "/admin/reload", {}).status == 200
    levels_until(changing, {"debug", "info"})
    for bad, said in (
        ("logs: {level: loud}\n", "logs.level"),
        ("health: {checks: {databse: {}}}\n", "did you mean 'database'?"),
        ("tracing: {sample_ratio: 2}\n", "tracing.sample_ratio"),
    ):
        changing.rewrite(bad)
        answer = changing.admin("POST", "/admin/reload", {})
        assert (answer.status, answer.json()["error"]["code"]) == (422, "config_error")
        assert said in answer.message, answer.message
    assert changing.serving.scrape().total("llm_router_config_last_reload_successful") == 0
    levels_until(changing, {"debug", "info"})
    changing.rewrite("")
    assert changing.admin("POST", "/admin/reload", {}).status == 200
    assert changing.serving.scrape().total("llm_router_config_last_reload_successful") == 1


# -- what cannot be used -------------------------------------------------------------------------------------


class Refused(NamedTuple):
    """A start that must fail: what is set, and what it must say."""

    env: Mapping[str, str]
    more: str
    said: tuple[str, ...]


REFUSED = (
    *(
        Refused({name: value}, "", (name, value, "true or false"))
        for name, value in (
            *(("MONITORING_ENABLED", "maybe"), ("PROMETHEUS_ENABLED", "2"), ("HEALTH_CHECK_ENABLED", "oui")),
            *(("ALERTING_ENABLED", "enabled"), ("PROFILER_ENABLED", "ja")),
        )
    ),
    Refused({"METRICS_ENDPOINT": "metrics"}, "", ("METRICS_ENDPOINT", "'metrics' is no path")),
    Refused({"HEALTH_ENDPOINT": "/v1/health"}, "", ("HEALTH_ENDPOINT", "would hide a part of the API")),
    Refused({"HEALTH_ENDPOINT": "/metrics"}, "", ("HEALTH_ENDPOINT", "is the path of the metrics too")),
    Refused({"LOG_LEVEL": "loud"}, "", ("LOG_LEVEL", "loud", "debug", "critical")),
    Refused({}, "health: {checks: {databse: {}}}", ("health.checks.databse", "did you mean 'database'?")),
    Refused({}, "health: {cpu_percent: 120}", ("health.cpu_percent", "120")),
    Refused({}, "health: {disk_path: /no/such/folder}", ("health.disk_path", "/no/such/folder")),
    Refused({}, 'health: {external: [{name: x, target: "tcp://host"}]}', ("health.external[0].target", "needs a port")),
    Refused(
        {}, 'health: {validate: [{name: x, model: m, prompt: hi, expect: "("}]}', ("health.validate[0].expect", "'('")
    ),
    Refused({}, "health: {validate: [{name: x, model: n, prompt: hi}]}", ("health.validate[0].model", "'n'")),
    Refused({}, "metrics: {sample: {/v1/embedings: 10}}", ("/v1/embeddings",)),
)


def test_what_cannot_be_used_is_refused_with_its_name_and_value(tmp_path: Path) -> None:
    """Before anything is started, in a line or two."""
    running = []
    for number, refused in enumerate(REFUSED):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "llm-router.yaml").write_text(CONFIG % {"url": "http://127.0.0.1:9/v1"} + refused.more + "\n")
        command = [sys.executable, "-m", "llm_router", "serve", "--port", "0", "--metrics-port", "0"]
        env = {"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"], "HOME": str(folder), **refused.env}
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=folder, text=True)
        )
    try:
        for refused, process in zip(REFUSED, running, strict=True):
            said, _ = process.communicate(timeout=50)
            assert process.returncode == 2, (refused, said)
            for words in refused.said:
                assert words in said, (refused, said)
            assert "Traceback" not in said
            assert len(said.splitlines()) <= 3, said
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
