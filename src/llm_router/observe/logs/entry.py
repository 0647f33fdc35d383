"""Makes one JSON line of one thing that happened: what is rare, like a warning, an audit event or a metric.

The fields that every line has, the form of times, and the bounds of a line are here. Not for: the lines of requests,
which are too many to be made this way (request_lines.py), or writing (writer.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from llm_router.observe.logs.redact import REDACTED, clean, clean_id, clean_value, is_secret_name
from llm_router.observe.logs.schema import AUDIT, BASE
from llm_router.observe.logs.service import Service
from llm_router.observe.timestamp import timestamp
from llm_router.signals import RequestRecord

_encode: Final = msgspec.json.Encoder(enc_hook=str).encode

_SHORTER_CHARS: Final = (1024, 256, 64)
"""What texts of a line that is too long are cut to, until it is not."""

_NAME_CHARS: Final = 64

_MAX_TEXTS: Final = 64
"""Of one object of texts."""

_AUDIT_FIELDS: Final = {field.name: field.type for field in AUDIT if field not in BASE and field.name != "event"}


_MILLISECONDS: Final = tuple(f".{number:03d}Z" for number in range(1000))


class Times:
    """Unix seconds as `2026-01-31T12:00:00.000Z`; the part down to the second is made once a second. Any thread."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: dict[int, str] = {}

    def __call__(self, unix_s: float) -> str:
        second = int(unix_s)
        text = self._seconds.get(second)
        if text is None:
            if len(self._seconds) > 64:
                self._seconds.clear()
            text = self._seconds[second] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return text + _MILLISECONDS[int((unix_s - second) * 1000)]


def quoted(text: str) -> str:
    """A text as JSON; it must hold no half of a surrogate pair (`redact.clean` takes care)."""
    return _encode(text).decode()


class Entries:
    """Lines of one process. Safe across threads: it holds constants only.

    Args:
        process: like `worker-0`.
        max_line_bytes, max_field_chars: what is longer is cut.
    """

    def __init__(self, service: Service, process: str, *, max_line_bytes: int, max_field_chars: int) -> None:
        self.max_line_bytes = max_line_bytes
        self.max_field_chars = max_field_chars
        self._constant: dict[str, Any] = {
            "service": clean(service.name),
            "version": clean(service.version),
            "env": clean(service.environment),
            "hostname": clean(service.hostname),
            "pid": service.pid,
            "process": clean(process),
        }
        self.constant_json = _encode(self._constant)[1:-1].decode()
        """The fields that all lines of this process share, without braces."""

    def line(
        self, unix_s: float, level: str, message: str, fields: Mapping[str, Any], record: RequestRecord | None = None
    ) -> bytes:
        """A whole line with its end. `fields` are clean already; `message` is cleaned here.

        Args:
            record: the request that it belongs to.
        """
        entry: dict[str, Any] = {
            "@timestamp": timestamp(unix_s),
            "log.level": level,
            "message": clean(message, self.max_field_chars),
            **self._constant,
        }
        if record is not None:
            entry["request_id"] = clean_id(record.request_id)
            if record.trace_id:
                entry["trace.id"] = record.trace_id
                entry["span.id"] = record.span_id
        entry.update(fields)
        return self.bounded(_encode(entry) + b"\n")

    def bounded(self, line: bytes) -> bytes:
        """The line, or if it is longer than allowed the same with shorter texts and `truncated`."""
        if len(line) <= self.max_line_bytes:
            return line
        entry = msgspec.json.decode(line)
        for limit in _SHORTER_CHARS:
            line = _encode({**_shortened(entry, limit), "truncated": True}) + b"\n"
            if len(line) <= self.max_line_bytes:
                return line
        base = {name: value for name, value in _shortened(entry, _SHORTER_CHARS[-1]).items() if name in _BASE_NAMES}
        return _encode({**base, "truncated": True}) + b"\n"


_BASE_NAMES: Final = frozenset(field.name for field in BASE)


def _shortened(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= limit else f"{value[:limit]}..."
    if isinstance(value, dict):
        return {name: _shortened(item, limit) for name, item in value.items()}
    return value


def texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Anything as an object of clean texts: numbers and lists in JSON, secrets redacted by name and pattern."""
    cleaned: dict[str, str] = {}
    for name, value in list(values.items())[:_MAX_TEXTS]:
        plain = clean(str(name), _NAME_CHARS).replace(".", "_")
        if value is not None and is_secret_name(plain):
            cleaned[plain] = REDACTED
        elif isinstance(value, str):
            cleaned[plain] = clean(value, limit)
        else:
            safe = clean_value(value, limit)
            cleaned[plain] = safe if isinstance(safe, str) else clean(_encode(safe).decode(), limit)
    return cleaned


def audit_fields(event: str, unix_s: float, values: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The fields of an audit line: those that the schema knows, with its type, and `data` with all others."""
    fields: dict[str, Any] = {"event": clean(event, _NAME_CHARS), "timestamp": timestamp(unix_s)}
    rest: dict[str, Any] = {}
    for name, value in values.items():
        match _AUDIT_FIELDS.get(name), value:
            case _, None:
                continue
            case "text", str():
                fields[name] = clean(value, limit)
            case "boolean", bool():
                fields[name] = value
            case "number", int() | float() if not isinstance(value, bool):
                fields[name] = value
            case _:
                rest[name] = value
    if rest:
        fields["data"] = texts(rest, limit)
    return fields
