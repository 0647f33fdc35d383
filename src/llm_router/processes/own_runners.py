"""Runners of a program that uses the library: a small supervisor of their own, without the rest of the processes.

The runner process and its lifeline are the same as under `llm-router serve`, so that a runner never outlives the
program that asked for it. Not for: `serve` (supervisor.py), or what a runner is given (models/launch.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

from llm_router.errors import BadModelFile, BadOptions, ModelError, OutOfMemory, RunnerFailed
from llm_router.models.launch import RunnerSpec, check
from llm_router.processes.board import Board
from llm_router.processes.child import DRAIN, EXIT_REFUSED, LONGEST_REPORT_BYTES
from llm_router.processes.plan import ChildSpec, LaunchPlan, memory_file, module_command
from llm_router.processes.restart import Backoff

_START_ATTEMPTS: Final = 3
_LEAVE_S: Final = 3.0
"""For a runner that should have nothing in flight any more."""

_MOST_RUNNERS: Final = 64

_ERRORS: Final[dict[str, type[ModelError]]] = {
    error.code: error for error in (BadModelFile, BadOptions, OutOfMemory, RunnerFailed)
}

RunnerState = Literal["starting", "ready", "backoff", "stopping", "failed"]


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A runner that answers. Memory is resident, weights included; `context_size` is per request."""

    name: str
    port: int
    key: str
    pid: int
    load_s: float
    memory_bytes: int
    context_size: int
    parallel: int
    embeddings: bool
    only_embeds: bool = False

    @property
    def url(self) -> str:
        """The base URL of its OpenAI API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __repr__(self) -> str:
        return f"Running({self.name!r}, port={self.port}, pid={self.pid})"


class RunnerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change in the life of a runner; `running` is set when it is ready, `error` when it died or failed."""

    name: str
    state: RunnerState
    running: Running | None = None
    error: str = ""
    restarts: int = 0


class _Life:
    """One runner over all its processes."""

    def __init__(self, spec: RunnerSpec) -> None:
        self.spec = spec
        self.state: RunnerState = "starting"
        self.running: Running | None = None
        self.restarts = 0
        self.grace_s = _LEAVE_S
        self.stopped = asyncio.Event()
        self.first: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None


class OwnRunners:
    """The runners of a program that uses the library. An async context manager; leaving it ends all, in 3 s at most.

    A runner that dies is started again after 0.2 s, then 0.4 s up to 10 s; one that dies three times
    before it was ever ready has failed. Each is a child process tied to this one by a pipe: it leaves
    when this process ends, however it ends. At most 64. Only for the event loop that entered it.

    Args:
        log_dir: where llama.cpp's warnings go, a file a model; "" for stderr.
        on_event: called in the event loop on every change; must not block or raise.
        start_timeout_s: how long loading a model may take.
    """

    def __init__(
        self,
        *,
        log_dir: str = "",
        on_event: Callable[[RunnerEvent], None] = lambda event: None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._log_dir = log_dir
        self._on_event = on_event
        self._start_timeout_s = start_timeout_s
        self._lives: dict[str, _Life] = {}
        self._group = asyncio.TaskGroup()
        self._board: Board | None = None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._board = Board.create(1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for life in self._lives.values():
            life.stopped.set()
        try:
            # Not the exception: it is the caller's, and runners leave in order either way.
            await self._group.__aexit__(None, None, None)
        finally:
            if self._board is not None:
                self._board.close()

    @property
    def running(self) -> dict[str, Running]:
        """The runners that answer at this moment, by name."""
        return {name: life.running for name, life in self._lives.items() if life.running is not None}

    def state(self, name: str) -> RunnerState | None:
        """What a runner is doing; None if there is none of that name."""
        life = self._lives.get(name)
        return life.state if life is not None else None

    async def start(self, spec: RunnerSpec) -> Running:
        """Start a runner and wait until it answers.

        Raises BadModelFile, BadOptions or OutOfMemory before a process exists, RunnerFailed if it does not become
        ready or the name is taken. Cancelling ends the runner.
        """
        former = self._lives.get(spec.name)
        if former is not None and former.state != "failed":
            raise RunnerFailed(f"model {spec.name!r} has a runner already ({former.state})")
        if len(self._lives) >= _MOST_RUNNERS:
            raise RunnerFailed(f"there are {_MOST_RUNNERS} runners already; unload a model first")
        life = self._lives[spec.name] = _Life(spec)
        try:
            await asyncio.to_thread(check, spec)
            life.task = self._group.create_task(self._keep(life), name=f"runner {spec.name}")
            async with asyncio.timeout(self._start_timeout_s):
                return await asyncio.shield(life.first)
        except TimeoutError:
            await self._end(life)
            raise RunnerFailed(f"model {spec.name!r} was not loaded within {self._start_timeout_s:g} s") from None
        except BaseException:
            await self._end(life)
            raise

    async def stop(self, name: str, *, grace_s: float = 30.0) -> None:
        """End a runner; what it is answering may finish first, for at most `grace_s`. Raises RunnerFailed if there is none."""
        life = self._lives.get(name)
        if life is None:
            raise RunnerFailed(f"there is no runner {name!r}")
        life.grace_s = grace_s
        await self._end(life)

    async def _end(self, life: _Life) -> None:
        life.stopped.set()
        if life.task is not None:
            await asyncio.wait([life.task])
        if self._lives.get(life.spec.name) is life:
            del self._lives[life.spec.name]

    async def _keep(self, life: _Life) -> None:
        """Keep one runner alive until it is stopped or has failed for good."""
        backoff = Backoff(0.2, 0.4, 10.0, 60.0)
        early_deaths = 0
        while not life.stopped.is_set():
            started_at = time.monotonic()
            process = _Process(life.spec, self._log_dir, self._board_fd)
            try:
                error = await self._live(life, process)
            except OSError as problem:
                error = RunnerFailed(f"model {life.spec.name!r}: cannot start a process: {problem.strerror or problem}")
            finally:
                await process.end(life.grace_s)
            was_ready, life.running = life.running is not None, None
            if error is None:
                break
            early_deaths = 0 if was_ready else early_deaths + 1
            if process.gave_up or (not life.first.done() and early_deaths >= _START_ATTEMPTS):
                self._change(life, "failed", str(error))
                if not life.first.done():
                    life.first.set_exception(error)
                    life.first.exception()  # whoever waited may have gone
                return
            life.restarts += 1
            self._change(life, "backoff", str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.after_death(time.monotonic() - started_at)):
                    await life.stopped.wait()
        self._change(life, "stopping")

    async def _live(self, life: _Life, process: _Process) -> ModelError | None:
        """Follow one process to its end. None if it was to end, else what it died of."""
        self._change(life, "starting")
        await process.start()
        async with asyncio.TaskGroup() as group:
            stopped = group.create_task(life.stopped.wait())
            report = group.create_task(process.report())
            await asyncio.wait([stopped, report], return_when=asyncio.FIRST_COMPLETED)
            if not report.done():
                report.cancel()
                return None
            if isinstance(ready := report.result(), Running):
                life.running = ready
                self._change(life, "ready")
                if not life.first.done():
                    life.first.set_result(ready)
                died = group.create_task(process.wait())
                await asyncio.wait([stopped, died], return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    died.cancel()
                    return None
                ready = RunnerFailed(f"the runner of model {life.spec.name!r} {died.result()}")
            stopped.cancel()
            return ready

    def _change(self, life: _Life, state: RunnerState, error: str = "") -> None:
        life.state = state
        self._on_event(
            RunnerEvent(name=life.spec.name, state=state, running=life.running, error=error, restarts=life.restarts)
        )

    @property
    def _board_fd(self) -> int:
        if self._board is None:
            raise RuntimeError("OwnRunners is an async context manager: enter it first")
        return self._board.fd

    def __repr__(self) -> str:
        return f"OwnRunners({ {name: life.state for name, life in self._lives.items()} })"


class _Process:
    """One process of a runner, and the pipes that tie it to us."""

    def __init__(self, spec: RunnerSpec, log_dir: str, board_fd: int) -> None:
        self._spec = spec
        self._log_dir = log_dir
        self._board_fd = board_fd
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline = -1
        self._reports: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None
        self.gave_up = False

    async def start(self) -> None:
        """Raises OSError when the machine gives no process or descriptors."""
        with contextlib.ExitStack() as theirs:
            lifeline, self._lifeline = os.pipe()
            theirs.callback(os.close, lifeline)
            ours, status = os.pipe()
            theirs.callback(os.close, status)
            reader = asyncio.StreamReader(limit=LONGEST_REPORT_BYTES)
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
            )
            self._reports = reader
            spec = ChildSpec(
                role="runner",
                name=self._spec.name,
                index=0,
                lifeline_fd=lifeline,
                status_fd=status,
                board_fd=self._board_fd,
                board_index=0,
                plan=LaunchPlan(data_dir="", log_dir=self._log_dir),
                payload=self._spec.payload(),
            )
            spec_fd = memory_file("llm-router-spec", spec.to_json())
            theirs.callback(os.close, spec_fd)
            self._process = await asyncio.create_subprocess_exec(
                *module_command("llm_router.processes.runner"),
                "--spec-fd",
                str(spec_fd),
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is the program's
                pass_fds=[lifeline, status, self._board_fd, spec_fd],
                start_new_session=True,
            )

    async def report(self) -> Running | ModelError:
        """What the process says of itself: that it is ready, or why not. A process that dies first has failed."""
        assert self._reports is not None
        assert self._process is not None
        line = await self._reports.readline()
        if not line.endswith(b"\n"):
            return RunnerFailed(f"the runner of model {self._spec.name!r} {await self.wait()} while loading")
        message = json.loads(line)
        if message.get("event") == "ready":
            known = {field: message[field] for field in Running.__struct_fields__ if field in message}
            known |= {"name": self._spec.name, "key": self._spec.key, "pid": self._process.pid}
            return msgspec.convert(known, Running)
        self.gave_up = True
        return _ERRORS.get(message.get("code", ""), RunnerFailed)(str(message.get("error", "it did not say why")))

    async def wait(self) -> str:
        """How the process ended."""
        assert self._process is not None
        status = await self._process.wait()
        self.gave_up = self.gave_up or status == EXIT_REFUSED
        return f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"

    async def end(self, grace_s: float) -> None:
        """Have the process leave, in `grace_s` at most, and give everything back. Also after a failed start."""
        try:
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(OSError):
                    os.write(self._lifeline, DRAIN)
                try:
                    async with asyncio.timeout(grace_s):
                        await self._process.wait()
                except TimeoutError:
                    self._process.kill()
                    await self._process.wait()
        finally:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1
            if self._transport is not None:
                self._transport.close()
