"""Looks an inference up in the cache, lets one of several equal ones ask a backend, and keeps what it is told.

Not for: what determines an answer (cache/key.py), keeping bytes (cache/memory.py, redis.py) or replying.
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_router.cache.base import Cache, Cached, CacheSettings
from llm_router.cache.flight import Flight, Flights
from llm_router.cache.key import Fingerprints, cache_key, cache_wish
from llm_router.chat import InferenceRequest
from llm_router.routing.table import RoutingTable
from llm_router.signals import RequestRecord

_EVENT_STREAM = b"text/event-stream"


class Answers:
    """The cache as the request path sees it. Belongs to one event loop.

    Args:
        cache: where answers are kept; its owner closes it.
        settings: as the cache was opened with.
        table: what serves the models; `follow` exchanges it.
    """

    def __init__(self, cache: Cache, settings: CacheSettings, table: RoutingTable) -> None:
        self._cache = cache
        self._max_entry_bytes = settings.max_entry_bytes
        self._is_per_key = settings.per_key
        self._flights = Flights()
        self._fingerprints = Fingerprints(table)

    def follow(self, table: RoutingTable) -> None:
        """Another table: answers of models that are served otherwise now are not found any more."""
        self._fingerprints = Fingerprints(table)

    async def find(
        self, inference: InferenceRequest, headers: Mapping[bytes, bytes], record: RequestRecord
    ) -> Cached | Keeper | None:
        """The answer; or what keeps the one that a backend will give; or None, where nothing is cached.

        Waits while an equal plain request is being answered; streams do not wait for each other. Writes into the record which cache was asked.
        Raises: InvalidRequest for a header that is not understood.
        """
        wish = cache_wish(headers)
        if not wish.write:
            return None
        owner = record.key_id if self._is_per_key else ""  # a name may be another key's after this one was revoked
        key = cache_key(inference, self._fingerprints.of(inference.model), owner, asked=wish.asked)
        if key is None:
            return None
        record.cache_type = self._cache.type
        if not wish.read:
            return Keeper(self, key, None, stream=inference.stream)
        found = await self._cache.get(key)
        if found is not None:
            return found
        if inference.stream:
            # Whoever streams wants the first words soon; waiting for another's stream would give it none until the end.
            return Keeper(self, key, None, stream=True)
        flight = self._flights.join(key)
        if not flight.leads:
            found = await flight.wait()
            if found is not None:
                return found
        return Keeper(self, key, flight, stream=inference.stream)

    def put(self, key: bytes, answer: Cached) -> None:
        """Keep an answer."""
        self._cache.put(key, answer)

    @property
    def max_entry_bytes(self) -> int:
        """A larger answer is not kept."""
        return self._max_entry_bytes


class Keeper:
    """Takes the answer of one request for the cache, and for those who wait for it. Close it in a `finally`."""

    __slots__ = ("_answers", "_flight", "_is_stream", "_key", "_parts", "_size_bytes")

    def __init__(self, answers: Answers, key: bytes, flight: Flight | None, *, stream: bool) -> None:
        self._answers = answers
        self._key = key
        self._flight = flight
        self._is_stream = stream
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def add(self, events: bytes) -> None:
        """The next events of a stream; beyond what may be kept they are forgotten."""
        self._size_bytes += len(events)
        if self._size_bytes <= self._answers.max_entry_bytes:
            self._parts.append(events)
        else:
            self._parts.clear()

    def keep(self, content_type: bytes, body: bytes | None, backend: str, record: RequestRecord) -> None:
        """The answer is complete. `body` is None for a stream whose events were added.

        What another model answered, because the one that was asked did not, is not kept: next time it may.
        """
        if body is None:
            size, body = self._size_bytes, b"".join(self._parts)
        else:
            size = len(body)
        is_stream = self._is_stream and content_type.startswith(_EVENT_STREAM)
        if record.fallback_reasons or size > self._answers.max_entry_bytes:
            if self._flight is not None:
                self._flight.scatter()
            return
        answer = Cached(content_type or b"application/json", body, is_stream, backend)
        self._answers.put(self._key, answer)
        if self._flight is not None:
            self._flight.land(answer)

    def refuse(self) -> None:
        """The backend refused the request itself: whoever waits with an equal one asks without waiting any longer."""
        if self._flight is not None:
            self._flight.scatter()

    def close(self) -> None:
        """The request ended; if nothing was kept, whoever waits asks a backend."""
        if self._flight is not None:
            self._flight.leave()
