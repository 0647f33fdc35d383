"""The pool against servers that we did not write: nginx, uvicorn, llama.cpp."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from llm_router.errors import BackendUnavailable
from llm_router.testing import RecordingRecorder
from llm_router.upstream.pool import Origin, Pool, PoolSettings
from support.aio import run
from support.model import default_model
from support.net import free_port
from support.tools import require
from support.upstream import request
from support.wait import until

BODY = bytes(range(256)) * 4096  # 1 MiB


@asynccontextmanager
async def pool_of(port: int, **settings: Any) -> AsyncIterator[Pool]:
    recorder = RecordingRecorder()
    async with Pool("b", Origin("http", "127.0.0.1", port), PoolSettings(**settings), recorder) as pool:
        yield pool
    assert recorder.open_connections.get(("upstream", "http"), 0) == 0


async def fetch(pool: Pool, target: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
    answer = await pool.send(*request(body, method=method, target=target))
    try:
        return answer.status, await answer.read()
    finally:
        answer.close()


def is_listening(port: int) -> bool:
    async def attempt() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    return asyncio.run(attempt())


# -- nginx ------------------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; keepalive_requests 10; default_type application/octet-stream;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e; client_max_body_size 1m;
  server {{
    listen 127.0.0.1:{port}; root {folder}/files;
    location = /small {{ return 200 'hello'; }}
    location = /empty {{ return 204; }}
    location = /chunked {{ ssi on; ssi_types *; alias {folder}/files/page.html; }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path) -> Iterator[int]:
    port = free_port()
    files = folder / "files"
    files.mkdir()
    (files / "large").write_bytes(BODY)
    (files / "page.html").write_text("<!--# echo var='request_method' -->" + "x" * 100_000)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    with subprocess.Popen(
        [require("nginx"), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    ) as server:
        try:
            until(lambda: is_listening(port), what="nginx")
            yield port
        finally:
            server.terminate()


def test_nginx(tmp_path: Path) -> None:
    """Lengths, chunks, HEAD, 204, 404, 413 in mid-upload, and connections that nginx closes after ten requests."""

    async def scenario(port: int) -> None:
        async with pool_of(port) as pool:
            for _ in range(25):
                assert await fetch(pool, "/small") == (200, b"hello")
            assert pool.statistics().opened == 3
            assert await fetch(pool, "/large") == (200, BODY)
            status, page = await fetch(pool, "/chunked")
            assert (status, page[:3], len(page)) == (200, b"GET", 100_003)
            assert await fetch(pool, "/large", "HEAD") == (200, b"")
            assert await fetch(pool, "/empty") == (204, b"")
            assert (await fetch(pool, "/missing"))[0] == 404
            assert (await fetch(pool, "/small", "POST", b"x" * 5_000_000))[0] == 413
            results = await asyncio.gather(*(fetch(pool, "/large") for _ in range(30)))
            assert all(result == (200, BODY) for result in results)

    with nginx(tmp_path) as port:
        run(scenario(port))


# -- uvicorn ----------------------------------------------------------------------------------------


async def application(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Echoes bodies; /stream sends 50 chunks; /broken leaves in the middle of one."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    if scope["path"] == "/echo":
        await send({"type": "http.response.body", "body": body})
        return
    for number in range(50):
        await send({"type": "http.response.body", "body": b"chunk %d\n" % number, "more_body": True})
        await asyncio.sleep(0)
        if scope["path"] == "/broken" and number == 10:
            raise ConnectionAbortedError
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[int]:
    """uvicorn in this loop."""
    port = free_port()
    config = uvicorn.Config(application, port=port, log_level="critical", lifespan="off", **options)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    try:
        while not server.started:
            await asyncio.sleep(0.001)
        yield port
    finally:
        server.should_exit = True
        await task


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_uvicorn(http: str) -> None:
    """Both of its HTTP implementations: echoes of every size, streams, a stream that breaks."""
    if http == "h11":
        pytest.importorskip("h11")

    async def scenario() -> None:
        async with serving(http=http) as port, pool_of(port, max_connections=8) as pool:
            for size in (0, 1, 1000, 65_536, 65_537, 262_144, 262_145, 3_000_000):
                body = (BODY * 3)[:size]
                assert await fetch(pool, "/echo", "POST", body) == (200, body), size
            assert pool.statistics().opened == 1
            whole = b"".join(b"chunk %d\n" % number for number in range(50))
            results = await asyncio.gather(*(fetch(pool, "/stream") for _ in range(40)))
            assert all(result == (200, whole) for result in results)
            with pytest.raises(BackendUnavailable, match="after 89 bytes"):
                await fetch(pool, "/broken")

    run(scenario())


def test_uvicorn_closing_idle_connections() -> None:
    """A keep-alive timeout of nothing races with every next request: none is lost."""

    async def scenario() -> None:
        async with serving(timeout_keep_alive=0) as port, pool_of(port) as pool:
            for number in range(200):
                results = await asyncio.gather(*(fetch(pool, "/echo", "POST", b"x") for _ in range(4)))
                assert results == [(200, b"x")] * 4
                for _ in range(number % 5):
                    await asyncio.sleep(0)
            assert pool.statistics().opened > 4

    run(scenario())


# -- llama.cpp --------------------------------------------------------------------------------------

LLAMA = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 512
params.cpuparams.n_threads = 1
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
server = xllamacpp.Server(params)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.model
@pytest.mark.slow
def test_llama_cpp() -> None:
    """A real model: whole replies and streams on kept connections, and generating ends when we leave."""
    port = free_port()

    async def scenario() -> None:
        async with pool_of(port) as pool:
            ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
            for _ in range(2):
                status, body = await fetch(pool, "/v1/chat/completions", "POST", json.dumps(ask).encode())
                assert status == 200
                assert json.loads(body)["usage"]["completion_tokens"] > 0
            streamed = json.dumps({**ask, "stream": True}).encode()
            status, body = await fetch(pool, "/v1/chat/completions", "POST", streamed)
            assert status == 200
            assert body.endswith(b"data: [DONE]\n\n")
            answer = await pool.send(*request(json.dumps({**ask, "stream": True, "max_tokens": 400}).encode()))
            assert await answer.chunk()
            answer.close()
            assert (await fetch(pool, "/v1/chat/completions", "POST", streamed))[0] == 200

    command = [sys.executable, "-c", LLAMA, str(default_model()), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            line = b""
            while line.strip() != b"ready":
                line = server.stdout.readline()
                assert line, "llama.cpp did not start"
            run(scenario(), timeout_s=50)
        finally:
            server.kill()
