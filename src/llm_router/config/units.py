"""Durations and sizes as people write them: `30s`, `1m30s`, `250ms`, `2GiB`.

Not for: anything without a unit; a bare number is refused, because nobody remembers which unit it would have.
"""

from __future__ import annotations

import re
from typing import Final

_DURATION_PARTS: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_BYTES: Final = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def seconds(text: str) -> float:
    """The seconds in a duration like `1m30s`; each part is a number and one of ms, s, m, h, d. `0` is zero.

    Raises: ValueError, saying what to write.
    """
    compact = text.strip().replace(" ", "")
    if compact == "0":
        return 0.0
    total, end = 0.0, 0
    for part in _DURATION_PARTS.finditer(compact):
        if part.start() != end:
            break
        total += float(part[1]) * _SECONDS[part[2]]
        end = part.end()
    if not compact or end != len(compact):
        raise ValueError("a duration has a unit, like 30s, 1m30s or 250ms")
    return total


def size_bytes(text: str) -> int:
    """The bytes in a size like `2GiB` (powers of 1024) or `2GB` (powers of 1000). `0` is zero.

    Raises: ValueError, saying what to write.
    """
    compact = text.strip()
    if compact == "0":
        return 0
    match = _SIZE.fullmatch(compact)
    if match is None or match[2].lower() not in _BYTES:
        raise ValueError("a size has a unit, like 64KiB, 10MiB or 2GB")
    return int(float(match[1]) * _BYTES[match[2].lower()])


def show_seconds(value: float) -> str:
    """A duration as `seconds` reads it: `90.0` is `1m30s`, `0.25` is `250ms`."""
    if value == 0:
        return "0"
    text = ""
    milliseconds = round(value * 1000)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, milliseconds = divmod(milliseconds, size)
        if count:
            text += f"{count}{unit}"
    return text


def show_bytes(value: int) -> str:
    """A size as `size_bytes` reads it: `65536` is `64KiB`; what is no whole number of KiB is in bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % _BYTES[unit.lower()] == 0:
            return f"{value // _BYTES[unit.lower()]}{unit}"
    return f"{value}B"
