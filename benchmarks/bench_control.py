"""The daemon at rest, the command line, and ten thousand live jobs on one daemon: listed, renewed, stopped.

The jobs are ``noop`` that sleep: each is a lease, an actor and a task of its handler. A list is timed at a client on
the socket that reads and decodes every frame of what ``bsup ps`` asks for; a stop from the call until the database has
recorded every job as canceled. The idle daemon's statements are those that the server logs, by what it is told.
"""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC240 - looking again and waiting is what a benchmark does

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import postgres
from measured import Bar, Findings, Measured, at_most, of_samples, state_directory

from supervisor.client import Client
from supervisor.framing import FrameDecoder, decode_item, encode_call
from supervisor.model.errors import BsupError
from supervisor.model.job import Me
from supervisor.protocol import MAX_REPLY, ListParams, ListReply
from supervisor.store.pg import PgStore

LIVE = 10_000
SLEEP = {"kind": "noop", "name": "sleeper", "args": {"sleep": 3600}}
PATIENCE = 60.0
UID_BASE = 272_000
CONFIG = """
[host]
name = "bench"
slots = {slots}
[jobs]
{uids}
"""


@dataclasses.dataclass
class Bsup:
    """A running daemon and its database."""

    process: subprocess.Popen[bytes]
    socket: Path
    client: Client
    sql: asyncpg.Connection
    dsn: str
    log: Path

    def rss(self) -> int:
        """Resident bytes."""
        return _rss(self.process.pid)

    def cpu(self) -> float:
        """Seconds of CPU, of all its threads, as the scheduler counts them."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while (await self.client.status()).running != count:
                await asyncio.sleep(0.05)

    def command(self, *words: str) -> float:
        """Milliseconds of wall time of a command."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "supervisor", *words, "--socket", str(self.socket)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            check=True,
        )
        return (time.perf_counter() - began) * 1000

    def ps(self, *, brief: bool) -> float:
        """Milliseconds until every job was read and decoded."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            decoder = FrameDecoder(MAX_REPLY)
            jobs, continues = 0, True
            began = time.perf_counter()
            connection.sendall(encode_call("List", ListParams(brief=brief), more=True))
            while continues:
                for frame in decoder.feed(connection.recv(1 << 18)):
                    reply, continues = decode_item(frame, ListReply)
                    jobs += reply.job is not None
            took = (time.perf_counter() - began) * 1000
        assert jobs == LIVE, f"{jobs} jobs were listed"
        return took


@contextlib.asynccontextmanager
async def bsup(slots: int) -> AsyncIterator[Bsup]:
    """Started as a user would, with a database of its own; ended with all it left."""
    server = postgres.running()
    await server.create("control")
    root = state_directory()
    uids = f"uid_base = {UID_BASE}" if os.geteuid() == 0 else 'uids = "off"'
    (root / "bsup.toml").write_text(CONFIG.format(slots=slots, uids=uids))
    path = root / "socket"
    words = ["--config", str(root / "bsup.toml"), "--dsn", server.dsn("control")]
    words += ["--state", str(root / "state"), "--socket", str(path)]
    sql = await server.admin("control")
    # Of connections made from now on; the server's other databases stay quiet.
    await sql.execute("ALTER DATABASE control SET log_statement = 'all'")
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "daemon", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        await _until_it_answers(process, path, root / "log")
        async with Client(str(path)) as client:
            yield Bsup(process, path, client, sql, server.dsn("control"), server.home / "log")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        await sql.close()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((root / "state" / "shepherd.pid").read_text()), signal.SIGTERM)
        await server.drop("control")
        shutil.rmtree(root, ignore_errors=True)


async def _until_it_answers(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            assert process.poll() is None, f"the daemon ended:\n{log.read_text()}"
            with contextlib.suppress(BsupError, OSError):
                async with Client(str(path)) as client:
                    if (await client.status()).actors.get("dispatcher", {}).get("reconciled"):
                        return
            await asyncio.sleep(0.05)


async def at_rest(settle: float, seconds: float) -> tuple[list[Measured], list[Bar]]:
    """A daemon that has run a job before and has nothing to do."""
    async with bsup(4) as daemon:
        job = await daemon.client.submit({"kind": "noop"})
        async for _ in daemon.client.wait([job]):
            pass
        await asyncio.sleep(settle)
        logged, cpu = daemon.log.stat().st_size, daemon.cpu()
        began = time.monotonic()
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        cpu = (daemon.cpu() - cpu) / took * 100
        with daemon.log.open(errors="replace") as log:
            log.seek(logged)
            statements = [line for line in log if "LOG:  execute " in line or "LOG:  statement: " in line]
        others = sum("bsup.beat(" not in line for line in statements) / took
        rss = daemon.rss() / 1e6
        wall = [daemon.command("status") for _ in range(22)][2:]
        version = [daemon.command("--version") for _ in range(5)]
    note = f"{seconds:.0f} s, after {settle:.0f} s of rest"
    found = [
        of_samples("daemon at rest: memory", "MB", [rss], "resident"),
        of_samples("daemon at rest: CPU", "% of a core", [cpu], note),
        of_samples("daemon at rest: statements beside the pulse", "/s", [others], note),
        of_samples("bsup status", "ms", wall, "wall time of the command"),
        of_samples("bsup --version", "ms", version, "wall time of the command"),
    ]
    bars = [
        at_most("idle daemon: resident memory", rss, 60, "MB"),
        at_most("idle daemon: CPU", cpu, 0.5, "% of a core"),
        at_most("idle daemon: statements a second beside the pulse", others, 1, "/s"),
        at_most("bsup status, wall time", statistics.median(wall), 120, "ms", f"median of {len(wall)}"),
    ]
    return found, bars


async def ten_thousand(rounds: int) -> tuple[list[Measured], list[Bar]]:
    """Live jobs of one daemon; listed, renewed and stopped ``rounds`` times."""
    lists: list[float] = []
    whole: list[float] = []
    commands: list[float] = []
    renewals: list[float] = []
    stops: list[float] = []
    async with bsup(LIVE) as daemon:
        before = daemon.rss()
        each = 0.0
        for _ in range(rounds):
            await daemon.sql.execute(
                "SELECT count(bsup.submit($1::jsonb)) FROM generate_series(1, $2)", json.dumps(SLEEP), LIVE
            )
            await daemon.until_running(LIVE)
            each = each or (daemon.rss() - before) / LIVE / 1000
            await daemon.sql.execute("VACUUM ANALYZE")
            for _ in range(4):
                lists.append(await asyncio.to_thread(daemon.ps, brief=True))
            whole.append(await asyncio.to_thread(daemon.ps, brief=False))
            commands.append(daemon.command("ps"))
            renewals += await renew(daemon)
            stops.append(await stop_all(daemon))
    found = [
        of_samples("10,000 live jobs: memory of each", "KB", [each]),
        of_samples("10,000 live jobs: list", "ms", lists, "what ps prints, read and decoded by a client"),
        of_samples("10,000 live jobs: list, all there is to tell", "ms", whole, "the same, as ps --json asks"),
        of_samples("10,000 live jobs: bsup ps", "ms", commands, "wall time of the command"),
        of_samples("10,000 live jobs: renewal", "ms", renewals),
        of_samples("10,000 live jobs: stop of all", "s", stops, "without grace, until all are recorded"),
    ]
    bars = [
        at_most("10,000 live jobs: memory of each", each, 12, "KB"),
        at_most("10,000 live jobs: ps of all, streamed", statistics.median(lists), 150, "ms"),
        at_most("10,000 live jobs: stop of all", statistics.median(stops), 2, "s"),
        at_most("10,000 live jobs: one renewal", statistics.median(renewals), 50, "ms"),
    ]
    return found, bars


async def renew(daemon: Bsup) -> list[float]:
    """Renewals of the daemon's own session, as it makes them."""
    row = await daemon.sql.fetchrow("SELECT id, incarnation, epoch FROM bsup.session")
    me = Me(row["id"].hex, row["incarnation"].hex, row["epoch"])
    samples = []
    async with PgStore(daemon.dsn) as store:
        for _ in range(7):
            began = time.perf_counter()
            renewal = await store.renew(me, 180.0, False)
            samples.append((time.perf_counter() - began) * 1000)
            assert renewal.count == LIVE
    return samples[2:]


async def stop_all(daemon: Bsup) -> float:
    """Seconds from the call until the database has recorded every job as canceled."""
    jobs = [row["job_id"] for row in await daemon.sql.fetch("SELECT job_id FROM bsup.lease")]
    assert len(jobs) == LIVE
    first = min(jobs)
    began = time.perf_counter()
    answers = [reply.did async for reply in daemon.client.stop(jobs, grace=0)]
    assert len(answers) == LIVE
    async with asyncio.timeout(PATIENCE):
        while await daemon.sql.fetchval("SELECT EXISTS (SELECT FROM bsup.lease)"):
            await asyncio.sleep(0.01)
    took = time.perf_counter() - began
    canceled = "SELECT count(*) FROM bsup.finished WHERE state = 'canceled' AND job_id >= $1"
    assert await daemon.sql.fetchval(canceled, first) == LIVE
    return took


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


async def run(quick: bool) -> Findings:
    rest, rest_bars = await at_rest(*((10.0, 15.0) if quick else (20.0, 60.0)))
    live, live_bars = await ten_thousand(1 if quick else 5)
    return Findings([*rest, *live], [*rest_bars, *live_bars])
