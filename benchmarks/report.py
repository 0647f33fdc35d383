"""Puts the outcome into words: tables on the terminal, one JSON file, one picture, and what is unfair about it.

Not for: deciding what is good enough (targets.py).
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Final

from benchmarks import surfaces
from benchmarks.accounts import LOAD
from benchmarks.contenders import Contender
from benchmarks.intervals import Estimate
from benchmarks.measure import Measured
from benchmarks.targets import GATEWAY, Target

UNFAIR: Final[dict[str, str]] = {
    "all": "One core, loopback, no TLS, one backend that answers at once: the cost of passing on is all there is, and it is "
    "small beside what a real model takes. Load generator and backend share the other core, so requests per second at 256 "
    "connections are theirs as much as the contender's; CPU per request is not. CPU is what the kernel books on the "
    "processes; network work done in interrupts is booked on whoever runs at that moment. The p99 of a closed loop hides "
    "queueing: it is for comparing, not for promising. With one connection nothing runs in parallel and most of the time is "
    "waking the other core, which under a hypervisor takes longer than the work; hence the table with all on one core. Chunks arrive one at a time here; a contender that is late gets "
    "several at once and so looks cheaper per chunk.",
    "direct": "Does nothing, so nothing can be as fast; and with nothing on the first core, the backend is its only cost.",
    "nginx": "Unfair to us: written in C, reads no JSON, knows no models, keeps no metrics, writes no log here, checks no "
    "Host or Origin, retries nothing. Unfair to it: buffering is off so that streams can pass, which costs it some on plain "
    "replies; with several cores its workers share one configuration and no state.",
    GATEWAY: "Metrics and usage rows are on, which is the product; no key is asked for, nothing is limited, and these requests are "
    "not looked up in the cache (their temperature is not 0): the table of keys, limits and cache shows what those cost. Logs, traces "
    "and health checks are as they come: each request has its lines in two files, one in a hundred its trace. The load names one model with one deployment: retries, fallbacks and long lists of models are not exercised.",
    "vLLM router": "Unfair to it: built to keep caches warm over many servers and to run on many cores, neither of which is "
    "used; it is given round robin over one server. Unfair to us: our figure includes the processes that monitor.",
    "SGLang router": "As the vLLM router. It also looks for a tokenizer of the model when it starts and does without.",
    "LiteLLM": "Unfair to it: it knows many providers and prices and rebuilds each reply as its own object; it is meant to be "
    "run with several workers, a database and Redis. Keys and callbacks are off, which spares it work. Its streams are "
    "measured with fewer at once, as more would overload one core; and what the end of a run cuts off counts against it.",
    "Portkey": "Unfair to it: Node's just-in-time compiler and its threads share one core here; it is meant to be run in many "
    "instances, or on workers at the edge. It is told its target by headers, with no configuration to look up. One library is "
    "held at an older version, as newer ones break its streams. Paced streams: fewer at once.",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _shown(value: Estimate, digits: int) -> str:
    return value.show(digits) if value.rounds and not math.isnan(value.median) else "-"


def tables(measured: Measured, contenders: Sequence[Contender], connections: Sequence[int]) -> str:
    """Everything that was measured, for people: median [interval] over the rounds."""
    parts = []
    loads = [(f"plain.{count}", f"plain, {count} connections") for count in connections]
    for key, title in [("one_core.1", "plain, 1 connection, all on one core"), *loads]:
        rows = []
        for contender in contenders:
            name = contender.name
            rows.append([
                name,
                _shown(measured.estimate(name, f"{key}.per_second"), 0),
                _shown(measured.estimate(name, f"{key}.p50_us"), 0),
                _shown(measured.estimate(name, f"{key}.p99_us"), 0),
                _shown(measured.estimate(name, f"{key}.cpu_us"), 1),
                f"{sum(measured.values(name, f'{key}.errors')):.0f}",
            ])  # fmt: skip
        head = [title, "requests/s", "p50 µs", "p99 µs", "CPU µs/request", "errors"]
        parts.append(_table(head, rows))
    for key, title in (("paced", "streams of 50 chunks, paced at 10 ms"), ("burst", "streams of 50 chunks, burst")):
        rows = []
        for contender in contenders:
            name = contender.name
            rows.append([
                name,
                _shown(measured.estimate(name, f"{key}.chunks_per_second"), 0),
                _shown(measured.estimate(name, f"{key}.first_p50_ms"), 2),
                _shown(measured.estimate(name, f"{key}.first_p99_ms"), 2),
                _shown(measured.estimate(name, f"{key}.cpu_us"), 1),
                f"{sum(measured.values(name, f'{key}.errors')):.0f}",
            ])  # fmt: skip
        parts.append(_table([title, "chunks/s", "first p50 ms", "first p99 ms", "CPU µs/chunk", "lost"], rows))
    rows = []
    for contender in contenders:
        for role, held in sorted(measured.resident.get(contender.name, {}).items()):
            cpu = measured.estimate(contender.name, f"plain.32.cpu_us.{role}")
            rows.append([f"{contender.name}: {role}", f"{held / 1e6:.1f}", _shown(cpu, 2)])
    parts.append(_table(["process", "resident MB", "CPU µs/request, 32 connections"], rows))
    return "\n\n".join(parts)


def by_role(measured: Measured) -> str:
    """The whole tree's CPU for a plain request at 32 connections and its parts, by contender."""
    rows = []
    for name in sorted(measured.figures):
        parts = [measured.estimate(name, f"{LOAD}.cpu_us.{role}") for role in ("worker", "control", "supervisor")]
        rows.append([
            name,
            *(_shown(value, 1) for value in (measured.estimate(name, f"{LOAD}.cpu_us"), *parts)),
            _shown(measured.estimate(name, f"{LOAD}.per_second"), 0),
            _shown(measured.estimate(name, f"{LOAD}.p50_us"), 0),
        ])  # fmt: skip
    return _table(
        ["plain, 32 connections", "CPU µs/request", "worker", "control", "supervisor", "requests/s", "p50 µs"], rows
    )


def own_account(measured: Measured) -> str:
    """What the gateway itself says about where its monitoring's CPU went."""
    rows = [
        [component, _shown(measured.estimate(surfaces.ON, f"{surfaces.OWN}.{component}"), 2)]
        for component in surfaces.components(measured)
    ]
    return _table(["by the gateway's own account", "CPU µs/request"], rows)


def verdicts(targets: Sequence[Target]) -> str:
    """The table of promises."""
    word = {True: "met", False: "MISSED", None: "not judged"}
    return _table(["promise", "limit", "measured", ""], [[t.what, t.limit, t.value, word[t.met]] for t in targets])


def unfairness(contenders: Sequence[Contender]) -> str:
    """What is unfair about each comparison that was made."""
    names = ["all", *(contender.name for contender in contenders)]
    return "\n".join(f"  {name}: {UNFAIR[name]}" for name in names if name in UNFAIR)


_BAR_HEIGHT: Final = 22
_LEFT: Final = 120
_CAPTION_CHARACTERS = 110
_WIDTH: Final = 720
_OURS: Final = "#2a6f97"
_OTHERS: Final = "#a9b4bd"


def _panel(title: str, bars: Sequence[tuple[str, Estimate]], top: int, digits: int) -> tuple[str, int]:
    """One horizontal bar chart, and the height it takes. Logarithmic as soon as one bar is 20 times another."""
    known = [(name, value) for name, value in bars if value.rounds and value.median > 0]
    if not known:
        return "", 0
    low = min(value.median for _, value in known)
    high = max(value.high for _, value in known)
    is_log = high > 20 * low
    floor = low / 2

    def length(value: float) -> float:
        share = math.log(max(value, floor) / floor) / math.log(high / floor) if is_log else value / high
        return share * (_WIDTH - _LEFT - 150)

    scale = ", logarithmic" if is_log else ""
    parts = [f'<text x="0" y="{top + 14}" class="title">{html.escape(title)}{scale}</text>']
    y = top + 26
    for name, value in known:
        colour = _OURS if name == GATEWAY else _OTHERS
        middle = y + _BAR_HEIGHT / 2 - 2
        parts.append(f'<text x="{_LEFT - 8}" y="{middle + 4:.0f}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{length(value.median):.1f}" height="{_BAR_HEIGHT - 5}" fill="{colour}"/>'
        )
        ends = [_LEFT + length(edge) for edge in (value.low, value.high)]
        parts.append(f'<path d="M{ends[0]:.1f} {middle:.1f}H{ends[1]:.1f}" class="interval"/>')
        at = max(ends[1], _LEFT + length(value.median)) + 6
        parts.append(f'<text x="{at:.1f}" y="{middle + 4:.0f}">{value.median:,.{digits}f}</text>')
        y += _BAR_HEIGHT
    return "\n".join(parts), y - top + 18


def picture(measured: Measured, contenders: Sequence[Contender], caption: str) -> str:
    """An SVG of what matters most: CPU per request and per chunk, median latency, time to first token."""
    panels = [
        ("CPU per plain request at 32 connections, µs", "plain.32.cpu_us", 1),
        ("CPU per chunk of a paced stream, µs", "paced.cpu_us", 1),
        ("median latency of a plain request at 1 connection, µs", "plain.1.p50_us", 0),
        ("median time to the first event of a paced stream, ms", "paced.first_p50_ms", 2),
    ]
    parts, top = [], 8
    for title, key, digits in panels:
        bars = [(contender.name, measured.estimate(contender.name, key)) for contender in contenders]
        part, height = _panel(title, bars, top, digits)
        parts.append(part)
        top += height
    for line in textwrap.wrap(caption, _CAPTION_CHARACTERS):
        parts.append(f'<text x="0" y="{top + 10}" class="caption">{html.escape(line)}</text>')
        top += 14
    style = (
        "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.caption{font-size:10px;fill:#57606a}"
        ".interval{stroke:#24292f;stroke-width:1.5;fill:none}"
    )
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {_WIDTH + 16} {top + 20}" width="{_WIDTH + 16}">\n'
        f'<style>{style}</style>\n<rect x="-8" width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
