"""Lets callers in by their keys, and slows down whoever goes on failing.

A key is read from `authorization: Bearer`, `x-api-key` or `api-key`, never from the query: addresses end up in logs.
Failures are counted by address, in bounded memory. A valid key is never slowed, whatever its address did: behind one
address there may be an office. Not for: what a key may use up (accounts/limiter.py) or web pages (accounts/access.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NamedTuple

from llm_router.accounts.keys import KeyRing, KeySpec
from llm_router.errors import Forbidden, TooManyFailures, Unauthorized

FREE_FAILURES: Final = 5
"""So many are answered at once: a person who pastes the wrong key and tries again notices nothing."""

DELAYS_S: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""How long the answers to the next failures are held back; those after them are 429. An address has at most so many
held at the same time."""

FORGIVEN_AFTER_S: Final = 10.0
"""Seconds for which one failure counts against its address."""

MAX_COUNT: Final = FREE_FAILURES + len(DELAYS_S) + 6
"""No more are counted, so that an address is answered with 401 again at most a minute after the last failure."""

MAX_ADDRESSES: Final = 4096
"""Addresses remembered, about 1 MB; those that failed longest ago are forgotten first."""

MAX_HELD: Final = 64
"""Answers held back at a time in one process, of all addresses: each keeps its connection and its task."""

_MISSING: Final = "a key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
_INVALID: Final = "this key is not valid: there is none like it, or no longer"
_BEARER: Final = b"bearer "


class FailureStatistics(NamedTuple):
    """`addresses` are remembered, `held` answers are being held back."""

    addresses: int
    held: int


class Failures:
    """Which addresses failed to show a valid key lately, and how they are slowed. Lives in one event loop.

    Args:
        clock: monotonic seconds.
        max_held: answers held back at a time.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        max_held: int = MAX_HELD,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._max_held = max_held
        self._pause = pause
        self._held = 0
        self._counts: dict[str, tuple[float, float]] = {}  # network -> (count, when); the latest failure last

    def __repr__(self) -> str:
        return f"Failures({self.statistics()})"

    def statistics(self) -> FailureStatistics:
        return FailureStatistics(len(self._counts), self._held)

    def failed(self, address: str, *, was_shown: bool) -> Unauthorized:
        """Count a failure; the error to answer with, which `hold` holds back for its `delay_s`.

        Args:
            address: the caller's IP address, without port; empty if unknown.
            was_shown: whether there was a key at all.
        """
        now, network = self._clock(), _network(address)
        before, failed_at = self._counts.pop(network, (0.0, now))
        count = max(0.0, before - (now - failed_at) / FORGIVEN_AFTER_S)
        counted = min(count + 1.0, float(MAX_COUNT))
        self._counts[network] = (counted, now)
        if len(self._counts) > MAX_ADDRESSES:
            del self._counts[next(iter(self._counts))]
        step = int(count) - FREE_FAILURES
        if step >= len(DELAYS_S):
            wait_s = (counted - FREE_FAILURES - len(DELAYS_S)) * FORGIVEN_AFTER_S
            return _too_many(wait_s + 1.0)  # one more, so that it is enough after it was rounded
        return Unauthorized(_INVALID if was_shown else _MISSING, delay_s=DELAYS_S[step] if step >= 0 else 0.0)

    async def hold(self, error: Unauthorized) -> Unauthorized:
        """Wait for as long as the answer is to be held back. Returns: what to answer, 429 if too many are held already.

        The caller should have let go of the request's body: it would be kept for as long.
        """
        if not error.delay_s:
            return error
        if self._held >= self._max_held:
            return _too_many(error.delay_s)
        self._held += 1
        try:
            await self._pause(error.delay_s)
        finally:
            self._held -= 1
        return error


class Doorman:
    """Says whose request it is. Runs on every inference request; lives in one event loop.

    Closed until the first `update`: before it is known which keys there are, nobody gets in.

    Args:
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    def __init__(self, *, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.failures = Failures(clock=clock)
        self._wall = wall
        self._ring = KeyRing()
        self._is_key_needed = True

    def __repr__(self) -> str:
        return f"Doorman({self._ring!r}, key_needed={self._is_key_needed}, {self.failures!r})"

    def update(self, keys: Iterable[KeySpec], key_needed: bool) -> None:
        """Take other keys from the next request on. Failures are not forgotten."""
        self._ring = KeyRing(keys)
        self._is_key_needed = key_needed

    def identify(self, headers: Mapping[bytes, bytes], client: str) -> KeySpec | None:
        """The caller's key; None where none is needed and none that is valid was shown.

        Args:
            headers: names in lower case.
            client: `ip:port`, empty if unknown.
        Raises: Unauthorized, to be answered after `hold`; Forbidden for a key without the scope.
        """
        key = find_key(self._ring, headers, self._wall())
        if not self._is_key_needed:
            return key
        if key is None:
            raise self.failures.failed(client.rpartition(":")[0], was_shown=is_key_shown(headers))
        if not key.has("inference"):
            raise lacking(key, "inference")
        return key

    async def hold(self, error: Unauthorized) -> Unauthorized:
        """As `Failures.hold`."""
        return await self.failures.hold(error)

    @staticmethod
    def check_model(key: KeySpec | None, model: str) -> None:
        """Raise Forbidden if the key is not meant for the model. To be asked before whether there is such a model."""
        if key is not None and not key.may_ask(model):
            raise Forbidden(f"the key {key.name!r} may not ask the model {model[:200]!r}")


def find_key(ring: KeyRing, headers: Mapping[bytes, bytes], wall_time: float) -> KeySpec | None:
    """The key that a request shows in any of the three headers, if it is valid.

    Each is looked at: a proxy's own token may stand in `authorization` beside a key of ours.

    Args:
        headers: names in lower case.
        wall_time: Unix seconds now.
    """
    given = headers.get(b"authorization")
    if given is not None and given[:7].lower() == _BEARER:
        key = ring.find(given[7:].strip(), wall_time)
        if key is not None:
            return key
    given = headers.get(b"x-api-key")
    if given is not None:
        key = ring.find(given, wall_time)
        if key is not None:
            return key
    given = headers.get(b"api-key")
    return None if given is None else ring.find(given, wall_time)


def is_key_shown(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request shows anything that could be a key."""
    return headers.get(b"authorization", b"")[:7].lower() == _BEARER or b"x-api-key" in headers or b"api-key" in headers


def lacking(key: KeySpec, scope: str) -> Forbidden:
    """The error for a valid key that does not give the right to what was asked."""
    return Forbidden(f"the key {key.name!r} has not the scope {scope!r}, which this needs")


def _too_many(retry_after_s: float) -> TooManyFailures:
    return TooManyFailures(
        f"too many requests without a valid key came from this address; ask again in {max(1, round(retry_after_s))} s, "
        f"or at any time with a valid key",
        retry_after_s=retry_after_s,
    )


def _network(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 network that one IPv6 customer has at the least."""
    try:
        parsed = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return ""  # unknown ones are one address
    if parsed.version == 6:
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
