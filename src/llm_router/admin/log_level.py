"""Log levels over HTTP: which hold, and other ones from now on, for a while or until the router is started again.

Not for: what a level does (observe/logs) or telling the processes about it (whoever gives `on_change`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.admin.application import Audit, caller, doer, json_response, read_body
from llm_router.errors import InvalidRequest
from llm_router.observe.logs.levels import LEVELS, ROOT, ChangedLevels, is_logger, level_named, level_of, loggers
from llm_router.observe.logs.settings import Level, LogSettings
from llm_router.observe.timestamp import timestamp

_log = logging.getLogger(__name__)

MAX_FOR_S: Final = 7 * 86_400.0
"""Who wants a level for longer writes it into the configuration."""

_WHILE: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    level: str | None
    logger: str = ROOT
    duration: str | None = msgspec.field(default=None, name="for")


def routes(
    levels: ChangedLevels,
    configured: Callable[[], LogSettings],
    *,
    on_change: Callable[[], None],
    audit: Audit,
) -> list[Route]:
    """The endpoint `/admin/log-level`.

    Args:
        configured: the settings in force, without `levels`.
        on_change: called after each change; has every process learn of it.
    """

    async def show(request: Request) -> Response:
        return json_response(_document(levels, configured()))

    async def change(request: Request) -> Response:
        wanted = await read_body(request, _Wanted)
        logger = _logger(wanted.logger)
        for_s = _for_s(wanted.duration)
        former = level_of(levels.in_force(configured()), logger)
        until = None
        if wanted.level is None:
            if for_s is not None:
                raise InvalidRequest("for: a level that is taken back is not for a while; leave it out", param="for")
            levels.take_back(logger)
        else:
            until = levels.change(logger, _level(wanted.level), for_s).until
        level = level_of(levels.in_force(configured()), logger)
        on_change()
        shown_until = None if until is None else timestamp(until)
        who = caller(request)
        # As a warning: the level may be one that info does not reach.
        _log.warning(
            "the log level of %s is %s now%s, not %s: by %s",
            logger, level, f" until {shown_until}" if shown_until else "", former, who,
        )  # fmt: skip
        audit("log_level_changed", **doer(request), logger=logger, level=level, former=former, until=shown_until)
        return json_response(_document(levels, configured()))

    return [
        Route("/admin/log-level", show, methods=["GET"]),
        Route("/admin/log-level", change, methods=["PUT"]),
    ]


def _document(levels: ChangedLevels, configured: LogSettings) -> dict[str, Any]:
    in_force = levels.in_force(configured)
    return {
        "level": in_force.level,
        "loggers": dict(sorted(in_force.levels.items())),
        "configured": {"level": configured.level, "loggers": dict(sorted(configured.levels.items()))},
        "changes": [
            {
                "logger": change.logger,
                "level": change.level,
                "until": None if change.until is None else timestamp(change.until),
            }
            for change in levels.changes
        ],
    }


def _level(text: str) -> Level:
    level = level_named(text)
    if level is None:
        raise InvalidRequest(
            f"level: {text[:100]!r} is no level; there are {', '.join(LEVELS)}, and null for what is configured",
            code="unknown_level",
            param="level",
        )
    return level


def _logger(text: str) -> str:
    """The logger's full name; `gateway` is short for `llm_router.gateway`."""
    name = text.strip() or ROOT
    if not is_logger(name) and is_logger(f"{ROOT}.{name}"):
        name = f"{ROOT}.{name}"
    if not is_logger(name):
        ends = {known.rpartition(".")[2]: known for known in loggers()}
        near = get_close_matches(name.rpartition(".")[2][:100], ends, 1)  # the end: what is before it is often alike
        hint = f"; did you mean {ends[near[0]]!r}?" if near else f"; there are {ROOT}, {', '.join(loggers())}"
        raise InvalidRequest(f"logger: there is no logger {text[:100]!r}{hint}", code="unknown_logger", param="logger")
    return name


def _for_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = _WHILE.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 1.0 <= seconds <= MAX_FOR_S:
        raise InvalidRequest(f"for: {text[:40]!r} should be a time like 30s, 10m or 2h, of 1s to 7d", param="for")
    return seconds
