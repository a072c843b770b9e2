"""The schema's versions: applied once, by whoever comes first, and refused where they don't fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import asyncpg
import pytest

from supervisor.model.errors import StoreUnavailable
from supervisor.store import migrate, statements
from supervisor.store.migrate import SchemaError, ensure_schema, pending
from supervisor.store.pg import PgStore
from tests.store.store_bench import spec

pytestmark = pytest.mark.anyio

NAMES = [one.name for one in migrate.migrations()]


@pytest.fixture
async def empty(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def test_all_are_applied_in_order_and_once(empty: asyncpg.Connection) -> None:
    assert await pending(empty) == NAMES
    assert await migrate.migrate(empty) == NAMES
    assert await pending(empty) == []
    assert await migrate.migrate(empty) == []
    rows = await empty.fetch("SELECT number, name FROM bsup.migration ORDER BY number")
    assert [(row["number"], row["name"]) for row in rows] == list(enumerate(NAMES, 1))


async def test_many_may_try_at_once(dsn: str) -> None:
    done: list[list[str]] = []

    async def try_it() -> None:
        done.append(await ensure_schema(dsn, True))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(try_it)
    assert sorted(name for names in done for name in names) == NAMES


async def test_a_file_is_applied_whole_or_not(empty: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    good = migrate.migrations()
    broken = migrate.Migration(len(good) + 1, "0099_broken", 1, "CREATE TABLE bsup.half (a int); SELECT 1/0;")
    monkeypatch.setattr(migrate, "migrations", lambda: [*good, broken])
    with pytest.raises(SchemaError, match="0099_broken failed and changed nothing: division by zero"):
        await migrate.migrate(empty)
    assert await pending(empty) == ["0099_broken"]
    assert await empty.fetchval("SELECT to_regclass('bsup.half')") is None


async def test_a_schema_of_the_version_after_is_served_while_it_says_so(dsn: str, empty: asyncpg.Connection) -> None:
    await migrate.migrate(empty)
    newest = len(NAMES)
    insert = "INSERT INTO bsup.migration (number, name, oldest, checksum) VALUES ($1, $2, $3, '')"
    await empty.execute(insert, newest + 1, "0098_added_a_column", newest)
    assert await ensure_schema(dsn, False) == []
    await empty.execute(insert, newest + 2, "0099_dropped_it", newest + 1)
    with pytest.raises(SchemaError, match=r"too new for this bsup: it has migration 0099_dropped_it.*newer bsup"):
        await ensure_schema(dsn, True)


async def test_another_content_under_the_same_name_is_refused(empty: asyncpg.Connection) -> None:
    await migrate.migrate(empty)
    await empty.execute("UPDATE bsup.migration SET checksum = 'x' WHERE number = 2")
    with pytest.raises(SchemaError, match=f"migration {NAMES[1]} was applied with another content"):
        await pending(empty)


async def test_a_daemon_that_may_not_migrate_says_what_to_do(dsn: str) -> None:
    with pytest.raises(SchemaError, match="run `bsup migrate`"):
        await ensure_schema(dsn, False)
    async with PgStore(dsn) as store:
        with pytest.raises(StoreUnavailable, match="run `bsup migrate`"):
            await store.submit(spec(), key=None, after=[], submitter="x")


async def test_a_user_who_may_not_create_is_told(dsn: str, empty: asyncpg.Connection) -> None:
    # NOINHERIT and no rights: any role of the cluster will do, and these exist in every test database's cluster.
    await empty.execute(
        "DO $$ BEGIN CREATE ROLE bsup_test_nobody;"
        " EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
    )
    await empty.execute("SET ROLE bsup_test_nobody")
    with pytest.raises(SchemaError, match="may not apply migration 0001"):
        await migrate.migrate(empty)


def test_every_file_says_what_it_needs() -> None:
    assert [one.number for one in migrate.migrations()] == list(range(1, len(NAMES) + 1))
    for one in migrate.migrations():
        assert 1 <= one.oldest <= one.number


def test_every_statement_has_a_purpose() -> None:
    assert all(len(one.purpose) > 10 for one in statements.STATEMENTS.values())


def test_every_statement_is_used() -> None:
    code = "".join(path.read_text() for path in Path(migrate.__file__).parent.glob("*.py"))
    assert [name for name in statements.STATEMENTS if f'"{name}"' not in code] == []


@pytest.mark.parametrize("text", ["SELECT 1;", "-- name: x\nSELECT 1;\n", "-- name: x\n-- Purpose.\n"])
def test_a_statement_without_name_purpose_or_sql_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"name|purpose"):
        statements.parse(text)
