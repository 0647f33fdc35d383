"""Where keys and usage are kept: reading the database's URL, strictly, and naming the place without its password.

Standard library and msgspec only, so that a configuration can be checked without loading a database library.
Not for: connecting (store.py).
"""

from __future__ import annotations

import os
import re
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from llm_router.errors import ConfigError

KEY: Final = "accounts.database"

_POSTGRESQL_SCHEMES: Final = ("postgresql", "postgres", "postgresql+psycopg")
_PARAMETERS: Final = frozenset((
    "application_name", "channel_binding", "connect_timeout", "gssencmode", "host", "hostaddr", "keepalives",
    "keepalives_count", "keepalives_idle", "keepalives_interval", "krbsrvname", "options", "passfile", "require_auth",
    "service", "sslcert", "sslcrl", "sslkey", "sslmode", "sslnegotiation", "sslrootcert", "target_session_attrs",
    "tcp_user_timeout",
))  # fmt: skip
"""libpq's parameters without those that hold a secret."""

_ENCODE: Final = "characters like / @ : ? # % in a name or password are written percent-encoded (/ is %2F)"


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """A place for keys and usage. `repr` and `str` show no password.

    Args:
        path: of the SQLite file, absolute; empty for PostgreSQL.
        host: empty for libpq's own default, a Unix socket.
        name: the database on the PostgreSQL server.
        parameters: libpq's, as they stood in the URL.
    """

    kind: Literal["sqlite", "postgresql"]
    path: str = ""
    host: str = ""
    port: int | None = None
    user: str = ""
    password: str = ""
    name: str = ""
    parameters: dict[str, str] = {}

    def __str__(self) -> str:
        if self.kind == "sqlite":
            return f"sqlite:///{self.path}"
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port is not None else ""
        return f"postgresql://{user}{self.host}{port}/{self.name}"

    def __repr__(self) -> str:
        return f"Database({str(self)!r})"

    @property
    def label(self) -> str:
        """What to call it in a message: the file, or the server's part of the URL."""
        return self.path or str(self)


def read_url(url: str) -> Database:
    """The place that `url` names: `sqlite:///file`, `sqlite:////absolute/file`, or `postgresql://user:password@host/name`.

    The path of a SQLite file is taken as it stands, without percent-decoding; a relative one is of the current folder.

    Raises: ConfigError. It tells what to write and repeats nothing of the URL but its scheme: what looks like a host
        may be half of a password.
    """
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ConfigError(KEY, "this is no URL; write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME")
    if scheme == "sqlite":
        return _sqlite(rest)
    if scheme in _POSTGRESQL_SCHEMES:
        return _postgresql(f"postgresql://{rest}")
    shown = f" {scheme!r}" if re.fullmatch(r"[a-z0-9+.-]{1,40}", scheme) else ""
    raise ConfigError(KEY, f"there is no database of the kind{shown}; it is sqlite or postgresql")


def _sqlite(rest: str) -> Database:
    if not rest.startswith("/"):
        raise ConfigError(
            KEY, "a SQLite URL has three slashes before its path: sqlite:///accounts.db or sqlite:////srv/accounts.db"
        )
    path = rest[1:]
    if not path or path == ":memory:" or "\0" in path:
        raise ConfigError(KEY, "a SQLite URL names a file: keys that are gone after a restart would lock everybody out")
    return Database(kind="sqlite", path=os.path.abspath(path))


def _postgresql(url: str) -> Database:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(KEY, f"the host or port cannot be read; {_ENCODE}") from None
    if "#" in url:
        raise ConfigError(KEY, f"there is a # in it; {_ENCODE}")
    name = unquote(parts.path[1:])
    if not name or "/" in parts.path[1:] or "@" in parts.path:
        raise ConfigError(KEY, f"it names no database: write postgresql://USER:PASSWORD@HOST/NAME; {_ENCODE}")
    try:
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise ConfigError(KEY, f"what follows the ? is not NAME=VALUE&…; {_ENCODE}") from None
    if "password" in parameters or "sslpassword" in parameters:
        raise ConfigError(KEY, "a password stands before the @, or in a file that ?passfile= names")
    if not parameters.keys() <= _PARAMETERS:
        raise ConfigError(KEY, f"it has a parameter that is unknown; there are {', '.join(sorted(_PARAMETERS))}")
    return Database(
        kind="postgresql",
        host=parts.hostname or "",
        port=port,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        name=name,
        parameters=parameters,
    )
