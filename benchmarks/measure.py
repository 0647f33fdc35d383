"""The rounds: every contender under every load, in turn, again and again, so that what the machine does besides hits all.

Figures are kept per round, not summed up, so that ratios can be taken within a round. Not for: judging (targets.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from benchmarks import processes, streams, wrk
from benchmarks.backend import MODEL
from benchmarks.contenders import Contender
from benchmarks.intervals import Estimate, estimate

# Closed-loop streams that come as fast as they can: few are enough to fill one core.
_BURST_CONNECTIONS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured. `seconds` is the length of one plain run; streams take their own time."""

    rounds: int = 7
    seconds: float = 4.0
    connections: tuple[int, ...] = (1, 32, 256)
    paced_each: int = 8
    burst_each: int = 40
    contender_cpu: int = 0
    load_cpu: int = 1


@dataclass
class Measured:
    """Figures by contender and key, one value a round. Keys: `plain.32.cpu_us`, `paced.first_p50_ms` and so on."""

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    resident: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, contender: str, key: str, value: float) -> None:
        """Notes one round's value."""
        self.figures.setdefault(contender, {}).setdefault(key, []).append(value)

    def values(self, contender: str, key: str) -> list[float]:
        """All rounds' values; empty when that was not measured."""
        return self.figures.get(contender, {}).get(key, [])

    def estimate(self, contender: str, key: str) -> Estimate:
        """Median and interval over the rounds."""
        return estimate(self.values(contender, key))

    def compare(self, one: str, other: str, key: str, how: Callable[[float, float], float]) -> Estimate:
        """Median and interval over the rounds of `how(one, other)`; empty when either was not measured, or `other` was 0."""
        pairs = zip(self.values(one, key), self.values(other, key), strict=False)
        return estimate([how(a, b) for a, b in pairs if b])


def cpu_us(contender: Contender, root: int, before: Mapping[int, processes.ProcessUse], per: int) -> dict[str, float]:
    """CPU microseconds of one of `per` requests since `before`, by role."""
    spent = processes.cpu_by_role(before, processes.use(root), contender.role)
    return {role: seconds / max(per, 1) * 1e6 for role, seconds in spent.items()}


def add_cpu(into: Measured, contender: Contender, load: str, spent_us: Mapping[str, float]) -> None:
    """Notes the sum and each role's part."""
    into.add(contender.name, f"{load}.cpu_us", sum(spent_us.values()))
    for role, value in spent_us.items():
        into.add(contender.name, f"{load}.cpu_us.{role}", value)


def _plain(into: Measured, contender: Contender, root: int, connections: int, plan: Plan, key: str = "") -> None:
    before = processes.use(root) if root else {}
    load = wrk.load(
        contender.url,
        connections=connections,
        seconds=plan.seconds * contender.plain_share,
        cpu=plan.load_cpu,
        model=MODEL,
        headers=contender.headers,
    )
    key = key or f"plain.{connections}"
    if root:
        spent_us = cpu_us(contender, root, before, load.requests)
        if load.requests < 2 * connections:  # most of the work went into requests that the end of the run cut off
            spent_us = dict.fromkeys(spent_us, math.nan)
        add_cpu(into, contender, key, spent_us)
    _add_load(into, contender, key, load)


def settled_load(
    into: Measured, contender: Contender, root: int, plan: Plan, *, key: str, connections: int, after_s: float
) -> wrk.Load:
    """One plain run, with the CPU of what it leaves to be done for `after_s`.

    Raises: RuntimeError when a request was not answered well.
    """
    before = processes.use(root)
    load = wrk.load(
        contender.url,
        connections=connections,
        seconds=plan.seconds,
        cpu=plan.load_cpu,
        model=MODEL,
        headers=contender.headers,
    )
    time.sleep(after_s)
    processes.settle(root)
    add_cpu(into, contender, key, cpu_us(contender, root, before, load.requests))
    _add_load(into, contender, key, load)
    if load.errors:
        raise RuntimeError(f"{contender.name}: {load.errors} of {load.requests} requests were not answered well")
    return load


def _add_load(into: Measured, contender: Contender, key: str, load: wrk.Load) -> None:
    into.add(contender.name, f"{key}.per_second", load.per_second)
    into.add(contender.name, f"{key}.p50_us", load.p50_us)
    into.add(contender.name, f"{key}.p99_us", load.p99_us)
    into.add(contender.name, f"{key}.errors", load.errors)


def _on_one_core(into: Measured, contender: Contender, root: int, plan: Plan) -> None:
    """One connection with everything on the load's core: only one of the three ever works, and nobody is woken across cores.

    Under a hypervisor such a wake-up takes longer than any contender needs for a request, so that this shows the programs
    and `plain.1` the machine as well.
    """
    if root:
        processes.move(root, plan.load_cpu)
    try:
        _plain(into, contender, root, 1, plan, "one_core.1")
    finally:
        if root:
            processes.move(root, plan.contender_cpu)


def _streams(into: Measured, contender: Contender, root: int, plan: Plan, *, paced: bool) -> None:
    before = processes.use(root) if root else {}
    connections = contender.paced_connections if paced else _BURST_CONNECTIONS
    outcome = streams.measure(
        contender.url,
        connections=connections,
        each=plan.paced_each if paced else max(1, round(plan.burst_each * contender.burst_share)),
        paced=paced,
        cpu=plan.load_cpu,
        model=MODEL,
        headers=contender.headers,
    )
    key = "paced" if paced else "burst"
    if root:
        add_cpu(into, contender, key, cpu_us(contender, root, before, outcome.chunks))
    into.add(contender.name, f"{key}.chunks_per_second", outcome.chunks / outcome.duration_s)
    into.add(contender.name, f"{key}.first_p50_ms", outcome.first_p50_ms)
    into.add(contender.name, f"{key}.first_p99_ms", outcome.first_p99_ms)
    into.add(contender.name, f"{key}.errors", outcome.failed)


def warm_up(contender: Contender, plan: Plan) -> None:
    """Loads a contender until caches are filled and connections open, and checks that it serves at all.

    Raises: RuntimeError when any answer was an error, or none came.
    """
    load = wrk.load(
        contender.url,
        connections=32,
        seconds=contender.warm_up_s,
        cpu=plan.load_cpu,
        model=MODEL,
        headers=contender.headers,
    )
    if load.errors or not load.requests:
        raise RuntimeError(
            f"{contender.name}: {load.errors} of {load.requests} warm-up requests were not answered well"
        )
    outcome = streams.measure(
        contender.url, connections=4, each=2, paced=True, cpu=plan.load_cpu, model=MODEL, headers=contender.headers
    )
    if outcome.failed:
        raise RuntimeError(f"{contender.name}: {outcome.failed} warm-up streams were not answered well")


def rounds(contenders: list[tuple[Contender, int]], plan: Plan, say: Callable[[str], None]) -> Measured:
    """Measures all of them, which are running and warm.

    Args:
        contenders: each with the id of its root process, 0 for one that has none.
        say: told about each round as it begins.
    """
    measured = Measured()
    for contender, root in contenders:
        if contender.is_frozen_between:
            processes.freeze(root)
    loads: list[Callable[[Contender, int], None]] = [
        lambda c, root: _on_one_core(measured, c, root, plan),
        *(lambda c, root, n=n: _plain(measured, c, root, n, plan) for n in plan.connections),
        lambda c, root: _streams(measured, c, root, plan, paced=True),
        lambda c, root: _streams(measured, c, root, plan, paced=False),
    ]
    for number in range(1, plan.rounds + 1):
        say(f"round {number} of {plan.rounds}")
        for load in loads:
            for contender, root in contenders:
                if contender.is_frozen_between:
                    processes.thaw(root)
                if root:
                    processes.settle(root)
                load(contender, root)
                if contender.is_frozen_between:
                    processes.freeze(root)
    for contender, root in contenders:
        if root:
            measured.resident[contender.name] = processes.resident_by_role(processes.use(root), contender.role)
    return measured
