"""What the tests of the store share: a migrated database, stores on it, and a clock that tests set.

The clock: ``bsup.clock()`` is replaced, in the test's own database only, by one that adds an offset from a table.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import asyncpg
import pytest

from supervisor.store.migrate import ensure_schema
from supervisor.store.pg import PgStore

FAKE_CLOCK = """
CREATE SCHEMA test;
CREATE TABLE test.clock (ahead interval NOT NULL);
INSERT INTO test.clock VALUES ('0');
CREATE OR REPLACE FUNCTION bsup.clock() RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$ SELECT clock_timestamp() + ahead FROM test.clock $$;
"""

EMPTY = """
TRUNCATE bsup.need, bsup.job, bsup.waiting, bsup.ready, bsup.lease, bsup.finished, bsup.attempt_row, bsup.step,
    bsup.log, bsup.log_chunk, bsup.edge, bsup.job_secret, bsup.submission_key, bsup.session, bsup.pulse, bsup.event
    RESTART IDENTITY;
INSERT INTO bsup.pulse DEFAULT VALUES;
DELETE FROM bsup.kind WHERE name NOT IN ('steps', 'noop');
UPDATE test.clock SET ahead = '0';
"""


class MakeDatabase(Protocol):
    def __call__(self, template: str | None = None) -> str: ...


def in_own_loop(work: Any) -> Any:
    """Runs a coroutine in a thread with a loop of its own: fixtures here are synchronous."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work)).result()


@pytest.fixture(scope="session")
def emptied_dsn(make_session_database: MakeDatabase) -> str:
    """One migrated database for all tests of a worker: emptying it takes a tenth of the time that making one does."""
    dsn = make_session_database()

    async def prepare() -> None:
        await ensure_schema(dsn, True)
        await _execute(dsn, FAKE_CLOCK)

    in_own_loop(prepare())
    return dsn


@pytest.fixture
def migrated_dsn(emptied_dsn: str) -> str:
    """The DSN of a migrated database without a row, whose clock can be set."""
    in_own_loop(_execute(emptied_dsn, EMPTY))
    return emptied_dsn


async def _execute(dsn: str, script: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(script)
    await connection.close()


@pytest.fixture
async def store(migrated_dsn: str) -> AsyncIterator[PgStore]:
    async with PgStore(migrated_dsn) as opened:
        yield opened


@pytest.fixture
async def other(migrated_dsn: str) -> AsyncIterator[PgStore]:
    """A second store on the same database: another daemon."""
    async with PgStore(migrated_dsn) as opened:
        yield opened


@pytest.fixture
async def sql(migrated_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A plain connection: what somebody else does."""
    connection = await asyncpg.connect(migrated_dsn)
    yield connection
    await connection.close()
