"""The check of the database, with the real stores: SQLite, and a PostgreSQL that crashes and comes back."""

from __future__ import annotations

from pathlib import Path

from llm_router.accounts.store import Store
from llm_router.errors import StoreUnavailable
from llm_router.processes.probes.database import DatabaseCheck
from llm_router.testing import FakeClock
from support.postgres import PASSWORD, postgres_server


def test_sqlite(tmp_path: Path) -> None:
    """A file that answers."""
    store = Store.open(f"sqlite:///{tmp_path}/accounts.db")
    check = DatabaseCheck(store.ping).check()
    assert (check.status, check.message) == ("healthy", "The database answers")
    assert check.details["latency_ms"] > 0
    store.close()


def test_postgresql_that_crashes_and_comes_back() -> None:
    """The problem is told without the password; a new server at the same place is found again."""
    with postgres_server() as server:
        store = Store.open(server.database())
        check = DatabaseCheck(store.ping)
        assert check.check().is_healthy
        server.stop()
        down = check.check()
        assert down.status == "critical"
        assert down.message.startswith("The database does not answer: ")
        assert PASSWORD not in repr(down)
        server.start()
        assert check.check().is_healthy
        store.close()


def test_words_of_others_are_not_repeated() -> None:
    """A driver's error may hold the address with its password; ours do not."""

    def foreign() -> None:
        raise RuntimeError("postgresql://user:s3cret@host/db is away")

    def ours() -> None:
        raise StoreUnavailable("the database is away")

    assert DatabaseCheck(foreign).check().message == "The database does not answer: RuntimeError"
    assert DatabaseCheck(ours).check().message == "The database does not answer: the database is away"


def test_it_is_timed() -> None:
    """In milliseconds."""
    clock = FakeClock()
    assert DatabaseCheck(lambda: clock.advance(0.0125), clock=clock).check().details == {"latency_ms": 12.5}
