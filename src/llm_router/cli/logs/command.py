"""`llm-router logs`: options, and what they lead to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from llm_router.cli.options import ConfigFile, DataDir
from llm_router.errors import RouterError

if TYPE_CHECKING:
    from llm_router.cli.logs.files import Choose, Follower, Line, LogFolder
    from llm_router.cli.logs.where import Where
    from llm_router.observe.logs.schema import FileName

EPILOG = """Examples:

- `llm-router logs --follow`
- `llm-router logs --where 'status >= 500 and model == small'`
- `llm-router logs --since 1h --where 'duration > 2s or level >= warning'`
- `llm-router logs --request 0f64a3c97a8b12de-17`
- `llm-router logs --file audit --lines 0 --json`

A comparison is a field, one of `== != < <= > >= =~ !~`, and a value; `and`, `or`, `not` and parentheses join them.
Short names: status, method, path, duration, model, backend, key, level, logger, error, event, tokens, cost, ip. Any other
field by its path, like `request.headers.userAgent`."""

DEFAULT_LINES: Final = 100
_POLL_S: Final = 0.2


class NoLogs(RouterError):
    """There are no log files, or none that can be read."""

    code = "no_logs"


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            metavar="NAME",
            help="application, access, error, audit, metrics or all; repeat it for more.  [default: all but metrics]",
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", "-w", metavar="EXPR", help="Lines of which this is true, see below.")
    ] = None,
    request: Annotated[
        str | None, typer.Option("--request", metavar="ID", help="Lines of the request with this id.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="ID", help="Lines of the trace with this id, or its beginning.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="WHEN", help="Not older than 15m, 2h or 7d, or 2026-01-31 or 2026-01-31T12:00Z."
        ),
    ] = None,
    lines: Annotated[
        int | None,
        typer.Option(
            "--lines", "-n", metavar="N", min=0, help="The newest N; 0 for all.  [default: 100, with --since all]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print lines as they stand in the files.")] = False,
    log_dir: Annotated[
        str | None, typer.Option("--log-dir", metavar="FOLDER", help="Where they are.  [env: LOG_DIR]")
    ] = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Read the log files, rotated ones too, together and in order of time."""
    import os

    from llm_router.cli.logs.files import LogFolder
    from llm_router.cli.logs.lines import Renderer
    from llm_router.cli.options import settings_of
    from llm_router.observe.logs.console import wants_colour

    wanted = _where(where)
    since_s = _since(since, time.time())
    # Whoever says where they are needs no configuration, which may be that of another machine.
    folder = Path(log_dir or settings_of(config, data_dir=data_dir, files_needed=False).server.log_dir)
    log = LogFolder(folder, _names(file or ()))
    if log.is_empty() and not follow:
        raise NoLogs(f"there are no log files in {folder}; --log-dir or LOG_DIR says where they are")
    count = lines if lines is not None else 0 if since is not None else DEFAULT_LINES
    renderer = Renderer(is_coloured=wants_colour(1, os.environ))
    choose = chooser(wanted, request=request, trace=trace)
    show = _as_json if as_json else renderer.show
    follower = log.follow() if follow else None
    try:
        shown = _print(_read(log, choose, count, since_s, follower), show)
        _complain(log, 0)
        if follower is not None:
            _go_on(log, follower, choose, show)
    except KeyboardInterrupt:
        return  # that is how following ends
    finally:
        if follower is not None:
            follower.close()
    if not shown and wanted is not None:
        for field in wanted.unseen():
            print(f"llm-router: no line that was read has a field {field}", file=sys.stderr)
    if not shown and log.problems:
        raise NoLogs("nothing could be shown")


def chooser(where: Where | None, *, request: str | None = None, trace: str | None = None) -> Choose:
    """What picks lines: all conditions must hold. Broken lines are shown only to whoever sets none."""
    from llm_router.cli.logs.files import decoded

    is_open = where is None and request is None and trace is None
    # Most lines are told apart without being decoded: an id that a line has stands in it as it is.
    needles = [text.encode() for text in (request, trace and trace.lower()) if text and text.isascii()]

    def choose(line: Line) -> Line | None:
        if not all(needle in line.raw for needle in needles):
            return None
        entry = decoded(line.raw)
        if entry is None:
            return line if is_open else None
        if request is not None and entry.get("request_id") != request:
            return None
        if trace is not None and not str(entry.get("trace.id", "")).startswith(trace.lower()):
            return None
        return line._replace(entry=entry) if where is None or where.matches(entry) else None

    return choose


def _read(log: LogFolder, choose: Choose, count: int, since_s: float, follower: Follower | None) -> Iterable[Line]:
    if count:
        return log.newest(count, choose, since_s, before=follower)
    return log.all(choose, since_s, before=follower)


def _print(lines: Iterable[Line], show: Callable[[Line], str]) -> bool:
    """Print them; whether there were any."""
    has_any = False
    for line in lines:
        print(show(line))
        has_any = True
    return has_any


def _go_on(log: LogFolder, follower: Follower, choose: Choose, show: Callable[[Line], str]) -> None:
    """Until somebody ends it."""
    said = len(log.problems)
    while True:
        sys.stdout.flush()
        time.sleep(_POLL_S)
        _print(follower.poll(choose), show)
        said = _complain(log, said)


def _complain(log: LogFolder, said: int) -> int:
    for problem in log.problems[said:]:
        print(f"llm-router: {problem}", file=sys.stderr)
    return len(log.problems)


def _as_json(line: Line) -> str:
    """The line as it is; what could steer a terminal is escaped, as JSON does it."""
    import json

    text = line.raw.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    # In JSON only texts can hold such characters, and there they may be written so.
    return "".join(
        character if character.isprintable() or character == "\t" else json.dumps(character)[1:-1] for character in text
    )


def _names(files: Collection[str]) -> list[FileName]:
    from llm_router.cli.logs.files import NAMES

    for name in files:
        if name not in {*NAMES, "all"}:
            raise typer.BadParameter(f"{name!r} is no log file; there are {', '.join(NAMES)}, all", param_hint="--file")
    if not files:
        return [name for name in NAMES if name != "metrics"]
    return [name for name in NAMES if "all" in files or name in files]


def _where(text: str | None) -> Where | None:
    from llm_router.cli.logs.where import BadWhere, Where

    if text is None:
        return None
    try:
        return Where(text)
    except BadWhere as error:
        raise typer.BadParameter(str(error), param_hint="--where") from None


def _since(text: str | None, now: float) -> float:
    """Unix seconds, 0 for none."""
    from llm_router.config.units import seconds

    if text is None:
        return 0.0
    try:
        return max(0.001, now - seconds(text))
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
        # A time without a zone is in the zone of the files.
        return max(0.001, at.replace(tzinfo=at.tzinfo or UTC).timestamp())
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is neither a time back, like 15m or 2h, nor a date or time, like 2026-01-31T12:00Z",
            param_hint="--since",
        ) from None
