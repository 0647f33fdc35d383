"""What becomes of a request that ended: one call writes everything that is written about it, once.

Whether its trace is kept is decided first, because exemplars point to kept traces only; then come metrics and usage row,
then the log lines. A kept request waits here until its trace is made, off the request's path.
Not for: what any of these are (instruments.py, usage_rows.py, observe).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from llm_router.observe.logs.logs import Logs
from llm_router.observe.tracing.keep import Keep
from llm_router.observe.tracing.spans import Server, trace_of
from llm_router.observe.tracing.trace import Trace
from llm_router.signals import Around, Recorder, RequestRecord

MAX_KEPT: Final = 1000
"""Requests whose trace is not made yet. More than this in a tenth of a second is an outage, or a sample of everything."""

AT_ONCE: Final = 20
"""Traces made in a row: about a millisecond, which is what other requests may have to wait for them."""

Finish = Callable[[RequestRecord, float], None]


class KeptRequest(NamedTuple):
    """A request whose trace is kept, and the monotonic instant at which it ended."""

    record: RequestRecord
    ended_at: float


class Observed(Around):
    """A recorder that tells every other: metrics and usage rows, logs, traces. Belongs to one event loop.

    Args:
        inner: metrics and usage rows.
        process: the name of this process, for traces.
        logs: where lines go.
        on_dropped: called with the number of traces that are lost because too many wait.
        measure: makes of a function one that does the same and is accounted for.
        scheme: of the listener, http or https.

    Attributes:
        keep: decides which traces are kept; None for none.
        keeps_content: whether spans hold prompts and completions.
        servers: what spans say of backends, by name.
    """

    def __init__(
        self,
        inner: Recorder,
        *,
        process: str,
        logs: Logs,
        on_dropped: Callable[[int], None],
        measure: Callable[[Finish], Finish] = lambda finish: finish,
        scheme: str = "http",
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._process = process
        self._logged = logs.finished
        self._on_dropped = on_dropped
        self._scheme = scheme
        self._told = measure(self._tell)
        self._wall = wall
        self._clock = clock
        self._kept: deque[KeptRequest] = deque()
        self.keep: Keep | None = None
        self.keeps_content = False
        self.servers: Mapping[str, Server] = {}

    def finish(self, record: RequestRecord, now: float) -> None:
        if not record.finished:
            self._told(record, now)

    def _tell(self, record: RequestRecord, now: float) -> None:
        if self.keep is not None:
            record.kept = self.keep.reason(record, now)
        self._finish(record, now)
        self._logged(record, now)
        if record.kept:
            if len(self._kept) >= MAX_KEPT:
                self._on_dropped(1)
            else:
                self._kept.append(KeptRequest(record, now))

    @property
    def waiting(self) -> int:
        """Requests whose trace is not made yet."""
        return len(self._kept)

    def traces(self) -> tuple[Trace, ...]:
        """The traces of the requests that were kept since the last call, at most `AT_ONCE`, the oldest first."""
        kept = self._kept
        if not kept:
            return ()
        offset_s = self._wall() - self._clock()
        return tuple(
            trace_of(
                record,
                ended_at,
                wall_offset_s=offset_s,
                process=self._process,
                content=self.keeps_content,
                servers=self.servers,
                scheme=self._scheme,
            )
            for record, ended_at in (kept.popleft() for _ in range(min(len(kept), AT_ONCE)))
        )
