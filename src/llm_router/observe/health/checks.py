"""What a check says: the outcome record, and what the return value of any check function amounts to.

A check function takes nothing, may be synchronous or not, and returns a `Check`, True or False, or a mapping like
`{"healthy": True, "message": "...", "details": {...}}`. It fails by saying so or by raising. Whatever else comes back
is a failure whose message tells what came and what may come: a health page that breaks on a bad check helps nobody.
Messages and details lose what looks like a secret, as those of exceptions often hold a URL with a password.
Not for: when checks run (scheduler.py), how often one must fail to count (standing.py), what all say together (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import msgspec

from llm_router.errors import RouterError
from llm_router.observe.logs.redact import clean, clean_value

Status = Literal["healthy", "degraded", "critical", "initializing"]

STATUS_VALUES: Final[Mapping[str, float]] = {"healthy": 1.0, "degraded": 0.5, "critical": 0.0, "initializing": 0.0}
"""The words as `health_check_status` shows them."""

MAX_MESSAGE: Final = 500
"""Characters of a message; an exception may carry a whole reply."""

MAX_DETAILS_BYTES: Final = 4096
"""Of one check, as JSON: the report lists dozens of checks and is read every few seconds."""

CheckFunction: TypeAlias = Callable[[], "object | Awaitable[object]"]
"""Blocking functions run in a thread; coroutine functions in the loop, which they must not block."""

_MAY_RETURN: Final = "True, False, a mapping with 'healthy', or a Check"
_OWN_KEYS: Final = frozenset(("healthy", "status", "message", "details", "value", "threshold", "unit"))


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one check.

    Args:
        status: healthy; degraded: it works, but not as it should; critical: it does not work. What a failure means for
            the router is not the check's to say: registered without `critical=True`, it degrades the router at most.
        value, threshold: what was measured, in `unit`, and where it begins to be too much or too little. A check that
            measures nothing has 1 or 0 of 1.
        message: one sentence for people.
        details: more of it, as JSON; at most `MAX_DETAILS_BYTES`.
        extra: keys that stand beside the common ones in the report.
    """

    status: Status
    value: float
    threshold: float
    message: str
    details: Mapping[str, Any] = {}
    unit: str = ""
    extra: Mapping[str, Any] = {}

    @property
    def is_healthy(self) -> bool:
        return self.status == "healthy"


def passed(
    message: str,
    *,
    value: float = 1.0,
    threshold: float = 1.0,
    details: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Check:
    """The outcome of a check that is content."""
    return Check(status="healthy", value=value, threshold=threshold, message=message, details=details or {}, unit=unit)


def failed(
    message: str,
    *,
    status: Literal["degraded", "critical"] = "critical",
    value: float = 0.0,
    threshold: float = 1.0,
    details: Mapping[str, Any] | None = None,
    unit: str = "",
) -> Check:
    """The outcome of a check that is not content: `critical` if it does not work at all, `degraded` if it does in part."""
    return Check(status=status, value=value, threshold=threshold, message=message, details=details or {}, unit=unit)


class BadResult(ValueError):
    """A check function returned what is no outcome; the message says what, and what may be returned."""


def outcome_of(result: object) -> Check:
    """What a check function's result says.

    Raises: BadResult.
    """
    if isinstance(result, Check):
        return _bounded(result)
    if isinstance(result, bool):
        return passed("The check passed") if result else failed("The check returned False")
    if isinstance(result, Mapping):
        return _bounded(_from_mapping(result))
    kind = "nothing (None)" if result is None else f"{type(result).__name__} {_short(repr(result), 60)}"
    raise BadResult(f"the check returned {kind}; it may return {_MAY_RETURN}")


def outcome_of_error(error: BaseException) -> Check:
    """The failure that an exception of a check function amounts to."""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be shown"
    if isinstance(error, BadResult):
        return failed(clean(text, MAX_MESSAGE))
    # Our own messages are sentences; a foreign one is often only a number or a key without the kind of error before it.
    if not isinstance(error, RouterError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return failed(f"Check failed: {clean(text, MAX_MESSAGE)}")


def weighed(status: Status, *, is_critical: bool) -> Status:
    """What a check's word means for the router: a check that is not critical degrades it at most."""
    return "degraded" if status == "critical" and not is_critical else status


def _from_mapping(result: Mapping[Any, Any]) -> Check:
    status, healthy = result.get("status"), result.get("healthy")
    if healthy is None and status is None:
        raise BadResult(f"the check returned a mapping without 'healthy'; it may return {_MAY_RETURN}")
    if healthy is not None and not isinstance(healthy, bool):
        raise BadResult(f"the check returned 'healthy' as {_short(repr(healthy), 60)}; it is True or False")
    if status is not None and status not in get_args(Status):
        raise BadResult(
            f"the check returned the status {_short(repr(status), 60)}; it is one of {', '.join(get_args(Status))}"
        )
    if healthy is not None and status is not None and healthy != (status == "healthy"):
        raise BadResult(f"the check returned 'healthy' as {healthy} together with the status {status!r}")
    is_healthy = status == "healthy" if healthy is None else healthy
    details = result.get("details", {})
    if details is None:
        details = {}
    if not isinstance(details, Mapping):
        raise BadResult(f"the check returned 'details' as {type(details).__name__}; they are a mapping")
    message = result.get("message")
    return Check(
        status=status or ("healthy" if is_healthy else "critical"),
        value=_number(result, "value", float(is_healthy)),
        threshold=_number(result, "threshold", 1.0),
        message=str(message) if message else ("The check passed" if is_healthy else "The check did not pass"),
        details=details,
        unit=str(result.get("unit") or ""),
        extra={str(key): value for key, value in result.items() if key not in _OWN_KEYS},
    )


def _number(result: Mapping[Any, Any], key: str, usual: float) -> float:
    value = result.get(key)
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadResult(f"the check returned {key!r} as {_short(repr(value), 60)}; it is a finite number")
    return float(value)


def _bounded(check: Check) -> Check:
    """The same outcome, fit for the report: finite numbers, a bounded message, details that are JSON and few, and
    nowhere a secret."""
    if not (math.isfinite(check.value) and math.isfinite(check.threshold)):
        raise BadResult(f"the check returned {check.value} of {check.threshold}; both are finite numbers")
    return msgspec.structs.replace(
        check,
        message=clean(check.message, MAX_MESSAGE),
        details=_plain(check.details),
        extra=_plain(check.extra),
    )


def _plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """The details as JSON knows them; when they are too many, only that they were."""
    if not details:
        return {}
    encoded = msgspec.json.encode(clean_value(details), enc_hook=str)
    if len(encoded) > MAX_DETAILS_BYTES:
        return {"omitted": f"the details have {len(encoded)} bytes; {MAX_DETAILS_BYTES} are shown at most"}
    plain: dict[str, Any] = msgspec.json.decode(encoded)
    return plain


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"
