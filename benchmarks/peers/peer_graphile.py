"""Graphile Worker's submitting side, which is SQL from any language: ``add_jobs`` with 5,000 a call. Its worker is
``node/graphile.js``. Runs in bsup's environment."""

import json

import asyncpg
from driver import Peer, main, slices

ADD_JOBS = """
SELECT count(*) FROM graphile_worker.add_jobs((
    SELECT array_agg(json_populate_record(null::graphile_worker.job_spec, e)) FROM json_array_elements($1::json) e
))
"""
ADD_JOB = "SELECT graphile_worker.add_job('noop', json_build_object('number', $1::int))"


class GraphilePeer(Peer):
    async def connect(self):
        self.connection = await asyncpg.connect(self.dsn)

    async def bulk(self, numbers):
        for some in slices(numbers, 5000):
            jobs = [{"identifier": "noop", "payload": {"number": number}} for number in some]
            await self.connection.execute(ADD_JOBS, json.dumps(jobs))

    async def one(self, number):
        await self.connection.execute(ADD_JOB, number)


if __name__ == "__main__":
    main(GraphilePeer)
