"""Health in the running program: what each check finds out when the thing that it looks at is really broken.

Servers are real: a Redis that is killed and frozen, a PostgreSQL that crashes, a runner and a control that stand still.
Intervals are short by configuration; everything else is as an operator has it. Probes must leave no trace in what counts
requests, which the tests look at after dozens of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llm_router.library.health import HealthChecker
from llm_router.observe.health.report import Report
from llm_router.testing import Gate, Hold, ScriptedBackend, json_reply
from support.aio import run
from support.aio import until as until_async
from support.callers import Administrator, Callers, chat
from support.health import HealthPage
from support.log_records import entries
from support.model import default_model
from support.net import free_port
from support.postgres import Postgres, postgres_server
from support.redis import RedisServer
from support.serving import Scrape, Serving, is_alive
from support.tls import self_signed
from support.wait import until

WELL = json_reply({"object": "list", "data": []})
SICK = json_reply({"error": {"message": "on fire"}}, 503)
SEALED = json_reply({"error": {"message": "no such key"}}, 401)
BACKEND_KEY = "sk-backend-key-0123456789"

CHECK_KEYS = {
    *("status", "value", "threshold", "healthy", "message", "details", "duration", "timestamp"),
    *("failures", "flaps"),
}
"""What every check shows."""

TOP_KEYS = {
    *("status", "timestamp", "age", "uptime", "version", "checks", "summary"),
    *("memory", "models", "engine", "environment"),
}

TRAFFIC = (
    *("inference_total", "inference_duration_seconds_count", "attempts_total", "retries_total", "fallbacks_total"),
    *("tokens_prompt_total", "tokens_generated_total", "usage_records_total", "cost_usd_total"),
    *("routing_decisions_total", "cache_hits_total", "cache_misses_total", "cache_size_bytes", "queue_size"),
    *(
        "queue_wait_seconds_count",
        "requests_in_flight",
        "upstream_requests_in_flight",
        "time_to_first_token_seconds_count",
    ),
    *("overhead_seconds_count", "api_key_requests_total", "rate_limit_hits_total"),
)
"""What traffic moves, and nothing else may."""


def total(scrape: Scrape, name: str, **labels: str) -> float:
    return scrape.total(f"llm_router_{name}", **labels)


def no_traffic(serving: Serving) -> None:
    """Nothing that counts requests for inference has moved, and no row and no line was written about one."""
    scrape = serving.scrape()
    moved = {name: value for name in TRAFFIC if (value := total(scrape, name))}
    upstream = {
        name: value
        for name in ("active_connections", "connection_duration_seconds_count")
        if (value := total(scrape, name, type="upstream"))
    }
    assert not moved, moved
    assert not upstream, upstream
    for route in ("/v1/chat/completions", "/v1/embeddings", "/v1/models"):
        assert total(scrape, "http_requests_total", route=route) == 0, route
    kept = json.loads(serving.get("/debug/requests"))["requests"]
    assert all(trace["route"].startswith("/health") for trace in kept), kept
    lines = entries(serving.folder / "data" / "logs", "access")
    assert all(line["request"]["path"].startswith("/health") for line in lines), lines
    lines = entries(serving.folder / "data" / "logs", "application")
    assert not [line for line in lines if any(name.startswith("inference") for name in line)]


def several_rounds(serving: Serving, check: str) -> None:
    """Returns when a check has run three times more."""

    def runs() -> float:
        return total(serving.scrape(), "health_check_duration_seconds_count", check=check)

    begin = runs()
    until(lambda: runs() >= begin + 3, what="several rounds")


def turns(serving: Serving, check: str) -> float:
    """How often it has changed between healthy and not."""
    return total(serving.scrape(), "health_check_transitions_total", check=check)


def checks_of(scrape: Scrape, name: str) -> set[str]:
    """The checks that a family knows."""
    return {labels["check"] for sample, labels, _ in scrape.samples if sample == f"llm_router_{name}"}


# -- many things that are well, and as many that are not ----------------------------------------------------

CONFIG = """
server: {environment: staging}
backends:
  - {name: good, url: "%(good)s", provider: local}
  - {name: sealed, url: "%(sealed)s", api_key: %(key)s}
  - {name: keyless, url: "%(sealed)s"}
  - {name: sick, url: "%(sick)s"}
  - {name: absent, url: "http://127.0.0.1:%(nobody)d/v1", provider: local}
  - {name: paid, url: "%(paid)s", provider: openai}
models:
  - {name: m, deployments: [{backend: good, model: scripted}]}
  - {name: sealed, deployments: [{backend: sealed}, {backend: keyless}]}
  - {name: sick, deployments: [{backend: sick}]}
  - {name: absent, deployments: [{backend: absent}]}
  - {name: paid, price: {input: 1000, output: 1000}, deployments: [{backend: paid, model: scripted}]}
routing: {breaker: {enabled: false}, retry: {attempts: 1}}
health:
  interval: 300ms
  timeout: 700ms
  fall: 2
  rise: 2
  memory_percent: 0.01
  disk_percent: 0.0001
  disk_path: "%(disk)s"
  process_memory: 1MiB
  external:
    - {name: tcp, target: "tcp://127.0.0.1:%(good_port)d"}
    - {name: tcp_nobody, target: "tcp://127.0.0.1:%(nobody)d"}
    - {name: tls, target: "tls://localhost:%(tls_port)d"}
    - {name: tls_foreign, target: "tls://localhost:%(foreign_port)d"}
    - {name: http, target: "%(good)s/models?token=%(key)s"}
    - {name: http_missing, target: "%(good)s/nothing"}
    - {name: http_sick, target: "%(sick)s"}
    - {name: silent, target: "http://127.0.0.1:%(silent_port)d/"}
    - {name: moody, target: "%(moody)s", critical: true}
  validate:
    - {name: fine, model: m, prompt: "What are you?", expect: "scripted backend"}
    - {name: wrong, model: m, prompt: "What are you?", expect: "^never$"}
    - {name: nobody, model: absent, prompt: "Are you there?"}
    - {name: unpaid, model: paid, prompt: "What are you?"}
  checks:
    external_moody: {timeout: 20s}
    runners: {enabled: false}
"""


class World(NamedTuple):
    serving: Serving
    page: HealthPage
    good: ScriptedBackend
    sick: ScriptedBackend
    paid: ScriptedBackend
    moody: ScriptedBackend


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, elsewhere = tmp_path_factory.mktemp("health"), tmp_path_factory.mktemp("elsewhere")
    with contextlib.ExitStack() as stack:
        good, sealed, sick, paid, moody = (stack.enter_context(ScriptedBackend()) for _ in range(5))
        sealed.always(SEALED)
        sick.always(SICK)
        trusted, tls = serves_tls(stack, folder, "trusted")
        _, foreign = serves_tls(stack, folder, "foreign")
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # whose queue takes, and nobody reads
        config = CONFIG % {
            "good": good.base_url,
            "sealed": sealed.base_url,
            "sick": sick.base_url,
            "paid": paid.base_url,
            "moody": moody.url,
            "nobody": free_port(),
            "good_port": good.port,
            "tls_port": tls.port,
            "foreign_port": foreign.port,
            "silent_port": silent.getsockname()[1],
            "key": BACKEND_KEY,
            "disk": elsewhere,
        }
        serving = stack.enter_context(Serving(folder, config, "--workers", "2", env={"SSL_CERT_FILE": str(trusted)}))
        yield World(serving, HealthPage(serving), good, sick, paid, moody)


def serves_tls(stack: contextlib.ExitStack, folder: Path, name: str) -> tuple[Path, ScriptedBackend]:
    """The certificate of a server, and the server."""
    certificate, key = self_signed(folder, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, stack.enter_context(ScriptedBackend(tls=context))


def settled(page: HealthPage) -> dict[str, Any]:
    """The report when every check has run."""
    found: dict[str, Any] = {}

    def all_ran() -> bool:
        nonlocal found
        found = page.document()
        return all(check["status"] != "initializing" for check in found["checks"].values())

    until(all_ran, 20, "a run of every check")
    return found


def test_probes_are_no_traffic(world: World) -> None:
    settled(world.page)
    several_rounds(world.serving, "model_fine")
    asked = [one for one in world.good.requests if one.method == "POST"]
    assert len(asked) >= 6, "two validations asked the model"
    assert not [one for one in asked if "traceparent" in one.headers], "no trace begins with a probe"
    no_traffic(world.serving)
    with contextlib.closing(sqlite3.connect(f"file:{world.serving.folder}/data/accounts.db?mode=ro", uri=True)) as file:
        assert file.execute("SELECT count(*) FROM llm_router_usage").fetchone() == (0,)


def test_the_report_is_the_superset_of_both_shapes_on_both_ports(world: World) -> None:
    document = settled(world.page)
    assert set(document) == TOP_KEYS
    for name, check in document["checks"].items():
        assert set(check) >= CHECK_KEYS, name
        assert check["healthy"] == (check["status"] == "healthy"), name
        assert check["status"] in {"healthy", "degraded", "critical"}, name
    unhealthy = [name for name, check in document["checks"].items() if not check["healthy"]]
    count = len(document["checks"])
    assert document["summary"] == {"total": count, "healthy": count - len(unhealthy), "unhealthy": len(unhealthy)}
    assert document["environment"] == "staging"
    assert document["models"]["registry_size"] == 5
    assert document["checks"]["models"]["loaded"] == document["models"]["loaded"] >= 4  # one may be known to be down
    assert document["checks"]["models"]["failed"] == 0
    assert document["memory"]["rss"] > 10e6
    assert document["memory"]["total"] > 100e6
    app = world.page.reply(app=True)
    assert (app.status, set(app.json())) == (200, TOP_KEYS)
    assert document["checks"]["cache_functionality"]["value"] == 2, "each worker's own"
    assert "runners" not in document["checks"], "switched off by its own switch"


def test_the_report_has_the_form_of_the_ietf_draft_for_those_who_accept_it(world: World) -> None:
    settled(world.page)
    for app in (False, True):
        reply = world.page.reply(app=app, headers={"accept": "application/health+json"})
        assert reply.headers["content-type"] == "application/health+json"
        assert reply.status == 200
        document = reply.json()
        assert document["status"] == "warn"
        assert document["checks"]["database"][0]["status"] == "pass"
        assert document["checks"]["external_http_sick"][0]["status"] == "warn"
        assert "answered 503" in document["checks"]["external_http_sick"][0]["output"]
        assert {"componentType", "observedValue", "status", "time"} <= set(document["checks"]["cpu_usage"][0])


def test_the_report_tells_its_age_and_that_of_every_check(world: World) -> None:
    settled(world.page)
    ages: set[float] = set()

    def has_aged() -> bool:
        document = world.page.document()
        assert 0 <= document["age"] < 2
        age = document["checks"]["database"]["age"]
        assert 0 <= age < 5, "it runs each 300 ms"
        ages.add(age)
        return len(ages) >= 3

    until(has_aged, what="three ages")
    assert max(ages) > 0
    assert "age" not in world.page.check("workers"), "what is known at any moment has none"


def test_services_outside_are_reached_by_tcp_tls_and_http(world: World) -> None:
    checks = settled(world.page)["checks"]
    well = {
        name: check["message"] for name, check in checks.items() if name.startswith("external_") and check["healthy"]
    }
    assert set(well) == {f"external_{name}" for name in ("tcp", "tls", "http", "http_missing", "moody")}
    assert checks["external_tls"]["details"]["certificate_days_left"] > 0.5
    problems = {
        "tcp_nobody": "refused",
        "tls_foreign": "its certificate is not accepted: self-signed certificate",
        "http_sick": "answered 503",
        "silent": "no answer within",
    }
    for name, said in problems.items():
        check = world.page.until(f"external_{name}", "degraded")
        assert said in check["message"], check
        assert "127.0.0.1" in check["message"] or "localhost" in check["message"]
    assert BACKEND_KEY not in json.dumps(world.page.document())


def test_backends_are_asked_where_it_is_free(world: World) -> None:
    check = world.page.until("backends", "degraded")
    details = check["details"]
    assert (check["value"], check["threshold"]) == (2, 6)
    assert details["good"] == "answered 200"
    assert "it does not take our key (401)" in details["sealed"]
    assert "it wants a key (401): set api_key" in details["keyless"]
    assert details["sick"] == "answered 503"
    assert "refused" in details["absent"]
    asked = [one for one in world.good.requests if one.method == "GET" and one.target == "/v1/models"]
    assert len(asked) == 1, "one that is well is asked once a minute"


def test_a_paid_model_is_asked_nothing_without_a_budget(world: World) -> None:
    check = settled(world.page)["checks"]["model_unpaid"]
    assert check["healthy"]
    assert "health.paid_probe_daily_usd is 0" in check["message"]
    assert {one.method for one in world.paid.requests} == {"GET"}
    models = world.page.check("inference_capability")["details"]["models"]
    assert models["paid"]["by"] == "endpoint"
    assert not (world.serving.folder / "data" / "probes.json").exists()


def test_models_answer_a_prompt_as_expected_or_not(world: World) -> None:
    checks = settled(world.page)["checks"]
    assert checks["model_fine"]["message"] == "m answers as expected"
    assert checks["model_fine"]["details"]["backend"] == "good"
    assert checks["model_wrong"]["status"] == "degraded"
    assert "'Hello from the scripted backend.', which is not '^never$'" in checks["model_wrong"]["message"]
    assert "absent did not answer: absent: " in checks["model_nobody"]["message"]


def test_thresholds_are_those_that_are_configured(world: World) -> None:
    document = settled(world.page)
    checks = document["checks"]
    assert checks["memory_usage"]["status"] == "degraded"
    assert checks["memory_usage"]["threshold"] == 0.01
    assert checks["process_memory"]["status"] == "degraded"
    assert checks["process_memory"]["details"]["limit"] == 1024**2
    assert checks["disk_usage"]["status"] == "degraded"
    assert checks["disk_usage"]["value"] > 0
    assert checks["disk_space"] == checks["disk_usage"]
    assert Path(checks["disk_usage"]["details"]["path"]).name.startswith("elsewhere")
    cpu = world.page.until("cpu_usage", lambda check: "not known" not in check["message"])
    assert cpu["threshold"] == 80


def test_traffic_is_evidence(world: World) -> None:
    """Models that are used are judged by that: nobody asks them beside."""
    with Callers(world.serving.port, lambda connection, number: chat(world.serving.port), threads=1):
        seen = world.page.until(
            "inference_capability", lambda check: check["details"]["models"].get("m", {}).get("by") == "traffic"
        )
        assert "requests answered since the last check" in seen["details"]["models"]["m"]["said"]
        seen = world.page.until("backends", lambda check: "requests answered" in check["details"]["good"])
    with Callers(world.serving.port, lambda connection, number: chat(world.serving.port, model="sick"), threads=1):
        seen = world.page.until(
            "inference_capability", lambda check: "attempts failed" in check["details"]["models"]["sick"]["said"]
        )
        assert seen["status"] == "degraded"
        assert "sick: " in seen["message"]


def test_some_failures_in_a_row_make_a_check_fall_and_some_successes_make_it_rise(world: World) -> None:
    page, name = world.page, "external_moody"
    page.until(name, "healthy")
    assert turns(world.serving, name) == 0
    first, second = Gate(), Gate()
    world.moody.script(SICK)
    world.moody.script(Hold(first), SICK)
    world.moody.script(WELL)
    world.moody.script(Hold(second), WELL)

    check = page.until(name, lambda check: check["failures"] == 1)
    assert check["status"] == "healthy"
    assert "(failure 1 in a row; 2 count)" in check["message"]
    first.open()
    document = page.until_status("critical", 503)
    assert document["checks"][name]["status"] == "critical"
    for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
        for app in (False, True):
            assert page.reply(path, app=app).status == (503 if path == "/health" else 200), path
    assert page.reply(headers={"accept": "application/health+json"}).json()["status"] == "fail"
    check = page.until(name, lambda check: "success 1 in a row; 2 count" in check["message"])
    assert check["status"] == "critical"
    assert (check["flaps"], turns(world.serving, name)) == (1, 1)
    assert total(world.serving.scrape(), "health_check_status", check=name) == 0
    second.open()
    check = page.until(name, "healthy")
    assert (check["flaps"], turns(world.serving, name)) == (2, 2)
    scrape = world.serving.scrape()
    assert total(scrape, "health_check_status", check=name) == 1
    assert total(scrape, "health_check_status", check="external_http_sick") == 0.5
    lines = [line["message"] for line in entries(world.serving.folder / "data" / "logs", "application")]
    assert [line for line in lines if f"health: {name} is critical" in line]
    assert [line for line in lines if f"health: {name} is healthy again" in line]


def test_every_check_has_its_metrics(world: World) -> None:
    names = set(settled(world.page)["checks"]) - {"disk_space"}
    scrape = world.serving.scrape()
    assert checks_of(scrape, "health_check_status") == names
    assert checks_of(scrape, "health_check_transitions_total") == names - {"health_checks"}
    timed = {name for name in names if "age" in world.page.check(name)}
    assert checks_of(scrape, "health_check_duration_seconds_count") == timed
    assert total(scrape, "health_check_duration_seconds_count", check="database") >= 2


# -- cache, database and keys --------------------------------------------------------------------------------

STORES = """
backends: [{name: good, url: "%(good)s", provider: local}]
models: [{name: m, deployments: [{backend: good, model: scripted}]}]
accounts: {database: "%(database)s"}
cache: {url: "%(redis)s"}
health:
  interval: 300ms
  timeout: 2s
  fall: 2
  rise: 1
  checks: {database: {critical: true}, cpu_usage: {enabled: false}}
"""


class Stores(NamedTuple):
    serving: Serving
    page: HealthPage
    redis: RedisServer
    postgres: Postgres
    keys: dict[str, str]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """A router that needs keys for everything, with a Redis and a PostgreSQL."""
    with contextlib.ExitStack() as stack:
        good, redis = stack.enter_context(ScriptedBackend()), stack.enter_context(RedisServer())
        postgres = stack.enter_context(postgres_server())
        config = STORES % {"good": good.base_url, "database": postgres.database(), "redis": redis.url}
        serving = stack.enter_context(Serving(tmp_path_factory.mktemp("stores"), config, "--workers", "2"))
        scopes = ("inference", "metrics:read", "admin")
        admin = Administrator(serving)
        keys = {scope: admin.create(scopes=[scope])[0] for scope in scopes}
        yield Stores(serving, HealthPage(serving, keys["metrics:read"]), redis, postgres, keys)


def test_without_the_right_key_the_word_is_all_there_is(stores: Stores) -> None:
    serving, keys = stores.serving, stores.keys
    stores.page.until("database", "healthy")
    for app in (False, True):
        for key in ("", keys["inference"]):
            reply = HealthPage(serving, key).reply(app=app)
            assert (reply.status, set(reply.json())) == (200, {"status", "timestamp"})
            reply = HealthPage(serving, key).reply(app=app, headers={"accept": "application/health+json"})
            assert set(reply.json()) == {"status", "timestamp"}
        for scope in ("metrics:read", "admin"):
            assert set(HealthPage(serving, keys[scope]).reply(app=app).json()) == TOP_KEYS
        assert HealthPage(serving, "sk-llmr-of-nobody").reply(app=app).status == 401
        assert HealthPage(serving).reply("/metrics", app=app).status == 401
        for path in ("/health/live", "/health/ready", "/health/startup"):
            assert HealthPage(serving).reply(path, app=app).status == 200


def test_a_cache_that_is_away_or_hangs_degrades_and_comes_back(stores: Stores) -> None:
    page, redis, key = stores.page, stores.redis, stores.keys["inference"]
    check = page.until("cache_functionality", lambda check: check["status"] == "healthy" and check["value"] == 2)
    assert check["message"] == "Cache functionality verified"
    redis.kill()
    check = page.until("cache_functionality", "degraded")
    assert "2 of 2 workers' caches do not work" in check["message"]
    assert page.reply().status == 200
    assert chat(stores.serving.port, key).status == 200
    redis.start()
    page.until("cache_functionality", "healthy")
    redis.freeze()
    check = page.until("cache_functionality", "degraded")
    assert chat(stores.serving.port, key).status == 200
    redis.thaw()
    page.until("cache_functionality", "healthy")


def test_a_worker_that_dies_shows_at_once_and_so_does_its_return(stores: Stores) -> None:
    """That is known for sure: it needs no second look."""
    page = stores.page
    page.until("workers", "healthy")
    stores.serving.signal("worker-1", signal.SIGKILL)
    check = page.until("workers", "degraded")
    assert (check["message"], check["value"], check["threshold"]) == ("1 of 2 workers answer", 1, 2)
    assert page.reply().status == 200
    assert page.until("workers", "healthy")["flaps"] == 2


def test_a_database_that_crashes_is_critical_where_it_was_made_so(stores: Stores) -> None:
    page, serving = stores.page, stores.serving
    page.until("database", "healthy")
    stores.postgres.stop()
    try:
        document = page.until_status("critical", 503)
        check = document["checks"]["database"]
        assert "The database does not answer" in check["message"]
        assert "s3cret" not in json.dumps(document)
        assert set(HealthPage(serving).document()) == {"status", "timestamp"}
        assert HealthPage(serving).reply(app=True).status == 503
        for path in ("/health/live", "/health/ready", "/health/startup"):
            assert HealthPage(serving).reply(path, app=True).status == 200
        assert chat(serving.port, stores.keys["inference"]).status == 200
    finally:
        stores.postgres.start()
    page.until_status("healthy", 200)


# -- money, control, and checks that stand still -------------------------------------------------------------

PRICE = 1000.0
"""US dollars for a million tokens: a probe may cost 0.084 dollars, and does cost 9 tokens of it."""

PAID = f"""
backends:
  - {{name: paid, url: "%(paid)s", provider: openai}}
models:
  - {{name: m, price: {{input: {PRICE}, output: {PRICE}}}, deployments: [{{backend: paid, model: scripted}}]}}
health:
  interval: 300ms
  timeout: 400ms
  fall: 1
  rise: 1
  concurrency: 1
  paid_probe_daily_usd: 0.085
  external: [{{name: held, target: "%(held)s"}}]
  checks: {{external_held: {{timeout: 30s}}, cpu_usage: {{enabled: false}}}}
"""


class Alone(NamedTuple):
    serving: Serving
    page: HealthPage
    paid: ScriptedBackend
    held: ScriptedBackend

    def generations(self) -> int:
        return sum(one.method == "POST" for one in self.paid.requests)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with ScriptedBackend() as paid, ScriptedBackend() as held:
        config = PAID % {"paid": paid.base_url, "held": held.url}
        with Serving(tmp_path_factory.mktemp("alone"), config, "--workers", "1") as serving:
            yield Alone(serving, HealthPage(serving), paid, held)


def test_a_paid_model_is_asked_once_where_money_is_for_once_and_control_remembers(alone: Alone) -> None:
    check = alone.page.until("inference_capability", lambda check: check["details"].get("probes_usd_today"))
    assert check["details"]["models"]["m"]["by"] == "generation"
    spent = check["details"]["probes_usd_today"]
    assert 0 < spent < 0.01
    assert alone.generations() == 1
    probe = next(one for one in alone.paid.requests if one.method == "POST")
    assert (probe.json()["max_tokens"], probe.headers["x-request-id"]) == (16, "health-check")
    assert json.loads((alone.serving.folder / "data" / "probes.json").read_bytes())["usd"] == pytest.approx(spent)
    control = alone.serving.signal("control", signal.SIGKILL)
    until(lambda: not is_alive(control) and "control" in alone.serving.children(), what="another control")
    until(lambda: alone.page.reply().status == 200, what="the report of the next control")
    several_rounds(alone.serving, "inference_capability")
    assert alone.generations() == 1
    check = alone.page.until("inference_capability", lambda check: "probes_usd_today" in check["details"])
    assert check["details"]["probes_usd_today"] == pytest.approx(spent)
    no_traffic(alone.serving)


def test_checks_that_do_not_run_make_the_report_critical(alone: Alone) -> None:
    """One that hangs has the only place: the others wait, and what is shown of them is old."""
    alone.page.until_status("healthy", 200)
    gate = Gate()
    alone.held.script(Hold(gate), WELL)
    try:
        document = alone.page.until_status("critical", 503)
        assert document["checks"]["health_checks"]["status"] == "critical"
        check = alone.page.until("health_checks", lambda check: "database" in check["message"])
        assert "Health checks are late by" in check["message"]
        assert alone.page.check("database")["age"] > 1
        assert total(alone.serving.scrape(), "health_check_status", check="health_checks") == 0
        assert alone.page.reply("/health/live").status == 200
    finally:
        gate.open()
    alone.page.until_status("healthy", 200)


def test_a_control_that_stands_still_shows_and_callers_are_served(alone: Alone) -> None:
    alone.page.until_status("healthy", 200)
    before = total(alone.serving.scrape(), "event_loop_lag_seconds_sum", process="control")
    pid = alone.serving.signal("control", signal.SIGSTOP)
    began_at = time.monotonic()
    try:
        until(lambda: alone.page.reply(app=True).status == 503, what="a worker that has noticed")
        assert alone.page.reply(app=True).json()["error"]["code"] == "unavailable"
        assert alone.page.reply("/health/live", app=True).status == 200
        assert alone.page.reply("/health/ready", app=True).status == 200
        assert chat(alone.serving.port).status == 200
    finally:
        stood_s = time.monotonic() - began_at
        alone.serving.signal("control", signal.SIGCONT)
    alone.page.until_status("healthy", 200)
    assert alone.serving.children()["control"] == pid, "half a minute passes before it is replaced"
    after = total(alone.serving.scrape(), "event_loop_lag_seconds_sum", process="control")
    assert after - before > 0.8 * stood_s


# -- a local model -------------------------------------------------------------------------------------------

LOCAL = """
models:
  - {name: small, file: smollm2-135m-instruct, runner: {context_size: 512, parallel: 1}}
health:
  interval: 500ms
  timeout: 2s
  fall: 2
  rise: 1
  validate: [{name: speaks, model: small, prompt: "Say hello.", interval: 1s}]
  checks:
    cpu_usage: {enabled: false}
    inference_capability: {timeout: 4s}
    model_speaks: {timeout: 4s}
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, list[tuple[int, ...]]]]:
    """A router with the real default model, and what its probes said from its start on: health, startup, ready, live."""
    folder = tmp_path_factory.mktemp("local")
    models = folder / "data" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m-instruct.gguf").symlink_to(default_model())
    said: list[tuple[int, ...]] = []
    with Serving(folder, LOCAL, "--workers", "1", ready=False) as serving:

        def has_started() -> bool:
            paths = ("/health", "/health/startup", "/health/ready", "/health/live")
            said.append(tuple(serving.status(path, monitoring=True) for path in paths))
            return said[-1][1] == 200

        until(has_started, 30, "the start")
        yield serving, said


@pytest.mark.model
def test_while_models_are_loaded_only_liveness_is_well(local: tuple[Serving, list[tuple[int, ...]]]) -> None:
    serving, said = local
    assert (503, 503, 503, 200) in said, said
    page = HealthPage(serving)
    page.until_status("healthy", 200)
    assert page.reply("/health/startup", app=True).json()["status"] == "started"
    assert all(check["failures"] == 0 for check in page.document()["checks"].values()), "nothing was missed meanwhile"


@pytest.mark.model
def test_a_local_model_that_nobody_uses_is_asked_and_that_is_no_traffic(
    local: tuple[Serving, list[tuple[int, ...]]],
) -> None:
    serving, _ = local
    page = HealthPage(serving)
    check = page.until("inference_capability", lambda check: check["details"].get("tokens"))
    assert check["status"] == "healthy"
    assert check["details"]["models"]["small"]["by"] == "generation"
    assert check["details"]["tokens"] >= 1
    assert check["details"]["latency"] > 0
    page.until("model_speaks", lambda check: check["status"] == "healthy" and check["details"].get("tokens"))
    no_traffic(serving)


@pytest.mark.model
def test_a_runner_that_stands_still_is_found_out(local: tuple[Serving, list[tuple[int, ...]]]) -> None:
    """It has a process and a port; only asking it shows that no answer comes."""
    serving, _ = local
    page = HealthPage(serving)
    page.until("inference_capability", "healthy")
    serving.signal("runner-0", signal.SIGSTOP)
    try:
        check = page.until("inference_capability", "degraded", 20)
        assert "small: " in check["message"]
        assert page.check("runners")["status"] == "healthy"
        assert page.document()["status"] == "degraded"
    finally:
        serving.signal("runner-0", signal.SIGCONT)
    page.until("inference_capability", "healthy", 20)
    serving.signal("runner-0", signal.SIGKILL)
    page.until("models", lambda check: not check["healthy"] or check["details"]["small"] != "loaded")
    page.until_status("healthy", 200, 25)


# -- checks of one's own -------------------------------------------------------------------------------------


def test_checks_that_do_what_they_must_not_fail_and_the_others_go_on() -> None:
    """In a program of somebody's own, in real time: nothing that a check does ends or hides another."""

    async def scenario() -> None:
        gate, good = threading.Event(), 0

        def fine() -> dict[str, Any]:
            nonlocal good
            good += 1
            return {"healthy": True, "message": "as ever", "details": {"run": good}}

        async def stubborn() -> bool:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                if gate.is_set():
                    return True

        checks: dict[str, tuple[Callable[[], object], str]] = {
            "raises": (lambda: 1 / 0, "ZeroDivisionError"),
            "leaves": (lambda: sys.exit(3), "SystemExit: 3"),
            "talks": (lambda: "fine, thanks", "the check returned str 'fine, thanks'; it may return True, False"),
            "says_nothing": (lambda: None, "the check returned nothing (None)"),
            "boasts": (lambda: {"healthy": True, "value": float("inf")}, "it is a finite number"),
            "hangs": (lambda: asyncio.Event().wait(), "it did not end within 0.2 s"),
            "blocks": (lambda: gate.wait(30), "hangs and cannot be ended"),
            "stubborn": (stubborn, "hangs and cannot be ended"),
        }
        health = HealthChecker(interval=0.1, timeout=0.2, retries=1)
        health.add_check("fine", fine)
        for name, (function, _) in checks.items():
            health.add_check(name, function, critical=name == "raises")
        await health.start()
        for name, (_, said) in checks.items():
            await until_async(lambda name=name, said=said: said in health.report().checks[name].message, what=said)  # type: ignore[misc]
            wanted = "critical" if name == "raises" else "degraded"
            assert health.report().checks[name].status == wanted, name
        begin = good
        await until_async(lambda: good >= begin + 5, what="further runs of the good one")
        assert health.report().checks["fine"].status == "healthy"
        assert set(health.report().checks["health_checks"].details["hanging"]) == {"blocks", "stubborn"}
        assert await health.run_check("fine")
        with pytest.raises(ValueError, match="there is no check 'nice'; there are: .*fine"):
            await health.run_check("nice")
        gate.set()
        await health.stop()

    run(scenario(), 30)


def test_a_loop_that_is_blocked_is_critical_as_soon_as_anybody_can_look() -> None:
    """What checks found before is old then, and nobody is sent here for it."""

    async def scenario() -> None:
        seen: list[Report] = []

        async def blocks() -> bool:
            if not seen:
                time.sleep(1.2)  # noqa: ASYNC251 - the fault that is to be seen
                seen.append(health.report())
            return True

        health = HealthChecker(interval=0.1, timeout=0.2, retries=1)
        health.add_check("fine", lambda: True)
        await health.start()
        await until_async(lambda: health.report().checks["fine"].status == "healthy", what="a first run")
        health.add_check("blocks", blocks)
        await until_async(lambda: seen, what="the end of the block")
        assert (seen[0].status, seen[0].http_status) == ("critical", 503)
        assert "Health checks are late by" in seen[0].checks["health_checks"].message
        await until_async(lambda: health.report().checks["health_checks"].status == "healthy", what="the loop to turn")
        await health.stop()

    run(scenario())
