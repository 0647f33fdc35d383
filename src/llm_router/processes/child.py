"""The child's end of what ties it to the supervisor: specification, heartbeat, reports, lifeline.

`Child.from_argv()` comes first in a child's main: from then on a supervisor that dies takes the child
with it, however long the imports that follow last. `watch` says what to do about orders later.
The lifeline is a pipe that only the supervisor holds open. Its bytes are orders (`d` drain, `h` reload);
its end means that the supervisor is gone. A thread of its own reads it, so that a main thread that hangs
leaves too. Not for: what a child does. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, cast

from llm_router import __version__
from llm_router.observe.logs.console import Console, Form
from llm_router.observe.logs.service import Service
from llm_router.processes.board import Board
from llm_router.processes.plan import ChildSpec, LaunchPlan, read_file

DRAIN: Final = b"d"
RELOAD: Final = b"h"

EXIT_REFUSED: Final = 2
"""Exit status of a child that printed why it will never start (a bad configuration): the supervisor gives up."""

EXIT_ORPHANED: Final = 3

LONGEST_REPORT_BYTES: Final = 65536

_ORPHAN_S: Final = 4.0
"""Seconds a child without a supervisor has for ending: nothing may be left after 5."""

_CLOSE_S: Final = 0.2
"""Seconds a loop has for closing its listening sockets itself, before the thread does it for one that hangs."""

_Callback = Callable[[], None]


def log_to_stderr(process: str, plan: LaunchPlan | None = None) -> Console:
    """Let `logging` write to stderr, which is the supervisor's, in the shape of all processes.

    Args:
        process: its name, like `worker-0`.
        plan: says in which form and from which level on; without one, as a terminal or pipe wants it, from info on.
    Returns: the handler, to be told of another form.
    """
    if plan is None:
        plan = LaunchPlan("", "")
    service = Service.here(__version__, plan.environment, plan.service)
    console = Console(process, service, form=cast("Form", plan.console))
    logging.basicConfig(level=logging.INFO, handlers=[console])  # of libraries
    logging.getLogger("llm_router").setLevel(plan.log_level.upper())
    return console


class Child:
    """The ties of this process to its supervisor. `report` may be called from any thread, `beat` from one."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.board = Board.attach(spec.board_fd)
        self._report_lock = threading.Lock()
        self._lock = threading.Lock()
        self._on_drain: _Callback | None = None
        self._on_orphaned: _Callback | None = None
        self._on_reload: _Callback | None = None
        self._watching = False
        self._reload_wanted = False
        self._listeners = [(fd, os.fstat(fd).st_ino) for fd in _listening(spec)]

    @classmethod
    def from_argv(cls, argv: Sequence[str] | None = None) -> Self:
        """The child that `--spec-fd N` describes, tied to its supervisor from now on.

        Call it in the main thread. SIGINT and SIGTERM are ignored from here on (only the supervisor heeds
        them) and SIGUSR1 prints the stacks of all threads on stderr. Exits 2 on a bad command line.
        """
        parser = argparse.ArgumentParser(description="A process of llm-router; `llm-router serve` starts it.")
        parser.add_argument("--spec-fd", type=int, required=True)
        child = cls(ChildSpec.from_json(read_file(parser.parse_args(argv).spec_fd)))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=False)
        threading.Thread(target=child._follow, name="lifeline", daemon=True).start()
        return child

    def beat(self, now: float | None = None) -> None:
        """Tell the supervisor that this process turns; `now` is time.monotonic(). At least once a second."""
        self.board.beat(self.spec.board_index, time.monotonic() if now is None else now)

    def report(self, message: dict[str, Any]) -> None:
        """Send one report to the supervisor, like {"event": "ready", ...}; without a supervisor, to nobody.

        Raises ValueError for a report over 64 KiB.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > LONGEST_REPORT_BYTES:
            raise ValueError(f"a report of {len(line)} bytes is over the bound of {LONGEST_REPORT_BYTES}")
        view = memoryview(line)
        with self._report_lock, contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(self.spec.status_fd, view) :]

    def watch(self, on_drain: _Callback, on_orphaned: _Callback, on_reload: _Callback | None = None) -> None:
        """Say what to do about orders. The callbacks run in the lifeline's thread: post to your loop and return.

        Args:
            on_drain: end what is in flight, begin nothing new, exit 0. A drain ordered before `watch` was
                called ends the process at once: it had nothing in flight.
            on_orphaned: the supervisor is gone: close the listening sockets at once and leave. 0.2 s later
                they are closed for you, 4 s later the process ends with status 3.
            on_reload: read the configuration again; called at once if that was ordered before now.
        """
        with self._lock:
            self._on_drain, self._on_orphaned, self._on_reload = on_drain, on_orphaned, on_reload
            self._watching = True
            reload_missed, self._reload_wanted = self._reload_wanted, False
        if reload_missed and on_reload is not None:
            on_reload()

    # -- the lifeline's thread ----------------------------------------------------------------------

    def _follow(self) -> None:
        while order := os.read(self.spec.lifeline_fd, 1):
            with self._lock:
                watching = self._watching
                if order == RELOAD and not watching:
                    self._reload_wanted = True
            if order == DRAIN:
                if not watching:
                    os._exit(0)
                _call(self._on_drain)
            elif order == RELOAD and watching:
                _call(self._on_reload)
        self._leave()

    def _leave(self) -> None:
        ends_at = time.monotonic() + _ORPHAN_S
        if not self._watching:
            os._exit(EXIT_ORPHANED)
        _call(self._on_orphaned)
        time.sleep(_CLOSE_S)
        for fd, inode in self._listeners:
            _stop_listening(fd, inode)
        time.sleep(max(0.0, ends_at - time.monotonic()))
        os._exit(EXIT_ORPHANED)


def _call(callback: _Callback | None) -> None:
    """Call back; a callback that raises (its loop is closed already) must not end the lifeline's thread."""
    if callback is None:
        return
    try:
        callback()
    except Exception as error:
        os.write(2, f"lifeline: {type(error).__name__}: {error}\n".encode())


def _listening(spec: ChildSpec) -> list[int]:
    """Every listening socket the child inherited."""
    named = (spec.payload.get(key, -1) for key in ("monitoring_fd", "cli_fd", "forward_fd", "snapshot_fd"))
    return spec.listen_fds + ([fd for fd in named if fd >= 0] if spec.role == "control" else [])


def _stop_listening(fd: int, inode: int) -> None:
    """Close a listening socket under a hung thread that may still hold its descriptor.

    The number may belong to something else by now, and a plain close could hand it to somebody; so the
    socket is shut down in place, and only if it is still the same one and still listens.
    """
    with contextlib.suppress(OSError):
        if os.fstat(fd).st_ino != inode:
            return
        listener = socket.socket(fileno=fd)
        try:
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.shutdown(socket.SHUT_RD)
        finally:
            listener.detach()
