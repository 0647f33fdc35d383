"""Control's end of the channel to the supervisor: what children there are, and orders to start and stop runners.

JSON objects, one a line, over a socket pair. The supervisor sends its state when control connects and after every
change; orders are answered by their id. Not for: what to start (local.py) or the supervisor's end (channel.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec

from llm_router.errors import Unavailable
from llm_router.processes.channel import Lines

_log = logging.getLogger(__name__)


class ChildState(msgspec.Struct, frozen=True, kw_only=True):
    """One child as the supervisor sees it. `info` is what it reported with `ready` (or `failed`)."""

    name: str
    role: Literal["worker", "control", "runner"]
    pid: int = 0
    state: Literal["starting", "ready", "backoff", "stopping", "failed"] = "starting"
    restarts: int = 0
    started_time: float = 0.0
    info: dict[str, Any] = {}
    error: str = ""
    payload: dict[str, Any] = {}


class SupervisorState(msgspec.Struct, frozen=True, kw_only=True):
    """All children at one moment. `draining`: the router is leaving."""

    draining: bool = False
    children: tuple[ChildState, ...] = ()

    def of_role(self, role: str) -> tuple[ChildState, ...]:
        return tuple(child for child in self.children if child.role == role)

    def runner(self, name: str) -> ChildState | None:
        return next((child for child in self.children if child.role == "runner" and child.name == name), None)


class OrderRefused(Exception):
    """The supervisor did not do what it was told; the message is its own."""


class Orders(asyncio.Protocol):
    """The supervisor as control sees it. Lives in one event loop.

    Args:
        on_state: called in the loop with each new state.
        on_lost: called once if the supervisor closes the channel.
    """

    def __init__(self, on_state: Callable[[SupervisorState], None], on_lost: Callable[[], None] = lambda: None) -> None:
        self.state = SupervisorState()
        self._on_state = on_state
        self._on_lost = on_lost
        self._lines = Lines()
        self._states = 0
        self._news = asyncio.Event()
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._transport: asyncio.Transport | None = None

    async def connect(self, sock: socket.socket) -> None:
        """Take over the inherited socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=sock)

    async def first_state(self, timeout_s: float) -> bool:
        """Wait until the supervisor told its state. False if it did not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._newer_than(0)
        except TimeoutError:
            return False
        return True

    async def next_state(self) -> None:
        """Wait until the supervisor tells another state. Raises: Unavailable when it went away."""
        await self._newer_than(self._states)

    async def start_runner(self, name: str, payload: dict[str, Any]) -> None:
        """Have a runner process started. On return it is in the state; that it is ready shows there later.

        Raises: OrderRefused, Unavailable.
        """
        await self._order("start_runner", name=name, payload=payload)

    async def stop_runner(self, name: str, grace_s: float) -> None:
        """End a runner; on return it is gone, from the state too. Raises: OrderRefused, Unavailable."""
        await self._order("stop_runner", name=name, grace_s=grace_s)

    async def announce(self, text: str) -> None:
        """Print on the supervisor's stdout. Raises: OrderRefused, Unavailable."""
        await self._order("announce", text=text)

    async def set_log(self, level: str, console: str) -> None:
        """Let the supervisor's own lines be of this level and form. Raises: OrderRefused, Unavailable."""
        await self._order("set_log", level=level, console=console)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _order(self, op: str, **fields: Any) -> None:
        """Give an order and wait for the answer, which the state that shows its effect comes before."""
        if self._transport is None:
            raise Unavailable("the supervisor cannot be reached")
        self._next_id += 1
        id = self._next_id
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[id] = answer
        try:
            self._transport.write(json.dumps({"id": id, "op": op, **fields}).encode() + b"\n")
            reply = await answer
        finally:
            del self._waiting[id]
        if not reply.get("ok"):
            raise OrderRefused(str(reply.get("error", "no reason given")))

    async def _newer_than(self, states: int) -> None:
        while self._states <= states:
            if self._transport is None:
                raise Unavailable("the supervisor went away")
            await self._news.wait()

    # -- asyncio.Protocol ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for message in self._lines.feed(data):
            if message.get("event") == "state":
                self._take_state(message)
            elif (answer := self._waiting.get(message.get("id", -1))) is not None and not answer.done():
                answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the supervisor went away"))
        self._wake()
        self._on_lost()

    def _take_state(self, message: dict[str, Any]) -> None:
        try:
            self.state = msgspec.convert(message, SupervisorState)
        except msgspec.ValidationError as error:
            _log.error("the supervisor sent a state that cannot be read: %s", error)
            return
        self._states += 1
        self._wake()
        self._on_state(self.state)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
