"""The one form in which instants are written: in log lines, reports and answers alike.

Not for: those of access lines, of which there are so many that their parts are kept (`logs.entry.Times`). Standard library only: the
supervisor imports it.
"""

from __future__ import annotations

import time


def timestamp(unix_s: float) -> str:
    """Unix seconds as ISO 8601 in UTC with milliseconds, cut off: `2026-01-31T12:00:00.000Z`. Any thread."""
    second, microseconds = divmod(round(unix_s * 1e6), 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{microseconds // 1000:03d}Z"
