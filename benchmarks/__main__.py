"""`python -m benchmarks [--peers | --surfaces]`: measures everything in one run, prints it, writes JSON and a picture.

What `make bench` and `make bench-peers` start. Two CPUs are needed: what is measured has the first to itself, load
generator, backend and this program share the second. Exit status: 0 when it was measured, whatever came out; with
`--strict` 1 when a promise was missed; 2 when it could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks import accounts, monitoring, processes, report, surfaces, targets
from benchmarks.contenders import Contender, Gateway, backend, direct, gateway, nginx, started
from benchmarks.measure import Measured, Plan, rounds, warm_up
from benchmarks.peers import PEERS, NotAvailable

RESULTS: Final = Path(__file__).with_name("results")
# Beyond this many runnable processes the other programs on the machine are part of what is measured.
_QUIET_LOAD: Final = 0.5
# A round with slow peers takes three minutes.
_ROUNDS_WITH_PEERS: Final = 5


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {"cpu": model, "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def _start_peers(
    stack: contextlib.ExitStack, names: list[str], port: int, folder: Path, plan: Plan
) -> tuple[list[tuple[Contender, int]], dict[str, str]]:
    """Those that came up, and why the others did not."""
    up: list[tuple[Contender, int]] = []
    missing: dict[str, str] = {}
    for name in names:
        _say(f"starting {name}")
        own = contextlib.ExitStack()
        try:
            contender = PEERS[name](port, folder)
            root = own.enter_context(started(contender, cpu=plan.contender_cpu, folder=folder))
            warm_up(contender, plan)
        except (NotAvailable, processes.StartFailed, RuntimeError) as error:
            own.close()
            missing[name] = str(error)
            print(f"!!! {name} IS NOT IN THIS COMPARISON: {error}", file=sys.stderr, flush=True)
            continue
        stack.push(own)
        processes.freeze(root)
        up.append((contender, root))
    return up, missing


def _measure(options: argparse.Namespace, plan: Plan, folder: Path) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    if load_before > _QUIET_LOAD:
        _say(f"the machine is busy (load {load_before:.2f}): intervals will be wide and times too long")
    with contextlib.ExitStack() as stack:
        port, _ = stack.enter_context(backend(cpu=plan.load_cpu, folder=folder))
        contenders: list[Contender] = [direct(port), nginx(port, folder)]
        ours: Gateway | None = None
        if not options.without_gateway:
            ours = gateway(port, folder)
            contenders.insert(0, ours)
        running: list[tuple[Contender, int]] = []
        for contender in contenders:
            _say(f"starting {contender.name}")
            root = stack.enter_context(started(contender, cpu=plan.contender_cpu, folder=folder))
            warm_up(contender, plan)
            running.append((contender, root))
        peers, missing = _start_peers(stack, options.peers, port, folder, plan)
        running += peers
        measured = rounds(running, plan, _say)
        judged: list[targets.Target] = []
        observed: dict[str, Any] = {}
        known: dict[str, Any] = {}
        if ours is not None:
            judged = targets.plain_and_streams(measured)
            if options.peers:
                judged += targets.against_peers(measured)
            root = next(pid for contender, pid in running if contender is ours)
            if not options.without_accounts:
                guarded, not_there = accounts.measure(ours, root, options.before, port, plan, folder, _say)
                judged += targets.accounts(guarded, not_there)
                print(f"\nKeys, limits, usage and cache: median [interval] over {plan.rounds} rounds\n")
                print(report.by_role(guarded))
                known = {"figures": guarded.figures, "before": options.before, "not_there": not_there}
            if not options.without_monitoring:
                cost = monitoring.scraping_cost(ours, root, plan, options.pairs, _say)
                _say("a large scrape")
                scrape = monitoring.large_scrape(port, folder, plan)
                _say("time to ready")
                ready_s = monitoring.seconds_to_ready(port, folder, plan)
                resident = measured.resident[ours.name]
                judged += targets.monitoring(scrape, cost, ready_s, resident)
                observed = {
                    "scraping_cost": {
                        "difference_us": cost.difference_us._asdict(),
                        "without_us": cost.without_us,
                        "scrapes": cost.scrapes,
                    },
                    "scrape": {**scrape._asdict(), "milliseconds": scrape.milliseconds._asdict()},
                    "ready_s": ready_s._asdict(),
                }
    logged: dict[str, Any] = {}
    if ours is not None and not options.without_surfaces:
        logged, promises = _surfaces(options, plan, folder)
        judged += promises
    shown = [contender for contender, _ in running]
    _print(measured, shown, plan, judged, missing)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {**_machine(), "load_before": load_before, "load_after": os.getloadavg()[0]},
        "plan": dataclasses.asdict(plan),
        "versions": {contender.name: contender.version for contender in shown},
        "not_available": missing,
        "figures": measured.figures,
        "resident_bytes": measured.resident,
        "monitoring": observed,
        "accounts": known,
        "surfaces": logged,
        "targets": [target._asdict() for target in judged],
        "unfair": {name: report.UNFAIR[name] for name in ("all", *(c.name for c in shown)) if name in report.UNFAIR},
        "picture": report.picture(measured, shown, _caption(shown)),
    }


def _surfaces(options: argparse.Namespace, plan: Plan, folder: Path) -> tuple[dict[str, Any], list[targets.Target]]:
    """What logs, traces and health checks cost. With nothing else running: 12 µs are not much."""
    with backend(cpu=plan.load_cpu, folder=folder / "surfaces") as (port, _):
        found, not_there = surfaces.measure(options.before_surfaces, port, plan, folder, _say)
    _say("log lines")
    lines = surfaces.lines_written(plan.contender_cpu, plan.seconds)
    print(f"\nLogs, traces and health checks: median [interval] over {plan.rounds} rounds\n")
    print(report.by_role(found))
    print()
    print(report.own_account(found))
    figures = {
        "figures": found.figures,
        "resident_bytes": found.resident,
        "before": options.before_surfaces,
        "not_there": not_there,
        "lines": lines._asdict(),
    }
    return figures, targets.surfaces(found, not_there, lines)


def _only_surfaces(options: argparse.Namespace, plan: Plan, folder: Path) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    figures, judged = _surfaces(options, plan, folder)
    print("\nPromises\n")
    print(report.verdicts(judged))
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {**_machine(), "load_before": load_before, "load_after": os.getloadavg()[0]},
        "plan": dataclasses.asdict(plan),
        "surfaces": figures,
        "targets": [target._asdict() for target in judged],
    }


def _caption(contenders: list[Contender]) -> str:
    machine = _machine()
    versions = ", ".join(f"{contender.name} {contender.version}" for contender in contenders if contender.command)
    return f"{machine['cpu']}, one core each, {machine['kernel']}; {versions}; lines: interval of the median"


def _print(
    measured: Measured, contenders: list[Contender], plan: Plan, judged: list[targets.Target], missing: dict[str, str]
) -> None:
    print(f"\nMedian [interval] over {plan.rounds} rounds\n")
    print(report.tables(measured, contenders, plan.connections))
    print("\nWhat is unfair about this\n")
    print(report.unfairness(contenders))
    for name, reason in missing.items():
        print(f"\n!!! {name} IS NOT IN THIS COMPARISON: {reason}")
    if judged:
        print("\nPromises\n")
        print(report.verdicts(judged))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"with other gateways; which ones, else all of: {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help=f"default: {Plan.rounds}, with peers {_ROUNDS_WITH_PEERS}"
    )
    parser.add_argument(
        "--seconds", type=float, default=Plan.seconds, help="length of one plain run (default: %(default)g)"
    )
    parser.add_argument(
        "--pairs", type=int, default=8, help="B runs of the A B A B … A comparison (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it works")
    parser.add_argument("--surfaces", action="store_true", help="only what logs, traces and health checks cost")
    parser.add_argument("--without-gateway", action="store_true", help="only nginx, direct and peers")
    parser.add_argument("--without-monitoring", action="store_true", help="leave out scraping, memory and start")
    parser.add_argument("--without-accounts", action="store_true", help="leave out keys, limits, usage and cache")
    parser.add_argument("--without-surfaces", action="store_true", help="leave out logs, traces and health checks")
    parser.add_argument(
        "--before-surfaces",
        metavar="COMMIT",
        default=surfaces.BEFORE_COMMIT,
        help="the gateway that logs and traces are compared with (default: %(default)s, the last without them)",
    )
    parser.add_argument(
        "--before",
        metavar="COMMIT",
        default=accounts.BEFORE_COMMIT,
        help="the gateway that keys, limits and usage are compared with (default: %(default)s, the last without them)",
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 when a promise was missed")
    parser.add_argument("--keep", action="store_true", help="keep configurations and logs of what was started")
    options = parser.parse_args()
    if options.surfaces and (options.peers is not None or options.without_gateway or options.without_surfaces):
        parser.error("--surfaces measures nothing else: it goes with none of --peers and --without-...")
    options.peers = list(PEERS) if options.peers == [] else (options.peers or [])
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    options.rounds = options.rounds or (_ROUNDS_WITH_PEERS if options.peers else Plan.rounds)
    if options.quick:
        options.rounds, options.seconds, options.pairs = 2, 1.0, 2
    return options


def main() -> int:
    """Runs the benchmark; the exit status."""
    options = _options()
    missing = [tool for tool in ("wrk", "taskset") if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        print(
            f"cannot measure here: {'missing ' + ', '.join(missing) if missing else 'Linux is needed'}", file=sys.stderr
        )
        return 2
    if len(os.sched_getaffinity(0)) < 2:
        print("cannot measure here: two CPUs are needed, one for what is measured, one for the load", file=sys.stderr)
        return 2
    contender_cpu, load_cpu = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {load_cpu})
    plan = Plan(
        rounds=options.rounds,
        seconds=options.seconds,
        paced_each=1 if options.quick else Plan.paced_each,
        burst_each=5 if options.quick else Plan.burst_each,
        contender_cpu=contender_cpu,
        load_cpu=load_cpu,
    )
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        outcome = _only_surfaces(options, plan, folder) if options.surfaces else _measure(options, plan, folder)
    except (processes.StartFailed, RuntimeError, FileNotFoundError) as error:
        print(f"cannot measure: {error}\nlogs: {folder}", file=sys.stderr)
        return 2
    if options.keep:
        print(f"\nconfigurations and logs: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.mkdir(exist_ok=True)
    stem = "bench-surfaces" if options.surfaces else "bench-peers" if options.peers else "bench"
    picture = outcome.pop("picture", "")
    if picture:
        (RESULTS / f"{stem}.svg").write_text(picture, encoding="utf-8")
    (RESULTS / f"{stem}.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    print(f"\n{RESULTS / stem}.json{' and .svg' if picture else ''} written")
    return int(options.strict and any(target["met"] is False for target in outcome["targets"]))


if __name__ == "__main__":
    sys.exit(main())
