"""What the upstream client costs: our pool beside aiohttp's client and asyncio's streams, in one run.

    python -m benchmarks.pool [--json FILE]

Every client sends a 2 kB request to the mock backend (a process of its own) and reads the whole 0.66 kB reply, on
kept connections, one request at a time and 32 at once; then each reads 64 streams of 50 chunks at once, one
chunk every 10 ms, and CPU per chunk is what counts. Rounds are interleaved; the smallest of each is taken, as what
disturbs a measurement only ever adds to it; `inf` says that the machine was quiet enough in no round. "bare" writes
and waits for bytes without looking at them: the part that the kernel, uvloop and one future take from every
client. All run on uvloop. aiohttp is left out where it is not installed.
Unfair to aiohttp: it also does cookies, redirects and decompression. Unfair to us: the streams client does
nothing but find the length, with no deadlines, bounds, checks or recovery.

The second table is about reading a reply's bytes: llhttp with a parser that is kept, a new one for each reply, and the
lines split by hand with the checks that llhttp makes on the way left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Awaitable, Callable
from math import inf
from pathlib import Path
from typing import Any, Protocol, Self, cast

import uvloop
from httptools import HttpResponseParser

from benchmarks.backend import CHUNKS, MODEL, PACED_MARK, PLAIN_REPLY
from llm_router.signals import NoRecorder
from llm_router.upstream.pool import Origin, Pool, PoolSettings

ROUNDS = 5
REQUESTS = 16_000
STREAMS = 64
CONNECTIONS = (1, 32)

Costs = dict[str, dict[str, float]]
"""What was done -> client -> CPU microseconds of one."""


def _request(prompt: str, *, stream: bool) -> tuple[bytes, bytes]:
    body = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": stream}, separators=(",", ":")
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body


PLAIN = _request("x" * 1900, stream=False)
PACED = _request(PACED_MARK, stream=True)


class Client(Protocol):
    """One way to talk HTTP."""

    async def whole(self) -> int:
        """One request, its reply's body read whole; the size of it in bytes."""

    async def stream(self) -> int:
        """One paced stream, read as it comes; the number of pieces."""

    async def aclose(self) -> None: ...


class OurPool:
    """`llm_router.upstream.pool`."""

    def __init__(self, port: int) -> None:
        settings = PoolSettings(max_connections=STREAMS)
        self._pool = Pool("bench", Origin("http", "127.0.0.1", port), settings, NoRecorder())

    async def whole(self) -> int:
        reply = await self._pool.send(*PLAIN)
        try:
            return len(await reply.read())
        finally:
            reply.close()

    async def stream(self) -> int:
        reply = await self._pool.send(*PACED)
        pieces = 0
        try:
            while await reply.chunk():
                pieces += 1
            return pieces
        finally:
            reply.close()

    async def aclose(self) -> None:
        await self._pool.aclose()


class Aiohttp:
    """aiohttp's client, as its documentation shows it."""

    def __init__(self, port: int) -> None:
        import aiohttp

        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._headers = {"content-type": "application/json", "authorization": "Bearer none"}
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=STREAMS))

    async def whole(self) -> int:
        async with self._session.post(self._url, data=PLAIN[1], headers=self._headers) as reply:
            return len(await reply.read())

    async def stream(self) -> int:
        pieces = 0
        async with self._session.post(self._url, data=PACED[1], headers=self._headers) as reply:
            async for _ in reply.content.iter_any():
                pieces += 1
        return pieces

    async def aclose(self) -> None:
        await self._session.close()


class Streams:
    """asyncio's streams, doing the least that can be called HTTP."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def whole(self) -> int:
        reader, writer = await self._connection()
        writer.write(PLAIN[0] + PLAIN[1])
        head = await reader.readuntil(b"\r\n\r\n")
        at = head.index(b"content-length: ") + 16
        body = await reader.readexactly(int(head[at : head.index(b"\r\n", at)]))
        self._idle.append((reader, writer))
        return len(body)

    async def stream(self) -> int:
        reader, writer = await self._connection()
        writer.write(PACED[0] + PACED[1])
        await reader.readuntil(b"\r\n\r\n")
        pieces = 0
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
            pieces += 1
        await reader.readexactly(2)
        self._idle.append((reader, writer))
        return pieces

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)

    async def aclose(self) -> None:
        for _, writer in self._idle:
            writer.close()


class Bare:
    """Bytes there and bytes back: what no client on this loop can save."""

    class Line(asyncio.Protocol):
        """A connection that wakes whoever waits for bytes."""

        def __init__(self) -> None:
            self.transport: asyncio.Transport
            self.news: asyncio.Future[bytes] | None = None
            self.late = b""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.Transport", transport)

        def data_received(self, data: bytes) -> None:
            if self.news is None or self.news.done():
                self.late += data
            else:
                self.news.set_result(data)

        async def bytes(self) -> bytes:
            if self.late:
                data, self.late = self.late, b""
                return data
            self.news = asyncio.get_running_loop().create_future()
            return await self.news

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Bare.Line] = []

    async def whole(self) -> int:
        line = await self._line()
        line.transport.write(PLAIN[0] + PLAIN[1])
        size = 0
        while size < len(PLAIN_REPLY):
            size += len(await line.bytes())
        self._idle.append(line)
        return size

    async def stream(self) -> int:
        line = await self._line()
        line.transport.write(PACED[0] + PACED[1])
        pieces = 0
        while not (await line.bytes()).endswith(b"0\r\n\r\n"):
            pieces += 1
        self._idle.append(line)
        return pieces

    async def _line(self) -> Bare.Line:
        if self._idle:
            return self._idle.pop()
        _, line = await asyncio.get_running_loop().create_connection(Bare.Line, "127.0.0.1", self._port)
        return line

    async def aclose(self) -> None:
        for line in self._idle:
            line.transport.abort()


CLIENTS: dict[str, Callable[[int], Client]] = {"bare": Bare, "pool": OurPool, "streams": Streams, "aiohttp": Aiohttp}


async def _cpu(action: Callable[[], Awaitable[int]], times: int, at_once: int) -> tuple[float, int]:
    """CPU seconds of this process for `times` calls, `at_once` of them together; and the sum of their results."""

    async def one_after_the_other(count: int) -> int:
        return sum([await action() for _ in range(count)])

    start = time.process_time()
    results = await asyncio.gather(*(one_after_the_other(times // at_once) for _ in range(at_once)))
    return time.process_time() - start, sum(results)


async def _round(client: Client) -> dict[str, float]:
    """CPU microseconds of one thing of each kind."""
    costs = {}
    for connections in CONNECTIONS:
        await _cpu(client.whole, 10 * connections, connections)
        seconds, _ = await _cpu(client.whole, REQUESTS, connections)
        costs[f"request, {connections} at once"] = seconds / REQUESTS * 1e6
    await _cpu(client.stream, STREAMS, STREAMS)
    seconds, pieces = await _cpu(client.stream, STREAMS, STREAMS)
    # Chunks that came together are cheaper: a round in which many did is a round of a busy machine.
    costs["chunk of a paced stream"] = seconds / pieces * 1e6 if pieces > STREAMS * CHUNKS * 0.9 else inf
    await client.aclose()
    return costs


def measure(port: int) -> Costs:
    """The least cost of everything, per client."""
    least: Costs = {}
    names = list(CLIENTS)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        names.remove("aiohttp")
    for number in range(ROUNDS):
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()

            async def one(name: str = name) -> dict[str, float]:
                return await _round(CLIENTS[name](port))

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                for what, cost in runner.run(one()).items():
                    row = least.setdefault(what, {})
                    row[name] = min(cost, row.get(name, cost))
    return least


# -- reading bytes ----------------------------------------------------------------------------------


class _Sink:
    """Takes a reply apart as far as the pool does."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.parser = HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body = body

    def on_message_complete(self) -> None:
        self.headers = []


def _by_hand(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    end = data.index(b"\r\n\r\n")
    first, *lines = data[:end].split(b"\r\n")
    headers = []
    length = 0
    for line in lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip()
        if name == b"content-length":
            length = int(value)
        headers.append((name, value))
    if len(data) != end + 4 + length or not first.startswith(b"HTTP/1.1 "):
        raise ValueError
    return int(first[9:12]), headers, data[end + 4 :]


def measure_parsing() -> dict[str, float]:
    """Microseconds to read the mock backend's reply with the headers that real servers add."""
    head, _, body = PLAIN_REPLY.partition(b"\r\n\r\n")
    data = head + b"\r\ndate: Sun, 02 Aug 2026 10:00:00 GMT\r\nserver: uvicorn\r\nx-request-id: 0123\r\n\r\n" + body
    sink = _Sink()
    ways: dict[str, Callable[[], object]] = {
        "llhttp, kept parser": lambda: sink.parser.feed_data(data),
        "llhttp, new parser": lambda: _Sink().parser.feed_data(data),
        "by hand": lambda: _by_hand(data),
    }
    return {name: min(timeit.repeat(way, number=20_000, repeat=7)) / 20_000 * 1e6 for name, way in ways.items()}


# -- running ----------------------------------------------------------------------------------------


class _Backend:
    """The mock backend on a CPU of its own, where there are two."""

    def __init__(self, port: int, cpu: int) -> None:
        command = [sys.executable, "-m", "benchmarks.backend", "--port", str(port), "--cpu", str(cpu)]
        self._process = subprocess.Popen(command)
        self._port = port

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 10
        while True:
            try:
                asyncio.run(self._knock())
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return self

    async def _knock(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.close()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def _print(costs: Costs) -> None:
    names = list(next(iter(costs.values())))
    print(f"CPU microseconds of the client{'':<4}" + "".join(f"{name:>10}" for name in names) + "   aiohttp/pool")
    for what, row in costs.items():
        ratio = f"{row['aiohttp'] / row['pool']:>12.1f}" if "aiohttp" in row else "           -"
        print(f"{what:<34}" + "".join(f"{row[name]:>10.1f}" for name in names) + ratio)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--port", type=int, default=18_931, help="for the mock backend")
    options = parser.parse_args()
    cpus: list[int] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cpus:
        os.sched_setaffinity(0, {cpus[0]})
    parsing = measure_parsing()
    with _Backend(options.port, cpus[-1] if cpus else -1):
        costs = measure(options.port)
    _print(costs)
    print("\nmicroseconds to read a whole reply")
    for name, cost in parsing.items():
        print(f"{name:<34}{cost:>10.2f}")
    if options.json is not None:
        report: dict[str, Any] = {"cpu_us": costs, "parsing_us": parsing}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
