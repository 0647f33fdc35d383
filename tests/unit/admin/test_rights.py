"""Which request control serves to whom: DESIGN's table of access, over real sockets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import SCOPES, KeyRing, KeyScope, KeySpec, digest_of
from llm_router.admin.application import MAX_HELD, Entry, Rights, build, caller, doer, is_terse, json_response
from llm_router.gateway.auth import DELAYS_S, FREE_FAILURES, Failures
from llm_router.gateway.forward import AT_ONCE
from llm_router.testing import FakeClock
from support.admin import Address, Doors
from support.admin import serving as serving_app
from support.aio import run
from support.ask import Answer, ask

NOW = 1_700_000_000.0
OPEN = ("/health/live", "/health/ready", "/health/startup")
MONITORING = ("/", "/metrics", "/metrics/json", "/my/metrics")
HEALTH = ("/health", "/my/health")
ADMIN = ("/admin/models", "/admin/keys", "/admin", "/debug", "/nothing", "/metrics/", "//admin/keys", "/%61dmin/keys")
ALL: frozenset[KeyScope] = frozenset(SCOPES)


def spec(*scopes: KeyScope, expires_time: float | None = None) -> KeySpec:
    """The key `sk-SCOPE`."""
    text = f"sk-{scopes[0]}"
    return KeySpec(id=text, name=text[3:], digest=digest_of(text), scopes=scopes, expires_time=expires_time)


class Site:
    """An application whose every route answers who asked."""

    def __init__(self, folder: Path, keys: Iterable[KeySpec] = (), closed: frozenset[KeyScope] = ALL) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.paused_s: list[float] = []
        self.rights = Rights(KeyRing(keys), {Entry.MONITORING: closed, Entry.FORWARD: closed})
        self.access = AccessSettings()
        self.moved: tuple[str, ...] = ("/my/metrics", "/my/health", "/admin/keys")
        self.health_path = "/my/health"
        self.doors: Doors

    async def _pause(self, seconds: float) -> None:
        self.paused_s.append(seconds)

    async def _answer(self, request: Request) -> Response:
        if request.url.path == "/admin/who":
            return json_response(doer(request))
        return PlainTextResponse("how, but not why" if is_terse(request) else caller(request))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        paths = dict.fromkeys((*OPEN, *MONITORING, *HEALTH, "/admin/models", "/admin/keys", "/admin/who"))
        app = build(
            [Route(path, self._answer, methods=["GET", "POST"]) for path in paths],
            lambda: Guard(self.access),
            lambda: self.rights,
            monitoring_paths=self.moved,
            health_path=self.health_path,
            wall=lambda: NOW,
            failures=Failures(clock=self.clock, max_held=MAX_HELD, pause=self._pause),
        )
        async with serving_app(app, self.folder) as self.doors:
            yield self

    async def get(self, path: str, key: str = "", address: Address | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            named["authorization"] = f"Bearer {key}"
        return await ask(address or self.doors.monitoring, path, headers=named)


def test_probes_are_open_everywhere(tmp_path: Path) -> None:
    """Whoever restarts what is not alive has no key."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            for path in OPEN:
                for address in site.doors:
                    assert (await site.get(path, address=address)).status == 200

    run(scenario())


@pytest.mark.parametrize("paths", [MONITORING, ADMIN], ids=["monitoring", "admin"])
def test_each_path_wants_its_scope(tmp_path: Path, paths: tuple[str, ...]) -> None:
    """`metrics:read` for monitoring, `admin` for everything; for neither is an inference key good for anything.
    What is not known to be for monitoring is for administrators, also if it is not there."""

    async def scenario() -> None:
        keys = [spec("inference"), spec("metrics:read"), spec("admin")]
        async with Site(tmp_path, keys).serving() as site:
            for path in paths:
                is_there = path in {*MONITORING, "/admin/models", "/admin/keys", "/%61dmin/keys"}
                for address in (site.doors.monitoring, site.doors.forward):
                    for key, status in (
                        ("sk-inference", 403),
                        ("sk-metrics:read", 200 if paths is MONITORING else 403),
                        ("sk-admin", 200 if is_there else 404),
                    ):
                        answer = await site.get(path, key, address)
                        assert (answer.status, path, key) == (status, path, key)
                        if status == 403:
                            assert answer.json()["error"]["code"] == "forbidden"
            assert site.paused_s == []

    run(scenario())


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "how, but not why"),
        ("sk-inference", "how, but not why"),
        ("sk-metrics:read", "the key 'metrics:read'"),
        ("sk-admin", "the key 'admin'"),
    ],
)
def test_everybody_may_know_how_the_router_is_but_not_why(tmp_path: Path, key: str, text: str) -> None:
    """Load balancers have no key; details are for those who have the right to them."""

    async def scenario() -> None:
        keys = [spec("inference"), spec("metrics:read"), spec("admin")]
        async with Site(tmp_path, keys).serving() as site:
            for path in HEALTH:
                for address in (site.doors.monitoring, site.doors.forward):
                    answer = await site.get(path, key, address)
                    assert (answer.status, answer.text) == (200, text)
                assert (await site.get(path, address=site.doors.cli)).text == "the command line"

    run(scenario())


def test_a_wrong_key_is_no_way_to_ask_for_health_either(tmp_path: Path) -> None:
    """The two answers would tell which keys there are, as often as one likes."""

    async def scenario() -> None:
        async with Site(tmp_path, [spec("admin")]).serving() as site:
            statuses = [
                (await site.get("/health", "sk-wrong")).status for _ in range(FREE_FAILURES + len(DELAYS_S) + 1)
            ]
            assert set(statuses[:-1]) == {401}
            assert statuses[-1] == 429
            assert (await site.get("/health")).status == 200

    run(scenario())


@pytest.mark.parametrize(
    ("moved", "health_path", "open_paths"),
    [
        (("/metrics", "/health"), "/health", {"/health"}),
        (("/my/metrics", "/my/health"), "/my/health", {"/health", "/my/health"}),
        (("/health", "/my/health"), "/my/health", {"/my/health"}),  # metrics are at /health
        (("/my/metrics", "/metrics"), "/metrics", {"/health"}),  # so is health at /metrics
        (("/my/metrics", "/admin/keys"), "/admin/keys", {"/health"}),
        (("/my/metrics", "/"), "/", {"/health"}),
    ],
)
def test_only_health_is_told_to_everybody(
    tmp_path: Path, moved: tuple[str, ...], health_path: str, open_paths: set[str]
) -> None:
    """Wherever it was moved, nothing else becomes open."""

    async def scenario() -> None:
        site = Site(tmp_path)
        site.moved, site.health_path = moved, health_path
        async with site.serving():
            for path in {*MONITORING, *HEALTH, "/admin/keys"}:
                assert ((await site.get(path)).status == 200, path) == (path in open_paths, path)

    run(scenario())


@pytest.mark.parametrize(
    ("closed", "monitoring", "admin"),
    [
        (frozenset(), 200, 200),
        (frozenset({"inference"}), 200, 200),
        (frozenset({"metrics:read"}), 401, 200),
        (frozenset({"inference", "admin"}), 200, 401),
        (ALL, 401, 401),
    ],
)
def test_each_scope_is_open_until_it_is_closed(
    tmp_path: Path, closed: frozenset[KeyScope], monitoring: int, admin: int
) -> None:
    """By itself: a key for models leaves monitoring open on loopback."""

    async def scenario() -> None:
        async with Site(tmp_path, closed=closed).serving() as site:
            for address in (site.doors.monitoring, site.doors.forward):
                assert (await site.get("/metrics", address=address)).status == monitoring
                assert (await site.get("/admin/keys", address=address)).status == admin
                assert (await site.get("/metrics", "not-ours", address)).status == monitoring

    run(scenario())


def test_each_way_in_is_judged_by_itself(tmp_path: Path) -> None:
    """One port may be open to other machines and the other not; a way that nobody thought of is closed."""

    async def scenario() -> None:
        site = Site(tmp_path, [spec("admin")])
        site.rights = Rights(site.rights.ring, {Entry.MONITORING: frozenset()})
        async with site.serving():
            assert (await site.get("/admin/keys")).status == 200
            assert (await site.get("/admin/keys", address=site.doors.forward)).status == 401
            assert (await site.get("/admin/keys", "sk-admin", site.doors.forward)).status == 200

    run(scenario())


def test_the_command_line_never_needs_a_key(tmp_path: Path) -> None:
    """Its socket is only for the same user; a wrong key there does not matter either."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            for path in ("/metrics", "/admin/keys"):
                assert (await site.get(path, address=site.doors.cli)).text == "the command line"
                assert (await site.get(path, "not-ours", site.doors.cli)).status == 200

    run(scenario())


def test_audit_lines_tell_key_and_address(tmp_path: Path) -> None:
    """The address is that of the worker's client where a worker asks; the command line has neither."""

    async def scenario() -> None:
        async with Site(tmp_path, [spec("admin")]).serving() as site:
            by_key = {"actor": "the key 'admin'", "actor_id": "sk-admin"}
            answer = await site.get("/admin/who", "sk-admin")
            assert answer.json() == {**by_key, "client": "127.0.0.1"}
            answer = await site.get("/admin/who", "sk-admin", site.doors.forward, x_llm_router_client="10.1.2.3:99")
            assert answer.json() == {**by_key, "client": "10.1.2.3"}
            answer = await site.get("/admin/who", address=site.doors.cli)
            assert answer.json() == {"actor": "the command line"}
        async with Site(tmp_path / "open", closed=frozenset()).serving() as site:
            assert (await site.get("/admin/who")).json() == {"actor": "127.0.0.1", "client": "127.0.0.1"}

    (tmp_path / "open").mkdir()
    run(scenario())


def test_changed_rights_hold_from_the_next_request_on(tmp_path: Path) -> None:
    """A key that was revoked, one that expired."""

    async def scenario() -> None:
        async with Site(tmp_path, [spec("admin")]).serving() as site:
            answer = await site.get("/admin/keys", "sk-admin")
            assert (answer.status, answer.text) == (200, "the key 'admin'")
            site.rights = Rights(KeyRing(), site.rights.closed)
            assert (await site.get("/admin/keys", "sk-admin")).status == 401
            site.rights = Rights(KeyRing([spec("admin", expires_time=NOW)]), site.rights.closed)
            assert (await site.get("/admin/keys", "sk-admin")).status == 401

    run(scenario())


def test_nobody_is_called_a_stranger_before_the_keys_are_known(tmp_path: Path) -> None:
    """503 says when to come back; what needs no key is served."""

    async def scenario() -> None:
        site = Site(tmp_path)
        site.rights = Rights(None, {Entry.MONITORING: frozenset({"admin"})})
        async with site.serving():
            answer = await site.get("/admin/keys", "sk-admin")
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert (await site.get("/metrics", address=site.doors.forward)).status == 503
            assert (await site.get("/health", "sk-admin", site.doors.forward)).text == "how, but not why"
            for path, address in (("/metrics", None), ("/health/live", site.doors.forward), ("/", site.doors.cli)):
                assert (await site.get(path, address=address)).status == 200

    run(scenario())


def test_a_refusal_is_an_error_object_with_a_challenge(tmp_path: Path) -> None:
    """It does not say whether the path exists, and shows nothing of the key."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answers = [
                await site.get(path, "sk-wrong", x_request_id="mine-1") for path in ("/admin/keys", "/admin/nothing")
            ]
            assert answers[0].body == answers[1].body
            assert (answers[0].status, answers[0].headers["www-authenticate"]) == (401, "Bearer")
            assert answers[0].headers["x-request-id"] == "mine-1"
            error = answers[0].json()["error"]
            assert (error["code"], error["type"]) == ("unauthorized", "authentication_error")
            assert "sk-wrong" not in answers[0].text

    run(scenario())


def test_every_header_of_a_client_will_do_but_no_query(tmp_path: Path) -> None:
    """Addresses end up in logs and histories."""

    async def scenario() -> None:
        async with Site(tmp_path, [spec("admin")]).serving() as site:
            assert (await site.get("/metrics", x_api_key="sk-admin")).status == 200
            assert (await site.get("/metrics", api_key="sk-admin")).status == 200
            for name in ("key", "api_key", "api-key", "token", "access_token"):
                assert (await site.get(f"/metrics?{name}=sk-admin")).status == 401

    run(scenario())


def test_pages_are_kept_out_first_and_may_read_refusals(tmp_path: Path) -> None:
    """A foreign page learns nothing about keys; one that is configured sees why it was refused; a preflight has no key."""

    async def scenario() -> None:
        site = Site(tmp_path, [spec("admin")])
        page = "https://app.example.org"
        site.access = AccessSettings(allowed_origins=(page,))
        async with site.serving():
            assert (await site.get("/metrics", "sk-admin", origin="https://evil.example")).status == 403
            assert (await site.get("/metrics", "sk-admin", host="evil.example")).status == 421
            refused = await site.get("/metrics", origin=page)
            assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, page)
            asks = {"origin": page, "access-control-request-method": "GET"}
            assert (await ask(site.doors.monitoring, "/metrics", method="OPTIONS", headers=asks)).status == 204
            assert (await ask(site.doors.monitoring, "/metrics", method="OPTIONS")).status == 401

    run(scenario())


def test_failures_are_slowed_by_the_address_that_a_worker_names(tmp_path: Path) -> None:
    """On the workers' socket each client counts for itself; on the port nobody can choose an address. A valid key gets
    through at once."""

    async def scenario() -> None:
        async with Site(tmp_path, [spec("admin")]).serving() as site:
            forward, before_429 = site.doors.forward, FREE_FAILURES + len(DELAYS_S)

            async def fail(address: Address, client: str) -> Answer:
                return await site.get("/metrics", "wrong", address, x_llm_router_client=client)

            statuses = [(await fail(forward, f"10.0.0.1:{n}")).status for n in range(before_429 + 1)]
            assert statuses == [*([401] * before_429), 429]
            assert site.paused_s == list(DELAYS_S)
            last = await fail(forward, "10.0.0.1:1")
            assert (last.json()["error"]["code"], last.headers["retry-after"]) == ("too_many_failures", "21")
            assert "www-authenticate" not in last.headers
            assert (await fail(forward, "10.0.0.2:1")).status == 401
            valid = await site.get("/metrics", "sk-admin", forward, x_llm_router_client="10.0.0.1:1")
            assert valid.status == 200
            site.clock.advance(3600)
            statuses = [(await fail(site.doors.monitoring, f"10.0.1.{n}:1")).status for n in range(before_429 + 1)]
            assert statuses == [*([401] * before_429), 429]

    run(scenario())


def test_strangers_cannot_take_every_way_from_a_worker_to_control() -> None:
    """Each answer that is held back keeps one of the requests that a worker may have with control at a time."""
    assert MAX_HELD <= AT_ONCE // 2
