"""A reply that may be shown to the caller, in the caller's dialect, and what must be done when it has ended.

Not for: getting it (router.py) or putting it on the caller's wire (gateway).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from email.utils import parsedate_to_datetime
from typing import Any

from llm_router.backends.base import Backend, ReplyReader
from llm_router.chat import Usage
from llm_router.errors import BackendRejected, FaultDomain
from llm_router.models.prices import Price
from llm_router.routing.queue import ModelQueue
from llm_router.routing.table import Deployment
from llm_router.routing.targets import Target
from llm_router.signals import Attempt, RequestRecord
from llm_router.upstream.pool import Reply

_LONGEST_S = 7 * 86_400.0
"""A Retry-After beyond a week is a mistake, like that of a backend which gives an instant instead of seconds."""

_BACKENDS_FAULT = (FaultDomain.PROVIDER, FaultDomain.NETWORK)


class Exchange:
    """A reply that may be shown. Close it by `finish` in a `finally`; closing an unfinished one cuts the upstream at once.

    Attributes:
        body: the whole body of a plain reply; the first bytes of a stream.
        streaming: whether more may follow: read it with `chunk()`.
        chunk: the next bytes of a stream, waiting for them; b"" at its end. Raises: BackendError.
        usage: of a plain successful reply, None if the backend gave none.
        reader: translates the reply; None where bytes pass as they come.
        first_byte_at: monotonic instant at which the head of a plain reply, or the first bytes of a stream, had come.
    """

    __slots__ = (
        "_queue",
        "_record",
        "_target",
        "_ticket",
        "attempt",
        "body",
        "chunk",
        "first_byte_at",
        "reader",
        "reply",
        "streaming",
        "usage",
    )

    chunk: Callable[[], Coroutine[Any, Any, bytes]]

    def __init__(
        self, target: Target, ticket: int, attempt: Attempt, reply: Reply, reader: ReplyReader | None, now: float
    ) -> None:
        self._target = target
        self._ticket = ticket
        self._queue: ModelQueue | None = None
        self._record: RequestRecord | None = None
        self.attempt = attempt
        self.reply = reply
        self.reader = reader
        self.chunk = reply.chunk if reader is None else _Translated(reply, reader, target.backend).chunk
        self.first_byte_at = now
        self.body = b""
        self.streaming = False
        self.usage: Usage | None = None

    def __repr__(self) -> str:
        state = "streaming" if self.streaming else "whole"
        return f"<Exchange {self.backend} {self.status} {state} {self.attempt.outcome}>"

    @property
    def backend(self) -> str:
        return self._target.name

    @property
    def deployment(self) -> Deployment:
        return self._target.deployment

    @property
    def price(self) -> Price | None:
        """What the deployment costs; None when unknown."""
        return self._target.price

    @property
    def status(self) -> int:
        return self.reply.status

    def header(self, name: bytes) -> bytes:
        """Value of a reply header (lower-case name), empty if absent."""
        for key, value in self.reply.headers:
            if key == name:
                return value
        return b""

    @property
    def retry_after_s(self) -> float | None:
        """What the backend's Retry-After says in seconds; None without one that can be understood."""
        said = self.header(b"retry-after").decode("latin-1")
        try:
            seconds = float(said)
        except ValueError:
            seconds = _seconds_until(said, self.header(b"date").decode("latin-1"))
        return max(0.0, seconds) if seconds <= _LONGEST_S else None  # neither for nan

    def without_secrets(self, data: bytes) -> bytes:
        """Bytes of an error as callers may see them: without the credentials that the backend got from us."""
        return self._target.backend.without_secrets(data)

    def hold(self, queue: ModelQueue, record: RequestRecord) -> None:
        """Keep the slot, taken at `record.slot_at`, until `finish`: the backend works until the stream ends."""
        self._queue = queue
        self._record = record

    def finish(self, now: float, outcome: str) -> None:
        """The attempt ended at `now`; only the first call counts, and an outcome that the attempt has already stays.

        A stream gives back its slot, and its backend is judged: by its speed if all of it came, as failing if it
        broke off.
        """
        attempt = self.attempt
        if not attempt.outcome:
            attempt.ended_at = now
            attempt.outcome = outcome
        self.reply.close()
        queue, record = self._queue, self._record
        if queue is None or record is None:
            return
        self._queue = None
        queue.release(now - record.slot_at)
        if attempt.outcome == "success":
            self.measure(now, record.output_tokens)
        elif attempt.outcome in _BACKENDS_FAULT:
            self._target.breaker.break_off(self._ticket, now)

    def measure(self, now: float, output_tokens: int) -> None:
        """The whole reply had come at `now`: the deployment's speed takes it in, where anything chooses by it."""
        if not self._target.is_measured:
            return
        started_at = self.attempt.started_at
        first_byte_s = self.first_byte_at - started_at if self.streaming else None
        self._target.measure(now, now - started_at, first_byte_s, output_tokens)


def _seconds_until(then: str, now: str) -> float:
    """Between two dates of HTTP: when to come back, and what the backend's clock said; nan if one is none."""
    try:
        return (parsedate_to_datetime(then) - parsedate_to_datetime(now)).total_seconds()
    except (ValueError, TypeError):  # the latter when only one of them has a time zone
        return math.nan


class _Translated:
    """The chunks of a stream in the caller's dialect. Apart from the exchange, so that there is no reference cycle."""

    __slots__ = ("_backend", "_has_ended", "_reader", "_reply")

    def __init__(self, reply: Reply, reader: ReplyReader, backend: Backend) -> None:
        self._reply = reply
        self._reader = reader
        self._backend = backend
        self._has_ended = False

    async def chunk(self) -> bytes:
        while not self._has_ended:
            data = await self._reply.chunk()
            try:
                if data:
                    out = self._reader.feed(data)
                else:
                    self._has_ended = True
                    out = self._reader.rest()
            except BackendRejected as error:  # in its own words, which may quote what we sent
                said = self._backend.without_secrets(error.problem.encode("utf-8", "replace")).decode()
                raise BackendRejected(error.backend, error.status, said, error.retry_after_s) from None
            if out:
                return out
        return b""
