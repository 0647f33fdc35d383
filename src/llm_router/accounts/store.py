"""The database of keys and usage: SQLite in the data folder, or PostgreSQL by URL.

`Store.open` brings the tables up to this program under a lock, so that several programs may start at once. Rows of
usage have ids, and a row that is stored already is passed over: sending again is always safe.

What a crash loses. A call that returned is stored: killing the program loses none of it. A power failure may lose
SQLite's last transactions (write-ahead log, `synchronous=NORMAL`), never damages the file; PostgreSQL keeps to its own
`synchronous_commit`. What was not handed over yet is the journal's matter (journal.py).

Importing this module loads SQLAlchemy (0.2 s, 19 MB): only control does, and not before it has to.
Not for: the request path, or gathering rows (journal.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Self

import msgspec
import sqlalchemy as sa
from msgspec.structs import astuple
from sqlalchemy import exc

from llm_router.accounts.database import KEY, Database, read_url
from llm_router.accounts.keys import KeyScope
from llm_router.accounts.limits import Limits
from llm_router.accounts.migrations import HEAD, REVISIONS, upgrade
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.tables import KEYS, USAGE, VERSION_TABLE
from llm_router.accounts.usage import UsageGroup, UsageRow, UsageSlot, UsageTotal
from llm_router.errors import ConfigError, InvalidRequest, StoreRefused, StoreUnavailable

_log = logging.getLogger(__name__)

LOCK_WAIT_S: Final = 30.0
"""Another program may be changing the tables; with many rows that takes seconds."""

MAX_GROUPS: Final = 10_000
"""Of one answer of `usage`: 2 MB of JSON, more than anybody reads."""

_BUSY_S: Final = 5.0  # SQLite: how long to wait for another writer; a batch of ours takes 10 ms
_CONNECT_S: Final = 5
_STATEMENT_S: Final = 60  # PostgreSQL; a sum over 10 million rows takes some
_POOL: Final = 4  # the journal, the keys, and two who read usage
_IDS: Final = 500  # in one statement; some databases take no more than 999 values
_PRUNE_ROWS: Final = 10_000  # at once: 0.1 s, so that the journal never waits long,
_PRUNE_PAUSE_S: Final = 0.05  # and gets its turn in between: SQLite gives the lock to whoever asks first
_ADVISORY_LOCK: Final = 0x6C6C_6D72_6F75_7465  # "llmroute": any number, but the same in each version of the program

_DAY_US: Final = 86_400_000_000
_MAX_TOKENS: Final = 2**40  # far beyond any model; a sum over millions of rows is still a bigint
_MAX_USD: Final = 1e9
_MAX_TIME: Final = 253_402_300_800.0  # the year 10000, which no calendar has
_MAX_TEXT: Final = 500  # characters; callers choose model names and request ids
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")  # PostgreSQL takes no NUL, neither takes half a surrogate pair

_CHANGEABLE: Final = frozenset(("name", "scopes", "models", "expires_time", "limits"))
_JSON: Final = msgspec.json.Encoder()
_SCOPES: Final = msgspec.json.Decoder(tuple[KeyScope, ...])
_MODELS: Final = msgspec.json.Decoder(tuple[str, ...])
_LIMITS: Final = msgspec.json.Decoder(Limits)


class Store:
    """An open database. Every method may block and may be called from any thread.

    Raises, from every method: StoreUnavailable.
    """

    def __init__(self, database: Database, engine: sa.Engine) -> None:
        self._database = database
        self._engine = engine
        self._writer = engine.execution_options(llm_router_writes=True)
        insert: Any
        if database.kind == "sqlite":
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert
        insertion = insert(USAGE).on_conflict_do_nothing(index_elements=["id"])
        # Compiled here, so that rows go to the driver as they are: SQLAlchemy's way through its types takes twice as
        # long as SQLite's own work.
        positional: Any = type(engine.dialect)
        style = "qmark" if database.kind == "sqlite" else "format"
        self._insert_usage = str(insertion.compile(dialect=positional(paramstyle=style)))

    def __repr__(self) -> str:
        return f"Store({str(self._database)!r})"

    @classmethod
    def open(cls, url: str, *, lock_wait_s: float = LOCK_WAIT_S) -> Self:
        """Connect, and make or bring up to date the tables.

        Args:
            lock_wait_s: seconds to wait for another program that is changing the tables.

        Raises: ConfigError (the URL cannot be used as it is), StoreUnavailable. Neither repeats a password.
        """
        database = read_url(url)
        if database.kind == "sqlite":
            _prepare_file(database.path)
        store = cls(database, _engine(database))
        try:
            store._bring_up_to_date(lock_wait_s)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close every connection. Calls under way in other threads end as they may."""
        self._engine.dispose()

    def ping(self) -> None:
        """Ask it something that takes no time: whether its tables can be read."""
        with self._reading() as connection:
            connection.execute(sa.select(KEYS.c.id).limit(1)).all()

    # -- keys -------------------------------------------------------------------------------------------------

    def keys(self) -> list[StoredKey]:
        """Every key, revoked and expired ones included, in the order they were made."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(KEYS).order_by(KEYS.c.created_time, KEYS.c.id)).all()
        return [self._key(row) for row in rows]

    def add_key(self, key: StoredKey) -> None:
        """Keep a new key. Raises: InvalidRequest (409) if a valid one has its name, or it is there already."""
        _check_name(key.name)
        with self._writing(named=key.name) as connection:
            connection.execute(
                sa.insert(KEYS).values(
                    id=key.id,
                    digest=key.digest,
                    created_time=key.created_time,
                    revoked_time=key.revoked_time,
                    last_used_time=key.last_used_time,
                    **_columns({name: getattr(key, name) for name in _CHANGEABLE}),
                )
            )

    def change_key(self, id: str, **fields: Any) -> StoredKey:
        """Change `name`, `scopes`, `models`, `expires_time` or `limits`. Returns: the key as it is now.

        Raises: InvalidRequest: 404 for a key that is unknown or revoked, 409 if another valid one has the name.
        """
        if unknown := fields.keys() - _CHANGEABLE:
            raise TypeError(f"a key has no {', '.join(sorted(unknown))} that could be changed")
        _check_name(fields.get("name", ""))
        with self._writing(named=fields.get("name", "")) as connection:
            if fields:
                where = (KEYS.c.id == id) & KEYS.c.revoked_time.is_(None)
                connection.execute(sa.update(KEYS).where(where).values(**_columns(fields)))
            key = self._find(connection, id)
        if key.revoked_time is not None:
            raise InvalidRequest(f"key {key.name!r} is revoked; make a new one", status=404, code="key_not_found")
        return key

    def revoke_key(self, id: str, at: float) -> StoredKey:
        """Revoke a key at Unix second `at`; nothing changes if it is revoked already. Returns: the key as it is now.

        Raises: InvalidRequest (404).
        """
        with self._writing() as connection:
            where = (KEYS.c.id == id) & KEYS.c.revoked_time.is_(None)
            connection.execute(sa.update(KEYS).where(where).values(revoked_time=at))
            return self._find(connection, id)

    def last_used(self) -> dict[str, float]:
        """Key id to the Unix second of its last stored inference; keys that were never used are not in it."""
        query = sa.select(KEYS.c.id, KEYS.c.last_used_time).where(KEYS.c.last_used_time.is_not(None))
        with self._reading() as connection:
            return dict(connection.execute(query).all())

    def _find(self, connection: sa.Connection, id: str) -> StoredKey:
        row = connection.execute(sa.select(KEYS).where(KEYS.c.id == id)).one_or_none()
        if row is None:
            raise InvalidRequest("there is no such key", status=404, code="key_not_found")
        return self._key(row)

    def _key(self, row: Any) -> StoredKey:
        try:
            return StoredKey(
                id=row.id,
                name=row.name,
                digest=bytes(row.digest),
                scopes=_SCOPES.decode(row.scopes),
                models=_MODELS.decode(row.models),
                limits=_LIMITS.decode(row.limits),
                created_time=row.created_time,
                expires_time=row.expires_time,
                revoked_time=row.revoked_time,
                last_used_time=row.last_used_time,
            )
        except msgspec.DecodeError as error:
            raise StoreUnavailable(f"{self._database.label}: key {row.id!r} cannot be read: {error}") from error

    # -- usage ------------------------------------------------------------------------------------------------

    def add_usage(self, rows: Sequence[UsageRow]) -> int:
        """Store all rows, or none. Rows whose id is stored already are passed over. Returns: how many were new.

        Raises: StoreRefused if there is one that can never be stored: with a number that makes no sense.
        """
        if not rows:
            return 0
        values = [_values(row) for row in rows]
        used: dict[str, float] = {}
        for row in rows:
            if row.key_id and row.time > used.get(row.key_id, 0.0):
                used[row.key_id] = row.time
        with self._writing() as connection:
            stored = connection.exec_driver_sql(self._insert_usage, values).rowcount
            if used:  # in one order, so that two programs that write at once do not wait for each other for ever
                connection.execute(_MARK_USED, [{"key": _text(key), "used": used[key]} for key in sorted(used)])
        return stored

    def stored_usage(self, ids: Sequence[str]) -> frozenset[str]:
        """Those of the ids whose rows are stored."""
        with self._reading() as connection:
            return frozenset(
                id
                for start in range(0, len(ids), _IDS)
                for id in connection.execute(
                    sa.select(USAGE.c.id).where(USAGE.c.id.in_(ids[start : start + _IDS]))
                ).scalars()
            )

    def usage(
        self,
        *,
        by: Sequence[UsageGroup],
        since: float,
        until: float,
        key: str | None = None,
        model: str | None = None,
    ) -> list[UsageTotal]:
        """Sums over the inferences that ended in [since, until), ordered as `by` says.

        Args:
            by: what to sum by; empty for one total.
            since, until: Unix seconds.
            key: only of the key with this id, or that has or had this name.
            model: only of this model.

        Raises: InvalidRequest for more than `MAX_GROUPS` sums.
        """
        groups = [_GROUPS[name].label(name) for name in by]
        query = sa.select(*groups, *_SUMS).where(USAGE.c.time_us >= _us(since), USAGE.c.time_us < _us(until))
        if key is not None:
            key = _text(key)
            named = sa.select(KEYS.c.id).where(KEYS.c.name == key)
            query = query.where((USAGE.c.key_id == key) | (USAGE.c.key == key) | USAGE.c.key_id.in_(named))
        if model is not None:
            query = query.where(USAGE.c.model == _text(model))
        if groups:
            query = query.group_by(*groups).order_by(*groups).limit(MAX_GROUPS + 1)
        with self._reading() as connection:
            rows = connection.execute(query).mappings().all()
            names: dict[str, str] = {}
            if "key" in by:
                names = dict(connection.execute(sa.select(KEYS.c.id, KEYS.c.name)).all())
        if len(rows) > MAX_GROUPS:
            raise InvalidRequest(
                f"these are more than {MAX_GROUPS} sums; ask for a shorter time, or by less",
                code="too_many_groups",
                param="by",
            )
        return [_total(row, by, names) for row in rows if row["requests"]]

    def usage_slots(self, since: float, slot_s: int) -> list[UsageSlot]:
        """What was used since Unix second `since`, by key, model and stretches of `slot_s` seconds, oldest first.

        For rebuilding limits: requests that a limit refused are not in it.
        """
        start = (USAGE.c.time_us // sa.literal(slot_s * 1_000_000, sa.BigInteger)).label("slot")
        query = (
            sa.select(
                start,
                USAGE.c.key_id,
                USAGE.c.model,
                sa.func.count().label("requests"),
                sa.func.sum(USAGE.c.input_tokens + USAGE.c.output_tokens).label("tokens"),
                sa.func.sum(USAGE.c.cost_usd).label("cost_usd"),
            )
            .where(USAGE.c.time_us >= _us(since), (USAGE.c.backend != "") | USAGE.c.cached)
            .group_by(start, USAGE.c.key_id, USAGE.c.model)
            .order_by(start, USAGE.c.key_id, USAGE.c.model)
        )
        with self._reading() as connection:
            return [
                UsageSlot(
                    time=float(row.slot * slot_s),
                    key_id=row.key_id,
                    model=row.model,
                    requests=row.requests,
                    tokens=int(row.tokens),
                    cost_usd=row.cost_usd,
                )
                for row in connection.execute(query)
            ]

    def spent(self, since: float) -> dict[str, float]:
        """Key id to the US dollars that it cost since Unix second `since`; keys that cost nothing are not in it."""
        query = (
            sa.select(USAGE.c.key_id, sa.func.sum(USAGE.c.cost_usd))
            .where(USAGE.c.time_us >= _us(since), USAGE.c.key_id != "", USAGE.c.cost_usd > 0)
            .group_by(USAGE.c.key_id)
        )
        with self._reading() as connection:
            return dict(connection.execute(query).all())

    def prune(self, before: float) -> int:
        """Forget usage that ended before Unix second `before`, in small portions. Returns: the rows forgotten.

        Keys stay. SQLite's file does not shrink; the room is used for new rows.
        """
        old = sa.select(USAGE.c.id).where(USAGE.c.time_us < _us(before)).limit(_PRUNE_ROWS)
        forgotten = 0
        while True:
            with self._writing() as connection:
                count = connection.execute(sa.delete(USAGE).where(USAGE.c.id.in_(old))).rowcount
            forgotten += count
            if count < _PRUNE_ROWS:
                return forgotten
            time.sleep(_PRUNE_PAUSE_S)

    # -- connections --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._mapped(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self, *, named: str = "") -> Iterator[sa.Connection]:
        """A transaction. `named` is the name that a key is to have, for the message when it is taken."""
        with self._mapped(named), self._writer.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _mapped(self, named: str = "") -> Iterator[None]:
        """Turns the libraries' errors into ours."""
        try:
            yield
        except exc.IntegrityError as error:
            if not named:
                raise StoreRefused(f"{self._database.label}: {_told(error, self._database)}") from error
            raise InvalidRequest(
                f"there is a key named {named!r} already; revoke it or choose another name",
                status=409,
                code="key_name_taken",
                param="name",
            ) from error
        except exc.DataError as error:
            raise StoreRefused(f"{self._database.label}: {_told(error, self._database)}") from error
        except (exc.SQLAlchemyError, sqlite3.Error) as error:
            raise StoreUnavailable(f"{self._database.label}: {_told(error, self._database)}") from error

    # -- the tables' version --------------------------------------------------------------------------------------

    def _bring_up_to_date(self, lock_wait_s: float) -> None:
        with self._reading() as connection:
            if self._is_current(connection):
                return
        if self._database.kind == "sqlite":
            with _file_lock(f"{self._database.path}.lock", lock_wait_s):
                with self._mapped(), contextlib.closing(self._engine.raw_connection()) as raw:
                    # Stays with the file. Readers then never wait for writers, nor these for them.
                    raw.execute("PRAGMA journal_mode=WAL")
                with self._mapped(), self._writer.begin() as connection:
                    self._upgrade(connection)
            return
        with self._mapped(), self._engine.begin() as connection:
            wait = sa.text("SELECT set_config('lock_timeout', :wait, true), set_config('statement_timeout', '0', true)")
            connection.execute(wait, {"wait": f"{max(1, round(lock_wait_s * 1000))}ms"})
            try:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            except exc.OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available
                    raise
                raise StoreUnavailable(_locked(self._database.label, lock_wait_s)) from error
            self._upgrade(connection)

    def _upgrade(self, connection: sa.Connection) -> None:
        if not self._is_current(connection):
            upgrade(connection)
            _log.info("%s: the tables are of revision %s now", self._database.label, HEAD)

    def _is_current(self, connection: sa.Connection) -> bool:
        """Whether the tables are this program's. Raises: StoreUnavailable if they are newer than it."""
        found: Sequence[str] = ()
        if sa.inspect(connection).has_table(VERSION_TABLE):
            found = (
                connection.execute(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE)))
                .scalars()
                .all()
            )
        if any(revision not in REVISIONS for revision in found):
            raise StoreUnavailable(
                f"{self._database.label} is of a newer version of this program (tables {', '.join(found)}, known are "
                f"those up to {HEAD}); run that version, or restore a backup made before it"
            )
        if self._database.kind == "sqlite" and connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
            return False
        return list(found) == [HEAD]


# -- opening ------------------------------------------------------------------------------------------------------


def _engine(database: Database) -> sa.Engine:
    if database.kind == "sqlite":
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=database.path),
            poolclass=sa.QueuePool,
            pool_size=_POOL,
            connect_args={"timeout": _BUSY_S, "check_same_thread": False},
            hide_parameters=True,
        )
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        import psycopg  # noqa: F401  # SQLAlchemy would say "No module named"
    except ImportError:
        raise ConfigError(
            KEY, "PostgreSQL needs a library that is not installed: pip install 'llm-runner-router[postgres]'"
        ) from None
    url = sa.URL.create(
        "postgresql+psycopg",
        username=database.user or None,
        password=database.password or None,
        host=database.host or None,
        port=database.port,
        database=database.name,
        query=database.parameters,
    )
    usual = {
        "connect_timeout": _CONNECT_S,
        "application_name": "llm-router",
        # A server that vanished without a word is noticed within 20 s.
        "tcp_user_timeout": 10_000,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }
    engine = sa.create_engine(
        url,
        pool_size=_POOL,
        pool_pre_ping=True,
        connect_args={name: value for name, value in usual.items() if name not in database.parameters},
        hide_parameters=True,
    )
    sa.event.listen(engine, "begin", _begin_postgresql)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions are ours to begin; DDL is then part of them
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and then writes would fail, not wait, when another one wrote meanwhile.
    is_writer = connection.get_execution_options().get("llm_router_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _begin_postgresql(connection: sa.Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_STATEMENT_S}s'")


def _prepare_file(path: str) -> None:
    """See to it that there is a file that we may write, readable for its owner only: it holds names and usage."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise StoreUnavailable(f"{path}: the folder {folder} does not exist; make it, or change {KEY}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreUnavailable(f"{path}: the folder {folder} cannot be written; SQLite keeps its log beside the file")
    # A file that is there is not opened: closing it would free the locks that SQLite may have on it in this process.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if not (os.path.isfile(path) and os.access(path, os.R_OK | os.W_OK)):
            raise StoreUnavailable(f"{path} is no file that can be read and written") from None
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def _file_lock(path: str, wait_s: float) -> Iterator[None]:
    """Hold the lock that is a file beside the database; the kernel frees it if we die. The file stays."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be opened: {error.strerror}") from error
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreUnavailable(_locked(path, wait_s)) from None
                time.sleep(0.02)  # flock has no time limit of its own
            else:
                break
        yield
    finally:
        os.close(fd)


def _locked(what: str, wait_s: float) -> str:
    return f"{what}: another program has been changing the tables for {wait_s:g} s"


def _told(error: Exception, database: Database) -> str:
    """What the database said, in one line and without statements, values or the password."""
    cause = getattr(error, "orig", None) or error
    if getattr(cause, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return "the file is damaged, or is no SQLite database; restore a backup, or move it away to start without keys"
    diagnosis = getattr(cause, "diag", None)
    text = " ".join(str(getattr(diagnosis, "message_primary", None) or cause).split())[:300]
    if database.password and database.password in text:
        text = f"the server could not be used ({type(cause).__name__})"
    return text


# -- rows -----------------------------------------------------------------------------------------------------


def _us(time_s: float) -> int:
    return round(time_s * 1_000_000)


def _columns(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a key as columns."""
    return {
        name: _JSON.encode(value).decode() if name in ("scopes", "models", "limits") else value
        for name, value in fields.items()
    }


def _check_name(name: str) -> None:
    if _UNSTORABLE.search(name):
        raise InvalidRequest("a key's name cannot hold such characters", code="invalid_name", param="name")


def _text(value: str) -> str:
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value[:_MAX_TEXT])


def _values(row: UsageRow) -> tuple[Any, ...]:
    """A row as the columns of its table, in their order. Raises: StoreRefused."""
    # Written so that what is no number at all fails too.
    if not (
        0 <= row.input_tokens <= _MAX_TOKENS
        and 0 <= row.output_tokens <= _MAX_TOKENS
        and 0 <= row.cached_tokens <= _MAX_TOKENS
        and 0 <= row.reasoning_tokens <= _MAX_TOKENS
        and 0 <= row.time < _MAX_TIME
        and 0 <= row.cost_usd <= _MAX_USD
        and 0 <= row.duration_s < _MAX_TIME
        and 0 <= row.status < 2**31
    ):
        raise StoreRefused(f"the usage row {row.id!r} has a number that makes no sense")
    id, time_s, *rest = astuple(row)
    texts = f"{id}{row.request_id}{row.key_id}{row.key}{row.model}{row.backend}{row.strategy}"
    if len(texts) > _MAX_TEXT or not texts.isascii() or "\0" in texts:  # else none of them has anything to be mended
        id, *rest = (_text(value) if isinstance(value, str) else value for value in (id, *rest))
    return id, _us(time_s), *rest


def _total(row: Mapping[Any, Any], by: Iterable[UsageGroup], names: dict[str, str]) -> UsageTotal:
    grouped: dict[str, Any] = {name: row[name] for name in by}
    if "key" in grouped:
        grouped["key_id"] = grouped["key"]
        grouped["key"] = names.get(grouped["key_id"], row["key_name"])
    if "day" in grouped:
        grouped["day"] = datetime.fromtimestamp(grouped["day"] * 86_400, UTC).date().isoformat()
    grouped.update((name, int(row[name])) for name in _COUNTED)  # PostgreSQL's sums are Decimals
    return UsageTotal(
        **grouped,
        cost_usd=row["cost_usd"],
        cost_status="estimated" if row["estimated"] else "exact" if row["exact"] else "",
    )


def _count_of(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


_TOKENS: Final = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")

_MARK_USED: Final = (
    sa.update(KEYS)
    .where(
        KEYS.c.id == sa.bindparam("key"),
        KEYS.c.last_used_time.is_(None) | (KEYS.c.last_used_time < sa.bindparam("used")),
    )
    .values(last_used_time=sa.bindparam("used"))
)

_GROUPS: Final[dict[UsageGroup, sa.ColumnElement[Any]]] = {
    "key": USAGE.c.key_id,
    "model": USAGE.c.model,
    "backend": USAGE.c.backend,
    "day": USAGE.c.time_us // sa.literal(_DAY_US, sa.BigInteger),
}

_COUNTED: Final = (
    "requests",
    "errors",
    "cached_requests",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "unpriced_requests",
)

_SUMS: Final[tuple[sa.ColumnElement[Any], ...]] = (
    sa.func.count().label("requests"),
    _count_of(USAGE.c.outcome == "error").label("errors"),
    _count_of(USAGE.c.cached).label("cached_requests"),
    *(sa.func.sum(USAGE.c[name]).label(name) for name in _TOKENS),
    sa.func.sum(USAGE.c.cost_usd).label("cost_usd"),
    _count_of(USAGE.c.cost_status == "exact").label("exact"),
    _count_of(USAGE.c.cost_status == "estimated").label("estimated"),
    _count_of((USAGE.c.outcome == "success") & ~USAGE.c.cached & (USAGE.c.cost_status == "")).label(
        "unpriced_requests"
    ),
    sa.func.max(USAGE.c.key).label("key_name"),
)
