"""What can be configured about profiles. Not for: taking them (sampler.py, memory.py)."""

from __future__ import annotations

import msgspec


class ProfilerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and how profiles are taken.

    Args:
        enabled: off, there is no route, no thread and no cost.
        rate_hz: samples for each second of CPU time, of a profile that is asked for.
        continuous_hz: the same of the one that always runs; 0 for none.
        continuous_s: how far back that one reaches.
    """

    enabled: bool = False
    rate_hz: float = 100.0
    continuous_hz: float = 2.0
    continuous_s: float = 3600.0
