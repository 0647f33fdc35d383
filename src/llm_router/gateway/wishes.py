"""What a caller asks of the routing of one request, by headers: strategy, priority, and how long it may take.

Not for: the cache's headers (cache/key.py) or what the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llm_router.chat import InferenceRequest
from llm_router.errors import InvalidRequest
from llm_router.routing.table import STRATEGIES

_PRIORITIES: Final = ("interactive", "batch")
_MAX_TIMEOUT_S: Final = 86_400.0


def take_wishes(headers: Mapping[bytes, bytes], inference: InferenceRequest, most_s: float = 0.0) -> float:
    """Put the caller's wishes into the request; the body's `strategy` gives way to the header.

    Args:
        most_s: what any request may take; 0 for no such bound. A caller may ask for less.

    Returns: seconds that this request may take in all; 0 for no bound.
    Raises: InvalidRequest, naming the header and what it takes.
    """
    strategy = headers.get(b"x-llm-router-strategy")
    if strategy is not None:
        name = strategy.decode("latin-1").strip().lower()
        if name not in STRATEGIES:
            raise _bad("x-llm-router-strategy", strategy, f"one of {', '.join(STRATEGIES)}")
        inference.strategy = name
    priority = headers.get(b"x-llm-router-priority")
    if priority is not None:
        word = priority.decode("latin-1").strip().lower()
        if word not in _PRIORITIES:
            raise _bad("x-llm-router-priority", priority, "interactive or batch")
        inference.priority = "batch" if word == "batch" else "interactive"
    timeout = headers.get(b"x-llm-router-timeout")
    if timeout is None:
        return most_s
    text = timeout.decode("latin-1").strip().lower()
    try:
        seconds = float(text.removesuffix("ms")) / 1000 if text.endswith("ms") else float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= _MAX_TIMEOUT_S:
        raise _bad(
            "x-llm-router-timeout", timeout, f"seconds or milliseconds up to {_MAX_TIMEOUT_S:g} s, like 30s or 500ms"
        )
    return min(seconds, most_s) if most_s else seconds


def _bad(header: str, value: bytes, wanted: str) -> InvalidRequest:
    # As it came: in other letters nobody would know a key for one.
    return InvalidRequest(
        f"{header}: {value.decode('latin-1')[:40]!r} will not do: it takes {wanted}",
        code="invalid_header",
        param=header,
    )
