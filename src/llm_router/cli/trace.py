"""`llm-router trace`: where a request's time went, drawn in the terminal; and the lists from which to choose one.

Everything comes from a running router over its control socket. Not for: log lines (logs.py) or profiles (profile.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import typer

from llm_router.cli.options import ConfigFile, DataDir

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EPILOG = """Examples:

- `llm-router trace` lists the newest requests that were kept
- `llm-router trace --slowest --model gpt-4o-mini`
- `llm-router trace --failed --limit 5`
- `llm-router trace 4bf92f35` draws that one: a request id or a trace id, or the first characters of one

Not every request is kept: those that were sampled, slow, failed or the first of their kind, and a few of each kind.
"""

_PIPE_WIDTH: Final = 200  # a list that goes into a pipe is a line for each request
_ID_CHARS: Final = 12  # of a trace id in a list: enough to be the only one
_LEAST_BAR: Final = 20  # columns
_MOST_NAME: Final = 36  # columns
_BLOCKS: Final = " ▏▎▍▌▋▊▉█"
_ASCII_BLOCKS: Final = " |||#####"


def trace(
    id: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="A request id or a trace id, or its beginning.", show_default=False),
    ] = None,
    slowest: Annotated[bool, typer.Option("--slowest", help="List the slowest of the last hour.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="List those that failed.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="List those of this model.")
    ] = None,
    route: Annotated[
        str | None, typer.Option("--route", metavar="PATH", help="List those of this endpoint, like /v1/messages.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, max=200, help="How many to list.")] = 20,
    attributes: Annotated[
        bool, typer.Option("--attributes", "-a", help="Of one request: what is known of each step, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the router answers.")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Show where a request's time went; without an id, list the requests that were kept."""
    from llm_router.cli.control import call
    from llm_router.cli.options import settings_of

    if id is not None and (slowest or failed or model is not None or route is not None):
        raise typer.BadParameter("either one request, or a list", param_hint="ID")
    if slowest and failed:
        raise typer.BadParameter("either --slowest or --failed", param_hint="--failed")
    if id is None:
        show = "slowest" if slowest else "failed" if failed else "recent"
        chosen = {"show": show, "limit": str(limit), "model": model, "route": route}
        path = "/debug/requests?" + urlencode({name: value for name, value in chosen.items() if value is not None})
    else:
        path = f"/debug/requests/{quote(id, safe='')}"
    # Model files that are missing are no reason not to look at what happened.
    answer = call(settings_of(config, data_dir=data_dir, files_needed=False).server.control_socket, "GET", path)
    if as_json:
        print(json.dumps(answer))
    elif id is None:
        _list(answer)
    else:
        _draw(answer["requests"], attributes=attributes)


# -- a list ---------------------------------------------------------------------------------------------


def _list(answer: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not answer["requests"]:
        kept = dict.fromkeys(_plain(group["model"]) for group in answer["groups"])
        print(f"none is kept; there are requests for {', '.join(kept)}" if kept else "no request is kept yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("time", "took", "status", "request", "model", "backend", "problem", "kept", "trace"):
        table.add_column(title, justify="right" if title == "took" else "left", overflow="fold")
    for request in answer["requests"]:
        cells = (
            _instant(request["time"]),
            duration(request["duration_s"]),
            str(request["status"] or "none"),
            f"{request['method']} {request['route']}",
            request["model"],
            request["backend"],
            request["error_type"],
            request["kept"],
            request["trace_id"][:_ID_CHARS],
        )
        table.add_row(*(Text(_plain(cell)) for cell in cells), style="red" if request["error_type"] else "")
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)


# -- a waterfall ----------------------------------------------------------------------------------------


def _draw(requests: Sequence[Any], *, attributes: bool) -> None:
    """The requests of one trace, in the order of their beginnings."""
    from rich.console import Console

    console = Console(highlight=False)
    for number, request in enumerate(sorted(requests, key=lambda request: str(request["time"]))):
        if number:
            console.print()
        for line in _waterfall(request, console, attributes=attributes):
            # Neither folded nor cut by rich: the rows fit, and a long error is for the terminal to fold.
            console.print(line, soft_wrap=True)


def _waterfall(request: Any, console: Console, *, attributes: bool) -> Iterator[Text]:
    from rich.text import Text

    from llm_router.observe.tracing.names import CACHED

    failed = bool(request["error_type"])
    head = Text(_plain(f"{request['method']} {request['route']}"), style="bold")
    head.append(f"  {request['status'] or 'no status'}", style="bold red" if failed else "bold green")
    head.append(f"  {duration(request['duration_s'])}")
    if request["backend"]:
        head.append(_plain(f"  {request['model']} at {request['backend']}"))
    elif request["spans"] and request["spans"][0]["attributes"].get(CACHED):
        head.append(_plain(f"  {request['model']} from the cache"))
    yield head
    facts = [
        f"trace {request['trace_id']}",
        f"request {request['request_id']}",
        _instant(request["time"]),
        request["process"],
        f"key {request['key']}" if request["key"] else "",
        f"kept: {request['kept']}",
    ]
    yield Text(_plain(", ".join(fact for fact in facts if fact)), style="dim")
    yield Text()

    rows = list(tree(request["spans"]))
    total_s = max([request["duration_s"], *(row.span["start_s"] + row.span["duration_s"] for row in rows)])
    labels = [_cut("  " * row.depth + _label(row.span), _MOST_NAME) for row in rows]
    times = [duration(row.span["duration_s"]) for row in rows]
    name_width, time_width = max(map(len, labels), default=0), max(map(len, times), default=0)
    bar_width = max(_LEAST_BAR, console.width - name_width - time_width - 4)
    blocks = _ASCII_BLOCKS if console.options.ascii_only else _BLOCKS
    for row, label, took in zip(rows, labels, times, strict=True):
        span, inset = row.span, "  " * (row.depth + 1)
        line = Text(label.ljust(name_width + 2))
        line.append(bar(span["start_s"], span["duration_s"], total_s, bar_width, blocks), style=_colour(span))
        line.append(took.rjust(time_width + 2))
        yield line
        if span["error"]:
            yield Text(f"{inset}{_plain(span['error'])}", style="red")
        if attributes:
            for name, value in sorted(span["attributes"].items()):
                yield Text(f"{inset}{_plain(name)} = {_plain(json.dumps(value, ensure_ascii=False))}", style="dim")


class Row(NamedTuple):
    """A span and how deep below the request it is."""

    span: Mapping[str, Any]
    depth: int


def tree(spans: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Each span once: the first, then below every span its children as they come; orphans are children of the first."""
    if not spans:
        return
    root = spans[0]
    own = {span["span_id"] for span in spans}
    children: dict[str, list[Mapping[str, Any]]] = {}
    for span in spans[1:]:
        parent = span["parent_id"] if span["parent_id"] in own else root["span_id"]
        children.setdefault(parent, []).append(span)
    waiting, seen = [Row(root, 0)], set()
    while waiting:
        row = waiting.pop()
        if id(row.span) in seen:
            continue
        seen.add(id(row.span))
        yield row
        below = children.get(row.span["span_id"], ())
        waiting += [Row(child, row.depth + 1) for child in reversed(below)]
    for span in spans:  # parents of each other: no trace of ours, but nothing is left out
        if id(span) not in seen:
            yield Row(span, 1)


def bar(start_s: float, duration_s: float, total_s: float, width: int, blocks: str = _BLOCKS) -> str:
    """A line of `width` columns for `total_s`, filled where the span lies; a short one is a thin stroke.

    Args:
        blocks: nine characters, from an empty column to a full one.
    """
    full = len(blocks) - 1
    scale = width / total_s if total_s > 0 else 0.0
    first = min(width - 1, max(0, int(start_s * scale)))
    parts = min((width - first) * full, max(1, round(duration_s * scale * full)))
    columns, rest = divmod(parts, full)
    return (" " * first + blocks[full] * columns + (blocks[rest] if rest else "")).ljust(width)


def duration(seconds: float) -> str:
    """A time in the unit that a person would choose."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100.0 else f"{seconds:.0f} s"


def _label(span: Mapping[str, Any]) -> str:
    """What a step is called; of an attempt also at which backend, as fallbacks may ask for the same model."""
    from llm_router.observe.tracing.names import BACKEND

    backend = span["attributes"].get(BACKEND) if span["kind"] == "client" else None
    return _plain(f"{span['name']} at {backend}" if backend else span["name"])


def _colour(span: Mapping[str, Any]) -> str:
    return "red" if span["error"] else {"server": "blue", "client": "cyan"}.get(span["kind"], "green")


def _instant(time: str) -> str:
    """`2026-01-31T12:00:00.000Z` as people write it."""
    return time.replace("T", " ")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _plain(text: Any) -> str:
    """A text that came with a request, safe for a terminal."""
    from llm_router.observe.logs.redact import printable

    return printable(str(text))
