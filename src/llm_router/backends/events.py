"""Cuts a stream of server-sent events into what they say, wherever the network split it, and writes such events.

For translators, which need every event; a stream that passes through is only watched (gateway/sse.py).
Not for: what the events of a protocol mean.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, Final

import msgspec

from llm_router.errors import BackendRejected, BadReply

# A line ends with CR LF, LF or CR, an event with an empty line. Atomic, so that one CR LF is never taken for two ends.
# Where a CR is the last byte that has come and LF follows, the LF stands as an empty line before the next event: no harm.
_END: Final = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINES: Final = re.compile(rb"\r\n|\n|\r")
_MAX_HELD: Final = 16 << 20
"""No event of a chat is that long: tool calls and texts come in pieces."""
_LONGEST_END: Final = 4


class EventReader:
    """State over one stream.

    Args:
        backend: its name, for errors.
    """

    __slots__ = ("_backend", "_held", "_seen")

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._held = b""
        self._seen = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are whole now, in order; events without data are left out.

        Raises: BadReply for an event longer than 16 MiB.
        """
        data = self._held + data
        told: list[bytes] = []
        start, at = 0, max(0, self._seen - _LONGEST_END)
        while (end := _END.search(data, at)) is not None:
            said = _data_of(data[start : end.start()])
            if said:
                told.append(said)
            start = at = end.end()
        self._held = data[start:]
        self._seen = len(self._held)
        if self._seen > _MAX_HELD:
            raise BadReply(self._backend, f"its stream holds an event longer than {_MAX_HELD >> 20} MiB")
        return told

    def rest(self) -> list[bytes]:
        """The data of a last event that lacks its empty line, as some servers end."""
        held, self._held = self._held, b""
        said = _data_of(held)
        return [said] if said else []


def _data_of(event: bytes) -> bytes:
    lines = [
        line[6:] if line.startswith(b"data: ") else line[5:]
        for line in _LINES.split(event)
        if line.startswith(b"data:")
    ]
    return b"\n".join(lines)


class StreamTranslator(ABC):
    """The stream half of a `base.ReplyReader`: takes events one by one, and fails only after what came before is out.

    A subclass sets `_is_finished` when the answer is complete and only its end may follow, and `_has_ended` in `_end`.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._events = EventReader(backend)
        self._failure: BackendRejected | BadReply | None = None
        self._is_finished = False
        self._has_ended = False

    @abstractmethod
    def _take(self, event: bytes, out: list[bytes]) -> None:
        """Add to `out` what the data of an event means to the caller. Raises: BackendRejected, BadReply."""

    @abstractmethod
    def _end(self) -> bytes:
        """What ends the stream for the caller."""

    def feed(self, data: bytes) -> bytes:
        return self._told(self._events.feed(data))

    def rest(self) -> bytes:
        out = self._told(self._events.rest())
        if self._failure is None and not self._has_ended:
            if self._is_finished:
                return out + self._end()
            self._failure = BadReply(self._backend, "its stream ended in the middle of an answer")
        if self._failure is not None:
            raise self._failure
        return out

    def _told(self, events: list[bytes]) -> bytes:
        if self._failure is not None:
            raise self._failure
        out: list[bytes] = []
        try:
            for event in events:
                if not self._has_ended:
                    self._take(event, out)
        except (BackendRejected, BadReply) as failure:
            self._failure = failure
            if not out:
                raise
        return b"".join(out)


_encode = msgspec.json.Encoder().encode


def chat_event(value: Any) -> bytes:
    """An event of OpenAI's streams."""
    return b"data: %b\n\n" % _encode(value)


def messages_event(value: dict[str, Any]) -> bytes:
    """An event of Anthropic's streams; its name is its type."""
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), _encode(value))
