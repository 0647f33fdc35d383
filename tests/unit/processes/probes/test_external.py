"""Targets outside: TCP, TLS and HTTP, reached and not; nothing of a target's password is shown."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from llm_router.observe.health.checks import Check
from llm_router.observe.health.settings import ExternalTarget
from llm_router.processes.probes.external import ExternalCheck, without_secrets
from llm_router.testing import ScriptedBackend, Stall, reply
from support.aio import run
from support.net import free_port
from support.tls import self_signed


def reach(target: str, *, timeout_s: float = 3.0, tls_ca_file: str = "") -> Check:
    check = ExternalCheck(ExternalTarget(name="t", target=target), timeout_s=timeout_s, tls_ca_file=tls_ca_file)
    return run(check.check())


def test_tcp() -> None:
    """Something accepts connections, and what is sent to it is nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        check = reach(target)
        assert (check.status, check.message) == ("healthy", f"{target} accepts connections")
        assert check.details["latency_ms"] > 0
        peer, _ = listening.accept()
        with peer:
            assert peer.recv(10) == b""


def test_tcp_refused() -> None:
    """Nothing listens there."""
    port = free_port()
    check = reach(f"tcp://127.0.0.1:{port}")
    assert not check.is_healthy
    assert check.message.startswith(f"tcp://127.0.0.1:{port}: ")
    assert "onnect" in check.message


def test_a_name_that_does_not_exist() -> None:
    """No address for it, or no answer of the name server in time."""
    assert not reach("tcp://no-such-host.invalid:80", timeout_s=2.0).is_healthy


def test_tls(tmp_path: Path) -> None:
    """The certificate has to be valid for the name; how long it is so is told."""
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def scene() -> tuple[Check, Check]:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.close()

        server = await asyncio.start_server(leave, "127.0.0.1", 0, ssl=context)
        target = ExternalTarget(name="t", target=f"tls://localhost:{server.sockets[0].getsockname()[1]}")
        trusted = await ExternalCheck(target, timeout_s=5.0, tls_ca_file=str(certificate)).check()
        strange = await ExternalCheck(target, timeout_s=5.0).check()
        server.close()
        await server.wait_closed()
        return trusted, strange

    trusted, strange = run(scene())
    assert trusted.is_healthy, trusted
    assert 0.9 < trusted.details["certificate_days_left"] <= 1.0
    assert "its certificate is not accepted" in strange.message


def test_tls_where_none_is_spoken() -> None:
    """A plain server answers something else, or nothing."""
    with ScriptedBackend() as server:
        assert not reach(f"tls://127.0.0.1:{server.port}", timeout_s=0.5).is_healthy


@pytest.mark.parametrize(("status", "is_well"), ((200, True), (302, True), (404, True), (500, False), (503, False)))
def test_http(status: int, is_well: bool) -> None:
    """An answer below 500 shows that it is at work."""
    with ScriptedBackend() as server:
        server.always(reply(b"x", status))
        check = reach(f"{server.url}/status?token=s3cret")
        assert check.is_healthy == is_well
        assert f"answered {status}" in check.message
        assert server.requests[0].target == "/status?token=s3cret"
        assert "s3cret" not in repr(check)


def test_http_that_does_not_answer() -> None:
    """In bounded time."""
    with ScriptedBackend() as server:
        server.always(Stall())
        assert "no answer" in reach(server.url, timeout_s=0.2).message


@pytest.mark.parametrize(
    ("target", "problem"),
    (
        ("", "is no target"),
        ("localhost:80", "is no target"),
        ("ftp://localhost", "is no target"),
        ("tcp://localhost", "has no port; write tcp://localhost:PORT"),
        ("tls://:443", "is no target"),
        ("tcp://localhost:99999", "out of range"),
        ("http://user:s3cret@localhost/", "must not hold a user name or password"),
    ),
)
def test_what_is_no_target(target: str, problem: str) -> None:
    """A clear word instead of an exception."""
    check = reach(target)
    assert not check.is_healthy
    assert problem in check.message
    assert "s3cret" not in check.message


@pytest.mark.parametrize(
    ("target", "shown"),
    (
        ("https://user:pw@host:8443/path?key=1#f", "https://host:8443/path"),
        ("tcp://[::1]:80", "tcp://[::1]:80"),
        ("http://[::1", "the target"),
        ("nonsense", "the target"),
    ),
)
def test_how_a_target_is_shown(target: str, shown: str) -> None:
    """Without what could be a secret."""
    assert without_secrets(target) == shown
