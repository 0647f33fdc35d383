"""The checks `model_NAME`: a prompt whose answer must look as expected. Whoever serves the model must be able to do this.

The model's ready deployments are asked in their order until one answers; its queue, limits and fallbacks are not in the
way. What costs money is paid out of the same purse as other probes; when there is none, the last result stays.
Not for: judging how good answers are.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Final

from llm_router.errors import BackendError, BackendRejected, BackendTimeout, RouterError
from llm_router.observe.health.checks import Check, failed, passed
from llm_router.observe.health.settings import Validation
from llm_router.processes.probes.asking import TIMEOUT_S, Answer, ask, embeds, most_usd
from llm_router.processes.probes.purse import Purse
from llm_router.processes.probes.traffic import NO_TRAFFIC, Traffic
from llm_router.routing.table import BackendSpec, Deployment, RoutingTable

MOST_CHARACTERS: Final = 4000
"""Of an answer that are looked at: `max_tokens` is a wish that not every backend fulfils."""

_SHOWN_CHARACTERS: Final = 80


class ValidationCheck:
    """One prompt with its expectation. Of one event loop.

    Args:
        table: of now.
        traffic: by backend; a runner that is busy may be late.
        purse: pays, where the model costs money.
        timeout_s: of the check.

    Raises: ValueError when the expectation is no regular expression.
    """

    def __init__(
        self,
        validation: Validation,
        table: Callable[[], RoutingTable],
        traffic: Callable[[], Mapping[str, Traffic]],
        *,
        purse: Purse,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            self._expected = re.compile(validation.expect, re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"what is expected of {validation.name!r} is no regular expression: {validation.expect!r}: {error}"
            ) from error
        self._validation = validation
        self._table = table
        self._traffic = traffic
        self._purse = purse
        self._timeout_s = timeout_s * 0.9  # its own words come before the scheduler's
        self._clock = clock
        self._last: Check | None = None

    def __repr__(self) -> str:
        return f"<ValidationCheck {self._validation.name} of {self._validation.model}>"

    async def check(self) -> Check:
        """Ask now. `value` is 1 if the answer was as expected."""
        model = self._validation.model
        places = self._places()
        if not places:
            return failed(f"{model} is not ready: nobody can be asked", details={"model": model})
        until = self._clock() + self._timeout_s
        problems: list[str] = []
        reasons: list[str] = []
        for spec, deployment in places:
            if embeds(spec, deployment):
                problems.append(f"{spec.name}: it only embeds, and answers no prompt")
                continue
            left_s = until - self._clock()
            if left_s <= 0:
                problems.append("no time was left to ask the others")
                break
            try:
                answer = await self._ask(spec, deployment, left_s, reasons)
            except RouterError as error:
                problems.append(f"{spec.name}: {error.problem if isinstance(error, BackendError) else error.message}")
                if isinstance(error, BackendTimeout) and self._is_busy(spec):
                    return self._not_asked(f"{spec.name} is busy with requests and did not answer in time")
            else:
                if answer is not None:
                    self._last = self._judged(answer, spec.name)
                    return self._last
        if not problems:
            return self._not_asked("; ".join(dict.fromkeys(reasons)))
        self._last = failed(f"{model} did not answer: {'; '.join(problems)}", details={"model": model})
        return self._last

    def _places(self) -> list[tuple[BackendSpec, Deployment]]:
        table = self._table()
        specs = {spec.name: spec for spec in table.backends if spec.ready}
        return [
            (specs[one.backend], one)
            for model in table.models
            if model.name == self._validation.model
            for one in model.deployments
            if one.backend in specs
        ]

    async def _ask(self, spec: BackendSpec, deployment: Deployment, left_s: float, reasons: list[str]) -> Answer | None:
        """The answer; None, with the reason, where it cannot be paid for. Raises: RouterError."""
        wanted = self._validation
        price = deployment.price
        if price is None:
            reasons.append(
                "its price is not known: set the model's `price`, or `provider: local` for a server of your own"
            )
            return None
        usd = most_usd(price, wanted.prompt, wanted.max_tokens)
        taken = self._purse.take(usd)
        if taken is None:
            reasons.append(self._purse.why_not(usd) or "what it costs cannot be written down")
            return None
        try:
            answer = await ask(spec, deployment, wanted.prompt, max_tokens=wanted.max_tokens, timeout_s=left_s)
        except BackendRejected:
            self._purse.put_back(taken, 0.0)  # providers charge for answers
            raise
        if answer.cost_usd is not None:
            self._purse.put_back(taken, answer.cost_usd)
        return answer

    def _is_busy(self, spec: BackendSpec) -> bool:
        return bool(spec.local_model) and self._traffic().get(spec.name, NO_TRAFFIC).in_flight > 0

    def _judged(self, answer: Answer, backend: str) -> Check:
        wanted = self._validation
        text = answer.text[:MOST_CHARACTERS]
        details = {
            "model": wanted.model,
            "backend": backend,
            "latency_ms": round(answer.latency_s * 1000, 3),
            "tokens": 0 if answer.usage is None else answer.usage.output_tokens,
        }
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
        if not wanted.expect:
            if text.strip():
                return passed(f"{wanted.model} answers", details=details)
            return failed(f"{wanted.model} answered nothing", details=details)
        if self._expected.search(text) is None:
            return failed(f"{wanted.model} answered {shown!r}, which is not {wanted.expect!r}", details=details)
        return passed(f"{wanted.model} answers as expected", details=details)

    def _not_asked(self, reason: str) -> Check:
        """What was known before counts; a model that was never asked is not known to fail."""
        model = self._validation.model
        if self._last is None:
            return passed(f"{model} was not asked: {reason}", details={"model": model})
        return Check(
            status=self._last.status,
            value=self._last.value,
            threshold=self._last.threshold,
            message=f"{self._last.message} (not asked this time: {reason})",
            details=self._last.details,
        )
