"""A small HTTP client for tests that look at every byte of a reply: one request, one connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """`headers` have lower-case names; of repeated ones the last."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


async def ask(
    address: Path | tuple[str, int],
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | dict[str, Any] | None = None,
) -> Answer:
    """The reply to a request over TCP or a Unix socket. A dict is sent as JSON."""
    lines = {"host": "localhost", "connection": "close", **(headers or {})}
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        lines.setdefault("content-type", "application/json")
    if body is not None:
        lines["content-length"] = str(len(body))
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return await send(address, head.encode("latin-1") + (body or b""))


async def send(address: Path | tuple[str, int], data: bytes) -> Answer:
    """What comes back for `data` until the server closes. Raises ConnectionError if that is nothing."""
    opening = (
        asyncio.open_unix_connection(str(address)) if isinstance(address, Path) else asyncio.open_connection(*address)
    )
    reader, writer = await opening
    try:
        writer.write(data)
        reply = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    if not reply:
        raise ConnectionError("the server closed the connection without a reply")
    head, _, content = reply.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if found.get("transfer-encoding") == "chunked":
        content = _unchunked(content)
    return Answer(int(first.split()[1]), found, content)


def _unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found, data = found + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return found
