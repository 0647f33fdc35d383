"""`llm-router profile`: where a process of a running router spends its time, or what it allocates.

On a terminal the functions that matter most; into a file what tools for profiles read. Not for: requests and their
steps, which are traces.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlencode

import typer

from llm_router.cli.options import CannotAsk, ConfigFile, DataDir

EPILOG = """Examples:

- `llm-router profile` shows where worker-0 spends 10 s
- `llm-router profile --seconds 30 --output worker.speedscope.json`, to be opened at speedscope.app
- `llm-router profile control --kind memory --seconds 60`
- `llm-router profile --kind continuous --seconds 600` shows the last ten minutes

It needs `profiler.enabled: true` (or PROFILER_ENABLED=true). There is one profile at a time. One of memory makes the
process much slower while it runs.
"""

_USUAL_LINES = 20


class Share(NamedTuple):
    """What a function took itself, and with what it called; in the unit of the profile."""

    name: str
    own: float
    total: float


def profile(
    process: Annotated[str, typer.Argument(metavar="PROCESS", help="worker-0, worker-1, ... or control.")] = "worker-0",
    kind: Annotated[
        str,
        typer.Option("--kind", "-k", metavar="KIND", help="cpu, memory, or continuous: what was sampled lately."),
    ] = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", "-s", metavar="N", help="How long, 60 at most; of continuous how far back.  [default: 10]"
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, - for stdout.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format", "-f", metavar="FORMAT", help="Of the file: speedscope, folded (flame graphs) or json."
        ),
    ] = "speedscope",
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=1, help="Functions to show.")] = _USUAL_LINES,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Take a profile of a process of a running router: CPU time, or memory that grows."""
    from llm_router.cli.control import Refused, fetch
    from llm_router.cli.options import settings_of

    wanted: dict[str, Any] = {"process": process, "kind": kind, "format": format if output else "json"}
    if seconds is not None:
        wanted["seconds"] = f"{seconds:g}"
    socket_path = settings_of(config, data_dir=data_dir, files_needed=False).server.control_socket
    if sys.stderr.isatty() and kind != "continuous":
        print(f"profiling {process} for {10 if seconds is None else seconds:g} s ...", file=sys.stderr)
    try:
        body = fetch(socket_path, "POST", f"/debug/profile?{urlencode(wanted)}")
    except Refused as error:
        if error.reason == "not_found":  # the route is not there
            raise CannotAsk(
                "profiles are switched off; profiler.enabled: true (or PROFILER_ENABLED=true) and a restart switch them on"
            ) from error
        raise
    if output is None:
        print("\n".join(report(json.loads(body), lines)))
    elif output == "-":
        sys.stdout.buffer.write(body)
    else:
        _write(output, body)
        print(f"{output}: {len(body) / 1000:,.1f} kB")


def report(document: Any, lines: int) -> list[str]:
    """A profile's JSON as a headline and its heaviest functions, or lines of code for memory.

    Args:
        lines: of functions, at most.
    """
    total, unit = document["total"], document["unit"]
    title = f"{document['process']}, {document['kind']}, {document['seconds']:.1f} s: "
    if unit == "bytes":
        title += f"{_bytes(total)} more than before, in {document['count']} blocks"
    else:
        share = total / document["seconds"] if document["seconds"] else 0.0
        title += f"{total:.2f} s of CPU time ({share:.0%} of one CPU), {document['count']} samples"
    if not document["stacks"]:
        return [title]
    found = sorted(shares(document), key=lambda share: (-share.own, -share.total, share.name))
    shown = [share for share in found if share.own > 0][:lines]
    rows = [("self", "", "total", "", "line" if unit == "bytes" else "function")]
    rows.extend(
        (
            _amount(share.own, unit),
            f"{share.own / total:.1%}" if total else "",
            _amount(share.total, unit),
            f"{share.total / total:.1%}" if total else "",
            share.name,
        )
        for share in shown
    )
    if (left := len([share for share in found if share.own > 0]) - len(shown)) > 0:
        rows.append(("", "", "", "", f"... and {left} more; --lines shows more, --output all"))
    return [title, "", *_table(rows)]


def shares(document: Any) -> list[Share]:
    """What each function took: a function that calls itself counts once in its total."""
    names = [frame["name"] for frame in document["frames"]]
    own: dict[str, float] = {}
    total: dict[str, float] = {}
    for stack in document["stacks"]:
        if not stack["frames"]:
            continue
        leaf = names[stack["frames"][-1]]
        own[leaf] = own.get(leaf, 0.0) + stack["value"]
        for name in {names[index] for index in stack["frames"]}:
            total[name] = total.get(name, 0.0) + stack["value"]
    return [Share(name, own.get(name, 0.0), value) for name, value in total.items()]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of figures to the right, the last one as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def _amount(value: float, unit: str) -> str:
    return _bytes(value) if unit == "bytes" else f"{value * 1000:,.0f} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _write(path: str, body: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(body)
    except OSError as error:
        raise CannotAsk(f"the profile cannot be written to {path}: {os.strerror(error.errno or 0)}") from error
