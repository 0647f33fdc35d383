"""Control's application on sockets of its own: a TCP port, the command line's and the workers'."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from starlette.types import ASGIApp

from llm_router.admin.application import Entry
from llm_router.admin.server import Server

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
