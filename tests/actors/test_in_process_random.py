"""Many short in-process jobs at random: a store that fails before or after its commits, daemons that die; what is left
behind by jobs that came and went."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.actors.job import JobActor
from supervisor.kinds import InProcessJob
from supervisor.model.errors import InvalidInput
from supervisor.model.job import AttemptEnd, Outcome, State
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost, sometimes
from tests.actors.harness import Daemon, until
from tests.actors.in_process_world import Work, all_final, for_ever, seconds
from tests.actors.virtual_loop import run

FALLIBLE = ["claim", "finish", "renew", "leases", "set_idle", "needs", "record_steps", "supersede", "reap", "pulse"]
ATTEMPTS = 3


def at_random(rng: Random) -> Work:
    """Some at once, some after a while; each of them fails so many times as its id says, or is invalid."""
    failed: Counter[int] = Counter()

    async def does(job: InProcessJob) -> None:
        pause = rng.choice([None, None, 0.0, rng.uniform(0, 3)])
        if pause is not None:
            await asyncio.sleep(pause)
        if job.id % 11 == 0:
            raise InvalidInput("args", "is wrong")
        if failed[job.id] < to_fail(job.id):
            failed[job.id] += 1
            raise ValueError("not yet")

    return Work(does)


def to_fail(job: int) -> int:
    return job % 5 if job % 3 == 0 else 0


def ended_well(job: int) -> bool:
    return job % 11 != 0 and to_fail(job) < ATTEMPTS


def real(ends: list[AttemptEnd]) -> list[AttemptEnd]:
    """Without those that never began: leases of claims whose answer was lost."""
    return [end for end in ends if end.outcome is not Outcome.RELEASED]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 32), chance=st.sampled_from([0.0, 0.1, 0.4]), slots=st.sampled_from([3, 60, 400]))
def test_each_of_five_hundred_jobs_ends_once_though_the_store_fails(seed: int, chance: float, slots: int) -> None:
    """Its handler runs once for each attempt that is recorded, and never more; no failure is counted that was none."""

    async def play() -> None:
        rng = Random(seed)
        store = FakeStore()
        store.faults = sometimes(rng, chance, FALLIBLE)
        work = at_random(rng)
        daemons = [
            Daemon(store, FakeHost(), slots=slots, seed=rng.randrange(1000), handlers=work.handlers).start()
            for _ in range(2)
        ]
        store.add(500, kind="task", attempts=ATTEMPTS)
        await until(lambda: all_final(store), 20_000)
        for number, job in store.jobs.items():
            ends = real(list(job.ends.values()))
            last = Outcome.SUCCEEDED if ended_well(number) else Outcome.FAILED
            before = 0 if number % 11 == 0 else min(to_fail(number), ATTEMPTS) - (not ended_well(number))
            assert [end.outcome for end in ends] == [Outcome.FAILED] * before + [last]
            assert job.life.state is (State.SUCCEEDED if ended_well(number) else State.FAILED)
            assert work.runs[number] == len(ends)
            assert job.life.losses == 0 and not job.superseded
        store.faults = lambda call: None
        await until(lambda: not any(daemon.in_process._runs for daemon in daemons))
        for daemon in daemons:
            await daemon.die()

    run(play())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), chance=st.sampled_from([0.05, 0.3]), delay=st.sampled_from([0.0, 0.4]))
def test_with_dying_daemons_every_job_ends_succeeded_and_never_runs_twice_at_once(
    seed: int, chance: float, delay: float
) -> None:
    """Daemons are killed, told to detach, and started again. A job runs once more, and is counted as lost, at most for
    each time that a daemon went."""

    async def play() -> None:
        rng = Random(seed)
        store = FakeStore()
        store.delay = delay
        store.faults = sometimes(rng, chance, [*FALLIBLE, "open_session", "resume_session"])
        work = Work(seconds(rng.uniform(0.1, 20)))
        hosts = [FakeHost(), FakeHost()]
        daemons = [Daemon(store, host, seed=rng.randrange(1000), handlers=work.handlers).start() for host in hosts]
        store.add(60, kind="task")
        gone = rng.randrange(5)
        for _ in range(gone):
            await asyncio.sleep(rng.uniform(0, 30))
            which = rng.randrange(2)
            if rng.random() < 0.5:
                await daemons[which].die()
            else:
                daemons[which].terminate(detach=True)
                await daemons[which].end()
            await asyncio.sleep(rng.choice([0.0, 5.0, 250.0]))
            again = Daemon(store, hosts[which], seed=rng.randrange(1000), handlers=work.handlers)
            daemons[which] = again.start()
        await until(lambda: all_final(store), 20_000)
        assert store.states() == {State.SUCCEEDED}
        for number, job in store.jobs.items():
            ended = Counter(end.outcome for end in job.ends.values())
            assert ended[Outcome.SUCCEEDED] == 1 and ended[Outcome.FAILED] == 0
            assert 1 <= work.runs[number] <= min(1 + gone, job.life.attempt)
            assert job.life.losses <= gone
        assert len({(job, attempt) for job, attempt in work.begun}) == len(work.begun), "one attempt began twice"
        for daemon in daemons:
            await daemon.die()
        assert not work.running.total()

    run(play())


@pytest.mark.anyio
async def test_nothing_of_an_ended_job_waits_for_the_collector(store: FakeStore, daemon: Daemon, work: Work) -> None:
    """The daemon lets it run rarely: what ten thousand jobs leave behind must go by itself."""

    def left() -> Counter[str]:
        kinds = (JobActor, InProcessJob, asyncio.Task)
        return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds))

    async def does(job: InProcessJob) -> None:
        if job.id % 2:
            await asyncio.sleep(1)
        if job.id % 3 == 0:
            raise ValueError("no")

    work.does = does
    store.add(8, kind="task")
    await until(lambda: all_final(store) and not daemon.in_process._runs)
    gc.collect()
    before = left()
    gc.disable()
    try:
        store.add(40, kind="task")
        await until(lambda: all_final(store) and not daemon.in_process._runs)
        await asyncio.sleep(1)
        assert left() == before
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_a_killed_daemon_leaves_no_handler_running(store: FakeStore, host: FakeHost, work: Work) -> None:
    work.does = for_ever
    daemon = Daemon(store, host, slots=50, handlers=work.handlers).start()
    store.add(50, kind="task")
    await until(lambda: work.running.total() == 50)
    await daemon.die()
    assert not work.running.total()
