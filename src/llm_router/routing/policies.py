"""Which of several deployments of a model gets the next attempt, and why.

A policy is synchronous and decides from what is in memory; it never waits. The reason it gives goes to
`routing_decisions_total` and to the reply's headers. Not for: what happens when the choice fails (router.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol


class Reason(StrEnum):
    """Why a deployment was chosen. Closed: the values are label values."""

    ONLY_DEPLOYMENT = "only-deployment"
    TURN = "turn"
    LEAST_LOADED = "least-loaded"


class Candidate(Protocol):
    """What a policy may know of a deployment's backend."""

    @property
    def name(self) -> str: ...

    @property
    def in_use(self) -> int:
        """Requests that the backend is working on, those waiting for a connection included: exact for this process,
        and what other processes last said of theirs."""


class Policy(Protocol):
    """Chooses among candidates; keeps whatever state it needs, per model."""

    name: str

    def choose(self, model: str, candidates: Sequence[Candidate]) -> tuple[int, Reason]:
        """Index into `candidates` (at least one) and the reason."""


class RoundRobin:
    """Each deployment in turn, separately for each model."""

    name = "round-robin"

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def choose(self, model: str, candidates: Sequence[Candidate]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        turn = self._turns.get(model, -1) + 1
        self._turns[model] = turn
        return turn % len(candidates), Reason.TURN


class LeastLoaded:
    """The deployment with the fewest requests in flight; equals take turns, so that idle ones share."""

    name = "least-loaded"

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def choose(self, model: str, candidates: Sequence[Candidate]) -> tuple[int, Reason]:
        count = len(candidates)
        if count == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        turn = self._turns.get(model, -1) + 1
        self._turns[model] = turn
        best = min(range(count), key=lambda i: (candidates[i].in_use, (i - turn) % count))
        return best, Reason.LEAST_LOADED


POLICIES: dict[str, Callable[[], Policy]] = {RoundRobin.name: RoundRobin, LeastLoaded.name: LeastLoaded}
