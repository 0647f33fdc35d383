"""The logs of one process: what the request path, `logging` and administration call.

Five files of JSON lines, `application`, `access`, `error`, `audit` and `metrics`.log; what is in them is in schema.py and
docs/reference/logs.md. The lines of a request are made here, five microseconds for both, and written by a thread; errors
and audit events are in their file when the call returns. Nothing here raises or waits because of a disk: what cannot be
written is counted, said once on stderr, and tried again. Not for: reading logs (cli/logs.py), stderr (console.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llm_router.observe.logs.entry import Entries, audit_fields, texts
from llm_router.observe.logs.files import LogFile
from llm_router.observe.logs.handler import OWN_LOGGER, FileHandler
from llm_router.observe.logs.levels import ROOT, level_of
from llm_router.observe.logs.logged import NUMBERS
from llm_router.observe.logs.redact import clean, clean_exception
from llm_router.observe.logs.request_lines import RequestLines, is_severe
from llm_router.observe.logs.schema import FILES, FileName
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.logs.writer import LARGE_BYTES, Writer
from llm_router.observe.timestamp import timestamp
from llm_router.signals import RequestRecord

if TYPE_CHECKING:
    from llm_router.observe.logs.rotate import Rotation

INFERENCE_LOGGER: Final = "llm_router.gateway.inference"
"""Its level decides about the lines of inferences, which do not go through `logging`."""

QUEUE_FULL: Final = "queue-full"
WRITE_FAILED: Final = "write-failed"

_AT_ONCE: Final[frozenset[FileName]] = frozenset({"error", "audit"})

_SAY_EACH_S: Final = 60.0
"""A disk that is full now and then gets a line a minute, not one each time."""

MAX_LARGE_BYTES: Final = 64 * 1024 * 1024
"""Of large lines that wait: bodies where `content` is on, and what hostile callers send."""

_log = logging.getLogger(OWN_LOGGER)


class Statistics(NamedTuple):
    """`queued` lines wait, `dropped` were lost since the start by reason (`queue-full`, `write-failed`), `written` are in
    files; `problem` says why not all files can be written now, empty if they can."""

    queued: int
    dropped: Mapping[str, int]
    written: int
    problem: str


class Logs:
    """Writes the log files of one process. Safe across threads.

    Args:
        folder: where the files lie; `start` makes it.
        process: like `worker-0`.
        clock: monotonic seconds, as in records; wall: Unix seconds.
        severities: kinds of errors (`RequestRecord.error_type`) to warning, error or critical: the level of a failed
            inference. An unknown kind is an error.
        rotates: whether this process keeps the folder in order (`sweep`); one of all may.
        console: a further handler for `install`; None where stderr has one.
        max_large_bytes: what large lines that wait may hold; further lines are dropped and counted.
        logger: name of the `logging` logger that `install` listens to, with all below it.
    """

    def __init__(
        self,
        settings: LogSettings,
        folder: str,
        *,
        process: str,
        service: Service,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        severities: Mapping[str, str] | None = None,
        rotates: bool = False,
        console: logging.Handler | None = None,
        logger: str = ROOT,
        max_large_bytes: int = MAX_LARGE_BYTES,
    ) -> None:
        self._max_large_bytes = max_large_bytes
        self.folder = folder
        self._process = process
        self._service = service
        self._clock = clock
        self._wall = wall
        self._random = (rng or random.Random()).random
        self._severities = severities or {}
        self._console = console
        self._logger = logging.getLogger(logger)
        self._dropped = {QUEUE_FULL: 0, WRITE_FAILED: 0}
        self._drop_lock = threading.Lock()
        self._is_said = False
        self._said_at = -math.inf
        self._installed: dict[str, int] = {}
        self._is_closed = False
        self._files = {name: self._file(name) for name in FILES}
        self._writer = Writer(self._files)
        self._access_queue = self._writer.queues["access"]
        self._application_queue = self._writer.queues["application"]
        self._rotation: Rotation | None = None
        if rotates:
            from llm_router.observe.logs.rotate import Rotation  # which one process of all needs

            self._rotation = Rotation(folder, settings, wall=wall, on_problem=self._unrotated)
        self._take(settings)
        self.handler: logging.Handler = FileHandler(self, lambda: self._entries.max_field_chars)
        """Takes what is said through `logging`; `install` adds it."""

    def __repr__(self) -> str:
        return f"Logs({self.folder!r}, {self._process}, {self.statistics()})"

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write. Raises nothing: a folder that cannot be written is said on stderr and tried again."""
        for file in self._files.values():
            file.probe()
        self._writer.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, at most for `timeout_s`, and end the threads. What comes later is dropped and counted."""
        self.uninstall()
        self._is_closed = True
        self._bound = 0
        ends_at = time.monotonic() + timeout_s
        is_written = self._writer.close(timeout_s)
        if self._rotation is not None:
            self._rotation.close(max(0.0, ends_at - time.monotonic()))
        if is_written:
            for file in self._files.values():
                file.retry(now=True)
                file.close()
            left = sum(file.kept for file in self._files.values())
        else:
            left = self._writer.waiting
        if left:
            self._lost(WRITE_FAILED, left)

    def apply(self, settings: LogSettings) -> None:
        """Heed other settings from now on; everything but the folder."""
        self._take(settings)
        if self._rotation is not None:
            self._rotation.settings = settings
        if self._installed:
            self._set_levels()

    def install(self) -> None:
        """Listen to our loggers, and set their levels."""
        if self.handler not in self._logger.handlers:
            self._logger.addHandler(self.handler)
            if self._console is not None:
                self._logger.addHandler(self._console)
        self._set_levels()

    def uninstall(self) -> None:
        """Undo `install`."""
        self._logger.removeHandler(self.handler)
        if self._console is not None:
            self._logger.removeHandler(self._console)
        for name, level in self._installed.items():
            logging.getLogger(name).setLevel(level)
        self._installed.clear()

    # -- requests --------------------------------------------------------------------------------------

    def finished(self, record: RequestRecord, now: float) -> None:
        """A request ended at monotonic `now`. Once per request.

        A failed inference is in error.log when this returns. Successful requests are sampled as the settings say,
        with slow ones always written; what one request is not worth in access.log, it is not worth in
        application.log either.
        """
        rate = self._ratio
        if record.error_type or record.status >= 400:
            rate = 1.0
            if record.is_inference and record.error_type and is_severe(self._severities, record.error_type):
                self._failed(record, now)
        elif rate < 1.0:
            if now - record.started_at >= self._slow_s:
                rate = 1.0
            elif self._random() >= rate:
                return
        lines = self._lines.number(record)
        if not lines:
            return
        writer = self._writer
        if (
            len(self._access_queue) + len(self._application_queue) >= self._bound
            or writer.large_bytes > self._max_large_bytes
        ):
            self._lost(QUEUE_FULL, lines)
            return
        try:
            large = self._lines.add(record, now, self._wall() - self._clock(), rate, writer.queues)
        except Exception as error:  # a record that nobody foresaw must not end a request
            self._fault(error)
            return
        if large:
            with writer.lock:
                writer.large_bytes += large
        if writer.is_idle:
            writer.wake()

    def _failed(self, record: RequestRecord, now: float) -> None:
        level = self._severities.get(record.error_type, "error")
        if NUMBERS[level] >= self._level:
            try:
                line = self._lines.failed(record, now, self._wall() - self._clock(), level)
            except Exception as error:  # whatever the record holds: the request must not suffer
                self._fault(error)
            else:
                self._put("application", line, is_error=True)

    # -- everything else -------------------------------------------------------------------------------

    def say(
        self,
        unix_s: float,
        level: str,
        message: str,
        fields: Mapping[str, Any],
        record: RequestRecord | None = None,
    ) -> None:
        """One line of application.log, from error up also of error.log, whatever the levels. `fields` are clean."""
        self._put(
            "application",
            self._entries.line(unix_s, level, message, fields, record),
            is_error=NUMBERS[level] >= logging.ERROR,
        )

    def log(
        self, level: str, message: str, error: BaseException | None = None, /, logger: str = ROOT, **data: Any
    ) -> None:
        """Like `say`, subject to the levels, of things as they come: an exception, and whatever else, as texts."""
        if NUMBERS[level] < logging.getLogger(logger).getEffectiveLevel():
            return
        limit = self._entries.max_field_chars
        fields: dict[str, Any] = {"log.logger": clean(logger, limit)}
        if error is not None:
            fields["error"] = clean_exception(error, limit)
        if data:
            fields["data"] = texts(data, limit)
        self.say(self._wall(), level, message, fields)

    def audit(self, event: str, /, **data: Any) -> None:
        """Something that somebody did; it is in audit.log when this returns, in one write.

        Args:
            data: `actor`, `actor_id`, `client`, `success`, `key_id`, `key_name`, `model_id`, `model_name`, `format`,
                `load_duration` have fields of their own; all others are texts under `data`. None is left out.
        """
        now = self._wall()
        fields = audit_fields(event, now, data, self._entries.max_field_chars)
        self._files["audit"].write([self._entries.line(now, "info", f"Audit: {event}", fields)])

    def metric(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """The value of a metric, for metrics.log. What is no number is left out."""
        if math.isfinite(value):
            now = self._wall()
            limit = self._entries.max_field_chars
            described = {"name": clean(name, limit), "value": value, "labels": texts(labels, limit)}
            line = self._entries.line(
                now, "info", f"Metric: {name}", {"metric": {**described, "timestamp": timestamp(now)}}
            )
            self._append("metrics", line)

    def model_loaded(
        self, id: str, *, name: str = "", format: str = "", size_bytes: int | None = None, load_s: float | None = None
    ) -> None:
        """A model serves: in application.log and audit.log."""
        model: dict[str, Any] = {"id": id, "name": name or id, "format": format}
        if size_bytes is not None:
            model["size"] = size_bytes
        milliseconds = None if load_s is None else round(load_s * 1e3, 3)
        if milliseconds is not None:
            model["load_duration"] = milliseconds
        self._model("Model loaded", model)
        self.audit("model_load", model_id=id, model_name=name or id, format=format, load_duration=milliseconds)

    def model_unloaded(self, id: str, *, name: str = "", format: str = "") -> None:
        """A model no longer serves: in application.log and audit.log."""
        self._model("Model unloaded", {"id": id, "name": name or id, "format": format})
        self.audit("model_unload", model_id=id, model_name=name or id, format=format)

    def _model(self, message: str, model: dict[str, Any]) -> None:
        if self._logger.getEffectiveLevel() <= logging.INFO or not self._installed:
            limit = self._entries.max_field_chars
            plain = {name: clean(value, limit) if isinstance(value, str) else value for name, value in model.items()}
            self.say(self._wall(), "info", message, {"model": plain})

    def sweep(self) -> None:
        """Rotate, compress and delete what is due. Blocks: call it in a thread, now and then (each 10 s)."""
        if self._rotation is not None:
            self._rotation.sweep()

    # -- about itself ----------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """What waits, what was lost, what was written, and what is wrong."""
        files = self._files.values()
        problems = [f"{os.path.basename(file.path)}: {file.problem}" for file in files if file.problem]
        if self._rotation is not None and self._rotation.problem:
            problems.append(f"rotation: {self._rotation.problem}")
        return Statistics(
            self._writer.waiting + sum(file.kept for file in files),
            dict(self._dropped),
            sum(file.written for file in files),
            "; ".join(problems),
        )

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the threads of the logs have used."""
        return self._writer.cpu_s + (self._rotation.cpu_s if self._rotation is not None else 0.0)

    # -- inside ----------------------------------------------------------------------------------------

    def _take(self, settings: LogSettings) -> None:
        entries = Entries(
            self._service,
            self._process,
            max_line_bytes=settings.max_line_bytes,
            max_field_chars=settings.max_field_bytes,
        )
        level = NUMBERS[level_of(settings, INFERENCE_LOGGER)]
        self._settings = settings
        self._entries = entries
        self._lines = RequestLines(
            entries, access=settings.access, level=level, content=settings.content, severities=self._severities
        )
        self._ratio = settings.sample_ratio
        self._slow_s = settings.slow_s
        self._access = settings.access
        self._bound = 0 if self._is_closed else settings.queue_lines
        self._level = level

    def _set_levels(self) -> None:
        wanted = {self._logger.name: self._settings.level, **self._settings.levels}
        for name in [name for name in self._installed if name not in wanted]:
            logging.getLogger(name).setLevel(self._installed.pop(name))
        for name, level in wanted.items():
            logger = logging.getLogger(name)
            self._installed.setdefault(name, logger.level)
            logger.setLevel(NUMBERS[level])

    def _file(self, name: FileName) -> LogFile:
        return LogFile(
            os.path.join(self.folder, f"{name}.log"),
            clock=self._clock,
            on_lost=lambda lines: self._lost(WRITE_FAILED, lines),
            on_change=self._changed,
            keeps=name in _AT_ONCE,
        )

    def _put(self, name: FileName, line: bytes, *, is_error: bool) -> None:
        if is_error:
            self._files["error"].write([line])
        self._append(name, line)

    def _append(self, name: FileName, line: bytes) -> None:
        writer = self._writer
        if writer.waiting >= self._bound or writer.large_bytes > self._max_large_bytes:
            self._lost(QUEUE_FULL, 1)
            return
        if len(line) > LARGE_BYTES:
            with writer.lock:
                writer.large_bytes += len(line)
        writer.queues[name].append(line)
        if writer.is_idle:
            writer.wake()

    def _lost(self, reason: str, lines: int) -> None:
        with self._drop_lock:
            self._dropped[reason] += lines

    def _changed(self, problem: str) -> None:
        """A file can no longer be written, or can again (no problem): say it once per outage, whatever files it hits."""
        with self._drop_lock:
            failing = sum(bool(file.problem) for file in self._files.values())
            now = self._clock()
            if problem and failing == 1 and not self._is_said and now - self._said_at >= _SAY_EACH_S:
                self._is_said, self._said_at, dropped = True, now, 0
            elif not problem and not failing and self._is_said:
                self._is_said, dropped = False, sum(self._dropped.values())
            else:
                return
        if problem:
            self._stderr(
                logging.ERROR,
                f"log files in {self.folder} cannot be written: {problem}; "
                f"lines are dropped and counted until they can, requests go on",
            )
        else:
            self._stderr(logging.WARNING, f"log files in {self.folder} are written again; {dropped} lines were lost")

    def _unrotated(self, problem: str) -> None:
        self._stderr(logging.ERROR, f"log files are not rotated as they should be: {problem}")

    def _fault(self, error: Exception) -> None:
        self._stderr(logging.ERROR, f"a log line could not be made: {type(error).__name__}: {clean(str(error), 256)}")

    def _stderr(self, level: int, text: str) -> None:
        """Through `logging`, which knows what stderr looks like; if nobody there shows it, straight."""
        if _is_shown():
            _log.log(level, "%s", text)
        else:
            with contextlib.suppress(OSError):
                os.write(
                    2, f"{timestamp(self._wall())} {self._process}: {logging.getLevelName(level)} {text}\n".encode()
                )


def _is_shown() -> bool:
    """Whether a handler other than ours takes what the logs say about themselves."""
    logger: logging.Logger | None = _log
    while logger is not None:
        if any(not isinstance(handler, FileHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
