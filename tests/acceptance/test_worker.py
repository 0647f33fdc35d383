"""A worker process by itself: the test stands in for supervisor and control."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_router.observe.metrics.slots import Segment
from llm_router.processes.board import Board
from llm_router.processes.listen import listen_unix
from llm_router.processes.news import encode, frame
from llm_router.processes.plan import ChildSpec, LaunchPlan, memory_file, module_command
from llm_router.processes.snapshot import Snapshot
from llm_router.routing.table import RoutingTable
from llm_router.testing import ScriptedBackend
from support.gateway import table
from support.serving import SOURCES
from support.wait import until


class LoneWorker:
    """A worker that is told what the test likes. Leaving the context is the supervisor's death."""

    def __init__(self, folder: Path) -> None:
        plan = LaunchPlan(str(folder), str(folder))
        Path(plan.run_dir).mkdir()
        self._listener = listen_unix(plan.snapshot_path)
        self._listener.settimeout(10)
        with socket.create_server(("127.0.0.1", 0)) as app:
            self.port = app.getsockname()[1]
            self._board = Board.create(2)
            self._segment = Segment.create("worker-0")
            lifeline, self._lifeline = os.pipe()
            self._status, status = os.pipe()
            spec = ChildSpec(
                role="worker",
                name="worker-0",
                index=0,
                lifeline_fd=lifeline,
                status_fd=status,
                board_fd=self._board.fd,
                board_index=1,
                plan=plan,
                segments=[("worker-0", self._segment.fd)],
                listen_fds=[app.fileno()],
            )
            spec_fd = memory_file("spec", spec.to_json())
            self._log = (folder / "stderr").open("wb")
            inherited = [lifeline, status, self._board.fd, self._segment.fd, app.fileno(), spec_fd]
            self.process = subprocess.Popen(
                [*module_command("llm_router.processes.worker"), "--spec-fd", str(spec_fd)],
                stderr=self._log,
                pass_fds=inherited,
                env={"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"]},
            )
            for fd in (lifeline, status, spec_fd):
                os.close(fd)
        self._control, _ = self._listener.accept()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    def publish(self, routing: RoutingTable) -> None:
        """Send a snapshot, as control does."""
        self._control.sendall(frame(encode(Snapshot(version=1, table=routing))))

    def wait_ready(self) -> None:
        assert b"ready" in os.read(self._status, 4096), self.log

    def models(self) -> int:
        """The status of a request that the worker answers itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status
        finally:
            connection.close()

    def close(self) -> None:
        os.close(self._lifeline)
        self.process.wait(10)
        os.close(self._status)
        self._control.close()
        self._listener.close()
        self._log.close()
        self._board.close()
        self._segment.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[LoneWorker]:
    worker = LoneWorker(tmp_path)
    try:
        yield worker
    finally:
        worker.close()


UNUSABLE = table("http://[::1/v1")


def test_a_worker_that_can_never_serve_ends_with_the_reason(worker: LoneWorker) -> None:
    """At once, not when the supervisor takes it for hung a minute later."""
    worker.publish(UNUSABLE)
    assert worker.process.wait(10) == 1
    assert "the worker cannot go on" in worker.log
    assert "invalid host or port" in worker.log


def test_a_snapshot_that_cannot_be_used_leaves_the_last_one_in_force(worker: LoneWorker) -> None:
    """The worker says so once, and serves on."""
    with ScriptedBackend() as backend:
        worker.publish(table(backend.base_url))
        worker.wait_ready()
        worker.publish(UNUSABLE)
        until(lambda: "stays in force" in worker.log)
        assert worker.models() == 200
        worker.publish(table(backend.base_url))
        assert worker.models() == 200
        assert worker.log.count("stays in force") == 1
        assert worker.process.poll() is None
