"""Streams: a client that opens many at once and notes when the first event of each arrived.

Runs as its own process on the load generator's CPU: `python -m benchmarks.streams --url … --connections N --each M`
prints one line of JSON; `measure()` starts that and reads it. Times are taken when bytes reach this process.
Not for: plain requests (wrk.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.backend import CHUNKS, PACE_S, PACED_MARK
from benchmarks.processes import own_folder

_DONE: Final = b"[DONE]"
_END: Final = b"0\r\n\r\n"
_EVENT: Final = b"data:"
# A stream that needs this long is lost: fifty paced chunks take half a second, in the most overloaded peer three.
_LOST_AFTER_S: Final = 20.0


class Streams(NamedTuple):
    """Outcome of one run. Times in milliseconds from the writing of a request to its first event."""

    streams: int
    failed: int
    chunks: int
    duration_s: float
    first_p50_ms: float
    first_p99_ms: float


class _Stream(asyncio.Protocol):
    """One connection, used for one stream after the other. `done` is given None, or why the stream was lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tail = b""
        self._sent_at = 0.0
        self._saw_done = False
        self._head = b""
        self._left = -1
        self._saw_head = False
        self.first_s: float | None = None
        self.events = 0
        self.open = False
        self.done: asyncio.Future[str | None]
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        # A reply framed by the end of the connection is whole when the last event has come.
        self._finish(None if self._saw_done else f"connection lost after {self.events} events")

    def begin(self, request: bytes) -> asyncio.Future[str | None]:
        """Sends the request; the future ends with the stream."""
        self._tail = b""
        self._saw_done = False
        self._head = b""
        self._left = -1
        self._saw_head = False
        self.first_s = None
        self.events = 0
        self.done = self._loop.create_future()
        self._sent_at = time.perf_counter()  # uvloop's own clock stands still for a millisecond
        self._transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if not self._saw_head:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            if not head.startswith((b"http/1.1 200", b"http/1.0 200")):
                self._finish(self._head[:200].decode(errors="replace"))
                self._transport.abort()
                return
            self._saw_head = True
            # A stream that was whole before its head left may be sent with its length.
            length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            self._left = int(length) if length else -1
        # What is cut in two by a read is found together with the end of the read before.
        seen = self._tail + data
        events = seen.count(_EVENT)
        if events:
            if self.first_s is None:
                self.first_s = time.perf_counter() - self._sent_at
            self.events += events
        self._saw_done = self._saw_done or _DONE in seen
        if self._left >= 0:
            self._left -= len(data)
        if self._saw_done and (self._left == 0 or (self._left < 0 and seen.endswith(_END))):
            self._finish(None)
        cut = seen.rfind(_EVENT)
        self._tail = seen[max(cut + len(_EVENT), len(seen) - len(_DONE)) :]

    def close(self) -> None:
        """Gives the connection up."""
        self._transport.abort()

    def _finish(self, reason: str | None) -> None:
        if hasattr(self, "done") and not self.done.done():
            self.done.set_result(reason)


def _request(url: str, model: str, headers: Mapping[str, str], *, paced: bool) -> bytes:
    parts = urlsplit(url)
    mark = PACED_MARK if paced else ""
    text = f"{mark} Tell a short story about a byte that travels. " + "It should be told in plain words. " * 20
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], "stream": True}).encode()
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def _connection(
    address: tuple[str, int], request: bytes, each: int, wait_s: float, firsts: list[float], lost: list[str]
) -> int:
    """`each` streams, one after the other, after `wait_s`; the number of events that came."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(wait_s)
    stream: _Stream | None = None
    events = 0
    for _ in range(each):
        try:
            if stream is None or not stream.open:
                _, stream = await loop.create_connection(lambda: _Stream(loop), *address)
            reason = await asyncio.wait_for(stream.begin(request), _LOST_AFTER_S)
        except (OSError, TimeoutError) as error:
            reason = f"{error!r} after {stream.events if stream is not None else 0} events"
            if stream is not None:
                stream.close()
                stream = None
        if reason is None and stream is not None and stream.events < CHUNKS:
            reason = f"only {stream.events} events"
        if reason is not None:
            lost.append(reason)
        elif stream is not None and stream.first_s is not None:
            firsts.append(stream.first_s)
            # The finish, usage and [DONE] events are not counted: a chunk is a piece of content.
            events += CHUNKS
    if stream is not None:
        stream.close()
    return events


async def _all(url: str, connections: int, each: int, model: str, headers: Mapping[str, str], paced: bool) -> Streams:
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    request = _request(url, model, headers, paced=paced)
    firsts: list[float] = []
    lost: list[str] = []
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    # Starts are spread over the length of one stream: real ones do not march in step.
    spread_s = CHUNKS * PACE_S / connections if paced else 0.0
    chunks = sum(
        await asyncio.gather(
            *(_connection(address, request, each, i * spread_s, firsts, lost) for i in range(connections))
        )
    )
    duration_s = loop.time() - began_at
    for reason in sorted(set(lost))[:3]:
        print(f"stream lost: {reason}", file=sys.stderr)
    firsts.sort()
    last = len(firsts) - 1
    p50, p99 = (firsts[round(last * share)] * 1e3 if firsts else float("nan") for share in (0.50, 0.99))
    return Streams(len(firsts), len(lost), chunks, duration_s, p50, p99)


def measure(
    url: str, *, connections: int, each: int, paced: bool, cpu: int, model: str, headers: Mapping[str, str]
) -> Streams:
    """Runs the client as a process on `cpu`: `connections` at once, `each` streams on every one of them."""
    command = [
        "taskset", "-c", str(cpu), sys.executable, "-m", "benchmarks.streams", "--url", url, "--model", model,
        "--connections", str(connections), "--each", str(each), *(["--paced"] if paced else []),
        *(part for name, value in headers.items() for part in ("--header", f"{name}: {value}")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=own_folder())
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"the stream client left with {done.returncode}: {done.stderr.strip()[-500:]}")
    return Streams(*json.loads(done.stdout))


def main() -> None:
    """Command line of the client process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--header", action="append", default=[], help="a further header, `Name: value`")
    options = parser.parse_args()
    os.environ.pop("PYTHONASYNCIODEBUG", None)
    headers = dict(line.split(": ", 1) for line in options.header)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(
            _all(options.url, options.connections, options.each, options.model, headers, options.paced)
        )
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
