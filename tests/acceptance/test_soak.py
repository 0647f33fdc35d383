"""The running program under load of every kind while workers, control and backends are killed at random.

`make test` runs it for seconds, `make soak` for `SOAK_S` seconds (600). The choices come from a seed, which is printed;
`SEED` repeats them. One request in five meets a backend that fails, one in five is left by its client; keys come and go
and the configuration is read again all the time. What must hold at the end, however long it was:

- every request is counted once: what clients saw whole is in the counts, and the counts hold no more than that and what
  was in hand at the kills (each client has one request in hand) or was left;
- every inference has one usage row, with the status, tokens and key that its client saw; rows are missing only of
  workers that were killed, and only those that they had not handed on;
- no limit and no budget was exceeded, but by what such rows would have counted after control was killed too;
- a revoked key is refused within a second, and nobody else is;
- no total ever went down, nothing is in flight, no client connection is left open;
- no process has grown beyond its bound, every one answers, and the program ends with 0.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from support.callers import rows
from support.serving import Scrape, Serving, is_alive
from support.soaking import (
    KINDS,
    PRICE,
    REQUESTS_PER_MINUTE,
    USD_PER_DAY,
    Backends,
    Client,
    Keys,
    Killer,
    Noted,
    Seen,
    Watcher,
    soak,
)
from support.wait import until

SHORT_S = 30.0
CLIENTS = 12

MOST_RESIDENT_BYTES = {"supervisor": 20e6, "worker": 60e6, "control": 120e6}
"""What each process may be at any moment: the sizes that the product promises."""

GROWTH_BYTES = {"supervisor": 2e6, "worker": 20e6, "control": 25e6}
"""How much more at the end than when the load began. The supervisor is the one that lives through it all; the others
are often new, and grow to their working size with the first requests."""

MORE_DESCRIPTORS = {"supervisor": 0, "worker": 2 * CLIENTS, "control": 2 * 16 + 8 + 4 * 3}
"""Open descriptors beyond those of the idle program. A worker keeps connections to backends, as many as it had requests
at one time; control those of the workers' forwarders, 16 each, and four to its store, with three files each."""

SILENCE_S = 10.0
"""How long monitoring may be away: killed again and again, control is started after 5 s at the most, and starts within 3."""

REVOKED_WITHIN_S = 1.0

HANDED_ON_S = 0.6
"""How soon the row of a reply that is whole is stored: workers hand on ten times a second, control stores four times."""

FOUND_S = 0.5
"""How soon workers find a control that answers."""

MOST_TOKENS = 15
"""Of what is let through by a budget: two of input, and six or seven of output."""

DAY_US = 86_400_000_000


def by_process(scrape: Scrape, name: str) -> dict[str, float]:
    return {labels["process"]: value for sample, labels, value in scrape.samples if sample == f"llm_router_{name}"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_is_lost_leaked_or_left(tmp_path: Path) -> None:
    """Under mixed load, faults, kills, changes of keys and of the configuration."""
    seconds = float(os.environ.get("SOAK_S") or SHORT_S)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    print(f"soak: {seconds:g} s, SEED={seed}")
    pause_s = 1.0 if seconds <= 60 else 3.0
    with Backends() as backends, Serving(tmp_path, backends.config()) as serving:
        until(lambda: serving.scrape().total("llm_router_backend_up") == 6, what="every backend to be up")
        keys = Keys.make(serving)
        idle = serving.scrape()
        seen, watcher, killer = asyncio.run(
            soak(serving, backends, keys, seed=seed, seconds=seconds, clients=CLIENTS, pause_s=pause_s)
        )
        until(lambda: serving.status("/health", monitoring=True) == 200, 15.0, "health after the last kill")
        until(lambda: serving.status("/health/ready") == 200, what="readiness after the last kill")
        everyone_answers(serving, seen, keys)
        last = until(lambda: settled(serving), 10.0, "everything to be at rest")
        assert last is not None
        assert watcher.look() is not None
        stored = until(lambda: all_stored(serving, seen, killer, watcher), 15.0, "rows of all but killed workers")
        assert stored is not None
        print(summary(seen, killer, stored))

        assert seen.wrong == []
        assert watcher.down == [], "totals went down"
        assert len(watcher.answers) > seconds / 2
        assert watcher.longest_silence_s < SILENCE_S
        assert sum(killer.done.values()) > seconds / pause_s / 4
        assert last.total("llm_router_worker_restarts_total", reason="killed") == killer.done["worker"]
        assert last.total("llm_router_worker_restarts_total") == killer.done["worker"]
        counts_agree(last, seen, lost=CLIENTS * killer.done["worker"])
        rows_agree(seen, stored)
        limits_held(seen, stored)
        revoked_in_time(seen)
        nothing_grew(idle, last, dict(watcher.peaks))
        assert [
            line for line in serving.log.splitlines() if "Traceback" in line or '"log.level":"critical"' in line
        ] == []

        pids = [serving.process.pid, *serving.children().values()]
        serving.process.terminate()
        assert serving.process.wait(15) == 0
        assert not any(is_alive(pid) for pid in pids)


def everyone_answers(serving: Serving, seen: Seen, keys: Keys) -> None:
    """Both workers are up and serve; 40 new connections miss one of two by chance once in 10^12."""
    scrape = serving.scrape()
    assert scrape.total("llm_router_worker_up") == 2
    before = seen.ended[KINDS["plain"][1].path, 200]

    async def ask() -> None:
        client = Client(serving.port, "last", random.Random(0), seen, keys)
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
        + scrape.total("llm_router_queue_size")
    )
    return None if busy else scrape


def summary(seen: Seen, killer: Killer, stored: list[dict[str, Any]]) -> str:
    ends = Counter(noted.end for noted in seen.requests.values())
    statuses = Counter(noted.status for noted in seen.requests.values() if noted.end == "whole")
    cached = seen.count(is_cached=True)
    missing = len(missing_rows(seen, stored))
    limited = seen.count(kind="limited", status=200)
    return (
        f"soak: {dict(killer.done)}; {dict(ends)}, whole: {dict(sorted(statuses.items()))}, {cached} from the cache; "
        f"{len(stored)} usage rows, {missing} lost with their worker; {len(seen.revoked_s)} keys revoked, "
        f"{limited} let through by a limit of {REQUESTS_PER_MINUTE} a minute"
    )


def counts_agree(scrape: Scrape, seen: Seen, *, lost: int) -> None:
    """What clients saw is counted; beyond that there is only what broke in their hands and what they left.

    Args:
        lost: requests that clients had in hand at the kills of workers, at most.
    """
    broken, left = seen.count(end="broken"), seen.count(end="left")
    assert broken <= lost
    unsure = broken + left
    total = scrape.total
    whole = 0
    for outcome in ("success", "error"):
        count = seen.count(is_inference=True, outcome=outcome)
        counted = total("llm_router_inference_total", status=outcome)
        assert count <= counted <= count + unsure, outcome
        whole += count
    assert total("llm_router_inference_total", status="cancelled") <= unsure
    assert whole + left - lost <= total("llm_router_inference_total") + not_begun(seen)
    assert total("llm_router_inference_total") <= whole + unsure
    assert total("llm_router_errors_total", type="worker_lost") <= lost
    for (path, status), count in seen.ended.items():
        route = "__other__" if path == "/nowhere" else path
        counted = total("llm_router_http_requests_total", route=route, status_code=str(status))
        assert count <= counted <= count + unsure, (path, status)
    cached = seen.count(is_cached=True)
    assert cached, "nothing came from the cache"
    assert cached <= total("llm_router_cache_hits_total") <= cached + unsure
    assert total("llm_router_usage_dropped_total") == 0
    for name in {noted.key for noted in seen.requests.values() if noted.key}:
        count = seen.count(key=name, is_inference=True)
        counted = total("llm_router_api_key_requests_total", key=name)
        assert count <= counted <= count + seen.count(key=name, end="broken") + seen.count(key=name, end="left"), name
    # The second view agrees with the first.
    assert total("model_inference_total") == total("llm_router_inference_total")


def not_begun(seen: Seen) -> int:
    """Clients that hung up so soon that the router need not have begun."""
    return sum(noted.end == "left" and KINDS[noted.kind][1].leaves == "at once" for noted in seen.requests.values())


# -- usage ------------------------------------------------------------------------------------------


def missing_rows(seen: Seen, stored: list[dict[str, Any]]) -> list[Noted]:
    """Whole inferences without a row."""
    there = {row["request_id"] for row in stored}
    return [noted for id, noted in seen.requests.items() if noted.is_inference and id not in there]


def all_stored(serving: Serving, seen: Seen, killer: Killer, watcher: Watcher) -> list[dict[str, Any]] | None:
    """Every row, once none is missing that a killed worker cannot have taken with it; None before."""
    stored = rows(serving.folder)
    missing = missing_rows(seen, stored)
    return None if any(not died_with_its_worker(noted, killer, watcher) for noted in missing) else stored


def died_with_its_worker(noted: Noted, killer: Killer, watcher: Watcher) -> bool:
    """Whether a worker was killed before it can be asked to have handed the row to a control that lived to store it."""
    began_at = noted.ended_at
    while True:
        until_at = began_at + HANDED_ON_S
        back = [back_at for kill_at, back_at in away(killer, watcher) if kill_at <= until_at and began_at < back_at]
        if not back:
            return killer.was_killed("worker", noted.ended_at - HANDED_ON_S, until_at)
        began_at = max(back)


def away(killer: Killer, watcher: Watcher) -> list[tuple[float, float]]:
    """From when to when no worker had a control."""
    kills = [at for name, at in killer.killed_at if name == "control"]
    return [(kill, min(at for at in watcher.answers if at > kill) + FOUND_S) for kill in kills]


def rows_agree(seen: Seen, stored: list[dict[str, Any]]) -> None:
    """No row twice, none of a request that nobody made, and each as its client saw the reply."""
    doubled = [id for id, count in Counter(row["request_id"] for row in stored).items() if count > 1]
    assert doubled == []
    problems = []
    for row in stored:
        noted = seen.requests.get(row["request_id"])
        if noted is None or (noted.end == "whole" and not noted.is_inference):
            problems.append(f"a row of no inference: {row}")
        elif noted.end == "whole" and not agrees(row, noted):
            problems.append(f"{noted}: {row}")
        elif row["key"] != noted.key:
            problems.append(f"another key than {noted.key!r}: {row}")
    assert problems == []


def agrees(row: dict[str, Any], noted: Noted) -> bool:
    """Whether a row tells what the client saw; a cached answer shows its old usage and costs nothing."""
    tokens = (row["input_tokens"], row["output_tokens"])
    said = (0, 0) if noted.is_cached else noted.usage
    return (
        (row["status"], row["outcome"], bool(row["cached"])) == (noted.status, noted.outcome, noted.is_cached)
        and (said is None or tokens == said)
        and (noted.kind != "stream" or noted.outcome != "success" or row["usage_source"] == "provider")
    )


def limits_held(seen: Seen, stored: list[dict[str, Any]]) -> None:
    """Neither in any minute nor on any day more than allowed. A row that was lost may have been let through again."""
    lost = Counter(noted.kind for noted in missing_rows(seen, stored))
    spans = sorted(
        (noted.began_at, noted.ended_at)
        for noted in seen.requests.values()
        if noted.kind == "limited" and noted.status == 200
    )
    assert len(spans) > REQUESTS_PER_MINUTE / 2
    assert seen.count(kind="limited", status=429), "the limit was not reached"
    for began_at, _ in spans:
        within = sum(began_at <= began and ended <= began_at + 60 for began, ended in spans)
        assert within <= REQUESTS_PER_MINUTE + lost["limited"] + seen.count(kind="limited", end="broken")
    spent: defaultdict[int, float] = defaultdict(float)
    for row in stored:
        if row["key"] == "budget":
            spent[row["time_us"] // DAY_US] += row["cost_usd"]
    assert seen.count(kind="budget", status=429), "the budget was not reached"
    unsure = (lost["budget"] + seen.count(kind="budget", end="broken")) * MOST_TOKENS * PRICE / 1e6
    assert spent
    assert max(spent.values()) <= USD_PER_DAY + unsure + 1e-9


def revoked_in_time(seen: Seen) -> None:
    """Within a second of the answer to the administrator; when control was killed, its successor has to start first."""
    assert seen.revoked_s
    for seconds, was_killed in seen.revoked_s:
        assert seconds < REVOKED_WITHIN_S or (was_killed and seconds < SILENCE_S)


# -- processes ----------------------------------------------------------------------------------------


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
