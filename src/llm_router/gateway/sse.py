"""Watches a stream of server-sent events that passes through: counts events, finds the token usage, hides it if asked.

Bytes pass untouched and unparsed, but for the events that carry usage; `deltas` is for those who want the
text itself. Not for: making events, or translating them (backends).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, Protocol

import msgspec

from llm_router.backends.usage import ChatUsage, MessagesUsage
from llm_router.chat import NOT_JSON, Chunk, Endpoint, Usage

_MESSAGES: Final = Endpoint.MESSAGES
_MARK = b'"completion_tokens"'
_ERROR: Final = b'"error"'  # in a text its quotes would be escaped
_MAX_HELD = 1 << 20


class Watch(Protocol):
    """State over one stream.

    Attributes:
        events: whole events of content so far.
        usage: what the backend has said about it so far.
        done: whether the event that ends such a stream has come.
        failed: whether the backend has said in the stream that it failed, in an event that passes as it came.
    """

    @property
    def events(self) -> int: ...

    @property
    def usage(self) -> Usage | None: ...

    @property
    def done(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for these bytes of the upstream; may be empty."""

    def rest(self) -> bytes:
        """What is still held back when the upstream ended; a well-formed stream leaves nothing."""


def watch_for(endpoint: Endpoint, hide_usage: bool) -> Watch:
    """The watch for a stream that answers a request of `endpoint`, in the caller's dialect.

    Args:
        hide_usage: drop the event that carries usage alone, because only we asked for it. Anthropic's has none.
    """
    return MessagesWatch() if endpoint is _MESSAGES else StreamWatch(hide_usage=hide_usage)


class _Event(msgspec.Struct):
    usage: ChatUsage | None = None
    choices: list[msgspec.Raw] | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class StreamWatch:
    """The watch for a stream of OpenAI's events. `feed` returns what may be sent on; `events` counts whole events of content so far.

    The unfinished tail of an event is held back (1 MiB at most; beyond that it passes): no client can use it.

    Args:
        hide_usage: drop the event that carries usage and no choices, because only we asked for it.
    """

    __slots__ = ("_held", "_hide", "done", "events", "failed", "usage")

    def __init__(self, *, hide_usage: bool) -> None:
        self._hide = hide_usage
        self._held = b""
        self.events = 0
        self.usage: Usage | None = None
        self.done = self.failed = False

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for these bytes of the upstream; may be empty."""
        if self._held:
            data = self._held + data
            self._held = b""
        if data[-2:] != b"\n\n" and data[-4:] != b"\r\n\r\n":
            data, self._held = _whole_events(data)
        count = data.count(b"\n\n")
        self.events += count or data.count(b"\r\n\r\n")
        if _ERROR in data and not self.failed:
            self.failed = any(_tells_error(event) for event in data.splitlines() if _ERROR in event)
        if _MARK in data:
            data = self._take_usage(data)
        if b"[DONE]\n" in data or b"[DONE]\r" in data:  # no line of JSON ends so: it is not a model's text
            self.done = True
            self.events -= 1
        return data

    def rest(self) -> bytes:
        """What is still held back when the upstream ended; a well-formed stream leaves nothing."""
        held, self._held = self._held, b""
        return held

    def _take_usage(self, data: bytes) -> bytes:
        separator = b"\r\n\r\n" if b"\r\n\r\n" in data and b"\n\n" not in data else b"\n\n"
        kept = []
        for event in data.split(separator):
            if _MARK in event and self._is_usage_only(event) and self._hide:
                self.events -= 1
                continue
            kept.append(event)
        return separator.join(kept)

    def _is_usage_only(self, event: bytes) -> bool:
        start = event.find(b"{")
        if start < 0:
            return False
        try:
            parsed = _decode_event(event[start:])
        except NOT_JSON:
            return False
        if parsed.usage is None:
            return False
        self.usage = parsed.usage.usage()
        return not parsed.choices


class _Told(msgspec.Struct):
    error: Any = None


_decode_told = msgspec.json.Decoder(_Told).decode


def _tells_error(line: bytes) -> bool:
    """Whether a line of an event holds an object whose own `error` is something."""
    start = line.find(b"{")
    if start < 0:
        return False
    try:
        return bool(_decode_told(line[start:]).error)
    except NOT_JSON:
        return False


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """The whole events in front, and the unfinished one behind them."""
    plain, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    cut = max(plain + 2 if plain >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
    if len(data) - cut > _MAX_HELD:
        cut = len(data)
    return data[:cut], data[cut:]


# The name of an event is a line of its own; in a text the end of that line would be escaped.
_DELTA: Final = re.compile(rb"event: ?content_block_delta\r?\n")
_TOLD: Final = re.compile(
    rb"(?:^|\n)event: ?(message_start|message_delta|message_stop|error)\r?\n(?:data: ?([^\r\n]*))?"
)


class _Started(msgspec.Struct):
    usage: MessagesUsage | None = None


class _MessagesEvent(msgspec.Struct):
    message: _Started | None = None
    usage: MessagesUsage | None = None


_decode_messages_event = msgspec.json.Decoder(_MessagesEvent).decode


class MessagesWatch:
    """The watch for a stream of Anthropic's events; every byte passes. An unfinished event is held back as there."""

    __slots__ = ("_held", "_said", "done", "events", "failed")

    def __init__(self) -> None:
        self._held = b""
        self._said = MessagesUsage()
        self.events = 0
        self.done = self.failed = False

    @property
    def usage(self) -> Usage | None:
        """Of a stream that was cut only the input is known: its output is what was counted."""
        usage = self._said.usage()
        if usage is None or self.done or self.events <= usage.output_tokens:
            return usage
        return msgspec.structs.replace(usage, output_tokens=self.events)

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
            self._held = b""
        if data[-2:] != b"\n\n" and data[-4:] != b"\r\n\r\n":
            data, self._held = _whole_events(data)
        self.events += len(_DELTA.findall(data))
        if b"message_" in data or b"error" in data:
            for name, said in _TOLD.findall(data):
                if name == b"error":
                    self.failed = True
                elif name == b"message_stop":
                    self.done = True
                else:
                    self._take_usage(said)
        return data

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def _take_usage(self, said: bytes) -> None:
        try:
            event = _decode_messages_event(said)
        except NOT_JSON:
            return
        newer = event.usage if event.message is None else event.message.usage
        if newer is not None:
            self._said = self._said.updated(newer)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _ChatEvent(msgspec.Struct):
    choices: list[_Choice] = []


_decode_chat = msgspec.json.Decoder(_ChatEvent).decode


def deltas(events: bytes) -> Iterator[Chunk]:
    """The pieces of text in whole events of a chat stream; events without text or finish reason give none."""
    for line in events.splitlines():
        if not line.startswith(b"data:") or b"[DONE]" in line[:12]:
            continue
        try:
            event = _decode_chat(line[5:])
        except NOT_JSON:
            continue
        for choice in event.choices:
            text = choice.delta.content if choice.delta is not None else None
            if text or choice.finish_reason:
                yield Chunk(text or "", choice.finish_reason)
