"""What is measured: the bare backend, nginx as plain proxy, and the gateway; how each is started and reached.

A contender is handed the backend's port and gives a command, an address and headers. All of them stand between the
same load generator and the same backend. Not for: other gateways (peers.py), which have to be installed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.backend import MODEL
from benchmarks.processes import Role, free_port, own_folder, running

CHAT_PATH: Final = "/v1/chat/completions"


def _one_role(command: str) -> str:
    return "process"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One thing to measure.

    Args:
        name: how it is called in tables.
        version: what it says about itself.
        url: where chat requests go.
        command: starts it in the foreground; empty when nothing has to be started.
        ready_url: answers 200 once it can serve.
        environment: its whole environment; None passes ours on.
        role: names a process of its tree by its command line.
        paced_connections: paced streams at once that it can carry on one core without falling behind.
        plain_share, burst_share: length of its plain runs and number of its burst streams, against the plan's.
        warm_up_s: how long it is loaded before anything counts.
        ready_within_s: how long its start may take.
        is_frozen_between: stopped while others are measured, because it works in the background when idle.
    """

    name: str
    version: str
    url: str
    command: tuple[str, ...] = ()
    ready_url: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] | None = None
    role: Role = _one_role
    paced_connections: int = 50
    plain_share: float = 1.0
    burst_share: float = 1.0
    warm_up_s: float = 1.0
    ready_within_s: float = 30.0
    is_frozen_between: bool = False


@contextlib.contextmanager
def started(contender: Contender, *, cpu: int, folder: Path) -> Iterator[int]:
    """The contender running on `cpu`; gives the id of its root process, 0 when there is none. Raises StartFailed."""
    if not contender.command:
        yield 0
        return
    log = folder / f"{contender.name.replace(' ', '-')}.log"
    with running(
        contender.command,
        cpu=cpu,
        log=log,
        ready_url=contender.ready_url,
        environment=contender.environment,
        ready_within_s=contender.ready_within_s,
    ) as process:
        yield process.pid


@contextlib.contextmanager
def backend(*, cpu: int, folder: Path) -> Iterator[tuple[int, int]]:
    """The mock backend on `cpu`; gives its port and process id."""
    port = free_port()
    command = (sys.executable, "-m", "benchmarks.backend", "--port", str(port))
    environment = {**os.environ, "PYTHONPATH": str(own_folder())}
    ready = f"http://127.0.0.1:{port}/health"
    with running(command, cpu=cpu, log=folder / "backend.log", ready_url=ready, environment=environment) as process:
        yield port, process.pid


def direct(backend_port: int) -> Contender:
    """Nothing in between: what load generator and backend take by themselves."""
    version = f"Python {sys.version.split()[0]}, uvloop"
    return Contender(name="direct", version=version, url=f"http://127.0.0.1:{backend_port}{CHAT_PATH}")


# One worker, keep-alive on both sides, no log, and replies passed on as they come: the cheapest nginx that can still
# carry a stream. Limits are raised so that no connection is closed within a run.
_NGINX_CONF: Final = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  client_body_buffer_size 64k;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream backend {{
    server 127.0.0.1:{backend_port};
    keepalive 512;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def nginx(backend_port: int, folder: Path) -> Contender:
    """nginx as plain proxy. Raises FileNotFoundError when it is not installed."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        raise FileNotFoundError("nginx is not installed (Debian: apt-get install nginx)")
    own = folder / "nginx"
    own.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = own / "nginx.conf"
    config.write_text(_NGINX_CONF.format(folder=own, port=port, backend_port=backend_port), encoding="utf-8")
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    return Contender(
        name="nginx",
        version=said.strip().rpartition("/")[2],
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=(program, "-p", str(own), "-c", str(config)),
        ready_url=f"http://127.0.0.1:{port}/health",
        role=lambda command: "worker" if "worker" in command else "master",
    )


_PROCESS_MODULE: Final = re.compile(r"llm_router\.processes\.(\w+)")


def gateway_role(command: str) -> str:
    """worker, control, supervisor or runner, by the module that the process runs."""
    found = _PROCESS_MODULE.search(command)
    return found.group(1) if found else "start"


@dataclass(frozen=True, kw_only=True)
class Gateway(Contender):
    """The gateway with the port that is scraped and the names of the models it was configured with."""

    metrics_port: int
    models: tuple[str, ...]


def gateway(
    backend_port: int,
    folder: Path,
    *,
    models: tuple[str, ...] = (MODEL,),
    name: str = "gateway",
    settings: Mapping[str, object] | None = None,
    price: Mapping[str, float] | None = None,
    headers: Mapping[str, str] | None = None,
    sources: Path | None = None,
) -> Gateway:
    """The gateway as `llm-router serve` starts it: one worker, every metric on, one remote backend.

    Args:
        models: names that callers may ask for, all served by the mock.
        settings: sections of its configuration beside backends and models.
        price: of each model.
        headers: that requests to it have.
        sources: the folder that its package is taken from; None for this repository's.
    """
    own = folder / name.replace(",", "").replace(" ", "-")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    port, metrics_port = free_port(), free_port()
    config = own / "llm-router.yaml"
    # JSON is YAML.
    config.write_text(
        json.dumps({**_configuration(backend_port, models, price), **(settings or {})}, indent=1), encoding="utf-8"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LLM_ROUTER_", "PYTHON"))}
    for key in ("HOST", "PORT", "METRICS_PORT", "DATA_DIR", "LOG_DIR"):
        inherited.pop(key, None)
    inherited["PYTHONPATH"] = str(sources or own_folder() / "src")
    command = (
        sys.executable, "-m", "llm_router", "serve", "--config", str(config), "--port", str(port),
        "--metrics-port", str(metrics_port), "--data-dir", str(own / "data"),
    )  # fmt: skip
    return Gateway(
        name=name,
        version=_gateway_version(),
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=command,
        ready_url=f"http://127.0.0.1:{port}/health/ready",
        headers=dict(headers or {}),
        environment=inherited,
        role=gateway_role,
        metrics_port=metrics_port,
        models=models,
    )


def _configuration(backend_port: int, models: tuple[str, ...], price: Mapping[str, float] | None) -> dict[str, object]:
    priced = {"price": dict(price)} if price else {}
    return {
        "server": {"workers": 1},
        "backends": [{"name": "mock", "url": f"http://127.0.0.1:{backend_port}/v1"}],
        "models": [{"name": name, "deployments": [{"backend": "mock", "model": MODEL}], **priced} for name in models],
    }


def _gateway_version() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=own_folder()
    )
    return described.stdout.strip() or "unknown"


Build = Callable[[int, Path], Contender]
