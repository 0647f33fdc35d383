"""The kept traces of late, in memory: the newest, the slowest of the last hour and the failed, shared fairly.

Three shelves: one holds the newest traces, one the failed ones, one the slowest. A trace may stand on several and is
gone when it has left all. A shelf that is full gives up a trace of whichever (route, model) takes most of it, so that a
busy model cannot push out what is known of a quiet one. Traces lie here encoded: a fifth of the memory that objects
would take, and nothing for the garbage collector to walk through.
Not for: deciding what is kept (keep.py) or showing it (admin/debug.py).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Final, Literal, NamedTuple

import msgspec

from llm_router.observe.tracing.trace import Trace

Show = Literal["recent", "slowest", "failed"]
SHOWS: Final[tuple[Show, ...]] = ("recent", "slowest", "failed")

SLOWEST_S: Final = 3600.0
"""So long a trace may stand among the slowest."""

LEAST_PREFIX: Final = 4
"""Characters of an id from which on its beginning is enough."""

_MOST_BYTES: Final = 64 * 1024
"""Of one encoded trace: twenty times an ordinary one; more is prompts and completions, which are then cut."""

_MOST_TEXT: Final = 2048  # characters that are left of a text that is cut
_MOST_SPANS: Final = 200  # of a trace that is too large even so
_MOST_BARE_TEXT: Final = 100  # characters of an error in such a one, which has no attributes any more
_EXPIRE_EVERY_S: Final = 60.0


class Ambiguous(LookupError):
    """The beginning of an id belongs to several traces; `ids` has their whole ids, newest first."""

    def __init__(self, ids: list[str]) -> None:
        super().__init__(f"{len(ids)} traces")
        self.ids = ids


class Group(NamedTuple):
    """What shares a shelf with the others."""

    route: str
    model: str


class GroupSummary(NamedTuple):
    """What is kept of one group. `newest_ns` is the newest end, Unix nanoseconds; `slowest_ns` of all that are kept."""

    group: Group
    traces: int
    failed: int
    newest_ns: int
    slowest_ns: int


class StoreStatistics(NamedTuple):
    """How full the store is. `bytes` are those of the encoded traces; `evicted` counts traces that made room."""

    traces: int
    traces_limit: int
    bytes: int
    bytes_limit: int
    evicted: int


class _Kept:
    """A trace that is kept, and what is asked of it without decoding it."""

    __slots__ = ("body", "duration_ns", "end_ns", "failed", "group", "request_id", "shelves", "trace_id", "weight")

    def __init__(self, trace: Trace, body: bytes) -> None:
        self.body = body
        self.trace_id = trace.trace_id
        self.request_id = trace.request_id
        self.group = Group(trace.route, trace.model)
        self.end_ns = trace.end_ns
        self.duration_ns = trace.end_ns - trace.start_ns
        # A client that went away is no failure of the router's, and there are many of them.
        self.failed = bool(trace.error_type) and trace.outcome != "cancelled"
        self.weight = 0
        self.shelves = 0


_BY_END: Final[Callable[[_Kept], int]] = attrgetter("end_ns")
_BY_DURATION: Final[Callable[[_Kept], int]] = attrgetter("duration_ns")


class _Shelf:
    """Traces by group, each group ascending by rank; the first of the heaviest group has to go."""

    def __init__(self, rank: Callable[[_Kept], int], most: int) -> None:
        self._rank = rank
        self._most = most
        self._weight = 0
        self._weights: dict[Group, int] = {}
        self.groups: dict[Group, list[_Kept]] = {}

    def add(self, kept: _Kept) -> list[_Kept]:
        """Put it in its place. Returns what had to go for it, which may be itself."""
        insort(self.groups.setdefault(kept.group, []), kept, key=self._rank)
        self._weights[kept.group] = self._weights.get(kept.group, 0) + kept.weight
        self._weight += kept.weight
        gone = []
        while self._weight > self._most:
            heaviest = max(self._weights, key=self._weights.__getitem__)
            gone.append(self._remove(heaviest, 0))
        return gone

    def expire(self, end_ns: int) -> list[_Kept]:
        """Take out those that ended before that instant."""
        gone = [kept for members in self.groups.values() for kept in members if kept.end_ns < end_ns]
        for kept in gone:
            self._remove(kept.group, self.groups[kept.group].index(kept))
        return gone

    def best(self, members: Iterable[_Kept], limit: int) -> list[_Kept]:
        """The highest by rank, the highest first."""
        return sorted(members, key=self._rank, reverse=True)[:limit]

    def _remove(self, group: Group, index: int) -> _Kept:
        members = self.groups[group]
        kept = members.pop(index)
        self._weight -= kept.weight
        self._weights[group] -= kept.weight
        if not members:
            del self.groups[group], self._weights[group]
        return kept


class TraceStore:
    """The traces that can be looked at. Belongs to one thread.

    Args:
        max_traces: that are kept at most: half for the newest, a quarter each for the failed and the slowest.
        max_bytes: of all encoded traces. A large trace weighs as several.
        wall: Unix seconds; what counts as the last hour.
    """

    def __init__(self, max_traces: int, *, max_bytes: int = 64 * 1024 * 1024, wall: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._wall = wall
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Trace).decode
        self._kept: dict[int, _Kept] = {}  # by identity, in the order of their arrival
        self._evicted = 0
        self._bytes = 0
        self._expires_at = 0.0
        self._limit(max_traces)

    def _limit(self, max_traces: int) -> None:
        self._max_traces = max_traces
        self._unit = max(1, self._max_bytes // max(1, max_traces))
        quarter = max_traces // 4 * self._unit
        self._recent = _Shelf(_BY_END, max_traces * self._unit - 2 * quarter)
        self._failed = _Shelf(_BY_END, quarter)
        self._slowest = _Shelf(_BY_DURATION, quarter)
        self._shelves: dict[Show, _Shelf] = {
            "recent": self._recent,
            "slowest": self._slowest,
            "failed": self._failed,
        }

    # -- putting in ---------------------------------------------------------------------------------------

    def add(self, trace: Trace) -> None:
        """Keep a trace, and let others go where there is no room for it."""
        body = self._encode(trace)
        if len(body) > _MOST_BYTES:
            body = self._encode(_shortened(trace, self._encode))
        self._place(_Kept(trace, body))

    def resize(self, max_traces: int) -> None:
        """Keep so many from now on; of those that are here, the ones that still have a place."""
        kept = list(self._kept.values())
        self._kept.clear()
        self._bytes = 0
        self._limit(max_traces)
        for one in kept:
            one.shelves = 0
            self._place(one)

    def _place(self, kept: _Kept) -> None:
        now = self._wall()
        if now >= self._expires_at:
            self._expires_at = now + _EXPIRE_EVERY_S
            self._leave(self._slowest.expire(_hour_ago_ns(now)), evicted=False)
        kept.weight = max(self._unit, len(kept.body))
        self._kept[id(kept)] = kept
        self._bytes += len(kept.body)
        # All at once, as it may have to go from one shelf while another takes it.
        shelves = [self._recent, *([self._failed] if kept.failed else ())]
        if kept.end_ns >= _hour_ago_ns(now):
            shelves.append(self._slowest)
        kept.shelves = len(shelves)
        for shelf in shelves:
            self._leave(shelf.add(kept), evicted=True)

    def _leave(self, gone: Iterable[_Kept], *, evicted: bool) -> None:
        for kept in gone:
            kept.shelves -= 1
            if not kept.shelves:
                del self._kept[id(kept)]
                self._bytes -= len(kept.body)
                self._evicted += evicted

    # -- looking at ---------------------------------------------------------------------------------------

    def select(self, show: Show, *, route: str | None = None, model: str | None = None, limit: int) -> list[Trace]:
        """The newest, the slowest of the last hour or the newest failed ones: at most `limit`, the best first.

        Args:
            route, model: only those; None: all.
        """
        shelf = self._shelves[show]
        since_ns = _hour_ago_ns(self._wall()) if show == "slowest" else 0
        members = (
            kept
            for group, members in shelf.groups.items()
            if route in (None, group.route) and model in (None, group.model)
            for kept in members
            if kept.end_ns >= since_ns
        )
        return [self._decode(kept.body) for kept in shelf.best(members, limit)]

    def find(self, id: str, *, limit: int) -> list[Trace]:
        """The requests with this request id or in the trace of this id, newest first; none if there is none.

        The beginning of an id does too, from `LEAST_PREFIX` characters on, as long as it belongs to one trace.
        Raises: Ambiguous.
        """
        trace_id = id.lower()
        found = [kept for kept in self._kept.values() if id == kept.request_id or trace_id == kept.trace_id]
        if not found and len(id) >= LEAST_PREFIX:
            found = [
                kept
                for kept in self._kept.values()
                if kept.request_id.startswith(id) or kept.trace_id.startswith(trace_id)
            ]
            if len({kept.trace_id for kept in found}) > 1:
                newest = sorted(found, key=_BY_END, reverse=True)
                raise Ambiguous(
                    list(dict.fromkeys(k.trace_id if k.trace_id.startswith(trace_id) else k.request_id for k in newest))
                )
        return [self._decode(kept.body) for kept in sorted(found, key=_BY_END, reverse=True)[:limit]]

    def groups(self) -> list[GroupSummary]:
        """What is kept, by route and model."""
        members: dict[Group, list[_Kept]] = {}
        for kept in self._kept.values():
            members.setdefault(kept.group, []).append(kept)
        return [
            GroupSummary(
                group,
                len(kept),
                sum(one.failed for one in kept),
                max(one.end_ns for one in kept),
                max(one.duration_ns for one in kept),
            )
            for group, kept in sorted(members.items())
        ]

    def statistics(self) -> StoreStatistics:
        """How full it is."""
        return StoreStatistics(len(self._kept), self._max_traces, self._bytes, self._max_bytes, self._evicted)

    def __repr__(self) -> str:
        return f"<TraceStore: {len(self._kept)} of {self._max_traces} traces, {self._bytes} bytes>"


def _hour_ago_ns(now: float) -> int:
    return int((now - SLOWEST_S) * 1e9)


def _shortened(trace: Trace, encode: Callable[[Trace], bytes]) -> Trace:
    """The same with its long texts cut; without attributes and its last spans if that is not enough."""
    spans = tuple(
        msgspec.structs.replace(
            span,
            error=_cut(span.error),
            attributes={
                name: _cut(value) if isinstance(value, str) else value for name, value in span.attributes.items()
            },
        )
        for span in trace.spans
    )
    shorter = msgspec.structs.replace(trace, spans=spans)
    if len(encode(shorter)) <= _MOST_BYTES:
        return shorter
    bare = tuple(
        msgspec.structs.replace(span, error=_cut(span.error, _MOST_BARE_TEXT), attributes={})
        for span in spans[:_MOST_SPANS]
    )
    return msgspec.structs.replace(trace, spans=bare)


def _cut(text: str, most: int = _MOST_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"
