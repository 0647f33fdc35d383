"""Makes a usage row of every inference that ends, beside its metrics.

Not for: metrics (instruments.py) or what becomes of rows (usage_outbox.py).
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Callable
from typing import Final

from llm_router.accounts.usage import UsageRow
from llm_router.observe.logs.redact import redact_keys
from llm_router.signals import Around, Recorder, RequestRecord

_HARMLESS: Final = re.compile(r"[0-9a-f-]{1,128}").fullmatch
"""The ids that the gateway gives, and UUIDs: no key looks like them."""


class UsageRecorder(Around):
    """A recorder that hands everything on, and a row for each inference as well.

    Args:
        inner: what else is to be told.
        add: takes a row; must be cheap and must not raise.
        wall: Unix seconds.
    """

    def __init__(
        self, inner: Recorder, add: Callable[[UsageRow], None], *, wall: Callable[[], float] = time.time
    ) -> None:
        super().__init__(inner)
        self._add = add
        self._wall = wall
        # Unique over all workers and starts: a row that is sent again must be known as the same.
        self._prefix = secrets.token_hex(8) + "-"
        self._numbers = itertools.count(1)

    def finish(self, record: RequestRecord, now: float) -> None:
        if record.finished:
            return
        self._finish(record, now)
        if record.is_inference:
            attempts = record.attempts
            self._add(
                UsageRow(
                    id=f"{self._prefix}{next(self._numbers):x}",
                    time=self._wall(),
                    # Of an id that a caller gave one cannot know that it is no key; the others are the gateway's own.
                    request_id=_shown(record.request_id) if b"x-request-id" in record.headers else record.request_id,
                    key_id=record.key_id,
                    key=record.key,
                    model=record.model,
                    backend=attempts[-1].backend if attempts else "",
                    strategy=record.strategy,
                    input_tokens=record.input_tokens,
                    output_tokens=record.output_tokens,
                    cached_tokens=record.cached_tokens,
                    reasoning_tokens=record.reasoning_tokens,
                    usage_source=record.usage_source,
                    cost_usd=record.cost_usd,
                    cost_status=record.cost_status,
                    cached=record.cached,
                    outcome=record.outcome,
                    status=record.status,
                    duration_s=now - record.started_at,
                )
            )


def _shown(request_id: str) -> str:
    return request_id if _HARMLESS(request_id) else redact_keys(request_id)
