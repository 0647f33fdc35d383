"""Rules as functions: their states over time, and that none of them can stop another."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from llm_router import Alerting, MetricsCollector
from llm_router.library.alerting import HealthWord, Look
from llm_router.library.current import Current, NoSuchMetric
from llm_router.observe.metrics.slots import Collected
from llm_router.testing import FakeClock
from support import wait
from support.aio import run, until


class Bench:
    """Rules over a collector, with a clock of their own."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.metrics = MetricsCollector()
        self.health: dict[str, HealthWord] = {}
        self.failed = 0
        self.alerting = Alerting(
            lambda: Look(self.metrics.collected(), dict(self.health)),
            clock=self.clock,
            wall=lambda: 1_700_000_000.0 + self.clock.now,
            on_failure=self.count,
            **options,
        )

    def count(self) -> None:
        self.failed += 1

    def look(self, seconds: float = 5.0) -> Mapping[str, str]:
        self.clock.advance(seconds)
        run(self.alerting.evaluate())
        return {rule.name: rule.state for rule in self.alerting.rules()}


def test_a_rule_fires_while_its_condition_holds() -> None:
    """With the value that it read, and since when."""
    bench = Bench()
    level = bench.metrics.gauge("custom_value")
    bench.alerting.add_rule("custom", lambda metrics: metrics.custom_value > 10, "warning", "exceeded")
    assert bench.alerting.state("custom").state == "waiting"
    level.set(5)
    assert bench.look() == {"custom": "ok"}
    level.set(11)
    assert bench.look() == {"custom": "firing"}
    state = bench.alerting.state("custom")
    assert (state.value, state.severity, state.message, state.evaluations) == (11.0, "warning", "exceeded", 2)
    assert state.since == "2023-11-14T22:30:10.000Z"
    bench.look()
    assert bench.alerting.state("custom").since == state.since
    assert [rule.name for rule in bench.alerting.firing()] == ["custom"]
    level.set(1)
    assert bench.look() == {"custom": "ok"}


def test_a_rule_waits_as_long_as_it_is_told_to() -> None:
    """And begins anew when the condition did not hold in between."""
    bench = Bench()
    level = bench.metrics.gauge("load")
    bench.alerting.add_rule("busy", lambda metrics: metrics.load > 1, "critical", "busy", for_=10)
    level.set(2)
    assert [bench.look()["busy"] for _ in range(3)] == ["pending", "pending", "firing"]
    level.set(0)
    assert bench.look()["busy"] == "ok"
    level.set(2)
    assert bench.look()["busy"] == "pending"


def test_the_rule_of_the_guide_is_a_mapping() -> None:
    """With `for` and labels, if they are wanted."""
    bench = Bench()
    bench.metrics.gauge("custom_value").set(9)
    bench.alerting.add_rule(
        {
            "name": "custom_metric_alert",
            "condition": lambda metrics: (metrics["custom_value"] > 5, 0.75),
            "severity": "critical",
            "message": "Custom metric exceeded threshold",
            "labels": {"team": "books"},
        }
    )
    bench.look()
    state = bench.alerting.state("custom_metric_alert")
    assert (state.state, state.value, state.labels) == ("firing", 0.75, {"team": "books"})
    bench.alerting.remove_rule("custom_metric_alert")
    assert bench.alerting.rules() == []


def test_a_condition_that_fails_is_counted_and_stops_no_other() -> None:
    """Whatever it raises or returns; when it answers again, all is well again."""
    bench = Bench()
    broken = True

    def wavering(metrics: Current) -> bool:
        if broken:
            raise KeyError("sk-ant-abcdefghijklmnopqrstuvwxyz0123456789")
        return False

    bench.alerting.add_rule("raises", wavering, "warning", "m")
    bench.alerting.add_rule("exits", lambda metrics: sys.exit("no"), "warning", "m")
    bench.alerting.add_rule("nonsense", lambda metrics: "yes", "warning", "m")
    bench.alerting.add_rule("unknown", lambda metrics: metrics.quue_size > 1, "warning", "m")
    bench.alerting.add_rule("fine", lambda metrics: True, "info", "m")
    states = bench.look()
    assert states == {"raises": "error", "exits": "error", "nonsense": "error", "unknown": "error", "fine": "firing"}
    assert bench.failed == 4
    errors = {rule.name: rule.error for rule in bench.alerting.rules()}
    assert "sk-ant" not in errors["raises"]
    assert errors["exits"] == "RuntimeError: SystemExit: no"
    assert "the condition returned str; it returns True or False" in errors["nonsense"]
    assert "there is no metric 'quue_size'; did you mean queue_size" in errors["unknown"]
    broken = False
    assert bench.look()["raises"] == "ok"
    assert (bench.alerting.state("raises").failures, bench.alerting.state("raises").error) == (1, "")


def test_a_condition_that_hangs_stops_no_other() -> None:
    """It is not asked again before it has ended."""
    bench = Bench(timeout_s=0.05)
    gate, asked = threading.Event(), []

    def hang(metrics: Current) -> bool:
        asked.append(1)
        gate.wait(20)
        return False

    bench.alerting.add_rule("hangs", hang, "warning", "m")
    bench.alerting.add_rule("fine", lambda metrics: True, "warning", "m")
    assert bench.look() == {"hangs": "error", "fine": "firing"}
    assert "within 0.05 s" in bench.alerting.state("hangs").error
    assert bench.look()["hangs"] == "error"
    assert "has been running for more than" in bench.alerting.state("hangs").error
    assert len(asked) == 1
    wait.until(lambda: [thread.name for thread in threading.enumerate()].count("alert rules") == 1, what="one thread")
    gate.set()
    rule = bench.alerting._rules["hangs"]
    assert rule.thread is not None
    rule.thread.join(10)
    assert not rule.thread.is_alive()
    assert bench.look()["hangs"] == "ok"


def test_checks_that_are_not_healthy_are_alerts() -> None:
    """As severe as they are; they leave with the check."""
    bench = Bench()
    bench.health = {"db": HealthWord(0.0, "away"), "disk": HealthWord(0.5, "full"), "cpu": HealthWord(1.0, "fine")}
    assert bench.look() == {"health:db": "firing", "health:disk": "firing", "health:cpu": "ok"}
    state = bench.alerting.state("health:db")
    assert (state.severity, state.message, state.value, state.labels) == ("critical", "away", 0.0, {"check": "db"})
    assert bench.alerting.state("health:disk").severity == "warning"
    bench.alerting.add_rule("both", lambda metrics: metrics.health["db"] < 1, "info", "m")
    del bench.health["cpu"]
    assert bench.look() == {"both": "firing", "health:db": "firing", "health:disk": "firing"}


@pytest.mark.parametrize(
    "rule, problem",
    (
        ({"name": ""}, "a rule needs a name"),
        ({"name": "health:x", "condition": bool}, "stands for health checks"),
        ({"name": "x"}, "the condition of 'x' is NoneType; it is a function"),
        ({"name": "x", "condition": "up == 0"}, "the condition of 'x' is text"),
        ({"name": "x", "condition": bool, "severity": "bad"}, "the severity of 'x' is 'bad'; it is critical, error"),
        ({"name": "x", "condition": bool, "for": -1}, "how long 'x' must hold is -1"),
        ({"name": "x", "condition": bool, "annotations": {}}, "a rule has no 'annotations'; it has name, condition"),
    ),
)
def test_what_cannot_be_a_rule_is_named(rule: dict[str, Any], problem: str) -> None:
    """With the way out."""
    alerting = Alerting()
    with pytest.raises(ValueError, match=problem):
        alerting.add_rule(rule)
    assert alerting.rules() == []
    with pytest.raises(ValueError, match="there is no rule 'y'; there are: none"):
        alerting.remove_rule("y")
    with pytest.raises(ValueError, match="interval is 0"):
        Alerting(interval_s=0)


def test_it_evaluates_by_itself() -> None:
    """Until it is stopped; both may be said twice. Off, it does nothing."""

    async def scenario() -> None:
        alerting = Alerting(interval_s=0.001)
        alerting.add_rule("x", lambda metrics: True, "info", "m")
        await alerting.start()
        await alerting.start()
        await until(lambda: alerting.state("x").evaluations > 2)
        await alerting.stop()
        await alerting.stop()
        assert not alerting.is_running
        off = Alerting(enabled=False)
        await off.start()
        assert not off.is_running

    run(scenario())


# -- what conditions see --------------------------------------------------------------------------------


def test_metrics_by_many_names() -> None:
    """With and without prefix and suffix, the guide's too; sums over labels, or of some."""
    metrics = MetricsCollector()
    metrics.http_request("GET", "/a", 200, 0.2)
    metrics.http_request("GET", "/b", 500, 0.6)
    now = Current(metrics.collected())
    assert now.llm_router_http_requests_total == now.http_requests_total == now["http_requests"] == 2
    assert now.value("llm_router_http_requests_total", status_code="500") == 1
    assert now.http_request_duration_seconds_count == 2
    assert now.http_request_duration_seconds_sum == pytest.approx(0.8)
    assert 0.1 < now.quantile("llm_router_http_request_duration_seconds", 0.5) <= 0.5
    assert now.read == now.quantile("llm_router_http_request_duration_seconds", 0.5)
    assert math.isnan(now.active_users)
    assert now.cache_hits_total == 0
    assert math.isnan(now.quantile("inference_duration_seconds", 0.9))
    assert not hasattr(now, "nothing_of_the_kind")


@pytest.mark.parametrize(
    "ask, problem",
    (
        (lambda m: m.value("llm_router_cache_hits_total", model="x"), "has no label 'model'; it has cache_type"),
        (lambda m: m.quantile("cache_hits_total", 0.5), "only histograms have quantiles"),
        (lambda m: m.rate("cache_hit_total"), "did you mean"),
    ),
)
def test_metrics_that_there_are_not(ask: Any, problem: str) -> None:
    """Are named, with those that come close."""
    with pytest.raises(NoSuchMetric, match=problem):
        ask(Current(MetricsCollector().collected()))


def test_growth_since_the_last_look() -> None:
    """A second, too; 0 at first, and a counter that began anew has grown by what it shows."""
    metrics = MetricsCollector()
    metrics.error("a")
    first = metrics.collected()
    assert Current(first).increase("errors_total") == 0
    metrics.error("a")
    metrics.error("b")
    second = metrics.collected()
    now = Current(second, first, 4.0)
    assert now.increase("errors_total") == 2
    assert now.rate("errors_total", type="b") == 0.25
    metrics.reset()
    metrics.error("a")
    assert Current(metrics.collected(), second, 1.0).increase("errors_total") == 1
    assert Current(second, Collected([]), 1.0).increase("errors_total") == 3
