"""How many examples a property test looks at under the profile in force."""

from __future__ import annotations

from hypothesis import settings

_USUAL = 100  # hypothesis's own number, which a profile multiplies


def examples(normal: int) -> int:
    """`normal` under the profile of `make test`; as much more as the profile of `make fuzz` asks for."""
    return normal * settings().max_examples // _USUAL
