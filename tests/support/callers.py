"""Callers of a running router: one request a connection, crowds of them at once, and an administrator.

Not for: load that goes on while things are killed (soaking.py), or replies byte by byte (ask.py).
"""

from __future__ import annotations

import http.client
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from support.serving import Serving

T = TypeVar("T")

CHAT = "/v1/chat/completions"
_addresses = itertools.count(2)
_numbers = itertools.count(1)


class Reply(NamedTuple):
    """`headers` have lower-case names; status 0 stands for a reply that did not come whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def retry_after_s(self) -> int:
        return int(self.headers["retry-after"])

    @property
    def message(self) -> str:
        """Of an error, in words."""
        message: str = self.json()["error"]["message"]
        return message


BROKEN = Reply(0, {}, b"")


def new_address() -> str:
    """An address of this machine that no caller had before: what others did wrong does not slow it."""
    number = next(_addresses)
    return f"127.0.{number >> 8}.{number & 255}"


def request(
    port: int,
    method: str,
    path: str,
    body: object = None,
    *,
    key: str = "",
    headers: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
    connection: http.client.HTTPConnection | None = None,
) -> Reply:
    """The reply to one request, `BROKEN` if it did not come whole."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=(address, 0))
    sent = {"authorization": f"Bearer {key}"} if key else {}
    data = None
    if body is not None:
        sent["content-type"] = "application/json"
        data = json.dumps(body).encode()
    try:
        own.request(method, path, data, {**sent, **(headers or {})})
        reply = own.getresponse()
        content = reply.read()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, content)
    except (OSError, http.client.HTTPException):
        own.close()
        return BROKEN
    finally:
        if connection is None:
            own.close()


def chat(port: int, key: str = "", model: str = "m", *, text: str = "one two three", **more: Any) -> Reply:
    """A chat request; what is no argument of `request` is a field of its body."""
    passed = {name: more.pop(name) for name in ("headers", "address", "connection") if name in more}
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return request(port, "POST", CHAT, body, key=key, **passed)


def crowd(count: int, call: Callable[[int], T], at_once: int = 12) -> list[T]:
    """`call(0)` to `call(count - 1)`, so many at once."""
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(call, range(count)))


def statuses(replies: list[Reply]) -> dict[int, int]:
    """How many replies had which status."""
    found: dict[int, int] = {}
    for reply in replies:
        found[reply.status] = found.get(reply.status, 0) + 1
    return found


class Callers:
    """Threads that call one after the other until the context is left, and note what each call gave and when it began.

    Args:
        call: gets the thread's connection and the number of its call.
    """

    def __init__(self, port: int, call: Callable[[http.client.HTTPConnection, int], Reply], threads: int = 4) -> None:
        self.seen: list[tuple[float, Reply]] = []
        self._port = port
        self._call = call
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self, *wanted: int) -> int:
        """How many replies so far had one of these statuses."""
        with self._lock:
            return sum(reply.status in wanted for _, reply in self.seen)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        for number in itertools.count():
            if self._stop.is_set():
                break
            began_at = time.monotonic()
            reply = self._call(connection, number)
            with self._lock:
                self.seen.append((began_at, reply))
        connection.close()


class Administrator:
    """Makes keys in a running router and asks it what was used, over HTTP. `key` where one is needed."""

    def __init__(self, serving: Serving, key: str = "") -> None:
        self._serving = serving
        self._key = key

    def ask(self, method: str, path: str, body: object = None, *, status: int = 200) -> Any:
        """What it answers; it must answer with `status`."""
        reply = request(self._serving.metrics_port, method, path, body, key=self._key)
        assert reply.status == status, (reply.status, reply.body)
        return reply.json()

    def create(self, **fields: Any) -> tuple[str, str]:
        """A new key: its text and its id."""
        made = self.ask("POST", "/admin/keys", {"name": f"key {next(_numbers)}", **fields}, status=201)
        return made["secret"], made["key"]["id"]

    def limited(self, **limits: float) -> str:
        """The text of a new key with these limits."""
        return self.create(limits=limits)[0]

    def revoke(self, id: str) -> None:
        self.ask("DELETE", f"/admin/keys/{id}")

    def used(self, query: str = "by=") -> Any:
        """`GET /admin/usage`."""
        return self.ask("GET", f"/admin/usage?{query}")

    def requests(self, query: str = "by=") -> int:
        """How many inferences are stored."""
        count: int = self.used(query)["total"]["requests"]
        return count


def rows(folder: Path, where: str = "1", *values: object) -> list[dict[str, Any]]:
    """Usage rows in the data folder's SQLite file, in the order of their ends."""
    connection = sqlite3.connect(f"file:{folder / 'data' / 'accounts.db'}?mode=ro", uri=True, timeout=5)
    connection.row_factory = sqlite3.Row
    try:
        found = connection.execute(f"SELECT * FROM llm_router_usage WHERE {where} ORDER BY time_us", values)
        return [dict(row) for row in found]
    finally:
        connection.close()
