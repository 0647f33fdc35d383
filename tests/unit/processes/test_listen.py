"""Listening sockets and the lock: what is refused, and that the refusal names the way out."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from llm_router.processes.listen import CannotStart, listen_tcp, listen_unix, lock_data_dir
from llm_router.processes.plan import LaunchPlan


def close(groups: list[list[socket.socket]]) -> None:
    for sock in {sock for sockets in groups for sock in sockets}:
        sock.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers share one socket")
def test_each_worker_has_a_socket_of_its_own_on_the_same_port() -> None:
    """A dead worker's connections wait for its successor only."""
    groups, port = listen_tcp("127.0.0.1", 0, 3)
    assert len({sock.fileno() for sockets in groups for sock in sockets}) == 3
    assert {sock.getsockname() for sockets in groups for sock in sockets} == {("127.0.0.1", port)}
    close(groups)


@pytest.mark.parametrize("options", [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)])
def test_a_port_that_is_listened_on_is_refused_in_one_line(options: tuple[int, ...]) -> None:
    """Also one whose owner would share it: two routers must not split each other's clients."""
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CannotStart, match=f"port {port} on 127.0.0.1 is in use.*--port") as caught:
            listen_tcp("127.0.0.1", port, 2)
    assert "\n" not in str(caught.value)


def test_a_port_of_closed_connections_can_be_taken() -> None:
    """A restart does not wait for TIME_WAIT."""
    groups, port = listen_tcp("127.0.0.1", 0, 1)
    with socket.create_connection(("127.0.0.1", port)):
        served, _ = groups[0][0].accept()
        served.close()  # first, so that the lingering end is ours
    close(groups)
    groups, again = listen_tcp("127.0.0.1", port, 1)
    assert again == port
    close(groups)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ipv6_addresses_work_and_the_wildcard_takes_both_families() -> None:
    """`::1` listens on IPv6, `::` on everything."""
    groups, port = listen_tcp("::1", 0, 1)
    socket.create_connection(("::1", port)).close()
    close(groups)
    groups, port = listen_tcp("::", 0, 2)
    socket.create_connection(("::1", port)).close()
    socket.create_connection(("127.0.0.1", port)).close()
    close(groups)


@pytest.mark.parametrize("host", ["", "localhost"])
def test_names_for_several_addresses_listen_on_all_of_them(host: str) -> None:
    """Whatever localhost means to a client, it is answered."""
    groups, port = listen_tcp(host, 0, 2)
    socket.create_connection(("127.0.0.1", port)).close()
    close(groups)


@pytest.mark.parametrize(
    ("host", "problem"),
    [("192.0.2.1", "no address of this machine"), ("no such host", "cannot be resolved")],
)
def test_a_host_that_is_not_ours_is_refused(host: str, problem: str) -> None:
    """The message names the host and the way out."""
    with pytest.raises(CannotStart, match=f"{problem}.*--host"):
        listen_tcp(host, 0, 1)


def test_a_unix_socket_is_for_its_owner_alone_and_replaces_a_left_one(tmp_path: Path) -> None:
    """Mode 0600 from the start; a killed router's socket is in nobody's way."""
    path = tmp_path / "a.sock"
    listen_unix(str(path)).close()
    with listen_unix(str(path)), socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client.connect(str(path))


def test_a_unix_socket_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The message names the path."""
    with pytest.raises(CannotStart, match=r"missing/a\.sock"):
        listen_unix(str(tmp_path / "missing" / "a.sock"))


def test_the_lock_is_held_by_one_and_names_its_pid(tmp_path: Path) -> None:
    """The second is told who the first is; when the first lets go, the next may."""
    plan = LaunchPlan(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path))
    fd = lock_data_dir(plan)
    assert stat.S_IMODE(os.stat(plan.run_dir).st_mode) == 0o700
    with pytest.raises(CannotStart, match=rf"running already \(pid {os.getpid()}\)"):
        lock_data_dir(plan)
    os.close(fd)
    os.close(lock_data_dir(plan))


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """The message names the path and the way out."""
    (tmp_path / "file").write_text("")
    plan = LaunchPlan(data_dir=str(tmp_path / "file" / "data"), log_dir="")
    with pytest.raises(CannotStart, match=r"file.*DATA_DIR"):
        lock_data_dir(plan)
