"""What knowing the caller costs: key check, limits, budget and usage rows; and what an answer from the cache costs.

The gateway with a key whose limits are all on and never reached takes turns with the gateway that asks for no key, with
one that answers from its cache, and with the gateway as it was before there were keys, limits and usage. CPU is that
of the whole process tree, until the last row is stored. Not for: streams, or comparing with others (measure.py).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from benchmarks import processes
from benchmarks.contenders import CHAT_PATH, Gateway, gateway, started
from benchmarks.measure import Measured, Plan, settled_load, warm_up

PLAIN: Final = "gateway"
GUARDED: Final = "gateway, key and limits"
CACHED: Final = "gateway, cache hits"
BEFORE: Final = "gateway, before"

BEFORE_COMMIT: Final = "896644e"
"""The last commit without keys, limits and usage: what the promise is measured against."""

LOAD: Final = "plain.32"
_CONNECTIONS: Final = 32
_ROWS_S: Final = 1.0  # within which every usage row is stored

# Every kind of limit that a key can have, each too high to be reached: all are counted, none refuses.
_LIMITS: Final = {
    "requests_per_minute": 10**9,
    "requests_per_day": 10**11,
    "tokens_per_minute": 10**11,
    "tokens_per_day": 10**13,
    "concurrency": 10**5,
    "usd_per_day": 1e8,
    "usd_per_month": 1e9,
}
_PRICE: Final = {"input": 0.5, "output": 1.5}  # per million tokens: budgets need one


class NotThere(Exception):
    """The commit to compare with cannot be had; the message says why."""


def measure(
    plain: Gateway, root: int, before: str, backend_port: int, plan: Plan, folder: Path, say: Callable[[str], None]
) -> tuple[Measured, str]:
    """Plain requests at 32 connections, contenders in turn.

    Args:
        plain: the gateway that asks for no key, running with `root` as its root process.
        before: the commit to compare with.

    Returns: the figures by contender, and why there is nothing to compare with (empty if there is).
    Raises: RuntimeError when a request was refused, or a row was lost.
    """
    measured, missing = Measured(), ""
    with contextlib.ExitStack() as stack:
        running = [(plain, root)]
        contenders = [guarded(backend_port, folder), cached(backend_port, folder)]
        try:
            contenders.append(earlier(before, backend_port, folder))
        except NotThere as error:
            missing = str(error)
            say(missing)
        for contender in contenders:
            say(f"starting {contender.name}")
            running.append((contender, stack.enter_context(started(contender, cpu=plan.contender_cpu, folder=folder))))
            if contender.name == GUARDED:
                contender.headers["Authorization"] = f"Bearer {_new_key(contender)}"
            warm_up(contender, plan)
        for number in range(1, plan.rounds + 1):
            say(f"keys, limits and cache: round {number} of {plan.rounds}")
            for contender, pid in running[:: 1 if number % 2 else -1]:
                _turn(measured, contender, pid, plan)
    return measured, missing


def guarded(backend_port: int, folder: Path) -> Gateway:
    """Knows what each request costs. Asks everybody for a key as soon as there is one: it is made once it runs."""
    return gateway(backend_port, folder, name=GUARDED, price=_PRICE)


def cached(backend_port: int, folder: Path) -> Gateway:
    """Answers what it has answered before from its memory."""
    return gateway(backend_port, folder, name=CACHED, headers={"x-llm-router-cache": "on"})


def earlier(commit: str, backend_port: int, folder: Path, *, name: str = BEFORE) -> Gateway:
    """The gateway of that commit, as its defaults are. Raises: NotThere."""
    sources = folder / f"before-{commit}"
    packed = subprocess.run(
        ["git", "archive", "--format=tar", commit, "src"],
        capture_output=True, check=False, cwd=processes.own_folder(),
    )  # fmt: skip
    if packed.returncode:
        raise NotThere(f"commit {commit} is not in this clone: {packed.stderr.decode().strip()[-200:]}")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        if sys.version_info >= (3, 12):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(sources)
    return gateway(backend_port, folder, name=name, sources=sources / "src")


def _new_key(contender: Gateway) -> str:
    """A key with every limit on, over the monitoring port, which is open on loopback while there is no admin key."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{contender.metrics_port}/admin/keys",
        json.dumps({"name": "bench", "limits": _LIMITS}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        text: str = json.load(reply)["secret"]
    # The reply comes when the key is stored; workers hear of it at once, but not before.
    models = contender.url.removesuffix(CHAT_PATH) + "/v1/models"
    deadline = time.monotonic() + 5
    while not processes.answers(models, {"Authorization": f"Bearer {text}"}):
        if time.monotonic() > deadline:
            raise RuntimeError("the worker does not take the key that was just made")
        time.sleep(0.02)
    return text


def _turn(into: Measured, contender: Gateway, root: int, plan: Plan) -> None:
    stored = _stored(contender)
    load = settled_load(into, contender, root, plan, key=LOAD, connections=_CONNECTIONS, after_s=_ROWS_S)
    rows = _stored(contender) - stored
    if stored >= 0 and rows < load.requests:
        raise RuntimeError(f"{contender.name}: {load.requests} requests made {rows} usage rows")


def _stored(contender: Gateway) -> int:
    """Usage rows in its store; -1 for one that keeps none."""
    if contender.name == BEFORE:
        return -1
    url = f"http://127.0.0.1:{contender.metrics_port}/admin/usage?since=0"
    with urllib.request.urlopen(url, timeout=30) as reply:
        total: dict[str, Any] = json.load(reply)["total"]
    return int(total["requests"])
