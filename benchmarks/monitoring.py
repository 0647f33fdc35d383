"""What being observed costs: a large scrape, scraping under load, the memory of each process, the time to ready.

All of it is about the gateway alone. Not for: whether the numbers in a scrape are right (tests/).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import processes, wrk
from benchmarks.backend import MODEL
from benchmarks.contenders import CHAT_PATH, Gateway, gateway, started
from benchmarks.intervals import Difference, Estimate, alternating_difference, estimate
from benchmarks.measure import Plan

SERIES_WANTED: Final = 5000
SCRAPES_PER_S: Final = 10
_SCRAPES: Final = 60
_PROBE_MODELS: Final = 20
_MODELS_MAX: Final = 2000


class Scrape(NamedTuple):
    """A scrape of the monitoring port, timed from the request to the last byte, over a kept connection."""

    series: int
    size_bytes: int
    models: int
    milliseconds: Estimate


class ScrapingCost(NamedTuple):
    """CPU per request of the workers with scraping minus without; `without_us` is the median without."""

    difference_us: Difference
    without_us: float
    scrapes: int


def _get_metrics(connection: http.client.HTTPConnection) -> bytes:
    connection.request("GET", "/metrics", headers={"Accept": "text/plain;version=0.0.4"})
    reply = connection.getresponse()
    body = reply.read()
    if reply.status != 200:
        raise RuntimeError(f"GET /metrics was answered with {reply.status}: {body[:200]!r}")
    return body


def _series(exposition: bytes) -> int:
    return sum(1 for line in exposition.splitlines() if line and not line.startswith(b"#"))


def _touch_every_model(contender: Gateway) -> None:
    """One plain request and one stream for each model, so that all series of a model exist."""
    host = contender.url.removeprefix("http://").removesuffix(CHAT_PATH)
    with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as connection:
        for model in contender.models:
            for stream in (False, True):
                body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
                connection.request("POST", CHAT_PATH, json.dumps(body), {"Content-Type": "application/json"})
                reply = connection.getresponse()
                reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"model {model!r} was answered with {reply.status}")


def _scrape_with(models: int, backend_port: int, folder: Path, plan: Plan) -> Scrape:
    names = tuple(f"{MODEL}-{number}" for number in range(models))
    contender = gateway(backend_port, folder, models=names, name=f"gateway-{models}-models")
    with started(contender, cpu=plan.contender_cpu, folder=folder):
        _touch_every_model(contender)
        times_ms = []
        size = series = 0
        connection = http.client.HTTPConnection("127.0.0.1", contender.metrics_port, timeout=30)
        with contextlib.closing(connection):
            for _ in range(_SCRAPES):
                began = time.perf_counter()
                body = _get_metrics(connection)
                times_ms.append((time.perf_counter() - began) * 1e3)
                size, series = len(body), _series(body)
        # The first scrapes render label strings that later ones find in a cache, as with a real Prometheus.
        return Scrape(series, size, models, estimate(times_ms[5:]))


def large_scrape(backend_port: int, folder: Path, plan: Plan) -> Scrape:
    """A scrape of at least SERIES_WANTED series, reached by configuring as many models as that takes."""
    probe = _scrape_with(_PROBE_MODELS, backend_port, folder, plan)
    fewer = _scrape_with(_PROBE_MODELS // 2, backend_port, folder, plan)
    each = (probe.series - fewer.series) / (_PROBE_MODELS - _PROBE_MODELS // 2)
    if each <= 0:
        raise RuntimeError(f"more models make no more series ({fewer.series} and {probe.series})")
    models = _PROBE_MODELS + int((SERIES_WANTED - probe.series) / each) + 1
    return probe if models <= _PROBE_MODELS else _scrape_with(min(models, _MODELS_MAX), backend_port, folder, plan)


@contextlib.contextmanager
def _scraping(port: int) -> Iterator[list[float]]:
    """Scrapes ten times a second in a thread, not at all with port 0; gives a list that grows by the seconds each took."""
    stop = threading.Event()
    took: list[float] = []
    if not port:
        yield took
        return

    def scrape() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            due = time.monotonic()
            while not stop.wait(max(0.0, due - time.monotonic())):
                began = time.monotonic()
                _get_metrics(connection)
                took.append(time.monotonic() - began)
                due += 1 / SCRAPES_PER_S

    thread = threading.Thread(target=scrape, name="scraper")
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


def scraping_cost(contender: Gateway, root: int, plan: Plan, pairs: int, say: Callable[[str], None]) -> ScrapingCost:
    """Workers' CPU per request at 32 connections, in runs without and with scraping in turn: A B A B … A."""
    values = []
    scrapes = 0
    for turn in range(2 * pairs + 1):
        with_scraping = turn % 2 == 1
        say(f"run {turn + 1} of {2 * pairs + 1} {'with' if with_scraping else 'without'} scraping")
        with _scraping(contender.metrics_port if with_scraping else 0) as took:
            before = processes.use(root)
            load = wrk.load(
                contender.url,
                connections=32,
                seconds=plan.seconds,
                cpu=plan.load_cpu,
                model=MODEL,
                headers=contender.headers,
            )
            spent = processes.cpu_by_role(before, processes.use(root), contender.role)
        if with_scraping and not took:
            raise RuntimeError("no scrape came through")
        scrapes += len(took)
        values.append(spent["worker"] / load.requests * 1e6)
    return ScrapingCost(alternating_difference(values), estimate(values[::2]).median, scrapes)


def seconds_to_ready(backend_port: int, folder: Path, plan: Plan, times: int = 5) -> Estimate:
    """From the start of the command to the first 200 of /health/ready, everything on one CPU, without a local model."""
    took = []
    for number in range(times):
        contender = gateway(backend_port, folder, name=f"gateway-start-{number}")
        began = time.monotonic()
        with processes.running(
            contender.command,
            cpu=plan.contender_cpu,
            log=folder / "gateway-start.log",
            ready_url=contender.ready_url,
            environment=contender.environment,
            poll_s=0.005,
        ):
            took.append(time.monotonic() - began)
    return estimate(took)
