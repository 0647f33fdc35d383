"""Keys over HTTP: made, listed, changed and revoked, and never shown twice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import KeyRing, digest_of
from llm_router.accounts.limits import KINDS, Limits
from llm_router.accounts.stored import StoredKey
from llm_router.admin import keys
from llm_router.admin.application import Entry, Rights, build
from llm_router.errors import InvalidRequest
from support.admin import Doors, serving
from support.aio import run
from support.ask import Answer, ask

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


class Book:
    """Keys in memory, with the rules of the real store."""

    def __init__(self) -> None:
        self.held: dict[str, StoredKey] = {}

    def _check_name(self, name: str, id: str) -> None:
        if any(key.name == name and key.id != id and key.revoked_time is None for key in self.held.values()):
            raise InvalidRequest("taken", status=409, code="key_name_taken")

    def _find(self, id: str) -> StoredKey:
        if id not in self.held:
            raise InvalidRequest("none", status=404, code="key_not_found")
        return self.held[id]

    async def list(self) -> Sequence[StoredKey]:
        return list(self.held.values())

    async def add(self, key: StoredKey) -> None:
        self._check_name(key.name, key.id)
        self.held[key.id] = key

    async def change(self, id: str, fields: Mapping[str, Any]) -> StoredKey:
        key = self._find(id)
        self._check_name(fields.get("name", ""), id)
        await asyncio.sleep(0)
        self.held[id] = changed = msgspec.structs.replace(key, **fields)
        return changed

    async def revoke(self, id: str) -> StoredKey:
        key = self._find(id)
        if key.revoked_time is None:
            self.held[id] = key = msgspec.structs.replace(key, revoked_time=NOW)
        return key


class Site:
    """The endpoints, open, above a `Book`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.book = Book()
        self.now = NOW
        self.doors: Doors
        self.audited: list[tuple[str, dict[str, Any]]] = []

    def audit(self, event: str, /, **data: Any) -> None:
        self.audited.append((event, data))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        rights = Rights(KeyRing(), {entry: frozenset() for entry in Entry})
        app = build(
            keys.routes(self.book, audit=self.audit, now=lambda: self.now), lambda: Guard(AccessSettings()), lambda: rights
        )  # fmt: skip
        async with serving(app, self.folder) as self.doors:
            yield self

    async def ask(self, method: str, path: str = "/admin/keys", body: Any = None) -> Answer:
        return await ask(self.doors.cli, path, method=method, body=body)

    async def made(self, name: str = "app", **fields: Any) -> dict[str, Any]:
        answer = await self.ask("POST", body={"name": name, **fields})
        assert answer.status == 201, answer.text
        made: dict[str, Any] = answer.json()["key"]
        return made

    async def names(self, query: str = "") -> list[str]:
        return [key["name"] for key in (await self.ask("GET", f"/admin/keys{query}")).json()["keys"]]


def test_a_key_is_shown_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the reply to its making, which nobody may store; what is kept is its hash; the log has the name."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answer = await site.ask("POST", body={"name": "app"})
            assert (answer.status, answer.headers["cache-control"]) == (201, "no-store")
            secret = answer.json()["secret"]
            assert answer.json()["closes"] == ["inference"]
            made = answer.json()["key"]
            (held,) = site.book.held.values()
            assert held.digest == digest_of(secret)
            assert made == {
                "id": held.id,
                "name": "app",
                "state": "valid",
                "scopes": ["inference"],
                "models": [],
                "limits": msgspec.to_builtins(Limits()),
                "created": "2023-11-14T22:13:20.000Z",
                "expires": None,
                "revoked": None,
                "last_used": None,
            }
            listed = await site.ask("GET")
            assert listed.json() == {"keys": [made]}
            renamed = await site.ask("PATCH", f"/admin/keys/{held.id}", {"name": "other"})
            revoked = await site.ask("DELETE", f"/admin/keys/{held.id}")
            for shown in (listed.text, renamed.text, revoked.text, caplog.text):
                assert secret not in shown
                assert held.digest.hex() not in shown
            assert f"key 'app' ({held.id}) was created by the command line: inference" in caplog.text
            assert f"key 'other' ({held.id}) was revoked by the command line" in caplog.text
            # That it was revoked does not open what it closed.
            assert (await site.ask("POST", body={"name": "second"})).json()["closes"] == []

    with caplog.at_level(logging.INFO):
        run(scenario())


def test_a_key_is_made_as_it_is_wanted(tmp_path: Path) -> None:
    """Scopes in one order, models once, limits beside the defaults, an instant of any zone."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            made = await site.made(
                scopes=["admin", "inference", "admin"],
                models=["b", "a", "b"],
                expires="2030-01-01T02:00:00+02:00",
                limits={"requests_per_minute": 60, "usd_per_day": 2, "concurrency": None},
            )
            assert made["scopes"] == ["inference", "admin"]
            assert made["models"] == ["b", "a"]
            assert made["expires"] == "2030-01-01T00:00:00.000Z"
            (held,) = site.book.held.values()
            assert held.limits == Limits(requests_per_minute=60, usd_per_day=2.0)
            assert isinstance(held.limits.usd_per_day, float)

    run(scenario())


# Starting a server takes longer than asking it: one for all of these.
NO_KEYS: tuple[tuple[dict[str, Any], str | None, str], ...] = (
    ({}, "name", "lacks"),
    ({"name": ""}, "name", "no name"),
    ({"name": " app"}, "name", "no name"),
    ({"name": "a\nb"}, "name", "no name"),
    ({"name": "a" * 65}, "name", "no name"),
    ({"name": "__other__"}, "name", "begins with __"),
    ({"name": "sk-llmr-abc"}, "name", "looks like a key"),
    ({"name": "card 4111 1111 1111 1111"}, "name", "looks like a key"),
    ({"name": "n", "models": ["m", "ghp_0123456789abcdefghij"]}, "models", "looks like a key"),
    ({"name": 7}, "name", "Expected `str`"),
    ({"name": "app", "scopes": []}, "scopes", "at least one"),
    ({"name": "app", "scopes": ["root"]}, "scopes", "scopes[0]: 'root' is no scope; there are inference"),
    ({"name": "app", "scopes": "admin"}, "scopes", "Expected `array`"),
    ({"name": "app", "models": [""]}, "models", "1 to 256"),
    ({"name": "app", "models": ["m" * 257]}, "models", "1 to 256"),
    ({"name": "app", "models": [f"m{n}" for n in range(1001)]}, "models", "at most 1000"),
    ({"name": "app", "expires": "2023-11-14T22:13:20Z"}, "expires", "past"),
    ({"name": "app", "expires": "0001-01-01T00:00:00+23:59"}, "expires", "past"),
    ({"name": "app", "expires": "9999-12-31T23:59:59-23:59"}, "expires", "null"),
    ({"name": "app", "expires": "2030-01-01T00:00:00"}, "expires", "timezone"),
    ({"name": "app", "expires": 1900000000}, "expires", "Expected `datetime | null`"),
    ({"name": "app", "limits": {"requests_per_hour": 1}}, "limits", "there are requests_per_minute,"),
    ({"name": "app", "limits": {"concurrency": -1}}, "limits.concurrency", "a whole number"),
    ({"name": "app", "limits": {"concurrency": 1.5}}, "limits.concurrency", "a whole number"),
    ({"name": "app", "limits": {"concurrency": True}}, "limits[...]", "got `bool`"),
    ({"name": "app", "limits": {"tokens_per_day": 10**16}}, "limits.tokens_per_day", "at most"),
    ({"name": "app", "limits": {"usd_per_day": -0.01}}, "limits.usd_per_day", "US dollars"),
    ({"name": "app", "limits": {"usd_per_day": 10**400}}, "limits.usd_per_day", "US dollars"),
    ({"name": "app", "limits": {"warn_ratio": 0}}, "limits.warn_ratio", "above 0"),
    ({"name": "app", "limits": {"warn_ratio": 1.01}}, "limits.warn_ratio", "at most 1"),
    ({"name": "app", "key": "sk-mine"}, None, "unknown field"),
)


def test_what_is_no_key_is_not_made(tmp_path: Path) -> None:
    """400, naming the field, and what it should be."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            for body, param, words in NO_KEYS:
                answer = await site.ask("POST", body=body)
                error = answer.json()["error"]
                assert (answer.status, error["param"]) == (400, param), body
                assert words in error["message"]
                assert len(error["message"]) < 400
            assert not site.book.held

    run(scenario())


def test_a_key_is_changed(tmp_path: Path) -> None:
    """What is not named stays; null and 0 take away."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            made = await site.made(models=["a"], expires="2030-01-01T00:00:00Z", limits={"concurrency": 4})
            path = f"/admin/keys/{made['id']}"

            async def change(**fields: Any) -> dict[str, Any]:
                answer = await site.ask("PATCH", path, fields)
                assert answer.status == 200, answer.text
                changed: dict[str, Any] = answer.json()["key"]
                return {name: value for name, value in changed.items() if value != made[name]}

            assert await change(name="new") == {"name": "new"}
            assert await change(name="app", models=[]) == {"models": []}
            assert await change(models=["a"], expires=None) == {"expires": None}
            assert (await change(limits={"requests_per_day": 9}))["limits"]["concurrency"] == 4
            (held,) = site.book.held.values()
            assert held.limits == Limits(requests_per_day=9, concurrency=4)
            await change(limits={"requests_per_day": 0, "concurrency": None, "usd_per_month": 0.5, "warn_ratio": 0.5})
            (held,) = site.book.held.values()
            assert held.limits == Limits(usd_per_month=0.5, warn_ratio=0.5)
            await change(limits={"warn_ratio": None})
            (held,) = site.book.held.values()
            assert held.limits == Limits(usd_per_month=0.5)

    run(scenario())


BAD_CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "nothing to change; there are name, scopes, models, expires, limits"),
    ({"name": None}, "Expected `str"),
    ({"scopes": []}, "at least one"),
    ({"expires": "2001-01-01T00:00:00Z"}, "revoke it"),
    ({"digest": "x"}, "unknown field"),
    ({"limits": {"x": 1}}, "is no limit"),
)


def test_a_bad_change_changes_nothing(tmp_path: Path) -> None:
    """400, as for a new key."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            made = await site.made()
            for body, words in BAD_CHANGES:
                answer = await site.ask("PATCH", f"/admin/keys/{made['id']}", body)
                assert answer.status == 400, body
                assert words in answer.json()["error"]["message"]
            assert (await site.ask("GET")).json()["keys"] == [made]

    run(scenario())


def test_a_revoked_key_is_history(tmp_path: Path) -> None:
    """Listed only when asked for; not changed any more; its name is free; revoking it again changes nothing."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            made = await site.made()
            path = f"/admin/keys/{made['id']}"
            taken = await site.ask("POST", body={"name": "app"})
            assert (taken.status, taken.json()["error"]["code"]) == (409, "key_name_taken")
            for _ in range(2):
                revoked = await site.ask("DELETE", path)
                assert (revoked.status, revoked.json()["key"]["state"]) == (200, "revoked")
                assert revoked.json()["key"]["revoked"] == "2023-11-14T22:13:20.000Z"
            changed = await site.ask("PATCH", path, {"name": "again"})
            assert (changed.status, changed.json()["error"]["code"]) == (404, "key_not_found")
            await site.made()
            assert await site.names() == ["app"]
            assert await site.names("?all=true") == ["app", "app"]
            for unknown in ("/admin/keys/none", "/admin/keys/" + "%20" * 3):
                for method, body in (("DELETE", None), ("PATCH", {"name": "x"})):
                    assert (await site.ask(method, unknown, body)).status == 404

    run(scenario())


def test_an_expired_key_says_so(tmp_path: Path) -> None:
    """It stays in the list, and can be made valid again."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            made = await site.made(expires="2023-11-15T00:00:00Z")
            site.now += 86_400
            assert [key["state"] for key in (await site.ask("GET")).json()["keys"]] == ["expired"]
            again = await site.ask("PATCH", f"/admin/keys/{made['id']}", {"expires": "2024-01-01T00:00:00Z"})
            assert again.json()["key"]["state"] == "valid"

    run(scenario())


def test_taking_a_scope_from_its_only_key_would_open_the_router(tmp_path: Path) -> None:
    """A scope that no key ever had needs none on loopback: 409, unless another key has or had it. Also when two are
    asked for at once."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            first = await site.made("first", scopes=["inference", "metrics:read"])
            path = f"/admin/keys/{first['id']}"
            refused = await site.ask("PATCH", path, {"scopes": ["metrics:read"]})
            assert (refused.status, refused.json()["error"]["code"]) == (409, "last_key")
            assert (await site.ask("PATCH", path, {"scopes": ["inference", "metrics:read", "admin"]})).status == 200
            second = await site.made("second", scopes=["inference", "metrics:read", "admin"])
            both = await asyncio.gather(
                *(site.ask("PATCH", f"/admin/keys/{key['id']}", {"scopes": ["admin"]}) for key in (first, second))
            )
            assert sorted(answer.status for answer in both) == [200, 409]
            left = next(key for key, answer in zip((first, second), both, strict=True) if answer.status == 409)
            await site.ask("DELETE", f"/admin/keys/{left['id']}")
            third = await site.made("third")
            assert (await site.ask("PATCH", f"/admin/keys/{third['id']}", {"scopes": ["admin"]})).status == 200

    run(scenario())


_NUMBERS = st.none() | st.integers(-2, 10**16) | st.floats(-1, 1e16, allow_nan=False)


@given(st.dictionaries(st.sampled_from([*KINDS, "warn_ratio"]), _NUMBERS))
def test_limits_are_what_their_types_say_or_refused(given: dict[str, int | float | None]) -> None:
    """Whatever numbers come: afterwards each field has its own type and range."""
    try:
        limits = keys._limits(given, Limits(requests_per_minute=7))
    except InvalidRequest as error:
        assert error.param is not None
        assert error.param.startswith("limits.")
        return
    assert msgspec.convert(msgspec.to_builtins(limits), Limits, strict=True) == limits
    for kind in KINDS:
        value = getattr(limits, kind)
        assert 0 <= value <= keys.MAX_LIMIT
        assert isinstance(value, float if kind.startswith("usd") else int)
    assert 0 < limits.warn_ratio <= 1
    assert limits.requests_per_minute == (
        7 if "requests_per_minute" not in given else given["requests_per_minute"] or 0
    )
