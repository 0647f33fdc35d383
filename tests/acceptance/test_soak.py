"""The running program under load of every kind while workers, control and backends are killed at random.

`make test` runs it for seconds, `make soak` for `SOAK_S` seconds (600). The choices come from a seed, which is printed;
`SEED` repeats them. What must hold at the end, however long it was:

- every request is counted once: what clients saw whole is in the counts, and the counts hold no more than that and what
  was in hand at the kills (each client has one request in hand);
- no total ever went down, nothing is in flight, no client connection is left open;
- no process has grown beyond its bound, every one answers, and the program ends with 0.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from support.serving import Scrape, Serving, is_alive
from support.soaking import KINDS, Backends, Client, Seen, soak
from support.wait import until

SHORT_S = 7.0
CLIENTS = 12

MOST_RESIDENT_BYTES = {"supervisor": 20e6, "worker": 60e6, "control": 120e6}
"""What each process may be at any moment: the sizes that the product promises."""

GROWTH_BYTES = {"supervisor": 2e6, "worker": 20e6, "control": 25e6}
"""How much more at the end than when the load began. The supervisor is the one that lives through it all; the others
are often new, and grow to their working size with the first requests."""

MORE_DESCRIPTORS = {"supervisor": 0, "worker": 2 * CLIENTS, "control": 2 * 16 + 8}
"""Open descriptors beyond those of the idle program. A worker keeps connections to backends, as many as it had requests
at one time; control those of the workers' forwarders, 16 each."""

SILENCE_S = 5.0
"""How long monitoring may be away: 3 s are promised; a second kill may come while it starts."""


def by_process(scrape: Scrape, name: str) -> dict[str, float]:
    return {labels["process"]: value for sample, labels, value in scrape.samples if sample == f"llm_router_{name}"}


@pytest.mark.slow
def test_nothing_is_lost_leaked_or_left(tmp_path: Path) -> None:
    """Under mixed load and kills."""
    seconds = float(os.environ.get("SOAK_S") or SHORT_S)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    print(f"soak: {seconds:g} s, SEED={seed}")
    pause_s = 0.8 if seconds <= 60 else 3.0
    with Backends() as backends, Serving(tmp_path, backends.config) as serving:
        until(lambda: serving.scrape().total("llm_router_backend_up") == 5, what="every backend to be up")
        idle = serving.scrape()
        seen, watcher, killer = asyncio.run(
            soak(serving, backends, seed=seed, seconds=seconds, clients=CLIENTS, pause_s=pause_s)
        )
        print(f"soak: {sum(seen.ended.values())} replies, {dict(killer.done)}, {seen.broken} broken, {seen.left} left")
        until(lambda: serving.status("/health", monitoring=True) == 200, 15.0, "health after the last kill")
        until(lambda: serving.status("/health/ready") == 200, what="readiness after the last kill")
        everyone_answers(serving, seen)
        last = until(lambda: settled(serving), 10.0, "everything to be at rest")
        assert last is not None
        assert watcher.look() is not None

        assert seen.wrong == []
        assert watcher.down == [], "totals went down"
        assert watcher.scrapes > seconds / 2
        assert watcher.longest_silence_s < SILENCE_S
        assert sum(killer.done.values()) > seconds / pause_s / 4
        counts_agree(last, seen, lost=CLIENTS * killer.done["worker"])
        assert last.total("llm_router_worker_restarts_total", reason="killed") == killer.done["worker"]
        assert last.total("llm_router_worker_restarts_total") == killer.done["worker"]
        nothing_grew(idle, last, dict(watcher.peaks))
        assert [line for line in serving.log.splitlines() if "Traceback" in line or " CRITICAL " in line] == []

        pids = [serving.process.pid, *serving.children().values()]
        serving.process.terminate()
        assert serving.process.wait(15) == 0
        assert not any(is_alive(pid) for pid in pids)


def everyone_answers(serving: Serving, seen: Seen) -> None:
    """Both workers are up and serve; 40 new connections miss one of two by chance once in 10^12."""
    scrape = serving.scrape()
    assert scrape.total("llm_router_worker_up") == 2
    before = seen.ended[KINDS["plain"][1].path, 200]

    async def ask() -> None:
        client = Client(serving.port, random.Random(0), seen)
        for _ in range(40):
            await client.ask("plain", fresh=True)

    asyncio.run(ask())
    assert seen.ended[KINDS["plain"][1].path, 200] == before + 40


def settled(serving: Serving) -> Scrape | None:
    """A scrape in which nothing is in flight and no client is connected; None while there is something."""
    scrape = serving.scrape()
    busy = (
        scrape.total("llm_router_requests_in_flight")
        + scrape.total("llm_router_upstream_requests_in_flight")
        + scrape.total("llm_router_active_connections", type="client")
        + scrape.total("llm_router_active_connections", protocol="sse")
    )
    return None if busy else scrape


def counts_agree(scrape: Scrape, seen: Seen, *, lost: int) -> None:
    """What clients saw is counted; beyond that there is only what broke in their hands and what they left.

    Args:
        lost: requests that clients had in hand at the kills of workers, at most.
    """
    assert seen.broken <= lost
    unsure = seen.broken + seen.left
    total = scrape.total
    for outcome in ("success", "error"):
        counted = total("llm_router_inference_total", status=outcome)
        assert seen.inferences[outcome] <= counted <= seen.inferences[outcome] + unsure, outcome
    assert total("llm_router_inference_total", status="cancelled") <= unsure
    assert seen.made_inferences - lost <= total("llm_router_inference_total") <= seen.made_inferences
    assert total("llm_router_errors_total", type="worker_lost") <= lost
    for (path, status), count in seen.ended.items():
        route = "__other__" if path == "/nowhere" else path
        counted = total("llm_router_http_requests_total", route=route, status_code=str(status))
        assert count <= counted <= count + unsure, (path, status)
    # The second view agrees with the first.
    assert total("model_inference_total") == total("llm_router_inference_total")


def nothing_grew(idle: Scrape, last: Scrape, peaks: dict[str, int]) -> None:
    """Neither memory nor descriptors beyond their bounds."""
    for role, peak in peaks.items():
        assert peak <= MOST_RESIDENT_BYTES[role], f"{role} had {peak / 1e6:.1f} MB"
    for name, bounds in (("process_resident_memory_bytes", GROWTH_BYTES), ("process_open_fds", MORE_DESCRIPTORS)):
        before, after = by_process(idle, name), by_process(last, name)
        assert before.keys() == after.keys()
        for process, value in after.items():
            grown = value - before[process]
            assert grown <= bounds[process.partition("-")[0]], f"{name} of {process}: {before[process]:g} -> {value:g}"
