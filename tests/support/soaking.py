"""Clients of every kind, and kills at random, for a running router: what `make soak` and its short form are made of.

Every client has at most one request in hand and notes how each one ended, so that afterwards the router's counts can
be held against what was seen. Choices come from random generators with seeds; what the machine makes of their order
does not. Not for: measuring speed (benchmarks).
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
from typing import NamedTuple, Self

from llm_router.testing import Pause, ScriptedBackend, Step, framed, json_reply, reply, stream_head
from support.serving import Scrape, Serving, is_alive

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
REQUEST_TIMEOUT_S = 20.0

CONFIG = """
server: {workers: 2, drain: 5s}
backends:
  - {name: left, url: "%(left)s", timeouts: {connect: 1s, first_byte: 5s, gap: 5s}}
  - {name: right, url: "%(right)s", timeouts: {connect: 1s, first_byte: 5s, gap: 5s}}
  - {name: slow, url: "%(slow)s"}
  - {name: failing, url: "%(failing)s"}
  - {name: garbage, url: "%(garbage)s"}
models:
  - name: m
    deployments: [{backend: left, model: scripted}, {backend: right, model: scripted}]
  - name: slow
    deployments: [{backend: slow, model: scripted}]
  - name: failing
    deployments: [{backend: failing, model: scripted}]
  - name: garbage
    deployments: [{backend: garbage, model: scripted}]
  - name: falling
    deployments: [{backend: failing, model: scripted}]
    fallbacks: [m]
routing: {retry: {backoff: 5ms}}
"""


class Backends:
    """One scripted backend of each name; `left` and `right` can be killed and brought back where they were."""

    def __init__(self) -> None:
        self._running = {name: ScriptedBackend() for name in ("left", "right", "slow", "failing", "garbage")}
        events: list[Step] = [step for _ in range(20) for step in (framed(EVENT), Pause(0.02))]
        self._running["slow"].always(stream_head(), *events, framed(b"data: [DONE]\n\n") + framed(b""))
        self._running["failing"].always(json_reply({"error": {"message": "no"}}, 500))
        self._running["garbage"].always(reply(b"<html>oops</html>", 200, "text/html"))

    def __enter__(self) -> Self:
        for backend in self._running.values():
            backend.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._running.values():
            backend.stop()

    @property
    def config(self) -> str:
        return CONFIG % {name: backend.base_url for name, backend in self._running.items()}

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
        leaves: the client goes away after the first event of a stream.
        statuses: every answer that may come while things are being killed.
    """

    path: str
    body: bytes | None
    statuses: frozenset[int]
    is_inference: bool = True
    leaves: bool = False


def _chat(model: str, *, stream: bool = False) -> bytes:
    return json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "a b"}]}).encode()


CHAT = "/v1/chat/completions"
_SERVED = frozenset({200, 502, 503})  # both of the backends may be thought to be down for a moment
KINDS: Mapping[str, tuple[int, Kind]] = {
    "plain": (8, Kind(CHAT, _chat("m"), _SERVED)),
    "stream": (4, Kind(CHAT, _chat("m", stream=True), _SERVED)),
    "leave": (2, Kind(CHAT, _chat("slow", stream=True), _SERVED, leaves=True)),
    "generate": (1, Kind("/api/generate", b'{"prompt":"a b","options":{"maxTokens":3}}', _SERVED)),
    "completion": (1, Kind("/v1/completions", b'{"model":"m","prompt":"a b"}', _SERVED)),
    "embedding": (1, Kind("/v1/embeddings", b'{"model":"m","input":"a b"}', _SERVED)),
    "falling": (1, Kind(CHAT, _chat("falling"), _SERVED)),
    "failing": (1, Kind(CHAT, _chat("failing"), frozenset({500, 502, 503}))),
    "garbage": (1, Kind(CHAT, _chat("garbage"), frozenset({200, 502}))),
    "unknown": (1, Kind(CHAT, _chat("nobody"), frozenset({404}))),
    "not json": (1, Kind(CHAT, b"{", frozenset({400}), is_inference=False)),
    "nowhere": (1, Kind("/nowhere", None, frozenset({404}), is_inference=False)),
    "models": (1, Kind("/v1/models", None, frozenset({200}), is_inference=False)),
    "health": (1, Kind("/health", None, frozenset({200, 503}), is_inference=False)),
}
"""Weight and meaning of each kind of request."""


class Seen:
    """How requests ended, for all clients.

    Attributes:
        ended: (path, status) of whole replies. A stream that ended with an error event has the status 200.
        inferences: `success` and `error` among them, as clients saw it.
        broken: requests whose connection broke before a whole reply; `left` those that the client gave up itself.
        wrong: what must not happen at all, in words.
    """

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, int]] = Counter()
        self.inferences: Counter[str] = Counter()
        self.made_inferences = 0
        self.broken = 0
        self.left = 0
        self.wrong: list[str] = []


class _Broken(Exception):
    """The connection ended before the reply did."""


class Client:
    """One client after the other's work: kinds, and kept or fresh connections, by chance."""

    def __init__(self, port: int, rng: random.Random, seen: Seen) -> None:
        self._port = port
        self._rng = rng
        self._seen = seen
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
        kind, seen = KINDS[name][1], self._seen
        if fresh:
            await self._close()
        seen.made_inferences += kind.is_inference
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                status, body = await self._exchange(kind, keep=not fresh)
        except TimeoutError:
            seen.wrong.append(f"{name}: no reply within {REQUEST_TIMEOUT_S:g} s")
            seen.broken += 1
            await self._close()
            return
        except (_Broken, OSError, asyncio.IncompleteReadError):
            seen.broken += 1
            await self._close()
            return
        if kind.leaves and status == 200:
            seen.left += 1
            await self._close()
            return
        seen.ended[kind.path, status] += 1
        if status not in kind.statuses:
            seen.wrong.append(f"{name}: {status} {body[:300]!r}")
        if kind.is_inference:
            is_cut = b'"stream":true' in (kind.body or b"").replace(b" ", b"") and not body.endswith(
                b"data: [DONE]\n\n"
            )
            seen.inferences["success" if status == 200 and not is_cut else "error"] += 1
            if status == 200 and is_cut and b'"error"' not in body:
                seen.wrong.append(f"{name}: a stream ended without [DONE] and without an error: {body[-200:]!r}")

    async def _exchange(self, kind: Kind, *, keep: bool) -> tuple[int, bytes]:
        if self._reader is None or self._writer is None or self._reader.at_eof() or self._writer.is_closing():
            await self._close()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._reader, self._writer
        head = f"{'GET' if kind.body is None else 'POST'} {kind.path} HTTP/1.1\r\nhost: localhost\r\n"
        if kind.body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(kind.body)}\r\n"
        if not keep:
            head += "connection: close\r\n"
        writer.write(head.encode() + b"\r\n" + (kind.body or b""))
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if "transfer-encoding" not in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
                if kind.leaves:
                    return status, body
            await reader.readuntil(b"\r\n")
        if "x-request-id" not in headers:
            raise AssertionError(f"a reply without its request id: {lines}")
        if headers.get("connection") == "close":
            await self._close()
        return status, body

    async def _close(self) -> None:
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Watcher:
    """Scrapes all the time. Notes totals that went down, peaks of memory, and how long nobody answered."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._before: Mapping[tuple[str, ...], float] = {}
        self._answered_at = time.monotonic()
        self.scrapes = 0
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
        self.scrapes += 1
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
    """Kills one thing after the other: workers, control, backends; now and then it only asks for a reload.

    Args:
        pause_s: mean of the random time between two kills.
    """

    def __init__(self, serving: Serving, backends: Backends, rng: random.Random, pause_s: float) -> None:
        self._serving = serving
        self._backends = backends
        self._rng = rng
        self._pause_s = pause_s
        self.done: Counter[str] = Counter()

    async def run(self, is_over: Callable[[], bool]) -> None:
        actions = {
            "worker": (3, self._kill_worker),
            "control": (2, self._kill_control),
            "backend": (1, self._kill_backend),
            "reload": (1, self._reload),
        }
        names, weights = list(actions), [weight for weight, _ in actions.values()]
        while not is_over():
            (name,) = self._rng.choices(names, weights)
            if await asyncio.to_thread(actions[name][1]):
                self.done[name] += 1
            await asyncio.sleep(self._pause_s * (0.5 + self._rng.random()))

    def _kill_worker(self) -> bool:
        return self._kill(f"worker-{self._rng.randrange(2)}")

    def _kill_control(self) -> bool:
        return self._kill("control")

    def _kill(self, name: str) -> bool:
        pid = self._serving.children().get(name)
        if pid is None:  # dead already: its successor is being started
            return False
        os.kill(pid, signal.SIGKILL)
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
        self._serving.process.send_signal(signal.SIGHUP)
        return True


async def soak(
    serving: Serving, backends: Backends, *, seed: int, seconds: float, clients: int, pause_s: float
) -> tuple[Seen, Watcher, Killer]:
    """Load, scrapes and kills for so long; returns when every request has ended and no backend is away."""
    seen, watcher = Seen(), Watcher(serving)
    killer = Killer(serving, backends, random.Random(f"{seed} killer"), pause_s)
    until = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() >= until

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            client = Client(serving.port, random.Random(f"{seed} client {number}"), seen)
            group.create_task(client.run(is_over))
        group.create_task(watcher.run(is_over))
        group.create_task(killer.run(is_over))
    return seen, watcher, killer
