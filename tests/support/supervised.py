"""A running supervisor over scripted children, in its own process, with its log and its sockets at hand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from llm_router.processes.plan import LaunchPlan, memory_file, unix_address
from support.wait import until

CHILD = Path(__file__).with_name("scripted_child.py")
MAIN = """
import os, sys
if len(sys.argv) > 4:
    os.open(sys.argv[4], os.O_RDWR)  # the first terminal that the leader of a session opens becomes its own
from llm_router.processes.supervisor import main
child = (sys.executable, sys.argv[3])
sys.exit(main(sys.argv[1:3], {"worker": child, "control": child, "runner": child}))
"""


class Supervised:
    """`log` is what supervisor and children wrote to stderr so far, `out` what was announced.

    Args:
        terminal: the path of a terminal that is to be the supervisor's.
    """

    def __init__(self, plan: LaunchPlan, folder: Path, terminal: str = "") -> None:
        self.plan = plan
        self._log = folder / "stderr.txt"
        self._out = folder / "stdout.txt"
        fd = memory_file("plan", plan.to_json())
        with self._log.open("wb") as log, self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, "--plan-fd", str(fd), str(CHILD), *filter(None, [terminal])],
                pass_fds=[fd],
                start_new_session=bool(terminal),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )
        os.close(fd)
        self._orders = 0

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def out(self) -> str:
        return self._out.read_text()

    def ask(self, line: str, address: Any = None) -> Any:
        """The answer of control, or of a worker if `address` is that of the app port."""
        with connected(self.plan, address) as connection:
            return exchange(connection, line)

    def app(self) -> tuple[str, int]:
        return self.plan.host, self.plan.port

    def state(self) -> dict[str, Any]:
        """The newest state that control has; {} while control is away."""
        try:
            state: dict[str, Any] = self.ask("state")
        except OSError:
            return {}
        return state

    def child(self, name: str) -> dict[str, Any]:
        """What the state says about one child; {} if nothing."""
        return next((child for child in self.state().get("children", []) if child["name"] == name), {})

    def wait_for(
        self, name: str, state: str = "ready", unlike_pid: int = -1, timeout_s: float = 10.0
    ) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            child = self.child(name)
            return child if child.get("state") == state and child["pid"] != unlike_pid else {}

        return until(found, timeout_s, f"{name} being {state}")

    def order(self, op: str, **fields: Any) -> dict[str, Any]:
        """Have control send an order; the supervisor's answer."""
        self._orders += 1
        answer: dict[str, Any] = self.ask("order " + json.dumps({"id": self._orders, "op": op, **fields}))
        return answer

    def wait_for_exit(self, timeout_s: float = 10.0) -> int:
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Nothing of it is left afterwards: the test is over."""
        if self.process.poll() is None:
            children = [child["pid"] for child in self.state().get("children", [])]
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            for pid in children:
                if pid and is_alive(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def connected(plan: LaunchPlan, address: Any = None) -> Iterator[socket.socket]:
    """A connection to control's command line socket, or to `address`."""
    family = socket.AF_UNIX if address is None else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(5.0)
        connection.connect(unix_address(plan.cli_path) if address is None else address)
        yield connection


def exchange(connection: socket.socket, line: str) -> Any:
    """Send a line, return the answer. Raises ConnectionError when the connection ends instead."""
    connection.sendall(line.encode() + b"\n")
    return receive(connection)


def receive(connection: socket.socket) -> Any:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("the connection ended")
        data += more
    return json.loads(data)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody reaps does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
