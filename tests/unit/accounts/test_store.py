"""The SQLite file: what can be wrong with it, who may read it, and what loading the store costs."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_router.accounts import store as store_module
from llm_router.accounts.store import Store
from llm_router.accounts.usage import UsageRow, sum_of
from llm_router.errors import ConfigError, StoreUnavailable

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "accounts.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{path}")
    yield store
    store.close()


def rows(count: int, prefix: str = "") -> list[UsageRow]:
    return [UsageRow(id=f"{prefix}{number}", time=1.7e9, request_id="r") for number in range(count)]


def stored(store: Store) -> int:
    return sum_of(store.usage(by=(), since=0, until=2**33)).requests


def test_only_the_owner_can_read_the_files(store: Store, path: Path) -> None:
    """They hold names and usage: the file, its log, its index and its lock."""
    store.add_usage(rows(1))
    found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert found == dict.fromkeys(("accounts.db", "accounts.db-shm", "accounts.db-wal", "accounts.db.lock"), 0o600)


def test_what_is_stored_is_there_after_a_restart(path: Path) -> None:
    """And nothing is migrated a second time."""
    first = Store.open(f"sqlite:///{path}")
    first.add_usage(rows(3))
    first.close()
    path.with_name("accounts.db.lock").unlink()
    second = Store.open(f"sqlite:///{path}")
    assert stored(second) == 3
    second.close()
    assert not path.with_name("accounts.db.lock").exists()


def test_a_backup_in_another_journal_mode_is_brought_back(path: Path) -> None:
    """A database that was restored from a dump is not in the write-ahead mode."""
    Store.open(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    store = Store.open(f"sqlite:///{path}")
    assert stored(store) == 0
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_opening_twice_in_a_process_keeps_the_locks(store: Store, path: Path) -> None:
    """Closing any descriptor of a file frees the locks that SQLite has on it: the store opens none of its own."""
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM llm_router_usage").fetchone()
    Store.open(f"sqlite:///{path}").close()
    held = subprocess.run(
        [sys.executable, "-c", _LAST_ONE, str(path)], capture_output=True, text=True, check=True, timeout=30
    )
    assert held.stdout.strip() == "locked"
    reader.close()


_LAST_ONE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0)
try:
    connection.execute("PRAGMA journal_mode=DELETE")  # only the last user of the file may do this
except sqlite3.OperationalError as error:
    print("locked" if "locked" in str(error) else error)
else:
    print("free")
"""


def broken(content: bytes) -> Callable[[Path], None]:
    """Writes a file with this content."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def torn(path: Path) -> None:
    """A database of which the middle is gone."""
    Store.open(f"sqlite:///{path}").close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [broken(b"no database at all " * 100), broken(b"SQLite format 3\0" + b"\xff" * 5000), torn]
)
def test_a_damaged_file_is_told_with_the_way_out(path: Path, damage: Callable[[Path], None]) -> None:
    """And is left as it is."""
    damage(path)
    before = path.read_bytes()
    with pytest.raises(
        StoreUnavailable, match="the file is damaged, or is no SQLite database; restore a backup"
    ) as caught:
        Store.open(f"sqlite:///{path}").keys()
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == before


def test_damage_that_comes_while_running_makes_the_store_unavailable(store: Store, path: Path) -> None:
    """It is no reason to drop rows, and no other error."""
    store.add_usage(rows(1000))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    store.close()
    data = bytearray(path.read_bytes())
    data[8 * 4096 :] = b"\xff" * (len(data) - 8 * 4096)
    path.write_bytes(data)
    with pytest.raises(StoreUnavailable, match="the file is damaged"):
        for _ in range(20):
            store.add_usage(rows(1000, "more"))
            store.usage(by=("model",), since=0, until=2**33)


def test_places_that_cannot_hold_a_file_are_told(tmp_path: Path) -> None:
    """Each with its name and what is wrong."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(
        StoreUnavailable, match="the folder .*/none does not exist; make it, or change accounts.database"
    ):
        Store.open(f"sqlite:///{tmp_path}/none/accounts.db")
    with pytest.raises(StoreUnavailable, match="the folder .*/file does not exist"):
        Store.open(f"sqlite:///{tmp_path}/file/accounts.db")
    with pytest.raises(StoreUnavailable, match="folder.db is no file that can be read and written"):
        Store.open(f"sqlite:///{tmp_path}/folder.db")
    with pytest.raises(StoreUnavailable, match="cannot be made: File name too long"):
        Store.open(f"sqlite:///{tmp_path}/{'a' * 300}.db")
    with pytest.raises(ConfigError, match=r"accounts\.database: "):
        Store.open("oracle://scott:tiger@host/db")


_OPEN = """
import os, sys
from llm_router.accounts.store import Store
from llm_router.errors import StoreUnavailable
if os.geteuid() == 0:  # who may write everything; the interpreter itself may lie where only root can read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[1:]:
    try:
        Store.open(f"sqlite:///{path}")
    except StoreUnavailable as error:
        print(error)
"""


def test_what_may_not_be_written_is_told() -> None:
    """A folder and a file that are read-only for this user: at the start, not with the first row."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders can be entered by their owner only
        top = Path(name)
        top.chmod(0o755)
        places = [top / "folder" / "accounts.db", top / "file" / "accounts.db"]
        for place in places:
            place.parent.mkdir(0o777)
            place.parent.chmod(0o777)
            Store.open(f"sqlite:///{place}").close()
            place.chmod(0o444)
        places[0].chmod(0o666)
        places[0].parent.chmod(0o555)
        result = subprocess.run(
            [sys.executable, "-c", _OPEN, *map(str, places)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        places[0].parent.chmod(0o755)
    assert result.stdout.splitlines() == [
        f"{places[0]}: the folder {top}/folder cannot be written; SQLite keeps its log beside the file",
        f"{places[1]} is no file that can be read and written",
    ]


def test_a_migration_elsewhere_is_waited_for_only_so_long(path: Path) -> None:
    """Then the start fails with a reason; when the lock is free, it succeeds."""
    with path.with_name("accounts.db.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="another program has been changing the tables for 0.05 s"):
            Store.open(f"sqlite:///{path}", lock_wait_s=0.05)
        opened: list[Store] = []
        waiting = threading.Thread(target=lambda: opened.append(Store.open(f"sqlite:///{path}", lock_wait_s=30)))
        waiting.start()
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.join()
    assert stored(opened[0]) == 0
    opened[0].close()


def test_another_writer_is_waited_for_only_so_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's open transaction makes the store unavailable, which is tried again, and refuses no row."""
    monkeypatch.setattr(store_module, "_BUSY_S", 0.05)
    store = Store.open(f"sqlite:///{path}")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="database is locked"):
        store.add_usage(rows(1))
    other.execute("COMMIT")
    assert store.add_usage(rows(1)) == 1
    other.close()
    store.close()


_LOADED = """
import sys
import llm_router.accounts.database, llm_router.accounts.journal, llm_router.accounts.stored, llm_router.admin.usage
assert not {name.partition(".")[0] for name in sys.modules} & {"sqlalchemy", "alembic", "mako", "psycopg"}
from llm_router.accounts.store import Store
Store.open(f"sqlite:///{sys.argv[1]}").close()
print("psycopg" in sys.modules, "alembic" in sys.modules)
"""


def test_libraries_are_loaded_only_where_they_are_needed(path: Path) -> None:
    """SQLAlchemy with the store itself, Alembic to make or change tables, psycopg for PostgreSQL."""
    for is_new in (True, False):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", _LOADED, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        assert result.stdout.strip() == f"False {is_new}"
