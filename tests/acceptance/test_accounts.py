"""Keys, limits, budgets and usage in the running program: with workers and control killed, stores and Redis away.

What is promised: DESIGN's access table, a revoked key refused within a second, limits never exceeded by however many
workers and routers, one usage row for each inference. Servers are shared by the tests of this file, keys are not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest

from llm_router.testing import Close, Gate, Hold, ScriptedBackend, framed, json_reply, stream_head
from support.callers import CHAT, Administrator, Callers, Reply, chat, crowd, new_address, request, rows, statuses
from support.net import free_port
from support.postgres import Postgres, postgres_server
from support.redis import RedisServer
from support.serving import SOURCES, Serving, is_alive, rss_bytes
from support.wait import until

pytestmark = pytest.mark.slow

INPUT, OUTPUT = 3, 6
"""Tokens of every chat here, as the scripted backend counts them."""

PRICE = 1000.0
"""US dollars for a million tokens, in and out: a tenth of a cent each."""

COST_USD = (INPUT + OUTPUT) * PRICE / 1e6

REVOKED_WITHIN_S = 1.0
STORED_WITHIN_S = 5.0

CONFIG = """
server: {drain: 5s}
backends:
  - {name: b, url: "%(plain)s"}
  - {name: held, url: "%(held)s"}
models:
  - {name: m, price: {input: 1000, output: 1000}, deployments: [{backend: b, model: scripted}]}
  - {name: other, deployments: [{backend: b, model: scripted}]}
  - {name: held, price: {input: 1000, output: 1000}, deployments: [{backend: held, model: scripted}]}
  - {name: twenty, limits: {requests_per_minute: 20}, deployments: [{backend: b, model: scripted}]}
%(more)s
"""

ANSWER = json_reply({"choices": [], "usage": {"prompt_tokens": INPUT, "completion_tokens": OUTPUT}})
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'


class Backends:
    """A backend that answers, and one that a test has in hand."""

    def __init__(self) -> None:
        self.plain = ScriptedBackend()
        self.held = ScriptedBackend()

    def __enter__(self) -> Self:
        self.plain.__enter__()
        self.held.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.stop()
        self.held.stop()

    def config(self, more: str = "") -> str:
        return CONFIG % {"plain": self.plain.base_url, "held": self.held.base_url, "more": more}

    @contextlib.contextmanager
    def hold(self) -> Iterator[Gate]:
        """Requests to `held` wait for the gate, which is opened at the end."""
        gate = Gate()
        self.held.always(Hold(gate), ANSWER)
        try:
            yield gate
        finally:
            gate.open()
            self.held.always()


@pytest.fixture(scope="module")
def backends() -> Iterator[Backends]:
    with Backends() as backends:
        yield backends


@pytest.fixture(scope="module")
def one(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("one"), backends.config()) as serving:
        yield serving


@pytest.fixture(scope="module")
def three(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("three"), backends.config(), "--workers", "3") as serving:
        yield serving


@pytest.fixture(params=["one", "three"])
def serving(request: pytest.FixtureRequest) -> Serving:
    """With one worker and with three."""
    found: Serving = request.getfixturevalue(request.param)
    return found


class Spent:
    """A key whose requests of a minute are used up, and when it was said to come back."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.key = Administrator(serving).limited(requests_per_minute=4)
        ok = [chat(serving.port, self.key).status for _ in range(4)]
        assert ok == [200] * 4
        self.refused = chat(serving.port, self.key)
        self.refused_at = time.monotonic()


@pytest.fixture(scope="module", autouse=True)
def spent(three: Serving) -> Spent:
    """From the beginning on, so that its minute passes while the other tests run."""
    return Spent(three)


def keys(serving: Serving, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`llm-router keys …` as the user types it."""
    folder = serving.folder
    where = ("--config", str(folder / "llm-router.yaml"), "--data-dir", str(folder / "data"))
    return subprocess.run(
        [sys.executable, "-m", "llm_router", "keys", *arguments, *where],
        env={"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"], "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )


def stored_bytes(folder: Path) -> bytes:
    """Everything that is in the files of the data folder's database."""
    return b"".join(path.read_bytes() for path in (folder / "data").glob("accounts.db*"))


def kill(serving: Serving, child: str) -> None:
    """kill -9; returns when it is gone."""
    pid = serving.signal(child, signal.SIGKILL)
    until(lambda: not is_alive(pid), what=f"the end of {child}")


# -- keys -----------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_its_hash(one: Serving) -> None:
    """Made by the command line or over HTTP: its text is in the answer and in no list, file or log."""
    created = keys(one, "create", "--name", "by command")
    typed = created.stdout.strip()
    posted = Administrator(one).ask("POST", "/admin/keys", {"name": "by http"}, status=201)["secret"]
    for text in (typed, posted):
        assert re.fullmatch(r"sk-llmr-[A-Za-z0-9_-]{43}", text)
        assert chat(one.port, text).status == 200
        assert (
            request(one.port, "POST", CHAT, {"model": "m", "messages": []}, headers={"x-api-key": text}).status == 200
        )
    shown = keys(one, "list").stdout + keys(one, "list", "--all", "--json").stdout
    shown += json.dumps(Administrator(one).ask("GET", "/admin/keys?all=true")) + one.log + created.stderr
    assert "by command" in shown
    assert "by http" in shown
    assert len({typed, posted}) == 2
    kept = stored_bytes(one.folder)
    for text in (typed, posted):
        secret = text.removeprefix("sk-llmr-")
        assert secret not in shown
        assert secret.encode() not in kept
        assert hashlib.sha256(text.encode()).digest() in kept
    assert (one.folder / "data" / "accounts.db").stat().st_mode & 0o077 == 0


def test_who_needs_a_key_on_loopback(backends: Backends, tmp_path: Path) -> None:
    """Each thing is open until there is a key for it, and is never open again."""
    with Serving(tmp_path, backends.config()) as serving:
        root = Administrator(serving)

        def open_to(key: str) -> dict[str, bool]:
            asked = {
                "inference": chat(serving.port, key, address=new_address()),
                "models": request(serving.port, "GET", "/v1/models", key=key, address=new_address()),
            }
            for port, name in ((serving.port, "app"), (serving.metrics_port, "monitoring")):
                for path in ("/metrics", "/health", "/admin/keys"):
                    asked[f"{path} {name}"] = request(port, "GET", path, key=key, address=new_address())
                for path in ("/health/live", "/health/ready"):
                    terse = request(port, "GET", path, address=new_address())
                    assert terse.status == 200
                    assert len(terse.body) < 120
            refused = {reply.status for reply in asked.values() if reply.status != 200}
            assert refused <= {401 if not key else 403}
            # Anybody may know the one word of /health; what it stands for is for who may read metrics.
            return {
                name: reply.status == 200 and (b'"checks"' in reply.body or not name.startswith("/health"))
                for name, reply in asked.items()
            }

        everything = dict.fromkeys(open_to(""), True)
        assert open_to("") == everything
        reader, _ = root.create(scopes=["metrics:read"])
        no_metrics = {f"{path} {name}": False for path in ("/metrics", "/health") for name in ("app", "monitoring")}
        assert open_to("") == {**everything, **no_metrics}
        assert open_to(reader) == everything
        caller, id = root.create()
        no_inference = {"inference": False, "models": False}
        assert open_to("") == {**everything, **no_metrics, **no_inference}
        assert open_to(caller) == {**everything, **no_metrics}
        assert open_to(reader) == {**everything, **no_inference}
        admin, _ = root.create(scopes=["admin"])
        no_admin = {f"/admin/keys {name}": False for name in ("app", "monitoring")}
        nothing = {**no_metrics, **no_inference, **no_admin}
        assert open_to("") == nothing
        assert open_to(admin) == {**everything, **no_inference}
        assert open_to(caller) == {**nothing, "inference": True, "models": True}
        Administrator(serving, admin).revoke(id)
        assert open_to("") == nothing
        assert "by command" in keys(serving, "create", "--name", "by command").stderr


def test_off_loopback_a_key_is_needed_from_the_first_second(backends: Backends, tmp_path: Path) -> None:
    """One for administration is printed at the first start and at no other. Who fails too often waits."""
    config = backends.config().replace("drain: 5s", "drain: 5s, host: 0.0.0.0")
    with exposed(tmp_path, config) as serving:
        printed = until(lambda: re.findall(r"sk-llmr-\S+", serving.log), what="the key for administration")
        assert len(printed) == 1
        root = Administrator(serving, printed[0])
        for path in ("/v1/models", "/metrics", "/admin/keys", "/", "/nowhere", "/debug"):
            wanted = 404 if path == "/nowhere" else 401
            assert request(serving.port, "GET", path, address=new_address()).status == wanted, path
        assert chat(serving.port, address=new_address()).status == 401
        assert request(serving.metrics_port, "GET", "/admin/keys", address=new_address()).status == 401
        assert request(serving.port, "GET", "/health/ready", address=new_address()).status == 200
        assert set(request(serving.port, "GET", "/health", address=new_address()).json()) == {"status", "timestamp"}
        assert chat(serving.port, printed[0], address=new_address()).status == 403, "it is not for inference"
        key, _ = root.create()
        kill(serving, "control")
        until(lambda: serving.status("/health", monitoring=True) == 200, what="control")

        address = new_address()
        began = time.monotonic()
        failed = crowd(14, lambda number: chat(serving.port, f"sk-llmr-{number}", address=address), at_once=14)
        assert 3.0 < time.monotonic() - began < 8
        seen = statuses(failed)
        assert seen[401] + seen[429] == 14
        assert 11 <= seen[401] <= 12, "a failure is forgiven after ten seconds"
        assert all(1 <= reply.retry_after_s <= 61 for reply in failed if reply.status == 429)
        assert chat(serving.port, key, address=address).status == 200
        log = serving.log
    assert len(re.findall(r"sk-llmr-\S+", log)) == 1
    with exposed(tmp_path, config) as serving:
        Administrator(serving, printed[0]).ask("GET", "/admin/keys")
        until(lambda: "is ready" in serving.log, what="the banner")
    assert "sk-llmr-" not in serving.log


def exposed(folder: Path, config: str) -> Serving:
    """A router at a port that is free at every address: other tests' callers have many."""
    serving = Serving(folder, config)
    serving.port = free_port("0.0.0.0")
    return serving


def test_a_refusal_does_not_tell_which_keys_there_are(three: Serving) -> None:
    """Unknown, revoked, expired: the same 401. A right that a key has not: 403."""
    root = Administrator(three)
    revoked, id = root.create()
    root.revoke(id)
    expires = datetime.now(UTC) + timedelta(seconds=1.5)
    expired, _ = root.create(expires=expires.isoformat())
    limited, _ = root.create(models=["other"])
    assert chat(three.port, expired).status == 200
    until(lambda: chat(three.port, expired, address=new_address()).status == 401, 3.0, "its end")
    assert datetime.now(UTC) >= expires
    refused = [chat(three.port, key, address=new_address()) for key in ("sk-llmr-unknown", revoked, expired, "x y")]
    assert {reply.status for reply in refused} == {401}
    assert {reply.headers["www-authenticate"] for reply in refused} == {"Bearer"}
    assert len({re.sub(rb'"request_id":"[^"]*"', b"", reply.body) for reply in refused}) == 1

    assert chat(three.port, limited, "other").status == 200
    for model in ("m", "nobody"):
        assert chat(three.port, limited, model).status == 403
    messages = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    assert request(three.port, "POST", "/v1/messages", messages, headers={"x-api-key": limited}).status == 403
    generate = {"prompt": "a", "options": {"model": "m"}}
    assert request(three.port, "POST", "/api/generate", generate, key=limited).status == 403
    listed = request(three.port, "GET", "/v1/models", key=limited).json()["data"]
    assert [model["id"] for model in listed] == ["other"]
    assert request(three.port, "GET", "/v1/models/m", key=limited).status == 404
    assert request(three.port, "GET", "/v1/models/other", key=limited).status == 200


def test_a_revoked_key_is_refused_within_a_second(three: Serving) -> None:
    """By every worker, under load, also over connections that were let in before; and so is a change of its models."""
    root = Administrator(three)
    key, id = root.create()
    narrowed, narrowed_id = root.create()

    def call(connection: http.client.HTTPConnection, number: int) -> Reply:
        return chat(three.port, narrowed if number % 2 else key, connection=connection)

    with Callers(three.port, call, threads=6) as callers:
        until(lambda: callers.count(200) > 60, what="load")
        told_at = time.monotonic()
        root.revoke(id)
        root.ask("PATCH", f"/admin/keys/{narrowed_id}", {"models": ["other"]})
        until(lambda: callers.count(401, 429) > 6 and callers.count(403) > 30, what="refusals")
    assert set(statuses([reply for _, reply in callers.seen])) <= {200, 401, 403, 429}
    late = [began_at - told_at for began_at, reply in callers.seen if reply.status == 200]
    assert max(late) < REVOKED_WITHIN_S


# -- limits ---------------------------------------------------------------------------------------------------


def test_a_limit_of_requests_is_never_exceeded(serving: Serving) -> None:
    """Neither a key's nor a model's: under a crowd as many are let in as it says, less what workers keep at most."""
    key = Administrator(serving).limited(requests_per_minute=20)
    workers = sum(name.startswith("worker") for name in serving.children())
    for replies in (
        crowd(60, lambda _: chat(serving.port, key)),
        crowd(60, lambda _: chat(serving.port, Administrator(serving).limited(), "twenty")),
    ):
        seen = statuses(replies)
        assert set(seen) == {200, 429}
        assert 20 - (workers - 1) <= seen[200] <= 20
        for reply in replies:
            assert reply.headers["x-ratelimit-limit-requests"] == "20"
            assert 0 <= int(reply.headers["x-ratelimit-remaining-requests"]) < 20
            assert re.fullmatch(r"\d+s", reply.headers["x-ratelimit-reset-requests"])
            if reply.status == 429:
                assert 1 <= reply.retry_after_s <= 76
                assert "requests_per_minute" in reply.message
                assert "try again in" in reply.message
    total = serving.scrape().total
    assert total("llm_router_rate_limit_hits_total", scope="key", limit="requests_per_minute") >= 40
    assert total("llm_router_rate_limit_hits_total", scope="model", limit="requests_per_minute") >= 40


def test_a_limit_for_everybody_together(backends: Backends, three: Serving) -> None:
    """Set and taken away by a reload; another key has no more of it."""
    root = Administrator(three)
    first, second = root.limited(), root.limited()
    assert chat(three.port, first).status == 200
    until(lambda: settled(root.requests), what="every row of the tests before this one")
    used = len(rows(three.folder, "backend != ''"))
    config = three.folder / "llm-router.yaml"
    before = config.read_text()
    config.write_text(f"{before}\nlimits: {{requests_per_day: {used + 30}}}\n")
    try:
        root.ask("POST", "/admin/reload")
        replies = until(lambda: limited_one(three, first), what="the limit")
        replies += crowd(80, lambda number: chat(three.port, (first, second)[number % 2]))
    finally:
        config.write_text(before)
        root.ask("POST", "/admin/reload")
    assert set(statuses(replies)) == {200, 429}
    assert statuses(replies)[200] <= 30, "what was used before there was a limit counts"
    assert "all callers together" in next(reply.message for reply in replies if reply.status == 429)
    until(lambda: chat(three.port, first).status == 200, what="no limit")


def limited_one(serving: Serving, key: str) -> list[Reply]:
    """A reply that knows of a limit of requests, or nothing."""
    reply = chat(serving.port, key)
    return [reply] if "x-ratelimit-limit-requests" in reply.headers else []


def test_an_answer_without_usage_counts_by_its_text(backends: Backends, one: Serving) -> None:
    """Else a backend that says nothing would be without limits."""
    key = Administrator(one).limited(tokens_per_minute=600)
    backends.held.always(json_reply({"choices": [{"message": {"content": "x" * 400}}]}))
    try:
        replies = crowd(12, lambda _: chat(one.port, key, "held", max_tokens=100), at_once=2)
    finally:
        backends.held.always()
    assert statuses(replies)[200] <= 5


def test_tokens_are_reserved_and_settled_with_the_real_usage(serving: Serving) -> None:
    """What a request may use keeps others out until it is known what it did use."""
    key = Administrator(serving).limited(tokens_per_minute=16_000)
    for _ in range(5):  # 5 x 4010 would be too much
        reply = chat(serving.port, key, max_tokens=4000)
        assert reply.status == 200
        assert reply.headers["x-ratelimit-limit-tokens"] == "16000"
        assert "x-ratelimit-limit-requests" not in reply.headers
    most = 16_000 - 5 * (INPUT + OUTPUT)
    workers = sum(name.startswith("worker") for name in serving.children())

    def remaining() -> int:
        return int(chat(serving.port, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"])

    until(lambda: remaining() > most - 1000 * workers, what="what was not used")
    refused = chat(serving.port, key, max_tokens=16_000)
    assert refused.status == 429
    assert "tokens_per_minute" in refused.message

    exact = Administrator(serving).limited(tokens_per_minute=600)
    replies = crowd(120, lambda _: chat(serving.port, exact, max_tokens=50), at_once=3)
    assert set(statuses(replies)) == {200, 429}
    # At the end a request is refused for what it may use, not for what it would have used.
    assert 600 // (INPUT + OUTPUT) // 2 <= statuses(replies)[200] <= 600 // (INPUT + OUTPUT)


def test_requests_in_flight_are_bounded_and_places_come_back(backends: Backends, serving: Serving) -> None:
    """After an answer, after a client left, and after its worker was killed; Retry-After is true."""
    key = Administrator(serving).limited(concurrency=3)

    def hold() -> http.client.HTTPConnection:
        """A request that was let in and waits. A place may lie idle with another worker for a moment."""
        body = json.dumps({"model": "held", "messages": [{"role": "user", "content": "one two three"}]})
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        before = len(backends.held.requests)
        deadline = time.monotonic() + 2.0
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=20)
            connection.request("POST", CHAT, body, headers)
            until(functools.partial(held_or_answered, backends, before, connection))
            if len(backends.held.requests) > before:
                return connection
            connection.close()
            assert time.monotonic() < deadline, "no place became free"

    with backends.hold() as gate:
        before = len(backends.held.requests)
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            waiting = [threads.submit(chat, serving.port, key, "held") for _ in range(12)]
            until(lambda: sum(future.done() for future in waiting) == 9, what="the refusal of all but three")
            backends.held.wait(functools.partial(has_had, before + 3))
            assert len(backends.held.requests) == before + 3
            refused = next(future.result() for future in waiting if future.done())
            assert refused.status == 429
            assert refused.retry_after_s == 1
            assert "concurrency" in refused.message
            gate.open()
            assert statuses([future.result() for future in waiting]) == {200: 3, 429: 9}
    with backends.hold(), contextlib.ExitStack() as held:
        until(lambda: chat(serving.port, key).status == 200, 1.0, "a place after an answer")
        for _ in range(2):
            with contextlib.ExitStack() as leaving:
                for _ in range(3):
                    leaving.callback(hold().close)
                assert chat(serving.port, key).status == 429
            until(lambda: statuses(crowd(3, lambda _: chat(serving.port, key))) == {200: 3}, 2.0, "abandoned places")
        for _ in range(3):
            held.callback(hold().close)
        pids = [pid for name, pid in serving.children().items() if name.startswith("worker")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: chat(serving.port, key).status == 200, 8.0, "places of killed workers")
        until(lambda: len(serving.children()) == len(pids) + 1, what="their successors")


def test_what_is_in_flight_is_known_to_a_control_that_is_new(backends: Backends, tmp_path: Path) -> None:
    """Also while it starts, no more are let in."""
    with Serving(tmp_path, backends.config(), "--workers", "2") as serving, backends.hold() as gate:
        key = Administrator(serving).limited(concurrency=3)
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            held = []
            for _ in range(3):
                before = len(backends.held.requests)
                held.append(threads.submit(chat, serving.port, key, "held"))
                backends.held.wait(functools.partial(has_had, before + 1))
            kill(serving, "control")
            with Callers(serving.port, lambda connection, _: chat(serving.port, key, connection=connection)) as callers:
                until(lambda: serving.status("/health", monitoring=True) == 200, what="control")
                refused = callers.count(429)
                until(lambda: callers.count(429) > refused + 50, what="refusals by the new one")
            assert set(statuses([reply for _, reply in callers.seen])) <= {429, 503}
            gate.open()
            assert statuses([future.result() for future in held]) == {200: 3}
        until(lambda: statuses(crowd(3, lambda _: chat(serving.port, key), at_once=1)) == {200: 3}, what="their places")


def held_or_answered(backends: Backends, before: int, connection: http.client.HTTPConnection) -> bool:
    """Whether a request reached the backend, or an answer its client."""
    return len(backends.held.requests) > before or bool(select.select([connection.sock], [], [], 0)[0])


def test_days_and_budgets_outlive_control_and_the_program(backends: Backends, tmp_path: Path) -> None:
    """What was used is known again after kill -9 and after a restart, also what was used just before."""
    budget_usd = 20 * COST_USD
    with Serving(tmp_path, backends.config(), "--workers", "2") as serving:
        root = Administrator(serving)
        daily = root.limited(requests_per_day=20)
        minute = root.limited(requests_per_minute=20)
        spender, spender_id = root.create(name="spender", limits={"usd_per_month": budget_usd, "warn_ratio": 0.5})
        for key in (daily, minute, spender):
            # One after the other: what is under way holds more of a budget than it will cost.
            assert statuses(many(serving, key, 12, at_once=1)) == {200: 12}
        kill(serving, "control")
        after = {
            name: many(serving, key, 30) for name, key in (("daily", daily), ("minute", minute), ("spender", spender))
        }
        assert statuses(after["daily"])[200] <= 8
        assert statuses(after["minute"])[200] <= 8
        assert statuses(after["spender"])[200] <= 8
        until(lambda: root.requests(f"by=&key={spender_id}") == 42, STORED_WITHIN_S, "its rows")
        spent_usd = root.used(f"by=key&key={spender_id}")["totals"][0]["cost_usd"]
        assert spent_usd <= budget_usd + 1e-9
        refused = after["spender"][-1]
        assert refused.status == 429
        assert "usd_per_month" in refused.message
        assert refused.retry_after_s >= 1
        left = until(
            lambda: [
                value
                for name, labels, value in serving.scrape().samples
                if name == "llm_router_budget_remaining_usd" and labels["key"] == "spender"
            ],
            what="what is left",
        )
        assert 0 <= left[0] <= budget_usd - spent_usd + 1e-9
        let_in = {name: 12 + statuses(replies)[200] for name, replies in after.items()}
        until(lambda: "has spent" in serving.log, 2.0, "the warning")
        log = serving.log
    warnings = [line for line in log.splitlines() if "has spent" in line]
    assert 1 <= len(warnings) <= 2, "once for each start of control"
    assert "'spender'" in warnings[0]
    with Serving(tmp_path, backends.config(), "--workers", "2") as serving:
        for name, key in (("daily", daily), ("spender", spender)):
            seen = statuses(many(serving, key, 30))
            assert seen[429] >= 10 + let_in[name], (name, seen)


def many(serving: Serving, key: str, count: int, at_once: int = 12) -> list[Reply]:
    """So many chats at once, which wait for a control that is being started."""

    def calmly(_: int) -> Reply:
        while (reply := chat(serving.port, key, max_tokens=6)).status == 503:
            time.sleep(0.05)
        return reply

    return crowd(count, calmly, at_once)


# -- usage ----------------------------------------------------------------------------------------------------


def test_one_row_for_each_inference_however_it_ends(backends: Backends, one: Serving) -> None:
    """Where its tokens come from, what it cost, and what is shown of it."""
    key, id = Administrator(one).create(name="rows")
    plain = chat(one.port, key)
    asked = chat(one.port, key, stream=True, stream_options={"include_usage": True})
    hidden = chat(one.port, key, stream=True)
    assert plain.status == asked.status == hidden.status == 200
    assert b'"usage"' in asked.body
    assert b'"usage"' not in hidden.body
    assert b'"include_usage": true' in backends.plain.requests[-1].body.replace(b":true", b": true")
    unpriced = chat(one.port, key, "other")
    backends.held.script(json_reply({"choices": []}))
    silent = chat(one.port, key, "held")
    backends.held.script(stream_head(), framed(EVENT), framed(EVENT), framed(b"data: [DONE]\n\n") + framed(b""))
    silent_stream = chat(one.port, key, "held", stream=True)
    backends.held.script(stream_head(), framed(EVENT), framed(EVENT), Close())
    cut = chat(one.port, key, "held", stream=True)
    assert b"[DONE]" not in cut.body
    assert unpriced.status == silent.status == silent_stream.status == 200
    gate = Gate()
    backends.held.script(stream_head(), framed(EVENT), Hold(gate))
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    body = json.dumps({"model": "held", "stream": True, "messages": [{"role": "user", "content": "one two three"}]})
    connection.request("POST", CHAT, body, {"authorization": f"Bearer {key}", "content-type": "application/json"})
    connection.getresponse().read(10)
    connection.close()
    backends.held.script(json_reply({"error": {"message": "no"}}, 400))
    assert chat(one.port, key, "held").status == 400
    assert chat(one.port, key, "nobody").status == 404
    until(lambda: Administrator(one).requests(f"by=&key={id}") == 10, STORED_WITHIN_S, "ten rows")
    gate.open()
    found = {row["request_id"]: row for row in rows(one.folder, "key_id = ?", id)}

    def of(reply: Reply) -> tuple[Any, ...]:
        row = found.pop(reply.headers["x-request-id"])
        columns = ("usage_source", "input_tokens", "output_tokens", "cost_status", "outcome", "status")
        return tuple(row[name] for name in columns)

    for reply in (plain, asked, hidden):
        assert of(reply) == ("provider", INPUT, OUTPUT, "exact", "success", 200)
    assert of(unpriced) == ("provider", INPUT, OUTPUT, "", "success", 200)
    assert of(silent)[0::3] == ("estimated", "estimated")
    assert of(silent_stream)[0::3] == ("estimated", "estimated")
    source, _, output_tokens, cost_status, outcome, _ = of(cut)
    assert (source, output_tokens, cost_status, outcome) == ("partial", 2, "estimated", "error")
    ended = sorted((row["outcome"], row["usage_source"], row["status"]) for row in found.values())
    assert ended == [("cancelled", "partial", 499), ("error", "none", 400), ("error", "none", 404)]
    row = rows(one.folder, "request_id = ?", plain.headers["x-request-id"])[0]
    assert (row["model"], row["backend"], row["key"]) == ("m", "b", "rows")
    assert abs(row["cost_usd"] - COST_USD) < 1e-12
    assert 0 < row["duration_s"] < 5
    assert abs(row["time_us"] / 1e6 - time.time()) < 30


def test_usage_is_summed_by_key_model_and_day(one: Serving) -> None:
    root = Administrator(one)
    ids = []
    for count in (3, 5):
        key, id = root.create()
        ids.append(id)
        assert statuses(many(one, key, count)) == {200: count}
        chat(one.port, key, "other")
    until(lambda: root.requests(f"by=&key={ids[0]}") + root.requests(f"by=&key={ids[1]}") == 10, what="all rows")
    totals = [total for total in root.used("by=key,model,day")["totals"] if total["key_id"] in ids]
    today = datetime.now(UTC).date().isoformat()
    found = {(ids.index(total["key_id"]), total["model"]): total for total in totals}
    assert {total["day"] for total in totals} == {today}
    assert {group: total["requests"] for group, total in found.items()} == {
        (0, "m"): 3,
        (0, "other"): 1,
        (1, "m"): 5,
        (1, "other"): 1,
    }
    of_m = found[1, "m"]
    assert (of_m["input_tokens"], of_m["output_tokens"], of_m["cost_status"]) == (5 * INPUT, 5 * OUTPUT, "exact")
    assert abs(of_m["cost_usd"] - 5 * COST_USD) < 1e-9
    assert root.requests(f"by=&key={ids[1]}&model=m") == 5
    assert root.requests(f"by=&key={ids[1]}&until={today}") == 6
    tomorrow = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
    assert root.requests(f"by=&key={ids[1]}&since={tomorrow}&until=2999-01-01") == 0
    assert "nonsense" in root.ask("GET", "/admin/usage?by=nonsense", status=400)["error"]["message"]


def test_no_row_is_lost_or_doubled_when_control_is_killed_or_the_program_ends(
    backends: Backends, tmp_path: Path
) -> None:
    """As many rows as clients had answers; a worker that is killed takes with it at most what it had not sent."""
    with Serving(tmp_path, backends.config(), "--workers", "3") as serving:
        root = Administrator(serving)
        key, id = root.create()

        def call(connection: http.client.HTTPConnection, number: int) -> Reply:
            return chat(serving.port, key, connection=connection, stream=number % 3 == 0)

        with Callers(serving.port, call) as callers:
            for _ in range(2):
                more(callers, 200)
                kill(serving, "control")
                until(lambda: serving.status("/health", monitoring=True) == 200, what="control")
        exact = callers.count(200)
        assert exact == len(callers.seen), statuses([reply for _, reply in callers.seen])
        until(lambda: root.requests(f"by=&key={id}") >= exact, STORED_WITHIN_S, "every row")
        assert root.requests(f"by=&key={id}") == exact

        with Callers(serving.port, call) as callers:
            more(callers, 200)
            began_at = time.monotonic()
            kill(serving, "worker-0")
            more(callers, 200)
        complete = callers.count(200)
        # A worker sends ten times a second; on a busy machine a turn may be late.
        unsent = sum(began_at - 0.3 < at <= began_at for at, _ in callers.seen)
        until(lambda: root.requests(f"by=&key={id}") >= exact + complete - unsent, STORED_WITHIN_S, "the rows")

        with Callers(serving.port, call) as callers:
            more(callers, 200)
        stored = until(lambda: settled(lambda: root.requests(f"by=&key={id}")), what="rest")
        assert exact + complete + callers.count(200) - unsent <= stored <= exact + len(callers.seen) + complete + 4

        replies = crowd(40, lambda _: chat(serving.port, key))
        assert statuses(replies) == {200: 40}
    assert len(rows(tmp_path, "key_id = ?", id)) == stored + 40, "rows of the last moment before an orderly end"


def more(callers: Callers, count: int) -> None:
    """Return after so many more answers."""
    wanted = callers.count(200) + count
    until(lambda: callers.count(200) >= wanted, what="load")


def settled(count: Any) -> int:
    """A number that no longer changes."""
    before = count()
    time.sleep(0.6)
    return before if count() == before else 0


# -- PostgreSQL and Redis, two routers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def pair(
    backends: Backends, postgres: Postgres, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Serving, Serving]]:
    """Two routers that start at once on one empty PostgreSQL and share a Redis."""
    url = postgres.database()
    config = backends.config(f'accounts: {{database: "{url}", redis: "{redis.url}"}}')
    folders = [tmp_path_factory.mktemp(name) for name in ("left", "right")]
    with (
        Serving(folders[0], config, "--workers", "2", ready=False) as left,
        Serving(folders[1], config, ready=False) as right,
    ):
        left.wait_ready()
        right.wait_ready()
        yield left, right


def test_two_routers_share_keys_and_usage(pair: tuple[Serving, Serving]) -> None:
    """Both made the tables, at the same moment; what one revokes the other refuses within a second."""
    left, right = pair
    assert "Traceback" not in left.log + right.log
    key, id = Administrator(left).create()
    until(lambda: chat(right.port, address=new_address()).status == 401, 2.0, "the key at the other router")
    replies = crowd(20, lambda number: chat(pair[number % 2].port, key))
    assert statuses(replies) == {200: 20}
    until(lambda: Administrator(right).requests(f"by=&key={id}") == 20, STORED_WITHIN_S, "the rows of both")
    assert Administrator(left).used(f"by=key&key={id}")["totals"][0]["input_tokens"] == 20 * INPUT

    def call(connection: http.client.HTTPConnection, _: int) -> Reply:
        return chat(right.port, key, connection=connection)

    with Callers(right.port, call, threads=2) as callers:
        until(lambda: callers.count(200) > 20, what="load")
        told_at = time.monotonic()
        Administrator(left).revoke(id)
        until(lambda: callers.count(401) > 2, what="refusals")
    late = max(began_at - told_at for began_at, reply in callers.seen if reply.status == 200)
    assert late < REVOKED_WITHIN_S


def test_two_routers_never_exceed_a_limit_together(
    backends: Backends, pair: tuple[Serving, Serving], redis: RedisServer
) -> None:
    """While Redis is there; when it is killed each goes on alone, and says so."""
    left, right = pair
    root = Administrator(left)
    minute, level, budget = (
        root.limited(requests_per_minute=30),
        root.limited(concurrency=4),
        root.limited(usd_per_day=20 * COST_USD),
    )
    until(lambda: "x-ratelimit-limit-requests" in chat(right.port, minute).headers, 3.0, "the key at the other router")
    seen = statuses(crowd(90, lambda number: chat(pair[number % 2].port, minute)))
    assert 24 <= seen[200] + 1 <= 30
    seen = statuses(crowd(60, lambda number: chat(pair[number % 2].port, budget, max_tokens=6)))
    assert 0 < seen[200] <= 20
    with backends.hold() as gate, concurrent.futures.ThreadPoolExecutor(16) as threads:
        before = len(backends.held.requests)
        waiting = []
        for number in range(4):  # one after the other, by turns
            waiting.append(threads.submit(chat, pair[number % 2].port, level, "held"))
            backends.held.wait(functools.partial(has_had, before + number + 1))
        assert statuses(crowd(12, lambda number: chat(pair[number % 2].port, level))) == {429: 12}
        gate.open()
        assert statuses([future.result() for future in waiting]) == {200: 4}

    redis.kill()
    alone = root.limited(requests_per_minute=30)
    until(lambda: chat(left.port, alone).status == 200, 3.0, "service without Redis")
    assert statuses(crowd(40, lambda _: chat(left.port, alone)))[200] <= 29
    assert statuses(crowd(20, lambda _: chat(left.port, minute))) == {429: 20}
    told = [line for line in left.log.splitlines() if "Redis" in line]
    assert len(told) == 1, told
    assert left.scrape().total("llm_router_errors_total", type="accounts_unavailable") >= 1
    redis.start()
    until(lambda: "Redis is back" in left.log, what="its return")


def has_had(count: int, backend: ScriptedBackend) -> bool:
    return len(backend.requests) >= count


def test_rows_wait_while_postgresql_is_away(postgres: Postgres, pair: tuple[Serving, Serving]) -> None:
    """Inference goes on, nothing is lost or doubled, control stays small."""
    left, _ = pair
    root = Administrator(left)
    key, id = root.create()

    def call(connection: http.client.HTTPConnection, _: int) -> Reply:
        return chat(left.port, key, connection=connection)

    with Callers(left.port, call) as callers:
        more(callers, 100)
        postgres.stop()
        more(callers, 200)
        away = request(left.metrics_port, "GET", "/admin/usage")
        assert away.status == 503
        assert "s3cret" not in away.body.decode() + left.log
        assert request(left.metrics_port, "POST", "/admin/keys", {"name": "never"}).status == 503
        kill(left, "control")
        more(callers, 200)
        until(lambda: left.status("/health/live", monitoring=True) == 200, what="control")
        more(callers, 100)
        assert chat(left.port, address=new_address()).status == 401, "which keys there are is not forgotten"
        postgres.start()
        more(callers, 100)
    assert callers.count(200) == len(callers.seen)
    until(lambda: stored(left, id) >= callers.count(200), 12.0, "every row")
    assert root.requests(f"by=&key={id}") == callers.count(200)
    assert rss_bytes(left.children()["control"]) <= 120e6


def stored(serving: Serving, id: str) -> int:
    """Rows of a key; 0 while the database is away."""
    reply = request(serving.metrics_port, "GET", f"/admin/usage?by=&key={id}")
    return int(reply.json()["total"]["requests"]) if reply.status == 200 else 0


# -- the end of the minute --------------------------------------------------------------------------------------------


@pytest.mark.timeout(100)  # run alone, it waits for a minute
def test_retry_after_is_true(spent: Spent) -> None:
    """Whoever comes back after it is let in."""
    assert spent.refused.status == 429
    again_at = spent.refused_at + spent.refused.retry_after_s
    assert 50 < again_at - spent.refused_at <= 76
    # A test that runs alone has nothing else to do in that minute.
    while (left_s := again_at - time.monotonic()) > 0:
        time.sleep(left_s)
    back = chat(spent.serving.port, spent.key)
    assert back.status == 200, back
