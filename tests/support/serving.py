"""The whole program as a user runs it: `llm-router serve` in a folder of its own, and what a scrape of it says."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from support.net import free_port
from support.wait import until

SOURCES = Path(__file__).parents[2] / "src"


class Scrape:
    """The samples of one exposition, by name and labels."""

    def __init__(self, text: str) -> None:
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of that name with these labels; 0 if there are none."""
        return sum(
            value
            for sample, present, value in self.samples
            if sample == name and all(present.get(key) == wanted for key, wanted in labels.items())
        )

    def counters(self) -> Mapping[tuple[str, ...], float]:
        """Everything that must never go down."""
        return {
            (name, *sorted(f"{key}={value}" for key, value in labels.items())): value
            for name, labels, value in self.samples
            if name.endswith(("_total", "_bucket", "_count")) and "process_cpu" not in name
        }


class Serving:
    """A running router; leaving the context stops it. `log` is everything it wrote."""

    def __init__(
        self,
        folder: Path,
        config: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        ready: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        self.folder = folder
        self.port, self.metrics_port = free_port(), free_port()
        self._config = config
        self._arguments = arguments
        self._env = env or {}
        self._wait_ready = ready
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        path = self.folder / "llm-router.yaml"
        path.write_text(self._config)
        self._log_path = self.folder / "output.log"
        command = [
            *(sys.executable, "-m", "llm_router", "serve", "--config", str(path)),
            *("--port", str(self.port), "--metrics-port", str(self.metrics_port)),
            *("--data-dir", str(self.folder / "data"), *self._arguments),
        ]
        env = {"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"], "HOME": str(self.folder), **self._env}
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.folder, start_new_session=True
            )
        if self._wait_ready:
            try:
                self.wait_ready(self._timeout_s)
            except BaseException:
                self.kill()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        if error is not None:
            sys.stderr.write(self.log)

    def kill(self) -> None:
        """End the supervisor at once; its children follow."""
        self.process.kill()
        self.process.wait()

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Until the app port says it is ready. Fails at once when the program ends instead."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"it exited with {self.process.returncode}:\n{self.log}"
            return self.status("/health/ready") == 200

        try:
            until(is_ready, timeout_s, "readiness")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    # -- looking ---------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def status(self, path: str, *, monitoring: bool = False) -> int:
        """The status of a GET; 0 if nobody answers."""
        port = self.metrics_port if monitoring else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        except http.client.HTTPException:
            return 0
        finally:
            connection.close()

    def get(self, path: str, *, monitoring: bool = True, **headers: str) -> bytes:
        """The body of a GET that must succeed."""
        port = self.metrics_port if monitoring else self.port
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=sent)
        with urllib.request.urlopen(request, timeout=10) as reply:
            body: bytes = reply.read()
            return body

    def scrape(self) -> Scrape:
        """What the monitoring port exposes now."""
        return Scrape(self.get("/metrics").decode())

    def children(self) -> dict[str, int]:
        """The pids of the supervisor's children by name: control, worker-0…, runner names; Linux."""
        return children_of(self.process.pid)

    def signal(self, child: str, number: signal.Signals) -> int:
        """Send a signal to a child; returns its pid."""
        pid = self.children()[child]
        os.kill(pid, number)
        return pid


def children_of(pid: int) -> dict[str, int]:
    """Living children of a supervisor: role from the module they run, and a number for workers and runners."""
    found: dict[str, int] = {}
    try:
        children = sorted(psutil.Process(pid).children(), key=lambda child: child.pid)
    except psutil.NoSuchProcess:
        return found
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            modules = [part for part in child.cmdline() if part.startswith("llm_router.processes.")]
            if modules:
                role = modules[0].rpartition(".")[2]
                count = sum(name.startswith(role) for name in found)
                found[role if role == "control" else f"{role}-{count}"] = child.pid
    return found


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    rss: int = psutil.Process(pid).memory_info().rss
    return rss


def remote_config(url: str, *, extra: str = "") -> str:
    """One model `m` on one backend `b` at this base URL."""
    return f"""
backends:
  - name: b
    url: {url}
models:
  - name: m
    deployments:
      - backend: b
        model: scripted
{extra}
"""
