"""The lines of a request, made from its record: one of access.log, and for an inference one of application.log.

There are thousands of them a second, so a line is put together from pieces of JSON. What repeats from request to request
(paths, user agents, models, outcomes) is cleaned and encoded once for each combination and remembered in a bounded
table; what is a number, or was checked elsewhere, is written as it is. Not for: deciding which requests get lines.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from llm_router.observe.logs.entry import Entries, Times, quoted
from llm_router.observe.logs.redact import REDACTED, clean, clean_id, clean_query, clean_url, is_own_id
from llm_router.observe.logs.schema import FileName
from llm_router.observe.logs.writer import LARGE_BYTES
from llm_router.signals import RequestRecord

Queues = Mapping[FileName, "deque[bytes]"]
"""Lines that wait, by the file they are for."""

_REMEMBERED: Final = 1024
"""Combinations that are remembered; then all are forgotten, which costs some 50 us once for each of 1024 new ones."""

_REMEMBERED_CHARS: Final = 4096
"""Of one combination or error: nobody fills the tables with long texts, so they hold 8 MB at most."""

_CLIENT: Final = re.compile(r"\[?([0-9A-Fa-f.:]{2,45})\]?:[0-9]{1,5}").fullmatch

_CLIENT_CHARS: Final = 64

_WAITED_S: Final = 0.001
"""From here on it is worth telling that an inference waited for a slot."""

_LENGTH_DIGITS: Final = 15
"""No integer of a line is beyond what JSON's readers take (2^53)."""


class _Shape(NamedTuple):
    """What requests of one combination have in common, as JSON around the places of what differs.

    Access: `level`, the ids, `request`, the length of the body, `headers_end`, the address and instants, `served`.
    Inference: `model`, then the length of the body if it has one, and at the end `backend`.
    """

    level: str
    request: str
    headers_end: str
    served: str
    model: str
    backend: str


class RequestLines:
    """Makes lines of records. Safe across threads: what is remembered is added and forgotten whole, and may be made twice.

    Args:
        access: whether requests get access lines.
        level: number of the lowest level of inference lines that is wanted.
        content: whether the bodies that a record holds are written.
        severities: kinds of errors to levels.
    """

    def __init__(
        self, entries: Entries, *, access: bool, level: int, content: bool, severities: Mapping[str, str]
    ) -> None:
        self._entries = entries
        self._constant = entries.constant_json
        self._max_line = entries.max_line_bytes
        self._limit = entries.max_field_chars
        self._access = access
        self._level = level
        self._content = content
        self._severities = severities
        self._times = Times()
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._errors: dict[tuple[str, str], str] = {}
        self._addresses: dict[str, str] = {}  # a connection brings many requests
        self._completed = f'","log.level":"info","message":"Inference completed",{self._constant},"request_id":'
        self._started = f'","log.level":"debug","message":"Inference started",{self._constant},"request_id":'

    def add(self, record: RequestRecord, now: float, offset_s: float, rate: float, queues: Queues) -> int:
        """Add the lines of a request that ended at monotonic `now`; severe failures of inferences have theirs already.

        Args:
            offset_s: makes Unix seconds of instants.
            rate: share of such requests that get lines.
            queues: where to.

        Returns: bytes of those lines that are large (`writer.LARGE_BYTES`).
        """
        large = 0
        begun = record.started_at
        end = self._times(now + offset_s)
        took = f"{(now - begun) * 1e3:.3f}"
        share = "1" if rate == 1.0 else f"{rate:g}"
        length = _length(record)
        level, request, headers_end, served, model, backend = self._shape(record, has_length=bool(length))
        id = self._id(record)
        trace = f'{id},"trace.id":"{record.trace_id}","span.id":"{record.span_id}"' if record.trace_id else id
        if self._tells(record):
            application = queues["application"]
            if self._level <= logging.DEBUG:
                # Stamped with its beginning, though it is made at the end: that is when a record is whole.
                line = (
                    f'{{"@timestamp":"{self._times(begun + offset_s)}{self._started}{trace},'
                    f'"inference":{{"id":{id},{model}{length}{self._asked(record)}}}}}\n'
                )
                large += self._add(application, line)
            if not record.error_type:
                line = (
                    f'{{"@timestamp":"{end}{self._completed}{trace},"inference":{{"id":{id},{model}{length}'
                    f'{self._used(record, took)}{backend},"success":true}},"sample_rate":{share}}}\n'
                )
                large += self._add(application, line)
            elif not is_severe(self._severities, record.error_type):
                application.append(self.failed(record, now, offset_s, "warning"))
        if self._access:
            error = f'"error":{self._error(record)},' if record.error_type else ""
            line = (
                f'{{"@timestamp":"{end}{level}{trace},{request}{length}{headers_end}'
                f'{self._address(record.client)}","timestamp":"{self._times(begun + offset_s)}"}},'
                f'"response":{{"contentLength":{record.response_bytes}{served}{error}'
                f'"duration":{took},"sample_rate":{share}}}\n'
            )
            large += self._add(queues["access"], line)
        return large

    def number(self, record: RequestRecord) -> int:
        """How many lines `add` makes of a record."""
        told = 0
        if self._tells(record):
            is_there_already = bool(record.error_type) and is_severe(self._severities, record.error_type)
            told = (self._level <= logging.DEBUG) + (not is_there_already)
        return told + self._access

    def _tells(self, record: RequestRecord) -> bool:
        """Whether application.log has something about it, beside what severe failures have there already."""
        return record.is_inference and self._level <= (logging.WARNING if record.error_type else logging.INFO)

    def failed(self, record: RequestRecord, now: float, offset_s: float, level: str) -> bytes:
        """The line of an inference that failed or whose client left, with the error."""
        id = self._id(record)
        trace = f'{id},"trace.id":"{record.trace_id}","span.id":"{record.span_id}"' if record.trace_id else id
        length = _length(record)
        shape = self._shape(record, has_length=bool(length))
        line = (
            f'{{"@timestamp":"{self._times(now + offset_s)}","log.level":"{level}","message":"Inference failed",'
            f'{self._constant},"request_id":{trace},"inference":{{"id":{id},{shape.model}{length}'
            f"{self._used(record, f'{(now - record.started_at) * 1e3:.3f}')}{shape.backend},"
            f'"success":false}},"error":{self._error(record)}}}\n'
        )
        return self._bytes(line)

    # -- pieces ----------------------------------------------------------------------------------------

    def _add(self, queue: deque[bytes], line: str) -> int:
        """Append it; returns its bytes if it is a large one, else 0."""
        made = self._bytes(line)
        queue.append(made)
        return len(made) if len(made) > LARGE_BYTES else 0

    def _bytes(self, line: str) -> bytes:
        encoded = line.encode()
        return encoded if len(encoded) <= self._max_line else self._entries.bounded(encoded)

    def _id(self, record: RequestRecord) -> str:
        text = record.request_id
        return f'"{text}"' if is_own_id(text) else quoted(clean_id(text))

    def _address(self, client: str) -> str:
        """The address of `ip:port` as the inside of a JSON text. Inside of another server it is what that one was told."""
        address = self._addresses.get(client)
        if address is None:
            found = _CLIENT(client)
            address = found[1] if found is not None else quoted(clean(client, 256))[1:-1]
            if len(self._addresses) >= _REMEMBERED:
                self._addresses.clear()
            if len(client) <= _CLIENT_CHARS:
                self._addresses[client] = address
        return address

    def _error(self, record: RequestRecord) -> str:
        key = (record.error_type, record.error)
        error = self._errors.get(key)
        if error is None:
            error = f'{{"name":{quoted(clean(key[0]))},"message":{quoted(clean(key[1], self._limit))}}}'
            if len(error) + len(key[0]) + len(key[1]) <= _REMEMBERED_CHARS:
                if len(self._errors) >= _REMEMBERED:
                    self._errors.clear()
                self._errors[key] = error
        return error

    def _used(self, record: RequestRecord, took: str) -> str:
        """The pairs of `inference` that differ from one to the next."""
        piece = f',"tokens":{record.output_tokens},"input_tokens":{record.input_tokens},"latency":{took}'
        if record.first_token_at:
            piece += f',"first_token":{(record.first_token_at - record.started_at) * 1e3:.3f}'
        if record.slot_at - record.queued_at >= _WAITED_S and record.queued_at:
            piece += f',"queued":{(record.slot_at - record.queued_at) * 1e3:.3f}'
        if record.cost_status:
            piece += f',"cost_usd":{record.cost_usd:.9g}'
        if record.cached_tokens:
            piece += f',"cached_tokens":{record.cached_tokens}'
        if record.reasoning_tokens:
            piece += f',"reasoning_tokens":{record.reasoning_tokens}'
        if self._content:
            piece += self._asked(record)
            if record.response_body is not None:
                piece += f',"response_body":{self._body(record.response_body)}'
        return piece

    def _asked(self, record: RequestRecord) -> str:
        if self._content and record.request_body is not None:
            return f',"request_body":{self._body(record.request_body)}'
        return ""

    def _body(self, body: bytes | bytearray) -> str:
        """A body as text: at most four bytes a character, and what `clean` reads beyond its bound."""
        return quoted(clean(body[: 4 * self._limit + 4096].decode("utf-8", "replace"), self._limit))

    def _shape(self, record: RequestRecord, *, has_length: bool) -> _Shape:
        headers = record.headers
        get = headers.get
        attempts = record.attempts
        key = (
            record.method,
            record.path,
            record.query,
            get(b"user-agent"),
            get(b"referer"),
            get(b"content-type"),
            b"authorization" in headers or b"x-api-key" in headers or b"cookie" in headers or b"api-key" in headers,
            has_length,
            record.route,
            record.status,
            record.outcome,
            record.response_type,
            record.is_inference and record.model,
            record.strategy,
            record.reason,
            record.key_id,
            record.key,
            record.cached,
            attempts[-1].backend if attempts else "",
            len(attempts),
        )
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._new_shape(record, key, has_length=has_length)
            # Redaction makes texts longer by the escapes of control characters at most.
            if sum(map(len, shape)) + sum(len(part) for part in key if isinstance(part, str | bytes)) <= (
                _REMEMBERED_CHARS
            ):
                if len(self._shapes) >= _REMEMBERED:
                    self._shapes.clear()
                self._shapes[key] = shape
        return shape

    def _new_shape(self, record: RequestRecord, key: tuple[object, ...], *, has_length: bool) -> _Shape:
        limit = self._limit
        path, query = clean(record.path, limit), clean_query(record.query, limit)
        headers = [
            f'"{name}":{quoted(clean_url(value.decode("utf-8", "backslashreplace"), limit))}'
            for name, value in (("userAgent", key[3]), ("referer", key[4]), ("contentType", key[5]))
            if isinstance(value, bytes)
        ]
        if key[6]:
            headers.append(f'"authorization":"{REDACTED}"')
        if has_length:
            headers.append('"contentLength":')
        request = (
            f'"request":{{"method":{_text(record.method)},"url":{quoted(f"{path}?{query}" if query else path)},'
            f'"path":{quoted(path)},"query":{quoted(query)},"headers":{{{",".join(headers)}'
        )
        served = f',"statusCode":{record.status}'
        if record.response_type:
            type = record.response_type.decode("utf-8", "backslashreplace")
            served += f',"contentType":{quoted(clean(type, limit))}'
        served += f'}},"route":{_text(record.route)},"outcome":"{record.outcome}",'
        if record.key_id:
            served += f'"key":{{"id":{_text(record.key_id)},"name":{_text(record.key)}}},'
        asked = f'"model":{_text(record.model)},"strategy":{_text(record.strategy)}'
        tries = f'"attempts":{len(record.attempts)},"cached":{"true" if record.cached else "false"}'
        if record.attempts:
            tries += f',"backend":{_text(record.attempts[-1].backend)}'
        if record.is_inference:
            served += f'"routing":{{{asked},{tries}}},'
        if record.reason:
            asked += f',"reason":{_text(record.reason)}'
        if record.key:
            asked += f',"key":{_text(record.key)}'
        if has_length:
            asked += ',"prompt_length":'
        level = "error" if record.status >= 500 else "warning" if record.status >= 400 else "info"
        level = f'","log.level":"{level}","message":"HTTP Request",{self._constant},"request_id":'
        return _Shape(level, request, '},"ip":"', served, asked, f",{tries}")


def is_severe(severities: Mapping[str, str], kind: str) -> bool:
    """Whether a failure of this kind goes to error.log, at once; the others are the caller's own, and warnings."""
    return severities.get(kind) != "warning"


def _length(record: RequestRecord) -> str:
    """The announced length of the body, as an integer of JSON; empty without one."""
    length = record.headers.get(b"content-length", b"")
    return str(int(length)) if length.isdigit() and len(length) <= _LENGTH_DIGITS else ""


def _text(text: str) -> str:
    return quoted(clean(text, 1024))
