"""Where queues meet: a database each, a process that submits, processes that work, and a clock.

A drain's rate counts from the start of its first job to the moment at which the database shows none unfinished, for
every contestant: so nobody's start-up counts, bsup's daemon's neither. Workers are processes of their own; they tell
what they did through ``peers/stamps.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import postgres
from contestants import Contestant, Missing
from environments import PEERS
from measured import state_directory

sys.path.append(str(PEERS))
from stamps import Stamps

POLL = 0.005
STALL = 30.0
LONGEST = 300.0
IDLE = 2.5  # seconds after which a worker has nothing left to do but wait
WARM_UP = 10


class Client:
    """A process that submits for one contestant. Its times are its own, taken around the call."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def bulk(self, first: int, count: int) -> float:
        """Submits ``count`` jobs numbered from ``first``; returns how many seconds it took."""
        before, after = await self._ask(f"bulk {first} {count}")
        return (after - before) / 1e9

    async def burst(self, first: int, count: int) -> int:
        """The same; returns when it was committed."""
        return (await self._ask(f"bulk {first} {count}"))[1]

    async def whole(self, first: int, count: int) -> None:
        """The same in one transaction."""
        await self._ask(f"whole {first} {count}")

    async def one(self, number: int) -> int:
        """Submits one job; returns when it was committed."""
        return (await self._ask(f"one {number}"))[1]

    async def _ask(self, line: str) -> tuple[int, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        words = (await self._process.stdout.readline()).split()
        if len(words) != 2:
            raise Missing(f"its client failed: {_last_line(self._log)}")
        return int(words[0]), int(words[1])


@dataclasses.dataclass(frozen=True)
class Drained:
    """``rate``: jobs/s from the first job's start; ``whole``: from when the worker was told to begin."""

    rate: float
    whole: float


class Arena:
    """Databases, templates and files of all contestants; ``close`` removes the files, the server drops the rest."""

    def __init__(self) -> None:
        self.server = postgres.running()
        self.home = state_directory()
        self._templates: set[str] = set()

    def close(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    async def fresh(self, contestant: Contestant) -> str:
        """A database with the contestant's schema and nothing in it."""
        key = contestant.schema or contestant.key
        template = f"{key}_template"
        if template not in self._templates:
            await self.server.create(template)
            await self._install(contestant, template)
            self._templates.add(template)
        await self.server.create(contestant.key, template)
        return contestant.key

    async def _install(self, contestant: Contestant, database: str) -> None:
        log = self.home / f"{contestant.key}.install"
        argv, environment = await asyncio.to_thread(contestant.command, "install")
        with log.open("w") as file:
            done = await asyncio.create_subprocess_exec(
                *argv, env=self._environment(database, environment), stdout=file, stderr=file
            )
            if await done.wait() != 0:
                raise Missing(f"its schema can't be made: {_last_line(log)}")

    def _environment(self, database: str, extra: dict[str, str]) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("BSUP_", "PYTHON", "PG"))
        }
        addresses = {"BENCH_DSN": self.server.dsn(database), "BENCH_TCP_DSN": self.server.tcp_dsn(database)}
        return {**inherited, **addresses, "BENCH_HOME": str(self.home), **extra}

    @contextlib.asynccontextmanager
    async def client(self, contestant: Contestant, database: str, **settings: str) -> AsyncIterator[Client]:
        log = self.home / f"{contestant.key}.client"
        argv, environment = contestant.command("client")
        environment = self._environment(database, {**environment, **settings})
        with log.open("w") as file:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert process.stdin is not None and process.stdout is not None
        try:
            if (await process.stdout.readline()).strip() != b"ready":
                raise Missing(f"its client did not start: {_last_line(log)}")
            yield Client(process, log)
        finally:
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()

    @contextlib.asynccontextmanager
    async def workers(
        self, contestant: Contestant, database: str, count: int = 1, jobs: int = 0, **settings: str
    ) -> AsyncIterator[Working]:
        """``count`` worker processes, in process groups of their own, which are ended whole. ``jobs`` are timed."""
        path = self.home / f"{contestant.key}.stamps"
        stamps = Stamps.make(path, jobs)
        argv, environment = contestant.command("work")
        environment = self._environment(database, {**environment, **settings})
        log = self.home / f"{contestant.key}.work"
        processes = [_start([*argv, str(path), str(worker)], environment, log) for worker in range(count)]
        try:
            yield Working(stamps, processes, log)
        finally:
            await asyncio.to_thread(_end, processes)

    async def drain(self, contestant: Contestant, database: str, jobs: int, count: int = 1, **settings: str) -> Drained:
        """Runs what is in the database until all of it is recorded as finished."""
        connection = await self.settled(database)
        try:
            async with self.workers(contestant, database, count, **settings) as working:
                await working.until(jobs)
                await none_left(connection, contestant, working)
                ended = time.monotonic_ns()
                stamps = working.stamps
                return Drained(jobs / (ended - stamps.first()) * 1e9, jobs / (ended - stamps.began()) * 1e9)
        finally:
            await connection.close()

    async def drain_waiting(self, contestant: Contestant, jobs: int, count: int) -> float:
        """Commits jobs at once while ``count`` idle workers wait for them; their rate."""
        database = await self.fresh(contestant)
        connection = await self.settled(database)
        try:
            async with (
                self.client(contestant, database) as client,
                self.workers(contestant, database, count) as working,
            ):
                await working.begun()
                await asyncio.sleep(IDLE)
                await client.whole(0, jobs)
                await working.until(jobs)
                await none_left(connection, contestant, working)
                return jobs / (time.monotonic_ns() - working.stamps.first()) * 1e9
        finally:
            await connection.close()

    async def settled(self, database: str) -> asyncpg.Connection:
        """What follows a bulk submission in every queue: statistics, and nothing left to write."""
        connection = await self.server.admin(database)
        await connection.execute("ANALYZE")
        await connection.execute("CHECKPOINT")
        return connection

    async def pickups(self, contestant: Contestant, count: int, **settings: str) -> list[float]:
        """Milliseconds from a single job's commit to its start by an idle worker, at random intervals."""
        database = await self.fresh(contestant)
        connection = await self.settled(database)
        await connection.close()
        rng = random.Random(count)
        found = []
        async with (
            self.workers(contestant, database, jobs=count + WARM_UP, **settings) as working,
            self.client(contestant, database) as client,
        ):
            await working.begun()
            await asyncio.sleep(IDLE)
            for number in range(count + WARM_UP):
                committed = await client.one(number)
                began = await working.job(number)
                if number >= WARM_UP:
                    found.append(max(0, began - committed) / 1e6)
                await asyncio.sleep(rng.uniform(0.03, 0.07))
        return found


class Working:
    """Workers that run, and how to wait for what they do."""

    def __init__(self, stamps: Stamps, processes: list[subprocess.Popen[bytes]], log: Path) -> None:
        self.stamps = stamps
        self.processes = processes
        self._log = log

    def check(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise Missing(f"its worker ended: {_last_line(self._log)}")

    async def begun(self) -> None:
        await self._wait(self.stamps.began, 1)

    async def until(self, jobs: int) -> None:
        """Until that many jobs began."""
        await self._wait(self.stamps.runs, jobs)

    async def job(self, number: int) -> int:
        return await self._wait(lambda: self.stamps.job(number), 1, 0.001)

    async def _wait(self, value: Callable[[], int], target: int, poll: float = POLL) -> int:
        last, since, began = value(), time.monotonic(), time.monotonic()
        while last < target:
            await asyncio.sleep(poll)
            self.check()
            now, found = time.monotonic(), value()
            if found != last:
                last, since = found, now
            if now - since > STALL or now - began > LONGEST:
                raise Missing(f"it stopped at {last:,} of {target:,}: {_last_line(self._log)}")
        return last


async def none_left(connection: asyncpg.Connection, contestant: Contestant, working: Working) -> None:
    began = time.monotonic()
    while left := await connection.fetchval(contestant.unfinished):
        if time.monotonic() - began > STALL:
            raise Missing(f"{left:,} jobs that began were not recorded as finished")
        working.check()
        await asyncio.sleep(POLL)


def _start(argv: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("a") as file:
        return subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + 8
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also children that a worker left behind
        process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
