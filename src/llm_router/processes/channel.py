"""Messages between the supervisor and its children: JSON, one a line, over descriptors that never block it.

`Lines` cuts what arrives; `Channel` is the supervisor's end of the socket to control, which also sends.
Not for: what messages mean (supervisor.py). Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any, Final

LONGEST_LINE_BYTES: Final = 1 << 20
"""Longer than any honest message (a runner's payload is some hundred bytes); what exceeds it is dropped."""

_MOST_WAITING_BYTES: Final = 4 << 20
"""Replies that a control that does not read may leave waiting before it counts as broken."""


class Lines:
    """Cuts a stream of bytes into messages. A line that is no JSON object or too long is counted in `bad`."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self.bad = 0

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > LONGEST_LINE_BYTES:
            rest = bytearray()
            self.bad += 1
        self._rest = rest
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                messages.append(message)
            else:
                self.bad += 1
        return messages

    def read_all(self, fd: int) -> tuple[list[dict[str, Any]], bool]:
        """The messages that a non-blocking descriptor holds now, and whether it is at its end."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return messages, False
            except OSError:
                return messages, True
            if not data:
                return messages, True
            messages += self.feed(data)


class Channel:
    """The supervisor's end of the socket to control.

    Replies are kept until they are sent, at most 4 MiB of them, each behind the state that it speaks of. Other states
    are not queued: `state` is asked for the newest one when everything before it is sent, so a slow control misses
    states, never the last.
    """

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._lines = Lines()
        self._state = state
        self._state_wanted = True
        self._waiting = bytearray()
        self.broken = False

    def changed(self) -> None:
        """The state is another one: send it with the next flush."""
        self._state_wanted = True

    def reply(self, message: dict[str, Any]) -> None:
        """Answer an order, after the state if that changed."""
        if self._state_wanted:
            self._add_state()
        self._waiting += json.dumps(message).encode() + b"\n"
        if len(self._waiting) > _MOST_WAITING_BYTES:
            self.broken = True

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to send that the socket does not take at the moment."""
        return bool(self._waiting) and not self.broken

    def flush(self) -> None:
        """Send what can be sent without waiting."""
        while not self.broken:
            if not self._waiting:
                if not self._state_wanted:
                    return
                self._add_state()
            try:
                sent = self.ours.send(self._waiting)
            except BlockingIOError:
                return
            except OSError:
                self.broken = True
                return
            del self._waiting[:sent]

    def _add_state(self) -> None:
        self._state_wanted = False
        self._waiting += json.dumps(self._state()).encode() + b"\n"

    def receive(self) -> list[dict[str, Any]]:
        """The orders that have arrived. Sets `broken` at the end of the stream."""
        messages, ended = self._lines.read_all(self.ours.fileno())
        self.broken |= ended
        return messages

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
