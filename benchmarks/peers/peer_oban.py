"""Oban for Python: one queue with a limit of 500. It needs Python 3.12."""

import asyncio

from driver import Peer, main, slices
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool

LIMIT = 500


class ObanPeer(Peer):
    def noop(self, stamps):
        @worker(queue="default")
        class Noop:
            async def process(self, job):
                stamps.hit(job.args["number"])

        return Noop

    async def pool(self):
        pool = AsyncConnectionPool(self.dsn, min_size=2, max_size=10, open=False)
        await pool.open(wait=True)
        return pool

    async def install(self):
        pool = await self.pool()
        await install(pool)
        await pool.close()

    async def connect(self):
        self.oban = Oban(pool=await self.pool())
        self.job = self.noop(None)

    async def bulk(self, numbers):
        for some in slices(numbers, 1000):
            await self.oban.enqueue_many([self.job.new({"number": number}) for number in some])

    async def one(self, number):
        await self.oban.enqueue(self.job.new({"number": number}))

    async def work(self, stamps):
        self.noop(stamps)
        oban = Oban(pool=await self.pool(), queues={"default": {"limit": LIMIT}})
        stamps.begin()
        async with oban:
            await asyncio.Event().wait()


if __name__ == "__main__":
    main(ObanPeer)
