"""What can be configured about logs. Not for: writing them (writer.py)."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Level = Literal["debug", "info", "warning", "error", "critical"]
ConsoleFormat = Literal["auto", "text", "json", "off"]

_DAY_S: Final = 86_400.0
_MIB: Final = 1024 * 1024


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines are written, and how long files are kept.

    Args:
        level: the lowest level that is written, of every logger of ours that `levels` does not name.
        levels: logger names (`llm_router.gateway`) to levels; the longest name that fits decides.
        console: what stderr gets; `auto` is text in colours on a terminal and JSON otherwise.
        access: whether every request gets a line in access.log.
        sample_ratio: of successful requests that were not slow, the share that gets its access and inference lines.
        slow_s: a request that took this long is always written, whatever is sampled.
        content: whether lines hold prompts and completions. Off, nothing of them is ever written.
        metrics_interval_s: how often metrics.log gets the values of the main metrics; 0 for never.
        max_file_bytes, max_age_s: a file that is larger, or older, is rotated.
        keep_s, keep_bytes: rotated files that are older, or the oldest beyond so many bytes of all, are deleted.
        compress: whether rotated files are compressed with gzip.
        queue_lines: lines that may wait to be written; more are dropped and counted.
        max_line_bytes, max_field_bytes: what is longer is cut, and says so.
    """

    level: Level = "info"
    levels: dict[str, str] = {}
    console: ConsoleFormat = "auto"
    access: bool = True
    sample_ratio: float = 1.0
    slow_s: float = 5.0
    content: bool = False
    metrics_interval_s: float = 60.0
    max_file_bytes: int = 100 * _MIB
    max_age_s: float = _DAY_S
    keep_s: float = 14 * _DAY_S
    keep_bytes: int = 1024 * _MIB
    compress: bool = True
    queue_lines: int = 20_000
    max_line_bytes: int = 32 * 1024
    max_field_bytes: int = 8 * 1024
