"""What every database must do: keys, usage, migrations, crashes. Run by SQLite and by a real PostgreSQL."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.accounts import migrations
from llm_router.accounts.journal import UsageJournal
from llm_router.accounts.limits import Limits
from llm_router.accounts.store import MAX_GROUPS, Store
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.tables import METADATA, VERSION_TABLE
from llm_router.accounts.usage import UsageRow, UsageSlot, UsageTotal, sum_of
from llm_router.errors import InvalidRequest, StoreRefused, StoreUnavailable
from support.aio import run, until
from support.fuzz import examples
from support.postgres import PASSWORD, Postgres, postgres_server
from support.usage_writer import BATCH_ROWS, batch

ROOT = Path(__file__).parents[2]
WRITER = ROOT / "tests" / "support" / "usage_writer.py"
DAY = 20_000 * 86_400.0  # 2024-10-04
KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/accounts.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store.open(url)
    yield store
    store.close()


@pytest.fixture(scope="module", params=KINDS)
def lasting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that all examples of a property share."""
    if request.param == "sqlite":
        store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/accounts.db")
    else:
        server: Postgres = request.getfixturevalue("postgres")
        store = Store.open(server.database())
    yield store
    store.close()


def key(number: int, **fields: Any) -> StoredKey:
    usual = {
        "id": f"key-{number}",
        "name": f"name {number}",
        "digest": bytes([number]) * 32,
        "created_time": DAY + number,
    }
    return StoredKey(**{**usual, **fields})


_numbers = itertools.count()


def row(**fields: Any) -> UsageRow:
    """An answered inference, with an id of its own."""
    usual = {
        "id": f"row-{next(_numbers)}",
        "time": DAY,
        "request_id": "request",
        "model": "tiny",
        "backend": "b1",
        "strategy": "balanced",
        "input_tokens": 10,
        "output_tokens": 5,
        "usage_source": "provider",
        "outcome": "success",
        "status": 200,
        "duration_s": 0.5,
    }
    return UsageRow(**{**usual, **fields})


def total(store: Store) -> UsageTotal:
    return sum_of(store.usage(by=(), since=0, until=2**33))


# -- keys ---------------------------------------------------------------------------------------------------


def test_keys_come_back_as_they_were_given(store: Store) -> None:
    """Every field, revoked and expired ones included, in the order they were made."""
    full = key(
        1,
        name="Zoë ☂",
        scopes=("inference", "metrics:read", "admin"),
        models=("a/b", "c"),
        expires_time=DAY + 0.123456,
        limits=Limits(requests_per_minute=60, usd_per_month=12.5, warn_ratio=0.5),
        revoked_time=DAY + 7.25,
        last_used_time=DAY + 3.5,
    )
    store.add_key(key(2))
    store.add_key(full)
    assert store.keys() == [full, key(2)]
    assert not full.is_valid(DAY)
    assert key(2).is_valid(DAY)
    assert (full.spec().name, type(full.spec()).__name__) == ("Zoë ☂", "KeySpec")


def test_two_valid_keys_never_share_a_name(store: Store) -> None:
    """Neither by making nor by renaming; the name of a revoked one is free again."""
    store.add_key(key(1, name="ci"))
    store.add_key(key(2))
    attempts: list[Callable[[], object]] = [
        lambda: store.add_key(key(3, name="ci")),
        lambda: store.change_key("key-2", name="ci"),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidRequest, match="there is a key named 'ci' already") as caught:
            attempt()
        assert (caught.value.status, caught.value.code) == (409, "key_name_taken")
    store.revoke_key("key-1", DAY)
    store.add_key(key(3, name="ci"))
    kept = store.keys()
    assert [(k.id, k.name) for k in kept] == [("key-1", "ci"), ("key-2", "name 2"), ("key-3", "ci")]


def test_a_key_is_changed_and_revoked(store: Store) -> None:
    """Only what is named changes; revoking twice keeps the first instant; a revoked key stays as it is."""
    store.add_key(key(1))
    changed = store.change_key("key-1", name="new", scopes=("admin",), models=("m",), limits=Limits(concurrency=2))
    assert changed == key(1, name="new", scopes=("admin",), models=("m",), limits=Limits(concurrency=2))
    assert store.change_key("key-1", expires_time=DAY) == store.keys()[0]
    assert store.change_key("key-1", expires_time=None).expires_time is None
    assert store.revoke_key("key-1", DAY + 5).revoked_time == DAY + 5
    assert store.revoke_key("key-1", DAY + 9).revoked_time == DAY + 5
    with pytest.raises(InvalidRequest, match="'new' is revoked") as caught:
        store.change_key("key-1", name="other")
    assert caught.value.status == 404
    assert store.keys()[0].name == "new"
    with pytest.raises(TypeError, match="no digest"):
        store.change_key("key-1", digest=b"")


def test_unknown_keys_and_unusable_names_are_refused(store: Store) -> None:
    """As the caller's fault, and nothing is stored."""
    attempts: list[Callable[[], object]] = [
        lambda: store.change_key("none", name="x"),
        lambda: store.revoke_key("none", DAY),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidRequest, match="no such key") as caught:
            attempt()
        assert caught.value.status == 404
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(InvalidRequest, match="cannot hold such characters"):
            store.add_key(key(1, name=name))
    assert store.keys() == []


# -- usage --------------------------------------------------------------------------------------------------


def test_each_field_of_a_row_comes_into_its_column(store: Store, url: str) -> None:
    """Rows go to the driver as tuples: their order is that of the table."""
    kept = row(
        **{name: name for name in ("request_id", "key_id", "key", "model", "backend", "strategy")},
        time=DAY + 0.25,
        input_tokens=1,
        output_tokens=2,
        cached_tokens=3,
        reasoning_tokens=4,
        usage_source="partial",
        cost_usd=0.5,
        cost_status="estimated",
        cached=True,
        outcome="cancelled",
        status=499,
        duration_s=1.5,
    )
    store.add_usage([kept])
    with engine_of(url).connect() as connection:
        found = dict(connection.execute(sa.select(METADATA.tables["llm_router_usage"])).mappings().one())
    expected = {name: getattr(kept, name) for name in kept.__struct_fields__ if name != "time"}
    assert found == {**expected, "time_us": round(kept.time * 1e6)}


def test_it_is_known_which_rows_are_stored(store: Store) -> None:
    """However many are asked for at once."""
    rows = [row() for _ in range(1200)]
    store.add_usage(rows[::2])
    assert store.stored_usage([row.id for row in rows]) == {row.id for row in rows[::2]}
    assert store.stored_usage([]) == frozenset()


def test_usage_is_summed_by_key_model_backend_and_day(store: Store) -> None:
    """Names of keys are those of now; days are UTC's; the total of the groups is the total of all."""
    store.add_key(key(1, name="before"))
    rows = [
        row(key_id="key-1", key="before", cost_usd=0.25, cost_status="exact", cached_tokens=4, reasoning_tokens=2),
        row(key_id="key-1", key="before", time=DAY + 86_399.999, cost_usd=0.5, cost_status="estimated"),
        row(
            key_id="key-1", key="before", time=DAY + 86_400, model="big", backend="b2", outcome="error", output_tokens=0
        ),
        row(key_id="gone", key="old name", cached=True, backend="", input_tokens=0, output_tokens=0),
        row(outcome="cancelled", usage_source="partial"),
    ]
    assert store.add_usage(rows) == 5
    store.change_key("key-1", name="after")
    by_key = store.usage(by=("key",), since=DAY, until=DAY + 2 * 86_400)
    assert by_key == [
        UsageTotal(key_id="", key="", requests=1, input_tokens=10, output_tokens=5),
        UsageTotal(key_id="gone", key="old name", requests=1, cached_requests=1),
        UsageTotal(
            key_id="key-1",
            key="after",
            requests=3,
            errors=1,
            input_tokens=30,
            output_tokens=10,
            cached_tokens=4,
            reasoning_tokens=2,
            cost_usd=0.75,
            cost_status="estimated",
        ),
    ]
    by_day = store.usage(by=("day", "model", "backend"), since=DAY, until=DAY + 2 * 86_400)
    assert [(t.day, t.model, t.backend, t.requests) for t in by_day] == [
        ("2024-10-04", "tiny", "", 1),
        ("2024-10-04", "tiny", "b1", 3),
        ("2024-10-05", "big", "b2", 1),
    ]
    assert sum_of(by_key) == sum_of(by_day) == store.usage(by=(), since=DAY, until=DAY + 2 * 86_400)[0]


def test_usage_is_taken_from_a_time_a_key_and_a_model(store: Store) -> None:
    """Half-open in time; a key by its id, the name it has, or a name it had."""
    store.add_key(key(1, name="now"))
    store.add_usage([row(key_id="key-1", key="then", time=DAY + second, model=f"m{second}") for second in range(3)])
    store.add_usage([row(key_id="key-2", key="other")])
    assert store.usage(by=(), since=DAY + 1, until=DAY + 2)[0].requests == 1
    assert store.usage(by=("model",), since=DAY + 5, until=DAY + 9) == []
    for wanted in ("key-1", "now", "then"):
        assert sum_of(store.usage(by=("model",), since=0, until=2**33, key=wanted)).requests == 3
    assert store.usage(by=(), since=0, until=2**33, key="nobody", model="m1") == []
    assert store.usage(by=("model",), since=0, until=2**33, key="now", model="m1")[0].model == "m1"


def test_cost_is_exact_only_when_each_is_and_what_has_no_price_is_counted(store: Store) -> None:
    """An answer without a price is not free: it is counted apart."""
    store.add_usage([row(cost_usd=0.5, cost_status="exact"), row(), row(cached=True), row(outcome="error")])
    assert (total(store).cost_status, total(store).unpriced_requests) == ("exact", 1)
    store.add_usage([row(cost_usd=0.5, cost_status="estimated")])
    assert total(store).cost_status == "estimated"


def test_too_many_sums_are_refused(store: Store) -> None:
    """With the way out, instead of an answer of any size."""
    store.add_usage([row(model=f"model {number}") for number in range(MAX_GROUPS + 1)])
    with pytest.raises(InvalidRequest, match="shorter time, or by less") as caught:
        store.usage(by=("model",), since=0, until=2**33)
    assert caught.value.code == "too_many_groups"
    assert len(store.usage(by=("model",), since=0, until=2**33, model="model 7")) == 1


def test_limits_can_be_rebuilt(store: Store) -> None:
    """Slots of what was let through, what each key cost, and when it was last used; what a limit refused is not there."""
    store.add_key(key(1))
    store.add_usage(
        [
            row(key_id="key-1", time=DAY + 1.5, cost_usd=0.25),
            row(key_id="key-1", time=DAY + 59.5, cost_usd=0.25),
            row(key_id="key-1", time=DAY + 60, cached=True, backend="", input_tokens=0, output_tokens=0),
            row(
                key_id="key-1", time=DAY + 61, backend="", status=429, outcome="error", input_tokens=0, output_tokens=0
            ),
            row(time=DAY + 62, cost_usd=4.0),
        ]
    )
    assert store.usage_slots(DAY, 60) == [
        UsageSlot(time=DAY, key_id="key-1", model="tiny", requests=2, tokens=30, cost_usd=0.5),
        UsageSlot(time=DAY + 60, key_id="", model="tiny", requests=1, tokens=15, cost_usd=4.0),
        UsageSlot(time=DAY + 60, key_id="key-1", model="tiny", requests=1, tokens=0, cost_usd=0.0),
    ]
    assert store.spent(DAY) == {"key-1": 0.5}
    assert store.spent(DAY + 2) == {"key-1": 0.25}
    assert store.last_used() == {"key-1": DAY + 61}
    store.add_usage([row(key_id="key-1", time=DAY)])  # comes late: does not turn the clock back
    assert store.keys()[0].last_used_time == DAY + 61


def test_old_usage_is_forgotten_and_keys_are_not(store: Store) -> None:
    """Of more rows than one portion."""
    store.add_key(key(1))
    for portion in range(3):
        store.add_usage([row(key_id="key-1", time=DAY + portion) for _ in range(8000)])
    assert store.prune(DAY + 2) == 16_000
    assert store.prune(DAY + 2) == 0
    assert (total(store).requests, len(store.keys())) == (8000, 1)


@settings(max_examples=examples(20))
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=8))
def test_what_is_sent_again_is_stored_once(lasting: Store, batches: list[list[int]]) -> None:
    """However batches overlap, and within one: each id once, and every new one counted once."""
    example = next(_numbers)
    model = f"example {example}"
    new = [lasting.add_usage([row(id=f"{example}/{number}", model=model) for number in numbers]) for numbers in batches]
    sent = {number for numbers in batches for number in numbers}
    assert sum(new) == len(sent)
    assert sum_of(lasting.usage(by=(), since=0, until=2**33, model=model)).requests == len(sent)


@settings(max_examples=examples(30))
@given(st.text(st.characters(), max_size=30), st.sampled_from(["request_id", "key_id", "key", "model", "backend"]))
def test_whatever_callers_write_can_be_stored(lasting: Store, text: str, field: str) -> None:
    """And asked for: NUL and halves of surrogate pairs too, which not every database takes."""
    assert lasting.add_usage([row(**{field: text})]) == 1
    assert lasting.add_usage([row(**{field: text * 1000})]) == 1
    assert sum_of(lasting.usage(by=("key", "model"), since=0, until=2**33, key=text, model=text)).errors == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"cost_usd": float("nan")},
        {"duration_s": float("inf")},
        {"time": float("nan")},
        {"time": 1e300},
        {"time": -1.0},
        {"cost_usd": 1e300},
        {"input_tokens": 2**63},
        {"output_tokens": -(2**70)},
        {"status": 2**40},
    ],
    ids=str,
)
def test_rows_that_no_database_takes_are_refused_whole(store: Store, fields: dict[str, Any]) -> None:
    """Neither stored with other values nor taken for a store that is away: with its neighbours, all or nothing."""
    with pytest.raises(StoreRefused, match="the usage row 'bad' has a number that makes no sense"):
        store.add_usage([row(), row(id="bad", **fields), row()])
    assert total(store).requests == 0


def test_readers_and_writers_do_not_disturb_each_other(store: Store) -> None:
    """Four threads write and read at once: nothing is refused, nothing lost, sums only grow."""
    problems: list[BaseException] = []

    def work(number: int) -> None:
        seen = 0
        try:
            for turn in range(20):
                store.add_usage([row(id=f"{number}/{turn}/{index}", key_id="key-1") for index in range(20)])
                now = total(store).requests
                assert now > seen
                seen = now
                store.change_key("key-1", models=(f"{number}/{turn}",))
        except BaseException as error:
            problems.append(error)

    store.add_key(key(1))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert total(store).requests == 4 * 20 * 20


# -- the tables' version --------------------------------------------------------------------------------------


def engine_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


def test_the_migrations_make_the_tables(store: Store, url: str) -> None:
    """What they come to is what tables.py says, and the newest of them is the one that is known as such."""
    with engine_of(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, METADATA) == []
        assert context.get_current_revision() == migrations.HEAD
    found = sorted(path.stem for path in (Path(migrations.__file__).parent / "versions").glob("r*.py"))
    assert [name[1:5] for name in found] == list(migrations.REVISIONS)


@pytest.mark.parametrize("revision", migrations.REVISIONS[:-1])
def test_an_older_database_is_brought_up_to_date(url: str, revision: str) -> None:
    """From every older revision, with what is in it."""
    with engine_of(url).begin() as connection:
        migrations.upgrade(connection, revision)
        connection.execute(
            sa.text(
                "INSERT INTO llm_router_keys (id, name, digest, scopes, models, limits, created_time)"
                " VALUES ('old', 'from before', :digest, '[\"inference\"]', '[]', '{}', 5)"
            ),
            {"digest": b"d" * 32},
        )
    store = Store.open(url)
    try:
        assert store.keys() == [StoredKey(id="old", name="from before", digest=b"d" * 32, created_time=5.0)]
        assert store.add_usage([row()]) == 1
    finally:
        store.close()


def test_a_database_of_a_newer_program_is_left_alone(store: Store, url: str) -> None:
    """Refused with both revisions and the way out; it is as it was."""
    with engine_of(url).begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(
        StoreUnavailable, match="is of a newer version of this program .tables 9999, known are"
    ) as caught:
        Store.open(url)
    assert PASSWORD not in str(caught.value)
    with engine_of(url).begin() as connection:
        assert connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all() == ["9999"]


def test_keys_that_cannot_be_read_are_told_by_their_id(store: Store, url: str) -> None:
    """A row that somebody edited by hand is no reason to let everybody in."""
    store.add_key(key(1))
    with engine_of(url).begin() as connection:
        connection.execute(sa.text("UPDATE llm_router_keys SET scopes = '[\"root\"]'"))
    with pytest.raises(StoreUnavailable, match="key 'key-1' cannot be read: Invalid enum value 'root'"):
        store.keys()


# -- processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts writers; ends those that are left."""
    processes: list[subprocess.Popen[str]] = []

    def writer(url: str, batches: int, first: int = 0) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        process = subprocess.Popen(
            [sys.executable, str(WRITER), url, str(first), str(batches)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        processes.append(process)
        return process

    yield writer
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_programs_that_start_at_once_all_succeed(url: str, start: Callable[..., subprocess.Popen[str]]) -> None:
    """On an empty database: one makes the tables, the others wait for it; what all of them send is stored once."""
    programs = [start(url, 3) for _ in range(4)]
    for program in programs:
        out, problems = program.communicate(timeout=40)
        assert (program.returncode, out.split()) == (0, ["open", "0", "1", "2"]), problems
    store = Store.open(url)
    assert total(store).requests == 3 * BATCH_ROWS
    store.close()


@pytest.mark.slow
def test_killing_a_writer_loses_nothing_that_was_acknowledged(
    url: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """kill -9 in the middle of writing: whole batches are there, at most one more than was told; sent again, each is
    stored once."""
    store = Store.open(url)
    stored = 0  # batches
    for victim in range(3):
        writer = start(url, 1_000_000, stored)
        assert writer.stdout is not None
        told = list(itertools.islice(writer.stdout, 30 + 7 * victim))
        writer.send_signal(signal.SIGKILL)
        told += list(writer.stdout)
        acknowledged = len(told) - 1  # the first line says that the store is open
        now, rest = divmod(total(store).requests, BATCH_ROWS)
        assert rest == 0
        assert stored + acknowledged <= now <= stored + acknowledged + 1
        stored = now + 2
        assert sum(store.add_usage(batch(number)) for number in range(stored)) == 2 * BATCH_ROWS
        assert total(store).requests == stored * BATCH_ROWS
    store.close()


# -- PostgreSQL alone -------------------------------------------------------------------------------------------


def test_a_wrong_password_is_told_without_it(postgres: Postgres) -> None:
    """Neither the wrong one nor any other part of the URL that could be secret; nor what the libraries made of it."""
    postgres.database()
    with pytest.raises(StoreUnavailable, match="password authentication failed for user") as caught:
        Store.open(postgres.url("test1", password="hun/ter2"))
    error: BaseException | None = caught.value
    while error is not None:
        assert "hun/ter2" not in str(error)
        assert "hun%2Fter2" not in str(error)
        error = error.__cause__


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda url: url.rpartition("/")[0] + "/nothing", 'database "nothing" does not exist'),
        (lambda url: url.replace("127.0.0.1", "127.0.0.1:1/x?host=127.0.0.1").partition("?")[0], "refused"),
        (lambda url: url + "?sslmode=hunter2", "sslmode"),
    ],
)
def test_a_server_that_cannot_be_used_is_told(postgres: Postgres, change: Callable[[str], str], problem: str) -> None:
    """With the place, without the password."""
    with pytest.raises(StoreUnavailable, match=problem) as caught:
        Store.open(change(postgres.url("test1")))
    assert str(caught.value).startswith("postgresql://postgres@127.0.0.1")
    assert PASSWORD not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_tables_that_another_program_is_changing_are_waited_for_only_so_long(postgres: Postgres) -> None:
    """The lock is the server's own: it is free again when its holder is gone."""
    url = postgres.database()
    with postgres.connect(url.rpartition("/")[2]) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [0x6C6C_6D72_6F75_7465])
        with pytest.raises(StoreUnavailable, match="another program has been changing the tables for 0.1 s"):
            Store.open(url, lock_wait_s=0.1)
    Store.open(url, lock_wait_s=10).close()


def test_a_server_that_was_away_is_used_again() -> None:
    """Connections that broke are made anew: the first call after the server is back succeeds."""
    with postgres_server() as server:
        store = Store.open(server.database())
        store.add_usage([row()])
        server.stop()
        with pytest.raises(StoreUnavailable) as caught:
            store.add_usage([row()])
        assert PASSWORD not in str(caught.value)
        server.start()
        assert store.add_usage([row()]) == 1
        assert total(store).requests == 2
        store.close()


def test_a_journal_outlives_its_server() -> None:
    """Rows that came while PostgreSQL was away are stored when it is back, each once."""

    async def scenario() -> None:
        with postgres_server() as server:
            store, done = Store.open(server.database()), list[int]()
            async with UsageJournal(store.add_usage, commit_s=0.01, retry_s=(0.01, 0.1)) as journal:

                def send(number: int) -> None:
                    journal.take(batch(number), lambda: done.append(number))

                send(0)
                await until(lambda: done == [0])
                server.stop()
                send(1)
                await until(lambda: journal.problem)
                send(2)
                server.start()
                send(0)  # its acknowledgement was lost
                await until(lambda: sorted(done) == [0, 0, 1, 2])
            assert total(store).requests == 3 * BATCH_ROWS
            store.close()

    run(scenario(), timeout_s=40)


def test_a_socket_of_this_machine(postgres: Postgres) -> None:
    """A server that is reached by its Unix socket: its folder is the parameter `host`."""
    name = postgres.database().rpartition("/")[2]
    encoded = postgres.url("").partition("//")[2].partition("@")[0]
    store = Store.open(f"postgresql://{encoded}@:{postgres.port}/{name}?host={postgres.sockets}")
    assert repr(store) == f"Store('postgresql://postgres@:{postgres.port}/{name}')"
    store.close()


def test_a_user_without_rights_is_no_reason_to_lose_rows(postgres: Postgres) -> None:
    """Rights can be given later: the store is unavailable, the rows are not refused."""
    url = postgres.database()
    Store.open(url).close()
    name = url.rpartition("/")[2]
    with postgres.connect(name) as connection:
        connection.execute("CREATE USER reader PASSWORD 'may only read'")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    store = Store.open(postgres.url(name, "reader", "may only read"))
    with pytest.raises(StoreUnavailable, match="permission denied for table llm_router_usage"):
        store.add_usage([row()])
    store.close()
