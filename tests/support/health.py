"""The health report of a running router, as whoever watches it asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from support.callers import Reply, request
from support.serving import Serving
from support.wait import until


class HealthPage:
    """`GET /health` of a router. `key` where one is needed."""

    def __init__(self, serving: Serving, key: str = "") -> None:
        self._serving = serving
        self._key = key

    def reply(self, path: str = "/health", *, app: bool = False, headers: Mapping[str, str] | None = None) -> Reply:
        """What the monitoring port answers; the app port if `app`."""
        port = self._serving.port if app else self._serving.metrics_port
        return request(port, "GET", path, key=self._key, headers=headers)

    def document(self) -> dict[str, Any]:
        """The report, whatever it says."""
        reply = self.reply()
        assert reply.status in {200, 503}, (reply.status, reply.body)
        document: dict[str, Any] = reply.json()
        return document

    def check(self, name: str) -> dict[str, Any]:
        """One check of the report."""
        checks = self.document()["checks"]
        assert name in checks, f"no {name} among {', '.join(checks)}"
        check: dict[str, Any] = checks[name]
        return check

    def until(
        self, name: str, wanted: str | Callable[[dict[str, Any]], Any], timeout_s: float = 15.0
    ) -> dict[str, Any]:
        """A check as soon as it has this status, or the predicate holds for it."""
        seen: dict[str, Any] = {}

        def look() -> bool:
            nonlocal seen
            seen = self.check(name)
            return bool(seen["status"] == wanted if isinstance(wanted, str) else wanted(seen))

        try:
            until(look, timeout_s, f"{name} as wanted")
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen}") from None
        return seen

    def until_status(self, status: str, code: int, timeout_s: float = 15.0) -> dict[str, Any]:
        """The whole report as soon as it says `status`; its HTTP status must be `code` then."""
        replies: list[Reply] = []

        def look() -> bool:
            replies.append(self.reply())
            return replies[-1].status != 0 and replies[-1].json().get("status") == status

        try:
            until(look, timeout_s, f"health {status}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {replies[-1].body.decode()}") from None
        assert replies[-1].status == code, replies[-1].body
        document: dict[str, Any] = replies[-1].json()
        return document
