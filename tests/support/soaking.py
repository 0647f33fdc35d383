"""Clients of every kind, and kills at random, for a running router: what `make soak` and its short form are made of.

Every client has at most one request in hand, gives it an id of its own, and notes how it ended, so that afterwards the
router's counts and its usage rows can be held against what was seen. Meanwhile keys are made and revoked, the
configuration is read again, and processes are killed. Choices come from random generators with seeds; what the machine
makes of their order does not. Not for: measuring speed (benchmarks).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

from llm_router.routing.table import STRATEGIES
from llm_router.testing import Pause, Reset, ScriptedBackend, Step, framed, json_reply, reply, stream_head
from support.callers import new_address, request
from support.serving import Scrape, Serving, is_alive

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
REQUEST_TIMEOUT_S = 20.0

PRICE = 1000.0
"""US dollars for a million tokens, in and out: so that a budget is used up within a short run."""

REQUESTS_PER_MINUTE = 40
USD_PER_DAY = 0.4
LIMITS: Mapping[str, Mapping[str, float]] = {
    "steady": {},
    "limited": {"requests_per_minute": REQUESTS_PER_MINUTE},
    "budget": {"usd_per_day": USD_PER_DAY},
    "roomy": {"requests_per_minute": 10**6, "tokens_per_minute": 10**8, "tokens_per_day": 10**9, "concurrency": 1000},
}
"""The keys that last, and what each may use."""

CONFIG = """
server: {workers: 2, drain: 5s}
backends:
  - {name: left, url: "%(left)s", timeouts: {connect: 1s, first_byte: 5s, gap: 5s}}
  - {name: right, url: "%(right)s", timeouts: {connect: 1s, first_byte: 5s, gap: 5s}}
  - {name: slow, url: "%(slow)s"}
  - {name: failing, url: "%(failing)s"}
  - {name: garbage, url: "%(garbage)s"}
  - {name: cutting, url: "%(cutting)s"}
models:
  - name: m
    price: {input: 1000, output: 1000}
    deployments: [{backend: left, model: scripted}, {backend: right, model: scripted}]
  - name: slow
    deployments: [{backend: slow, model: scripted}]
  - name: failing
    deployments: [{backend: failing, model: scripted}]
  - name: garbage
    deployments: [{backend: garbage, model: scripted}]
  - name: cutting
    deployments: [{backend: cutting, model: scripted}]
  - name: falling
    deployments: [{backend: failing, model: scripted}]
    fallbacks: [m]
routing: {retry: {backoff: %(backoff)s}, breaker: {cooldown: 500ms, cooldown_max: 1s}}
"""


class Backends:
    """One scripted backend of each name; `left` and `right` can be killed and brought back where they were."""

    def __init__(self) -> None:
        names = ("left", "right", "slow", "failing", "garbage", "cutting")
        self._running = {name: ScriptedBackend() for name in names}
        events: list[Step] = [step for _ in range(20) for step in (framed(EVENT), Pause(0.02))]
        self._running["slow"].always(stream_head(), *events, framed(b"data: [DONE]\n\n") + framed(b""))
        self._running["failing"].always(json_reply({"error": {"message": "no"}}, 500))
        self._running["garbage"].always(reply(b"<html>oops</html>", 200, "text/html"))
        self._running["cutting"].always(stream_head(), framed(EVENT), Pause(0.01), framed(EVENT), Reset())

    def __enter__(self) -> Self:
        for backend in self._running.values():
            backend.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._running.values():
            backend.stop()

    def config(self, backoff: str = "5ms") -> str:
        """The router's configuration; another one with another pause between tries."""
        return CONFIG % {**{name: backend.base_url for name, backend in self._running.items()}, "backoff": backoff}

    def kill(self, name: str) -> None:
        """Its connections break at once, and nothing listens there."""
        self._running[name].stop()

    def bring_back(self, name: str) -> None:
        """On the same port."""
        self._running[name] = ScriptedBackend(port=self._running[name].port).__enter__()


class Kind(NamedTuple):
    """What a client may do.

    Args:
        body: None for a GET.
        statuses: every answer that may come while things are being killed.
        leaves: the client goes away: after the first event of a stream, or as soon as it has asked.
        key: which of `Keys` is shown: the name of one that lasts, `any` of the valid ones, `revoked`, or none at all.
        has_strategy: now and then it asks for a strategy of its own.
    """

    path: str
    body: bytes | None
    statuses: frozenset[int]
    leaves: Literal["", "after an event", "at once"] = ""
    key: str = "any"
    has_strategy: bool = False


def _chat(model: str, **more: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "a b"}], **more}).encode()


def _message(**more: Any) -> bytes:
    return json.dumps(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "a b"}], **more}
    ).encode()


CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
_SERVED = frozenset({200, 502, 503})  # both of the backends may be thought to be down for a moment
_LIMITED = _SERVED | {429}
_REFUSED = frozenset({401, 429})  # 429 for an address that failed too often
_USAGE = {"stream_options": {"include_usage": True}}
KINDS: Mapping[str, tuple[int, Kind]] = {
    "plain": (10, Kind(CHAT, _chat("m"), _SERVED, has_strategy=True)),
    "stream": (5, Kind(CHAT, _chat("m", stream=True), _SERVED)),
    "stream with usage": (3, Kind(CHAT, _chat("m", stream=True, **_USAGE), _SERVED, has_strategy=True)),
    "cached": (3, Kind(CHAT, _chat("m", temperature=0), _SERVED)),
    "other cached": (2, Kind(CHAT, _chat("m", temperature=0, seed=1), _SERVED)),
    "cached stream": (2, Kind(CHAT, _chat("m", temperature=0, stream=True), _SERVED)),
    "message": (3, Kind(MESSAGES, _message(), _SERVED)),
    "message stream": (2, Kind(MESSAGES, _message(stream=True), _SERVED)),
    "generate": (1, Kind("/api/generate", b'{"prompt":"a b","options":{"maxTokens":3}}', _SERVED)),
    "completion": (1, Kind("/v1/completions", b'{"model":"m","prompt":"a b"}', _SERVED)),
    "embedding": (1, Kind("/v1/embeddings", b'{"model":"m","input":"a b"}', _SERVED)),
    "limited": (5, Kind(CHAT, _chat("m"), _LIMITED, key="limited")),
    "budget": (5, Kind(CHAT, _chat("m", max_tokens=6), _LIMITED, key="budget")),
    "roomy": (3, Kind(CHAT, _chat("m"), _SERVED, key="roomy")),
    # One in five is left by its client,
    "leave": (8, Kind(CHAT, _chat("slow", stream=True), _SERVED, leaves="after an event")),
    "hang up": (6, Kind(CHAT, _chat("slow", stream=True), _SERVED, leaves="at once")),
    "leave a message": (2, Kind(MESSAGES, _message(stream=True), _SERVED, leaves="after an event")),
    # and one in five meets a backend that fails.
    "falling": (4, Kind(CHAT, _chat("falling"), _SERVED)),
    "failing": (4, Kind(CHAT, _chat("failing"), frozenset({500, 502, 503}))),
    "garbage": (4, Kind(CHAT, _chat("garbage"), _SERVED)),
    "cutting": (4, Kind(CHAT, _chat("cutting", stream=True), _SERVED)),
    "unknown": (1, Kind(CHAT, _chat("nobody"), frozenset({404, 503}))),
    "not json": (1, Kind(CHAT, b"{", frozenset({400, 503}))),
    "no key": (1, Kind(CHAT, _chat("m"), _REFUSED | {503}, key="")),
    "revoked": (2, Kind(CHAT, _chat("m"), _REFUSED | {503}, key="revoked")),
    "nowhere": (1, Kind("/nowhere", None, frozenset({404}))),
    "models": (1, Kind("/v1/models", None, frozenset({200, 503}))),
    "health": (1, Kind("/health", None, frozenset({200, 503}), key="")),
}
"""Weight and meaning of each kind of request."""


class Key:
    """A key and what the tests did with it. Instants are monotonic; 0 for what was not done."""

    def __init__(self, name: str, id: str, text: str) -> None:
        self.name = name
        self.id = id
        self.text = text
        self.revoking_at = 0.0
        self.refused_at = 0.0  # no worker took it any more


class Keys:
    """The keys there are: those of `LIMITS` last, others come and go."""

    def __init__(self, lasting: Mapping[str, Key]) -> None:
        self.lasting = lasting
        self.passing: list[Key] = []
        self.revoked: list[Key] = []

    def choose(self, wanted: str, rng: random.Random) -> Key | None:
        """A key to show for a `Kind.key`; None for none."""
        if wanted == "any":
            return rng.choice([self.lasting["steady"], *self.passing])
        if wanted == "revoked":
            return rng.choice(self.revoked[-3:]) if self.revoked else None
        return self.lasting[wanted] if wanted else None

    @classmethod
    def make(cls, serving: Serving) -> Keys:
        """Make those that last."""
        made = {name: _create(serving, name, limits) for name, limits in LIMITS.items()}
        return cls({name: key for name, key in made.items() if key is not None})


class Noted(NamedTuple):
    """One request as its client saw it. Instants are monotonic.

    Args:
        key: name of the key that was shown.
        end: whether the reply came whole, or the connection broke, or the client left.
        status: of the reply; 0 if its head did not come.
        is_inference: the router took it for one.
        outcome: success or error, as far as the client can tell.
        usage: input and output tokens, where the reply says so.
    """

    kind: str
    key: str
    began_at: float
    ended_at: float
    end: Literal["whole", "broken", "left"]
    status: int = 0
    is_inference: bool = False
    outcome: str = ""
    usage: tuple[int, int] | None = None
    is_cached: bool = False


class Seen:
    """How requests ended, for all clients.

    Attributes:
        requests: by their ids.
        ended: (path, status) of whole replies. A stream that ended with an error event has the status 200.
        wrong: what must not happen at all, in words.
        revoked_s: how long each revoked key was still taken, and whether control was killed meanwhile.
    """

    def __init__(self) -> None:
        self.requests: dict[str, Noted] = {}
        self.ended: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.revoked_s: list[tuple[float, bool]] = []

    def count(self, **wanted: object) -> int:
        """How many requests have these fields."""
        return sum(
            all(getattr(noted, name) == value for name, value in wanted.items()) for noted in self.requests.values()
        )


class _Broken(Exception):
    """The connection ended before the reply did."""


class _Reply(NamedTuple):
    """`is_whole` is False when the client left."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_whole: bool = True


class Client:
    """One client after the other's work: kinds, and kept or fresh connections, by chance."""

    def __init__(self, port: int, name: str, rng: random.Random, seen: Seen, keys: Keys) -> None:
        self._port = port
        self._name = name
        self._rng = rng
        self._seen = seen
        self._keys = keys
        self._made = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Ask until it is over; the last request is seen to its end."""
        names = list(KINDS)
        weights = [weight for weight, _ in KINDS.values()]
        try:
            while not is_over():
                (name,) = self._rng.choices(names, weights)
                await self.ask(name, fresh=self._rng.random() < 0.25)
                await asyncio.sleep(self._rng.random() * 0.02)
        finally:
            await self._close()

    async def ask(self, name: str, *, fresh: bool) -> None:
        """One request of that kind, noted."""
        kind = KINDS[name][1]
        if fresh:
            await self._close()
        self._made += 1
        id = f"{self._name}-{self._made}"
        key = self._keys.choose(kind.key, self._rng)
        began_at = time.monotonic()

        def note(end: Literal["whole", "broken", "left"], **more: Any) -> Noted:
            noted = Noted(name, key.name if key else "", began_at, time.monotonic(), end, **more)
            self._seen.requests[id] = noted
            return noted

        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                found = await self._exchange(kind, id, key, keep=not fresh)
        except TimeoutError:
            self._seen.wrong.append(f"{name}: no reply within {REQUEST_TIMEOUT_S:g} s")
            note("broken")
            await self._close()
            return
        except (_Broken, OSError, asyncio.IncompleteReadError):
            note("broken")
            await self._close()
            return
        status = found.status
        if not found.is_whole:
            note("left", status=status)
            await self._close()
            return
        is_cut = "text/event-stream" in found.headers.get("content-type", "") and not _has_ended(found.body)
        noted = note(
            "whole",
            status=status,
            is_inference="x-llm-router-overhead-ms" in found.headers,
            outcome="success" if status == 200 and not is_cut else "error",
            usage=None if status != 200 or is_cut else _usage_of(found.body),
            is_cached=found.headers.get("x-llm-router-cached") == "true",
        )
        self._seen.ended[kind.path, status] += 1
        if is_cut and b'"error"' not in found.body:
            self._seen.wrong.append(f"{name}: a stream ended without its end mark and an error: {found.body[-200:]!r}")
        if found.headers.get("x-request-id") != id:
            self._seen.wrong.append(f"{name}: {id} was answered as {found.headers.get('x-request-id')!r}")
        self._judge(kind, key, noted, found.body)

    def _judge(self, kind: Kind, key: Key | None, noted: Noted, body: bytes) -> None:
        """Whether such a request may have ended so, by what happened to its key meanwhile."""
        allowed = kind.statuses
        if key is not None and kind.key != "revoked" and key.revoking_at and noted.ended_at >= key.revoking_at:
            allowed |= _REFUSED
        if kind.key == "revoked" and key is None:
            allowed |= _REFUSED
        if key is not None and key.refused_at and noted.began_at >= key.refused_at:
            allowed = _REFUSED | {503}
        if noted.status not in allowed:
            self._seen.wrong.append(f"{noted}: {body[:300]!r}")

    async def _exchange(self, kind: Kind, id: str, key: Key | None, *, keep: bool) -> _Reply:
        if self._reader is None or self._writer is None or self._reader.at_eof() or self._writer.is_closing():
            await self._close()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._reader, self._writer
        head = f"{'GET' if kind.body is None else 'POST'} {kind.path} HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\n"
        if key is not None:
            head += f"authorization: Bearer {key.text}\r\n"
        if kind.has_strategy and self._rng.random() < 0.5:
            head += f"x-llm-router-strategy: {self._rng.choice(_STRATEGIES)}\r\n"
        if kind.body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(kind.body)}\r\n"
        if not keep:
            head += "connection: close\r\n"
        writer.write(head.encode() + b"\r\n" + (kind.body or b""))
        if kind.leaves == "at once":
            await writer.drain()
            await asyncio.sleep(self._rng.random() * 0.03)
            return _Reply(0, {}, b"", is_whole=False)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if "transfer-encoding" not in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
                if kind.leaves and status == 200:
                    return _Reply(status, headers, body, is_whole=False)
            await reader.readuntil(b"\r\n")
        if headers.get("connection") == "close":
            await self._close()
        return _Reply(status, headers, body)

    async def _close(self) -> None:
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


_STRATEGIES = [strategy for strategy in STRATEGIES if strategy != "custom"]


def _has_ended(stream: bytes) -> bool:
    """Whether a stream has the end mark of its dialect."""
    return stream.endswith((b"data: [DONE]\n\n", b'{"type":"message_stop"}\n\n'))


def _usage_of(body: bytes) -> tuple[int, int] | None:
    """Input and output tokens as OpenAI or Anthropic say them, plain or in the last event of a stream that has them."""
    pieces = [body] if body[:1] == b"{" else [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
    for piece in reversed(pieces):
        usage = json.loads(piece).get("usage")
        if isinstance(usage, dict) and "prompt_tokens" in usage:
            return usage["prompt_tokens"], usage.get("completion_tokens", 0)
        if isinstance(usage, dict) and "input_tokens" in usage and "output_tokens" in usage:
            return usage["input_tokens"], usage["output_tokens"]
    return None


class Watcher:
    """Scrapes all the time. Notes totals that went down, peaks of memory, when and for how long nobody answered."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._before: Mapping[tuple[str, ...], float] = {}
        self._answered_at = time.monotonic()
        self.answers: list[float] = []  # monotonic instants
        self.longest_silence_s = 0.0
        self.down: list[str] = []
        self.peaks: Counter[str] = Counter()

    def look(self) -> Scrape | None:
        """One scrape; None if control is away."""
        try:
            scrape = self._serving.scrape()
        except (OSError, http.client.HTTPException):  # what came whole must parse
            return None
        now = time.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now - self._answered_at)
        self._answered_at = now
        self.answers.append(now)
        counters = scrape.counters()
        self.down += [
            f"{' '.join(key)}: {value} -> {counters.get(key)}"
            for key, value in self._before.items()
            if counters.get(key, -1.0) < value
        ]
        self._before = counters
        for name, labels, value in scrape.samples:
            if name == "llm_router_process_resident_memory_bytes":
                role = labels["process"].partition("-")[0]
                self.peaks[role] = max(self.peaks[role], int(value))
        return scrape

    async def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.to_thread(self.look)
            await asyncio.sleep(0.2)


class Killer:
    """Kills one thing after the other: workers, control, backends; now and then it has the configuration read again.

    Args:
        pause_s: mean of the random time between two kills.

    Attributes:
        done: how often each thing was done.
        killed_at: (`worker` or `control`, monotonic instant).
    """

    def __init__(self, serving: Serving, backends: Backends, rng: random.Random, pause_s: float) -> None:
        self._serving = serving
        self._backends = backends
        self._rng = rng
        self._pause_s = pause_s
        self.done: Counter[str] = Counter()
        self.killed_at: list[tuple[str, float]] = []

    async def run(self, is_over: Callable[[], bool]) -> None:
        actions = {
            "worker": (3, self._kill_worker),
            "control": (2, self._kill_control),
            "backend": (1, self._kill_backend),
            "reload": (2, self._reload),
        }
        names, weights = list(actions), [weight for weight, _ in actions.values()]
        while not is_over():
            (name,) = self._rng.choices(names, weights)
            if await asyncio.to_thread(actions[name][1]):
                self.done[name] += 1
            await asyncio.sleep(self._pause_s * (0.5 + self._rng.random()))

    def was_killed(self, what: str, since: float, until: float) -> bool:
        """Whether one was between these instants."""
        return any(name == what and since <= at <= until for name, at in self.killed_at)

    def _kill_worker(self) -> bool:
        return self._kill(f"worker-{self._rng.randrange(2)}")

    def _kill_control(self) -> bool:
        return self._kill("control")

    def _kill(self, name: str) -> bool:
        pid = self._serving.children().get(name)
        if pid is None:  # dead already: its successor is being started
            return False
        os.kill(pid, signal.SIGKILL)
        self.killed_at.append((name.partition("-")[0], time.monotonic()))
        while is_alive(pid):
            time.sleep(0.005)
        return True

    def _kill_backend(self) -> bool:
        name = self._rng.choice(("left", "right"))
        self._backends.kill(name)
        time.sleep(self._rng.random() * self._pause_s)
        self._backends.bring_back(name)
        return True

    def _reload(self) -> bool:
        """Another configuration, told by HTTP or by a signal."""
        path = self._serving.folder / "llm-router.yaml"
        other = path.with_suffix(".other")
        other.write_text(self._backends.config(f"{self._rng.randint(1, 9)}ms"))
        other.replace(path)
        if self._rng.random() < 0.5:
            self._serving.process.send_signal(signal.SIGHUP)
            return True
        return request(self._serving.metrics_port, "POST", "/admin/reload", {}).status == 200


class Churner:
    """Makes keys and revokes them, over HTTP, and looks how soon a revoked one is refused by every worker."""

    def __init__(self, serving: Serving, keys: Keys, seen: Seen, killer: Killer, pause_s: float) -> None:
        self._serving = serving
        self._keys = keys
        self._seen = seen
        self._killer = killer
        self._pause_s = pause_s
        self._made = 0

    async def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await asyncio.to_thread(self._make)
            await asyncio.sleep(self._pause_s)
            if len(self._keys.passing) > 2:
                await asyncio.to_thread(self._revoke, self._keys.passing[0])

    def _make(self) -> None:
        self._made += 1
        key = _create(self._serving, f"passing {self._made}", {"requests_per_minute": 10**6})
        if key is not None and self._is_taken(key):
            self._keys.passing.append(key)

    def _is_taken(self, key: Key) -> bool:
        """Wait until each worker knows it; False if control is killed meanwhile."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            if set(self._asked(key)) == {200}:
                return True
        return False

    def _revoke(self, key: Key) -> None:
        key.revoking_at = time.monotonic()
        if request(self._serving.metrics_port, "DELETE", f"/admin/keys/{key.id}").status != 200:
            return  # control is away, or its store is; the next turn tries again
        done_at = time.monotonic()
        self._keys.passing.remove(key)
        asked_at = taken_at = done_at
        while not set(self._asked(key)) <= _REFUSED:
            taken_at, asked_at = asked_at, time.monotonic()
            if time.monotonic() - done_at > REQUEST_TIMEOUT_S:
                self._seen.wrong.append(f"{key.name!r} is taken {REQUEST_TIMEOUT_S:g} s after it was revoked")
                return
        key.refused_at = time.monotonic()
        was_killed = self._killer.was_killed("control", key.revoking_at - 1.0, key.refused_at)
        # A worker that is being started again keeps who asks it waiting: what counts is when a request began that got in.
        self._seen.revoked_s.append((taken_at - done_at, was_killed))
        self._keys.revoked.append(key)

    def _asked(self, key: Key) -> list[int]:
        """What six new connections get: one of two workers is missed once in 32 times."""
        address = new_address()
        return [
            request(self._serving.port, "GET", "/v1/models", key=key.text, address=address).status for _ in range(6)
        ]


def _create(serving: Serving, name: str, limits: Mapping[str, float]) -> Key | None:
    """A new key; None if control is away, or its answer was lost."""
    made = request(serving.metrics_port, "POST", "/admin/keys", {"name": name, "limits": dict(limits)})
    if made.status != 201:
        return None
    return Key(name, made.json()["key"]["id"], made.json()["secret"])


async def soak(
    serving: Serving, backends: Backends, keys: Keys, *, seed: int, seconds: float, clients: int, pause_s: float
) -> tuple[Seen, Watcher, Killer]:
    """Load, scrapes, kills and new keys for so long; returns when every request has ended and no backend is away."""
    seen, watcher = Seen(), Watcher(serving)
    killer = Killer(serving, backends, random.Random(f"{seed} killer"), pause_s)
    churner = Churner(serving, keys, seen, killer, pause_s / 2)
    until = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() >= until

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            client = Client(serving.port, f"client-{number}", random.Random(f"{seed} client {number}"), seen, keys)
            group.create_task(client.run(is_over))
        group.create_task(watcher.run(is_over))
        group.create_task(killer.run(is_over))
        group.create_task(churner.run(is_over))
    return seen, watcher, killer
