"""Profiles over HTTP: of one process, for some seconds, as a file.

Every order is audited, whatever came of it. The route is there only where profiles are switched on. Not for: taking
them (observe/profiling) or finding the process (processes/profiles.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.admin.application import Audit, doer, read_body, read_query
from llm_router.errors import InvalidRequest, RouterError
from llm_router.observe.profiling.formats import CONTENT_TYPES, FILE_ENDINGS
from llm_router.observe.profiling.profile import FORMATS, KINDS, MAX_SECONDS, Format, Kind

USUAL_SECONDS: Final = 10.0
MIN_SECONDS: Final = 0.1
"""Ten samples; less says nothing."""

MAX_BACK_S: Final = 7 * 86_400.0
"""Of the samples that are always taken; how far they really go back says `profiler.continuous`."""

_USUAL_BACK_S: Final = 3600.0
_PARAMETERS: Final = ("process", "kind", "seconds", "format")

Word = TypeVar("Word", bound=str)


class Profiles(Protocol):
    """Whoever has profiles taken."""

    async def take(self, process: str, kind: Kind, seconds: float, format: Format) -> bytes:
        """Take one, written down. Raises: InvalidRequest, ProfileRunning, CannotProfile."""


def routes(profiles: Profiles, *, audit: Audit, now: Callable[[], float]) -> list[Route]:
    """The endpoint `/debug/profile?process=worker-0&kind=cpu&seconds=10&format=speedscope`, every part optional.

    Args:
        now: Unix time in seconds.
    """

    async def take(request: Request) -> Response:
        await read_body(request, dict)
        wanted = read_query(request, _PARAMETERS)
        process = wanted.get("process", "worker-0")
        kind = _word(wanted, "kind", KINDS, "cpu")
        format = _word(wanted, "format", FORMATS, "speedscope")
        seconds = _seconds(wanted.get("seconds"), kind)
        outcome, size = "failed", 0
        try:
            body = await profiles.take(process, kind, seconds, format)
            outcome, size = "taken", len(body)
        except RouterError as error:
            outcome = error.code
            raise
        finally:
            audit(
                "profile_taken",
                **doer(request),
                success=outcome == "taken",
                process=process[:100],
                kind=kind,
                seconds=seconds,
                written_as=format,
                outcome=outcome,
                size_bytes=size,
            )
        at = datetime.fromtimestamp(now(), UTC)
        name = f"{process}-{kind}-{at:%Y%m%dT%H%M%SZ}.{FILE_ENDINGS[format]}"
        return Response(
            body,
            headers={
                "content-type": CONTENT_TYPES[format],
                "content-disposition": f'attachment; filename="{name}"',
                "cache-control": "no-store",
            },
        )

    return [Route("/debug/profile", take, methods=["POST"])]


def _word(wanted: Mapping[str, str], name: str, known: tuple[Word, ...], usual: Word) -> Word:
    text = wanted.get(name, usual)
    for word in known:
        if text == word:
            return word
    raise InvalidRequest(
        f"{name}={text[:100]!r} is none that there is; there are {', '.join(known)}", code="invalid_profile", param=name
    )


def _seconds(text: str | None, kind: Kind) -> float:
    most = MAX_BACK_S if kind == "continuous" else MAX_SECONDS
    if text is None:
        return _USUAL_BACK_S if kind == "continuous" else USUAL_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_SECONDS <= seconds <= most:  # nor is nan
        raise InvalidRequest(
            f"seconds={text[:100]!r} is no number from {MIN_SECONDS:g} to {most:g}",
            code="invalid_profile",
            param="seconds",
        )
    return seconds
