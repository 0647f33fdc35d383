"""A log line as a person reads it: one line, what matters first, colours on a terminal.

    2026-01-31T12:00:00.123Z worker-0 200 POST /v1/chat/completions 152.3 ms small at local, key app [0f64...-17]

Whatever a line holds beside what is known here is shown as `name=value`. Texts from the file are made safe for a
terminal, whoever wrote them. Not for: finding lines (files.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llm_router.cli.logs.files import Line
from llm_router.cli.logs.where import found
from llm_router.observe.logs.console import DIM, LEVEL_COLOURS, paint
from llm_router.observe.logs.redact import printable
from llm_router.observe.logs.schema import BASE, FileName

_PROCESS_COLOUR: Final = "36"
_AUDIT_COLOUR: Final = "35"
_BOLD: Final = "1"
_STATUS_COLOURS: Final = {2: "32", 3: "36", 4: "33", 5: "31"}
_PROCESS_WIDTH: Final = 8
_BASE_NAMES: Final = frozenset(field.name for field in BASE) - {"truncated"}

Entry = Mapping[str, Any]


class Renderer:
    """Shows lines. `is_coloured` for a terminal."""

    def __init__(self, *, is_coloured: bool) -> None:
        self._is_coloured = is_coloured

    def show(self, line: Line) -> str:
        """The line as it is read; of an error with a traceback, several. A broken one as it is."""
        if line.entry is not None:
            try:
                return self._shown(line, line.entry)
            except (AttributeError, KeyError, TypeError, ValueError):
                pass  # it is none of ours: its fields are not of the types that they should be
        return printable(line.raw.decode("utf-8", "backslashreplace"))

    def _shown(self, line: Line, entry: Entry) -> str:
        parts = [
            self._paint(_text(entry.get("@timestamp", "")), DIM),
            self._paint(_text(entry.get("process", "")).ljust(_PROCESS_WIDTH), _PROCESS_COLOUR),
            *self._kind(line.file, entry),
        ]
        request_id = entry.get("request_id")
        if request_id:
            parts.append(self._paint(f"[{_text(request_id)}]", DIM))
        stack = found(entry, "error.stack")
        shown = " ".join(part for part in parts if part)
        return shown + ("".join(f"\n    {_text(row)}" for row in str(stack).rstrip("\n").split("\n")) if stack else "")

    def _paint(self, text: str, colour: str) -> str:
        return paint(text, colour, is_coloured=self._is_coloured)

    def _kind(self, file: FileName, entry: Entry) -> Iterator[str]:
        match file:
            case "access" if "request" in entry and "response" in entry:
                return self._access(entry)
            case "audit" if "event" in entry:
                return self._audit(entry)
            case "metrics" if "metric" in entry:
                return self._metric(entry)
        return self._application(entry)

    # -- kinds ----------------------------------------------------------------------------------------

    def _access(self, entry: Entry) -> Iterator[str]:
        status = found(entry, "response.statusCode", 0)
        yield self._paint(_text(status), _STATUS_COLOURS.get(status // 100 if isinstance(status, int) else 0, _BOLD))
        yield _text(found(entry, "request.method", ""))
        yield _text(found(entry, "request.url", ""))
        yield _milliseconds(entry.get("duration"))
        yield ", ".join(
            part
            for part in (
                _place(found(entry, "routing.model"), found(entry, "routing.backend")),
                _some("{} attempts", found(entry, "routing.attempts"), usual=(0, 1)),
                "cached" if found(entry, "routing.cached") else "",
                _some("key {}", found(entry, "key.name")),
                _some("from {}", found(entry, "request.ip")),
                self._error(entry),
            )
            if part
        )

    def _audit(self, entry: Entry) -> Iterator[str]:
        yield self._paint(_text(entry["event"]), _AUDIT_COLOUR)
        yield self._paint("failed", LEVEL_COLOURS["error"]) if entry.get("success") is False else ""
        yield _some("by {}", entry.get("actor"))
        yield from _others(entry, {"event", "timestamp", "success", "actor"})

    def _metric(self, entry: Entry) -> Iterator[str]:
        labels = found(entry, "metric.labels", {})
        pairs = ",".join(f"{_text(name)}={_quoted(value)}" for name, value in labels.items())
        yield _text(found(entry, "metric.name", "")) + (f"{{{pairs}}}" if pairs else "")
        value = found(entry, "metric.value")
        yield self._paint(f"{value:.10g}" if isinstance(value, int | float) else _text(value), _BOLD)

    def _application(self, entry: Entry) -> Iterator[str]:
        level = _text(entry.get("log.level", ""))
        yield self._paint(level.upper(), LEVEL_COLOURS.get(level, _BOLD))
        logger = _text(entry.get("log.logger", "")).removeprefix("llm_router.")
        process = _text(entry.get("process", ""))
        yield "" if not logger or logger == process.rstrip("-0123456789") else f"{logger}:"
        inference = entry.get("inference")
        details = [*(_inference(inference) if isinstance(inference, Mapping) else ()), self._error(entry)]
        shown = ", ".join(part for part in details if part)
        yield _text(entry.get("message", "")) + (f": {shown}" if shown else "")
        yield from _others(entry, {"inference", "error", "sample_rate", "log.logger"})

    def _error(self, entry: Entry) -> str:
        """The error in short; the last line of a traceback would say the same."""
        name, message = found(entry, "error.name"), found(entry, "error.message")
        if not name or found(entry, "error.stack"):
            return ""
        return self._paint(f"{_text(name)}: {_text(message)}" if message else _text(name), LEVEL_COLOURS["error"])


def _inference(fields: Mapping[str, Any]) -> Iterator[str]:
    yield _place(fields.get("model"), fields.get("backend"))
    latency = fields.get("latency")
    if latency is not None:
        steps = [
            f"{word} {_milliseconds(fields[name])}"
            for word, name in (("queued", "queued"), ("first token", "first_token"))
            if fields.get(name) is not None
        ]
        yield _milliseconds(latency) + (f" ({', '.join(steps)})" if steps else "")
    if fields.get("tokens") or fields.get("input_tokens"):
        yield f"{_text(fields.get('input_tokens', 0))} + {_text(fields.get('tokens', 0))} tokens"
    cost = fields.get("cost_usd")
    if isinstance(cost, int | float):
        yield f"${cost:.6f}".rstrip("0").rstrip(".")
    if fields.get("cached"):
        yield "cached"
    attempts = _some("{} attempts", fields.get("attempts"), usual=(0, 1))
    if attempts:
        yield attempts
    for form, name in (("key {}", "key"), ("asked {}", "request_body"), ("answered {}", "response_body")):
        if fields.get(name):
            yield _some(form, fields[name])


def _others(entry: Entry, shown: set[str]) -> Iterator[str]:
    """Whatever else the line holds."""
    for name, value in entry.items():
        if name not in shown and name not in _BASE_NAMES:
            # What is in `data` stands there only so that each field has one type.
            yield from _pairs("" if name == "data" else name, value)


def _pairs(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner, part in value.items():
            yield from _pairs(f"{name}.{inner}" if name else str(inner), part)
    else:
        yield f"{_text(name)}={_quoted(value)}"


def _place(model: Any, backend: Any) -> str:
    """`small at local`; nothing for what is no inference."""
    if not model:
        return ""
    return f"{_text(model)} at {_text(backend)}" if backend else _text(model)


def _some(form: str, value: Any, usual: tuple[Any, ...] = ()) -> str:
    return form.format(_text(value)) if value not in (None, "", *usual) else ""


def _milliseconds(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def _quoted(value: Any) -> str:
    """A value as it is, in quotes if it would not be seen where it ends."""
    text = _text(value if isinstance(value, str) else json.dumps(value, default=str))
    return json.dumps(text, ensure_ascii=False) if not text or set(' "=,{}') & set(text) else text


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else str(value))
