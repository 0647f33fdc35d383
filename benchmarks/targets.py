"""What the figures must reach, and whether they do. Judged on medians; intervals are shown beside them.

The limits are the project's own promises for one worker on one core with all metrics on; changing one is a decision.
Not for: measuring.
"""

from __future__ import annotations

import operator
from typing import Final, NamedTuple

from benchmarks import surfaces as logs_and_traces
from benchmarks.accounts import BEFORE, GUARDED, LOAD, PLAIN
from benchmarks.intervals import Estimate
from benchmarks.measure import Measured
from benchmarks.monitoring import Scrape, ScrapingCost
from benchmarks.surfaces import LINES_PER_S, Written

GATEWAY: Final = "gateway"
# An interval wider than this share of the figure says that the machine was busy, not that scraping is free.
_NOISE_MAX_RATIO: Final = 0.05


class Target(NamedTuple):
    """One promise: `met` is None when it could not be judged."""

    what: str
    limit: str
    value: str
    met: bool | None


def _at_most(what: str, found: Estimate, limit: float, unit: str, digits: int = 1, beside: str = "") -> Target:
    if not found.rounds:
        return Target(what, f"≤ {limit:g} {unit}", "not measured", None)
    return Target(what, f"≤ {limit:g} {unit}", f"{found.show(digits)} {unit}{beside}", found.median <= limit)


def plain_and_streams(measured: Measured) -> list[Target]:
    """The promises about requests and streams, against direct and nginx of the same rounds."""

    def ratio(other: str, key: str) -> Estimate:
        return measured.compare(GATEWAY, other, key, operator.truediv)

    def added_by(name: str, key: str, unit: float) -> Estimate:
        return measured.compare(name, "direct", key, lambda with_it, without: (with_it - without) * unit)

    def added(what: str, key: str, unit: float, limit_ms: float) -> Target:
        # Being on another core than load and backend is a part of it, which nginx pays too.
        beside = f"; nginx {added_by('nginx', key, unit).median:.3f}"
        on_one_core = key.replace("plain.1", "one_core.1")
        if on_one_core != key:
            ours, theirs = (added_by(name, on_one_core, unit).median for name in (GATEWAY, "nginx"))
            beside += f"; with all on one core {ours:.3f}, nginx {theirs:.3f}"
        return _at_most(what, added_by(GATEWAY, key, unit), limit_ms, "ms", 3, beside)

    errors = sum(measured.values(GATEWAY, "plain.256.errors"))
    all_errors = sum(
        sum(values) for key, values in measured.figures.get(GATEWAY, {}).items() if key.endswith(".errors")
    )
    return [
        _at_most("CPU per plain request, 32 connections", measured.estimate(GATEWAY, "plain.32.cpu_us"), 60, "µs"),
        _at_most("the same, against nginx", ratio("nginx", "plain.32.cpu_us"), 1.8, "x", 2),
        _at_most("CPU per chunk of a paced stream, against nginx", ratio("nginx", "paced.cpu_us"), 1.9, "x", 2),
        added("added p50, 1 connection", "plain.1.p50_us", 1e-3, 0.12),
        added("added p99, 1 connection", "plain.1.p99_us", 1e-3, 0.5),
        Target("errors, 256 connections", "0", f"{errors:.0f}", errors == 0),
        Target("errors, all loads", "0", f"{all_errors:.0f}", all_errors == 0),
        _at_most("p99 with 256 connections, against direct", ratio("direct", "plain.256.p99_us"), 3, "x", 2),
        added("added time to first token, paced", "paced.first_p50_ms", 1, 1),
    ]


def against_peers(measured: Measured) -> list[Target]:
    """The promises about other gateways; not judged for one that did not run."""
    key = "plain.32.cpu_us"
    below = measured.compare(GATEWAY, "vLLM router", key, operator.truediv)
    less = measured.compare("LiteLLM", GATEWAY, key, operator.truediv)
    return [
        Target("CPU per request, against the vLLM router", "< 1 x", *_judged(below, below.median < 1, 2)),
        Target("LiteLLM's CPU per request, against ours", "≥ 150 x", *_judged(less, less.median >= 150, 0)),
    ]


def _judged(found: Estimate, met: bool, digits: int) -> tuple[str, bool | None]:
    return (f"{found.show(digits)} x", met) if found.rounds else ("did not run", None)


def accounts(measured: Measured, not_there: str) -> list[Target]:
    """The promise about keys, limits and usage: what they add to a request, in the same run.

    Args:
        not_there: why there is no gateway without them to compare with; empty if there is one.
    """
    key = f"{LOAD}.cpu_us"

    def added(what: str, name: str) -> Target:
        return _at_most(what, measured.compare(GUARDED, name, key, operator.sub), 20, "µs")

    promise = "key check, limits and usage, CPU they add to a request"
    first = Target(promise, "≤ 20 µs", f"not measured: {not_there}", None) if not_there else added(promise, BEFORE)
    return [first, added("key check and limits alone, usage in both", PLAIN)]


def surfaces(measured: Measured, not_there: str, lines: Written) -> list[Target]:
    """The promises about logs, traces and health checks: what all of them add to a request, and that no line is lost.

    Args:
        not_there: why there is no gateway without them to compare with; empty if there is one.
    """
    key = f"{LOAD}.cpu_us"

    def added(what: str, other: str) -> Target:
        return _at_most(what, measured.compare(logs_and_traces.ON, other, key, operator.sub), 12, "µs")

    result = [added("logs, traces and health checks, CPU they add to a request", logs_and_traces.OFF)]
    if not_there:
        result.append(Target("the same, against before there were any", "≤ 12 µs", f"not measured: {not_there}", None))
    else:
        result.append(added("the same, against before there were any", logs_and_traces.BEFORE))
    offered = lines.lines / lines.seconds
    met = lines.dropped == 0 and lines.written == lines.lines and offered >= 0.95 * LINES_PER_S
    shown = f"{lines.written} of {lines.lines} at {offered:,.0f} a second, {lines.dropped} dropped"
    result.append(Target("log lines written", f"{LINES_PER_S:,} a second, none dropped", shown, met))
    return result


def monitoring(scrape: Scrape, cost: ScrapingCost, ready_s: Estimate, resident: dict[str, int]) -> list[Target]:
    """The promises about being observed, memory and start."""
    difference = cost.difference_us
    noise = difference.half_width / cost.without_us
    value = f"{difference.mean:+.2f} ± {difference.half_width:.2f} µs of {cost.without_us:.1f} ({cost.scrapes} scrapes)"
    quiet: bool | None = difference.is_within_noise
    if quiet and noise > _NOISE_MAX_RATIO:
        quiet = None
        value += f"; too noisy to say, the interval is {noise:.0%} of the figure"
    result = [
        _at_most(f"scrape of {scrape.series} series", scrape.milliseconds, 10, "ms", 2),
        Target("scraping 10 times a second, workers' CPU per request", "within the interval", value, quiet),
    ]
    for role, limit_mb in (("worker", 60), ("supervisor", 20), ("control", 120)):
        held = resident.get(role)
        shown = f"{held / 1e6:.1f} MB" if held is not None else "no such process"
        met = held <= limit_mb * 1e6 if held is not None else None
        result.append(Target(f"memory of {role}, after the load", f"≤ {limit_mb} MB", shown, met))
    result.append(_at_most("time to ready without a local model", ready_s, 1, "s", 2))
    return result
