"""A key as it is kept: what workers know of it, and its history.

Not for: keeping it (store.py).
"""

from __future__ import annotations

from llm_router.accounts.keys import KeySpec


class StoredKey(KeySpec, frozen=True, kw_only=True):
    """A key that was made, whether or not it is still valid. Times are Unix seconds.

    Args:
        revoked_time: None while it is not revoked; a revoked key stays, so that its usage has a name.
        last_used_time: end of the last inference with it whose usage is stored; None if there is none.
    """

    created_time: float
    revoked_time: float | None = None
    last_used_time: float | None = None

    def __repr__(self) -> str:
        return f"StoredKey({self.id!r}, {self.name!r}, scopes={self.scopes}, revoked={self.revoked_time is not None})"

    def spec(self) -> KeySpec:
        """What workers know of it."""
        return KeySpec(**{name: getattr(self, name) for name in KeySpec.__struct_fields__})

    def is_valid(self, wall_time: float) -> bool:
        """Whether it is neither revoked nor expired at `wall_time`."""
        return self.revoked_time is None and (self.expires_time is None or wall_time < self.expires_time)
