"""The supervisor's end of the channel to control, played by the test: children without processes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from llm_router.processes.channel import Lines


class Overseer:
    """Obeys orders at once; what becomes of a started runner is told by `outcomes`, by name.

    An outcome is what the child becomes, field by field: `{"state": "ready", ...}`; without one it stays `starting`.
    Used from the loop's thread by calling `turn` through `loop.add_reader`.
    """

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.children: list[dict[str, Any]] = []
        self.outcomes: dict[str, list[dict[str, Any]]] = {}
        self.orders: list[dict[str, Any]] = []
        self.draining = False
        self._lines = Lines()
        self._pids: Iterator[int] = iter(range(100, 10_000))

    def add(self, name: str, role: str, **fields: Any) -> dict[str, Any]:
        """One more child, ready unless `fields` say otherwise."""
        child = {"name": name, "role": role, "pid": next(self._pids), "state": "ready", **fields}
        self.children.append(child)
        return child

    def become(self, name: str, **fields: Any) -> None:
        """Change a child and tell control."""
        next(child for child in self.children if child["name"] == name).update(fields)
        self.tell()

    def tell(self) -> None:
        """Send the state."""
        self._send({"event": "state", "draining": self.draining, "children": self.children})

    def turn(self) -> None:
        """Obey what has arrived."""
        for order in self._lines.read_all(self.ours.fileno())[0]:
            self.orders.append(order)
            error = getattr(self, f"_{order['op']}")(order)
            is_changed = not error and order["op"] not in {"announce", "set_log"}
            if is_changed:
                self.tell()
            self._send({"id": order["id"], "ok": not error, **({"error": error} if error else {})})
            if is_changed:
                self._become_what_is_scripted(order["name"])

    def close(self) -> None:
        self.ours.close()

    def _start_runner(self, order: dict[str, Any]) -> str:
        old = [child for child in self.children if child["name"] == order["name"]]
        if old and old[0]["state"] != "failed":
            return f"runner {order['name']!r} is there already ({old[0]['state']})"
        self.children = [child for child in self.children if child not in old]
        self.add(order["name"], "runner", state="starting", payload=order["payload"])
        return ""

    def _stop_runner(self, order: dict[str, Any]) -> str:
        left = [child for child in self.children if child["name"] != order["name"]]
        if len(left) == len(self.children):
            return f"there is no runner {order['name']!r}"
        self.children = left
        return ""

    def _announce(self, order: dict[str, Any]) -> str:
        return ""

    def _set_log(self, order: dict[str, Any]) -> str:
        return ""

    def _become_what_is_scripted(self, name: str) -> None:
        if any(child["name"] == name for child in self.children):
            for outcome in self.outcomes.get(name, ()):
                self.become(name, **outcome)

    def _send(self, message: dict[str, Any]) -> None:
        self.ours.sendall(json.dumps(message).encode() + b"\n")
