"""The supervisor's listening sockets and its lock on the data folder: made before any child, kept until it ends.

On Linux each worker has its own SO_REUSEPORT socket per address, so that a dead worker's backlog waits for
its successor and the kernel spreads connections evenly; elsewhere all workers share one.
Not for: accepting connections (gateway, control). Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from typing import Any

from llm_router.errors import RouterError
from llm_router.processes.plan import LaunchPlan, unix_address

BACKLOG = 1024
"""Connections that may wait for one worker, and for its successor when it dies. Loops that call listen()
again (asyncio's create_server does) must hand in the same number."""

_ONE_PER_WORKER = sys.platform == "linux"

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class CannotStart(RouterError):
    """Something on this machine is in the way; the message names it and the way out."""

    code = "cannot_start"


def _resolve(host: str, port: int) -> list[_Address]:
    """The addresses to listen on for `host`, IPv4 first; an empty host means all interfaces."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotStart(f"host {host!r} cannot be resolved: {error}; choose another with HOST or --host") from error
    unique = {(family, address) for family, _, _, _, address in found}
    return sorted(unique, key=lambda item: (item[0] != socket.AF_INET, str(item[1])))


def _bound(family: socket.AddressFamily, address: tuple[Any, ...], *, shared: bool, only_v6: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port of connections in TIME_WAIT may be taken; one that is listened on may not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_tcp(host: str, port: int, groups: int) -> tuple[list[list[socket.socket]], int]:
    """Listening sockets for `groups` processes, a list each, and the port (another than asked for if that is 0).

    Raises CannotStart in one line when the port is in use or not allowed, or the host is not ours.
    """
    addresses = _resolve(host, port)
    made: list[list[socket.socket]] = [[] for _ in range(groups if _ONE_PER_WORKER else 1)]
    try:
        for family, address in addresses:
            here = (address[0], port, *address[2:])
            try:
                # SO_REUSEPORT would let us listen beside another router of the same user: ask without it first.
                with _bound(family, here, shared=False, only_v6=len(addresses) > 1) as probe:
                    port = probe.getsockname()[1]
                here = (address[0], port, *address[2:])
                for sockets in made:
                    sockets.append(_bound(family, here, shared=_ONE_PER_WORKER, only_v6=len(addresses) > 1))
                    sockets[-1].listen(BACKLOG)
            except OSError as error:
                # A name like localhost may mean an address family that this machine does not have.
                if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} and len(addresses) > 1:
                    continue
                raise _refusal(str(address[0]), port, error) from error
        if not made[0]:
            raise CannotStart(f"host {host!r} is no address of this machine; choose another with HOST or --host")
    except BaseException:
        for sock in (sock for sockets in made for sock in sockets):
            sock.close()
        raise
    return [made[index % len(made)] for index in range(groups)], port


def _refusal(address: str, port: int, error: OSError) -> CannotStart:
    if error.errno == errno.EADDRINUSE:
        return CannotStart(
            f"port {port} on {address} is in use; stop what listens there, or choose another with PORT or --port"
        )
    if error.errno == errno.EACCES:
        return CannotStart(f"port {port} on {address} needs privileges; choose one from 1024 up with PORT or --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return CannotStart(f"{address} is no address of this machine; choose another with HOST or --host")
    return CannotStart(f"cannot listen on {address} port {port}: {error.strerror or error}")


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path`, mode 0600, in place of whatever a former router left there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    former_mask = os.umask(0o177)  # from the first moment on nobody else may connect
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(unix_address(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotStart(f"cannot listen on {path}: {error.strerror or error}; choose another DATA_DIR") from error
    finally:
        os.umask(former_mask)
    return sock


def lock_data_dir(plan: LaunchPlan) -> int:
    """Make the data folder if it is missing, and the descriptor that holds its lock as long as it is open.

    Raises CannotStart when another router holds it, naming its pid, or when the folder cannot be used.
    """
    try:
        os.makedirs(plan.data_dir, mode=0o700, exist_ok=True)
        os.makedirs(plan.run_dir, mode=0o700, exist_ok=True)
        os.chmod(plan.run_dir, 0o700)
        fd = os.open(os.path.join(plan.data_dir, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStart(f"{error.filename}: {error.strerror}; choose another DATA_DIR") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise CannotStart(
            f"a router with the data folder {plan.data_dir} is running already (pid {pid}); "
            "stop it, or choose another DATA_DIR"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
