"""The log files of the running program: which lines there are, what becomes of them when files are rotated, disks are
full and processes are killed, who is told of what, and how `llm-router logs` reads them.

Every line of every file that these tests see is held to the schema. What lines may not hold is in test_secrets.py.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pytest
from benchmarks.pieces import written

from llm_router.observe.logs.schema import FILES
from llm_router.testing import Pause, ScriptedBackend, Stall, framed, json_reply, stream_head
from support.callers import CHAT, Administrator, Callers, Reply, chat, crowd, request
from support.log_files import Entry, LogFiles, counted
from support.model import default_model
from support.serving import SOURCES, Scrape, Serving, is_alive
from support.wait import until

pytestmark = pytest.mark.slow

WORDS: Final = "a question that nobody else asks"
EVENT: Final = framed(b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n')
OK: Final = json_reply({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 6}})

CONFIG = """
backends:
  - {name: b, url: "%(plain)s"}
  - {name: twin, url: "%(plain)s"}
  - {name: bad, url: "%(bad)s"}
  - {name: held, url: "%(held)s"}
models:
  - {name: m, deployments: [{backend: b, model: scripted}]}
  - {name: bad, deployments: [{backend: bad, model: scripted}]}
  - {name: held, deployments: [{backend: held, model: scripted}]}
  - {name: picky, strategy: custom, deployments: [{backend: b, model: scripted}, {backend: twin, model: scripted}]}
routing: {custom: "picking:pick", retry: {attempts: 1}}
%(more)s
"""

POLICY = """
def pick(model, candidates, need):
    raise RuntimeError("it cannot choose")
"""


class Backends:
    """One that answers, one that fails, and one that a test has in hand."""

    def __init__(self) -> None:
        self.plain, self.bad, self.held = ScriptedBackend(), ScriptedBackend(), ScriptedBackend()

    def config(self, more: str = "") -> str:
        urls = {"plain": self.plain.base_url, "bad": self.bad.base_url, "held": self.held.base_url}
        return CONFIG % {**urls, "more": more}


@pytest.fixture(scope="module")
def backends() -> Iterator[Backends]:
    found = Backends()
    with found.plain, found.bad, found.held:
        found.bad.always(json_reply({"error": {"message": "it broke", "type": "server_error"}}, 500))
        yield found


def serving_in(folder: Path, config: str, *arguments: str, **env: str) -> Serving:
    """A router with a custom strategy that fails."""
    (folder / "picking.py").write_text(POLICY)
    return Serving(folder, config, *arguments, env={"PYTHONPATH": f"{SOURCES}:{folder}", **env})


def logs_of(serving: Serving) -> LogFiles:
    return LogFiles(serving.folder / "data" / "logs")


@pytest.fixture(scope="module")
def plain(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two workers, and metrics.log each second. In the end every line must be as the schema says."""
    config = backends.config("access: {allowed_origins: ['https://app.test']}\nlogs: {metrics_interval: 1s}\n")
    with serving_in(tmp_path_factory.mktemp("plain"), config, "--workers", "2") as serving:
        yield serving
        logs_of(serving).wait("metrics")
    logs_of(serving).check()
    for file in FILES:
        assert WORDS.encode() not in logs_of(serving).raw(file), f"{file}.log holds a prompt"


_ids = itertools.count()


def named(prefix: str = "request") -> str:
    """An id for a request that no other has."""
    return f"{prefix}.{os.getpid()}.{next(_ids)}"


def ask(serving: Serving, id: str, model: str = "m", **more: Any) -> Reply:
    return chat(serving.port, model=model, text=WORDS, headers={"x-request-id": id, **more.pop("headers", {})}, **more)


def exchange(serving: Serving, data: bytes) -> bytes:
    """What comes back for these bytes until the server closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as sock:
        sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                received += piece
    return received


def opened(serving: Serving, id: str, model: str, *, stream: bool) -> socket.socket:
    """A connection on which a chat was asked for, and nothing read yet."""
    body = json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": WORDS}]})
    sock = socket.create_connection(("127.0.0.1", serving.port), timeout=10)
    sock.sendall(
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    return sock


def read(serving: Serving, *words: str) -> str:
    """What `llm-router logs ...` prints."""
    done = subprocess.run(_command(serving, *words), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _command(serving: Serving, *words: str) -> list[str]:
    return [sys.executable, "-m", "llm_router", "logs", "--log-dir", str(logs_of(serving).folder), *words]


# -- one line a request ------------------------------------------------------------------------------------


class Ending(NamedTuple):
    """A way in which a request ends, and what its access line says of it."""

    status: int
    outcome: str
    run: Callable[[Serving, Backends, str], str | None]
    """Asks, and gives the request's id if it is another than the one that was to be used."""
    error: str = ""
    route: str = CHAT
    is_inference: bool = True
    fields: Mapping[str, Any] = {}


def _id_in(reply: bytes) -> str:
    head = reply.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
    (id,) = [line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("x-request-id: ")]
    return id


def _plainly(**more: Any) -> Callable[[Serving, Backends, str], None]:
    return lambda serving, _, name: _done(ask(serving, name, **more))


def _done(reply: Reply) -> None:
    assert reply.status, "the reply did not come whole"


def _twice(serving: Serving, backends: Backends, id: str) -> None:
    """The second of two that one worker was asked: on the same connection."""
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=10)
    with contextlib.closing(connection):
        wish = {"x-llm-router-cache": "on"}
        first, second = (ask(serving, each, connection=connection, headers=wish) for each in (f"{id}.first", id))
    assert ("x-llm-router-cached" in first.headers, second.headers["x-llm-router-cached"]) == (False, "true")


def _got(path: str, method: str = "GET", **headers: str) -> Callable[[Serving, Backends, str], None]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda serving, _, name: _done(request(serving.port, method, path, headers={"x-request-id": name, **sent}))


def _forwarded_without_an_id(serving: Serving, backends: Backends, id: str) -> str:
    """Control answers: what it calls the request is what our line calls it."""
    return request(serving.port, "GET", "/health").headers["x-request-id"]


def _raw(data: bytes) -> Callable[[Serving, Backends, str], str]:
    return lambda serving, _, name: _id_in(exchange(serving, data))


def _broken_json(serving: Serving, backends: Backends, id: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n"
    assert b"400" in exchange(serving, f"{head}connection: close\r\ncontent-length: 3\r\n\r\n{{,}}".encode())


def _left_before(serving: Serving, backends: Backends, id: str) -> None:
    with _asked(serving, backends, id, Stall()):
        pass


def _left_within(serving: Serving, backends: Backends, id: str) -> None:
    with _asked(serving, backends, id, stream_head(), EVENT, Stall(), stream=True) as sock:
        while b'"w"' not in sock.recv(65536):
            pass


def _cut_short(serving: Serving, backends: Backends, id: str) -> None:
    """The backend breaks off in a stream: the caller is told in an event, the status was sent before."""
    with _asked(serving, backends, id, stream_head(), EVENT, framed(b"x") + b"nonsense", stream=True) as sock:
        received = b""
        while b'"error"' not in received and (piece := sock.recv(65536)):
            received += piece


@contextlib.contextmanager
def _asked(serving: Serving, backends: Backends, id: str, *steps: Any, stream: bool = False) -> Iterator[socket.socket]:
    """A connection with a request that the backend `held` has, which does these steps."""
    before = _chats(backends.held)
    backends.held.always(*steps)  # a script for one request could be that of a probe
    try:
        with opened(serving, id, "held", stream=stream) as sock:
            backends.held.wait(lambda _: _chats(backends.held) > before)
            yield sock
    finally:
        backends.held.always()


def _chats(backend: ScriptedBackend) -> int:
    return sum(request.method == "POST" for request in backend.requests)


def _without_control(serving: Serving, backends: Backends, id: str) -> None:
    pid = serving.signal("control", signal.SIGSTOP)
    try:
        assert _asked_of(serving, id).status == 503
    finally:
        os.kill(pid, signal.SIGCONT)


def _asked_of(serving: Serving, id: str) -> Reply:
    return request(serving.port, "GET", "/metrics", headers={"x-request-id": id})


_BIG: Final = b"x" * 70_000
ENDINGS: Final = {
    "plain": Ending(200, "success", _plainly(), fields={"routing.cached": False, "routing.backend": "b"}),
    "stream": Ending(200, "success", _plainly(stream=True), fields={"response.contentType": "text/event-stream"}),
    "cached": Ending(200, "success", _twice, fields={"routing.cached": True}),
    "embedding-of-no-model": Ending(404, "error", _plainly(model="nobody"), error="not_found"),
    "a-list": Ending(200, "success", _got("/v1/models"), route="/v1/models", is_inference=False),
    "head": Ending(200, "success", _got("/v1/models", "HEAD"), route="/v1/models", is_inference=False),
    "no-such-path": Ending(404, "error", _got("/nope?a=1"), "not_found", "__other__", is_inference=False,
                           fields={"request.query": "a=1", "request.url": "/nope?a=1"}),
    "method": Ending(405, "error", _got(CHAT), "bad_request", is_inference=False),
    "foreign-page": Ending(403, "error", _got("/v1/models", origin="https://evil.test"), "forbidden", "/v1/models",
                           is_inference=False),
    "preflight": Ending(204, "success", _got(CHAT, "OPTIONS", origin="https://app.test",
                                             access_control_request_method="POST"), is_inference=False),
    "broken-json": Ending(400, "error", _broken_json, "bad_request", is_inference=False),
    "backend-failed": Ending(500, "error", _plainly(model="bad"), "inference_error"),
    "cut-short": Ending(200, "error", _cut_short, "bad_reply"),
    "left-before": Ending(499, "cancelled", _left_before, "client_gone"),
    "left-within": Ending(499, "cancelled", _left_within, "client_gone"),
    "no-http": Ending(400, "error", _raw(b"GARBAGE\r\n\r\n"), "bad_request", "__other__", is_inference=False),
    "head-too-large": Ending(431, "error", _raw(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + _BIG + b"\r\n\r\n"),
                             "bad_request", "/", is_inference=False),
    "two-lengths": Ending(
        400, "error",
        _raw(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n" % CHAT.encode()),
        "bad_request", is_inference=False,
    ),
    "forwarded": Ending(200, "success", _got("/metrics"), route="/metrics", is_inference=False),
    "forwarded-without-an-id": Ending(200, "success", _forwarded_without_an_id, route="/health", is_inference=False),
    "forwarded-to-nothing": Ending(404, "error", _got("/admin/nothing"), "not_found", "/admin/*", is_inference=False),
    "without-control": Ending(503, "error", _without_control, "unavailable", "/metrics", is_inference=False),
}  # fmt: skip


def valued(entry: Entry, path: str) -> Any:
    value: Any = entry
    for name in path.split("."):
        value = value[name]
    return value


def test_every_request_has_one_line_however_it_ends(plain: Serving, backends: Backends) -> None:
    """As many lines as requests were counted, one for each, and each says how its request ended."""
    logs = logs_of(plain)
    ids = {name: named(name) for name in ENDINGS}
    for name, ending in ENDINGS.items():
        ids[name] = ending.run(plain, backends, ids[name]) or ids[name]
    for name, ending in ENDINGS.items():
        line = logs.one_of_request("access", ids[name])
        level = "error" if ending.status >= 500 else "warning" if ending.status >= 400 else "info"
        found = (line["response"]["statusCode"], line["outcome"], line.get("error", {}).get("name", ""), line["route"])
        assert found == (ending.status, ending.outcome, ending.error, ending.route), (name, line)
        assert (line["log.level"], "routing" in line) == (level, ending.is_inference), (name, line)
        assert {path: valued(line, path) for path in ending.fields} == ending.fields, name
        inferences = [entry for entry in logs.of_request("application", ids[name]) if "inference" in entry]
        assert [entry["inference"]["success"] for entry in inferences] == (
            [ending.outcome == "success"] if ending.is_inference else []
        ), name
        assert line["duration"] == pytest.approx(inferences[0]["inference"]["latency"]) if inferences else True
    until(
        lambda: len(logs.entries("access")) == plain.scrape().total("llm_router_http_requests_total"),
        what="as many access lines as requests",
    )
    assert set(counted(logs.entries("access")).values()) == {1}


def test_a_request_whose_worker_is_killed_has_no_line_and_the_others_have_theirs(
    plain: Serving, backends: Backends
) -> None:
    lost, after = named("lost"), named("after")
    with _asked(plain, backends, lost, Stall()) as sock:
        for pid in [pid for name, pid in plain.children().items() if name.startswith("worker")]:
            os.kill(pid, signal.SIGKILL)
            until(lambda: not is_alive(pid), what="the kill")  # noqa: B023
        assert sock.recv(1) == b""
    until(lambda: ask(plain, after).status == 200, what="an answer")
    logs = logs_of(plain)
    logs.one_of_request("access", after)
    assert all(logs.of_request(file, lost) == [] for file in ("access", "application", "error"))


def test_all_lines_of_a_request_have_its_trace(plain: Serving) -> None:
    """Also what the router says through `logging` while it serves the request; failures are in error.log too."""
    logs = logs_of(plain)
    trace = "0af7651916cd43dd8448eb211c80319c"
    picked, failed = named("picked"), named("failed")
    for id, model in ((picked, "picky"), (failed, "bad")):
        reply = ask(plain, id, model, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        assert reply.headers["x-request-id"] == id
        logs.one_of_request("access", id)
    until(lambda: len(logs.of_request("application", picked)) == 2)
    complaint, completed = logs.of_request("application", picked)
    assert (complaint["log.logger"], complaint["log.level"]) == ("llm_router.routing.policies", "warning")
    assert "it cannot choose" in complaint["message"]
    assert completed["inference"]["reason"] == "custom-failed"
    (error,) = logs.of_request("error", failed)
    assert error == logs.one_of_request("application", failed)
    of_picked = [complaint, completed, *logs.of_request("access", picked)]
    of_failed = [error, *logs.of_request("access", failed)]
    assert {line["trace.id"] for line in [*of_picked, *of_failed]} == {trace}
    assert len({line["span.id"] for line in of_picked}) == len({line["span.id"] for line in of_failed}) == 1
    # and on stderr, where only what goes through `logging` is.
    said = [json.loads(line) for line in plain.log.splitlines() if "it cannot choose" in line]
    assert [(line["request_id"], line["trace.id"]) for line in said] == [(picked, trace)]


def test_the_command_finds_lines_by_request_trace_and_condition(plain: Serving) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    id, other = named("wanted"), named("other")
    ask(plain, id, "bad", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    ask(plain, other)
    for each in (id, other):
        logs_of(plain).one_of_request("access", each)
    by_request = [json.loads(line) for line in read(plain, "--request", id, "--json").splitlines()]
    assert sorted(entry["message"] for entry in by_request) == ["HTTP Request", "Inference failed"]
    assert {entry["request_id"] for entry in by_request} == {id}
    assert [json.loads(line) for line in read(plain, "--trace", trace[:12], "--json").splitlines()] == by_request
    failures = read(plain, "--where", "status >= 500 and model == bad", "--file", "access", "--json").splitlines()
    assert id in [json.loads(line)["request_id"] for line in failures]
    assert all(json.loads(line)["response"]["statusCode"] >= 500 for line in failures)
    shown = read(plain, "--request", id)
    assert f" 500 POST {CHAT} " in shown
    assert shown.count(id) == 2
    assert "\x1b" not in shown


# -- what is not written -----------------------------------------------------------------------------------


def test_successes_are_sampled_and_lines_say_what_they_stand_for(backends: Backends, tmp_path: Path) -> None:
    """Errors and slow requests are always there; the rest adds up. Prompts and answers are there where that is wanted."""
    config = backends.config("logs: {sample_ratio: 0.5, slow: 700ms, content: true}\n")
    total, few = 400, 8
    backends.held.always(Pause(0.8), OK)
    try:
        with serving_in(tmp_path, config) as serving:
            quick, bad, slow = ({named(word) for _ in range(count)} for word, count in
                                (("quick", total), ("bad", few), ("slow", few)))  # fmt: skip
            plan = [*((id, "m") for id in quick), *((id, "bad") for id in bad), *((id, "held") for id in slow)]
            replies = crowd(len(plan), lambda number: ask(serving, *plan[number]))
            assert Counter(reply.status // 100 for reply in replies) == {2: total + few, 5: few}
            last = named("last")
            ask(serving, last, "bad")
            logs_of(serving).one_of_request("access", last)
    finally:
        backends.held.always()
    logs = logs_of(serving)
    logs.check()
    rates = {entry["request_id"]: entry["sample_rate"] for entry in logs.entries("access")}
    assert all(rates[id] == 1 for id in bad | slow)
    late = {id for id in quick if rates.get(id) == 1}  # on a busy machine
    assert {rates[id] for id in quick & rates.keys()} - {1} == {0.5}
    # Twice the number of coins on heads: five standard deviations.
    assert sum(1 / rates[id] for id in quick & rates.keys()) == pytest.approx(total, abs=5 * (total - len(late)) ** 0.5)
    inferences = {entry["request_id"]: entry for entry in logs.entries("application") if "inference" in entry}
    assert inferences.keys() - {last} == (quick | bad | slow) & rates.keys(), "both files have the same requests"
    told = inferences[next(iter(quick & rates.keys()))]
    assert told["sample_rate"] == rates[told["request_id"]]
    assert WORDS in told["inference"]["request_body"]
    assert "Hello from the scripted backend." in told["inference"]["response_body"]


# -- levels ------------------------------------------------------------------------------------------------


def test_levels_are_heeded_by_every_process_and_end_by_themselves(backends: Backends, tmp_path: Path) -> None:
    workers = {"worker-0", "worker-1", "worker-2"}
    config = backends.config("logs: {levels: {llm_router.control: info}}\n")
    with serving_in(tmp_path, config, "--workers", "3", LOG_LEVEL="WARNING") as serving:
        logs = logs_of(serving)

        def said(message: str) -> set[str]:
            """Which processes said something that begins so about requests that are asked now, or to a reload."""
            ids = {named("level") for _ in range(9)}
            for id in ids:
                assert ask(serving, id).status == 200
            for id in ids:
                logs.one_of_request("access", id)
            entries = logs.entries("application")
            return {e["process"] for e in entries if e["message"].startswith(message) and e.get("request_id") in ids}

        def reloaded() -> list[str]:
            """Who said something of a reload that is asked for by a signal."""
            before, reloads = len(logs.entries("application")), _events(logs)["config_reloaded"]
            serving.process.send_signal(signal.SIGHUP)
            until(lambda: _events(logs)["config_reloaded"] > reloads, what="a reload")

            def processes() -> set[str]:
                return {entry["process"] for entry in logs.entries("application")[before:]}

            # The supervisor's line is in the file before control hears of the signal.
            until(lambda: "control" in processes(), what="control's line about it")
            return sorted(processes())

        assert said("Inference") == set()
        assert [entry["log.level"] for entry in logs.entries("application")] == []
        assert '"log.level":"info"' not in serving.log
        assert reloaded() == ["control"]

        change = {"level": "debug", "logger": "gateway.inference", "for": "2s"}
        for wanted in (change, {"level": "info", "logger": "supervisor", "for": "2s"}):
            assert request(serving.metrics_port, "PUT", "/admin/log-level", wanted).status == 200
        until(lambda: said("Inference started") == workers, 5.0, "debug lines of every worker")
        assert reloaded() == ["control", "supervisor"]

        until(lambda: _events(logs)["log_level_ended"] == 2, 10.0, "the end of both")
        until(lambda: said("Inference") == set(), 5.0, "an end of debug lines")
        assert reloaded() == ["control"]
        shown = request(serving.metrics_port, "GET", "/admin/log-level").json()
        assert (shown["level"], shown["changes"]) == ("warning", [])

        for wrong, code in (({"level": "loud"}, "unknown_level"), ({"level": "info", "logger": "x"}, "unknown_logger")):
            refused = request(serving.metrics_port, "PUT", "/admin/log-level", wrong)
            assert (refused.status, refused.json()["error"]["code"]) == (400, code)
    logs.check()


def _events(logs: LogFiles) -> Counter[str]:
    return Counter(entry["event"] for entry in logs.entries("audit"))


# -- who did what ------------------------------------------------------------------------------------------


def test_audit_tells_who_did_what(backends: Backends, tmp_path: Path) -> None:
    """Over HTTP, with a key, by the command line and by a signal; also what came to nothing."""
    with serving_in(tmp_path, backends.config("profiler: {enabled: true}\n")) as serving:
        logs, config = logs_of(serving), serving.folder / "llm-router.yaml"
        anybody = Administrator(serving)
        secret, boss = anybody.create(name="boss", scopes=["admin"])
        administrator = Administrator(serving, secret)

        def told(event: str, **fields: Any) -> Entry:
            """The newest line of audit.log, which is there when the answer is."""
            entry = logs.entries("audit")[-1]
            assert entry.items() >= {"event": event, **fields}.items(), entry
            return entry

        told("key_created", actor="127.0.0.1", client="127.0.0.1", key_id=boss, key_name="boss")
        who = {"actor": "the key 'boss'", "actor_id": boss, "client": "127.0.0.1"}
        _, id = administrator.create(name="app")
        told("key_created", **who, key_id=id, key_name="app")
        administrator.ask("PATCH", f"/admin/keys/{id}", {"name": "other"})
        assert told("key_changed", **who, key_id=id, key_name="other")["data"] == {"changed": "name"}
        administrator.revoke(id)
        told("key_revoked", **who, key_id=id, key_name="other")
        through_a_worker = {"authorization": f"Bearer {secret}"}
        made = request(serving.port, "POST", "/admin/keys", {"name": "afar"}, headers=through_a_worker)
        assert made.status == 201, made.body
        told("key_created", **who, key_name="afar")

        _run(serving, "keys", "create", "--name", "typed")
        told("key_created", actor="the command line", key_name="typed")

        administrator.ask("POST", "/admin/reload", {})
        told("config_reloaded", **who, success=True)
        config.write_text("nonsense: 1\n")
        administrator.ask("POST", "/admin/reload", {}, status=422)
        assert "nonsense" in told("config_reloaded", **who, success=False)["data"]["problem"]
        serving.process.send_signal(signal.SIGHUP)
        by_signal = logs.wait("audit", actor="SIGHUP")
        assert (by_signal["event"], by_signal["success"]) == ("config_reloaded", False)
        error = logs.wait("error", process="control")
        assert (error["log.logger"], error["log.level"]) == ("llm_router.control", "error")

        administrator.ask("PUT", "/admin/log-level", {"level": "info", "logger": "cache"})
        assert told("log_level_changed", **who)["data"]["logger"] == "llm_router.cache"
        profile = request(serving.metrics_port, "POST", "/debug/profile?seconds=0.2", {}, key=secret)
        assert profile.status == 200, profile.body
        assert told("profile_taken", **who, success=True)["data"]["kind"] == "cpu"
        administrator.ask("POST", "/admin/models/load", {"name": "nobody"}, status=404)
        told("model_load_ordered", **who, success=False, model_name="nobody")
        wrong = Administrator(serving, secret[:-1] + "x")
        before = len(logs.entries("audit"))
        wrong.ask("POST", "/admin/keys", {"name": "stolen"}, status=401)
        assert len(logs.entries("audit")) == before
    logs.check()
    for file in FILES:
        assert secret.encode() not in logs.raw(file)


def _run(serving: Serving, *words: str) -> None:
    env = {"PATH": os.defpath, "HOME": str(serving.folder), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "llm_router", *words]
    env["DATA_DIR"] = str(serving.folder / "data")
    done = subprocess.run(command, cwd=serving.folder, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.model
def test_models_that_come_and_go_are_told_with_who_wanted_it(tmp_path: Path) -> None:
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    (models / "small.gguf").symlink_to(default_model())
    config = "models: [{name: small, file: small, load: false, runner: {context_size: 256, parallel: 1}}]\n"
    with Serving(tmp_path, config, ready=False) as serving:
        until(lambda: serving.status("/health/live", monitoring=True) == 200, 20.0, "control")
        logs, administrator = logs_of(serving), Administrator(serving)
        load = ("POST", "/admin/models/load", {"name": "small"})
        # 503 until the keys were read
        until(lambda: request(serving.metrics_port, *load).status == 200, 20.0, "the model")
        loaded = logs.wait("audit", event="model_load", model_id="small")
        assert loaded["load_duration"] > 0
        assert loaded["format"] == "gguf"
        assert logs.wait("audit", event="model_load_ordered", success=True)["actor"] == "127.0.0.1"
        assert logs.wait("application", message="Model loaded")["model"]["id"] == "small"
        administrator.ask("POST", "/admin/models/unload", {"name": "small"})
        logs.wait("audit", event="model_unload_ordered", actor="127.0.0.1", success=True, model_name="small")
        logs.wait("audit", event="model_unload", model_id="small")
        logs.wait("application", message="Model unloaded")
    logs.check()


# -- rotation, and kills -----------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request that a client made, with monotonic instants; status 0 if its reply did not come whole."""

    id: str
    status: int
    began_at: float
    ended_at: float


class Clients:
    """Threads that ask without pause; every seventh time for a model that fails, every fiftieth they make a key."""

    def __init__(self, serving: Serving, threads: int = 4) -> None:
        self.asked: list[Asked] = []
        self.made: list[str] = []
        self._serving = serving
        self._callers = Callers(serving.port, self._call, threads)

    def __enter__(self) -> Self:
        self._callers.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self._callers.__exit__(*reason)

    def _call(self, connection: http.client.HTTPConnection, number: int) -> Reply:
        id, began_at = named("load"), time.monotonic()
        reply = ask(self._serving, id, "m" if number % 7 else "bad", connection=connection)
        self.asked.append(Asked(id, reply.status, began_at, time.monotonic()))
        if number % 50 == 25:
            made = request(self._serving.metrics_port, "POST", "/admin/keys", {"name": id, "scopes": ["metrics:read"]})
            if made.status == 201:
                self.made.append(made.json()["key"]["id"])
        return reply

    def wait_for(self, more: int) -> None:
        """Until so many more requests were answered."""
        until_there = len(self.asked) + more
        until(lambda: len(self.asked) >= until_there, 20.0, f"{more} requests")


SWEEP_S: Final = 10.0
"""How often control looks after the files; it does so at its start, too."""

FLUSHED_S: Final = 0.5
"""Lines of access.log and application.log are in their file 20 ms after the request, on an idle machine. A kill loses
what is not."""


@pytest.mark.timeout(90)
def test_no_line_is_lost_doubled_or_torn_by_rotation_and_no_error_by_kills(backends: Backends, tmp_path: Path) -> None:
    """Three workers write while control, killed once, rotates and compresses, and somebody follows; then workers are
    killed: what clients saw whole is in error.log and audit.log, and in access.log but for the last moments."""
    config = backends.config("logs: {max_file: 64KiB, metrics_interval: 1s}\n")
    with serving_in(tmp_path, config, "--workers", "3") as serving:
        logs = logs_of(serving)
        reader, _ = Administrator(serving).create(scopes=["metrics:read"])
        with _following(serving) as followed:
            began_at = time.monotonic()
            with Clients(serving) as calm:
                calm.wait_for(300)
                killed = serving.signal("control", signal.SIGKILL)
                until(lambda: not is_alive(killed))
                until(lambda: logs.rotated("access"), 15.0, "a rotation by the next control")
                calm.wait_for(300)
            with Clients(serving) as shaken:
                kills: list[float] = []
                for turn in range(4):
                    shaken.wait_for(150)
                    pid = serving.signal(f"worker-{turn % 3}", signal.SIGKILL)
                    kills.append(time.monotonic())
                    until(lambda: not is_alive(pid))  # noqa: B023
                shaken.wait_for(100)
            last = named("last")
            until(lambda: ask(serving, last).status == 200, what="an answer")
            until(lambda: any(each.is_compressed for each in logs.rotated("access")), 25.0, "a compressed file")
            until(lambda: last in followed.text(), 10.0, "the last line in what is followed")
            sweeps = 3 + int((time.monotonic() - began_at) / SWEEP_S)
            scrape = Scrape(serving.get("/metrics", authorization=f"Bearer {reader}").decode())
            assert scrape.total("llm_router_log_dropped_total") == 0
        seen = counted(json.loads(line) for line in followed.text().splitlines())
    logs.check()

    answered = {asked.id: asked for asked in [*calm.asked, *shaken.asked] if asked.status}
    lines = counted(logs.entries("access"))
    assert set(lines.values()) == {1}
    missing = answered.keys() - lines.keys()
    assert not missing & {asked.id for asked in calm.asked}, "rotation loses nothing"
    late = {id for id in missing if not any(at - FLUSHED_S <= answered[id].ended_at <= at + 0.1 for at in kills)}
    assert late == set(), "only what was not flushed at a kill"
    ids = {id for id in lines if id.partition(".")[0] in {"load", "last"}}
    assert {id: count for id, count in seen.items() if id in ids} == dict.fromkeys(ids, 1), "what was followed"

    failed = {id for id, asked in answered.items() if asked.status >= 500}
    assert len(failed) > 50
    errors = counted(entry for entry in logs.entries("error") if "inference" in entry)
    assert failed <= errors.keys(), "a kill loses no error"
    assert set(errors.values()) == {1}
    keys = Counter(entry["key_id"] for entry in logs.entries("audit") if entry["event"] == "key_created")
    assert len(calm.made) >= 5
    assert set(calm.made) | set(shaken.made) <= keys.keys(), "a kill loses no audit line"
    assert set(keys.values()) == {1}

    rotated = logs.rotated("access")
    assert 1 <= len(rotated) <= sweeps, "only control rotates, when it looks"
    assert len({each.stamp for each in rotated}) == len(rotated)
    assert all(each.path.stat().st_mode & 0o777 == 0o640 for each in rotated)
    assert not list(logs.folder.glob("*.part"))


class _Followed:
    """What a command prints, as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def text(self) -> str:
        """Whole lines only."""
        text = self._path.read_text()
        return text[: text.rfind("\n") + 1]


@contextlib.contextmanager
def _following(serving: Serving) -> Iterator[_Followed]:
    """`llm-router logs --follow` of access lines of named requests, ended by Ctrl-C."""
    path = serving.folder / "followed"
    words = ("--follow", "--file", "access", "--json", "--lines", "0", "--where", "request =~ '^(start|load|last)[.]'")
    with path.open("w") as output:
        process = subprocess.Popen(
            _command(serving, *words), stdout=output, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
    try:
        followed = _Followed(path)

        def is_there() -> bool:
            ask(serving, named("start"))
            return bool(followed.text())

        until(is_there, 15.0, "the first followed line")
        yield followed
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# -- disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte. Where none may be mounted the test is skipped; where CI is set it fails."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if done is None or done.returncode:
        reason = (
            f"a full disk cannot be tested: no tmpfs can be mounted ({done.stderr.strip() if done else 'no mount'})"
        )
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def _filled(path: Path) -> Iterator[None]:
    """A file that takes all the space there is."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """An empty file system that cannot be written in the folder's place: root may write wherever it is not so."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Watch:
    """What an outage of the log files looks like from outside."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def dropped(self) -> float:
        return self._serving.scrape().total("llm_router_log_dropped_total", reason="write-failed")

    def health(self) -> tuple[str, str]:
        """Of all, and of the check."""
        document = json.loads(self._serving.get("/health"))
        return document["status"], document["checks"]["logs"]["status"]

    def waiting(self) -> float:
        return self._serving.scrape().total("llm_router_internal_queue_size", queue="log")

    def said(self, text: str) -> Counter[str]:
        """How often each process said so on stderr."""
        lines = [json.loads(line) for line in self._serving.log.splitlines() if text in line]
        return Counter(line["process"] for line in lines)


HEALTH: Final = """
health:
  interval: 1s
  fall: 1
  rise: 1
  checks: {cpu_usage: {enabled: false}, backends: {enabled: false}, inference_capability: {enabled: false}}
"""


def test_a_full_and_a_read_only_disk_cost_lines_and_nothing_else(
    backends: Backends, tmp_path: Path, small_disk: Path
) -> None:
    """Requests go on, what is lost is counted, health is degraded, stderr has a line for each process; and when there
    is space again, lines are written, errors and audit events of the outage included."""
    with serving_in(tmp_path, backends.config(HEALTH), LOG_DIR=str(small_disk)) as serving:
        logs, watch = LogFiles(small_disk), Watch(serving)
        administrator = Administrator(serving)
        first = named("first")
        assert ask(serving, first).status == 200
        logs.one_of_request("access", first)
        until(lambda: watch.health() == ("healthy", "healthy"), 10.0, "health")

        def outage(name: str, trouble: contextlib.AbstractContextManager[object]) -> None:
            """Requests, failures and an audit event while there is trouble; all that was due is there, or counted."""
            before, audits = watch.dropped(), len(logs.entries("audit", torn=9))
            ids, failed = ({named(name) for _ in range(count)} for count in (60, 3))
            with trouble:
                replies = crowd(len(ids), lambda number: ask(serving, sorted(ids)[number]), 4)
                replies += [ask(serving, id, "bad") for id in failed]
                assert Counter(reply.status for reply in replies) == {200: 60, 500: 3}
                administrator.ask("PUT", "/admin/log-level", {"level": "info", "logger": "cache"})
                until(lambda: watch.dropped() > before + 60, 5.0, "lost lines to be counted")
                until(lambda: watch.health() == ("degraded", "degraded"), 10.0, "health to be degraded")
                assert serving.status("/health", monitoring=True) == 200
                assert watch.waiting() >= len(failed)
            until(lambda: watch.health() == ("healthy", "healthy"), 10.0, "health to be well again")
            back = named("back")
            assert ask(serving, back).status == 200
            until(lambda: back in counted(logs.entries("access", torn=9)), 5.0, "lines")

            there = [counted(_named(logs.entries(file, torn=9))) for file in ("access", "application")]
            assert all(set(lines.values()) == {1} for lines in there)
            found = sum(id in lines for lines in there for id in ids | failed)
            # Control lost lines of application.log as well.
            assert 126 <= found + watch.dropped() - before <= 126 + 10
            errors = counted(_named(logs.entries("error", torn=9)))
            assert [errors[id] for id in failed] == [1, 1, 1], "errors wait for better times"
            assert len(logs.entries("audit", torn=9)) == audits + 1, "so do audit events"

        outage("full", _filled(small_disk / "ballast"))
        said = watch.said("cannot be written")
        assert said.keys() >= {"worker-0"}
        assert set(said.values()) == {1}
        assert "No space left on device" in serving.log
        until(lambda: watch.said("are written again").keys() == said.keys(), 5.0, "the good news")
        outage("read-only", _read_only(small_disk))
        until(lambda: watch.waiting() == 0, what="nothing to wait")
        # A minute has not passed: it is not said again.
        assert set(watch.said("cannot be written").values()) == {1}
    logs.check(torn=4)


def _named(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if "request_id" in entry]


def test_a_log_folder_that_cannot_be_made_stops_nobody(backends: Backends, tmp_path: Path) -> None:
    """A file is in its place; when that is gone, lines are written."""
    place = tmp_path / "place"
    place.touch()
    with serving_in(tmp_path, backends.config(HEALTH), LOG_DIR=str(place / "logs")) as serving:
        watch = Watch(serving)
        assert [ask(serving, named("without")).status for _ in range(5)] == [200] * 5
        until(lambda: watch.dropped() > 0, 5.0, "lost lines to be counted")
        until(lambda: watch.health() == ("degraded", "degraded"), 10.0, "health to be degraded")
        assert watch.said("cannot be written") == {"control": 1, "worker-0": 1}
        place.unlink()
        after = named("after")
        until((place / "logs" / "access.log").exists, 10.0, "the files")
        assert ask(serving, after).status == 200
        LogFiles(place / "logs").one_of_request("access", after)
        until(lambda: watch.health() == ("healthy", "healthy"), 10.0, "health to be well again")
    LogFiles(place / "logs").check()


# -- how many ----------------------------------------------------------------------------------------------


def test_twenty_thousand_lines_a_second_are_written_without_a_loss() -> None:
    """As `python -m benchmarks.pieces` measures it, for three seconds; on the core of whoever makes the requests."""
    found = written(20_000, 3.0)
    assert (found.dropped, found.written) == (0, found.lines)
    assert found.lines >= 20_000 * 2.9
