"""bsup and the peers at the same work: drains of no-op jobs, bulk submissions, how soon an idle worker begins a job.

All in turn, on one PostgreSQL. The bare loop is what bsup's own two statements allow: no actors, no mailboxes.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence

from arena import Arena
from contestants import BARE, BSUP, DRAIN, GRAPHILE, OBAN, PEERS_ALL, PGQUEUER, PROCRASTINATE, Contestant, Missing
from measured import (
    REPEATS,
    Bar,
    Findings,
    Measured,
    Sampler,
    at_least,
    at_most,
    interleave,
    of_samples,
    percentile,
    ratio,
    repeats,
    unmeasured,
)

BULK = 100_000
PICKUPS = 500
DRAINED = "drain {jobs:,} no-op jobs: {label}"
Samples = dict[str, list[float]]


async def run(quick: bool) -> Findings:
    arena = Arena()
    bench = Queues(arena, quick)
    try:
        await bench.drains()
        if not quick:
            await bench.two_at_work()
        await bench.bulks()
        await bench.pickups()
        return Findings(bench.measured, bench.bars, bench.series, bench.notes)
    finally:
        arena.close()


class Queues:
    """What was found so far. A contestant that fails is left out from then on, and ``notes`` say why."""

    def __init__(self, arena: Arena, quick: bool) -> None:
        self.arena = arena
        self.quick = quick
        self.measured: list[Measured] = []
        self.bars: list[Bar] = []
        self.series: dict[str, list[dict[str, float | str]]] = {}
        self.notes: dict[str, str] = {}

    async def drains(self) -> None:
        everybody = (BSUP, BARE, PGQUEUER, GRAPHILE) if self.quick else (BSUP, BARE, *PEERS_ALL)
        submitted: Samples = {}

        async def drain(contestant: Contestant) -> float:
            database = await self.arena.fresh(contestant)
            async with self.arena.client(contestant, database) as client:
                seconds = await client.bulk(0, contestant.jobs)
            submitted.setdefault(contestant.key, []).append(contestant.jobs / seconds)
            return (await self.arena.drain(contestant, database, contestant.jobs)).rate

        rounds = repeats(self.quick)
        found = await self._in_turn(everybody, drain, rounds)
        for contestant in of_those(everybody, found):
            what = DRAINED.format(jobs=contestant.jobs, label=contestant.label)
            self._row(what, "jobs/s", found[contestant.key], contestant.settings)
        if not self.quick:
            for contestant in of_those(everybody, submitted):
                if contestant not in (BSUP, BARE, PGQUEUER, GRAPHILE):
                    what = f"bulk submit of {contestant.jobs:,}: {contestant.label}"
                    self._row(what, "jobs/s", submitted[contestant.key])
        for other, bound in ((PGQUEUER, 2.0), (GRAPHILE, 1.0), (BARE, 0.4)):
            self._bar_ratio(f"drain, to {other.label}", found.get("bsup"), found.get(other.key), bound)
        self.series["drain"] = [
            {"who": contestant.label, "jobs_per_s": of_samples("", "", found[contestant.key]).value}
            for contestant in of_those(everybody, found)
        ]

    async def two_at_work(self) -> None:
        """Both wait when the jobs are committed: so both begin with the first."""

        def daemons(count: int) -> Callable[[], Awaitable[float | None]]:
            return lambda: self._guarded(BSUP, lambda _: self.arena.drain_waiting(BSUP, DRAIN, count))

        found = await interleave({"one": daemons(1), "two": daemons(2)}, REPEATS)
        for name, samples in found.items():
            if samples:
                self._row(f"{DRAIN:,} committed at once while {name} of bsup's daemons waits", "jobs/s", samples)
        self._bar_ratio("drain with two daemons, to one", found["two"], found["one"], 1.0)

        async def two(contestant: Contestant) -> float:
            database = await self.arena.fresh(contestant)
            async with self.arena.client(contestant, database) as client:
                await client.bulk(0, contestant.jobs)
            return (await self.arena.drain(contestant, database, contestant.jobs, 2)).rate

        peers = (PGQUEUER, GRAPHILE)
        twos = await self._in_turn(peers, two, REPEATS)
        for contestant in of_those(peers, twos):
            what = f"drain {contestant.jobs:,} by two processes: {contestant.label}"
            self._row(what, "jobs/s", twos[contestant.key], contestant.settings)

    async def bulks(self) -> None:
        async def submit(contestant: Contestant, **settings: str) -> float:
            database = await self.arena.fresh(contestant)
            await (await self.arena.settled(database)).close()
            async with self.arena.client(contestant, database, **settings) as client:
                return BULK / await client.bulk(0, BULK)

        everybody = (BSUP, PGQUEUER, GRAPHILE)
        contest: dict[str, Sampler] = {one.key: lambda one=one: self._guarded(one, submit) for one in everybody}
        contest["specs"] = lambda: self._guarded(BSUP, lambda one: submit(one, BENCH_SUBMIT="specs"))
        found = await interleave(contest, 2 if self.quick else REPEATS)
        for contestant in of_those(everybody, found):
            self._row(f"bulk submit of {BULK:,}: {contestant.label}", "jobs/s", found[contestant.key])
        if found["specs"]:
            self._row(f"bulk submit of {BULK:,} whole specs: {BSUP.label}", "jobs/s", found["specs"])
        for other, bound in ((PGQUEUER, 2.0), (GRAPHILE, 1.0)):
            self._bar_ratio(f"bulk submit, to {other.label}", found.get("bsup"), found.get(other.key), bound)

    async def pickups(self) -> None:
        peers = (PGQUEUER, PROCRASTINATE) if self.quick else (PGQUEUER, PROCRASTINATE, GRAPHILE, OBAN)
        rounds, each = (1, 100) if self.quick else (REPEATS, PICKUPS // REPEATS)
        times: Samples = {}
        tails: Samples = {}

        async def pickup(contestant: Contestant) -> float:
            found = await self.arena.pickups(contestant, each)
            times.setdefault(contestant.key, []).extend(found)
            tails.setdefault(contestant.key, []).append(percentile(found, 0.99))
            return percentile(found, 0.5)

        middles = await self._in_turn((BSUP, *peers), pickup, rounds)
        for contestant in of_those((BSUP, *peers), middles):
            for name, share, spread in (("p50", 0.5, middles), ("p99", 0.99, tails)):
                value = percentile(times[contestant.key], share)
                low, high = min(spread[contestant.key]), max(spread[contestant.key])
                what = f"idle pickup, {name}: {contestant.label}"
                note = f"{rounds} × {each} single jobs; the range is that of the rounds"
                self.measured.append(Measured(what, "ms", value, low, high, note))
        if not middles["bsup"]:
            self.bars.append(unmeasured("idle pickup", "p50 ≤ 2 ms, p99 ≤ 5 ms", self.notes.get(BSUP.label, "")))
            return
        p50, p99 = (percentile(times["bsup"], share) for share in (0.5, 0.99))
        self.bars.append(at_most("idle pickup, p50", p50, 2.0, "ms"))
        self.bars.append(at_most("idle pickup, p99", p99, 5.0, "ms"))
        there = {contestant.label: percentile(times[contestant.key], 0.99) for contestant in of_those(peers, middles)}
        if there:
            best = min(there, key=lambda name: there[name])
            self.bars.append(at_most("idle pickup, p99, to the best peer's", p99, there[best], "ms", best))

    async def _in_turn(
        self, contestants: Iterable[Contestant], sample: Callable[[Contestant], Awaitable[float]], rounds: int
    ) -> Samples:
        return await interleave({one.key: lambda one=one: self._guarded(one, sample) for one in contestants}, rounds)

    async def _guarded(self, contestant: Contestant, sample: Callable[[Contestant], Awaitable[float]]) -> float | None:
        if contestant.label in self.notes:
            return None
        try:
            value = await sample(contestant)
        except Missing as why:
            self.notes[contestant.label] = f"left out: {why}"
            print(f"    {contestant.label}: {why}", file=sys.stderr, flush=True)
            return None
        print(f"    {contestant.label}: {value:,.1f}", file=sys.stderr, flush=True)
        return value

    def _row(self, what: str, unit: str, samples: Sequence[float], note: str = "") -> None:
        self.measured.append(of_samples(what, unit, samples, note))

    def _bar_ratio(self, what: str, mine: Sequence[float] | None, other: Sequence[float] | None, bound: float) -> None:
        if mine and other:
            self.bars.append(at_least(what, ratio(mine, other), bound))
        else:
            self.bars.append(unmeasured(what, f"≥ {bound:g} ×", "one of the two is missing: see the notes below"))


def of_those(contestants: Iterable[Contestant], samples: Samples) -> list[Contestant]:
    return [contestant for contestant in contestants if samples.get(contestant.key)]
