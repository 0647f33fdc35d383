"""What serving HTTP costs: our front beside uvicorn, both over the same core that does nothing, in one run.

    python -m benchmarks.front [--seconds 3] [--rounds 5] [--json FILE]

Each server is a process on a CPU of its own and answers a 2 kB POST from wrk with the same 0.66 kB and five headers.
Rounds are interleaved, ratios are taken within a round, and medians shown: CPU microseconds (user + system) per
request. "bare" answers any bytes without looking at them: what the kernel and uvloop take from every server.
"uvicorn" is its fastest form (uvloop, httptools, no log, no headers of its own) with a raw ASGI function; "uvicorn +
asgi.py" has our core mounted in it, with one task to serve and one to see the client leave.
Unfair to uvicorn: nothing it does beside ASGI is used. Unfair to us: uvicorn has no bounds on headers, no deadlines and
does not count connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, Self

import uvloop

from benchmarks import processes, wrk
from llm_router.gateway.front import Front, FrontSettings
from llm_router.gateway.seam import Refusal, RefusalReply, Request, Responder
from llm_router.signals import NoRecorder

CONNECTIONS: Final = (1, 32, 256)
BODY: Final = b'{"id":"1","choices":[{"message":{"role":"assistant","content":"' + b"y" * 580 + b'"}}]}'
HEADERS: Final = [
    (b"content-type", b"application/json"),
    (b"x-request-id", b"0123456789abcdef"),
    (b"x-llm-router-model", b"mock"),
    (b"x-llm-router-backend", b"mock"),
    (b"x-llm-router-strategy", b"round-robin"),
]
WHOLE_REPLY: Final = (
    b"HTTP/1.1 200 OK\r\n"
    + b"".join(b"%b: %b\r\n" % header for header in HEADERS)
    + b"content-length: %d\r\n\r\n" % len(BODY)
    + BODY
)


async def _core(request: Request, responder: Responder) -> None:
    responder.start(200, HEADERS)
    responder.end(BODY)


def _refuse(refusal: Refusal) -> RefusalReply:
    return RefusalReply(refusal.error.status, [], b"")


class _Bare(asyncio.Protocol):
    """Takes every two kilobytes for a request."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= wrk.REQUEST_BYTES and data.endswith(b"}"):
            self._got = 0
            self._transport.write(WHOLE_REPLY)


async def _raw_app(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    length = (b"content-length", b"%d" % len(BODY))
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
    await send({"type": "http.response.body", "body": BODY})


def _serve_uvicorn(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=1024,
    )


async def _serve_protocol(name: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    front = Front(_core, _refuse, FrontSettings(), NoRecorder(), loop=loop)
    factory = front.protocol_factory if name == "own" else _Bare
    server = await loop.create_server(factory, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def serve(name: str, port: int) -> None:
    """Be the server `name` until killed."""
    if name == "uvicorn":
        _serve_uvicorn(_raw_app, port)
    elif name == "uvicorn + asgi.py":
        from llm_router.gateway.asgi import AsgiFront

        _serve_uvicorn(AsgiFront(_core, _refuse, FrontSettings()), port)
    else:
        uvloop.run(_serve_protocol(name, port))


SERVERS: Final = ("bare", "own", "uvicorn", "uvicorn + asgi.py")


class Running:
    """A server in a process of its own, pinned."""

    def __init__(self, name: str, cpu: int) -> None:
        self.port = processes.free_port()
        command = [sys.executable, "-m", "benchmarks.front", "--serve", name, "--port", str(self.port)]
        self._process = subprocess.Popen(["taskset", "-c", str(cpu), *command], cwd=processes.own_folder())

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                wrk.load(self.url, connections=1, seconds=1, cpu=0, model="mock", headers={})
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def cpu_s(self) -> float:
        """Seconds that it has used."""
        return sum(one.cpu_s for one in processes.use(self._process.pid).values())


def measure(rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """CPU microseconds per request: connections -> server -> one figure a round. Raises SystemExit on any error."""
    cpus = sorted(os.sched_getaffinity(0))
    figures: dict[str, dict[str, list[float]]] = {}
    running = {}
    try:
        for name in SERVERS:
            running[name] = Running(name, cpus[0]).__enter__()
        for connections in CONNECTIONS:
            row = figures[str(connections)] = {name: [] for name in SERVERS}
            for number in range(rounds):
                for name in SERVERS if number % 2 == 0 else reversed(SERVERS):
                    server = running[name]
                    before = server.cpu_s()
                    load = wrk.load(
                        server.url, connections=connections, seconds=seconds, cpu=cpus[-1], model="mock", headers={}
                    )
                    if load.errors:
                        raise SystemExit(f"{name}: {load.errors} errors")
                    row[name].append((server.cpu_s() - before) / load.requests * 1e6)
    finally:
        for server in running.values():
            server.__exit__()
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load, for each figure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every round's figure here, too")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.port)
        return
    figures = measure(options.rounds, options.seconds)
    print(f"{'CPU us per request':<22}" + "".join(f"{name:>20}" for name in SERVERS) + "    uvicorn/own   asgi/own")
    for connections, row in figures.items():
        ratios = [
            statistics.median(theirs / ours for theirs, ours in zip(row[name], row["own"], strict=True))
            for name in ("uvicorn", "uvicorn + asgi.py")
        ]
        medians = "".join(f"{statistics.median(row[name]):>20.1f}" for name in SERVERS)
        print(f"{connections + ' connections':<22}{medians}{ratios[0]:>15.2f}{ratios[1]:>11.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
