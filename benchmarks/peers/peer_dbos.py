"""DBOS: worker concurrency 500, polls of 10 ms, a pool of 20. It has no call for many; 16 threads submit."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS, DBOSClient
from driver import Peer, main

CONCURRENCY = 500
POLL = 0.01
POOL = 20
OPTIONS = {"queue_name": "noop", "workflow_name": "noop", "app_version": "1"}


class DbosPeer(Peer):
    uvloop = False

    def url(self):
        return self.tcp_dsn.replace("postgresql://", "postgresql+psycopg://")

    def configure(self):
        config = {
            "name": "bench",
            "system_database_url": self.url(),
            "sys_db_pool_size": POOL,
            "log_level": "ERROR",
            "application_version": "1",
            "run_admin_server": False,
        }
        DBOS(config=config)

    async def install(self):
        await asyncio.to_thread(self.make_schema)

    def make_schema(self):
        self.configure()
        DBOS.launch()
        DBOS.register_queue("noop", worker_concurrency=CONCURRENCY, polling_interval_sec=POLL)
        DBOS.destroy()

    async def connect(self):
        self.client = DBOSClient(system_database_url=self.url())

    async def bulk(self, numbers):
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda number: self.client.enqueue(dict(OPTIONS), number), numbers))

    async def one(self, number):
        self.client.enqueue(dict(OPTIONS), number)

    async def work(self, stamps):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        await asyncio.to_thread(self.launch, stamps)
        await asyncio.Event().wait()

    def launch(self, stamps):
        """In a thread without a loop, as in a program that has none."""
        self.configure()

        @DBOS.workflow(name="noop")
        async def noop(number):
            stamps.hit(number)

        stamps.begin()
        DBOS.launch()


if __name__ == "__main__":
    main(DbosPeer)
