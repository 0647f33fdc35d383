"""The contract of metric names: what the catalogue promises is declared, and the running program exports exactly that.

Dashboards, rules and other people's queries hold on to these names. Whoever changes a line here breaks them, and says
so in CHANGELOG.md under *Changed*.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as text_families

from llm_router import families
from llm_router.testing import ScriptedBackend, json_reply
from support.serving import Serving
from support.wait import until

ANY = ("any",)
"""Buckets that the catalogue leaves open."""


class Promise(NamedTuple):
    """A family of the catalogue, without the prefix."""

    type: str
    labels: str
    buckets: str | tuple[str] = ""


HTTP, INFERENCE, PROCESS = "method route status_code", "model strategy", "process"
CATALOGUE: dict[str, Promise] = {
    "http_requests_total": Promise("counter", HTTP),
    "http_request_duration_seconds": Promise("histogram", HTTP, ".01 .05 .1 .5 1 2 5 10 30"),
    "inference_total": Promise("counter", "model strategy status cached"),
    "inference_duration_seconds": Promise("histogram", INFERENCE, ".1 .5 1 2 5 10 30 60 120"),
    "tokens_generated_total": Promise("counter", INFERENCE),
    "tokens_per_second": Promise("histogram", "model", "1 5 10 20 50 100 200 500"),
    "models_loaded": Promise("gauge", "format size_category"),
    "model_load_duration_seconds": Promise("histogram", "model format", "1 5 10 30 60 120 300 600"),
    "model_memory_bytes": Promise("gauge", "model format"),
    "active_connections": Promise("gauge", "type protocol"),
    "connection_duration_seconds": Promise("histogram", "type protocol", "1 10 30 60 300 600 1800 3600"),
    "errors_total": Promise("counter", "type component severity"),
    "process_cpu_seconds_total": Promise("counter", PROCESS),
    "process_resident_memory_bytes": Promise("gauge", PROCESS),
    "process_heap_bytes": Promise("gauge", PROCESS),
    "process_open_fds": Promise("gauge", PROCESS),
    "process_start_time_seconds": Promise("gauge", PROCESS),
    "gc_duration_seconds": Promise("histogram", "process generation", ".001 .01 .1 1 2 5"),
    "time_to_first_token_seconds": Promise(
        "histogram", "model", ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 15 20 30"
    ),
    "inter_token_seconds": Promise("histogram", "model", ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5"),
    "tokens_prompt_total": Promise("counter", INFERENCE),
    "usage_records_total": Promise("counter", "source"),
    "overhead_seconds": Promise("histogram", "", ".00005 .0001 .0002 .0005 .001 .002 .005 .01 .05"),
    "routing_decisions_total": Promise("counter", "strategy model reason"),
    "attempts_total": Promise("counter", "backend outcome"),
    "retries_total": Promise("counter", "model reason"),
    "fallbacks_total": Promise("counter", "model reason"),
    "backend_up": Promise("gauge", "backend"),
    "worker_up": Promise("gauge", "worker"),
    "worker_restarts_total": Promise("counter", "worker reason"),
    "runner_restarts_total": Promise("counter", "model reason"),
    "event_loop_lag_seconds": Promise("histogram", PROCESS, ANY),
    "system_cpu_usage_ratio": Promise("gauge", ""),
    "system_memory_usage_bytes": Promise("gauge", ""),
    "system_memory_limit_bytes": Promise("gauge", ""),
    "system_disk_usage_ratio": Promise("gauge", "path"),
    "system_disk_io_bytes_total": Promise("counter", "direction"),
    "system_network_bytes_total": Promise("counter", "direction"),
    "cache_hits_total": Promise("counter", "cache_type"),
    "cache_misses_total": Promise("counter", "cache_type"),
    "cache_size_bytes": Promise("gauge", "cache_type"),
    "queue_size": Promise("gauge", "queue_type"),
    "queue_processing_seconds": Promise("histogram", "queue_type", ".01 .1 .5 1 5 10 30"),
    "queue_wait_seconds": Promise("histogram", "model", ANY),
    "tokens_cached_total": Promise("counter", INFERENCE),
    "tokens_reasoning_total": Promise("counter", INFERENCE),
    "cost_usd_total": Promise("counter", "model status"),
    "circuit_state": Promise("gauge", "backend"),
    "rate_limit_hits_total": Promise("counter", "scope limit"),
    "api_key_requests_total": Promise("counter", "key"),
    "api_key_tokens_total": Promise("counter", "key"),
    "active_users": Promise("gauge", "window"),
    "budget_remaining_usd": Promise("gauge", "key"),
    "usage_dropped_total": Promise("counter", "reason"),
    "health_check_status": Promise("gauge", "check"),
    "health_check_duration_seconds": Promise("histogram", "check", ANY),
    "health_check_transitions_total": Promise("counter", "check"),
    "internal_queue_size": Promise("gauge", "queue"),
    "log_dropped_total": Promise("counter", "reason"),
    "spans_dropped_total": Promise("counter", "reason"),
    "facts_dropped_total": Promise("counter", "reason"),
    "monitoring_cpu_seconds_total": Promise("counter", "component"),
    "scrape_duration_seconds": Promise("histogram", "", ANY),
    "series": Promise("gauge", "family"),
    "series_dropped_total": Promise("counter", "family"),
    "build_info": Promise("gauge", "version"),
    "config_last_reload_successful": Promise("gauge", ""),
    "config_last_reload_timestamp_seconds": Promise("gauge", ""),
}
"""What the catalogue marks as moving from the first version, with keys, limits, queues and caches, or with the surfaces."""

BEYOND = {
    "requests_in_flight",  # what a killed worker had in hand is read from it
    "traces_kept_total",  # whether sampling keeps what it should
    "trace_context_invalid_total",  # callers whose traces break off here
    "upstream_requests_in_flight",  # what workers tell each other, so that least-loaded looks at all of them
}
"""Declared although the catalogue does not ask for them."""

GUIDE: dict[str, Promise] = {
    "http_requests_total": Promise("counter", "method status"),
    "http_request_duration_seconds": Promise("histogram", "method status", ".01 .05 .1 .5 1 2 5 10 30"),
    "model_inference_total": Promise("counter", "model"),
    "model_inference_duration_seconds": Promise("histogram", "model", ".1 .5 1 2 5 10 30 60 120"),
    "model_tokens_generated_total": Promise("counter", "model"),
    "system_cpu_usage_percent": Promise("gauge", ""),
    "system_memory_usage_bytes": Promise("gauge", ""),
}
"""The monitoring guide's names, which have no prefix."""

CLOSED = {
    "inference_total": {"status": "success error cancelled", "cached": "true false"},
    "models_loaded": {"size_category": "small medium large xlarge remote"},
    "active_connections": {"type": "client upstream", "protocol": "http sse websocket"},
    "connection_duration_seconds": {"type": "client upstream", "protocol": "http sse websocket"},
    "usage_records_total": {"source": "provider estimated partial none"},
    "cache_hits_total": {"cache_type": "response redis"},
    "cache_misses_total": {"cache_type": "response redis"},
    "cost_usd_total": {"status": "exact estimated"},
    "rate_limit_hits_total": {"scope": "key model global"},
    "active_users": {"window": "5m 1h 24h"},
    "system_disk_io_bytes_total": {"direction": "read write"},
    "system_network_bytes_total": {"direction": "receive transmit"},
}
"""Values that the catalogue closes."""

CONFIG = """
server: {drain: 1s}
backends:
  - {name: flaky, url: %(flaky)s}
  - {name: good, url: %(good)s}
models:
  - name: first
    deployments: [{backend: flaky, model: scripted}]
    fallbacks: [second]
  - name: second
    deployments: [{backend: good, model: scripted}]
    price: {input: 1, output: 2}
routing: {retry: {attempts: 2, backoff: 1ms}}
"""


def bounds(promise: Promise) -> tuple[float, ...]:
    assert isinstance(promise.buckets, str)
    return tuple(float(bound) for bound in promise.buckets.split())


def test_every_family_of_the_catalogue_is_declared_as_promised() -> None:
    """With type, labels and buckets; and nothing else is declared without being named here."""
    declared = {family.name: family for family in families.FAMILIES}
    assert set(declared) == {families.PREFIX + name for name in {*CATALOGUE, *BEYOND}}
    for name, promise in CATALOGUE.items():
        family = declared[families.PREFIX + name]
        assert (family.type, family.labels) == (promise.type, tuple(promise.labels.split())), name
        if promise.buckets is not ANY:
            assert family.buckets == bounds(promise), name


def test_every_name_of_the_guide_is_a_view() -> None:
    """Of a family with the same type and buckets."""
    assert {
        view.name: (view.source.type, " ".join(label for label, _ in view.labels), view.source.buckets)
        for view in families.GUIDE_VIEWS
    } == {name: (promise.type, promise.labels, bounds(promise)) for name, promise in GUIDE.items()}


def post(serving: Serving, path: str, body: dict[str, Any], key: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=20)
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", path, json.dumps(body), headers)
    reply = connection.getresponse()
    answer = reply.read()
    connection.close()
    return reply.status, answer


def ask(serving: Serving, model: str, key: str, **fields: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "one two"}], **fields}
    return post(serving, "/v1/chat/completions", body, key)[0]


def new_key(serving: Serving, name: str, **limits: float) -> str:
    status, answer = post(serving, "/admin/keys", {"name": name, "limits": limits})
    assert status == 201, answer
    secret: str = json.loads(answer)["secret"]
    return secret


class Exposed(NamedTuple):
    """What the running program told, in its three forms."""

    text: dict[str, Metric]
    openmetrics: dict[str, Metric]
    types: dict[str, str]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    """After replies, a stream, a retry, a fallback, a cached reply, a limit, an unknown model and an unknown path."""
    with ScriptedBackend() as flaky, ScriptedBackend() as good:
        flaky.always(json_reply({"error": {"message": "no"}}, 500))
        config = CONFIG % {"flaky": flaky.base_url, "good": good.base_url}
        with Serving(tmp_path_factory.mktemp("names"), config) as serving:
            key = new_key(serving, "team", usd_per_day=5)
            tight = new_key(serving, "tight", requests_per_minute=1)
            statuses = [
                ask(serving, name, key, stream=stream) for name in ("first", "second") for stream in (False, True)
            ]
            assert statuses == [200] * 4
            assert [ask(serving, "second", tight, temperature=0) for _ in range(2)] == [200, 429]
            assert ask(serving, "second", key, temperature=0) == 200
            assert (ask(serving, "third", key), serving.status("/nowhere")) == (404, 404)
            until(lambda: b'active_users{window="5m"} 2' in serving.get("/metrics"), what="what the usage rows say")
            until(lambda: b"_upstream_requests_in_flight{" in serving.get("/metrics"), what="the workers' next tick")
            text = serving.get("/metrics").decode()
            openmetrics = serving.get("/metrics", accept="application/openmetrics-text; version=1.0.0").decode()
            document = json.loads(serving.get("/metrics/json"))
    openmetrics_families: Any = openmetrics_parser.text_string_to_metric_families  # without annotations
    yield Exposed(
        {exported_name(metric): metric for metric in text_families(text)},
        {exported_name(metric): metric for metric in openmetrics_families(openmetrics)},
        {family["name"]: family["type"] for family in document},
    )


def exported_name(metric: Metric) -> str:
    """Its name as in the exposition: the parser takes `_total` from counters."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def test_exactly_the_declared_families_are_exported(exposed: Exposed) -> None:
    """In text, OpenMetrics and JSON, with their types."""
    declared = {family.name: family.type for family in families.FAMILIES}
    promised = {**declared, **{name: promise.type for name, promise in GUIDE.items()}}
    assert {name: metric.type for name, metric in exposed.text.items()} == promised
    assert {name: metric.type for name, metric in exposed.openmetrics.items()} == promised
    assert exposed.types == promised


def test_every_sample_has_the_declared_labels_and_buckets(exposed: Exposed) -> None:
    """No more and no fewer, in both text forms."""
    labels = {family.name: (set(family.labels), family.buckets) for family in families.FAMILIES}
    labels |= {name: (set(promise.labels.split()), bounds(promise)) for name, promise in GUIDE.items()}
    for form in (exposed.text, exposed.openmetrics):
        for name, metric in form.items():
            expected, buckets = labels[name]
            found: set[str] = set()
            for sample in metric.samples:
                bound = {"le"} if sample.name.endswith("_bucket") else set()
                assert set(sample.labels) == expected | bound, sample
                found |= {sample.labels["le"]} if bound else set()
            if found:
                assert {float(bound) for bound in found} == {*buckets, float("inf")}, name


def test_closed_values_stay_closed(exposed: Exposed) -> None:
    """And those that stand for a zero from the start are there."""
    for name, promised in CLOSED.items():
        samples = exposed.text[families.PREFIX + name].samples
        for label, values in promised.items():
            assert {sample.labels[label] for sample in samples} <= set(values.split()), (name, label)
    kinds = {
        (sample.labels["type"], sample.labels["component"], sample.labels["severity"])
        for sample in exposed.text[families.PREFIX + "errors_total"].samples
    }
    assert kinds == {(kind, *place) for kind, place in families.ERROR_KINDS.items()}


def test_what_happened_moved_its_families(exposed: Exposed) -> None:
    """Nothing that can be told without a local model is without series."""
    local = {"model_load_duration_seconds", "model_memory_bytes", "runner_restarts_total"}
    quiet = {"series_dropped_total", "system_cpu_usage_ratio"}
    empty = {name.removeprefix(families.PREFIX) for name, metric in exposed.text.items() if not metric.samples}
    assert empty <= local | quiet | {"system_cpu_usage_percent"}
    for name, labels, value in (
        ("retries_total", {"model": "first", "reason": "server-error"}, 2.0),
        ("fallbacks_total", {"model": "first", "reason": "server-error"}, 2.0),
        ("attempts_total", {"backend": "flaky", "outcome": "provider"}, 4.0),
        ("attempts_total", {"backend": "good", "outcome": "success"}, 5.0),
        ("inference_total", {"model": "second", "status": "success", "cached": "false"}, 5.0),
        ("inference_total", {"model": "second", "status": "success", "cached": "true"}, 1.0),
        ("cache_hits_total", {"cache_type": "response"}, 1.0),
        ("cache_misses_total", {"cache_type": "response"}, 1.0),
        ("rate_limit_hits_total", {"scope": "key", "limit": "requests_per_minute"}, 1.0),
        ("api_key_requests_total", {"key": "team"}, 6.0),
        ("api_key_requests_total", {"key": "tight"}, 2.0),
        ("api_key_tokens_total", {"key": "team"}, 4 * 8.0),  # of four replies; the cached one took none
        ("queue_wait_seconds_count", {"model": "second"}, 5.0),
        ("queue_processing_seconds_count", {"queue_type": "second"}, 5.0),
        ("active_users", {"window": "5m"}, 2.0),
        ("http_requests_total", {"route": "__other__", "status_code": "404"}, 1.0),
    ):
        metric = exposed.text[families.PREFIX + name.removesuffix("_count")]
        found = [
            sample.value
            for sample in metric.samples
            if sample.name == families.PREFIX + name and labels.items() <= sample.labels.items()
        ]
        assert found == [value], (name, found)
