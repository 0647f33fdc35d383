"""Profiles of the running program's processes, and `/debug` and `/debug/models` with the figures of what was done.

One program with two workers serves most tests; one with keys and a local model, and one with profiles off, the others.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from llm_router.testing import Gate, Hold, Pause, ScriptedBackend, json_reply
from support.callers import Administrator, Callers, Reply, chat, new_address, request
from support.debugging import Debug, command, lines
from support.model import default_model
from support.serving import Serving, remote_config, rss_bytes
from support.wait import until

pytestmark = pytest.mark.slow

CONFIG = """
backends:
  - {name: plain, url: "%(plain)s"}
  - {name: held, url: "%(held)s"}
models:
  - {name: m, deployments: [{backend: plain, model: scripted}]}
  - {name: counted, price: {input: 1000, output: 1000}, deployments: [{backend: plain, model: scripted}]}
  - {name: timed, deployments: [{backend: held, model: scripted}], queue: {slots: 2, max_waiting: 8}}
routing: {breaker: {enabled: false}, retry: {attempts: 1}}
"""

HANDLER = "llm_router.gateway.core:Core.__call__"
"""Where every request of a worker passes."""

DISPOSITION = re.compile(r'attachment; filename="worker-0-cpu-\d{8}T\d{6}Z\.(speedscope\.json|folded|json)"').fullmatch


class World(NamedTuple):
    serving: Serving
    debug: Debug
    plain: ScriptedBackend
    held: ScriptedBackend

    def order(self, **query: str | float) -> Reply:
        """The reply to an order of a profile."""
        return self.debug.reply("/profile", method="POST", **query)

    def profile(self, **query: str | float) -> Any:
        """One as a document; it must be taken."""
        reply = self.order(**{"format": "json", **query})
        assert reply.status == 200, reply.body
        return reply.json()

    @contextlib.contextmanager
    def ordered(self, **query: str | float) -> Iterator[concurrent.futures.Future[Reply]]:
        """An order that is being carried out: no other can be. The block does not end before it does."""

        def order() -> Reply:
            return until(lambda: _unless(409, self.order(**query)), what="its turn")[0]

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            ordered = thread.submit(order)
            until(self.is_taken, what="its beginning")
            yield ordered

    def is_taken(self) -> bool:
        """Whether another one would be refused. One of the time before takes none itself, but for a moment."""
        return self.order(process="worker-0", kind="continuous", seconds=1).status == 409

    @contextlib.contextmanager
    def load(self) -> Iterator[Callers]:
        """Requests without end, on both workers."""

        def call(connection: http.client.HTTPConnection, number: int) -> Reply:
            if number % 20 == 19:  # another connection, and so perhaps the other worker
                connection.close()
            return chat(self.serving.port, connection=connection)

        with Callers(self.serving.port, call) as callers:
            yield callers

    def audited(self) -> list[dict[str, Any]]:
        return [line for line in lines(self.serving, "audit") if line["event"] == "profile_taken"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("profiles")
    with ScriptedBackend() as plain, ScriptedBackend() as held:
        config = CONFIG % {"plain": plain.base_url, "held": held.base_url}
        env = {"PROFILER_ENABLED": "true", "ENVIRONMENT": "staging", "A_PASSWORD": "planted-in-the-environment"}
        with Serving(folder, config, "--workers", "2", env=env) as serving:
            yield World(serving, Debug(serving), plain, held)


def _unless(status: int, reply: Reply) -> list[Reply]:
    return [] if reply.status == status else [reply]


def names_in(profile: Any) -> set[str]:
    return {frame["name"] for frame in profile["frames"]}


def share(profile: Any, name: str) -> float:
    """Of the whole, what was spent in a function and what it called."""
    indexes = {index for index, frame in enumerate(profile["frames"]) if frame["name"] == name}
    spent: float = sum(stack["value"] for stack in profile["stacks"] if indexes & set(stack["frames"]))
    total: float = profile["total"]
    return spent / total


# -- what they show ------------------------------------------------------------------------------------------


def test_a_busy_worker_shows_what_it_does_and_goes_on(world: World) -> None:
    """The functions of the request path take most of its CPU time, all of which is accounted for."""
    with world.load() as callers:
        until(lambda: callers.count(200) > 20)
        before = callers.count(200)
        profile = world.profile(process="worker-0", seconds=2)
        served = callers.count(200) - before
        assert callers.count(200) == len(callers.seen)
    assert served > 50
    assert (profile["kind"], profile["process"], profile["unit"]) == ("cpu", "worker-0", "seconds")
    assert profile["seconds"] == pytest.approx(2, abs=0.5)
    assert profile["notes"]["faults"] == 0
    assert profile["total"] == pytest.approx(profile["notes"]["process_cpu_seconds"], rel=0.2, abs=0.05)
    assert profile["count"] >= 5
    assert share(profile, HANDLER) > 0.2
    tops = {profile["frames"][stack["frames"][0]]["name"] for stack in profile["stacks"]}
    assert "thread MainThread" in tops


def test_each_format_is_what_its_tools_read(world: World) -> None:
    with world.load():
        speedscope = world.order(seconds=0.5)
        folded = world.order(seconds=0.5, format="folded")
        whole = world.order(seconds=0.5, format="json")
    types = [reply.headers["content-type"] for reply in (speedscope, folded, whole)]
    assert types == ["application/json", "text/plain; charset=utf-8", "application/json"]
    assert all(DISPOSITION(reply.headers["content-disposition"]) for reply in (speedscope, folded, whole))
    document = speedscope.json()
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = document["shared"]["frames"]
    for profile in document["profiles"]:
        assert (profile["type"], profile["unit"]) == ("sampled", "seconds")
        assert len(profile["samples"]) == len(profile["weights"])
        assert sum(profile["weights"]) == pytest.approx(profile["endValue"] - profile["startValue"])
        assert all(0 <= index < len(frames) for stack in profile["samples"] for index in stack)
    stacks = [line.rpartition(" ") for line in folded.body.decode().splitlines()]
    assert all(int(microseconds) > 0 for _, _, microseconds in stacks)
    assert any(HANDLER in stack.split(";") for stack, _, _ in stacks)
    assert HANDLER in names_in(whole.json())


def test_control_shows_what_it_does(world: World) -> None:
    """While it is scraped."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ordered = thread.submit(world.profile, process="control", seconds=1)
        while not ordered.done():
            world.serving.scrape()
        profile = ordered.result()
    assert profile["process"] == "control"
    assert any(name.startswith("llm_router.observe.metrics.") for name in names_in(profile))


def test_memory_shows_what_grows(world: World) -> None:
    with world.load():
        worker = world.profile(process="worker-0", kind="memory", seconds=1)
        control = world.profile(process="control", kind="memory", seconds=0.5)
    for profile in (worker, control):
        assert (profile["kind"], profile["unit"]) == ("memory", "bytes")
        assert profile["notes"]["tracing_bytes"] > 0
        assert profile["total"] == sum(stack["value"] for stack in profile["stacks"])
    assert any("llm_router" in frame["file"] for frame in worker["frames"])


def test_the_time_before_is_sampled_all_along(world: World) -> None:
    """Two samples for each second of CPU time: some of what the tests before this one did."""
    with world.load():
        profile = until(
            lambda: _with(HANDLER, world.profile(kind="continuous", seconds=600)), 20, "a sample of a request"
        )
    assert profile["kind"] == "continuous"
    uptime = world.debug.get()["environment"]["uptime"]
    assert profile["seconds"] <= uptime + 60
    assert world.profile(kind="continuous", process="control")["total"] > 0


def _with(name: str, profile: Any) -> Any:
    return profile if name in names_in(profile) else None


# -- who may not, and when -----------------------------------------------------------------------------------


def test_what_cannot_be_profiled_is_refused_and_audited(world: World) -> None:
    before = len(world.audited())

    def refused(status: int, code: str, **query: str | float) -> str:
        reply = world.order(**query)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (status, code), error
        message: str = error["message"]
        return message

    assert "supervisor" in refused(400, "cannot_profile", process="supervisor")
    assert "worker-0, worker-1, control" in refused(404, "process_not_found", process="worker-7")
    assert "worker-0" in refused(404, "process_not_found", process="1")
    outcomes = [line["data"]["outcome"] for line in world.audited()[before:]]
    assert outcomes == ["cannot_profile", "process_not_found", "process_not_found"]
    assert "memory" in refused(400, "invalid_profile", kind="heap")
    assert "folded" in refused(400, "invalid_profile", format="svg")
    for seconds in ("0", "61", "nan", "ten"):
        assert "from 0.1 to 60" in refused(400, "invalid_profile", seconds=seconds)
    assert "second" in refused(400, "unknown_parameter", second=1)
    assert world.debug.reply("/profile").status == 405


def test_there_is_one_at_a_time(world: World) -> None:
    """Also of another process; then it is free again."""
    with world.ordered(process="worker-0", seconds=1.5) as first:
        second = world.order(process="control", seconds=0.1)
        assert (second.status, second.json()["error"]["code"]) == (409, "profile_running")
        assert 1 <= second.retry_after_s <= 2
        assert "worker-0" in second.message
    assert first.result().status == 200
    assert world.order(process="control", seconds=0.1).status == 200
    outcomes = [(line["data"]["outcome"], line["success"]) for line in world.audited()[-3:]]
    assert outcomes == [("profile_running", False), ("taken", True), ("taken", True)]


def test_of_a_process_that_dies_or_is_gone_is_told_at_once(world: World) -> None:
    """And the next one can be profiled."""
    with world.ordered(process="worker-0", seconds=60) as ordered:
        by_hand = command(world.serving, "profile", "worker-1", "--seconds", "1")
        assert (by_hand.returncode, "worker-0" in by_hand.stderr) == (1, True)
        killed_at = time.monotonic()
        os.kill(pid_of(world, "worker-0"), signal.SIGKILL)
        died = ordered.result(20)
        assert time.monotonic() - killed_at < 5
    assert (died.status, died.json()["error"]["code"]) == (503, "cannot_profile")
    assert "went away" in died.message
    (after,) = until(lambda: _unless(503, world.order(seconds=0.1, format="json")), what="its successor's")
    assert after.json()["process"] == "worker-0"
    # The supervisor, held, starts no successor: the process is gone.
    world.serving.process.send_signal(signal.SIGSTOP)
    try:
        os.kill(pid_of(world, "worker-0"), signal.SIGKILL)
        (gone,) = until(lambda: _gone(world.order(process="worker-0", seconds=0.1)), what="the loss")
        assert (gone.json()["error"]["code"], "not there now" in gone.message) == ("cannot_profile", True)
        assert world.order(process="worker-1", seconds=0.1).status == 200
    finally:
        world.serving.process.send_signal(signal.SIGCONT)
    until(lambda: _unless(503, world.order(seconds=0.1)), what="its successor's")


def pid_of(world: World, process: str) -> int:
    """As the supervisor's own line about its last start says."""
    started = [
        re.fullmatch(rf"{process} started \(pid (\d+)\)", line["message"])
        for line in lines(world.serving, "application")
    ]
    return int([found[1] for found in started if found][-1])


def _gone(reply: Reply) -> list[Reply]:
    """Its connection may still have been there."""
    return [reply] if reply.status == 503 and "went away" not in reply.message else []


def test_it_is_switched_off_unless_somebody_wants_it(tmp_path: Path) -> None:
    """No route, and the command says what to do."""
    with ScriptedBackend() as backend, Serving(tmp_path, remote_config(backend.base_url)) as serving:
        for port in (serving.port, serving.metrics_port):
            refused = request(port, "POST", "/debug/profile?seconds=0.1")
            assert (refused.status, refused.json()["error"]["code"]) == (404, "not_found")
        asked = command(serving, "profile", "--seconds", "0.1")
        assert (asked.returncode, "PROFILER_ENABLED=true" in asked.stderr) == (1, True)
        assert lines(serving, "audit") == []


# -- the command line ----------------------------------------------------------------------------------------


def test_the_command_line_shows_the_heaviest_functions_or_writes_a_file(world: World, tmp_path: Path) -> None:
    with world.load():
        shown = command(world.serving, "profile", "--seconds", "1", "--lines", "400")
        output = tmp_path / "worker-1.json"
        written = command(world.serving, "profile", "worker-1", "--seconds", "0.5", "--output", str(output))
    assert (shown.returncode, shown.stderr) == (0, "")
    title, _, head, *rows = shown.stdout.splitlines()
    assert re.fullmatch(r"worker-0, cpu, 1\.\d s: [\d.]+ s of CPU time \(\d+% of one CPU\), \d+ samples", title)
    assert head.split() == ["self", "total", "function"]
    assert any("llm_router." in row for row in rows)
    assert written.returncode == 0, written.stderr
    assert json.loads(output.read_text())["name"] == "worker-1 cpu"
    unknown = command(world.serving, "profile", "worker-9", "--seconds", "0.1")
    assert (unknown.returncode, "worker-9" in unknown.stderr) == (1, True)
    assert world.audited()[-1]["actor"] == "the command line"


# -- keys, and a model -----------------------------------------------------------------------------------------


@pytest.mark.model
def test_with_keys_it_takes_the_admin_scope_and_a_runner_is_no_python(tmp_path: Path) -> None:
    runner = f"file: {default_model()}, runner: {{context_size: 512}}"
    config = f"models:\n  - {{name: small, {runner}}}\nprofiler: {{enabled: true}}\n"
    with Serving(tmp_path, config, timeout_s=60) as serving:
        root = Administrator(serving)
        user, _ = root.create(name="a-user", scopes=["inference"])
        admin, _ = root.create(name="the-admin", scopes=["admin", "metrics:read"])  # which nobody needed so far
        path = "/debug/profile?process=control&seconds=0.1"

        def statuses(key: str, path: str, method: str = "GET") -> set[int]:
            ports = serving.port, serving.metrics_port
            return {request(port, method, path, key=key, address=new_address()).status for port in ports}

        until(lambda: statuses("", path, "POST") == {401}, what="keys that are in force")
        until(lambda: statuses(user, path, "POST") == {403}, what="the user's key")
        until(lambda: statuses(admin, path, "POST") == {200}, what="the administrator's key")
        for other in ("/debug", "/debug/requests", "/debug/requests/abcd", "/debug/models"):
            assert statuses("", other) == {401}
            assert statuses(user, other) == {403}
        line = [line for line in lines(serving, "audit") if line["event"] == "profile_taken"][-1]
        assert line["actor"] == "the key 'the-admin'"
        assert (
            line["data"].items() >= {"process": "control", "kind": "cpu", "outcome": "taken", "seconds": "0.1"}.items()
        )
        assert admin not in json.dumps(lines(serving, "audit"))

        debug = Debug(serving, admin)
        for name in ("small", "runner-small"):
            refused = debug.reply("/profile", method="POST", process=name)
            assert (refused.status, refused.json()["error"]["code"]) == (400, "cannot_profile")
            assert "llama.cpp" in refused.message
        _figures_of_a_local_model(serving, debug, user)


def _figures_of_a_local_model(serving: Serving, debug: Debug, key: str) -> None:
    began_at = time.monotonic()
    for number in range(3):
        reply = chat(serving.port, key, "small", max_tokens=8, stream=number == 2)
        assert reply.status == 200, reply.body
    took_s = time.monotonic() - began_at
    (model,) = debug.get("/models", model="small")["models"]
    assert (model["state"], model["error"], model["restarts"]) == ("loaded", "", 0)
    assert 0.01 < model["load_s"] < 60
    (pid,) = (pid for name, pid in serving.children().items() if name.startswith("runner"))
    assert model["memory_bytes"] == pytest.approx(rss_bytes(pid), rel=0.3)
    assert model["requests"] == {"total": 3, "success": 3, "error": 0, "cancelled": 0, "cached": 0}
    assert model["tokens"]["output"] == 24
    assert model["tokens"]["input"] > 0
    assert model["time_to_first_token_s"]["count"] == 1
    assert 0 < model["duration_s"]["mean"] * 3 <= took_s
    assert model["tokens_per_second"]["mean"] > 1


# -- figures -------------------------------------------------------------------------------------------------


def test_debug_models_tells_what_was_done(world: World) -> None:
    """Counts are those of the requests, and percentiles lie where the durations were."""
    assert [chat(world.serving.port, model="counted", text="a b c d").status for _ in range(5)] == [200] * 5
    world.plain.script(json_reply({"error": {"message": "oops"}}, 500))
    assert chat(world.serving.port, model="counted").status == 500
    (model,) = world.debug.get("/models", model="counted")["models"]
    assert model["requests"] == {"total": 6, "success": 5, "error": 1, "cancelled": 0, "cached": 0}
    assert (model["tokens"]["input"], model["tokens"]["output"]) == (20, 30)
    assert model["cost_usd"] == pytest.approx(0.05)
    assert (model["load_s"], model["memory_bytes"]) == (None, None)
    gate = Gate()
    world.held.always(Hold(gate), Pause(0.3), json_reply({"choices": [], "usage": {"completion_tokens": 3}}))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        sent = [threads.submit(chat, world.serving.port, model="timed") for _ in range(8)]
        until(lambda: world.serving.scrape().total("llm_router_queue_size", queue_type="timed"), what="a queue")
        gate.open()
        assert {one.result().status for one in sent} <= {200, 429}
    world.held.always()
    (model,) = world.debug.get("/models", model="timed")["models"]
    duration, waited = model["duration_s"], model["queue_wait_s"]
    assert duration["count"] == model["requests"]["total"] == 8
    assert 0.25 <= duration["p50"] <= duration["p90"] <= duration["p95"] <= duration["p99"] <= 5
    assert waited["p99"] >= 0.1, "some had to wait for the others"
    refused = world.debug.reply("/models", model="nobody")
    assert (refused.status, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_debug_tells_how_the_router_stands_and_shows_no_environment(world: World) -> None:
    document = until(lambda: _ready(world.debug.get()), what="a router that is ready again")
    status = document["status"]
    assert status["workers"] == {"worker-0": True, "worker-1": True}
    assert set(status["models"]) == {"m", "counted", "timed"}
    assert (status["models_loaded"], status["strategy"]) == (3, "balanced")
    assert document["health"]["checks"]["workers"]["status"] == "healthy"
    exposed = json.loads(world.serving.get("/metrics/json"))
    assert document["metrics"] > 50
    assert document["series"] > document["metrics"]
    assert exposed
    environment = document["environment"]
    assert environment["env"] == "staging"
    assert environment["python_version"].count(".") == 2
    assert 0 < environment["uptime"] < 600
    processes = environment["memory"]["processes"]
    assert {"supervisor", "control", "worker-0", "worker-1"} <= set(processes)
    own = psutil.Process(world.serving.process.pid).memory_info().rss
    assert processes["supervisor"] == pytest.approx(own, rel=0.3)
    assert "planted-in-the-environment" not in json.dumps(document)
    assert request(world.serving.port, "GET", "/debug").json()["status"]["state"] == status["state"]


def _ready(document: Any) -> Any:
    return document if document["status"]["ready"] and all(document["status"]["workers"].values()) else None
