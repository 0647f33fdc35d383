"""The process of one local model: llama.cpp answering the OpenAI protocol on a loopback port of its own.

Loading and generating happen in C++ threads. A crash there ends this process and nothing else, and
whoever started it starts it again. It reports `ready` with port, load time and memory, or `failed` with
a reason that another start would not change. Not for: deciding what to run (models/launch.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from llm_router.processes.child import EXIT_ORPHANED, EXIT_REFUSED, Child, log_to_stderr

if TYPE_CHECKING:
    from llm_router.models.gguf import Header
    from llm_router.models.launch import RunnerSpec

_log = logging.getLogger("llm_router.runner")

_BEAT_S: Final = 0.5
_LEAVING_POLL_S: Final = 0.05
_IDLE_LOOKS: Final = 10
"""Looks in a row that find it idle before a runner with clients leaves: the last bytes of an answer are written
after its slot was freed (seen on a busy machine: a stream lost its end)."""

_LONGEST_LOG_BYTES: Final = 1 << 20

_WARNINGS: Final = 2
"""llama.cpp's verbosity: 1 errors, 2 warnings; 3 would write about eight lines a request."""

_MOST_BATCH: Final = 2048
"""Tokens decoded at once, llama.cpp's default."""


def main() -> NoReturn:
    """Serve one model until the owner says drain or is gone."""
    child = Child.from_argv()
    log_to_stderr(f"runner {child.spec.name}", child.spec.plan)
    drain = threading.Event()
    # Without an owner the answers are for nobody; the kernel closes the listening socket with the process.
    child.watch(on_drain=drain.set, on_orphaned=lambda: os._exit(EXIT_ORPHANED))
    log = _log_file(child.spec.plan.log_dir, child.spec.name)
    child.beat()
    try:
        server, ready, key = _start(child, log)
    except Exception as error:
        code = getattr(error, "code", "runner_failed")
        child.report({"event": "failed", "code": code, "error": str(error) or type(error).__name__})
        os._exit(EXIT_REFUSED)
    child.report({"event": "ready", **ready})
    while not drain.wait(_BEAT_S):
        child.beat()
    idle_looks = 0
    while idle_looks < _IDLE_LOOKS and _has_clients(ready["port"]):
        idle_looks = 0 if _is_generating(ready["port"], key) else idle_looks + 1
        child.beat()
        time.sleep(_LEAVING_POLL_S)
    # Destroying the server would wait for generations that nobody reads any more, so it is not destroyed.
    _ = server
    os._exit(0)


def _start(child: Child, log: Path | None) -> tuple[Any, dict[str, Any], str]:
    """The running server, what `ready` says of it, and its key. Raises RouterError or what llama.cpp raises."""
    # Here and not above: the ties to the owner come first, and these imports take a third of a second.
    import psutil

    from llm_router.errors import RunnerFailed
    from llm_router.models.launch import RunnerSpec, check, default_threads, usable_cpus
    from llm_router.models.registry import FORMAT, size_category

    spec = RunnerSpec.from_payload(child.spec.payload)
    header = check(spec)
    threads = spec.threads or default_threads(usable_cpus(), psutil.cpu_count(logical=False) or 1)
    try:
        import xllamacpp
    except ImportError as error:
        raise RunnerFailed(f"llama.cpp is not installed ({error}); pip install xllamacpp") from error
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    log_from = log.stat().st_size if log is not None else 0
    started_at = time.monotonic()
    try:
        with _ended_by_orders(child.spec.lifeline_fd):
            server = xllamacpp.Server(_parameters(xllamacpp, spec, header, threads))
    except RuntimeError as error:
        said = _last_error(log, log_from)
        raise RunnerFailed(f"llama.cpp cannot load model {spec.name!r} ({spec.path}): {said or error}") from error
    ready = {
        "port": int(server.listening_address.rpartition(":")[2]),
        "load_s": time.monotonic() - started_at,
        "memory_bytes": max(0, process.memory_info().rss - before_bytes),
        "context_size": spec.context_for(header),
        "parallel": spec.parallel,
        "threads": threads,
        "embeddings": spec.embeddings,
        "only_embeds": header.has_pooling,
        "format": FORMAT,
        "size_bytes": header.size_bytes,
        "size_category": size_category(header.size_bytes),
        "architecture": header.architecture,
        "quantisation": header.quantisation,
        "parameters": header.parameters,
    }
    return server, ready, spec.key


def _parameters(xllamacpp: Any, spec: RunnerSpec, header: Header, threads: int) -> Any:
    """llama.cpp's parameters. What is not set here keeps llama.cpp's default."""
    p = xllamacpp.CommonParams()
    p.model.path = spec.path
    p.model_alias = {spec.name}
    p.hostnames = ["127.0.0.1"]
    p.port = 0
    p.api_keys = [spec.key]
    p.cors_origins = ""  # its default is *; no browser has business here
    p.ui = False
    p.offline = True  # it could download models by itself
    p.endpoint_slots = False  # shows prompts
    p.endpoint_props = False
    p.endpoint_metrics = True
    p.verbosity = _WARNINGS
    p.use_jinja = True
    p.chat_template = spec.chat_template
    # llama.cpp divides n_ctx by the slots; a caller cares about what one request may use.
    p.n_ctx = spec.context_for(header) * spec.parallel
    p.n_parallel = spec.parallel
    p.n_gpu_layers = spec.gpu_layers
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    # Its defaults keep up to 8 GiB of former prompts; each slot's own cache stays. Memory stays what was measured.
    p.cache_ram_mib = 0
    p.cache_idle_slots = False
    if spec.embeddings:
        p.embedding = True
        # An embedded text must fit into one physical batch, or it is answered by a 500.
        p.n_batch = p.n_ubatch = min(_MOST_BATCH, max(512, spec.context_for(header)))
        if not header.has_pooling:
            # A model for text has no pooling of its own, and without one llama.cpp refuses the OpenAI protocol.
            p.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return p


def _log_file(log_dir: str, name: str) -> Path | None:
    """Send stdout and stderr to LOG_DIR/runner-NAME.log, if there is a LOG_DIR: llama.cpp writes there itself.

    One former file is kept once it is over 1 MiB. A folder that cannot be written leaves stderr as it is.
    """
    if not log_dir:
        return None
    path = Path(log_dir) / f"runner-{re.sub('[^A-Za-z0-9._-]', '_', name)}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LONGEST_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _log.warning("%s: %s; llama.cpp's log goes to stderr", path, error.strerror)
        return None
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    return path


def _last_error(log: Path | None, log_from: int) -> str:
    """Why loading failed, from what llama.cpp wrote into its log behind `log_from`: its exception does not say."""
    if log is None:
        return ""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(log_from)
        lines = file.read(65536).decode("utf-8", "replace").splitlines()
        # "0.00.073.056 E llama_model_load: error loading model: ..."; the first is the cause, the others follow from it.
        errors = [line.partition(" E ")[2].strip() for line in lines if " E " in line]
        return errors[0] if errors else ""
    return ""


@contextlib.contextmanager
def _ended_by_orders(lifeline_fd: int) -> Iterator[None]:
    """End the process at once if an order comes or the owner goes while the block runs.

    llama.cpp holds the interpreter lock while it loads, minutes for a large model, and the lifeline's thread
    cannot run. So the kernel is asked for SIGIO, whose default action on Linux is to end the process. (Elsewhere
    it is ignored by default: there an orphaned runner leaves when it has loaded.)
    """
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    time.sleep(0.001)  # lets the thread go first if something came before
    try:
        yield
    finally:
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags)


def _has_clients(port: int) -> bool:
    """Whether anybody is connected who may wait for an answer. (llama.cpp generates on after its client left.)"""
    import psutil

    return any(
        link.status == psutil.CONN_ESTABLISHED and link.laddr.port == port
        for link in psutil.Process().net_connections("tcp")
    )


def _is_generating(port: int, key: str) -> bool:
    """Whether llama.cpp works on an answer or has one waiting; False too if it does not say."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/metrics", headers={"authorization": f"Bearer {key}"})
        text = connection.getresponse().read().decode("ascii", "replace")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("llamacpp:requests_"))
    return any(float(count) > 0 for count in counts.values())


if __name__ == "__main__":
    main()
