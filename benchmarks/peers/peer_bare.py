"""The floor under bsup: asyncpg alone that issues bsup's own statements, claims and finishes, and does nothing between.

Two connections, each with a batch of its own in turn: the best of what was tried on two cores (one connection leaves
the server waiting, more than two leave it no core). Leases, attempts and times are written as a daemon writes them. The
schema and the jobs are those of ``peer_bsup``.
"""

import asyncio
import os
import sys
import time

import asyncpg
import uvloop
from stamps import Stamps

from supervisor.model.job import HostInfo
from supervisor.store.connection import BY_KEY
from supervisor.store.pg import PgStore
from supervisor.store.place import START
from supervisor.store.statements import STATEMENTS

BATCH = 500
CONNECTIONS = 2
HOST = HostInfo(
    name="bare",
    labels=(),
    slots=BATCH * CONNECTIONS,
    cpu=None,
    memory=None,
    version="0",
    machine_id="bare",
    boot_id="bare",
    pid=os.getpid(),
    kinds=("bench",),
)


async def work(file: str, worker: str) -> None:
    stamps = Stamps(file, int(worker))
    async with PgStore(os.environ["BENCH_DSN"]) as store:
        me = (await store.open_session(HOST, 3600)).me
        needs = [need.id for need in await store.needs(0)]
    counters = iter(range((me.epoch << 32) + 1, 1 << 62, BATCH))

    async def loop() -> None:
        connection = await asyncpg.connect(os.environ["BENCH_DSN"], server_settings={**BY_KEY, "jit": "off"})
        claim = await connection.prepare(STATEMENTS["claim"].sql)
        finish = await connection.prepare(STATEMENTS["finish"].sql)
        begin = START
        while True:
            first = next(counters)
            rows = await claim.fetch(me.session, me.incarnation, first, BATCH, HOST.slots, None, None, needs, *begin)
            if rows[0]["counter"] is None:
                begin = START
                await asyncio.sleep(0.01)
                continue
            begin = (rows[-1]["priority"], rows[-1]["job_id"])
            for _ in rows:
                stamps.hit(0)
            times = [time.time()] * len(rows)
            jobs, attempts = [row["job_id"] for row in rows], [row["attempt"] for row in rows]
            await finish.fetch(
                me.session, me.incarnation, [row["counter"] for row in rows], jobs, attempts,
                None, None, None, None, None, None, times, times, None, False,
            )  # fmt: skip

    stamps.begin()
    await asyncio.gather(*[loop() for _ in range(CONNECTIONS)])


if __name__ == "__main__":
    uvloop.run(work(*sys.argv[2:]))
