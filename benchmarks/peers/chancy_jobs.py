"""Chancy's worker imports a job by its name; ``stamps`` is set by the worker's process."""

from chancy import job

stamps = None


@job(queue="bench")
async def noop(*, number: int):
    stamps.hit(number)
