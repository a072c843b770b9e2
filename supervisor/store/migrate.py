"""The schema's versions: numbered SQL files of ``migrations/``, applied forward, each in a transaction of its own.

Called by ``bsup migrate``, by a daemon that starts, and by tests. Under an advisory lock: any number may try at once.
Each file names, in its first line, the oldest migration whose software still works with what it makes
(``-- oldest: N``): daemons of the version before run on, and may be started again, while a new one is rolled out.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import asyncpg
import msgspec

from supervisor.model.errors import BsupError, StoreUnavailable
from supervisor.store.connection import Connection, Connector, hang_up
from supervisor.store.faults import FAULTS, translate

# "bsup" as a number; the second key is 1 for migrations.
LOCK = (1651733872, 1)
# Not to_regclass: it may answer from a cache that the wait for an advisory lock does not bring up to date.
_HAS_MIGRATIONS = """
    SELECT EXISTS (SELECT FROM pg_catalog.pg_tables WHERE schemaname = 'bsup' AND tablename = 'migration')
"""
_NAME = re.compile(r"(\d{4})_\w+\.sql")
_OLDEST = re.compile(r"-- oldest: (\d+)\n")


class SchemaError(BsupError):
    """The database's schema and this version of bsup don't fit; nothing was changed. The message says what to do."""


class Migration(msgspec.Struct, frozen=True):
    """One file. ``oldest``: see the module."""

    number: int
    name: str
    oldest: int
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """All that this version brings, in order. Raises ValueError for files that are not numbered as they should be."""
    found = []
    for file in resources.files(__package__).joinpath("migrations").iterdir():
        if not file.name.endswith(".sql"):
            continue
        sql = file.read_text(encoding="utf-8")
        name, oldest = _NAME.fullmatch(file.name), _OLDEST.match(sql)
        if name is None or oldest is None:
            raise ValueError(f"{file.name}: a migration is named 0001_words.sql and begins with `-- oldest: N`")
        found.append(Migration(int(name[1]), file.name.removesuffix(".sql"), int(oldest[1]), sql))
    found.sort(key=lambda one: one.number)
    if [one.number for one in found] != list(range(1, len(found) + 1)):
        raise ValueError("migrations are not numbered 1, 2, 3 …")
    return found


async def pending(conn: Connection) -> list[str]:
    """Names of the migrations that the database lacks. SchemaError: it is too new, or was made by other files."""
    try:
        if not await conn.fetchval(_HAS_MIGRATIONS):
            return [one.name for one in migrations()]
        rows = await conn.fetch("SELECT number, name, oldest, checksum FROM bsup.migration ORDER BY number")
    except FAULTS as error:
        raise translate(error, "migrate") from error
    known = {one.number: one for one in migrations()}
    newest = max(known)
    for row in rows:
        mine = known.get(row["number"])
        if mine is None and row["oldest"] > newest:
            raise SchemaError(
                f"the database's schema is too new for this bsup: it has migration {row['name']}, this version knows "
                f"them up to {known[newest].name}. Install the newer bsup on this host."
            )
        if mine is not None and row["checksum"] != mine.checksum:
            raise SchemaError(
                f"migration {row['name']} was applied with another content than this version has. Install the version "
                "that the database was made with, or use a new database."
            )
    applied = {row["number"] for row in rows}
    return [one.name for number, one in sorted(known.items()) if number not in applied]


async def migrate(conn: Connection) -> list[str]:
    """Applies what is pending, each file whole or not at all; returns names. Raises SchemaError, StoreUnavailable."""
    done = []
    for one in migrations():
        try:
            if await _apply(conn, one):
                done.append(one.name)
        except FAULTS as error:
            if isinstance(error, asyncpg.InsufficientPrivilegeError):
                raise SchemaError(f"the database's user may not apply migration {one.name}: {error}") from error
            told = translate(error, f"migration {one.name}")
            if isinstance(told, StoreUnavailable):
                raise told from error
            raise SchemaError(f"migration {one.name} failed and changed nothing: {error}") from error
    return done


async def _apply(conn: Connection, one: Migration) -> bool:
    async with conn.transaction():
        # Of the transaction, not of the session: PgBouncer gives each transaction another session.
        await conn.execute("SELECT pg_advisory_xact_lock($1, $2)", *LOCK)
        if not await conn.fetchval(_HAS_MIGRATIONS):
            await conn.execute(
                "CREATE SCHEMA IF NOT EXISTS bsup;"
                "CREATE TABLE bsup.migration (number integer PRIMARY KEY, name text NOT NULL, oldest integer NOT NULL,"
                " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
            )
        if one.name not in await pending(conn):
            return False
        # A long-running statement of a migration is not what the timeout is for.
        await conn.execute("SET LOCAL statement_timeout = 0")
        await conn.execute(one.sql)
        await conn.execute(
            "INSERT INTO bsup.migration (number, name, oldest, checksum) VALUES ($1, $2, $3, $4)",
            one.number,
            one.name,
            one.oldest,
            one.checksum,
        )
        return True


async def ensure_schema(dsn: str, migrate: bool, *, connect_timeout: float = 10.0) -> list[str]:
    """Checks that the schema is what this version needs, and makes it so if ``migrate``; returns what it applied.

    Raises SchemaError, which says what to do, and StoreUnavailable.
    """
    connector = Connector(dsn, application_name="bsup migrate", connect_timeout=connect_timeout, statement_timeout=60.0)
    conn = await connector.connect()
    try:
        missing = await pending(conn)
        if missing and not migrate:
            raise SchemaError(
                f"the database lacks {len(missing)} migration(s), from {missing[0]} on: run `bsup migrate`, or set "
                "`database.migrate = true`."
            )
        return await _migrate(conn) if missing else []
    finally:
        await hang_up(conn)


_migrate = migrate
