"""The collector: the twelve things of the examples, metrics of one's own, and what is shown of them."""

from __future__ import annotations

import threading
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llm_router import MetricsCollector, families
from llm_router.library.host import Host
from llm_router.library.metrics import _EVENTS
from llm_router.signals import OTHER


def samples(metrics: MetricsCollector) -> dict[str, float]:
    """Values by the text of their series."""
    found = {}
    for family in text_string_to_metric_families(metrics.get_metrics()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


SEEDS: dict[str, Any] = {
    "http_request": {"method": "GET", "route": "/x", "statusCode": 200, "duration": 1500},
    "inference_complete": {
        "model": "m", "strategy": "quick", "duration": 2000, "tokens": 20, "cached": False, "status": "success",
    },
    "model_loaded": {"model": "m", "format": "gguf", "size": 2e9, "duration": 3000},
    "model_unloaded": {"format": "gguf", "size": 2e9},
    "cache_hit": "response",
    "cache_miss": "response",
    "cache_size_update": {"cacheType": "response", "size": 512},
    "connection_open": {"type": "client", "protocol": "sse"},
    "connection_close": {"type": "client", "protocol": "sse", "duration": 4000},
    "error": {"type": "oops", "component": "shop", "severity": "critical"},
    "queue_size_change": {"queueType": "jobs", "size": 7},
    "queue_processed": {"queueType": "jobs", "processingTime": 250},
}  # fmt: skip


def test_there_are_twelve_events() -> None:
    """As in the monitoring examples."""
    assert set(_EVENTS) == set(SEEDS)
    assert len(SEEDS) == 12


def test_events_by_name_are_counted_as_the_examples_say() -> None:
    """With their keys and their milliseconds."""
    metrics = MetricsCollector()
    for event, data in SEEDS.items():
        metrics.emit(event, data)
    found = samples(metrics)
    http = "{method=GET,route=/x,status_code=200}"
    assert found[f"llm_router_http_requests_total{http}"] == 1
    assert found[f"llm_router_http_request_duration_seconds_sum{http}"] == 1.5
    assert found["llm_router_inference_total{cached=false,model=m,status=success,strategy=quick}"] == 1
    assert found["llm_router_inference_duration_seconds_sum{model=m,strategy=quick}"] == 2
    assert found["llm_router_tokens_generated_total{model=m,strategy=quick}"] == 20
    assert found["llm_router_tokens_per_second_sum{model=m}"] == 10
    assert found["llm_router_models_loaded{format=gguf,size_category=medium}"] == 0  # loaded, and unloaded
    assert found["llm_router_model_load_duration_seconds_sum{format=gguf,model=m}"] == 3
    assert found["llm_router_model_memory_bytes{format=gguf,model=m}"] == 2e9
    assert found["llm_router_cache_hits_total{cache_type=response}"] == 1
    assert found["llm_router_cache_misses_total{cache_type=response}"] == 1
    assert found["llm_router_cache_size_bytes{cache_type=response}"] == 512
    assert found["llm_router_active_connections{protocol=sse,type=client}"] == 0
    assert found["llm_router_connection_duration_seconds_sum{protocol=sse,type=client}"] == 4
    assert found["llm_router_errors_total{component=shop,severity=critical,type=oops}"] == 1
    assert found["llm_router_queue_size{queue_type=jobs}"] == 7
    assert found["llm_router_queue_processing_seconds_sum{queue_type=jobs}"] == 0.25
    assert found["http_requests_total{method=GET,status=200}"] == 1  # the guide's name


def test_methods_do_the_same_in_seconds() -> None:
    """And a model that leaves by name takes its series along; a cached answer has no duration."""
    metrics = MetricsCollector()
    metrics.http_request("BREW", "/x", "abc", 0.1)
    metrics.inference_complete("m", "s", duration_s=1, tokens=5, cached=True)
    metrics.model_loaded("m", "gguf", size_bytes=1, duration_s=1)
    metrics.model_unloaded("gguf", size_bytes=1, model="m")
    found = samples(metrics)
    assert found[f"llm_router_http_requests_total{{method={OTHER},route=/x,status_code={OTHER}}}"] == 1
    assert found["llm_router_inference_total{cached=true,model=m,status=success,strategy=s}"] == 1
    assert not any(name.startswith(("llm_router_inference_duration", "llm_router_model_memory")) for name in found)


@pytest.mark.parametrize(
    "event, data, problem",
    (
        ("http_requests", {}, "there is no event 'http_requests'; there are http_request, "),
        ("http_request", {"method": "GET"}, "http_request needs 'route'; given were method"),
        ("queue_size_change", {"queueType": "q", "size": -1}, "size of queue_size_change is -1; it is a number from 0"),
        ("queue_size_change", {"queueType": "q", "size": float("nan")}, "is nan"),
        ("queue_size_change", {"queueType": "q", "size": True}, "is True"),
        ("inference_complete", {"model": "m", "duration": 1, "status": "ok"}, "status is 'ok'; it is one of success"),
        ("error", 5, "the data of error are int; they are a mapping"),
    ),
)
def test_what_cannot_be_counted_is_named(event: str, data: Any, problem: str) -> None:
    """Event, key and value; nothing is counted."""
    metrics = MetricsCollector()
    before = metrics.get_metrics()
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        metrics.emit(event, data)
    assert metrics.get_metrics() == before


def test_metrics_of_ones_own() -> None:
    """Counters, gauges and histograms, with labels by name or bound."""
    metrics = MetricsCollector()
    orders = metrics.counter("orders", "Orders taken", labels=("country", "kind"))
    orders.inc(country="NZ", kind="book")
    orders.labels("NZ", "book").inc(2)
    orders.labels(country="DE", kind="pen").inc()
    level = metrics.gauge("basket_items")
    level.set(4)
    level.inc()
    level.dec(2)
    weight = metrics.histogram("parcel_grams", "Weights", buckets=(100, 500, float("inf")))
    for grams in (50, 200, 900):
        weight.observe(grams)
    found = samples(metrics)
    assert found["orders_total{country=NZ,kind=book}"] == 3
    assert found["orders_total{country=DE,kind=pen}"] == 1
    assert found["basket_items{}"] == 3
    assert [found[f"parcel_grams_bucket{{le={le}}}"] for le in ("100.0", "500.0", "+Inf")] == [1, 2, 3]
    assert metrics.counter("orders_total", "Orders taken", labels=("country", "kind")) is orders
    level.remove()
    assert "basket_items{}" not in samples(metrics)
    assert {"name": "orders_total", "type": "counter"}.items() <= next(
        family for family in metrics.get_metrics_json() if family["name"] == "orders_total"
    ).items()


@pytest.mark.parametrize(
    "make, problem",
    (
        (lambda m: m.counter("1st"), "a metric cannot be called '1st'"),
        (lambda m: m.counter("llm_router_errors_total"), "llm_router_errors_total is a family of the router's"),
        (lambda m: m.gauge("system_cpu_usage_percent"), "is a family of the router's"),
        (lambda m: m.gauge("x_total"), "must not end in"),
        (lambda m: m.gauge("x", labels=("a-b",)), "x cannot have the label 'a-b'"),
        (lambda m: m.gauge("x", labels="ab"), "a sequence of names"),
        (lambda m: m.gauge("x", labels=("a", "a")), "x has a label twice"),
        (lambda m: m.histogram("x", labels=("le",)), "cannot have a label 'le'"),
        (lambda m: m.histogram("x", buckets=(2, 1)), r"the buckets of x must be numbers that ascend: \[2, 1\]"),
        (lambda m: m.counter("x", max_series=0), "max_series of x_total is 0"),
        (lambda m: m.counter("x", labels=("a",)).inc(b=1), "x_total has the labels a; given were b"),
        (lambda m: m.counter("x").inc(-1), "is a counter: it grows, -1 cannot be added"),
        (lambda m: m.gauge("x").set(float("nan")), "x: to set nan is no number"),
        (lambda m: (m.gauge("x"), m.counter("x_total"), m.gauge("x", labels=("b",))), "x is there already"),
        (lambda m: m.counter("x", labels=("a",)).labels("1").inc(a=2), "has its label values already"),
    ),
)  # fmt: skip
def test_what_cannot_be_a_metric_is_named(make: Any, problem: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=problem):
        make(MetricsCollector())


def test_label_sets_are_bounded() -> None:
    """The rest is `__other__`, and counted as refused."""
    metrics = MetricsCollector()
    visits = metrics.counter("visits", labels=("page",), max_series=3)
    for page in range(10):
        visits.inc(page=page)
    found = samples(metrics)
    assert found["visits_total{page=__other__}"] == 7
    assert found["llm_router_series_dropped_total{family=visits_total}"] == 7


def test_many_threads_count_right() -> None:
    """Nothing is lost, also while somebody looks and declares."""
    metrics = MetricsCollector()
    counter = metrics.counter("ticks", labels=("who",))

    def work(who: int) -> None:
        for n in range(2000):
            counter.inc(who=who % 2)
            metrics.cache_hit()
            if n % 500 == 0:
                metrics.gauge(f"g_{who}_{n}").set(1)
                metrics.get_metrics()

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = samples(metrics)
    assert found["ticks_total{who=0}"] == found["ticks_total{who=1}"] == 4000
    assert found["llm_router_cache_hits_total{cache_type=response}"] == 8000


def test_reset_sets_everything_to_zero_and_children_go_on() -> None:
    """As for a test that begins anew."""
    metrics = MetricsCollector()
    counter = metrics.counter("things")
    counter.inc(5)
    metrics.queue_size_change("jobs", 9)
    metrics.http_request("GET", "/", 200, 1)
    metrics.reset()
    assert {v for k, v in samples(metrics).items() if not k.startswith("llm_router_build_info")} == {0}
    counter.inc()
    assert samples(metrics)["things_total{}"] == 1


def test_foreign_collectors_are_shown() -> None:
    """A whole registry of prometheus_client; one that raises costs its own families only."""
    metrics = MetricsCollector()
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("theirs", "Theirs", registry=registry).inc(3)
    metrics.register(registry)

    class Broken:
        def collect(self) -> Any:
            raise RuntimeError("broken")

    metrics.register(Broken())
    assert samples(metrics)["theirs_total{}"] == 3
    assert samples(metrics)["llm_router_errors_total{component=control,severity=error,type=render}"] >= 1
    metrics.unregister(registry)
    assert "theirs_total{}" not in samples(metrics)


def test_off_keeps_nothing_and_takes_everything() -> None:
    """A program need not ask whether metrics are on."""
    metrics = MetricsCollector(enabled=False)
    for event, data in SEEDS.items():
        metrics.emit(event, data)
    metrics.counter("a").inc()
    metrics.gauge("b", labels=("x",)).labels("1").set(2)
    metrics.histogram("c").observe(1)
    metrics.reset()
    assert metrics.get_metrics() == ""
    assert metrics.get_metrics_json() == []
    assert metrics.collected().families == []

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    assert metrics.middleware(app) is app


def test_openmetrics_and_the_process(tmp_path: Any) -> None:
    """OpenMetrics ends as it must; what process and machine use is there where it is wanted."""
    metrics = MetricsCollector(host=Host(str(tmp_path)))
    assert metrics.get_metrics(openmetrics=True).endswith("# EOF\n")
    found = samples(metrics)
    assert found["llm_router_process_resident_memory_bytes{process=application}"] > 1e6
    assert 0 <= found[f"llm_router_system_disk_usage_ratio{{path={tmp_path}}}"] <= 1
    assert metrics.content_type.startswith("text/plain")


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 1000)), max_size=30))
def test_any_label_value_comes_out_as_it_went_in(entries: list[tuple[str, int]]) -> None:
    """Quotes, backslashes, line ends, halves of surrogate pairs."""
    metrics = MetricsCollector(guide_names=False)
    counter = metrics.counter("c", labels=("l",))
    expected: dict[str, float] = {}
    for text, n in entries:
        counter.inc(n, l=text)
        plain = text.encode("utf-8", "replace").decode()
        expected[plain] = expected.get(plain, 0.0) + n
    collected = metrics.collected()
    rows = next(rows for rows in collected.families if rows.family is counter.family)
    assert {row.labels[0]: row.values[0] for row in rows.rows} == expected


def test_every_family_of_the_twelve_is_declared() -> None:
    """None is made up."""
    metrics = MetricsCollector(guide_names=False)
    for event, data in SEEDS.items():
        metrics.emit(event, data)
    known = {family.name for family in families.FAMILIES}
    assert {rows.family.name for rows in metrics.collected().families} <= known
