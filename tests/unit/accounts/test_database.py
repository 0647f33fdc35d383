"""Reading the URL of the database, and never telling its password."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.database import Database, read_url
from llm_router.errors import ConfigError


def test_sqlite_paths_stand_as_they_are(tmp_path: object) -> None:
    """Absolute with four slashes, relative with three; nothing in them is decoded."""
    assert read_url("sqlite:////srv/a b/100%25#?.db") == Database(kind="sqlite", path="/srv/a b/100%25#?.db")
    assert read_url("SQLite:///accounts.db").path.endswith("/accounts.db")
    assert str(read_url("sqlite:////srv/x.db")) == "sqlite:////srv/x.db"


def test_postgresql_urls_are_taken_apart() -> None:
    """Each of the three ways to write the scheme; names and passwords are decoded; what is shown has no password."""
    for scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        database = read_url(f"{scheme}://an%40user:p%2Fw%3A@db.example.org:6432/my%20db?sslmode=require")
        assert database == Database(
            kind="postgresql",
            host="db.example.org",
            port=6432,
            user="an@user",
            password="p/w:",
            name="my db",
            parameters={"sslmode": "require"},
        )
        assert str(database) == database.label == "postgresql://an@user@db.example.org:6432/my db"
    assert read_url("postgresql:///llm?host=/run/postgresql").host == ""
    assert read_url("postgresql://[::1]:5432/llm").host == "::1"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "this is no URL; write sqlite:///PATH or postgresql://"),
        ("/srv/accounts.db", "this is no URL"),
        ("mysql://root:hunter2@host/db", "there is no database of the kind 'mysql'; it is sqlite or postgresql"),
        ("hunter2 @://", "there is no database of the kind; "),
        ("sqlite://", "three slashes"),
        ("sqlite://accounts.db", "three slashes"),
        ("sqlite:///", "names a file"),
        ("sqlite:///:memory:", "names a file"),
        ("sqlite:///a\0b", "names a file"),
        ("postgresql://user:hun/ter2@host/db", "written percent-encoded"),
        ("postgresql://user:12/hunter2@host/db", "written percent-encoded"),
        ("postgresql://user:12?hunter2@host/db", "it names no database"),
        ("postgresql://user:hunter2#@host/db", "written percent-encoded"),
        ("postgresql://user:hunter2@host:port/db", "the host or port cannot be read"),
        ("postgresql://user:hunter2@host:99999/db", "the host or port cannot be read"),
        ("postgresql://user:hunter2@[host/db", "the host or port cannot be read"),
        ("postgresql://user:hunter2@host", "it names no database"),
        ("postgresql://user:hunter2@host/", "it names no database"),
        ("postgresql://user@host/db?password=hunter2", "a password stands before the @"),
        ("postgresql://user@host/db?hunter2", "what follows the ? is not NAME=VALUE"),
        ("postgresql://user@host/db?hunter2=1", "it has a parameter that is unknown; there are application_name"),
    ],
)
def test_a_bad_url_is_refused_with_the_way_out(url: str, problem: str) -> None:
    """The key of the configuration and what to write, and nothing of the URL that could be a secret."""
    with pytest.raises(ConfigError) as caught:
        read_url(url)
    assert caught.value.key == "accounts.database"
    assert problem in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@given(st.text(min_size=1, max_size=30))
def test_whatever_a_password_is_it_is_not_shown(password: str) -> None:
    """Encoded or not: neither a refusal nor the accepted place shows it, even if it was cut into host and path."""
    secret = f"qZ7{password}Zq7"
    try:
        database = read_url(f"postgresql://user:{secret}@db.example.org/llm")
    except ConfigError as error:
        assert "qZ7" not in str(error)
        assert "Zq7" not in str(error)
    else:
        assert database.host == "db.example.org"
        for shown in (str(database), repr(database), database.label, f"{database}"):
            assert "qZ7" not in shown
            assert "Zq7" not in shown
