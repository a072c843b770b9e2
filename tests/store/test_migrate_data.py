"""A database in use is brought up to date: what lived and what ended goes on under the new schema."""

from __future__ import annotations

import json
import uuid

import asyncpg
import pytest

from supervisor.model.job import Filter, Me, Outcome, State
from supervisor.store import migrate
from supervisor.store.pg import PgStore
from tests.store.store_bench import TERM, Daemon, host, spec

pytestmark = pytest.mark.anyio

OLD = 7

SESSION = """
INSERT INTO bsup.session (id, incarnation, epoch, host, labels, slots, version, machine_id, boot_id, pid, term,
                          started_at, renewed_at, expires_at)
VALUES ($1, $2, 1, 'alpha', '{docker}', 8, '0', 'm', 'b', 1, 3600, now(), now(), now() + interval '1 hour')
"""
CLAIM = """
WITH gone AS (DELETE FROM bsup.ready r WHERE r.job_id = $1 RETURNING r.*)
INSERT INTO bsup.lease (session, counter, job_id, need_id, priority, loss_budget, cpu, memory, alone, generation,
                        revision, attempt, failures, losses, releases, ready_at, leased_at)
SELECT $2, (1::bigint << 32) + $3, g.job_id, g.need_id, g.priority, g.loss_budget, g.cpu, g.memory, g.alone,
       g.generation, g.revision + 1, g.attempt + 1, g.failures, g.losses, g.releases, g.ready_at, now()
FROM gone g
"""
FINISH = """
SELECT bsup.finish($1, $2, ARRAY[(1::bigint << 32) + $3], ARRAY[$4::bigint], ARRAY[1], ARRAY[$5], ARRAY[0::smallint],
                   NULL, NULL, NULL, NULL, NULL, NULL, $6, false)
"""
STEPS = '[{"counter": 4294967297, "index": 0, "name": "s", "state": "succeeded", "exit_code": 0}]'


class Before:
    """A host and its jobs on the schema of before, as its daemon wrote them."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.session, self.incarnation = uuid.uuid4(), uuid.uuid4()
        self.leased = 0

    async def submit(self, after: list[int] | None = None, **changes: object) -> int:
        job = json.dumps(spec(**changes))
        return int(await self.connection.fetchval("SELECT bsup.submit($1, NULL, $2)", job, after))

    async def claim(self, job: int) -> int:
        self.leased += 1
        await self.connection.execute(CLAIM, job, self.session, self.leased)
        return self.leased

    async def finish(self, job: int, outcome: str, steps: str = "[]") -> None:
        number = await self.claim(job)
        await self.connection.execute(FINISH, self.session, self.incarnation, number, job, outcome, steps)


async def test_live_and_finished_jobs_go_on(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await asyncpg.connect(dsn)
    old = migrate.migrations()[:OLD]
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "migrations", lambda: old)
        await migrate.migrate(connection)
    before = Before(connection)
    await connection.execute(SESSION, before.session, before.incarnation)
    succeeded, failed = await before.submit(), await before.submit()
    await before.finish(succeeded, "succeeded", STEPS)
    await before.finish(failed, "failed")
    running, again = await before.submit(secrets={"T": "s3cret"}), await before.submit(attempts=2)
    await before.claim(running)
    await before.claim(again)
    child = await before.submit(after=[running, succeeded])
    ready = await before.submit(secrets={"U": "hush"}, priority=200, labels=["docker"])
    stopped = await before.submit()
    await before.claim(stopped)
    await connection.execute("SELECT bsup.cancel($1)", stopped)

    assert len(await migrate.migrate(connection)) == len(migrate.migrations()) - OLD
    await connection.close()

    async with PgStore(dsn) as store:
        states = {row.id: row.state async for page in store.list_jobs(Filter(all=True)) for row in page}
        assert states == {
            succeeded: State.SUCCEEDED,
            failed: State.FAILED,
            running: State.RUNNING,
            again: State.RUNNING,
            child: State.WAITING,
            ready: State.READY,
            stopped: State.RUNNING,
        }
        (attempt,) = await store.attempts(succeeded)
        assert (attempt.outcome, attempt.host, attempt.exit_code) == (Outcome.SUCCEEDED, "alpha", 0)
        assert [step.name for step in attempt.steps] == ["s"]
        # The daemon of before still renews, and the one after takes its session up.
        await store.renew(Me(before.session.hex, before.incarnation.hex, 1), TERM, False)
        grant = await store.resume_session(before.session.hex, before.incarnation.hex, host(), TERM, uuid.uuid4().hex)
        assert grant is not None
        daemon = Daemon(store, grant.me)
        leases = {lease.job: lease for lease in await store.leases(grant.me)}
        assert set(leases) == {running, again, stopped}
        assert leases[running].secrets == {"T": "s3cret"}
        assert [order.job for order in await store.stop_orders(grant.me)] == [stopped]
        assert await daemon.finish(leases[running]) == (True, "succeeded")
        assert await daemon.finish(leases[again], Outcome.FAILED, retry_delay=0.0) == (True, "ready")
        assert await daemon.finish(leases[stopped], Outcome.CANCELED) == (True, "canceled")
        claimed = await daemon.claim()
        assert [lease.job for lease in claimed] == [ready, again, child]
        assert claimed[0].secrets == {"U": "hush"}
        assert {await daemon.finish(lease) for lease in claimed} == {(True, "succeeded")}
        (row,) = await store.retry([failed], by="x")
        assert row.state is State.READY
        assert await store.delete([succeeded], by="x") == 1
