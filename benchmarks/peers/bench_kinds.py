"""The in-process kind that the benchmarks give to bsup's daemon: it does nothing but say that it ran."""

import os

from stamps import Stamps

from supervisor.kinds import InProcessJob

STAMPS = Stamps(os.environ["BENCH_STAMPS"], int(os.environ["BENCH_WORKER"]))


async def stamp(job: InProcessJob) -> None:
    STAMPS.hit(job.args["n"])
