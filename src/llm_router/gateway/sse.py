"""Watches a stream of server-sent events that passes through: counts events, finds the token usage, hides it if asked.

Bytes pass untouched and unparsed, but for the one event that carries usage; `deltas` is for those who want the
text itself. Not for: making events.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from llm_router.chat import NOT_JSON, Chunk, TokenCount, Usage

_MARK = b'"completion_tokens"'
_MAX_HELD = 1 << 20


class _UsageObject(msgspec.Struct):
    prompt_tokens: TokenCount | None = 0
    completion_tokens: TokenCount | None = 0


class _Event(msgspec.Struct):
    usage: _UsageObject | None = None
    choices: list[msgspec.Raw] | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class StreamWatch:
    """State over one stream. `feed` returns what may be sent on; `events` counts whole events of content so far.

    The unfinished tail of an event is held back (1 MiB at most; beyond that it passes): no client can use it.

    Args:
        hide_usage: drop the event that carries usage and no choices, because only we asked for it.
    """

    __slots__ = ("_held", "_hide", "done", "events", "usage")

    def __init__(self, *, hide_usage: bool) -> None:
        self._hide = hide_usage
        self._held = b""
        self.events = 0
        self.usage: Usage | None = None
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """The bytes to send on for these bytes of the upstream; may be empty."""
        if self._held:
            data = self._held + data
            self._held = b""
        if data[-2:] != b"\n\n" and data[-4:] != b"\r\n\r\n":
            plain, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
            cut = max(plain + 2 if plain >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
            if len(data) - cut > _MAX_HELD:
                cut = len(data)
            self._held = data[cut:]
            data = data[:cut]
        count = data.count(b"\n\n")
        self.events += count or data.count(b"\r\n\r\n")
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
        self.usage = Usage(parsed.usage.prompt_tokens or 0, parsed.usage.completion_tokens or 0)
        return not parsed.choices


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
