"""A collector that says what it is told to: for the answers that a real one gives only when it is in trouble."""

from __future__ import annotations

import gzip
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Said(NamedTuple):
    """One answer. `status` 0 closes the connection without a word; `held` waits until it is set."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b"{}"
    held: threading.Event | None = None


class Export(NamedTuple):
    """One export that came: path, headers by lower-case names, and the document."""

    path: str
    headers: Mapping[str, str]
    document: Any

    @property
    def spans(self) -> list[dict[str, Any]]:
        (resource,) = self.document["resourceSpans"]
        (scope,) = resource["scopeSpans"]
        return list(scope["spans"])


class Collector:
    """Answers with what is in `answers`, in turn, and with 200 when there is nothing left."""

    def __init__(self) -> None:
        self.answers: deque[Said] = deque()
        self.exports: list[Export] = []
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    @property
    def names(self) -> list[str]:
        """Of all spans that came, in order."""
        return [span["name"] for export in self.exports for span in export.spans]


@contextmanager
def running(port: int = 0) -> Iterator[Collector]:
    """A collector on loopback, until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            collector.connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = gzip.decompress(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            said = collector.answers.popleft() if collector.answers else Said(200)
            collector.exports.append(Export(self.path, headers, json.loads(body)))
            if said.held is not None:
                said.held.wait()
            if not said.status:
                self.close_connection = True
                return
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(said.body)))
            self.end_headers()
            self.wfile.write(said.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that left is what some tests are about."""

    server = Server(("127.0.0.1", port), Handler)
    collector.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
