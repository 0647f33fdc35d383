"""`StructuredLogger`: the five log files of the router, for a program that is not our gateway.

A thin face over `observe.logs.Logs`: bounded queue and writer thread, secrets taken out, rotation, one type per field.
Messages of `llm_router` itself land in the same files. Not for: several processes that write the same folder, of which
one alone may rotate: give the others `rotates=False`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sized
from typing import Any, Final

import msgspec

from llm_router import __version__, families
from llm_router.errors import ConfigError
from llm_router.library.asgi import App, RouteOf, Teller, Watched, record_of
from llm_router.observe.logs.console import Console
from llm_router.observe.logs.entry import texts
from llm_router.observe.logs.levels import LEVELS, level_named
from llm_router.observe.logs.logged import NUMBERS
from llm_router.observe.logs.logs import Logs, Statistics
from llm_router.observe.logs.redact import clean, clean_exception
from llm_router.observe.logs.request_lines import is_severe
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import ConsoleFormat, Level, LogSettings
from llm_router.signals import CURRENT, OTHER, RequestRecord

_ROTATE_S: Final = 10.0
_FLUSH_S: Final = 5.0
_INFERENCE: Final[Mapping[str, type | tuple[type, ...]]] = {
    "id": str,
    "model": str,
    "strategy": str,
    "prompt_length": int,
    "tokens": int,
    "latency": (int, float),
    "cached": bool,
    "success": bool,
}
_MODEL: Final[Mapping[str, type | tuple[type, ...]]] = {
    "id": str,
    "name": str,
    "format": str,
    "size": int,
    "load_duration": (int, float),
}


class StructuredLogger:
    """Writes application, access, error, audit and metrics.log. Safe across threads; starts by itself.

    Nothing here raises because of a disk: what cannot be written is counted (`statistics`), said once on stderr and
    tried again. Lines of error.log and audit.log are in their file when a call returns.

    Args:
        log_level: the lowest level that is written; by default LOG_LEVEL, else info. `warn` and `fatal` are understood.
        log_dir: the folder; by default LOG_DIR, else `./logs`.
        service_name, version: of the program, in every line. environment: by default ENVIRONMENT, else production.
        console: whether and how stderr gets the messages too: auto (colours on a terminal, JSON otherwise), text, json, off.
        settings: all there is to say about logs; `log_level` and `console` override it.
        rotates: whether this process rotates, compresses and deletes the files.
        env: where defaults are read.

    Raises: ConfigError for a level that there is not.

    Attributes:
        is_told_by_router: whether a router inside the application tells `finished`; its requests are then left to it.
    """

    def __init__(
        self,
        *,
        log_level: str | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        service_name: str = "llm-router",
        version: str = __version__,
        environment: str | None = None,
        console: ConsoleFormat | None = None,
        settings: LogSettings | None = None,
        process: str = "application",
        rotates: bool = True,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        settings = settings or LogSettings()
        if (level := log_level or env.get("LOG_LEVEL")) is not None:
            settings = msgspec.structs.replace(settings, level=_level(level))
        if console is not None:
            settings = msgspec.structs.replace(settings, console=console)
        folder = os.fspath(log_dir or env.get("LOG_DIR") or "logs")
        service = Service.here(version, environment or env.get("ENVIRONMENT") or "production", service_name)
        self._name = service_name
        self._wall = wall
        self._clock = clock
        self._settings = settings
        self._is_closed = False
        self._sweeper: threading.Thread | None = None
        self._ends = threading.Event()
        self._console = Console(process, service, form=settings.console)
        self.is_told_by_router = False
        self.logs = Logs(
            settings,
            os.path.abspath(folder),
            process=process,
            service=service,
            clock=clock,
            wall=wall,
            severities=families.ERROR_SEVERITIES,
            rotates=rotates,
            # Without one it says on stderr by itself what no file can take.
            console=None if settings.console == "off" else self._console,
        )
        self.logs.install()
        self.logs.start()
        if rotates:
            self._sweeper = threading.Thread(target=self._look_after, name="log rotation", daemon=True)
            self._sweeper.start()

    def __repr__(self) -> str:
        return f"StructuredLogger({self.folder!r}, {self._settings.level})"

    @property
    def folder(self) -> str:
        """Where the files are."""
        return self.logs.folder

    def statistics(self) -> Statistics:
        """What waits, was lost and was written, and what is wrong."""
        return self.logs.statistics()

    # -- messages --------------------------------------------------------------------------------------

    def debug(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """A line of application.log, for who looks for a fault."""
        self._say("debug", message, meta)

    def info(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """A line of application.log.

        Args:
            meta: `request_id`, `inference` and `model` (mappings, as in docs/reference/logs.md) have fields of their
                own; all else becomes texts under `data`. Secrets are taken out, by name and by what they look like.
        """
        self._say("info", message, meta)

    def warn(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """A line of application.log: something is not as it should be."""
        self._say("warning", message, meta)

    warning = warn

    def error(self, message: str, error: BaseException | None = None, meta: Mapping[str, Any] | None = None) -> None:
        """A line of application.log and of error.log, where it is when this returns, with the exception if there is one."""
        self._say("error", message, meta, error)

    def audit(self, event: str, data: Mapping[str, Any] | None = None) -> None:
        """Something that somebody did; it is in audit.log when this returns."""
        self.logs.audit(event, **{str(name): value for name, value in (data or {}).items()})

    def metrics(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """The value of a metric, in metrics.log."""
        self.logs.metric(name, float(value), {key: str(text) for key, text in (labels or {}).items()})

    # -- inferences and models -----------------------------------------------------------------------------

    def inference_start(self, context: object) -> None:
        """An inference begins. `context` has id, model, strategy and perhaps prompt and options, as keys or attributes.

        The prompt is never written, only its length.
        """
        prompt = _of(context, "prompt")
        inference = {
            **_pick(context, "id", "model", "strategy"),
            "prompt_length": len(prompt) if isinstance(prompt, Sized) else 0,
        }
        options = _of(context, "options")
        self.info("Inference started", {"inference": inference, **({} if options is None else {"options": options})})
        self._audit_inference("inference_start", context, **_pick(context, "model", "strategy"))

    def inference_complete(self, context: object, result: object) -> None:
        """An inference succeeded. `result` has model, tokens, latency (milliseconds) and cached."""
        found = _pick(result, "model", "tokens", "latency", "cached")
        self.info("Inference completed", {"inference": {**_pick(context, "id", "strategy"), **found, "success": True}})
        self._audit_inference("inference_complete", context, **{**found, "success": True})
        labels = {"model": str(_of(result, "model") or OTHER)}
        if (latency := _of(result, "latency")) is not None:
            self.metrics("inference_latency", latency, {**labels, "strategy": str(_of(context, "strategy") or OTHER)})
        if (tokens := _of(result, "tokens")) is not None:
            self.metrics("tokens_generated", tokens, labels)

    def inference_error(self, context: object, error: BaseException) -> None:
        """An inference failed."""
        inference = {**_pick(context, "id", "model", "strategy"), "success": False}
        self.error("Inference failed", error, {"inference": inference})
        self._audit_inference("inference_error", context, **_pick(context, "model"), error=str(error), success=False)

    def model_load(self, model: object, duration: float) -> None:
        """A model was loaded in `duration` milliseconds. It has id, name, format and perhaps size (bytes)."""
        name, format = str(_of(model, "name") or _of(model, "id")), str(_of(model, "format") or "")
        size = _of(model, "size")
        self.logs.model_loaded(
            str(_of(model, "id") or name),
            name=name,
            format=format,
            size_bytes=size if isinstance(size, int) else None,
            load_s=duration / 1000,
        )
        self.metrics("model_load_duration", duration, {"model": name, "format": format})

    def model_unload(self, model: object) -> None:
        """A model was unloaded."""
        name = str(_of(model, "name") or _of(model, "id"))
        self.logs.model_unloaded(str(_of(model, "id") or name), name=name, format=str(_of(model, "format") or ""))

    # -- requests ------------------------------------------------------------------------------------------

    def access(self, request: object, response: object, meta: Mapping[str, Any] | None = None) -> None:
        """A line of access.log for a request that has ended; `middleware` writes them by itself.

        Args:
            request: a Starlette or FastAPI request, or an ASGI scope.
            response: a response with `status_code` and `headers`, or a status.
            meta: `duration` in milliseconds, `request_id`, `route`.

        Raises: ValueError for what is neither.
        """
        scope: Any = getattr(request, "scope", request)
        if not isinstance(scope, dict) or scope.get("type") != "http":
            raise ValueError(f"no request, but {type(request).__name__}: give a Starlette request or an ASGI scope")
        status = getattr(response, "status_code", response)
        if not isinstance(status, int):
            raise ValueError(f"no response, but {type(response).__name__}: give one with a status_code, or the status")
        meta = meta or {}
        now = self._clock()
        headers = dict(scope.get("headers", ()))
        duration_ms = float(meta.get("duration") or 0.0)
        given = str(meta.get("request_id") or headers.get(b"x-request-id", b"").decode("latin-1"))
        record = record_of(scope, headers, str(meta.get("route") or OTHER), given, now - duration_ms / 1000)
        record.status = status
        told: Mapping[str, str] = getattr(response, "headers", {})
        record.response_type = told.get("content-type", "").encode("latin-1", "replace")
        length = told.get("content-length", "")
        record.response_bytes = int(length) if length.isascii() and length.isdecimal() and len(length) < 16 else 0
        record.outcome = "success" if record.status < 400 else "error"
        self.logs.finished(record, now)

    def middleware(self, app: App, *, route_of: RouteOf | None = None) -> App:
        """`app` with a line in access.log for each request at its end; `app.add_middleware(logger.middleware)` works.

        What is logged while a request is served has its `request_id`, and its trace if the caller began one.
        """
        return Watched(app, _Access(self), route_of=route_of, clock=self._clock)

    def finished(self, record: RequestRecord, now: float) -> None:
        """A request of a router ended: its access line if it came by HTTP, and the line of its inference."""
        if record.path:
            self.logs.finished(record, now)
            return
        level = "error" if is_severe(families.ERROR_SEVERITIES, record.error_type) else "warning"
        inference: dict[str, Any] = {
            "id": record.request_id,
            "model": record.model,
            "strategy": record.strategy,
            "tokens": record.output_tokens,
            "input_tokens": record.input_tokens,
            "latency": round((now - record.started_at) * 1000, 3),
            "attempts": len(record.attempts),
            "cached": record.cached,
            "success": record.outcome == "success",
        }
        if record.attempts:
            inference["backend"] = record.attempts[-1].backend
        fields: dict[str, Any] = {"inference": inference, "log.logger": self._name}
        if not record.error_type:
            level = "info" if record.outcome == "success" else "warning"
        else:
            fields["error"] = {"name": record.error_type, "message": clean(record.error or record.error_type)}
        if self._is_wanted(level):
            message = "Inference completed" if record.outcome == "success" else "Inference failed"
            self.logs.say(self._wall(), level, message, fields, record)

    # -- life ----------------------------------------------------------------------------------------------

    def set_level(self, level: str) -> None:
        """Heed another lowest level from now on. Raises: ConfigError for one that there is not."""
        self._settings = msgspec.structs.replace(self._settings, level=_level(level))
        self.logs.apply(self._settings)

    async def flush(self, timeout_s: float = _FLUSH_S) -> bool:
        """Wait until what was said is in the files. False if that took longer than `timeout_s`."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        # One batch may be on its way between the queue and the file: two looks apart see it arrive.
        settled = 0
        written = -1
        while settled < 2:
            now = self.logs.statistics()
            settled = settled + 1 if not now.queued and now.written == written else 0
            written = now.written
            if loop.time() >= ends_at:
                return False
            await asyncio.sleep(0.02)
        return True

    def close(self, timeout_s: float = _FLUSH_S) -> None:
        """Write what waits, at most for `timeout_s`, and end the threads. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._ends.set()
        if self._sweeper is not None:
            self._sweeper.join(timeout_s)
        self.logs.close(timeout_s)

    def _look_after(self) -> None:
        while not self._ends.wait(_ROTATE_S):
            self.logs.sweep()

    def _is_wanted(self, level: str) -> bool:
        return NUMBERS[level] >= NUMBERS[self._settings.level]

    def _say(
        self, level: str, message: str, meta: Mapping[str, Any] | None, error: BaseException | None = None
    ) -> None:
        if not self._is_wanted(level):
            return
        limit = self._settings.max_field_bytes
        rest = dict(meta or {})
        fields: dict[str, Any] = {"log.logger": clean(self._name, 256)}
        for name, known in (("inference", _INFERENCE), ("model", _MODEL)):
            if isinstance(rest.get(name), Mapping):
                fields[name], other = _typed(rest.pop(name), known, limit)
                rest.update(other)
        if isinstance(rest.get("request_id"), str):
            fields["request_id"] = clean(rest.pop("request_id"), 256)
        if error is not None:
            fields["error"] = clean_exception(error, limit)
        if rest := {name: value for name, value in rest.items() if value is not None}:
            fields["data"] = texts(rest, limit)
        self.logs.say(self._wall(), level, str(message), fields, CURRENT.get())
        self._show(level, str(message), rest, error)

    def _show(self, level: str, message: str, data: Mapping[str, Any], error: BaseException | None) -> None:
        """The same on stderr."""
        if self._settings.console == "off":
            return
        number = NUMBERS[level]
        shown = (type(error), error, error.__traceback__) if error is not None else None
        record = logging.LogRecord(self._name, number, "", 0, "%s", (message,), shown)
        vars(record).update({f"{name}_" if name in vars(record) else str(name): value for name, value in data.items()})
        self._console.handle(record)

    def _audit_inference(self, event: str, context: object, **data: Any) -> None:
        self.audit(event, {"inference_id": _of(context, "id"), **data})


class _Access(Teller):
    """Writes access lines, but of requests that a router inside the application writes."""

    def __init__(self, logger: StructuredLogger) -> None:
        self._logger = logger

    def finish(self, record: RequestRecord, now: float, *, is_counted: bool) -> None:
        if not (is_counted and self._logger.is_told_by_router):
            self._logger.logs.finished(record, now)


def _level(name: str) -> Level:
    level = level_named(name)
    if level is None:
        raise ConfigError("log_level", f"{name!r} is no level; there are {', '.join(LEVELS)}")
    return level


def _of(thing: object, name: str) -> Any:
    """A key of a mapping or an attribute of anything else; None where it is not there."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


def _pick(thing: object, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := _of(thing, name)) is not None}


def _typed(
    given: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]], limit: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that the schema knows with their types, and the others."""
    fields: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for name, value in given.items():
        expected = known.get(name)
        if expected is str and value is not None:
            fields[name] = clean(str(value), limit)
        elif (
            expected is None
            or not isinstance(value, expected)
            or (isinstance(value, bool) and expected is not bool)
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            other[name] = value
        else:
            fields[name] = value
    return fields, other
