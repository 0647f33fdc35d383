"""Control's HTTP on its three entries: what is served, to whom, and how errors look."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.accounts.keys import KeyRing, KeyScope
from llm_router.admin import models, monitoring, reload
from llm_router.admin.application import Entry, Rights, build, json_response
from llm_router.admin.models import LocalModel
from llm_router.admin.server import Server
from llm_router.errors import BadModelFile, ConfigError, ModelNotFound, Unavailable
from llm_router.observe.health.report import Health, Report
from llm_router.observe.health.state import Inputs, ModelState
from support.aio import run
from support.ask import Answer, ask, send

TEXT = b"# HELP llm_router_build_info Always 1.\n# TYPE llm_router_build_info gauge\n" + b"# pad\n" * 300


class Source:
    """Monitoring with values of the test's choosing."""

    def __init__(self) -> None:
        self.inputs = Inputs(is_initialized=True, models=(ModelState(name="tiny", state="loaded"),), workers_up=1)
        self.ready = (True, "ready")

    def metrics(self, *, openmetrics: bool) -> bytes:
        return TEXT + (b"# EOF\n" if openmetrics else b"")

    def metrics_json(self) -> bytes:
        return b"[]"

    def health(self) -> Report:
        return Health(
            lambda: self.inputs, version="1.2.3", started_at=0.0, monotonic=lambda: 5.0, now=lambda: 0.0
        ).report()

    def readiness(self) -> tuple[bool, str]:
        return self.ready

    def is_initialized(self) -> bool:
        return self.inputs.is_initialized


class Models:
    """A models folder of one file."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, dict[str, Any]]] = []

    def model(self, state: Any = "loaded") -> LocalModel:
        return LocalModel(
            name="tiny", file="tiny.gguf", size_bytes=9, format="gguf", size_category="small", state=state
        )

    async def list(self) -> Sequence[LocalModel]:
        return [self.model()]

    async def load(self, name: str, options: Mapping[str, Any]) -> LocalModel:
        self.loads.append((name, dict(options)))
        if name == "broken":
            raise BadModelFile("broken.gguf: this is no GGUF file")
        return self.model()

    async def unload(self, name: str) -> LocalModel:
        raise ModelNotFound(f"model {name!r} is not loaded")


class Site:
    """The application on a TCP port, a command line's socket and a workers' socket."""

    def __init__(self, folder: Path) -> None:
        self.cli, self.forward = folder / "cli.sock", folder / "forward.sock"
        self.source, self.models = Source(), Models()
        self.access = AccessSettings()
        self.problem: ConfigError | None = None
        self.switches: dict[str, bool] = {}
        self.closed: frozenset[KeyScope] = frozenset()
        self.audited: list[tuple[str, dict[str, Any]]] = []
        self.port = 0

    def _reload(self) -> list[str]:
        if self.problem is not None:
            raise self.problem
        return ["server"]

    async def _who(self, request: Request) -> Response:
        return json_response({"client": request.scope["client"], "entry": request.scope["state"]["entry"]})

    async def _away(self, request: Request) -> Response:
        raise Unavailable("not now")

    def audit(self, event: str, /, **data: Any) -> None:
        self.audited.append((event, data))

    @contextlib.asynccontextmanager
    async def serving(self, head_timeout_s: float = 5.0) -> AsyncIterator[Site]:
        routes = [
            *monitoring.routes(
                self.source,
                version="1.2.3",
                metrics_path="/m",
                health_path="/health",
                now=lambda: 0.0,
                **self.switches,
            ),
            *models.routes(self.models, audit=self.audit),
            *reload.routes(self._reload, audit=self.audit),
            Route("/who", self._who),
            Route("/away", self._away),
        ]
        tcp = socket.create_server(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        entries = {tcp: Entry.MONITORING}
        for path, entry in ((self.cli, Entry.CLI), (self.forward, Entry.FORWARD)):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(path))
            sock.listen()
            entries[sock] = entry
        rights = Rights(KeyRing(), dict.fromkeys(Entry, self.closed))
        app = build(routes, lambda: Guard(self.access), lambda: rights)
        server = Server(app, entries, head_timeout_s=head_timeout_s)
        await server.start()
        try:
            yield self
        finally:
            await server.aclose()

    async def get(self, path: str, **fields: Any) -> Answer:
        return await ask(("127.0.0.1", self.port), path, **fields)


def test_the_index_names_every_endpoint(tmp_path: Path) -> None:
    """Plain text, with the configured paths, and of what is not always there what is."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answer = await site.get("/")
            assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
            for line in ("GET  /m  ", "GET  /health/ready ", "POST /admin/reload ", "POST /v1/chat/completions "):
                assert line in answer.text
            assert "/metrics\n" not in answer.text
            assert "/debug" not in answer.text

    run(scenario())


def test_health_without_the_right_to_details(tmp_path: Path) -> None:
    """The same word and status, in either form that was asked for, and nothing else."""

    async def scenario() -> None:
        site = Site(tmp_path)
        site.closed = frozenset({"metrics:read"})
        async with site.serving():
            for status, code, is_initialized in (("healthy", 200, True), ("initializing", 503, False)):
                site.source.inputs = msgspec.structs.replace(site.source.inputs, is_initialized=is_initialized)
                for accept in ("*/*", "application/health+json"):
                    answer = await site.get("/health", headers={"accept": accept})
                    assert (answer.status, answer.json()) == (
                        code,
                        {"status": status, "timestamp": "1970-01-01T00:00:00.000Z"},
                    )
                assert (await ask(site.cli, "/health")).json()["checks"]
            assert (await site.get("/metrics")).status == 401

    run(scenario())


@pytest.mark.parametrize(
    ("switches", "gone"),
    [
        ({"metrics_enabled": False}, ("/metrics", "/metrics/json", "/m")),
        ({"health_enabled": False}, ("/health",)),
    ],
)
def test_what_is_switched_off_is_not_there(tmp_path: Path, switches: dict[str, bool], gone: tuple[str, ...]) -> None:
    """No route and no line of the index; probes are answered all the same."""

    async def scenario() -> None:
        site = Site(tmp_path)
        site.switches = switches
        async with site.serving():
            for path in ("/metrics", "/metrics/json", "/m", "/health"):
                assert (await site.get(path)).status == (404 if path in gone else 200)
            for path in ("/health/live", "/health/ready", "/health/startup"):
                assert (await site.get(path)).status == 200
            index = (await site.get("/")).text
            assert not any(f"  GET  {path} " in index for path in gone)
            assert "  GET  /health/live " in index

    run(scenario())


def test_metrics_by_accept_and_encoding(tmp_path: Path) -> None:
    """Text unless OpenMetrics is preferred; gzip for who takes it; at the usual and the configured path."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            plain = await site.get("/metrics")
            assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert (plain.body, (await site.get("/m")).body) == (TEXT, TEXT)
            accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
            modern = await site.get("/metrics", headers={**accept, "accept-encoding": "br, gzip;q=0.5"})
            assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            assert modern.headers["content-encoding"] == "gzip"
            assert gzip.decompress(modern.body) == TEXT + b"# EOF\n"
            for refused in ("", "identity", "gzip;q=0", "gzip; q=0.0"):
                assert (await site.get("/metrics", headers={"accept-encoding": refused})).body == TEXT
            document = await site.get("/metrics/json")
            assert (document.headers["content-type"], document.json()) == ("application/json", [])
            head = await site.get("/metrics", method="HEAD")
            assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(TEXT)))

    run(scenario())


def test_health_in_three_forms(tmp_path: Path) -> None:
    """The whole document, the draft by Accept, and terse probes; 503 where nothing is served."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            assert (await site.get("/health")).json()["status"] == "healthy"
            draft = await site.get("/health", headers={"accept": "application/health+json"})
            assert draft.headers["content-type"] == "application/health+json"
            assert draft.json()["status"] == "pass"
            assert (await site.get("/health/ready")).json() == {
                "status": "ready",
                "timestamp": "1970-01-01T00:00:00.000Z",
            }
            site.source.ready = (False, "draining")
            site.source.inputs = Inputs(is_initialized=False)
            ready = await site.get("/health/ready")
            assert (ready.status, ready.json()["status"]) == (503, "draining")
            whole = await site.get("/health")
            assert (whole.status, whole.json()["status"]) == (503, "initializing")
            live = await site.get("/health/live")
            assert (live.status, live.json()["status"]) == (200, "alive")
            startup = await site.get("/health/startup")
            assert (startup.status, startup.json()["status"]) == (503, "initializing")
            site.source.inputs = Inputs(is_initialized=True)
            startup = await site.get("/health/startup")
            assert (startup.status, startup.json()) == (
                200,
                {"status": "started", "timestamp": "1970-01-01T00:00:00.000Z"},
            )

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "not_found"),
        ("GET", "/metrics/", None, 404, "not_found"),
        ("DELETE", "/metrics", None, 405, "method_not_allowed"),
        ("GET", "/admin/reload", None, 405, "method_not_allowed"),
        ("POST", "/admin/models/load", b"{", 400, "invalid_json"),
        ("POST", "/admin/models/load", b"[]", 400, "invalid_type"),
        ("POST", "/admin/models/load", b"{}", 400, "invalid_type"),
        ("POST", "/admin/models/load", b'{"name": 7}', 400, "invalid_type"),
        ("POST", "/admin/models/load", b'{"name": "a", "path": "/etc/passwd"}', 400, "invalid_type"),
        ("POST", "/admin/models/load", b"[" * 100_000, 400, "invalid_type"),
        ("POST", "/admin/models/load", b" " * 1_100_000, 413, "body_too_large"),
        ("POST", "/admin/models/load", b'{"name": "broken"}', 400, "bad_model_file"),
        ("POST", "/admin/models/unload", b'{"name": "none"}', 404, "model_not_found"),
        ("GET", "/away", None, 503, "unavailable"),
    ],
)
def test_errors_are_objects_with_an_id(
    tmp_path: Path, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    """Whatever is wrong: the right status, a code, and the request's id in body and header."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            headers = {"x-request-id": "mine-1", "content-type": "application/json"}
            answer = await site.get(path, method=method, headers=headers, body=body)
            error = answer.json()["error"]
            assert (answer.status, error["code"]) == (status, code)
            assert (error["request_id"], answer.headers["x-request-id"]) == ("mine-1", "mine-1")
            assert error["message"] and error["type"]
            assert ("allow" in answer.headers) == (status == 405)
            assert ("retry-after" in answer.headers) == (status == 503)

    run(scenario())


def test_an_unfit_request_id_is_replaced(tmp_path: Path) -> None:
    """Only what is safe in logs and headers is taken over."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answer = await site.get("/health/live", headers={"x-request-id": "a b<script>"})
            assert len(answer.headers["x-request-id"]) == 32

    run(scenario())


def test_models_are_listed_loaded_and_refused(tmp_path: Path) -> None:
    """Names and options reach the models as they came."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            listed = (await site.get("/admin/models")).json()["models"]
            assert [(model["name"], model["state"]) for model in listed] == [("tiny", "loaded")]
            wanted = {"name": "tiny", "options": {"parallel": 4}}
            loaded = await site.get("/admin/models/load", method="POST", body=wanted)
            assert loaded.json()["model"]["file"] == "tiny.gguf"
            assert site.models.loads == [("tiny", {"parallel": 4})]

    run(scenario())


def test_reload_says_what_is_wrong(tmp_path: Path) -> None:
    """A bare POST reloads; a bad file is an error that names the key."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            good = await site.get("/admin/reload", method="POST")
            assert good.json() == {"reloaded": True, "needs_restart": ["server"]}
            site.problem = ConfigError("models[0].name", "is missing")
            bad = await site.get("/admin/reload", method="POST", body={})
            assert (bad.status, bad.json()["error"]["code"]) == (422, "config_error")
            assert bad.json()["error"]["message"] == "models[0].name: is missing"

    run(scenario())


def test_foreign_pages_are_kept_out_of_every_entry_but_the_command_line(tmp_path: Path) -> None:
    """The guard judges the original Host, also of what a worker forwards."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            port, rebound = ("127.0.0.1", site.port), {"host": "evil.example"}
            for address in (port, site.forward):
                assert (await ask(address, "/metrics", headers=rebound)).status == 421
                foreign = {"origin": "https://evil.example", "content-type": "application/json"}
                assert (await ask(address, "/admin/reload", method="POST", headers=foreign, body=b"{}")).status == 403
                form = {"content-type": "text/plain"}
                refused = await ask(address, "/admin/reload", method="POST", headers=form, body=b"{}")
                assert (refused.status, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
            assert (await ask(site.cli, "/metrics", headers=rebound)).status == 200

    run(scenario())


def test_configured_pages_get_cors(tmp_path: Path) -> None:
    """Preflight and reply for a configured origin; nothing for others."""

    async def scenario() -> None:
        site = Site(tmp_path)
        site.access = AccessSettings(allowed_origins=("https://app.example.org",))
        async with site.serving():
            page = {"origin": "https://app.example.org", "sec-fetch-site": "cross-site"}
            asks = {**page, "access-control-request-method": "GET", "access-control-request-headers": "x-a"}
            preflight = await site.get("/metrics", method="OPTIONS", headers=asks)
            assert (preflight.status, preflight.headers["access-control-allow-headers"]) == (204, "x-a")
            reply = await site.get("/metrics", headers=page)
            assert reply.headers["access-control-allow-origin"] == "https://app.example.org"
            assert "access-control-allow-origin" not in (await site.get("/metrics")).headers

    run(scenario())


def test_only_workers_may_name_the_client(tmp_path: Path) -> None:
    """On the workers' socket the header is the client; elsewhere it is nothing."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            named = {"x-llm-router-client": "10.9.8.7:1234"}
            assert (await ask(site.forward, "/who", headers=named)).json() == {
                "client": ["10.9.8.7", 1234],
                "entry": "forward",
            }
            assert (await ask(site.forward, "/who")).json()["client"] is None
            direct = (await site.get("/who", headers=named)).json()
            assert (direct["client"][0], direct["entry"]) == ("127.0.0.1", "monitoring")
            assert (await ask(site.cli, "/who", headers=named)).json() == {"client": None, "entry": "cli"}

    run(scenario())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 80_000, 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 80_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
def test_what_is_no_http_gets_an_error_object(tmp_path: Path, data: bytes, status: int) -> None:
    """Also before there is a request: status, error object and id."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            answer = await send(("127.0.0.1", site.port), data)
            assert answer.status == status
            assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]

    run(scenario())


def test_the_reply_to_a_refused_body_is_not_destroyed(tmp_path: Path) -> None:
    """A client that sends to the end before it looks finds the reply, also one that will have the connection closed."""

    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            for path, kind, status in (
                ("/admin/models/load", "application/json", 413),
                ("/nowhere", "application/json", 404),
                ("/admin/reload", "text/plain", 415),
            ):
                answer = await site.get(
                    path, method="POST", headers={"content-type": kind}, body=bytes(11 * 1024 * 1024)
                )
                assert answer.status == status
                assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]

    run(scenario())


def test_a_client_that_waits_for_100_continue_need_not_send_a_refused_body(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Site(tmp_path).serving() as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(
                b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"expect: 100-continue\r\ncontent-length: 1000000\r\n\r\n"
            )
            assert (await reader.readline()).startswith(b"HTTP/1.1 404")
            writer.close()

    run(scenario())


def test_half_a_head_is_not_waited_for(tmp_path: Path) -> None:
    """A connection that does not send a whole head in time is told so, also one that was used before; an idle one is
    closed without a word."""

    async def scenario() -> None:
        async with Site(tmp_path).serving(head_timeout_s=0.2) as site:
            answer = await send(("127.0.0.1", site.port), b"GET / HTTP/1.1\r\nhost: loc")
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            with pytest.raises(ConnectionError):
                await send(("127.0.0.1", site.port), b"")
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.write(b"GET /heal")
            async with asyncio.timeout(5):
                rest = await reader.read()
            assert b'"alive"' in rest
            assert b"HTTP/1.1 408" in rest
            writer.close()

    run(scenario())
