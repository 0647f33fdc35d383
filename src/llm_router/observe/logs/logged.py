"""What a record of `logging` says, in our words: its level, its message, and whatever else it was given.

Not for: writing it (handler.py into files, console.py to stderr). Standard library only: the supervisor imports it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

NUMBERS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""Our level names, from the lowest on, and the numbers that `logging` has for them."""

_STANDARD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
_MAX_ARGUMENTS: Final = 1000


def level_name(level: int) -> str:
    """`warning` of 30, and of what lies between 30 and 40."""
    if level >= logging.CRITICAL:
        return "critical"
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warning"
    return "info" if level >= logging.INFO else "debug"


def message_of(record: logging.LogRecord) -> str:
    """The message with its arguments in it."""
    try:
        return record.getMessage()
    except Exception:  # a message that does not fit its arguments is a fault of ours, and no reason to lose it
        return f"{record.msg!r} with {record.args!r:.{_MAX_ARGUMENTS}}"


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was given by `extra=`, as it is."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
