"""The free endpoints of backends: what is asked, with which credentials, and what each answer means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_router.observe.health.checks import Check
from llm_router.processes.probes.endpoints import FRESH_S, MOST_SHOWN, Endpoints, free_url
from llm_router.routing.table import BackendSpec
from llm_router.testing import FakeClock, ScriptedBackend, Stall, reply
from support.aio import run
from support.net import free_port
from support.probed import Evidence, local, remote, table
from support.tls import self_signed

SECRET = "sk-s3cret-key"


@pytest.fixture
def server() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


class Checked:
    def __init__(self, backends: Mapping[str, BackendSpec], *, timeout_s: float = 5.0) -> None:
        self.backends = backends
        self.evidence = Evidence()
        self.clock = FakeClock()
        self.endpoints = Endpoints(
            lambda: table(self.backends), self.evidence.read, timeout_s=timeout_s, clock=self.clock
        )

    def check(self) -> Check:
        return run(self.endpoints.check())


def test_a_quiet_backend_is_asked_for_its_models(server: ScriptedBackend) -> None:
    """By GET, with our key; nothing that could cost money. Unknown before that."""
    stage = Checked({"m": remote("openai", server.base_url)})
    assert stage.endpoints.problem("openai") is None
    check = stage.check()
    assert (check.status, check.message) == ("healthy", "1 of 1 backends answer")
    assert stage.endpoints.problem("openai") == ""
    (asked,) = server.requests
    assert (asked.method, asked.target, asked.body) == ("GET", "/v1/models", b"")
    assert asked.headers["authorization"] == f"Bearer {SECRET}"


def test_it_is_asked_once_a_minute_while_it_is_well(server: ScriptedBackend) -> None:
    """And every time while it is not."""
    stage = Checked({"m": remote("openai", server.base_url)})
    stage.check()
    stage.clock.advance(FRESH_S - 1)
    stage.check()
    assert len(server.requests) == 1
    stage.clock.advance(2)
    server.script(reply(b"", 500))
    assert stage.check().status == "critical"
    stage.check()
    assert len(server.requests) == 3


def test_a_backend_with_traffic_is_not_asked(server: ScriptedBackend) -> None:
    """Its requests tell, for good or ill."""
    stage = Checked({"m": remote("openai", server.base_url)})
    stage.check()
    stage.clock.advance(FRESH_S * 2)
    stage.evidence.add("openai", successes=5, failures=1)
    assert stage.check().details == {"openai": "5 requests answered since the last check"}
    stage.evidence.add("openai", failures=4)
    assert stage.check().message == "openai: 4 of 4 attempts failed since the last check"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "problem"),
    (
        (200, ""),
        (301, ""),
        (403, ""),
        (404, ""),
        (405, ""),
        (429, ""),
        (501, ""),
        (401, "it does not take our key (401): look at its api_key"),
        (500, "answered 500"),
        (503, "answered 503"),
    ),
)
def test_what_an_answer_means(server: ScriptedBackend, status: int, problem: str) -> None:
    """Only what keeps requests from being answered is a problem."""
    server.always(reply(b"{}", status, headers=[("location", "http://127.0.0.1:1/")]))
    stage = Checked({"m": remote("openai", server.base_url)})
    assert stage.check().is_healthy == (not problem)
    assert stage.endpoints.problem("openai") == problem


def test_without_a_key_401_asks_for_one(server: ScriptedBackend) -> None:
    """The way out is another."""
    server.always(reply(b"{}", 401))
    assert "set api_key" in Checked({"m": remote("openai", server.base_url, api_key="")}).check().message


def test_what_is_not_there_or_does_not_answer() -> None:
    """Each in words, without the key; the one that answers is not held up."""
    with ScriptedBackend() as stuck, ScriptedBackend() as well:
        stuck.always(Stall())
        stage = Checked(
            {
                "a": remote("away", f"http://127.0.0.1:{free_port()}/v1"),
                "b": remote("stuck", stuck.base_url),
                "c": remote("well", well.base_url),
            },
            timeout_s=0.5,
        )
        check = stage.check()
    assert (check.status, check.value, check.threshold) == ("degraded", 1.0, 3.0)
    assert "away: cannot connect: Connection refused" in check.message
    assert "stuck: no answer in time (total timeout of 0.4 s)" in check.message
    assert SECRET not in repr(check)


def test_megabytes_of_models_are_not_read(server: ScriptedBackend) -> None:
    """The status is all that counts."""
    server.always(reply(b"", length=50_000_000), Stall())
    assert Checked({"m": remote("openai", server.base_url)}, timeout_s=2.0).check().status == "healthy"


def test_a_runner_is_asked_for_its_health(server: ScriptedBackend) -> None:
    """One that is not ready is not asked at all."""
    Checked({"a": local("a", server.base_url), "b": local("b", server.base_url, ready=False)}).check()
    assert [request.target for request in server.requests] == ["/health"]


def test_another_address_is_another_backend(server: ScriptedBackend) -> None:
    """What was known of the old one is forgotten at once."""
    stage = Checked({"m": remote("openai", f"http://127.0.0.1:{free_port()}/v1")})
    assert stage.check().status == "critical"
    stage.backends = {"m": remote("openai", server.base_url)}
    assert stage.check().status == "healthy"
    stage.backends = {}
    assert stage.check().message == "No backend is configured"
    assert stage.endpoints.problem("openai") is None


def test_many_backends(server: ScriptedBackend) -> None:
    """Every one is asked; the details show some of them, those that fail first."""
    backends = {f"m{number}": remote(f"b{number}", server.base_url) for number in range(MOST_SHOWN * 2)}
    backends["bad"] = remote("bad", f"http://127.0.0.1:{free_port()}/v1")
    check = Checked(backends).check()
    assert len(server.requests) == MOST_SHOWN * 2
    assert len(check.details) == MOST_SHOWN
    assert next(iter(check.details)) == "bad"


@pytest.mark.parametrize(
    ("fields", "expected"),
    (
        ({"url": "https://api.openai.com/v1"}, "https://api.openai.com/v1/models"),
        ({"url": "http://h:8080/v1/"}, "http://h:8080/v1/models"),
        ({"url": "http://[::1]:8080"}, "http://[::1]:8080/models"),
        (
            {"url": "https://r.openai.azure.com/openai/deployments/{model}", "query": "api-version=2024-10-21"},
            "https://r.openai.azure.com/openai/models?api-version=2024-10-21",
        ),
        ({"url": "http://h/{model}/v1"}, "http://h/models"),
        ({"url": "http://127.0.0.1:5000/v1", "local_model": "m"}, "http://127.0.0.1:5000/health"),
    ),
)
def test_where_asking_is_free(fields: Mapping[str, Any], expected: str) -> None:
    """Beside the API that is configured."""
    assert free_url(BackendSpec(name="b", **fields)) == expected


def test_credentials_are_sent_as_requests_send_them(server: ScriptedBackend) -> None:
    """Azure's and Anthropic's headers, and those that are configured."""
    for fields in (
        {"auth": "api-key", "headers": {"x-team": "blue"}},
        {"auth": "x-api-key", "protocol": "anthropic"},
        {"auth": "x-api-key", "protocol": "anthropic", "headers": {"Anthropic-Version": "2026-10-21"}},
        {"auth": "bearer", "api_key": ""},
    ):
        Checked({"m": remote("b", server.base_url, **fields)}).check()
    azure, anthropic, newer, none = (request.headers for request in server.requests)
    assert (azure["api-key"], azure["x-team"]) == (SECRET, "blue")
    assert (anthropic["x-api-key"], anthropic["anthropic-version"]) == (SECRET, "2023-06-01")
    assert newer["anthropic-version"] == "2026-10-21"
    assert not {"authorization", "api-key", "x-api-key"} & none.keys()


def test_certificates_count_as_for_requests(tmp_path: Path) -> None:
    """A private authority needs its file; then it is well."""
    import ssl

    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ScriptedBackend(tls=context) as server:
        check = Checked({"m": remote("b", server.base_url)}).check()
        assert "its TLS certificate is not accepted" in check.message
        assert Checked({"m": remote("b", server.base_url, tls_ca_file=str(certificate))}).check().is_healthy
        assert Checked({"m": remote("b", server.base_url, tls_verify=False)}).check().is_healthy
        missing = Checked({"m": remote("b", server.base_url, tls_ca_file=str(tmp_path / "none"))}).check()
        assert "tls_ca_file" in missing.message
