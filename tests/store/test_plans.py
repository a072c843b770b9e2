"""The hot statements at size: they find their rows through indexes, whatever the planner believes of their number.

A plan made for any batch (``force_generic_plan``, as the store's hot connections ask for) is explained on tables of
some 10,000 rows; statements that run inside functions are watched by the server's own counts of what they read.
"""

from __future__ import annotations

import json
import re

import asyncpg
import pytest

from supervisor.model.job import AttemptEnd, Filter, Outcome, State
from supervisor.store.pg import PgStore
from supervisor.store.statements import STATEMENTS
from tests.store.store_bench import TERM, Daemon, add, end_of, spec

pytestmark = pytest.mark.anyio

ROWS = 20_000

FILL = """
INSERT INTO bsup.job (need_id, priority, attempts, loss_budget, steps_total, has_secrets, cpu, memory, submitted_at,
                      name, submitter, spec)
SELECT j.need_id, j.priority, j.attempts, j.loss_budget, j.steps_total, false, 0, 0, j.submitted_at, j.name,
       j.submitter, j.spec
FROM bsup.job j, generate_series(1, $1::integer * 2) WHERE j.id = 1;
"""
READY = """
INSERT INTO bsup.ready (job_id, ready_at, memory, need_id, cpu, generation, revision, attempt, failures, losses,
                        releases, priority, loss_budget, alone)
SELECT j.id, now(), 0, j.need_id, 0, 1, 2, 0, 0, 0, 0, 127, 5, false FROM bsup.job j WHERE j.id > 1 AND j.id % 2 = 0
"""
FINISHED = """
INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases, ended_at)
SELECT j.id, 1, j.need_id, CASE WHEN j.id % 100 = 1 THEN 'failed' ELSE 'succeeded' END, 4, 1, 0, 0, 0, now()
FROM bsup.job j WHERE j.id > 1 AND j.id % 2 = 1
"""
BIG = ("job", "ready", "finished")
READ = "SELECT relname, seq_tup_read FROM pg_stat_user_tables WHERE schemaname = 'bsup' AND relname = ANY ($1)"


@pytest.fixture
async def filled(store: PgStore, sql: asyncpg.Connection) -> PgStore:
    await add(store)
    await sql.execute(FILL, ROWS)
    await sql.execute(READY)
    await sql.execute(FINISHED)
    await sql.execute("VACUUM ANALYZE bsup.job, bsup.ready, bsup.finished")
    return store


async def plan(sql: asyncpg.Connection, name: str, types: str, values: str) -> str:
    await sql.execute("SET plan_cache_mode = force_generic_plan; SET jit = off")
    await sql.execute(f"PREPARE explained ({types}) AS {STATEMENTS[name].sql}")
    rows = await sql.fetch(f"EXPLAIN (COSTS OFF) EXECUTE explained ({values})")
    return "\n".join(row[0] for row in rows)


async def read_in_order(sql: asyncpg.Connection) -> dict[str, int]:
    # What this connection itself read to fill the tables would be told some time later.
    await sql.execute("SELECT pg_stat_force_next_flush()")
    await sql.execute("SELECT pg_stat_clear_snapshot()")
    return {row["relname"]: row["seq_tup_read"] for row in await sql.fetch(READ, list(BIG))}


async def test_a_claim_walks_its_index_and_deletes_by_place(filled: PgStore, sql: asyncpg.Connection) -> None:
    found = await plan(
        sql,
        "claim",
        "uuid, uuid, bigint, bigint, integer, double precision, bigint, integer[], smallint, bigint",
        "gen_random_uuid(), gen_random_uuid(), 1, 500, 500, NULL, NULL, '{1}', 256, 0",
    )
    assert "Index Scan using ready_order" in found
    assert "Tid Scan on ready" in found
    assert "Index Scan using job_pkey" in found
    assert not re.search(r"Seq Scan on (ready|job|finished|lease)\b", found)


async def test_jobs_by_id_reach_the_primary_keys(filled: PgStore, sql: asyncpg.Connection) -> None:
    found = await plan(sql, "job_rows", "bigint[]", "'{1, 2, 3}'")
    assert not re.search(r"Seq Scan on (ready|job|finished)\b", found)


async def test_no_statement_of_a_daemon_reads_a_big_table_through(filled: PgStore, sql: asyncpg.Connection) -> None:
    store = filled
    daemon = await Daemon.begin(store, slots=1000)
    await store.pulse(TERM)
    before = await read_in_order(sql)
    (parent,) = await add(store)
    (child,) = await add(store, after=[parent], name="child")
    leases = await daemon.claim(300)
    outcomes = [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.LOST, Outcome.RELEASED, Outcome.CANCELED]
    ends: list[AttemptEnd] = [end_of(lease, outcomes[at % 5]) for at, lease in enumerate(leases)]
    await store.finish(daemon.me, ends)
    await store.finish(daemon.me, ends)
    await store.stop([parent, leases[0].job], grace=None, kill=False, by="x")
    await store.retry([leases[0].job], by="x")
    await store.show(child)
    await store.attempts(leases[0].job)
    await store.delete([child], by="x")
    await store.renew(daemon.me, TERM, False)
    await store.reap()
    await store.sweep(3600.0)
    for states in ((), (State.READY,), (State.FAILED,), (State.SUCCEEDED,)):
        async for _ in store.list_jobs(Filter(states=states, limit=20)):
            pass
        async for _ in store.list_lines(Filter(states=states, limit=20)):
            pass
    await store.submit(spec(), key="k", after=[], submitter="x")
    for link in (store._dispatch, store._users, store._upkeep):
        # What a backend read is told when it leaves.
        await link.close()
    after = await read_in_order(sql)
    assert json.dumps(after) == json.dumps(before)
