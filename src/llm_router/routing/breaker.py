"""The circuit breaker of one backend: a pure state machine that says when to leave a backend alone.

    CLOSED ── too many failed, or too many slow ──► OPEN ── cooldown over ──► HALF_OPEN ── probes succeed ──► CLOSED
                                                      ▲                           │
                                                      └──── a probe fails ────────┘

Who wants to try a backend takes a ticket and brings it back with the outcome. A ticket holds for the period in which
it was given: what ends later than the circuit changed says nothing any more.
Not for: what counts as a failure (router.py) or telling other processes (processes).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from llm_router.routing.table import BreakerSpec

_BUCKETS = 10  # of the window: what is counted is between nine and ten tenths of it old
_MOST_DOUBLINGS = 30  # the maximum is reached long before; a float would overflow after a thousand


class State(IntEnum):
    """The values of `circuit_state`."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


def _tell_nobody(state: State, until: float) -> None:
    pass


class Breaker:
    """Counts attempts over a sliding window. Instants are monotonic seconds.

    Args:
        on_change: called with the new state and, when it is open, the instant from which on it may be probed (else 0);
            not for what `adopt` changes.
    """

    __slots__ = (
        "_attempts",
        "_bucket",
        "_failed",
        "_on_change",
        "_openings",
        "_period",
        "_probing",
        "_slow",
        "_spared_until",
        "_spec",
        "_succeeded",
        "_width_s",
        "open_until",
        "state",
    )

    def __init__(self, spec: BreakerSpec, on_change: Callable[[State, float], None] = _tell_nobody) -> None:
        self._spec = spec
        self._on_change = on_change
        self._width_s = spec.window_s / _BUCKETS
        self._attempts = [0] * _BUCKETS
        self._failed = [0] * _BUCKETS
        self._slow = [0] * _BUCKETS
        self._bucket = 0  # number of the newest one since the clock's beginning
        self._period = 1  # counts changes of state
        self._openings = 0  # in a row
        self._probing = 0
        self._succeeded = 0  # probes of this half-open period
        self._spared_until = 0.0  # as the backend asked by Retry-After
        self.open_until = 0.0
        self.state = State.CLOSED

    def __repr__(self) -> str:
        return (
            f"<Breaker {self.state.name} failed={sum(self._failed)} slow={sum(self._slow)} of {sum(self._attempts)} "
            f"probing={self._probing} open_until={self.open_until:.1f}>"
        )

    def state_at(self, now: float) -> State:
        """The state as whoever asks now would find it: an open circuit whose cooldown is over is half-open."""
        return State.HALF_OPEN if self.state is State.OPEN and now >= self.open_until else self.state

    def may(self, now: float) -> bool:
        """Whether `allow` would let an attempt through."""
        if self.state is State.CLOSED:
            return True
        if self.state is State.OPEN:
            return now >= self.open_until
        return self._probing + self._succeeded < self._spec.probes

    def allow(self, now: float) -> int:
        """Let an attempt through, or not.

        Returns: a ticket for `record`, `release` or `give_up`, one of which must follow; 0 if the attempt must not be made.
        """
        if self.state is State.CLOSED:
            return self._period
        if not self.may(now):
            return 0
        if self.state is State.OPEN:
            self._probing = self._succeeded = 0
            self._enter(State.HALF_OPEN, 0.0)
        self._probing += 1
        return self._period

    def release(self, ticket: int) -> None:
        """The attempt ended without telling anything of the backend: the caller's fault, or our own bound."""
        if ticket == self._period and self.state is State.HALF_OPEN:
            self._probing -= 1

    def give_up(self, ticket: int, now: float, *, waited_s: float) -> None:
        """The attempt was cancelled after `waited_s` seconds without a first byte: that it is slow may be known already."""
        if 0.0 < self._spec.slow_s < waited_s:
            self.record(ticket, now, failed=False, took_s=waited_s)
        else:
            self.release(ticket)

    def record(
        self, ticket: int, now: float, *, failed: bool, took_s: float = 0.0, retry_after_s: float | None = None
    ) -> None:
        """The attempt ended.

        Args:
            took_s: seconds until its first byte.
            retry_after_s: how long the backend asked to be left alone.
        """
        if ticket != self._period:
            return
        spec = self._spec
        is_slow = 0.0 < spec.slow_s < took_s
        if retry_after_s is not None and now + retry_after_s > self._spared_until:
            self._spared_until = now + retry_after_s
        if self.state is State.HALF_OPEN:
            self._probing -= 1
            if failed or is_slow:
                self._open(now)
            else:
                self._succeeded += 1
                if self._succeeded >= spec.probes:
                    self._close()
            return
        slot = self._advance(now)
        self._attempts[slot] += 1
        if failed or is_slow:
            self._failed[slot] += failed
            self._slow[slot] += is_slow
            self._judge(now)

    def break_off(self, ticket: int, now: float) -> None:
        """An attempt that was recorded as a success, as its first bytes had come, failed after all."""
        if ticket != self._period:
            return
        if self.state is State.HALF_OPEN:
            self._open(now)
        else:
            self._failed[self._advance(now)] += 1
            self._judge(now)

    def adopt(self, until: float, now: float) -> bool:
        """Another process found the backend failing and leaves it alone until then; so do we.

        Returns: whether that is news.
        """
        until = min(until, now + self._spec.cooldown_max_s)
        if not self._spec.enabled or until <= now or (self.state is State.OPEN and until <= self.open_until):
            return False
        self._openings = max(1, self._openings)
        self._period += 1
        self.state = State.OPEN
        self.open_until = until
        return True

    def retire(self) -> None:
        """The backend is another one from now on: attempts that are under way change nothing that anybody is told."""
        self._on_change = _tell_nobody

    def _advance(self, now: float) -> int:
        """Index of the bucket for `now`; empties those that have left the window."""
        bucket = int(now / self._width_s)
        behind = bucket - self._bucket
        if behind > 0:
            for step in range(min(behind, _BUCKETS)):
                old = (bucket - step) % _BUCKETS
                self._attempts[old] = self._failed[old] = self._slow[old] = 0
            self._bucket = bucket
        return self._bucket % _BUCKETS

    def _judge(self, now: float) -> None:
        spec = self._spec
        attempts = sum(self._attempts)
        if not spec.enabled or attempts < spec.min_attempts:
            return
        if sum(self._failed) >= spec.error_ratio * attempts or (
            spec.slow_s and sum(self._slow) >= spec.slow_ratio * attempts
        ):
            self._open(now)

    def _open(self, now: float) -> None:
        spec = self._spec
        cooldown_s = spec.cooldown_s * 2.0 ** min(self._openings, _MOST_DOUBLINGS)
        self._openings += 1
        self.open_until = now + min(max(cooldown_s, self._spared_until - now), spec.cooldown_max_s)
        self._enter(State.OPEN, self.open_until)

    def _close(self) -> None:
        self._openings = 0
        self._spared_until = 0.0
        for counts in (self._attempts, self._failed, self._slow):
            counts[:] = [0] * _BUCKETS
        self._enter(State.CLOSED, 0.0)

    def _enter(self, state: State, until: float) -> None:
        self._period += 1
        self.state = state
        if state is not State.OPEN:
            self.open_until = 0.0
        self._on_change(state, until)
