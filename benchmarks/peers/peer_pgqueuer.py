"""PgQueuer: five consumers in a process, batches of 100, as in its authors' benchmark; its own autovacuum settings."""

import asyncio

import asyncpg
from driver import Peer, main, slices
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

CONSUMERS = 5
BATCH = 100


class PgQueuerPeer(Peer):
    async def install(self):
        queries = Queries(AsyncpgDriver(await asyncpg.connect(self.dsn)))
        await queries.install()
        await queries.optimize_autovacuum()

    async def connect(self):
        self.queries = Queries(AsyncpgDriver(await asyncpg.connect(self.dsn)))

    async def bulk(self, numbers):
        for some in slices(numbers, 5000):
            await self.queries.enqueue(["noop"] * len(some), [b"%d" % number for number in some], [0] * len(some))

    async def one(self, number):
        await self.queries.enqueue("noop", b"%d" % number, 0)

    async def work(self, stamps):
        consumers = []
        for _ in range(CONSUMERS):
            consumer = PgQueuer(AsyncpgDriver(await asyncpg.connect(self.dsn)))

            @consumer.entrypoint("noop")
            async def noop(job):
                stamps.hit(int(job.payload))

            consumers.append(consumer)
        stamps.begin()
        await asyncio.gather(*[consumer.run(batch_size=BATCH) for consumer in consumers])


if __name__ == "__main__":
    main(PgQueuerPeer)
