"""Brings what our modules say through `logging` into application.log, and errors into error.log at once.

Not for: stderr (console.py), or the lines of requests, which never go through `logging`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from llm_router.observe.logs.entry import texts
from llm_router.observe.logs.logged import extra_of, level_name, message_of
from llm_router.observe.logs.redact import clean, clean_exception
from llm_router.signals import CURRENT, RequestRecord

OWN_LOGGER: Final = "llm_router.logs"
"""What logging says about itself; it goes to stderr only, for the files may be what fails."""


class Sink(Protocol):
    """Takes what happened, as fields that are clean."""

    def say(
        self, unix_s: float, level: str, message: str, fields: dict[str, Any], record: RequestRecord | None
    ) -> None: ...


class FileHandler(logging.Handler):
    """Hands each log record to `sink`, with the request that the running task serves. Any thread.

    Args:
        field_chars: the current bound of one text.
    """

    def __init__(self, sink: Sink, field_chars: Callable[[], int]) -> None:
        super().__init__()
        self._sink = sink
        self._field_chars = field_chars

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == OWN_LOGGER:
            return
        try:
            limit = self._field_chars()
            fields: dict[str, Any] = {"log.logger": clean(record.name, 256)}
            if record.exc_info is not None and record.exc_info[1] is not None:
                fields["error"] = clean_exception(record.exc_info[1], limit)
            if extra := extra_of(record):
                fields["data"] = texts(extra, limit)
            self._sink.say(record.created, level_name(record.levelno), message_of(record), fields, CURRENT.get())
        except Exception:  # as logging's own handlers: what cannot be logged ends nobody's work
            self.handleError(record)
