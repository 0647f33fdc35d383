"""Profiles of whichever process of the router is meant: control orders them, the process itself takes them.

One at a time over the whole router: what a profile costs is then known, and nobody reads another one's cost in it.
Not for: how profiles are taken (observe/profiling) or who may order one (admin/profile.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from llm_router.errors import InvalidRequest, RouterError
from llm_router.observe.profiling.profile import CannotProfile, Format, Kind, ProfileRunning
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.processes.snapshot import ProfileOrder, ProfileTaken, Word

if TYPE_CHECKING:
    from llm_router.observe.profiling.profiler import Profiler
    from llm_router.processes.orders import ChildState

_log = logging.getLogger(__name__)

CONTROL: Final = "control"

GRACE_S: Final = 15.0
"""Seconds beyond those of the profile for its answer: a million blocks of memory are counted in 5 s."""

_SEND_S: Final = 5.0
"""Seconds for a full connection to take the answer; control reads at once unless it hangs."""

_SEND_PAUSE_S: Final = 0.05


class Line(Protocol):
    """The connection of a worker, see `news.WorkerLine`."""

    name: str
    pid: int

    def tell(self, word: Word) -> None:
        """Say something to the worker; lost if it is gone."""


class Profiles:
    """Control's side: finds the process, gives the order, waits for the answer. Lives in control's loop.

    Args:
        own: control's own profiler.
        children: what the supervisor says there is.
        lines: the workers that are connected.
        settings: in force now.
        clock: monotonic seconds.
        grace_s: how long the answer may take beyond the profile's time.
    """

    def __init__(
        self,
        own: Profiler,
        *,
        children: Callable[[], Sequence[ChildState]],
        lines: Callable[[], Sequence[Line]],
        settings: Callable[[], ProfilerSettings],
        clock: Callable[[], float] = time.monotonic,
        grace_s: float = GRACE_S,
    ) -> None:
        self._own = own
        self._children = children
        self._lines = lines
        self._settings = settings
        self._clock = clock
        self._grace_s = grace_s
        self._number = 0
        self._process = ""  # that a profile is being taken of
        self._until = 0.0
        self._line: Line | None = None
        self._answer: asyncio.Future[ProfileTaken] | None = None

    def __repr__(self) -> str:
        return f"Profiles(orders={self._number}, of={self._process or None!r})"

    async def take(self, process: str, kind: Kind, seconds: float, format: Format) -> bytes:
        """Take a profile of `process`, written down. Cancelled, the process ends it by itself and nobody is told.

        Raises: InvalidRequest with status 404 for a process that there is not and 400 for one that cannot be profiled,
            ProfileRunning, CannotProfile (it is gone, or dies, or says why not).
        """
        line = self._line_of(process)
        if self._process:
            left_s = max(1.0, self._until - self._clock())
            raise ProfileRunning(
                f"a profile of {self._process} is being taken, and there is one at a time; ask again in {left_s:.0f} s",
                retry_after_s=left_s,
            )
        self._process = process
        self._until = self._clock() + (0.0 if kind == "continuous" else seconds)
        try:
            if line is None:
                return await self._own.take(kind, seconds, format)
            return await self._ask(line, kind, seconds, format)
        finally:
            self._process, self._line, self._answer = "", None, None

    def taken(self, line: Line, fact: ProfileTaken) -> None:
        """A worker answered. An answer that nobody waits for any more is forgotten."""
        if self._answer is not None and line is self._line and fact.number == self._number and not self._answer.done():
            self._answer.set_result(fact)

    def left(self, line: Line) -> None:
        """A worker's connection is gone."""
        if self._answer is not None and line is self._line and not self._answer.done():
            self._answer.set_exception(CannotProfile(f"{self._process} went away before its profile was done"))

    async def _ask(self, line: Line, kind: Kind, seconds: float, format: Format) -> bytes:
        self._number += 1
        self._line = line
        self._answer = asyncio.get_running_loop().create_future()
        wait_s = self._grace_s + (0.0 if kind == "continuous" else seconds)
        line.tell(ProfileOrder(self._number, kind, seconds, format, self._settings().rate_hz))
        try:
            async with asyncio.timeout(wait_s):
                taken = await self._answer
        except TimeoutError:
            raise CannotProfile(
                f"{self._process} did not answer within {wait_s:g} s; it may hang: its log would tell"
            ) from None
        if taken.problem:
            raise CannotProfile(taken.problem)
        return taken.body

    def _line_of(self, process: str) -> Line | None:
        """The connection of a worker, None for control. Raises: InvalidRequest, CannotProfile."""
        if process == CONTROL:
            return None
        children = self._children()
        worker = next((child for child in children if child.role == "worker" and child.name == process), None)
        if worker is not None:
            found = next((line for line in self._lines() if worker.pid and line.pid == worker.pid), None)
            if found is None:
                raise CannotProfile(f"{process} is not there now ({worker.state}); `/health` shows how the workers are")
            return found
        if process == "supervisor":
            raise InvalidRequest(
                "the supervisor cannot be profiled: it does next to nothing, and nothing that could disturb it",
                code="cannot_profile",
                param="process",
            )
        if any(child.role == "runner" and process in {child.name, f"runner-{child.name}"} for child in children):
            raise InvalidRequest(
                f"{process[:100]} is a model's runner, llama.cpp and not Python: use perf on its pid; "
                "GET /admin/models shows what it holds",
                code="cannot_profile",
                param="process",
            )
        known = ", ".join([*(child.name for child in children if child.role == "worker"), CONTROL])
        raise InvalidRequest(
            f"there is no process {process[:100]!r}; there are {known}",
            status=404,
            code="process_not_found",
            param="process",
        )


class ProfileRunner:
    """A worker's side: follows the settings, and answers each order, whatever comes of it. Lives in the worker's loop.

    As long as profiles are off nothing of them is imported and nothing runs.

    Args:
        process: the worker's name.
        send: sends the answer to control now; False if that cannot be, and then it is tried again.
    """

    def __init__(self, process: str, send: Callable[[ProfileTaken], bool]) -> None:
        self._process = process
        self._send = send
        self._profiler: Profiler | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"ProfileRunner({self._process!r}, running={len(self._tasks)}, {self._profiler})"

    @property
    def cpu_s(self) -> float:
        """CPU seconds that taking samples has used in all."""
        return 0.0 if self._profiler is None else self._profiler.cpu_s

    def apply(self, settings: ProfilerSettings) -> None:
        """The settings of now; called with each snapshot."""
        if self._profiler is None:
            if not settings.enabled:
                return
            from llm_router.observe.profiling.profiler import Profiler

            self._profiler = Profiler(ProfilerSettings(), process=self._process)
        try:
            self._profiler.apply(settings)
        except CannotProfile as error:
            _log.warning("no continuous profile of %s: %s", self._process, error)

    def hear(self, order: ProfileOrder) -> None:
        """Begin what is ordered. A second order is answered with the reason why not."""
        task = asyncio.get_running_loop().create_task(self._run(order), name="profile")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """End the profile in progress, and the continuous one."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        if self._profiler is not None:
            self._profiler.close()

    async def _run(self, order: ProfileOrder) -> None:
        try:
            body = await self._take(order)
        except RouterError as error:
            taken = ProfileTaken(order.number, problem=error.message)
        except Exception as error:  # a fault of the profiler is answered, and no reason to stop serving
            _log.exception("the profile could not be taken")
            taken = ProfileTaken(order.number, problem=f"{self._process}: {type(error).__name__}: {error}")
        else:
            taken = ProfileTaken(order.number, body)
        ends_at = asyncio.get_running_loop().time() + _SEND_S
        while not self._send(taken):
            if asyncio.get_running_loop().time() > ends_at:
                _log.warning("control could not be told of profile %d", order.number)
                return
            await asyncio.sleep(_SEND_PAUSE_S)

    async def _take(self, order: ProfileOrder) -> bytes:
        if self._profiler is None:
            raise CannotProfile(f"profiles are switched off in {self._process}; it has not learned otherwise yet")
        return await self._profiler.take(order.profile, order.seconds, order.format, order.rate_hz)
