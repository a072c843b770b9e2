"""Submissions, and claims with completions, through the store, on an embedded PostgreSQL with its durable settings."""

from __future__ import annotations

import asyncio
import json
import shutil

import asyncpg
from measured import QUICK_REPEATS, Findings, Measured, measure_async, state_directory

from supervisor.model.job import AttemptEnd, HostInfo, Lease, Me, Outcome
from supervisor.ports import Room
from supervisor.store import embedded
from supervisor.store.migrate import ensure_schema
from supervisor.store.pg import PgStore

SPEC = {"kind": "steps", "name": "bench", "steps": [{"name": "s", "run": ["true"]}]}
JOBS = {1: 500, 10: 4_000, 100: 12_000, 500: 20_000}
SUBMITTED = 5_000
HOST = HostInfo(
    name="bench",
    labels=(),
    slots=500,
    cpu=None,
    memory=None,
    version="0",
    machine_id="bench",
    boot_id="bench",
    pid=1,
)


class Bench:
    """One host's store, its session and its counter."""

    def __init__(self, store: PgStore, me: Me, dsn: str) -> None:
        self.store = store
        self.me = me
        self.dsn = dsn
        self.counter = me.epoch << 32

    async def fill(self, count: int) -> None:
        """Ready jobs, by one statement."""
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute(
                "SELECT count(bsup.submit($1::jsonb)) FROM generate_series(1, $2)", json.dumps(SPEC), count
            )
            await connection.execute("VACUUM ANALYZE bsup.ready, bsup.lease")
        finally:
            await connection.close()

    async def drain(self, batch: int, jobs: int) -> None:
        """Claims and finishes ``jobs`` jobs, ``batch`` at a time, one statement after the other."""
        needs = tuple(need.id for need in await self.store.needs(0))
        room = Room(slots=batch, slots_total=batch, cpu=None, memory=None, needs=needs)
        for _ in range(jobs // batch):
            leases = await self.store.claim(self.me, self.counter + 1, room)
            assert len(leases) == batch
            self.counter += batch
            verdicts = await self.store.finish(self.me, [_end(lease) for lease in leases])
            assert all(verdict.recorded for verdict in verdicts)

    async def submit(self, count: int) -> None:
        """One call each, as many at a time as the store has connections for it."""
        left = iter(range(count))

        async def one_after_another() -> None:
            for _ in left:
                await self.store.submit(SPEC, key=None, after=(), submitter="bench")

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(one_after_another())


def _end(lease: Lease) -> AttemptEnd:
    return AttemptEnd(
        lease=lease.id, job=lease.job, attempt=lease.attempt, outcome=Outcome.SUCCEEDED, exit_code=0, steps=[]
    )


async def run(quick: bool) -> Findings:
    state = state_directory()
    try:
        dsn = embedded.ensure_running(state)
        await ensure_schema(dsn, True)
        async with PgStore(dsn) as store:
            grant = await store.open_session(HOST, 3600)
            bench = Bench(store, grant.me, dsn)
            found = await _claims(bench)
            found.append(
                await measure_async("store: submit", "jobs/s", 1_000, lambda: bench.submit(1_000), "3 at a time")
            )
            found.append(
                await measure_async("SQL: submit", "jobs/s", SUBMITTED, lambda: bench.fill(SUBMITTED), "one statement")
            )
            return Findings(found)
    finally:
        embedded.stop(state)
        shutil.rmtree(state, ignore_errors=True)


async def _claims(bench: Bench) -> list[Measured]:
    found = []
    for batch, jobs in JOBS.items():
        await bench.fill(jobs * QUICK_REPEATS)

        async def work(batch: int = batch, jobs: int = jobs) -> None:
            await bench.drain(batch, jobs)

        found.append(await measure_async(f"store: claim {batch} and finish them", "jobs/s", jobs, work, "in turn"))
    return found
