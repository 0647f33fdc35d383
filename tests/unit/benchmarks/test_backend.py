"""The mock backend: what contenders are measured with must be well-formed, however requests arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from benchmarks.backend import CHUNKS, Backend

from support.aio import run


def _post(body: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: mock\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _with_backend(talk: Talk) -> None:
    async def connected() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Backend(loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await talk(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()

    run(connected())


async def _plain_reply(reader: asyncio.StreamReader) -> dict[str, object]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    reply: dict[str, object] = json.loads(await reader.readexactly(length))
    return reply


async def _events(reader: asyncio.StreamReader) -> list[bytes]:
    await reader.readuntil(b"\r\n\r\n")
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    assert body.endswith(b"\n\n")
    return [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]


def test_request_in_pieces_is_answered_once_whole() -> None:
    """Head and body may arrive byte by byte."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in _post(b'{"model":"mock"}'):
            writer.write(bytes([byte]))
            await writer.drain()
        reply = await _plain_reply(reader)
        assert reply["object"] == "chat.completion"
        assert reply["usage"] == {"prompt_tokens": 412, "completion_tokens": 50, "total_tokens": 462}

    _with_backend(talk)


def test_stream_has_its_chunks_and_then_the_next_request_is_answered() -> None:
    """Fifty events of content, finish and end; a pipelined request waits for its turn."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_post(b'{"stream": true}') + _post(b"{}"))
        events = await _events(reader)
        assert events[-1] == b"[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        assert sum("content" in delta for delta in deltas) == CHUNKS
        assert (await _plain_reply(reader))["object"] == "chat.completion"

    _with_backend(talk)


def test_usage_is_sent_when_asked_for() -> None:
    """`stream_options.include_usage` adds one event with usage and no choices."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_post(b'{"stream":true,"stream_options":{"include_usage":true}}'))
        events = await _events(reader)
        usage = json.loads(events[-2])
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == CHUNKS

    _with_backend(talk)
