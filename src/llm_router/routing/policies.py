"""Which of several deployments of a model gets the next attempt, and why.

A policy is synchronous and decides from what is in memory; it never waits. The reason it gives goes to
`routing_decisions_total` and to the reply's headers. Not for: what happens when the choice fails (router.py).

Three kinds. Round-robin, random and least-loaded look at no request and at nothing else of a deployment. Those that
score (quality-first, cost-optimized, speed-priority, balanced) leave out deployments that are known not to fit the
request, if others do. Capability-match is about the fit alone. Equals are told apart by load, and take turns.

What is compared by ratio, is so in the same way: of two values the better one gains 1 - smaller / larger, a number from
0 (equal) to 1 (one is free, or instant). Hence a balance: twice the quality, half the price and half the time weigh the
same, whatever their units. What nobody said: a quality counts as 0.5, a price as no lower than any known one (unknown is
not free), abilities and context as enough.

Speed is measured, and what is not measured lately is explored: one in `EXPLORE_EVERY` choices of a model may go to a
deployment that was not measured for `REMEASURE_S`, each at most once in `EXPLORE_GAP_S`. So a new deployment gets a
part of the traffic, never a rush, and one that was slow once is tried again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from llm_router.chat import Usage
from llm_router.errors import ConfigError
from llm_router.models.prices import Price
from llm_router.routing.needs import TYPICAL_OUTPUT_TOKENS, Need
from llm_router.routing.speed import Speed
from llm_router.routing.table import CAPABILITIES

_log = logging.getLogger(__name__)

ENTRY_POINTS: Final = "llm_router.policies"
"""The group of entry points in which packages offer functions for the strategy `custom`."""

UNKNOWN_QUALITY: Final = 0.5

WEIGHT_QUALITY: Final = 0.25
WEIGHT_PRICE: Final = 0.25
WEIGHT_SPEED: Final = 0.25
WEIGHT_LOAD: Final = 0.25
"""Of `balanced`; equal, because anything else would be an opinion. Each component is 0..1, and so is their sum."""

IDLE_LOAD: Final = 8
"""Requests in flight are compared with this much added: else one instead of none would weigh as much as a model that is
free. 8 in flight against none count half."""

TIE: Final = 0.02
"""Scores of `balanced` this close are equal: less than one more request in flight on an idle backend makes (0.028), and
more than the noise of measured speeds, which would otherwise send everything to one of two like backends."""

FAST_ENOUGH: Final = 1.1
"""Deployments this much slower than the fastest share its load under `speed-priority`, for the same reason."""

EXPLORE_EVERY: Final = 10
REMEASURE_S: Final = 60.0
EXPLORE_GAP_S: Final = 1.0

INPUT_SHARE: Final = 0.75
"""Part of the input in a price where there is no request to go by: three input tokens for one of output, the blend
that public comparisons of models use."""

_LOOK_EVERY: Final = 16
"""Choices after which the length of a usual reply is worked out again; it is the same for all, so it may be old."""

_COMPLAIN_EVERY_S: Final = 60.0
_ABLE_TO_ANYTHING: Final = len(CAPABILITIES) + 1


class Reason(StrEnum):
    """Why a deployment was chosen. Closed: the values are label values."""

    ONLY_DEPLOYMENT = "only-deployment"
    TURN = "turn"
    CHANCE = "chance"
    LEAST_LOADED = "least-loaded"
    BEST_QUALITY = "best-quality"
    LOWEST_COST = "lowest-cost"
    FASTEST = "fastest"
    BEST_BALANCE = "best-balance"
    BEST_FIT = "best-fit"
    NONE_FITS = "none-fits"
    EXPLORED = "explored"
    CUSTOM = "custom"
    CUSTOM_FAILED = "custom-failed"


class Candidate(Protocol):
    """What a policy may know of a deployment. Of one object, only `in_use` and what `speed` says ever change."""

    @property
    def name(self) -> str:
        """The backend's name."""

    @property
    def in_use(self) -> int:
        """Requests that the backend is working on, those waiting for a connection included: exact for this process,
        and what other processes last said of theirs."""

    @property
    def quality(self) -> float | None:
        """0..1 by the operator's judgement; None when nobody said."""

    @property
    def price(self) -> Price | None:
        """None when unknown."""

    @property
    def context_tokens(self) -> int:
        """0 when unknown."""

    @property
    def capabilities(self) -> frozenset[str] | None:
        """Of `table.CAPABILITIES`; None when unknown."""

    @property
    def speed(self) -> Speed:
        """What was measured here; the same object for as long as the deployment is there."""


class Policy(Protocol):
    """Chooses among candidates; keeps whatever state it needs, per model."""

    name: str

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        """Index into `candidates` (at least one) and the reason.

        Args:
            need: what the request needs; costs microseconds, so it is asked only when it matters.
        """

    def keep(self, models: Collection[str]) -> None:
        """Forget what is remembered of models that are not among these."""


CustomFunction = Callable[[str, Sequence[Candidate], Callable[[], Need]], int | str | Candidate]
"""Takes what `Policy.choose` takes, and returns the candidate to ask, its index, or its backend's name. It is called in
the event loop for every attempt at a model with several deployments: it must not block."""


class Means(NamedTuple):
    """What policies are made with: a source of chance, monotonic seconds, and the operator's function."""

    rng: random.Random
    clock: Callable[[], float]
    custom: CustomFunction | None = None


# -- those that look at nothing, or at load -------------------------------------------------------------


class RoundRobin:
    """Each deployment in turn, separately for each model."""

    name = "round-robin"

    def __init__(self, means: Means) -> None:
        self._turns: dict[str, int] = {}

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        turn = self._turns.get(model, -1) + 1
        self._turns[model] = turn
        return turn % len(candidates), Reason.TURN

    def keep(self, models: Collection[str]) -> None:
        self._turns = {model: turn for model, turn in self._turns.items() if model in models}


class Random:
    """Any deployment, with the same chance."""

    name = "random"

    def __init__(self, means: Means) -> None:
        self._random = means.rng.random

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        return int(self._random() * len(candidates)), Reason.CHANCE

    def keep(self, models: Collection[str]) -> None:
        """It remembers nothing."""


class LeastLoaded(RoundRobin):
    """The deployment with the fewest requests in flight; equals take turns, so that idle ones share."""

    name = "least-loaded"

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        turn = self._turns.get(model, -1) + 1
        self._turns[model] = turn
        return _least_loaded(candidates, turn), Reason.LEAST_LOADED


def _least_loaded(candidates: Sequence[Candidate], turn: int) -> int:
    """Index of the one with the fewest requests in flight; of equals, the first one from `turn` on."""
    loads = [candidate.in_use for candidate in candidates]
    count = len(loads)
    first = turn % count
    loads = loads[first:] + loads[:first]
    return (loads.index(min(loads)) + first) % count


# -- those that score -----------------------------------------------------------------------------------

T = TypeVar("T")


class _View(Generic[T]):
    """What stays the same about a set of candidates, worked out once for as long as the same ones come."""

    __slots__ = ("alike", "candidates", "fixed", "measured", "parts", "speeds", "tokens", "turn", "usual_s")

    def __init__(self, candidates: Sequence[Candidate], fixed: T) -> None:
        self.candidates = candidates[:]  # of the same type, which comparing demands; ours, should theirs change
        self.fixed = fixed
        self.turn = 0
        self.speeds = [candidate.speed for candidate in candidates]
        self.measured = 0
        self.tokens = 0.0
        self.usual_s = 0.0
        self.alike = _are_alike(candidates)
        self.parts: dict[tuple[int, ...], _View[T]] = {}

    def look(self) -> None:
        """Finds out who is measured, and how long a usual reply is: the length at which all are compared."""
        known = [speed for speed in self.speeds if speed.samples]
        self.measured = len(known)
        if known:
            self.tokens = sum(speed.output_tokens for speed in known) / len(known)
            self.usual_s = sum(speed.seconds(self.tokens) for speed in known) / len(known)


class _Scoring(ABC, Generic[T]):
    """Chooses the best of those that fit. A subclass says what is best, and what of that it can work out beforehand."""

    name: str

    def __init__(self, means: Means) -> None:
        self._clock = means.clock
        self._views: dict[str, _View[T]] = {}

    @abstractmethod
    def _look(self, candidates: Sequence[Candidate]) -> T:
        """What stays the same about these candidates."""

    @abstractmethod
    def _best(self, view: _View[T], candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        """The best of at least two candidates."""

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        view = self._views.get(model)
        if view is None or view.candidates != candidates:
            turn = view.turn if view is not None else 0
            view = self._views[model] = _View(candidates, self._look(candidates))
            view.turn = turn
        view.turn += 1
        if view.alike:
            return self._best(view, candidates, need)
        known = need()
        fitting = tuple(index for index, candidate in enumerate(candidates) if fits(candidate, known))
        if len(fitting) in {0, len(candidates)}:
            return self._best(view, candidates, lambda: known)
        if len(fitting) == 1:
            return fitting[0], Reason.BEST_FIT
        chosen = [candidates[index] for index in fitting]
        part = view.parts.get(fitting)
        if part is None:
            part = view.parts[fitting] = _View(chosen, self._look(chosen))
        part.turn += 1
        index, reason = self._best(part, chosen, lambda: known)
        return fitting[index], reason

    def keep(self, models: Collection[str]) -> None:
        self._views = {model: view for model, view in self._views.items() if model in models}


def _are_alike(candidates: Sequence[Candidate]) -> bool:
    """Whether any request that fits one of them fits all."""
    first = candidates[0]
    room = first.context_tokens
    able = first.capabilities
    return all(other.context_tokens == room and other.capabilities == able for other in candidates)


def fits(candidate: Candidate, need: Need) -> bool:
    """Whether a deployment can serve such a request, as far as is known."""
    room = candidate.context_tokens
    if room and need.input_tokens + need.output_tokens > room:
        return False
    able = candidate.capabilities
    return able is None or not need.capabilities or need.capabilities <= able


def _of_equals(candidates: Sequence[Candidate], equals: Sequence[int], turn: int, reason: Reason) -> tuple[int, Reason]:
    """One of those that are as good as each other; if that is all of them, it was the load that decided."""
    if len(equals) == 1:
        return equals[0], reason
    if len(equals) == len(candidates):
        return _least_loaded(candidates, turn), Reason.LEAST_LOADED
    return equals[_least_loaded([candidates[index] for index in equals], turn)], reason


class QualityFirst(_Scoring[tuple[int, ...]]):
    """The deployment with the best answers, by the configured `quality`."""

    name = "quality-first"

    def _look(self, candidates: Sequence[Candidate]) -> tuple[int, ...]:
        qualities = [_quality(candidate) for candidate in candidates]
        best = max(qualities)
        return tuple(index for index, quality in enumerate(qualities) if quality == best)

    def _best(
        self, view: _View[tuple[int, ...]], candidates: Sequence[Candidate], need: Callable[[], Need]
    ) -> tuple[int, Reason]:
        return _of_equals(candidates, view.fixed, view.turn, Reason.BEST_QUALITY)


class CostOptimized(_Scoring[tuple[int, ...] | None]):
    """The deployment on which this request costs least, if its answer gets as long as it may."""

    name = "cost-optimized"

    def _look(self, candidates: Sequence[Candidate]) -> tuple[int, ...] | None:
        """Those that are cheapest for any request; None if that depends on its size."""
        known = [candidate.price for candidate in candidates if candidate.price is not None]
        if not known:
            return tuple(range(len(candidates)))
        if any(price.tiers for price in known):
            return None
        low = (min(price.input for price in known), min(price.output for price in known))
        cheapest = tuple(
            index
            for index, candidate in enumerate(candidates)
            if candidate.price is not None and (candidate.price.input, candidate.price.output) == low
        )
        return cheapest or None

    def _best(
        self, view: _View[tuple[int, ...] | None], candidates: Sequence[Candidate], need: Callable[[], Need]
    ) -> tuple[int, Reason]:
        if view.fixed is not None:
            return _of_equals(candidates, view.fixed, view.turn, Reason.LOWEST_COST)
        known = need()
        usage = Usage(known.input_tokens, known.output_tokens or TYPICAL_OUTPUT_TOKENS)
        costs = [math.inf if (price := each.price) is None else price.cost_usd(usage) for each in candidates]
        least = min(costs)
        equals = [index for index, cost in enumerate(costs) if cost == least]
        return _of_equals(candidates, equals, view.turn, Reason.LOWEST_COST)


class SpeedPriority(_Scoring[None]):
    """The deployment that was fastest lately, for a reply of the length that is usual here."""

    name = "speed-priority"

    def _look(self, candidates: Sequence[Candidate]) -> None:
        """Nothing stays the same about speed."""

    def _best(self, view: _View[None], candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        speeds = view.speeds
        if view.measured < len(speeds) or not view.turn % _LOOK_EVERY:
            view.look()
            if not view.measured:
                return _least_loaded(candidates, view.turn), Reason.EXPLORED
        if not view.turn % EXPLORE_EVERY:
            index = _to_explore(candidates, range(len(candidates)), self._clock())
            if index is not None:
                return index, Reason.EXPLORED
        tokens = view.tokens
        seconds = [speed.fixed_s + tokens * speed.per_token_s if speed.samples else math.inf for speed in speeds]
        enough = min(seconds) * FAST_ENOUGH
        equals = [index for index, expected in enumerate(seconds) if expected <= enough]
        return _of_equals(candidates, equals, view.turn, Reason.FASTEST)


class Balanced(_Scoring[list[float]]):
    """The deployment with the best sum of quality, price, speed and load, each normalised to 0..1 per choice."""

    name = "balanced"

    def _look(self, candidates: Sequence[Candidate]) -> list[float]:
        """The part of the score that quality and price make."""
        qualities = [_quality(candidate) for candidate in candidates]
        best = max(qualities) or 1.0
        known = [_blend(candidate.price) for candidate in candidates if candidate.price is not None]
        dearest = max(known, default=0.0)
        prices = [dearest if candidate.price is None else _blend(candidate.price) for candidate in candidates]
        return [
            WEIGHT_QUALITY * quality / best + WEIGHT_PRICE * (1.0 - price / (dearest or 1.0))
            for quality, price in zip(qualities, prices, strict=True)
        ]

    def _best(
        self, view: _View[list[float]], candidates: Sequence[Candidate], need: Callable[[], Need]
    ) -> tuple[int, Reason]:
        # Written out in two loops: this runs for nearly every request, and is half as long as with lists and max().
        if view.measured < len(view.speeds) or not view.turn % _LOOK_EVERY:
            view.look()
        tokens = view.tokens
        slowest_s = 0.0
        busiest = 0
        seconds: list[float] = []
        loads: list[int] = []
        for speed, candidate in zip(view.speeds, candidates):  # noqa: B905  # of the same length by construction
            expected_s = speed.fixed_s + tokens * speed.per_token_s if speed.samples else view.usual_s
            load = candidate.in_use
            seconds.append(expected_s)
            loads.append(load)
            if expected_s > slowest_s:  # noqa: PLR1730  # max() costs three times as much
                slowest_s = expected_s
            if load > busiest:  # noqa: PLR1730  # the same
                busiest = load
        # 1 - x / largest compares as -x / largest does: what all would have more is left out.
        per_second = WEIGHT_SPEED / (slowest_s or 1.0)
        per_request = WEIGHT_LOAD / (busiest + IDLE_LOAD)
        scores: list[float] = []
        best = second = -math.inf
        at = 0
        for fixed, expected_s, load in zip(view.fixed, seconds, loads):  # noqa: B905  # the same
            score = fixed - per_second * expected_s - per_request * load
            if score > best:
                at = len(scores)
                second = best
                best = score
            elif score > second:
                second = score
            scores.append(score)
        if view.measured and not view.turn % EXPLORE_EVERY:
            # Who would not win if it took no time at all need not be asked how long it takes.
            hopeful = [i for i, score in enumerate(scores) if score + per_second * seconds[i] >= best - TIE]
            index = _to_explore(candidates, hopeful, self._clock())
            if index is not None:
                return index, Reason.EXPLORED
        if second < best - TIE:
            return at, Reason.BEST_BALANCE
        equals = [index for index, score in enumerate(scores) if score >= best - TIE]
        return equals[view.turn % len(equals)], Reason.TURN if len(equals) == len(scores) else Reason.BEST_BALANCE


def _quality(candidate: Candidate) -> float:
    quality = candidate.quality
    return UNKNOWN_QUALITY if quality is None else quality


def _blend(price: Price) -> float:
    return INPUT_SHARE * price.input + (1.0 - INPUT_SHARE) * price.output


def _to_explore(candidates: Sequence[Candidate], among: Sequence[int], now: float) -> int | None:
    """The one to measure now: not measured lately, and of those the one not tried for longest; None if none is due."""
    chosen: int | None = None
    oldest = now - EXPLORE_GAP_S
    for index in among:
        speed = candidates[index].speed
        if now - speed.observed_at >= REMEASURE_S and (
            speed.tried_at < oldest or (chosen is None and speed.tried_at == oldest)
        ):
            chosen = index
            oldest = speed.tried_at
    if chosen is not None:
        candidates[chosen].speed.tried_at = now
    return chosen


# -- those that match, and the operator's own -----------------------------------------------------------


class CapabilityMatch:
    """The most modest deployment that can do what the request needs, so that able ones stay free for what needs them.

    Modest is: known to be enough rather than not known; no more abilities than needed; no more context than needed.
    """

    name = "capability-match"

    def __init__(self, means: Means) -> None:
        self._turns: dict[str, int] = {}

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        turn = self._turns.get(model, -1) + 1
        self._turns[model] = turn
        if _are_alike(candidates):
            return _least_loaded(candidates, turn), Reason.LEAST_LOADED
        known = need()
        reason = Reason.BEST_FIT
        ranks = [_excess(candidate, known) if fits(candidate, known) else _NO_FIT for candidate in candidates]
        best = min(ranks)
        if best == _NO_FIT:
            reason = Reason.NONE_FITS
            ranks = [_lack(candidate, known) for candidate in candidates]
            best = min(ranks)
        return _of_equals(candidates, [index for index, rank in enumerate(ranks) if rank == best], turn, reason)

    def keep(self, models: Collection[str]) -> None:
        self._turns = {model: turn for model, turn in self._turns.items() if model in models}


_NO_FIT: Final = (math.inf, math.inf)


def _excess(candidate: Candidate, need: Need) -> tuple[float, float]:
    """How much more than needed it can do: (abilities, context). What is unknown is more than anything known."""
    able = candidate.capabilities
    return (
        _ABLE_TO_ANYTHING if able is None else len(able - need.capabilities),
        candidate.context_tokens or math.inf,
    )


def _lack(candidate: Candidate, need: Need) -> tuple[float, float]:
    """How far it is from what is needed, where none is enough: (abilities it lacks, less the context it has)."""
    able = candidate.capabilities
    return (0 if able is None else len(need.capabilities - able), -(candidate.context_tokens or math.inf))


class Custom:
    """What the operator's function says. `balanced` decides when it raises, or names no candidate."""

    name = "custom"

    def __init__(self, means: Means) -> None:
        if means.custom is None:
            raise ConfigError(
                "routing.custom", "the strategy `custom` needs a function: give its `package.module:function`"
            )
        self._function = means.custom
        self._clock = means.clock
        self._balanced = Balanced(means)
        self._complained_at = -math.inf

    def choose(self, model: str, candidates: Sequence[Candidate], need: Callable[[], Need]) -> tuple[int, Reason]:
        if len(candidates) == 1:
            return 0, Reason.ONLY_DEPLOYMENT
        try:
            index = _index(self._function(model, candidates, need), candidates)
        except Exception as error:
            self._complain(model, error)
            index, _ = self._balanced.choose(model, candidates, need)
            return index, Reason.CUSTOM_FAILED
        return index, Reason.CUSTOM

    def _complain(self, model: str, error: Exception) -> None:
        now = self._clock()
        if now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            _log.warning(
                "the function of the strategy `custom` failed for model %r, so `balanced` decides: %s: %s",
                model,
                type(error).__name__,
                error,
            )

    def keep(self, models: Collection[str]) -> None:
        self._balanced.keep(models)


def _index(said: Any, candidates: Sequence[Candidate]) -> int:
    """The candidate that a function of the operator's means. Raises ValueError if it means none."""
    if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(candidates):
        return said
    for index, candidate in enumerate(candidates):
        if candidate is said or (isinstance(said, str) and candidate.name == said):
            return index
    names = ", ".join(candidate.name for candidate in candidates)
    raise ValueError(
        f"it returned {said!r:.100}, which is no index or name of the {len(candidates)} candidates {names}"
    )


def load_custom(where: str) -> CustomFunction:
    """The function at `package.module:function`, or of that name in the entry points `llm_router.policies`.

    Raises: ConfigError (key `routing.custom`) when it cannot be imported, is not there, or cannot be called as one.
    """
    key = "routing.custom"
    try:
        if ":" in where:
            module, _, path = where.partition(":")
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        else:
            points = importlib.metadata.entry_points(group=ENTRY_POINTS)
            if where not in points.names:
                there = ", ".join(sorted(points.names)) or "there are none"
                raise ConfigError(
                    key,
                    f"{where!r} is no entry point of the group {ENTRY_POINTS} ({there}), nor `package.module:function`",
                )
            found = points[where].load()
    except ConfigError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(
            key,
            f"{where!r} cannot be imported: {type(error).__name__}: {error}; it must be installed where llm-router is, "
            "or its folder be named by PYTHONPATH",
        ) from error
    if not callable(found):
        raise ConfigError(key, f"{where!r} is {type(found).__name__}, not a function")
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        raise ConfigError(
            key, f"{where!r} is async; a policy decides at once and cannot wait: make it a plain function"
        )
    try:
        inspect.signature(found).bind("model", (), Need)
    except TypeError as error:
        raise ConfigError(key, f"{where!r} cannot be called with (model, candidates, need): {error}") from error
    except ValueError:
        pass  # compiled, without a signature to look at
    function: CustomFunction = found
    return function


POLICIES: Final[dict[str, Callable[[Means], Policy]]] = {
    Balanced.name: Balanced,
    QualityFirst.name: QualityFirst,
    CostOptimized.name: CostOptimized,
    SpeedPriority.name: SpeedPriority,
    RoundRobin.name: RoundRobin,
    Random.name: Random,
    LeastLoaded.name: LeastLoaded,
    CapabilityMatch.name: CapabilityMatch,
    Custom.name: Custom,
}


def make_policy(
    name: str,
    *,
    rng: random.Random,
    clock: Callable[[], float] = time.monotonic,
    custom: CustomFunction | None = None,
) -> Policy:
    """A policy of its own, knowing nothing yet.

    Args:
        name: one of `table.STRATEGIES`.
        clock: monotonic seconds, the clock of what `Speed` was told.
        custom: the operator's function, see `load_custom`.

    Raises: ConfigError for `custom` without a function.
    """
    return POLICIES[name](Means(rng, clock, custom))
