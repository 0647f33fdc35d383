"""Control's application: asked in the test's own loop, or on a TCP port, the command line's and the workers' socket."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from starlette.routing import Route
from starlette.types import ASGIApp, Message

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import KeyRing, KeyScope
from llm_router.admin.application import Entry, Rights, build
from llm_router.admin.server import Server
from support.aio import run
from support.ask import Answer

Address = Path | tuple[str, int]


class Doors(NamedTuple):
    """Where each entry is."""

    monitoring: tuple[str, int]
    cli: Path
    forward: Path


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, folder: Path) -> AsyncIterator[Doors]:
    """Serve `app` on all three entries; its sockets are made in `folder`."""
    tcp = socket.create_server(("127.0.0.1", 0))
    doors = Doors(tcp.getsockname(), folder / "cli.sock", folder / "forward.sock")
    entries = {tcp: Entry.MONITORING}
    for path, entry in ((doors.cli, Entry.CLI), (doors.forward, Entry.FORWARD)):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen()
        entries[sock] = entry
    server = Server(app, entries)
    await server.start()
    try:
        yield doors
    finally:
        await server.aclose()


def asked(
    routes: Sequence[Route],
    method: str,
    path: str,
    query: str = "",
    *,
    entry: Entry = Entry.CLI,
    closed: Mapping[Entry, frozenset[KeyScope]] | None = None,
) -> Answer:
    """What an application of these routes answers. There are no keys.

    Args:
        closed: what needs a key, as in `Rights`; nothing by default.
    """
    app = build(routes, lambda: Guard(AccessSettings()), lambda: Rights(KeyRing([]), closed or {}))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
        "client": None,
        "state": {"entry": entry},
    }
    run(app(scope, receive, send))  # type: ignore[arg-type]
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))
