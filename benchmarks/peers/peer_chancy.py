"""Chancy: one queue with its asyncio executor, concurrency 1000, eager polling: it fetches again when there is room."""

import logging

import chancy_jobs
from chancy import Chancy, Queue, Worker
from driver import Peer, main

CONCURRENCY = 1000


class ChancyPeer(Peer):
    def app(self):
        log = logging.getLogger("chancy.quiet")
        log.setLevel(logging.WARNING)
        return Chancy(self.dsn, log=log)

    async def install(self):
        async with self.app() as app:
            await app.migrate()
            queue = Queue(
                name="bench",
                concurrency=CONCURRENCY,
                executor=Chancy.Executor.Async,
                polling_interval=1,
                eager_polling=True,
            )
            await app.declare(queue, upsert=True)

    async def connect(self):
        self.client = await self.app().__aenter__()

    async def bulk(self, numbers):
        jobs = [chancy_jobs.noop.job.with_kwargs(number=number) for number in numbers]
        async for _ in self.client.push_many(jobs, batch_size=1000):
            pass

    async def one(self, number):
        await self.client.push(chancy_jobs.noop.job.with_kwargs(number=number))

    async def work(self, stamps):
        chancy_jobs.stamps = stamps
        async with self.app() as app:
            worker = Worker(app, register_signal_handlers=False)
            worker.send_outgoing_interval = 1.0
            stamps.begin()
            async with worker:
                await worker.wait_for_shutdown()


if __name__ == "__main__":
    main(ChancyPeer)
