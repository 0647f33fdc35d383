"""The check `database`: whether the store of keys and usage answers a query.

Blocking, so the scheduler runs it in a thread and bounds it; a query that hangs is not started a second time.
Not for: reading anything (bookkeeping.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_router.errors import RouterError
from llm_router.observe.health.checks import Check, failed, passed


class DatabaseCheck:
    """Asks the store for next to nothing.

    Args:
        query: blocks until the store has answered. Raises: RouterError with what is wrong, without secrets.
    """

    def __init__(self, query: Callable[[], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._query = query
        self._clock = clock

    def check(self) -> Check:
        """`value` is the milliseconds that the answer took."""
        begin = self._clock()
        try:
            self._query()
        except Exception as error:
            # Only our own errors are known to hold no address with a password.
            problem = error.message if isinstance(error, RouterError) else type(error).__name__
            return failed(f"The database does not answer: {problem}", details={"error": problem})
        took_ms = round((self._clock() - begin) * 1000, 3)
        return passed("The database answers", details={"latency_ms": took_ms})
