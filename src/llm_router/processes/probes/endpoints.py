"""The check `backends`: whether every configured backend answers, and takes our key, at an address that costs nothing.

Who has had traffic since the last time is judged by that. A quiet one is asked for its list of models (runners: for their
health), at most once a minute while all is well. Only the status of the answer is read:

    below 400, 404, 405, 501…   it is there; not every server has a list
    401                         it does not take the key
    403                         it is there; keys that may not list models are common
    429                         it is there, and busy
    500 and above, none         it is not well

Not for: routing (workers find out by themselves), or whether models answer (inference.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from llm_router.errors import BackendError
from llm_router.observe.health.checks import Check, failed, passed
from llm_router.processes.probes.get import status_of
from llm_router.processes.probes.rounds import in_turn
from llm_router.processes.probes.traffic import NO_TRAFFIC, Since, Traffic
from llm_router.routing.table import BackendSpec, RoutingTable

FRESH_S: Final = 60.0
AT_ONCE: Final = 8
MOST_SHOWN: Final = 20
"""Backends in the details, those that fail first."""

_GET_S: Final = 4.0
_NOT_IMPLEMENTED: Final = 501
_ANTHROPIC_VERSION: Final = "2023-06-01"


class Seen(NamedTuple):
    """What is known of a backend. `problem` is empty if it is well; `at` is monotonic seconds."""

    url: str
    problem: str
    said: str
    at: float


class Endpoints:
    """The check, and what it knows. Of one event loop.

    Args:
        table: of now.
        traffic: since the workers began, by backend.
        timeout_s: of the check, which asks as many as it can within it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        table: Callable[[], RoutingTable],
        traffic: Callable[[], Mapping[str, Traffic]],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._since = Since(traffic)
        self._get_s = min(_GET_S, timeout_s * 0.8)
        self._begin_s = timeout_s * 0.9 - self._get_s
        self._clock = clock
        self._seen: dict[str, Seen] = {}

    def __repr__(self) -> str:
        return f"<Endpoints {len(self._seen)} known, {sum(bool(seen.problem) for seen in self._seen.values())} failing>"

    def problem(self, backend: str) -> str | None:
        """What is wrong with a backend, empty if it is well, None if that is not known."""
        seen = self._seen.get(backend)
        return None if seen is None else seen.problem

    async def check(self) -> Check:
        """`value` is how many backends are well, `threshold` how many there are."""
        traffic = self._since.look()
        specs = {spec.name: spec for spec in self._table().backends if spec.ready}
        self._seen = {name: seen for name, seen in self._seen.items() if name in specs and seen.url == specs[name].url}
        quiet = []
        for name, spec in specs.items():
            lately = traffic.get(name, NO_TRAFFIC)
            if lately.attempts:
                self._judge(spec, lately)
            elif not self._is_fresh(name):
                quiet.append(spec)
        quiet.sort(key=lambda spec: self._seen[spec.name].at if spec.name in self._seen else 0.0)
        await in_turn(
            (functools.partial(self._ask, spec) for spec in quiet), at_once=AT_ONCE, for_s=max(0.0, self._begin_s)
        )
        return self._judged(len(specs))

    def _is_fresh(self, name: str) -> bool:
        seen = self._seen.get(name)
        return seen is not None and not seen.problem and self._clock() - seen.at < FRESH_S

    def _judge(self, spec: BackendSpec, lately: Traffic) -> None:
        problem, said = (lately.words, "") if lately.is_failing else ("", lately.words)
        self._seen[spec.name] = Seen(spec.url, problem, said, self._clock())

    async def _ask(self, spec: BackendSpec) -> None:
        problem = said = ""
        try:
            status = await status_of(
                free_url(spec),
                name=spec.name,
                headers=_headers(spec),
                timeout_s=self._get_s,
                tls_verify=spec.tls_verify,
                tls_ca_file=spec.tls_ca_file,
            )
            said = f"answered {status}"
            problem = _problem(spec, status)
        except BackendError as error:
            problem = error.problem
        except ValueError as error:
            problem = str(error)
        self._seen[spec.name] = Seen(spec.url, problem, said, self._clock())

    def _judged(self, count: int) -> Check:
        failing = {name: seen for name, seen in self._seen.items() if seen.problem}
        well = {name: seen for name, seen in self._seen.items() if not seen.problem}
        shown = [*failing.items(), *well.items()][:MOST_SHOWN]
        details = {name: seen.problem or seen.said for name, seen in shown}
        value = float(count - len(failing))
        if not failing:
            message = f"{count} of {count} backends answer" if count else "No backend is configured"
            return passed(message, value=value, threshold=float(count), details=details, unit="backends")
        return failed(
            "; ".join(f"{name}: {seen.problem}" for name, seen in failing.items()),
            status="degraded" if value else "critical",
            value=value,
            threshold=float(count),
            details=details,
            unit="backends",
        )


def free_url(spec: BackendSpec) -> str:
    """Where asking costs nothing: a runner's health, a server's list of models."""
    parts = urlsplit(spec.url)
    origin = f"{parts.scheme}://{parts.netloc}"
    if spec.local_model:
        return f"{origin}/health"
    # Azure's deployments have a path each; the list is above them.
    prefix = parts.path.partition("/deployments/{model}")[0].partition("{model}")[0].rstrip("/")
    return f"{origin}{prefix}/models{'?' if spec.query else ''}{spec.query}"


def _headers(spec: BackendSpec) -> dict[str, str]:
    """As of a request: see `backends.wire.Heads`."""
    headers = dict(spec.headers)
    if spec.protocol == "anthropic" and "anthropic-version" not in {name.lower() for name in headers}:
        headers["anthropic-version"] = _ANTHROPIC_VERSION
    if spec.api_key:
        headers["Authorization" if spec.auth == "bearer" else spec.auth] = (
            f"Bearer {spec.api_key}" if spec.auth == "bearer" else spec.api_key
        )
    return headers


def _problem(spec: BackendSpec, status: int) -> str:
    if status == 401:
        return (
            "it does not take our key (401): look at its api_key"
            if spec.api_key
            else "it wants a key (401): set api_key"
        )
    if status >= 500 and status != _NOT_IMPLEMENTED:
        return f"answered {status}"
    return ""
