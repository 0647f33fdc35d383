"""`llm-router bench`: how fast a running router answers, as its clients see it.

A small load generator on the router's own connection pool. Not for: comparing gateways or CPU per request;
that is `make bench`, which uses a client that costs nothing itself.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from llm_router.chat import NOT_JSON
from llm_router.cli.options import ApiKey, Url, first_model, router_url
from llm_router.errors import BackendError, RouterError

if TYPE_CHECKING:
    from llm_router.upstream.pool import Pool, Reply

EPILOG = """Examples:

- `llm-router bench`
- `llm-router bench --requests 1000 --concurrency 32 --stream`
- `llm-router bench --url http://127.0.0.1:4000 --model gpt-4o`

It sends real requests: at a paid backend they cost money."""

_SWEEP_S: Final = 0.25
_CONTENT: Final = re.compile(rb'"content":\s*"[^"]')
"""The first token: a stream's first events name the role and hold an empty or absent content."""


class NothingAnswered(RouterError):
    """Not one request succeeded."""

    code = "nothing_answered"


class Sample(msgspec.Struct):
    """One request as the client saw it; seconds. `error` is empty if it succeeded, `first_s` 0 if nothing came."""

    total_s: float
    first_s: float = 0.0
    output_tokens: int = 0
    error: str = ""


def bench(
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many requests in all.")] = 50,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, max=1024, help="How many at a time.")] = 4,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="Model to ask.  [default: the first it lists]")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Ask for streams; measures the time to the first token.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 16,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to ask.")] = "Count from one to ten.",
    url: Url = None,
    api_key: ApiKey = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="Configuration file that tells the router's address.")
    ] = None,
) -> None:
    """Send requests to a running router and measure the answers."""
    base = router_url(url, config)
    body: dict[str, Any] = {
        "model": model or first_model(base, api_key),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began_at = time.perf_counter()
    samples = asyncio.run(measure(base, body, requests=requests, concurrency=concurrency, api_key=api_key or ""))
    print("\n".join(report(samples, time.perf_counter() - began_at, stream=stream)))
    if all(sample.error for sample in samples):
        raise NothingAnswered(f"none of {requests} requests to {base} succeeded")


async def measure(url: str, body: dict[str, Any], *, requests: int, concurrency: int, api_key: str) -> list[Sample]:
    """Send `requests` chat completions, `concurrency` at a time, and return what each saw, in order of their end."""
    from urllib.parse import urlsplit

    from llm_router.signals import NoRecorder
    from llm_router.upstream.pool import Origin, Pool, PoolSettings

    try:
        origin = Origin.parse(url)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from error
    settings = PoolSettings(
        connect_s=5.0, first_byte_s=300.0, gap_s=120.0, total_s=900.0, max_connections=concurrency, wait_s=5.0
    )
    content = msgspec.json.encode(body)
    key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {urlsplit(url).path}/v1/chat/completions HTTP/1.1\r\nhost: {origin.authority}\r\n{key}"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode()
    samples: list[Sample] = []
    left = iter(range(requests))
    async with Pool("router", origin, settings, NoRecorder()) as pool, asyncio.TaskGroup() as group:
        sweeper = group.create_task(_sweep(pool))

        async def client() -> None:
            for _ in left:
                sample = await _request(pool, head, content)
                samples.append(sample)

        clients = [group.create_task(client()) for _ in range(min(concurrency, requests))]
        await asyncio.wait(clients)
        sweeper.cancel()
    return samples


def report(samples: list[Sample], elapsed_s: float, *, stream: bool) -> list[str]:
    """The figures, line by line."""
    good = [sample for sample in samples if not sample.error]
    lines = [f"{len(samples)} requests in {elapsed_s:.2f} s, {len(samples) - len(good)} failed"]
    if good:
        times = sorted(sample.total_s for sample in good)
        tokens = sum(sample.output_tokens for sample in good)
        lines.append(f"requests/s            {len(good) / elapsed_s:10.1f}")
        lines.append(f"latency p50           {_ms(quantile(times, 0.5))}")
        lines.append(f"latency p99           {_ms(quantile(times, 0.99))}")
        if stream:
            firsts = sorted(sample.first_s for sample in good)
            lines.append(f"first token p50       {_ms(quantile(firsts, 0.5))}")
            lines.append(f"first token p99       {_ms(quantile(firsts, 0.99))}")
        lines.append(f"output tokens/s       {tokens / elapsed_s:10.1f}")
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            counts[sample.error] = counts.get(sample.error, 0) + 1
    return lines + [f"{count} x {error}" for error, count in sorted(counts.items(), key=lambda pair: -pair[1])]


def quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of `ordered` (ascending, not empty) do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def _sweep(pool: Pool) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_S)
        pool.sweep(loop.time())


async def _request(pool: Pool, head: bytes, content: bytes) -> Sample:
    began_at = time.perf_counter()
    try:
        reply = await pool.send(head, content)
        try:
            sample = await _receive(reply, began_at)
        finally:
            reply.close()
    except BackendError as error:
        sample = Sample(0.0, error=error.problem)
    sample.total_s = time.perf_counter() - began_at
    return sample


async def _receive(reply: Reply, began_at: float) -> Sample:
    """Read a reply to its end: a JSON object or a stream of them."""
    is_stream = (reply.header(b"content-type") or b"").startswith(b"text/event-stream")
    sample = Sample(0.0)
    received = bytearray()
    while chunk := await reply.chunk():
        received += chunk
        if not sample.first_s and (not is_stream or _CONTENT.search(received)):
            sample.first_s = time.perf_counter() - began_at
    if reply.status >= 400:
        sample.error = f"status {reply.status}: {_message(bytes(received))}"
    elif is_stream:
        _read_stream(bytes(received), sample)
    else:
        sample.output_tokens = _tokens(bytes(received))
    return sample


def _read_stream(received: bytes, sample: Sample) -> None:
    events = [line[5:].strip() for line in received.split(b"\n") if line.startswith(b"data:")]
    if not events or events[-1] != b"[DONE]":
        sample.error = "the stream ended early"
    for event in events:
        if event.startswith(b'{"error"'):
            sample.error = _message(event)
        elif b'"usage"' in event:
            sample.output_tokens = _tokens(event) or sample.output_tokens


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


def _tokens(content: bytes) -> int:
    try:
        usage = msgspec.json.decode(content, type=_Answer).usage
    except NOT_JSON:
        return 0
    return usage.completion_tokens if usage else 0


def _message(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (*NOT_JSON, KeyError, TypeError):
        return "no error message"


def _ms(value_s: float) -> str:
    return f"{value_s * 1000:10.1f} ms"
