"""Which backends answer: from what workers saw, and from free probes of those that nobody uses or that are down.

A probe is a TCP connection, or for runners `GET /health`; never a request that could cost money. What workers see
wins until the next probe. Not for: choosing backends (routing) or judging replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

from llm_router.processes.snapshot import BackendSeen
from llm_router.routing.table import BackendSpec

_log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0
_AT_ONCE = 8
_DEFAULT_PORTS = {"http": 80, "https": 443}


class BackendWatch:
    """The last known state of every backend. Lives in one event loop; `run` is its only task.

    Args:
        on_change: called with a backend's name when it went up or down.
        every_s: seconds between probes of a backend that is down or of which nothing was heard for as long.
        probe: whether a backend answers now; must not raise.
    """

    def __init__(
        self,
        on_change: Callable[[str], None],
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[BackendSpec], Awaitable[bool]] | None = None,
    ) -> None:
        self._on_change = on_change
        self._every_s = every_s
        self._clock = clock
        self._probe = probe or answers
        self._specs: dict[str, BackendSpec] = {}
        self._up: dict[str, bool] = {}
        self._heard_at: dict[str, float] = {}
        self._problems: dict[str, str] = {}

    def follow(self, backends: Iterable[BackendSpec]) -> None:
        """Watch these backends from now on. One that is new or has another address is unknown at first."""
        specs = {spec.name: spec for spec in backends}
        for name, spec in self._specs.items():
            if name not in specs or specs[name].url != spec.url:
                self._up.pop(name, None)
                self._heard_at.pop(name, None)
                self._problems.pop(name, None)
        self._specs = specs
        for name, spec in specs.items():
            if not spec.ready:
                self._learn(name, False, "its runner is not ready")
            elif spec.local_model and name not in self._up:
                self._heard_at[name] = self._clock()
                self._learn(name, True, "")  # the runner itself just said so

    def is_up(self, name: str) -> bool | None:
        """Whether it answers; None while that is not known."""
        return self._up.get(name)

    def problem(self, name: str) -> str:
        """Why it is down, for people; empty if it is not."""
        return self._problems.get(name, "")

    def saw(self, fact: BackendSeen) -> None:
        """A worker saw it answer or fail. What is no longer configured is passed over."""
        if fact.name in self._specs:
            self._heard_at[fact.name] = self._clock()
            self._learn(fact.name, fact.up, fact.problem)

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await self.probe_due()
            await asyncio.sleep(self._every_s / 5)

    async def probe_due(self) -> None:
        """Probe the backends of which nothing was heard for `every_s`, at most eight at once."""
        now = self._clock()
        due = [
            spec
            for name, spec in self._specs.items()
            if spec.ready and now - self._heard_at.get(name, -self._every_s) >= self._every_s
        ]
        for start in range(0, len(due), _AT_ONCE):
            group = due[start : start + _AT_ONCE]
            results = await asyncio.gather(*(self._probe(spec) for spec in group))
            for spec, is_up in zip(group, results, strict=True):
                if self._specs.get(spec.name) == spec:
                    self._heard_at[spec.name] = self._clock()
                    self._learn(spec.name, is_up, "" if is_up else "it does not answer a probe")

    def _learn(self, name: str, is_up: bool, problem: str) -> None:
        before = self._up.get(name)
        self._up[name] = is_up
        self._problems[name] = "" if is_up else problem
        if before is not is_up:
            if not is_up and self._specs[name].ready:  # else its runner is away, and the supervisor says why
                _log.warning("backend %s is down: %s", name, problem)
            elif is_up and before is False:
                _log.info("backend %s is up again", name)
            self._on_change(name)


async def answers(backend: BackendSpec) -> bool:
    """Whether something accepts connections at the backend's address; of a runner, whether it says it is well."""
    parts = urlsplit(backend.url)
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 80)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, port)
            if not backend.local_model:
                return True
            writer.write(f"GET /health HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n\r\n".encode())
            return (await reader.readline()).split(b" ")[1:2] == [b"200"]
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
