"""Who is calling: keys as workers and control know them, and how one is found by its text.

A key is 256 random bits; only its SHA-256 is kept, and looking it up by that digest takes the same time whether or
not it exists. Not for: storing keys (store.py), handing them out (admin/keys.py) or reading them from requests
(gateway/auth.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import sha256
from typing import Final, Literal

import msgspec

from llm_router.accounts.limits import Limits

KeyScope = Literal["inference", "metrics:read", "admin"]
SCOPES: Final[tuple[KeyScope, ...]] = ("inference", "metrics:read", "admin")

KEY_PREFIX: Final = "sk-llmr-"
"""By it people, and scanners that look for secrets in code, recognise a key of this router."""

_KEY_BYTES: Final = 32
_ID_BYTES: Final = 8


class KeySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A key that is valid, or will no longer be after `expires_time`.

    Args:
        id: public, stable over renaming.
        name: what people call it; a label value; unique among keys that are not revoked.
        digest: SHA-256 of the key's text, 32 bytes.
        models: names of models that it may ask; empty for all.
        expires_time: Unix seconds; None for never.
    """

    id: str
    name: str
    digest: bytes
    scopes: tuple[KeyScope, ...] = ("inference",)
    models: tuple[str, ...] = ()
    expires_time: float | None = None
    limits: Limits = Limits()

    def __repr__(self) -> str:
        return f"KeySpec({self.id!r}, {self.name!r}, scopes={self.scopes})"

    def has(self, scope: KeyScope) -> bool:
        """Whether it gives this right. `admin` includes `metrics:read`, but not `inference`: what administers the
        router should not lie in every program that asks models."""
        return scope in self.scopes or (scope == "metrics:read" and "admin" in self.scopes)

    def may_ask(self, model: str) -> bool:
        """Whether it is meant for this model."""
        return not self.models or model in self.models


def new_key() -> str:
    """The text of a new key: `sk-llmr-` and 43 characters that hold 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def new_id() -> str:
    """An id for a new key, which says nothing about its text."""
    return "key-" + secrets.token_hex(_ID_BYTES)


def digest_of(text: str) -> bytes:
    """What is kept of a key's text, 32 bytes. A plain hash is enough: nobody guesses 256 random bits."""
    return sha256(text.encode()).digest()


class KeyRing:
    """The keys that there are, by their digests. Immutable; safe across threads."""

    __slots__ = ("_by_digest",)

    def __init__(self, keys: Iterable[KeySpec] = ()) -> None:
        self._by_digest = {key.digest: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_digest)

    def __repr__(self) -> str:
        return f"KeyRing({len(self)} keys)"

    def find(self, text: bytes, wall_time: float) -> KeySpec | None:
        """The key with this text, unless it is unknown or has expired.

        What the dict compares are digests: how far one agrees with a digest that exists tells nothing about the text
        that would make it agree further.

        Args:
            wall_time: Unix seconds now.
        """
        key = self._by_digest.get(sha256(text).digest())
        if key is None or (key.expires_time is not None and key.expires_time <= wall_time):
            return None
        return key


def closed_scopes(held: Iterable[KeySpec], *, always: bool) -> frozenset[KeyScope]:
    """The scopes for which callers of a listener need a key.

    Args:
        held: every key that was ever made, expired and revoked ones included: that a key ends must never open what
            it closed, and a caller whose key was revoked must learn it also if it was the only one.
        always: whether a key is needed before there is one, as it is where other machines can reach the listener.
    """
    return frozenset(SCOPES) if always else frozenset(scope for key in held for scope in key.scopes)
