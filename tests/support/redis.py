"""A real Redis server for tests: on a free port, in a folder of its own, to be stopped, killed, frozen and started again.

Not for: data that outlives a start; nothing is written to disk.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from support.net import free_port
from support.tools import require
from support.wait import until


class RedisServer:
    """A running redis-server (or another `program` that takes its options); leaving the context ends it.

    The port stays the same over `stop` or `kill` and `start`; the data does not.
    """

    def __init__(self, *options: str, program: str = "") -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._program = program or require("redis-server")
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="llm-router-redis-")
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Run it, with no data; returns when it answers."""
        assert self._process is None, "it runs already"
        command = [
            *(self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder),
            *("--save", "", "--appendonly", "no", "--logfile", str(Path(self._folder) / "log"), *self._options),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, what="an answer of redis-server")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"redis-server ended:\n{(Path(self._folder) / 'log').read_text()}"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64)[:1] in {b"+", b"-"}  # -NOAUTH is an answer too
        except OSError:
            return False

    def stop(self) -> None:
        """End it as an operator would."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as the kernel would: no goodbye to anyone."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)  # one that is frozen must be able to go
        self._process.wait(10)
        self._process = None

    def freeze(self) -> None:
        """Let it keep its connections and answer nothing, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
