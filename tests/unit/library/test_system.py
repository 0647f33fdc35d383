"""All parts together: what is on, what is off, and that a part that fails takes no other along."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.applications import Starlette

from llm_router import ConfigError, MonitoringSystem
from llm_router.library.current import Current
from llm_router.library.switches import Components
from llm_router.observe.profiling.profile import CannotProfile
from support.aio import run, until
from support.ask import ask


def system(env: dict[str, str] | None = None, **options: Any) -> MonitoringSystem:
    return MonitoringSystem(env=env or {}, **{"interval": 0.01, **options})


def paths(monitoring: MonitoringSystem, **options: Any) -> list[str]:
    return [route.path for route in monitoring.routes(**options)]


def test_partial_options_keep_the_other_defaults() -> None:
    """And the names of the guide are understood."""
    usual = {"prometheus": "stopped", "health": "stopped", "alerting": "stopped", "profiler": "off"}
    assert system().status() == usual
    assert system(components={"profiler": True}).status() == {**usual, "profiler": "stopped"}
    assert system(components={"health": False}).status() == {**usual, "health": "off"}
    assert system(enabled=False, components={"health": True}).status() == dict.fromkeys(usual, "off")
    own = system(integrations={"metricsToAlerting": False}).integrations
    assert (own.metrics_to_alerting, own.health_to_alerting) == (False, True)
    assert system(components=Components(alerting=False)).status()["alerting"] == "off"


@pytest.mark.parametrize(
    "variable, part",
    (
        ("PROMETHEUS_ENABLED", "prometheus"),
        ("HEALTH_CHECK_ENABLED", "health"),
        ("ALERTING_ENABLED", "alerting"),
    ),
)
def test_the_environment_switches_parts(variable: str, part: str) -> None:
    """The caller has the last word."""
    assert system({variable: "false"}).status()[part] == "off"
    assert system({variable: "no"}, components={part: True}).status()[part] == "stopped"
    assert system({"MONITORING_ENABLED": "0", variable: "true"}).status()[part] == "off"
    assert system({"MONITORING_ENABLED": "0"}, enabled=True).status()[part] == "stopped"
    assert system({"PROFILER_ENABLED": "on"}).status()["profiler"] == "stopped"


@pytest.mark.parametrize(
    "options, problem",
    (
        ({"components": {"promethius": True}}, "components.promethius: no such thing.*prometheus"),
        ({"components": {"health": "yes"}}, "components.health: 'yes' will not do: write True or False"),
        ({"enabled": "false"}, "enabled: 'false' will not do: write True or False"),
        ({"integrations": {"metricsToLogs": True}}, "integrations.metricsToLogs: no such thing"),
        ({"env": {"ALERTING_ENABLED": "maybe"}}, "ALERTING_ENABLED: 'maybe' will not do: write true or false"),
        ({"env": {"METRICS_ENDPOINT": "metrics"}}, "METRICS_ENDPOINT: 'metrics' is no path"),
    ),
)
def test_what_cannot_be_used_is_named(options: dict[str, Any], problem: str) -> None:
    """With the way out."""
    with pytest.raises(ConfigError, match=problem):
        MonitoringSystem(**{"env": {}, **options})


def test_it_starts_and_stops_as_often_as_one_likes() -> None:
    """Both may be said twice; what was counted stays."""

    async def scenario() -> None:
        monitoring = system(components={"profiler": True})
        seen: list[float] = []

        def watch(metrics: Current) -> bool:
            seen.append(metrics.x_total)
            return False

        monitoring.metrics.counter("x").inc()
        monitoring.alerting.add_rule("x", watch, "info", "m")
        monitoring.health.add_check("own", lambda: False)
        for _ in range(2):
            await monitoring.start()
            await monitoring.start()
            assert set(monitoring.status().values()) == {"running"}
            before = len(seen)
            await until(lambda before=before: len(seen) > before)  # type: ignore[misc]
            await until(lambda: monitoring.health.report().checks["own"].status == "degraded")
            assert monitoring.profiler.settings.enabled
            await monitoring.stop()
            await monitoring.stop()
            assert not monitoring.is_running
            assert not monitoring.profiler.settings.enabled
        assert seen[0] == 1

    run(scenario())


def test_a_check_that_is_not_healthy_is_an_alert() -> None:
    """Unless that is not wanted; and rules see no metrics where that is not wanted."""

    async def scenario() -> None:
        monitoring = system()
        monitoring.health.add_check("own", lambda: False, critical=True)
        async with monitoring:
            await until(lambda: any(rule.name == "health:own" for rule in monitoring.alerting.firing()))
            assert monitoring.alerting.state("health:own").severity == "critical"
            assert 'health_check_status{check="own"} 0.0' in monitoring.metrics.get_metrics()
            assert 'health_check_duration_seconds_count{check="own"} 1.0' in monitoring.metrics.get_metrics()
        apart = system(integrations={"metrics_to_alerting": False, "health_to_alerting": False})
        apart.alerting.add_rule("x", lambda metrics: metrics.errors_total > 0, "info", "m")
        await apart.health.run_all_checks()
        await apart.alerting.evaluate()
        (rule,) = apart.alerting.rules()
        assert "there is no metric 'errors_total'" in rule.error
        assert 'errors_total{type="alert_condition",component="alerting",severity="error"} 1.0' in (
            apart.metrics.get_metrics()
        )

    run(scenario())


def test_a_part_that_fails_is_logged_and_the_others_run(caplog: pytest.LogCaptureFixture) -> None:
    """Here the port for Prometheus is taken; another start tries again."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            monitoring = system(metrics_port=taken.getsockname()[1])
            await monitoring.start()
            status = monitoring.status()
            assert status["prometheus"].startswith("failed: port: ")
            assert "is taken by another program" in status["prometheus"]
            assert (status["health"], status["alerting"]) == ("running", "running")
            assert monitoring.metrics_url == ""
        await monitoring.start()
        assert monitoring.status()["prometheus"] == "running"
        await monitoring.stop()

    run(scenario())
    assert "the monitoring goes on without prometheus: port: " in caplog.text


def test_it_listens_for_prometheus() -> None:
    """At an address of its own, with the pages that are on, and for nobody's web page."""

    async def scenario() -> None:
        async with system(metrics_port=0, components={"alerting": False}) as monitoring:
            assert monitoring._listener is not None
            address = ("127.0.0.1", monitoring._listener.port)
            assert monitoring.metrics_url == f"http://127.0.0.1:{address[1]}/metrics"
            answer = await ask(address, "/metrics")
            assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
            assert (await ask(address, "/metrics/json")).json()
            assert (await ask(address, "/health/live")).status == 200
            assert (await ask(address, "/health")).json()["status"] in ("healthy", "degraded")
            assert (await ask(address, "/debug")).status == 404
            assert (await ask(address, "/metrics", headers={"host": "evil.example"})).status == 421
        with pytest.raises(ConfigError, match="can be reached by other machines"):
            await system(metrics_port=0, metrics_host="0.0.0.0")._start_listening()

    run(scenario())


def test_what_is_off_has_no_route_and_no_task() -> None:
    """And the application is not wrapped at all."""

    async def scenario() -> None:
        app = Starlette()
        on = system()
        assert paths(on) == ["/metrics", "/metrics/json", "/health", "/health/live", "/health/ready", "/health/startup"]
        assert paths(on, debug=True)[-2:] == ["/debug", "/debug/models"]
        assert paths(system({"PROMETHEUS_ENABLED": "0"}))[0] == "/health"
        assert paths(system({"HEALTH_CHECK_ENABLED": "0"})) == ["/metrics", "/metrics/json"]
        assert paths(system({"METRICS_ENDPOINT": "/m", "HEALTH_ENDPOINT": "/h"}))[:2] == ["/metrics", "/m"]
        assert on.middleware(app) is not app
        off = system({"MONITORING_ENABLED": "false"})
        assert paths(off, debug=True) == []
        assert off.middleware(app) is app
        await off.start()
        assert not off.is_running
        off.alerting.add_rule("x", lambda metrics: True, "info", "m")
        off.health.add_check("x", lambda: True)
        off.metrics.counter("x").inc()
        with pytest.raises(CannotProfile, match="switched off"):
            await off.profiler.take("cpu", 1, "folded")
        await off.stop()

    run(scenario())


def test_profiles_are_taken_of_the_program() -> None:
    """Where they are switched on."""

    async def scenario() -> None:
        async with system(components={"profiler": True}) as monitoring:
            assert b"application" in await monitoring.profiler.take("cpu", 0.1, "speedscope")

    run(scenario())
