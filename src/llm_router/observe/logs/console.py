"""Log lines on stderr, as every process of the router writes them: text in colours for people, JSON for programs.

`Console` is a handler of `logging`; `AppendedFile` adds the same lines as JSON to a file, opened for each of them: for
the supervisor, whose lines are rare and which must not hold anything. Neither ever waits for whoever reads, and neither
raises. Not for: access lines, rotation or anything that comes by the thousand (that is `Logs`).
Standard library only: the supervisor imports it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
from collections.abc import Mapping
from typing import Any, Final, Literal

from llm_router.observe.logs.logged import extra_of, level_name, message_of
from llm_router.observe.logs.redact import clean, clean_exception, clean_id, clean_value
from llm_router.observe.logs.service import Service
from llm_router.observe.timestamp import timestamp
from llm_router.signals import CURRENT

Form = Literal["auto", "text", "json", "off"]

LEVEL_COLOURS: Final[Mapping[str, str]] = {
    "debug": "2",
    "info": "32",
    "warning": "33",
    "error": "31",
    "critical": "1;31",
}
"""Level to the parameters of the terminal's colour sequence."""

DIM: Final = "2"
_CYAN: Final = "36"


def entry_of(record: logging.LogRecord, process: str, service: Service) -> dict[str, Any]:
    """A record of `logging` as a line of application.log, with the request that the running task serves.

    Secrets and control characters of what it tells are taken out; it is bounded.
    """
    entry: dict[str, Any] = {
        "@timestamp": timestamp(record.created),
        "log.level": level_name(record.levelno),
        "message": clean(message_of(record)),
        "service": service.name,
        "version": service.version,
        "env": service.environment,
        "hostname": service.hostname,
        "pid": service.pid,
        "process": process,
        "log.logger": record.name,
    }
    served = CURRENT.get()
    if served is not None:
        if served.trace_id:
            entry["trace.id"], entry["span.id"] = served.trace_id, served.span_id
        entry["request_id"] = clean_id(served.request_id)
    if record.exc_info and record.exc_info[1] is not None:
        entry["error"] = clean_exception(record.exc_info[1])
    if extra := extra_of(record):
        entry["data"] = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in clean_value(extra).items()
        }
    return entry


def as_json(entry: Mapping[str, Any]) -> str:
    """One line, ASCII: no reader can take anything in it for the end of the line."""
    return json.dumps(entry, separators=(",", ":"), default=str)


def paint(text: str, colour: str, *, is_coloured: bool) -> str:
    """`text` in a colour of the terminal, or as it is."""
    return f"\x1b[{colour}m{text}\x1b[0m" if is_coloured and text else text


def wants_colour(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether what is written there is seen on a terminal by somebody who did not refuse colours (no-color.org)."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb" and _is_terminal(fd)


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def as_text(entry: Mapping[str, Any], *, is_coloured: bool = False) -> str:
    """`2026-01-31T12:00:00.000Z worker-0: WARNING llm_router.cache: ...`; a traceback follows in lines of its own.

    A logger that only repeats the process is left out.
    """
    process, logger, level = str(entry["process"]), str(entry["log.logger"]), str(entry["log.level"])
    level_shown = paint(level.upper(), LEVEL_COLOURS.get(level, ""), is_coloured=is_coloured and level in LEVEL_COLOURS)
    is_own = logger == f"llm_router.{process.partition(' ')[0].rstrip('-0123456789')}"
    text = (
        f"{paint(str(entry['@timestamp']), DIM, is_coloured=is_coloured)} "
        f"{paint(f'{process}:', _CYAN, is_coloured=is_coloured)} "
        f"{level_shown} {'' if is_own else f'{logger}: '}{entry['message']}"
    )
    text += "".join(f" {name}={value}" for name, value in entry.get("data", {}).items())
    if "request_id" in entry:
        text += " " + paint(f"[request {entry['request_id']}]", DIM, is_coloured=is_coloured)
    return text + (f"\n{entry['error']['stack'].rstrip()}" if "error" in entry else "")


class Console(logging.Handler):
    """Writes to stderr. A line that nobody takes at once is lost, and counted in `dropped`.

    Args:
        process: its name, like `worker-0`.
        form: `auto` is text on a terminal and JSON otherwise; `text` has colours on a terminal only.
    """

    def __init__(
        self,
        process: str,
        service: Service,
        *,
        form: Form = "auto",
        fd: int = 2,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        super().__init__()
        self.dropped = 0
        self._process = process
        self._service = service
        self._fd = fd
        self._is_terminal = _is_terminal(fd)
        self._is_coloured = wants_colour(fd, environ)
        self._is_torn = False
        self.form: Form = form

    def emit(self, record: logging.LogRecord) -> None:
        if self.form == "off":
            return
        entry = entry_of(record, self._process, self._service)
        if self.form == "text" or (self.form == "auto" and self._is_terminal):
            line = as_text(entry, is_coloured=self._is_coloured)
        else:
            line = as_json(entry)
        taken = write_now(self._fd, ("\n" if self._is_torn else "") + line + "\n")
        if taken != "nothing":
            self._is_torn = taken == "part"
        if taken != "all":
            self.dropped += 1

    def __repr__(self) -> str:
        return f"Console({self._process}, {self.form}, {self.dropped} dropped)"


class AppendedFile(logging.Handler):
    """Adds each line to application.log in `folder`, from level error up to error.log too. The file is opened for each
    line: rotation needs no notice.

    A line that cannot be written is lost: whoever has the other handlers has the line.
    """

    def __init__(self, folder: str, process: str, service: Service) -> None:
        super().__init__()
        self._folder = folder
        self._process = process
        self._service = service
        self._torn: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = as_json(entry_of(record, self._process, self._service))
        if record.levelno >= logging.ERROR:
            self._append("error.log", line)
        self._append("application.log", line)

    def _append(self, name: str, line: str) -> None:
        data = (("\n" if name in self._torn else "") + line + "\n").encode()
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, mode=0o750, exist_ok=True)
            # Without O_NONBLOCK a pipe in its place would make us wait for whoever reads it.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(os.path.join(self._folder, name), flags, 0o640)
            try:
                is_torn = os.write(fd, data) < len(data)  # the disk is full
            finally:
                os.close(fd)
            (self._torn.add if is_torn else self._torn.discard)(name)


def write_now(fd: int, text: str) -> Literal["all", "part", "nothing"]:
    """Write without ever waiting for whoever reads. Returns how much of it was taken."""
    view = memoryview(text.encode("utf-8", "backslashreplace"))
    size = len(view)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        # A pipe that polls as writable takes PIPE_BUF bytes at once.
        while view and any(events & select.POLLOUT for _, events in poll.poll(0)):
            view = view[os.write(fd, view[: select.PIPE_BUF]) :]
    return "all" if not view else "part" if len(view) < size else "nothing"
