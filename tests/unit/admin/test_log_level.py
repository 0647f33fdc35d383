"""Log levels over HTTP: shown, changed for a while or for good, taken back, and never silently."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import KeyRing
from llm_router.admin import log_level
from llm_router.admin.application import Entry, Rights, build
from llm_router.observe.logs.levels import ChangedLevels
from llm_router.observe.logs.settings import LogSettings
from llm_router.testing import FakeClock
from support.admin import Doors, serving
from support.aio import run
from support.ask import Answer, ask

CONFIGURED = LogSettings(level="info", levels={"llm_router.cache": "error"})
AS_CONFIGURED = {"level": "info", "loggers": {"llm_router.cache": "error"}}


class Site:
    """The endpoint, open. `told` counts how often the processes would have learned of a change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock(1_700_000_000.0)  # 2023-11-14T22:13:20Z
        self.levels = ChangedLevels(self.clock)
        self.told = 0
        self.audited: list[tuple[str, dict[str, Any]]] = []
        self.doors: Doors

    def _tell(self) -> None:
        self.told += 1

    def _audit(self, event: str, /, **data: Any) -> None:
        self.audited.append((event, data))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        rights = Rights(KeyRing(), {entry: frozenset() for entry in Entry})
        routes = log_level.routes(self.levels, lambda: CONFIGURED, on_change=self._tell, audit=self._audit)
        app = build(routes, lambda: Guard(AccessSettings()), lambda: rights)
        async with serving(app, self.folder) as self.doors:
            yield self

    async def show(self) -> Any:
        return (await ask(self.doors.cli, "/admin/log-level")).json()

    async def put(self, **body: Any) -> Answer:
        return await ask(self.doors.cli, "/admin/log-level", method="PUT", body=body)


def test_a_level_is_changed_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, audited and logged; afterwards what is configured holds again."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            assert await site.show() == {**AS_CONFIGURED, "configured": AS_CONFIGURED, "changes": []}
            answer = await site.put(level="debug", logger="llm_router.gateway", **{"for": "10m"})
            assert answer.status == 200
            assert answer.json() == await site.show()
            assert answer.json() == {
                "level": "info",
                "loggers": {"llm_router.cache": "error", "llm_router.gateway": "debug"},
                "configured": AS_CONFIGURED,
                "changes": [{"logger": "llm_router.gateway", "level": "debug", "until": "2023-11-14T22:23:20.000Z"}],
            }
            assert site.told == 1
            data = {
                "actor": "the command line", "logger": "llm_router.gateway", "level": "debug", "former": "info",
                "until": "2023-11-14T22:23:20.000Z",
            }  # fmt: skip
            assert site.audited == [("log_level_changed", data)]
            assert "llm_router.gateway is debug now until 2023-11-14T22:23:20.000Z, not info" in caplog.text
            site.clock.advance(600.0)
            assert len(site.levels.end_due()) == 1
            assert (await site.show())["loggers"] == AS_CONFIGURED["loggers"]

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_the_level_of_all_is_changed_for_good_and_taken_back(tmp_path: Path) -> None:
    """Without a logger, all that have no level of their own are meant; null takes a change back."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            changed = (await site.put(level="WARN")).json()
            assert changed["level"] == "warning"
            assert changed["changes"] == [{"logger": "llm_router", "level": "warning", "until": None}]
            assert (await site.put(level="error", logger="cache.redis")).json()["loggers"] == {
                "llm_router.cache": "error",
                "llm_router.cache.redis": "error",
            }
            assert (await site.put(level=None, logger="cache.redis")).json()["loggers"] == AS_CONFIGURED["loggers"]
            back = await site.put(level=None)
            assert back.json() == {**AS_CONFIGURED, "configured": AS_CONFIGURED, "changes": []}
            assert [data["level"] for _, data in site.audited] == ["warning", "error", "error", "info"]
            assert site.told == 4

    run(scenario())


@pytest.mark.parametrize(
    ("body", "code", "problem"),
    [
        (
            {"level": "loud"},
            "unknown_level",
            "level: 'loud' is no level; there are debug, info, warning, error, critical",
        ),
        ({"level": "debug", "logger": "llm_router.gatway"}, "unknown_logger", "did you mean 'llm_router.gateway'?"),
        ({"level": "debug", "logger": "gatway"}, "unknown_logger", "did you mean 'llm_router.gateway'?"),
        (
            {"level": "debug", "logger": "uvicorn"},
            "unknown_logger",
            "there is no logger 'uvicorn'; there are llm_router,",
        ),
        ({"level": "debug", "logger": "../../etc"}, "unknown_logger", "there is no logger '../../etc'"),
        ({"level": "debug", "for": "soon"}, "invalid_request", "for: 'soon' should be a time like 30s, 10m or 2h"),
        ({"level": "debug", "for": "8d"}, "invalid_request", "of 1s to 7d"),
        ({"level": "debug", "for": "10ms"}, "invalid_request", "of 1s to 7d"),
        ({"level": None, "for": "10m"}, "invalid_request", "taken back"),
        ({}, "invalid_type", "level"),
        ({"level": 10}, "invalid_type", "level"),
        ({"level": "debug", "until": "10m"}, "invalid_type", "until"),
    ],
)
def test_bad_input_changes_nothing(tmp_path: Path, body: dict[str, Any], code: str, problem: str) -> None:
    """It says what is wrong and what there is."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answer = await site.put(**body)
            assert answer.status == 400
            assert answer.json()["error"]["code"] == code
            assert problem in answer.json()["error"]["message"]
            assert (site.told, site.audited, site.levels.changes) == (0, [], ())

    run(scenario())
