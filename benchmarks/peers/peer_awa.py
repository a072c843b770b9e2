"""Awa (a core in Rust, handlers in Python): queue storage, COPY to submit, two claimers with batches of 256, as its
docs advise for a hot queue."""

import asyncio
from dataclasses import dataclass

from awa import AsyncClient
from driver import Peer, main, slices

WORKERS = 256


@dataclass
class Noop:
    number: int


class AwaPeer(Peer):
    async def install(self):
        client = AsyncClient(self.tcp_dsn)
        await client.migrate()
        await client.install_queue_storage()
        await client.close()

    async def connect(self):
        self.client = AsyncClient(self.tcp_dsn)

    async def bulk(self, numbers):
        for some in slices(numbers, 5000):
            await self.client.enqueue_many_copy([Noop(number) for number in some], queue="noop")

    async def one(self, number):
        await self.client.insert(Noop(number), queue="noop")

    async def work(self, stamps):
        client = AsyncClient(self.tcp_dsn)

        @client.task(Noop, queue="noop")
        async def noop(job):
            stamps.hit(job.args.number)

        stamps.begin()
        await client.start([{"name": "noop", "max_workers": WORKERS, "claimers": 2, "claim_batch_size": 256}])
        await asyncio.Event().wait()


if __name__ == "__main__":
    main(AwaPeer)
