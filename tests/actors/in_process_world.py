"""In-process kinds whose handlers tell what happens to them, for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from supervisor.kinds import Handler, InProcessJob
from tests.actors.fake_store import FakeJob, FakeStore
from tests.actors.fakes import now

GRACE = 10.0
"""Seconds that a daemon of the harness gives a handler that was asked to stop."""

Does = Callable[[InProcessJob], Awaitable[None]]


def all_final(store: FakeStore) -> bool:
    return all(job.life.state.is_final for job in store.jobs.values())


def counts(job: FakeJob) -> tuple[int, int, int]:
    """Failures, losses, releases."""
    return job.life.failures, job.life.losses, job.life.releases


class Work:
    """What the handlers of all hosts did. ``does`` is what a job does, which a test may replace at any time."""

    def __init__(self, does: Does | None = None) -> None:
        self.does: Does = does or seconds(1.0)
        self.begun: list[tuple[int, int]] = []
        self.running: Counter[int] = Counter()
        self.most = 0
        self.last_end = 0.0
        self.on_begin: Callable[[], None] = lambda: None

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"task": self.run}

    @property
    def runs(self) -> Counter[int]:
        """Job → how often a handler of it began."""
        return Counter(job for job, _ in self.begun)

    async def run(self, job: InProcessJob) -> None:
        assert not self.running[job.id], "two runs of one job at once"
        self.on_begin()
        self.begun.append((job.id, job.attempt))
        self.running[job.id] += 1
        self.most = max(self.most, self.running.total())
        try:
            await self.does(job)
        finally:
            self.running[job.id] -= 1
            self.last_end = now()


def seconds(duration: float) -> Does:
    async def does(job: InProcessJob) -> None:
        await asyncio.sleep(duration)

    return does


def raises(error: BaseException) -> Does:
    async def does(job: InProcessJob) -> None:
        raise error

    return does


async def for_ever(job: InProcessJob) -> None:
    await asyncio.Event().wait()


async def until_asked(job: InProcessJob) -> None:
    """Gives up where it stands, within the grace."""
    await job.stop_asked.wait()


def deaf(times: int) -> Does:
    """Passes over so many cancellations."""

    async def does(job: InProcessJob) -> None:
        left = times
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not left:
                    raise
                left -= 1

    return does
