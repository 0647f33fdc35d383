"""Single flight: of requests with the same key that come at the same time, one goes to a backend; the others wait for it.

    flight = flights.join(key)
    answer = None if flight.leads else await flight.wait()
    if answer is None:                       # it leads, or goes on by itself
        try:
            ...                              # ask a backend, collecting what is sent on
            flight.land(answer)              # or flight.scatter(), if the answer cannot be shared
        finally:
            flight.leave()                   # does nothing after land or scatter

Who waits gets the leader's answer whole, when it is complete. Of one worker; not for: keeping answers (memory.py, redis.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum, auto
from typing import Final

from llm_router.cache.base import Cached

MOST_LEADERS: Final = 3
"""So many may leave a flight without an answer one after the other. If a backend answers nobody, whoever still waits goes to
it by itself, instead of waiting for each other's timeouts in a row."""


class _State(Enum):
    WAITING = auto()
    LEADING = auto()
    ALONE = auto()  # neither waits for others nor do others wait for it


class _Group:
    """Everybody with one key: who leads, and who waits, the longest first."""

    __slots__ = ("leaders", "waiting")

    def __init__(self) -> None:
        self.leaders = 1
        self.waiting: deque[Flight] = deque()


class Flights:
    """The requests that are in flight, by key. Of one event loop; holds nothing about a key when nobody asks for it."""

    def __init__(self) -> None:
        self._groups: dict[bytes, _Group] = {}

    def __repr__(self) -> str:
        return f"<Flights {len(self._groups)} keys, {self.waiting} waiting>"

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def waiting(self) -> int:
        """Requests that wait for the answer of another."""
        return sum(len(group.waiting) for group in self._groups.values())

    def join(self, key: bytes) -> Flight:
        """Lead if nobody asks for this key now, else wait for whoever does. Call `leave` in the end, whatever happens."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
            return Flight(self._groups, key, group, _State.LEADING)
        flight = Flight(self._groups, key, group, _State.WAITING)
        group.waiting.append(flight)
        return flight


class Flight:
    """One request's part in a flight; made by `Flights.join`."""

    __slots__ = ("_future", "_group", "_groups", "_key", "_state")

    def __init__(self, groups: dict[bytes, _Group], key: bytes, group: _Group, state: _State) -> None:
        self._groups = groups
        self._key = key
        self._group = group
        self._state = state
        self._future: asyncio.Future[Cached | None] | None = None
        if state is _State.WAITING:
            self._future = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Flight {self._state.name.lower()}, {len(self._group.waiting)} waiting>"

    @property
    def leads(self) -> bool:
        """Whether others with the same key wait for this request's answer, or would."""
        return self._state is _State.LEADING

    async def wait(self) -> Cached | None:
        """The leader's answer; None if this request has to ask a backend itself, because the leader had none to share.

        Then it may lead itself (`leads`), so it still has to `land`, `scatter` or `leave`. Cancelled, it has left.
        """
        assert self._future is not None, "a leader has nobody to wait for"
        try:
            return await self._future
        except asyncio.CancelledError:
            self.leave()  # in the same moment it may have been made the leader: then the next one is
            raise

    def land(self, answer: Cached) -> None:
        """Give everybody who waits the answer. Does nothing unless this request leads."""
        self._end(answer)

    def scatter(self) -> None:
        """Let everybody who waits ask a backend: there is an answer, but it cannot be shared (too large, an error of the
        caller's making, from another model). Does nothing unless this request leads."""
        self._end(None)

    def leave(self) -> None:
        """Go, without an answer: it failed, or the client left. If this request leads, whoever waits longest leads next.

        Does nothing after `land`, `scatter` or `leave`.
        """
        if self._state is _State.WAITING:
            self._state = _State.ALONE
            self._group.waiting.remove(self)
            return
        if self._state is not _State.LEADING:
            return
        group = self._group
        while group.waiting and group.leaders < MOST_LEADERS:
            following = group.waiting.popleft()
            if following.wake(_State.LEADING, None):
                self._state = _State.ALONE
                group.leaders += 1
                return
        self._end(None)

    def _end(self, answer: Cached | None) -> None:
        if self._state is not _State.LEADING:
            return
        self._state = _State.ALONE
        del self._groups[self._key]
        for flight in self._group.waiting:
            flight.wake(_State.ALONE, answer)
        self._group.waiting.clear()

    def wake(self, state: _State, answer: Cached | None) -> bool:
        """For the leader: end this one's wait. False if nobody notices: its task was cancelled, and did not run since."""
        assert self._future is not None
        if self._future.done():
            self._state = _State.ALONE
            return False
        self._state = state
        self._future.set_result(answer)
        return True
