"""Other gateways, for `make bench-peers`: installed from lock files into .cache/peers and started as their docs say.

Each lives in a folder of its own, with its own libraries, and is installed with hashes from benchmarks/locks (LiteLLM
in particular has had malicious releases on the package index: never install it without them). They get a bare
environment and the same backend, CPU and load as we do. One that cannot be had or started is reported with the reason
and left out. Not for: judging features.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.backend import MODEL
from benchmarks.contenders import CHAT_PATH, Build, Contender
from benchmarks.processes import free_port, own_folder

LOCKS: Final = Path(__file__).with_name("locks")
_INSTALL_TIMEOUT_S: Final = 900.0


class NotAvailable(Exception):
    """A peer that could not be installed here; the message says why."""


def cache() -> Path:
    """Where peers are installed: outside of what is measured, kept between runs."""
    return own_folder() / ".cache" / "peers"


def _bare_environment(folder: Path, **more: str) -> dict[str, str]:
    """Nothing of the user's: no keys, no proxies, no telemetry identity, and a home of its own."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", **more}


def _run(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotAvailable(f"{' '.join(command[:4])} … left with {done.returncode}: {' | '.join(said[-3:])[-500:]}")


def _python_peer(name: str) -> tuple[Path, str]:
    """The peer's Python and version, installed from its lock file unless that was done before."""
    lock = LOCKS / f"{name}.lock"
    folder = cache() / name
    stamp = folder / "installed.lock"
    python = folder / "bin" / "python"
    if not (stamp.exists() and filecmp.cmp(stamp, lock, shallow=False)):
        print(f"installing {name} into {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], own_folder())
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        _run([*pip, "--only-binary", ":all:", "--require-hashes", "-r", str(lock)], folder)
        shutil.copy(lock, stamp)
    pinned = (LOCKS / f"{name}.in").read_text(encoding="utf-8").strip()
    return python, pinned.partition("==")[2]


def litellm(backend_port: int, folder: Path) -> Contender:
    """LiteLLM's proxy with one worker, without database, keys or callbacks."""
    python, version = _python_peer("litellm")
    port = free_port()
    config = folder / "litellm.yaml"
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{backend_port}/v1", "api_key": "none"}
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
                "litellm_settings": {"telemetry": False},
            }
        ),
        encoding="utf-8",
    )
    return Contender(
        name="LiteLLM",
        version=version,
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=(
            str(python.with_name("litellm")),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
            "--telemetry",
            "False",
        ),
        ready_url=f"http://127.0.0.1:{port}/health/readiness",
        environment=_bare_environment(
            folder / "litellm",
            LITELLM_LOCAL_MODEL_COST_MAP="True",  # else it asks a server on the internet
            LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true",  # open, as all others here are
            LITELLM_LOG="ERROR",
            NO_DOCS="True",
        ),
        paced_connections=6,
        plain_share=2.0,  # requests that the end of a run cuts off are paid for but not counted: fewer of them
        burst_share=0.1,
        warm_up_s=3.0,
        ready_within_s=120.0,
        is_frozen_between=True,
    )


def _router_command(python: Path, module: str, port: int, backend_port: int) -> tuple[str, ...]:
    return (
        str(python), "-m", module, "--host", "127.0.0.1", "--port", str(port), "--worker-urls",
        f"http://127.0.0.1:{backend_port}", "--policy", "round_robin", "--prometheus-host", "127.0.0.1",
        "--prometheus-port", str(free_port()),
    )  # fmt: skip


def vllm_router(backend_port: int, folder: Path) -> Contender:
    """The vLLM project's router (Rust), round robin over one server."""
    python, version = _python_peer("vllm-router")
    port = free_port()
    return Contender(
        name="vLLM router",
        version=version,
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=(
            *_router_command(python, "vllm_router.launch_router", port, backend_port),
            "--log-level",
            "warning",
        ),
        ready_url=f"http://127.0.0.1:{port}/health",
        environment=_bare_environment(folder / "vllm-router"),
        is_frozen_between=True,
    )


def sglang_router(backend_port: int, folder: Path) -> Contender:
    """The SGLang project's router (Rust), round robin over one server."""
    python, version = _python_peer("sglang-router")
    port = free_port()
    return Contender(
        name="SGLang router",
        version=version,
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=(
            *_router_command(python, "sglang_router.launch_router", port, backend_port),
            "--log-level",
            "warn",
        ),
        ready_url=f"http://127.0.0.1:{port}/health",
        environment=_bare_environment(folder / "sglang-router"),
        is_frozen_between=True,
    )


def portkey(backend_port: int, folder: Path) -> Contender:
    """Portkey's gateway on Node. The server it forwards to is named in headers of each request."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NotAvailable("node and npm are not installed (Debian: apt-get install nodejs npm)")
    lock = LOCKS / "portkey" / "package-lock.json"
    home = cache() / "portkey"
    stamp = home / "installed.json"
    if not (stamp.exists() and filecmp.cmp(stamp, lock, shallow=False)):
        print(f"installing portkey into {home}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(lock.parent, home)
        _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], home)
        shutil.copy(lock, stamp)
    package = home / "node_modules" / "@portkey-ai" / "gateway"
    version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    port = free_port()
    return Contender(
        name="Portkey",
        version=version,
        url=f"http://127.0.0.1:{port}{CHAT_PATH}",
        command=(node, str(package / "build" / "start-server.js"), f"--port={port}", "--headless"),
        ready_url=f"http://127.0.0.1:{port}/",
        headers={
            "Authorization": "Bearer none",
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{backend_port}/v1",
        },
        # Without this it refuses loopback addresses as targets.
        environment=_bare_environment(folder / "portkey", TRUSTED_CUSTOM_HOSTS="127.0.0.1", NODE_ENV="production"),
        paced_connections=20,
        burst_share=0.5,
        warm_up_s=4.0,  # until the just-in-time compiler has settled
        is_frozen_between=True,
    )


PEERS: Final[dict[str, Build]] = {
    "vLLM router": vllm_router,
    "SGLang router": sglang_router,
    "Portkey": portkey,
    "LiteLLM": litellm,
}
