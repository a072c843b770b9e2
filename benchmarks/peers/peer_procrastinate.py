"""Procrastinate: concurrency 10 and a pool of 30, the best of what was tried; jobs kept, as is its default."""

import procrastinate
from driver import Peer, main, slices

CONCURRENCY = 10
POOL = 30


class ProcrastinatePeer(Peer):
    def app(self):
        connector = procrastinate.PsycopgConnector(conninfo=self.dsn, min_size=2, max_size=POOL)
        app = procrastinate.App(connector=connector)

        @app.task(name="noop")
        async def noop(number):
            self.stamps.hit(number)

        self.noop = noop
        return app

    async def install(self):
        app = self.app()
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    async def connect(self):
        await self.app().open_async()

    async def bulk(self, numbers):
        for some in slices(numbers, 1000):
            await self.noop.batch_defer_async(*[{"number": number} for number in some])

    async def one(self, number):
        await self.noop.defer_async(number=number)

    async def work(self, stamps):
        self.stamps = stamps
        app = self.app()
        async with app.open_async():
            stamps.begin()
            await app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False)


if __name__ == "__main__":
    main(ProcrastinatePeer)
