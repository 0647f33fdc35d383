"""A tiny real child of the supervisor: `python scripted_child.py --spec-fd N` plays worker, control or runner.

What it does is told by `plan.overrides[<name or role>]` (workers, control) or the payload (runners):
`exit_at_start` N, `fail` an error to report instead of ready, `deaf` to ignore drain, `mute` never to be ready.
A worker serves lines on its listening sockets, control on the command line's socket, a runner on nothing.

    pid            its pid                       hang           stop turning, for good
    spec           what it was started with      exit N         leave with status N
    hold           stays until `go` follows      reloads        how many reloads were ordered
    order {...}    (control) send an order, answer with the reply
    raw TEXT       (control) send a line that is no order
    state          (control) the newest state
    restarts       (control) how often worker-0 was replaced, by reason, from the supervisor's segment
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from llm_router import families
from llm_router.observe.metrics.slots import Reader, Segment
from llm_router.processes.channel import Lines
from llm_router.processes.child import Child


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        self.is_held = False


class ScriptedChild:
    def __init__(self, child: Child) -> None:
        self.child = child
        spec = child.spec
        overrides = spec.plan.overrides
        self.script: dict[str, Any] = (
            spec.payload if spec.role == "runner" else overrides.get(spec.name, overrides.get(spec.role, {}))
        )
        self.selector = selectors.DefaultSelector()
        self.wakeup, self.woken = socket.socketpair()
        self.selector.register(self.wakeup, selectors.EVENT_READ)
        self.listeners = [socket.socket(fileno=fd) for fd in spec.listen_fds]
        self.channel: socket.socket | None = None
        self.lines = Lines()
        self.state: dict[str, Any] = {}
        self.waiting_for: dict[int, _Connection] = {}
        self.reloads = 0
        self.draining = False
        self.connections: set[_Connection] = set()
        if spec.role == "control":
            self.listeners.append(socket.socket(fileno=spec.payload["cli_fd"]))
            self.channel = socket.socket(fileno=spec.payload["channel_fd"])
            self.channel.setblocking(False)
            self.selector.register(self.channel, selectors.EVENT_READ)
        for listener in self.listeners:
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        child = self.child
        if (status := self.script.get("exit_at_start")) is not None:
            print("I will not start", file=sys.stderr)
            raise SystemExit(status)
        child.watch(lambda: self.post(b"d"), lambda: self.post(b"o"), lambda: self.post(b"h"))
        if error := self.script.get("fail"):
            child.report({"event": "failed", "code": "runner_failed", "error": error})
            return
        if not self.script.get("mute"):
            child.report({"event": "ready", "port": self.script.get("port", 0)})
        while not (self.draining and not any(connection.is_held for connection in self.connections)):
            child.beat()
            for key, _ in self.selector.select(0.1):
                self.serve(key.fileobj)

    def post(self, order: bytes) -> None:
        self.woken.send(order)

    def serve(self, source: Any) -> None:
        if source is self.wakeup:
            for order in self.wakeup.recv(100).decode():
                self.obey(order)
        elif source in self.listeners:
            try:
                connection = _Connection(source.accept()[0])
            except BlockingIOError:
                return
            self.connections.add(connection)
            self.selector.register(connection.sock, selectors.EVENT_READ, connection)
        elif self.channel is not None and source is self.channel:
            messages, ended = self.lines.read_all(source.fileno())
            if ended:
                self.selector.unregister(source)
            for message in messages:
                self.on_message(message)
        else:
            self.read(self.selector.get_key(source).data)

    def obey(self, order: str) -> None:
        if order == "h":
            self.reloads += 1
        elif not self.script.get("deaf"):
            self.draining = True
            for listener in self.listeners:
                self.selector.unregister(listener)
                listener.close()
            self.listeners = []

    def on_message(self, message: dict[str, Any]) -> None:
        if message.get("event") == "state":
            self.state = message
        elif connection := self.waiting_for.pop(message["id"], None):
            self.answer(connection, message)

    def answer(self, connection: _Connection, value: Any) -> None:
        connection.sock.sendall(json.dumps(value).encode() + b"\n")

    def read(self, connection: _Connection) -> None:
        data = connection.sock.recv(65536)
        if not data:
            self.selector.unregister(connection.sock)
            self.connections.discard(connection)
            connection.sock.close()
            return
        *lines, connection.rest = (connection.rest + data).split(b"\n")
        for line in lines:
            self.do(connection, *line.decode().split(" ", 1))

    def do(self, connection: _Connection, verb: str, argument: str = "") -> None:
        match verb:
            case "pid":
                self.answer(connection, os.getpid())
            case "spec":
                self.answer(connection, json.loads(self.child.spec.to_json()))
            case "state":
                self.answer(connection, self.state)
            case "reloads":
                self.answer(connection, self.reloads)
            case "order":
                order = json.loads(argument)
                self.waiting_for[order["id"]] = connection
                assert self.channel is not None
                self.channel.sendall(json.dumps(order).encode() + b"\n")
            case "raw":
                assert self.channel is not None
                self.channel.sendall(argument.encode() + b"\n")
            case "hold":
                connection.is_held = True
                self.answer(connection, "holding")
            case "go":
                self.answer(connection, "held until now")
                connection.is_held = False
            case "restarts":
                segment = Segment.attach(dict(self.child.spec.segments)["supervisor"], writable=False)
                rows = Reader([segment], [families.WORKER_RESTARTS]).collect().rows(families.WORKER_RESTARTS)
                self.answer(connection, {row.labels[1]: row.values[0] for row in rows if row.labels[0] == "worker-0"})
            case "exit":
                os._exit(int(argument))
            case "hang":
                hang_here()


def hang_here() -> None:
    """Never comes back; the name is what a test looks for in the stack."""
    while True:
        time.sleep(60)


if __name__ == "__main__":
    # A terminal's Ctrl-C and a careless kill reach no child; from_argv sees to that.
    tied = Child.from_argv()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    ScriptedChild(tied).run()
