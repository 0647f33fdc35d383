"""What `serve` hands to the supervisor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_router.cli.serve import banner, plan_of
from llm_router.config import load
from llm_router.errors import ConfigError
from llm_router.processes.plan import LaunchPlan

CONFIG = """
backends: [{name: b, url: "http://127.0.0.1:1/v1"}]
models: [{name: m, deployments: [{backend: b}]}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no variables that mean something to us."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOST", "PORT", "METRICS_PORT", "DATA_DIR", "LOG_DIR", "METRICS_ENDPOINT", "HEALTH_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_plan_lets_control_load_the_same_configuration(folder: Path) -> None:
    """Path, flags and environment lead to the same settings again, after a journey as JSON."""
    (folder / "llm-router.yaml").write_text(CONFIG)
    plan = plan_of(None, {"port": 4000, "drain": "5s", "workers": "2", "data_dir": "d", "metrics_port": "off"})
    plan = LaunchPlan.from_json(plan.to_json())
    assert (plan.port, plan.drain_s, plan.workers, plan.metrics_port) == (4000, 5.0, 2, -1)
    assert plan.data_dir == str(folder / "d")
    assert plan.config_path == str(folder / "llm-router.yaml")
    again = load(plan.config_path, {}, json.loads(json.dumps(plan.overrides)))
    assert (again.server.port, again.server.drain_s, again.server.workers) == (4000, 5.0, 2)
    assert [model.name for model in again.models] == ["m"]


def test_the_plan_says_how_log_lines_look(folder: Path) -> None:
    """The supervisor and children that start know it before any snapshot."""
    logs = "logs: {level: warning, levels: {llm_router.supervisor: debug}, console: text}\n"
    (folder / "llm-router.yaml").write_text(CONFIG + logs + "server: {environment: staging}\n")
    plan = plan_of(None, {})
    assert (plan.console, plan.environment, plan.service) == ("text", "staging", "llm-router")
    assert (plan.log_level, plan.log_levels) == ("warning", {"llm_router.supervisor": "debug"})


def test_the_banner_tells_addresses_and_a_request_that_answers(folder: Path) -> None:
    """The curl names the default model, and its body is JSON."""
    (folder / "llm-router.yaml").write_text(CONFIG)
    text = banner(load(None, {"PORT": "4000"}, {}))
    assert "http://127.0.0.1:4000/v1" in text
    assert "http://127.0.0.1:9090/metrics" in text
    assert "http://127.0.0.1:9090/health" in text
    body = text.partition("-d '")[2].partition("'")[0]
    assert json.loads(body)["model"] == "m"


def test_ports_that_are_not_known_yet_are_left_to_fill_in(folder: Path) -> None:
    """Whoever announces the banner knows them."""
    text = banner(load(None, {}, {"port": 0, "metrics_port": 0}))
    assert "http://127.0.0.1:{port}/v1" in text
    assert "http://127.0.0.1:{metrics_port}/metrics" in text
    assert "Try:" not in text, "there is no model yet"


def test_the_banner_names_no_address_where_nothing_is(folder: Path) -> None:
    text = banner(load(None, {"PROMETHEUS_ENABLED": "off"}, {}))
    assert ("/metrics" in text, "/health" in text) == (False, True)
    text = banner(load(None, {"MONITORING_ENABLED": "off"}, {}))
    assert ("/metrics" in text, "/health" in text) == (False, False)


def test_addresses_in_the_banner_can_be_connected_to(folder: Path) -> None:
    """Wildcards cannot; IPv6 has brackets."""
    assert "http://127.0.0.1:3006/v1" in banner(load(None, {"HOST": "0.0.0.0"}, {}))
    assert "http://[::1]:3006/v1" in banner(load(None, {"HOST": "::"}, {}))
    assert "http://127.0.0.1:3006/metrics" in banner(load(None, {"METRICS_PORT": "off"}, {}))


def test_a_broken_model_file_stops_the_start(folder: Path) -> None:
    """Before any process is made, naming the key."""
    (folder / "m.gguf").write_bytes(b"GGUF, but not really a model file at all")
    (folder / "llm-router.yaml").write_text("models: [{name: m, file: ./m.gguf}]\n")
    with pytest.raises(ConfigError, match=r"models\[0\].file"):
        plan_of(None, {})
