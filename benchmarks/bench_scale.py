"""What becomes of a queue's rate as work piles up: a backlog, a past, a transaction that nobody ends, a load.

Big tables are made once, by multiplying the rows of one job in SQL, and cloned. Beside them, and in turn with them, the
same work without: the bars are ratios of the two. PgQueuer and Graphile Worker take part where it makes a picture.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from arena import IDLE, WARM_UP, Arena
from contestants import BSUP, GRAPHILE, PGQUEUER, Contestant, Missing
from measured import Bar, Findings, Measured, at_least, interleave, of_samples, percentile, ratio, unmeasured
from multiply import multiply

TAKEN = 10_000
BACKLOGS = (20_000, 100_000, 1_000_000)
FINISHED = 10_000_000
HELD = 60_000  # enough for the dead rows that the transaction keeps to be in the way
ROUNDS = 5
PICTURE_ROUNDS = 3
LOADS = (10, 100, 1_000, 5_000)
LOAD_SECONDS = 3.0
LOAD_JOBS = 100  # at least
TICK = 0.01
# Of a backlog; then with a past; then with a transaction held open: at least so much of the rate without.
MUST = (0.9, 0.9, 0.6)

Point = dict[str, float | str]


async def run(quick: bool) -> Findings:
    if quick:
        return Findings()
    arena = Arena()
    scale = Scale(arena)
    try:
        await scale.against_backlog()
        await scale.against_past()
        await scale.against_held_transaction()
        await scale.against_load()
    except Missing as why:
        scale.notes["bsup"] = str(why)
        scale.bars.append(unmeasured("a queue that grows", "", str(why)))
    finally:
        arena.close()
    return Findings(scale.measured, scale.bars, scale.series, scale.notes)


class Scale:
    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.measured: list[Measured] = []
        self.bars: list[Bar] = []
        self.series: dict[str, list[Point]] = {"backlog": [], "load": []}
        self.notes: dict[str, str] = {}

    async def against_backlog(self) -> None:
        """10,000 of so many. The rest stays, and is filled up for the next round."""
        samples: dict[str, dict[str, list[float]]] = {}
        for contestant, rounds in ((BSUP, ROUNDS), (PGQUEUER, PICTURE_ROUNDS), (GRAPHILE, PICTURE_ROUNDS)):
            try:
                databases = {size: await self._with_backlog(contestant, size) for size in BACKLOGS}
                contest = {str(size): self._taking(contestant, databases[size], size) for size in BACKLOGS}
                samples[contestant.key] = await interleave(contest, rounds)
            except Missing as why:
                if contestant is BSUP:
                    raise
                self.notes[contestant.label] = f"left out: {why}"
                continue
            for size in BACKLOGS:
                row = of_samples(
                    f"{TAKEN:,} of {size:,}: {contestant.label}", "jobs/s", samples[contestant.key][str(size)]
                )
                self.measured.append(row)
                self.series["backlog"].append(
                    {
                        "who": contestant.label,
                        "backlog": size,
                        "jobs_per_s": row.value,
                        "low": row.low,
                        "high": row.high,
                    }
                )
                await self.arena.server.drop(databases[size])
        mine = samples[BSUP.key]
        value = ratio(mine[str(BACKLOGS[-1])], mine[str(BACKLOGS[0])])
        what = f"drain {TAKEN:,} of {BACKLOGS[-1]:,}, to {TAKEN:,} of {BACKLOGS[0]:,}"
        self.bars.append(at_least(what, value, MUST[0]))

    async def against_past(self) -> None:
        """The same work where many jobs are finished already."""
        past = await self._with_past()
        bare = f"{BSUP.key}_bare"
        await self.arena.server.create(bare, f"{BSUP.key}_template")
        contest = {"with": self._draining(past), "without": self._draining(bare)}
        await interleave(contest, 1)  # what was just copied is in nobody's cache
        found = await interleave(contest, ROUNDS)
        self._compare(f"drain with {FINISHED:,} finished rows", "drain without them", found, MUST[1])
        for database in (past, bare):
            await self.arena.server.drop(database)

    async def against_held_transaction(self) -> None:
        """A snapshot older than the jobs: no row that is deleted can be cleaned away."""

        def draining(is_held: bool) -> Callable[[], Awaitable[float]]:
            async def drain() -> float:
                database = await self.arena.fresh(BSUP)
                holder = await self.arena.server.admin(database)
                try:
                    if is_held:
                        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                        await holder.execute("SELECT count(*) FROM bsup.job")
                    return await self._submit_and_drain(database, HELD)
                finally:
                    await holder.close()

            return drain

        found = await interleave({"with": draining(True), "without": draining(False)}, ROUNDS)
        what = f"drain {HELD:,}"
        self._compare(f"{what} with a transaction held open", f"{what} without", found, MUST[2])

    async def against_load(self) -> None:
        """How soon jobs begin that come at a steady rate, in bursts of a hundredth of a second."""
        for contestant in (BSUP, PGQUEUER, GRAPHILE):
            times: dict[int, list[float]] = {load: [] for load in LOADS}
            tails: dict[int, list[float]] = {load: [] for load in LOADS}
            reached: dict[int, float] = {}
            for _ in range(PICTURE_ROUNDS):
                try:
                    for load, found, rate in await self._under_load(contestant):
                        times[load] += found
                        tails[load].append(percentile(found, 0.99))
                        reached[load] = rate
                except Missing as why:
                    if contestant is BSUP:
                        raise
                    self.notes[contestant.label] = f"left out: {why}"
                    break
            for load in LOADS:
                if not times[load]:
                    continue
                p50, p99 = (percentile(times[load], share) for share in (0.5, 0.99))
                what = f"pickup at {load:,} jobs/s, p99: {contestant.label}"
                note = f"p50 {p50:.2f} ms; {reached[load]:,.0f} jobs/s were reached"
                self.measured.append(Measured(what, "ms", p99, min(tails[load]), max(tails[load]), note))
                self.series["load"].append(
                    {"who": contestant.label, "offered": load, "p50_ms": p50, "p99_ms": p99, "reached": reached[load]}
                )

    # --- databases ---

    async def _with_backlog(self, contestant: Contestant, size: int) -> str:
        """A database with so many jobs ready, and its statistics."""
        print(f"    {contestant.label}: a backlog of {size:,}", file=sys.stderr, flush=True)
        database = f"{contestant.key}_{size}"
        await self.arena.server.create(database, await self._template(contestant))
        async with self.arena.client(contestant, database) as client:
            await client.bulk(0, size)
        await self._vacuum(database)
        return database

    async def _with_past(self) -> str:
        """A database in which so many jobs have succeeded."""
        print(f"    bsup: {FINISHED:,} finished", file=sys.stderr, flush=True)
        seed = f"{BSUP.key}_seed"
        await self.arena.server.create(seed, await self._template(BSUP))
        await self._submit_and_drain(seed, 1)
        connection = await self.arena.server.admin(seed)
        await multiply(connection, FINISHED)
        await connection.close()
        await self._vacuum(seed)
        past = f"{BSUP.key}_past"
        await self.arena.server.create(past, seed)
        await self.arena.server.drop(seed)
        return past

    async def _template(self, contestant: Contestant) -> str:
        await self.arena.fresh(contestant)
        return f"{contestant.key}_template"

    async def _vacuum(self, database: str) -> None:
        connection = await self.arena.server.admin(database)
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
        await connection.close()

    # --- samples ---

    def _taking(self, contestant: Contestant, database: str, size: int) -> Callable[[], Awaitable[float]]:
        """A rate: from the first job's start until 10,000 began, of those that the database shows gone by then."""

        async def take() -> float:
            connection = await self.arena.server.admin(database)
            try:
                if missing := size - await connection.fetchval(contestant.unfinished):
                    async with self.arena.client(contestant, database) as client:
                        await client.bulk(0, missing)
                await connection.execute("ANALYZE")
                await connection.execute("CHECKPOINT")
                before = await connection.fetchval(contestant.unfinished)
                async with self.arena.workers(contestant, database) as working:
                    await working.until(TAKEN)
                    ended = time.monotonic_ns()
                    left = await connection.fetchval(contestant.unfinished)
                    rate = (before - left) / (ended - working.stamps.first()) * 1e9
            finally:
                await connection.close()
            print(f"    {contestant.label}: {TAKEN:,} of {before:,}: {rate:,.0f}", file=sys.stderr, flush=True)
            return float(rate)

        return take

    def _draining(self, database: str) -> Callable[[], Awaitable[float]]:
        return lambda: self._submit_and_drain(database, BSUP.jobs)

    async def _submit_and_drain(self, database: str, jobs: int) -> float:
        async with self.arena.client(BSUP, database) as client:
            await client.bulk(0, jobs)
        rate = (await self.arena.drain(BSUP, database, jobs)).rate
        print(f"    {database}: {jobs:,}: {rate:,.0f}", file=sys.stderr, flush=True)
        return rate

    async def _under_load(self, contestant: Contestant) -> list[tuple[int, list[float], float]]:
        """Each of the loads for a while: the times from a job's commit to its start, and the load that was reached."""
        database = await self.arena.fresh(contestant)
        await (await self.arena.settled(database)).close()
        found = []
        number = WARM_UP
        total = WARM_UP + sum(int(load * LOAD_SECONDS) + LOAD_JOBS + load for load in LOADS)
        async with (
            self.arena.workers(contestant, database, jobs=total) as working,
            self.arena.client(contestant, database) as client,
        ):
            await working.begun()
            await asyncio.sleep(IDLE)
            for first in range(WARM_UP):
                await client.one(first)
                await working.job(first)
            for load in LOADS:
                burst = max(1, round(load * TICK))
                first, committed = number, list[tuple[int, int]]()
                began = time.monotonic()
                while (offered := (number - first) / load) < max(LOAD_SECONDS, LOAD_JOBS / load):
                    await asyncio.sleep(max(0.0, began + offered - time.monotonic()))
                    committed.append((number, await client.burst(number, burst)))
                    number += burst
                reached = (number - first) / (time.monotonic() - began)
                await working.until(number)
                times = [
                    max(0, working.stamps.job(one) - at) / 1e6
                    for start, at in committed
                    for one in range(start, start + burst)
                ]
                p99 = percentile(times, 0.99)
                print(f"    {contestant.label}: {load:,} jobs/s: p99 {p99:.2f} ms", file=sys.stderr, flush=True)
                found.append((load, times, reached))
        return found

    def _compare(self, what: str, without: str, found: dict[str, list[float]], bound: float) -> None:
        self.measured.append(of_samples(what, "jobs/s", found["with"]))
        self.measured.append(of_samples(without, "jobs/s", found["without"], "in turn with the one before"))
        self.bars.append(at_least(f"{what}, to without", ratio(found["with"], found["without"]), bound))
