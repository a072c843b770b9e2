"""The store alone: claims with completions in batches, submissions; what a backlog, a past and a held snapshot cost.

One stream through ``PgStore``, no daemon: what the statements and the client's share of them allow. ``bench_scale``
asks the same of whole daemons.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import postgres
from measured import Bar, Findings, Measured, at_least, interleave, of_samples, rate, ratio, repeats

from supervisor.model.job import AttemptEnd, HostInfo, Lease, Me, Outcome
from supervisor.ports import Room
from supervisor.store.migrate import ensure_schema
from supervisor.store.pg import PgStore

SPEC = {"kind": "noop"}
JOBS = {1: 500, 10: 4_000, 100: 10_000, 500: 20_000}
TAKEN = 10_000
BACKLOG = 1_000_000
FINISHED = 2_000_000
CHUNK = 5_000
SUBMITTED = 50_000
SINGLE = 1_000
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
    kinds=("steps", "noop"),
)

# Jobs as a bulk submission makes them, without one.
NEW = """
WITH new AS (
    INSERT INTO bsup.job (need_id, priority, attempts, loss_budget, steps_total, has_secrets, cpu, memory, submitted_at,
                          name, submitter, spec)
    SELECT bsup.intern_need('noop', '{}'), 127, 1, 5, 0, false, 0, 0, now(), 'noop', 'bench',
           '{"kind": "noop", "name": "noop"}'
    FROM generate_series(1, $1)
    RETURNING id, need_id
)
"""
READY = f"""{NEW}
INSERT INTO bsup.ready (job_id, ready_at, memory, need_id, cpu, generation, revision, attempt, failures, losses,
                        releases, priority, loss_budget, alone)
SELECT n.id, now(), 0, n.need_id, 0, 1, 2, 0, 0, 0, 0, 127, 5, false FROM new n
"""
PAST = f"""{NEW}
INSERT INTO bsup.finished (job_id, generation, need_id, state, revision, attempt, failures, losses, releases, leased_at,
                           started_at, ended_at, recorded_at, host, session, counter)
SELECT n.id, 1, n.need_id, 'succeeded', 4, 1, 0, 0, 0, now(), now(), now(), now(), 'bench', gen_random_uuid(), n.id
FROM new n
"""


class Stream:
    """One host's store, its session and its counter."""

    def __init__(self, store: PgStore, connection: asyncpg.Connection, me: Me) -> None:
        self.store = store
        self.connection = connection
        self._me = me
        self._counter = me.epoch << 32

    async def add(self, statement: str, count: int) -> None:
        await self.connection.execute(statement, count)
        await self.connection.execute("VACUUM ANALYZE")

    async def drain(self, batch: int, jobs: int) -> None:
        """Claims and finishes ``jobs`` jobs, ``batch`` at a time, one statement after the other."""
        needs = tuple(need.id for need in await self.store.needs(0))
        room = Room(slots=batch, slots_total=batch, cpu=None, memory=None, needs=needs)
        for _ in range(jobs // batch):
            leases = await self.store.claim(self._me, self._counter + 1, room)
            self._counter += batch
            verdicts = await self.store.finish(self._me, [_end(lease) for lease in leases])
            if len(leases) != batch or not all(verdict.recorded for verdict in verdicts):
                raise RuntimeError("a claim or a completion fell short")

    async def timed(self, jobs: int) -> float:
        """The rate of a drain in batches of 500."""
        began = time.perf_counter()
        await self.drain(500, jobs)
        return jobs / (time.perf_counter() - began)


def _end(lease: Lease) -> AttemptEnd:
    return AttemptEnd(
        lease=lease.id,
        job=lease.job,
        attempt=lease.attempt,
        outcome=Outcome.SUCCEEDED,
        started_at=lease.leased_at,
        ended_at=lease.leased_at,
    )


@asynccontextmanager
async def stream(database: str) -> AsyncIterator[Stream]:
    """A database made anew, with bsup's schema."""
    server = postgres.running()
    await server.create(database)
    dsn = server.dsn(database)
    await ensure_schema(dsn, True)
    connection = await asyncpg.connect(dsn)
    try:
        async with PgStore(dsn, statement_timeout=60.0) as store:
            yield Stream(store, connection, (await store.open_session(HOST, 3600)).me)
    finally:
        await connection.close()
        await server.drop(database)


async def run(quick: bool) -> Findings:
    measured: list[Measured] = []
    bars: list[Bar] = []
    rounds = repeats(quick)
    async with stream("store") as alone:
        await _batches(alone, rounds, measured)
        await _submissions(alone, rounds, measured)
    async with stream("store_free") as free:
        await _held(free, rounds, measured, bars)
        if not quick:
            await _beside(free, "backlog", READY, BACKLOG, f"{BACKLOG:,} ready", rounds, measured, bars)
            await _beside(free, "past", PAST, FINISHED, f"{FINISHED:,} finished", rounds, measured, bars)
    return Findings(measured, bars)


async def _batches(alone: Stream, rounds: int, measured: list[Measured]) -> None:
    await alone.add(READY, sum(JOBS.values()) * rounds)

    def drain(batch: int, jobs: int) -> Callable[[], Awaitable[None]]:
        return lambda: alone.drain(batch, jobs)

    found = await interleave({str(batch): rate(jobs, drain(batch, jobs)) for batch, jobs in JOBS.items()}, rounds)
    measured += [
        of_samples(f"store: claim {batch} and finish them", "jobs/s", samples, "one stream, in turn")
        for batch, samples in found.items()
    ]


async def _submissions(alone: Stream, rounds: int, measured: list[Measured]) -> None:
    listed = json.dumps([{**SPEC, "args": {"n": number}} for number in range(CHUNK)])
    args = [json.dumps({"n": number}) for number in range(CHUNK)]

    async def list_of_specs() -> None:
        for _ in range(SUBMITTED // CHUNK):
            await alone.connection.fetchval("SELECT bsup.submit_many($1::jsonb)", listed)

    async def spec_and_args() -> None:
        for _ in range(SUBMITTED // CHUNK):
            await alone.connection.fetchval("SELECT bsup.submit_many($1::jsonb, $2::jsonb[])", json.dumps(SPEC), args)

    async def single() -> None:
        left = iter(range(SINGLE))

        async def one_after_another() -> None:
            for _ in left:
                await alone.store.submit(SPEC, key=None, after=(), submitter="bench")

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(one_after_another())

    contest = {
        "bulk submit, a list of specs": rate(SUBMITTED, list_of_specs),
        "bulk submit, one spec and many args": rate(SUBMITTED, spec_and_args),
        "submit one by one": rate(SINGLE, single),
    }
    notes = [f"{CHUNK:,} a call"] * 2 + ["3 at a time"]
    for (what, samples), note in zip((await interleave(contest, rounds)).items(), notes, strict=True):
        measured.append(of_samples(f"store: {what}", "jobs/s", samples, note))


async def _held(free: Stream, rounds: int, measured: list[Measured], bars: list[Bar]) -> None:
    """A snapshot older than the jobs: nothing that a drain deletes can be cleaned away while it lasts."""
    jobs = JOBS[500]
    async with stream("store_held") as held:
        holder = await postgres.running().admin("store_held")

        async def with_snapshot() -> float:
            async with holder.transaction(isolation="repeatable_read"):
                await holder.execute("SELECT count(*) FROM bsup.ready")
                await held.add(READY, jobs)
                return await held.timed(jobs)

        async def without() -> float:
            await free.add(READY, jobs)
            return await free.timed(jobs)

        try:
            found = await interleave({"with": with_snapshot, "without": without}, rounds)
        finally:
            await holder.close()
    what = f"store: drain {jobs:,}"
    measured += [
        of_samples(f"{what} with a snapshot held open", "jobs/s", found["with"], "batches of 500"),
        of_samples(f"{what} without", "jobs/s", found["without"], "batches of 500"),
    ]
    bars.append(at_least(f"{what} with a snapshot held open, to without", ratio(found["with"], found["without"]), 0.6))


async def _beside(
    free: Stream,
    name: str,
    statement: str,
    count: int,
    what: str,
    rounds: int,
    measured: list[Measured],
    bars: list[Bar],
) -> None:
    """A drain beside many rows, in turn with one beside none."""
    async with stream(f"store_{name}") as crowded:
        await crowded.add(statement, count)

        def taking(one: Stream) -> Callable[[], Awaitable[float]]:
            async def take() -> float:
                await one.add(READY, TAKEN)
                return await one.timed(TAKEN)

            return take

        found = await interleave({"beside": taking(crowded), "alone": taking(free)}, rounds)
    beside = f"store: drain {TAKEN:,} beside {what}"
    measured.append(of_samples(beside, "jobs/s", found["beside"], "batches of 500"))
    bars.append(at_least(f"{beside}, to beside none", ratio(found["beside"], found["alone"]), 0.9))
