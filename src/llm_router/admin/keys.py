"""Keys over HTTP: which there are, make one, change it, revoke it.

The text of a key is in the reply to its creation and nowhere else: not in the list, not in a log. Not for: keeping
keys (accounts/store.py) or judging requests by them (application.py, gateway/auth.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.accounts.keys import KEY_PREFIX, SCOPES, KeyScope, digest_of, new_id, new_key
from llm_router.accounts.limits import KINDS, Limits
from llm_router.accounts.stored import StoredKey
from llm_router.admin.application import Audit, caller, doer, json_response, read_body
from llm_router.errors import InvalidRequest
from llm_router.observe.logs.redact import redact
from llm_router.observe.timestamp import timestamp

_log = logging.getLogger(__name__)

MAX_NAME: Final = 64
"""Characters of a key's name, which becomes a label value and a column of every usage row."""

MAX_MODELS: Final = 1000
MAX_MODEL_NAME: Final = 256
MAX_LIMIT: Final = 10**15
"""Whatever is counted: beyond it sums would no longer be exact everywhere."""

_MAX_TIME: Final = 253402300799.0  # the end of the year 9999, the last one that can be written
_MONEY: Final = ("usd_per_day", "usd_per_month")

Number = int | float


class KeyBook(Protocol):
    """Whoever keeps the keys. A change reaches the workers within a second after the call returned.

    Every method raises StoreUnavailable while keys cannot be read or kept.
    """

    async def list(self) -> Sequence[StoredKey]:
        """Every key that was ever made, revoked ones included, in order of creation."""

    async def add(self, key: StoredKey) -> None:
        """Keep a new key. Raises: InvalidRequest with status 409 if a valid one has its name."""

    async def change(self, id: str, fields: Mapping[str, Any]) -> StoredKey:
        """Replace these fields (name, scopes, models, expires_time, limits) of a key that is not revoked.

        Raises: InvalidRequest with status 404 for one that is unknown or revoked, 409 if another one has the name.
        """

    async def revoke(self, id: str) -> StoredKey:
        """Revoke a key; one that was revoked already stays as it is. Raises: InvalidRequest with status 404."""


class ShownKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is shown. Times are ISO 8601 in UTC, null for never.

    Args:
        last_used: end of the last inference with it.
    """

    id: str
    name: str
    state: Literal["valid", "expired", "revoked"]
    scopes: tuple[KeyScope, ...]
    models: tuple[str, ...]
    limits: Limits
    created: str
    expires: str | None
    revoked: str | None
    last_used: str | None


class _New(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    scopes: tuple[str, ...] = ("inference",)
    models: tuple[str, ...] = ()
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    limits: dict[str, Number | None] = {}


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    name: str | UnsetType = UNSET
    scopes: tuple[str, ...] | UnsetType = UNSET
    models: tuple[str, ...] | UnsetType = UNSET
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | UnsetType | None = UNSET
    limits: dict[str, Number | None] | UnsetType = UNSET


def routes(book: KeyBook, *, audit: Audit, now: Callable[[], float]) -> list[Route]:
    """The endpoints under `/admin/keys`.

    Args:
        now: Unix time in seconds.
    """
    changing = asyncio.Lock()  # what was looked at must still be so when the change is made

    async def show(request: Request) -> Response:
        wants_all = request.query_params.get("all", "") in ("true", "1")
        keys = [key for key in await book.list() if wants_all or key.revoked_time is None]
        return json_response({"keys": [shown(key, now()) for key in keys]})

    async def create(request: Request) -> Response:
        wanted = await read_body(request, _New)
        text = new_key()
        key = StoredKey(
            id=new_id(),
            name=_name(wanted.name),
            digest=digest_of(text),
            scopes=_scopes(wanted.scopes),
            models=_models(wanted.models),
            expires_time=_expires_time(wanted.expires, now()),
            limits=_limits(wanted.limits, Limits()),
            created_time=now(),
        )
        async with changing:
            held = {scope for other in await book.list() for scope in other.scopes}
            await book.add(key)
        _log.info("key %r (%s) was created by %s: %s", key.name, key.id, caller(request), ", ".join(key.scopes))
        audit("key_created", **doer(request), key_id=key.id, key_name=key.name, scopes=", ".join(key.scopes))
        closes = [scope for scope in key.scopes if scope not in held]
        response = json_response({"key": shown(key, now()), "secret": text, "closes": closes}, 201)
        response.headers["cache-control"] = "no-store"
        return response

    async def change(request: Request) -> Response:
        id = request.path_params["id"]
        wanted = await read_body(request, _Change)
        async with changing:
            held = await book.list()
            key = next((key for key in held if key.id == id and key.revoked_time is None), None)
            if key is None:
                raise InvalidRequest(
                    f"there is no key with the id {id[:100]!r}, or it is revoked; GET /admin/keys lists them",
                    status=404,
                    code="key_not_found",
                )
            fields = _fields(wanted, key, now())
            if "scopes" in fields:
                _check_scopes_stay(key, fields["scopes"], held)
            changed = await book.change(id, fields)
        _log.info("key %r (%s) was changed by %s: %s", changed.name, id, caller(request), ", ".join(fields))
        audit("key_changed", **doer(request), key_id=id, key_name=changed.name, changed=", ".join(fields))
        return json_response({"key": shown(changed, now())})

    async def revoke(request: Request) -> Response:
        id = request.path_params["id"]
        async with changing:
            key = await book.revoke(id)
        _log.info("key %r (%s) was revoked by %s", key.name, id, caller(request))
        audit("key_revoked", **doer(request), key_id=id, key_name=key.name)
        return json_response({"key": shown(key, now())})

    return [
        Route("/admin/keys", show, methods=["GET"]),
        Route("/admin/keys", create, methods=["POST"]),
        Route("/admin/keys/{id}", change, methods=["PATCH"]),
        Route("/admin/keys/{id}", revoke, methods=["DELETE"]),
    ]


def shown(key: StoredKey, now: float) -> ShownKey:
    """What may be told of a key."""
    state: Literal["valid", "expired", "revoked"] = "valid" if key.is_valid(now) else "expired"
    return ShownKey(
        id=key.id,
        name=key.name,
        state="revoked" if key.revoked_time is not None else state,
        scopes=key.scopes,
        models=key.models,
        limits=key.limits,
        created=timestamp(key.created_time),
        expires=_written(key.expires_time),
        revoked=_written(key.revoked_time),
        last_used=_written(key.last_used_time),
    )


def _written(unix_s: float | None) -> str | None:
    return None if unix_s is None else timestamp(unix_s)


def _fields(wanted: _Change, key: StoredKey, now: float) -> dict[str, Any]:
    """What is to be replaced, checked."""
    fields: dict[str, Any] = {}
    if wanted.name is not UNSET:
        fields["name"] = _name(wanted.name)
    if wanted.scopes is not UNSET:
        fields["scopes"] = _scopes(wanted.scopes)
    if wanted.models is not UNSET:
        fields["models"] = _models(wanted.models)
    if wanted.expires is not UNSET:
        fields["expires_time"] = _expires_time(wanted.expires, now)
    if wanted.limits is not UNSET:
        fields["limits"] = _limits(wanted.limits, key.limits)
    if not fields:
        raise InvalidRequest(f"nothing to change; there are {', '.join(_Change.__struct_fields__)}")
    return fields


def _check_scopes_stay(key: StoredKey, scopes: tuple[KeyScope, ...], held: Sequence[StoredKey]) -> None:
    """A scope that no key ever had needs no key on loopback: taking it from the only one would open what it closed."""
    others = {scope for other in held if other.id != key.id for scope in other.scopes}
    for scope in key.scopes:
        if scope not in scopes and scope not in others:
            raise InvalidRequest(
                f"only the key {key.name!r} ever had the scope {scope!r}: without it, everybody on this machine would "
                f"have that right. Make another key with it first, or revoke this one",
                status=409,
                code="last_key",
                param="scopes",
            )


def _name(name: str) -> str:
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise InvalidRequest(
            f"name: {name[:MAX_NAME]!r} is no name for a key; it has 1 to {MAX_NAME} printable characters and no space "
            f"at its ends",
            param="name",
        )
    if name.startswith("__"):
        raise InvalidRequest(f"name: {name!r} begins with __, as only names of the router's own do", param="name")
    if KEY_PREFIX in name or redact(name) != name:
        raise InvalidRequest("name: that looks like a key itself, and names are not secret", param="name")
    return name


def _scopes(scopes: Sequence[str]) -> tuple[KeyScope, ...]:
    for index, scope in enumerate(scopes):
        if scope not in SCOPES:
            raise InvalidRequest(
                f"scopes[{index}]: {scope[:100]!r} is no scope; there are {', '.join(SCOPES)}", param="scopes"
            )
    if not scopes:
        raise InvalidRequest(f"scopes: a key has at least one; there are {', '.join(SCOPES)}", param="scopes")
    return tuple(scope for scope in SCOPES if scope in scopes)


def _models(models: Sequence[str]) -> tuple[str, ...]:
    """The names as they are: models come and go, a key may be limited to one that is not there yet."""
    if len(models) > MAX_MODELS or not all(0 < len(model) <= MAX_MODEL_NAME for model in models):
        raise InvalidRequest(
            f"models: at most {MAX_MODELS} names of 1 to {MAX_MODEL_NAME} characters; none for every model",
            param="models",
        )
    if any(redact(model) != model for model in models):
        raise InvalidRequest("models: one of them looks like a key, and names are not secret", param="models")
    return tuple(dict.fromkeys(models))


def _expires_time(expires: datetime | None, now: float) -> float | None:
    if expires is None:
        return None
    time = expires.timestamp()
    if time <= now:
        raise InvalidRequest(f"expires: {expires.isoformat()} is past; to end a key now, revoke it", param="expires")
    if time > _MAX_TIME:
        raise InvalidRequest("expires: write null for a key that never expires", param="expires")
    return time


def _limits(given: Mapping[str, Number | None], before: Limits) -> Limits:
    """The limits with those that are given; null and 0 take one away."""
    known = (*KINDS, "warn_ratio")
    for kind in given:
        if kind not in known:
            raise InvalidRequest(f"limits: {kind[:100]!r} is no limit; there are {', '.join(known)}", param="limits")
    fields: dict[str, Any] = {kind: _limit(kind, value) for kind, value in given.items()}
    return msgspec.structs.replace(before, **fields)


def _limit(kind: str, value: Number | None) -> Number:
    if kind == "warn_ratio":
        found = Limits().warn_ratio if value is None else value
        is_good, wanted = 0 < found <= 1, "above 0 and at most 1"
    else:
        found = value or 0
        is_money = kind in _MONEY
        is_good = 0 <= found <= MAX_LIMIT and (is_money or isinstance(found, int))
        wanted = f"{'US dollars' if is_money else 'a whole number'}, at least 0 and at most {MAX_LIMIT}"
    if not is_good:
        raise InvalidRequest(f"limits.{kind}: {str(value)[:50]} should be {wanted}", param=f"limits.{kind}")
    return found if isinstance(getattr(Limits(), kind), int) else float(found)
