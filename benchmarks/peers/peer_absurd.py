"""Absurd: concurrency 500, polls of 250 ms. It has no call for many; they are spawned in transactions of 1,000."""

import asyncio
import subprocess
import sys
from pathlib import Path

import psycopg
from absurd_sdk import AsyncAbsurd
from driver import Peer, main, slices

CONCURRENCY = 500
POLL = 0.25


class AbsurdPeer(Peer):
    async def install(self):
        command = [Path(sys.executable).parent / "absurdctl", "init", "-d", self.dsn]
        await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        absurd = AsyncAbsurd(self.dsn)
        await absurd.create_queue()
        await absurd.close()

    async def connect(self):
        self.connection = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        self.client = AsyncAbsurd(self.connection)

    async def bulk(self, numbers):
        for some in slices(numbers, 1000):
            async with self.connection.transaction():
                for number in some:
                    await self.one(number)

    async def one(self, number):
        await self.client.spawn("noop", {"number": number}, queue="default")

    async def work(self, stamps):
        absurd = AsyncAbsurd(self.dsn)

        @absurd.register_task("noop")
        async def noop(params, context):
            stamps.hit(params["number"])

        await absurd._ensure_connected()
        stamps.begin()
        await absurd.start_worker(concurrency=CONCURRENCY, poll_interval=POLL)


if __name__ == "__main__":
    main(AbsurdPeer)
