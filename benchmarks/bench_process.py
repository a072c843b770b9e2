"""Process jobs of ``true`` through the whole of bsup, against a bare loop of ``posix_spawn`` and ``waitpid``.

A daemon as a user would start it, on a durable PostgreSQL: leases, workspaces, uids, private /tmp (as root), logs and
records included, from the first lease to the last end that is recorded. The jobs are submitted beforehand, while the
daemon is drained.
"""

# ruff: noqa: ASYNC110, ASYNC220 - looking again and waiting is what a benchmark does

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import postgres
from measured import Findings, at_least, at_most, interleave, of_samples, rate, ratio, repeats

from supervisor.client import Client
from supervisor.model.errors import BsupError
from supervisor.model.job import LeaseId

JOBS = 1000
AT_ONCE = 32
SLEEPERS = 200
MUST = 0.3
MUST_MB = 0.5
PATIENCE = 120.0
UID_BASE = 280_000
SUBMIT = """
SELECT count(bsup.submit(jsonb_build_object('kind', 'steps', 'steps',
    jsonb_build_array(jsonb_build_object('name', 't', 'run', to_jsonb($2::text[])))))) FROM generate_series(1, $1::int)
"""


def spawn(jobs: int = JOBS, at_once: int = AT_ONCE) -> None:
    """As many at once as bsup gets."""
    running = 0
    for _ in range(jobs):
        if running == at_once:
            os.waitpid(-1, 0)
            running -= 1
        os.posix_spawn("/bin/true", ["true"], os.environ)
        running += 1
    for _ in range(running):
        os.waitpid(-1, 0)


@dataclasses.dataclass
class Bsup:
    """A running daemon, drained."""

    process: subprocess.Popen[bytes]
    state: Path
    client: Client
    database: asyncpg.Connection

    async def run(self, jobs: int = JOBS) -> float:
        """Jobs a second, by the database's clock: the first lease to the last record."""
        await self.submit(jobs, ["true"])
        (last,) = await self.database.fetchrow("SELECT max(id) FROM bsup.job")
        await self.client.resume()
        await self.until(f"SELECT count(*) FROM bsup.finished WHERE job_id > {last - jobs}", jobs)
        await self.client.drain(wait=True)
        took, good = await self.database.fetchrow(
            "SELECT extract(epoch FROM max(f.recorded_at) - min(a.leased_at))::float8, "
            "count(*) FILTER (WHERE f.state = 'succeeded') FROM bsup.finished f JOIN bsup.attempt a USING (job_id) "
            "WHERE f.job_id > $1",
            last - jobs,
        )
        assert good == jobs, f"{good} of {jobs} jobs succeeded"
        return jobs / took

    async def megabytes_a_sleeper(self, sleepers: int = SLEEPERS) -> float:
        """What the daemon and the shepherd with its children grow by for each job that runs."""
        await self.run(sleepers)
        before = self.memory()
        await self.submit(sleepers, ["sleep", "1000"])
        await self.client.resume()
        runs = self.state / "runs"

        def running() -> int:
            return sum((runs / name / "0" / "started").exists() for name in os.listdir(runs) if is_lease(name))

        async with asyncio.timeout(PATIENCE):
            while running() < sleepers:
                await asyncio.sleep(0.1)
        after = self.memory()
        ids = [row["job_id"] for row in await self.database.fetch("SELECT job_id FROM bsup.lease")]
        async for _ in self.client.stop(ids, kill=True):
            pass
        await self.until("SELECT -count(*) FROM bsup.lease", 0)
        return (after - before) / sleepers / (1 << 20)

    async def submit(self, jobs: int, command: list[str]) -> None:
        await self.database.execute(SUBMIT, jobs, command)
        await self.database.execute("ANALYZE bsup.job, bsup.ready")

    async def until(self, count: str, wanted: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.database.fetchval(count) < wanted:
                await asyncio.sleep(0.1)

    def memory(self) -> int:
        return pss(self.process.pid) + sum(pss(pid) for pid in own(self.shepherd))

    @property
    def shepherd(self) -> int:
        return int((self.state / "shepherd.pid").read_text())


def state_directory() -> Path:
    """Where the server's data is too: not below /tmp, which each job has one of its own of."""
    path = Path(tempfile.mkdtemp(prefix="bsup-bench-", dir=os.environ.get("BSUP_BENCH_DIR", "/var/tmp")))
    path.chmod(0o711)
    return path


@contextlib.asynccontextmanager
async def bsup(slots: int) -> AsyncIterator[Bsup]:
    """Started as a user would, drained, with a database of its own; ended with all it left."""
    server = postgres.running()
    await server.create("process")
    state = state_directory()
    uids = f"uid_base = {UID_BASE}" if os.geteuid() == 0 else 'uids = "off"'
    (state / "bsup.toml").write_text(f'[host]\nname = "bench"\nslots = {slots}\n[jobs]\n{uids}\n')
    words = ["--config", str(state / "bsup.toml"), "--dsn", server.dsn("process")]
    words += ["--state", str(state / "state"), "--socket", str(state / "socket")]
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "daemon", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        client = await _ready(process, state)
        async with client:
            await client.drain()
            database = await asyncpg.connect(server.dsn("process"))
            try:
                yield Bsup(process, state / "state", client, database)
            finally:
                await database.close()
    except BaseException:
        print((state / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((state / "state" / "shepherd.pid").read_text()), signal.SIGTERM)
        shutil.rmtree(state, ignore_errors=True)
        await server.drop("process")


async def _ready(process: subprocess.Popen[bytes], state: Path) -> Client:
    async with asyncio.timeout(PATIENCE):
        while process.poll() is None:
            with contextlib.suppress(BsupError):
                async with Client(str(state / "socket")) as client:
                    if (await client.status()).actors["dispatcher"].get("reconciled"):
                        return Client(str(state / "socket"))
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the daemon ended with {process.returncode} while it started")


def is_lease(name: str) -> bool:
    try:
        LeaseId.parse(name)
    except ValueError:
        return False
    return True


def own(pid: int) -> list[int]:
    """The process and what below it is bsup's own, not a job's."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("bsup-"):
            found += own(int(child))
    return found


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no memory of process {pid} is told")


async def run(quick: bool) -> Findings:
    async with bsup(AT_ONCE) as daemon:
        await daemon.run(200)  # the first jobs pay for imports, plans and pools
        samples = await interleave({"bsup": daemon.run, "bare": rate(JOBS, spawn)}, repeats(quick))
    async with bsup(SLEEPERS) as daemon:
        memory = [await daemon.megabytes_a_sleeper()]
    how = f"{JOBS:,} jobs, {AT_ONCE} at once"
    return Findings(
        measured=[
            of_samples("process jobs of `true` through all of bsup", "jobs/s", samples["bsup"], how),
            of_samples("`posix_spawn` and `waitpid` of `true`", "/s", samples["bare"], f"{AT_ONCE} at once"),
            of_samples("memory of daemon and shepherd a running job", "MB", memory, f"{SLEEPERS} jobs of `sleep`"),
        ],
        bars=[
            at_least(
                "1,000 process jobs of `true`, of a bare spawn loop", ratio(samples["bsup"], samples["bare"]), MUST
            ),
            at_most("memory a running process job", memory[0], MUST_MB, "MB"),
        ],
    )
