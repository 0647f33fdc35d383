"""The check `inference_capability`: whether models really answer.

For each deployment of each model that is ready, by the best evidence that there is:

    traffic since the last time     requests were answered, or failed
    requests in flight              it is at work; what was known stays
    a runner that was idle          a generation of a few tokens; also where only failures were seen, to be sure
    a paid model that was idle      the same, if health.paid_probe_daily_usd allows for it; at most one at a time
    else                            what its backend's free endpoint says (endpoints.py)

A model answers if one of its deployments does. What nothing is known of counts as well, and is named.
Not for: which backend a request goes to (routing).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec

from llm_router.errors import BackendError, BackendRejected, RouterError
from llm_router.observe.health.checks import Check, failed, passed
from llm_router.processes.probes.asking import TIMEOUT_S, Answer, ask, embeds, most_usd
from llm_router.processes.probes.purse import Purse
from llm_router.processes.probes.rounds import in_turn
from llm_router.processes.probes.traffic import NO_TRAFFIC, Since, Traffic
from llm_router.routing.table import BackendSpec, Deployment, RoutingTable

PROMPT: Final = "test"
MAX_TOKENS: Final = 4
"""Enough to see that it goes on after the first token."""

PAID_MAX_TOKENS: Final = 16
"""Some providers refuse less."""

AT_ONCE: Final = 2
"""Generations by local models, which share the machine with each other and with users' requests."""

MOST_SHOWN: Final = 12
"""Models in the details, those that fail first."""

_REFUSED_FORM: Final = (400, 422)
"""A paid model that refuses this very request (too few tokens for a model that thinks) may answer others."""

Key = tuple[str, str]
"""Backend, and the model's name there."""

Evidence = Literal["traffic", "generation", "endpoint"]


class _Place(NamedTuple):
    """A deployment and where it is."""

    spec: BackendSpec
    deployment: Deployment

    @property
    def key(self) -> Key:
        return self.spec.name, self.deployment.upstream_model


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a deployment. `problem` is empty if it answers; `at` is monotonic seconds."""

    by: Evidence
    at: float
    problem: str = ""
    said: str = ""


class InferenceCheck:
    """The check, and what it knows. Of one event loop.

    Args:
        table: of now.
        traffic: since the workers began, by backend.
        endpoint: what is wrong with a backend, empty if nothing is, None if that is not known.
        purse: pays for probes of models that cost money.
        timeout_s: of the check.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        table: Callable[[], RoutingTable],
        traffic: Callable[[], Mapping[str, Traffic]],
        *,
        endpoint: Callable[[str], str | None],
        purse: Purse,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._since = Since(traffic)
        self._endpoint = endpoint
        self._purse = purse
        # A probe may begin in the first half of the time and take what is left of it.
        self._ask_s = timeout_s * 0.45
        self._begin_s = timeout_s * 0.5
        self._clock = clock
        self._known: dict[Key, Known] = {}
        self._newest: dict[str, Any] = {}

    def __repr__(self) -> str:
        failing = sum(bool(known.problem) for known in self._known.values())
        return f"<InferenceCheck {len(self._known)} deployments known, {failing} failing>"

    async def check(self) -> Check:
        """`value` is how many models answer, or are not known not to; `threshold` how many are ready."""
        table = self._table()
        places = {place.key: place for place in _places(table)}
        self._known = {key: known for key, known in self._known.items() if key in places}
        traffic = self._since.look()
        idle = [place for place in places.values() if self._is_open(place, traffic.get(place.spec.name, NO_TRAFFIC))]
        idle.sort(key=self._known_at)
        local = [place for place in idle if place.spec.local_model]
        others = [place for place in idle if not place.spec.local_model]
        paid = next((place for place in others if self._can_pay(place)), None)
        for place in others:
            if place is not paid:
                self._take_endpoint(place)
        async with asyncio.TaskGroup() as group:
            jobs = (functools.partial(self._generate, place) for place in local)
            group.create_task(in_turn(jobs, at_once=AT_ONCE, for_s=self._begin_s))
            if paid is not None:
                group.create_task(self._generate_paid(paid))
        return self._judged(table, places)

    # -- evidence ---------------------------------------------------------------------------------------------

    def _is_open(self, place: _Place, lately: Traffic) -> bool:
        """Take in what traffic says. Returns: whether more has to be found out."""
        if lately.attempts:
            if not lately.is_failing:
                self._learn(place, "traffic", said=lately.words)
                return False
            self._learn(place, "traffic", lately.words)
            return bool(place.spec.local_model) and not lately.in_flight
        return not lately.in_flight

    async def _generate(self, place: _Place) -> None:
        try:
            answer = await self._ask(place, MAX_TOKENS)
        except RouterError as error:
            self._learn(place, "generation", _words(error))
        else:
            self._answered(place, answer)

    def _can_pay(self, place: _Place) -> bool:
        price = place.deployment.price
        usd = 0.0 if price is None else most_usd(price, PROMPT, PAID_MAX_TOKENS)
        return usd > 0 and not self._purse.why_not(usd)

    async def _generate_paid(self, place: _Place) -> None:
        price = place.deployment.price
        assert price is not None, "what has no price cannot be paid"
        taken = self._purse.take(most_usd(price, PROMPT, PAID_MAX_TOKENS))
        if taken is None:
            self._take_endpoint(place)
            return
        try:
            answer = await self._ask(place, PAID_MAX_TOKENS)
        except BackendRejected as error:
            self._purse.put_back(taken, 0.0)  # providers charge for answers
            if error.status in _REFUSED_FORM:
                self._learn(place, "endpoint", said=f"it refused the probe ({error.status}), so it is there")
            else:
                self._learn(place, "generation", _words(error))
        except RouterError as error:
            self._learn(place, "generation", _words(error))  # it may have answered, and charge: the money stays taken
        else:
            if answer.cost_usd is not None:
                self._purse.put_back(taken, answer.cost_usd)
            self._answered(place, answer)

    def _take_endpoint(self, place: _Place) -> None:
        """What its free endpoint says; a failed generation is better evidence against it than that is for it."""
        problem = self._endpoint(place.spec.name)
        known = self._known.get(place.key)
        if problem is None or (not problem and known is not None and known.by == "generation"):
            return
        self._learn(place, "endpoint", problem, said="" if problem else "its free endpoint answers")

    async def _ask(self, place: _Place, max_tokens: int) -> Answer:
        return await ask(place.spec, place.deployment, PROMPT, max_tokens=max_tokens, timeout_s=self._ask_s)

    def _answered(self, place: _Place, answer: Answer) -> None:
        latency_ms = round(answer.latency_s * 1000, 3)
        tokens = 0 if answer.usage is None else answer.usage.output_tokens
        what = "an embedding" if embeds(place.spec, place.deployment) else f"{tokens} tokens"
        self._learn(place, "generation", said=f"{what} in {latency_ms:g} ms")
        self._newest = {"model": place.deployment.upstream_model, "latency": latency_ms, "tokens": tokens}

    def _learn(self, place: _Place, by: Evidence, problem: str = "", said: str = "") -> None:
        self._known[place.key] = Known(by=by, at=self._clock(), problem=problem, said=said)

    def _known_at(self, place: _Place) -> float:
        known = self._known.get(place.key)
        return 0.0 if known is None else known.at

    # -- in sum -----------------------------------------------------------------------------------------------

    def _judged(self, table: RoutingTable, places: Mapping[Key, _Place]) -> Check:
        failing: dict[str, Known] = {}
        well: dict[str, Known] = {}
        unknown: list[str] = []
        for model in table.models:
            keys = [(one.backend, one.upstream_model) for one in model.deployments]
            ready = [key for key in keys if key in places]
            if not ready:
                continue  # not loaded, or on its way: the check of models tells
            known = [known for key in ready if (known := self._known.get(key)) is not None]
            fine = [one for one in known if not one.problem]
            if fine:
                well[model.name] = max(fine, key=lambda one: one.at)
            elif len(known) == len(ready):
                failing[model.name] = max(known, key=lambda one: one.at)
            else:
                unknown.append(model.name)
        return self._told(failing, well, unknown)

    def _told(self, failing: dict[str, Known], well: dict[str, Known], unknown: list[str]) -> Check:
        now = self._clock()
        shown = [*failing.items(), *well.items()][:MOST_SHOWN]
        details: dict[str, Any] = {
            **self._newest,
            "models": {
                name: {"by": known.by, "age_s": round(now - known.at, 1), "said": (known.problem or known.said)[:150]}
                for name, known in shown
            },
            "not_judged": unknown[:MOST_SHOWN],
        }
        if self._purse.daily_usd > 0:
            details["probes_usd_today"] = round(self._purse.spent_usd(), 6)
        value, threshold = float(len(well) + len(unknown)), float(len(well) + len(unknown) + len(failing))
        rest = f"; {len(unknown)} had no traffic yet to judge by" if unknown else ""
        if not failing:
            what = (
                f"Inference capability verified: {_models(len(well))}" if well else "Nothing speaks against inference"
            )
            if not threshold:
                what = "No model is ready: nothing to ask"
            return passed(what + rest, value=value, threshold=threshold, details=details, unit="models")
        return failed(
            f"Inference test failed: {'; '.join(f'{name}: {known.problem}' for name, known in failing.items())}",
            status="degraded" if value else "critical",
            value=value,
            threshold=threshold,
            details=details,
            unit="models",
        )


def _places(table: RoutingTable) -> Iterator[_Place]:
    """Every deployment that is ready; several models may have the same."""
    specs = {spec.name: spec for spec in table.backends if spec.ready}
    for model in table.models:
        for deployment in model.deployments:
            spec = specs.get(deployment.backend)
            if spec is not None:
                yield _Place(spec, deployment)


def _models(count: int) -> str:
    return f"{count} model{'' if count == 1 else 's'} answer{'s' if count == 1 else ''}"


def _words(error: RouterError) -> str:
    return error.problem if isinstance(error, BackendError) else error.message
