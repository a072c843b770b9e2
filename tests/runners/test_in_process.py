"""The runner of in-process kinds as a job's actor drives it. On a virtual clock."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor.kinds import Handler, InProcessJob
from supervisor.model.errors import InvalidInput, RunnerError
from supervisor.model.job import Lease, LeaseId
from supervisor.ports import Plan, StepEnd, StepPlan, StepTaken
from supervisor.runners.fence import FenceFile
from supervisor.runners.in_process import UNGUARD_AFTER, InProcessRunner
from tests.actors.virtual_loop import VirtualLoop

pytestmark = pytest.mark.anyio

SESSION = "5e55" * 8


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


def lease_of(number: int = 1, *, kind: str = "task", spec: bytes | None = None, **keys: Any) -> Lease:
    raw = json.dumps({"kind": kind, "name": "a job", **keys}).encode() if spec is None else spec
    at = datetime(2024, 1, 1, tzinfo=UTC)
    return Lease(LeaseId(SESSION, number), 40 + number, 2, kind, "a job", msgspec.Raw(raw), {}, {}, 1, 0, 0, at)


class Bench:
    """A runner with one kind, ``task``, which does what ``does`` says; what it tells, and the guard as it was
    written."""

    def __init__(self) -> None:
        self.does: Handler = _at_once
        self.told: list[StepEnd] = []
        self.guards: list[bool] = []
        self.guard_takes = 0.0
        self.guard_fails = False
        self.fence_in = math.inf
        self.runner = InProcessRunner(
            {"task": self._handle}, guard=self._guard, fence_in=lambda: self.fence_in, timeout=None
        )

    async def start(self, lease: Lease) -> datetime:
        self.runner.prepare(lease)
        at = self.runner.start(lease.id, 0, self.told.append)
        return await at if isinstance(at, Awaitable) else at

    async def _handle(self, job: InProcessJob) -> None:
        await self.does(job)

    async def _guard(self, active: bool) -> None:
        if self.guard_fails:
            raise RunnerError("the disk is full")
        if self.guard_takes:
            await asyncio.sleep(self.guard_takes)
        self.guards.append(active)


@asynccontextmanager
async def open_bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.runner:
        yield bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with open_bench() as opened:
        yield opened


async def _at_once(job: InProcessJob) -> None:
    pass


async def _for_ever(job: InProcessJob) -> None:
    await asyncio.Event().wait()


# --- the port -----------------------------------------------------------------------------------------------------


async def test_it_says_that_its_jobs_end_with_the_daemon(bench: Bench) -> None:
    assert not bench.runner.survives and bench.runner.kinds == ("task",)
    assert bench.runner.isolation() == {} and await bench.runner.sweep() == []


async def test_a_plan_is_one_step_with_the_jobs_timeout_or_the_hosts(bench: Bench) -> None:
    assert bench.runner.prepare(lease_of(1)) == Plan((StepPlan(0, "task"),), None, in_process=True)
    assert bench.runner.prepare(lease_of(2, timeout=5)) == Plan((StepPlan(0, "task"),), 5.0, in_process=True)
    bench.runner.timeout = 60.0
    plan = bench.runner.prepare(lease_of(3))
    assert plan == Plan((StepPlan(0, "task"),), 60.0, in_process=True)
    assert bench.runner.prepare(lease_of(4)) is plan, "ten thousand jobs share one"
    assert bench.runner.prepare(lease_of(2)).timeout == 5.0, "to prepare again changes nothing"
    assert await bench.runner.handles() == [lease_of(n).id for n in (1, 2, 3, 4)]


async def test_what_can_not_be_prepared_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(RunnerError, match="no handler for jobs of kind 'other'"):
        bench.runner.prepare(lease_of(kind="other"))
    with pytest.raises(InvalidInput, match="spec"):
        bench.runner.prepare(lease_of(spec=b'{"args": 5}'))
    assert await bench.runner.handles() == []


async def test_it_runs_and_tells_its_end_once(bench: Bench) -> None:
    lease = lease_of()
    at = await bench.start(lease)
    assert bench.told == [], "the end is told later, never within the start"
    await asyncio.sleep(1)
    [end] = bench.told
    assert (end.index, end.exit_code, end.signal, end.cause, end.error) == (0, 0, None, None, None)
    assert end.started_at == at and end.ended_at is not None and end.ended_at >= at
    info = await bench.runner.describe(lease.id)
    assert info is not None and (info.job, info.attempt) == (41, 2)
    bench.runner.discard(lease.id)
    bench.runner.discard(lease.id)
    assert await bench.runner.handles() == [] and await bench.runner.describe(lease.id) is None


async def test_it_answers_at_once_while_the_guard_is_there(bench: Bench) -> None:
    """So that a short job costs its actor no task."""
    await bench.start(lease_of(1))
    bench.runner.prepare(lease_of(2))
    assert isinstance(bench.runner.start(lease_of(2).id, 0, bench.told.append), datetime)


async def test_a_start_is_at_most_once_and_only_of_what_is_prepared(bench: Bench) -> None:
    with pytest.raises(RunnerError):
        bench.runner.start(lease_of().id, 0, bench.told.append)
    await bench.start(lease_of())
    with pytest.raises(RunnerError):
        bench.runner.start(lease_of().id, 0, bench.told.append)


async def test_a_lease_of_a_daemon_before_this_one_is_gone(bench: Bench) -> None:
    [taken] = await bench.runner.adopt(lease_of().id, bench.told.append) or []
    assert taken.end is not None and taken.end.cause == "gone"
    assert await bench.runner.handles() == []


async def test_what_runs_or_ran_here_is_taken_up(bench: Bench) -> None:
    """By an actor after the one that began it: the end goes to the new one, once."""
    lease, news = lease_of(), asyncio.Event()
    bench.runner.prepare(lease)
    assert await bench.runner.adopt(lease.id, bench.told.append) == []

    async def does(job: InProcessJob) -> None:
        await news.wait()

    bench.does = does
    at = await bench.start(lease)
    after: list[StepEnd] = []
    assert ageless(await bench.runner.adopt(lease.id, after.append)) == [StepTaken(0, at, None)]
    news.set()
    await asyncio.sleep(1)
    assert bench.told == [] and len(after) == 1
    assert ageless(await bench.runner.adopt(lease.id, bench.told.append)) == [StepTaken(0, at, after[0])]


def ageless(taken: list[StepTaken] | None) -> list[StepTaken]:
    """But for how long they have run, which is told."""
    assert taken is not None and all(step.age is not None and step.age >= 0.0 for step in taken)
    return [msgspec.structs.replace(step, age=None) for step in taken]


# --- stops --------------------------------------------------------------------------------------------------------


async def test_a_stop_before_its_first_step_begins_nothing(bench: Bench) -> None:
    """A task that is canceled then never runs, and would never tell its end."""
    began: list[int] = []

    async def does(job: InProcessJob) -> None:
        began.append(job.id)

    bench.does = does
    await bench.start(lease_of(1))
    await asyncio.sleep(1)
    bench.runner.prepare(lease_of(2))
    bench.runner.start(lease_of(2).id, 0, bench.told.append)
    await bench.runner.stop(lease_of(2).id, 0.0, True)
    await asyncio.sleep(1)
    assert began == [41]
    assert [(end.exit_code, end.cause) for end in bench.told] == [(0, None), (None, "stop")]


@pytest.mark.parametrize(("grace", "kill", "takes"), [(7.0, False, 7.0), (0.0, False, 0.0), (7.0, True, 0.0)])
async def test_a_stop_cancels_after_the_grace(bench: Bench, grace: float, kill: bool, takes: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    async def does(job: InProcessJob) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    bench.does = does
    await bench.start(lease_of())
    await asyncio.sleep(1)
    began = loop.time()
    await bench.runner.stop(lease_of().id, grace, kill)
    assert loop.time() == began, "a stop returns at once"
    await ended.wait()
    assert loop.time() - began == pytest.approx(takes)
    await asyncio.sleep(0)
    assert [end.cause for end in bench.told] == ["stop"]


async def test_a_stop_of_what_is_over_or_unknown_is_nothing(bench: Bench) -> None:
    await bench.start(lease_of())
    await asyncio.sleep(1)
    await bench.runner.stop(lease_of().id, 0.0, True)
    await bench.runner.stop(lease_of(99).id, 0.0, True)
    assert [end.cause for end in bench.told] == [None]


async def test_a_handler_may_first_look_after_it_was_asked(bench: Bench) -> None:
    """Between two pieces of its work, say."""

    seen: list[bool] = []

    async def looks_again(job: InProcessJob) -> None:
        for _ in range(3):
            seen.append(job.stop_asked.is_set())
            await asyncio.sleep(3)

    async def looks_late(job: InProcessJob) -> None:
        await asyncio.sleep(3)
        seen.append(job.stop_asked.is_set())

    for number, handler in enumerate((looks_again, looks_late), 1):
        bench.does = handler
        await bench.start(lease_of(number))
        await asyncio.sleep(1)
        await bench.runner.stop(lease_of(number).id, 60.0, False)
        await asyncio.sleep(10)
    assert seen == [False, True, True, True]
    assert [end.cause for end in bench.told] == ["stop", "stop"]


async def test_leaving_ends_what_runs_however_often_it_must_be_told() -> None:
    left = 4
    async with open_bench() as bench:

        async def does(job: InProcessJob) -> None:
            nonlocal left
            while left:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    left -= 1

        for number, handler in enumerate((does, _for_ever), 1):
            bench.does = handler
            await bench.start(lease_of(number))
            await asyncio.sleep(1)
    assert left == 0 and bench.guards == [True, False]


# --- what one job leaves to the next ------------------------------------------------------------------------------


async def test_a_handlers_context_variables_are_its_own(bench: Bench) -> None:
    """As in a task of its own: what it sets, a tenant's name say, the next job does not see."""
    tenant: ContextVar[str] = ContextVar("tenant", default="none")
    seen: list[str] = []

    async def does(job: InProcessJob) -> None:
        seen.append(tenant.get())
        tenant.set(f"of job {job.id}")

    bench.does = does
    await bench.start(lease_of(1))
    for number in range(2, 6):
        await bench.start(lease_of(number))
        await asyncio.sleep(number % 2)
    await asyncio.sleep(1)
    assert seen == ["none"] * 5


async def test_a_handler_that_cancels_its_own_task_harms_no_other(bench: Bench) -> None:
    """The cancellation is still on its way when the handler returns."""

    async def cancels(job: InProcessJob) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def waits(job: InProcessJob) -> None:
        await asyncio.sleep(1)

    bench.does = waits
    await bench.start(lease_of(1))
    await asyncio.sleep(2)
    bench.told.clear()
    for number in range(2, 6):
        bench.does = cancels if number % 2 == 0 else waits
        await bench.start(lease_of(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.sleep(5)
    ended = {end.exit_code for end in bench.told}
    assert len(bench.told) == 4 and ended == {0}


async def test_a_handler_that_waits_holds_up_no_other(bench: Bench) -> None:
    gate = asyncio.Event()
    ended: list[int] = []

    async def does(job: InProcessJob) -> None:
        if job.id % 2:
            await gate.wait()
        ended.append(job.id)

    bench.does = does
    for number in range(10):
        await bench.start(lease_of(number))
    await asyncio.sleep(1)
    assert ended == [40, 42, 44, 46, 48]
    gate.set()
    await asyncio.sleep(1)
    assert sorted(ended) == list(range(40, 50))


async def test_a_stop_ends_its_own_job_and_no_other(bench: Bench) -> None:
    """Of those that began in the same turn; and its cancel, due after the grace, finds nobody else in its place."""

    async def does(job: InProcessJob) -> None:
        await asyncio.sleep(2.0 if job.id == 41 else 30.0)

    bench.does = does
    for number in range(4):
        await bench.start(lease_of(number))
    await asyncio.sleep(1)
    await bench.runner.stop(lease_of(1).id, 5.0, False)
    await bench.runner.stop(lease_of(2).id, 0.0, True)
    await asyncio.sleep(1.5)
    assert [end.cause for end in bench.told] == ["stop", None]
    for number in range(4, 8):
        await bench.start(lease_of(number))
    await asyncio.sleep(60)
    assert [end.cause for end in bench.told] == ["stop"] + [None] * 7


# --- the guard ----------------------------------------------------------------------------------------------------


async def test_starts_at_once_wait_for_one_guard(bench: Bench) -> None:
    bench.guard_takes = 1.0
    bench.does = _for_ever
    async with asyncio.TaskGroup() as tasks:
        starts = [tasks.create_task(bench.start(lease_of(n))) for n in range(5)]
        await asyncio.sleep(0.5)
        assert not any(start.done() for start in starts)
    assert bench.guards == [True]


async def test_a_guard_that_failed_is_tried_by_the_next_start(bench: Bench) -> None:
    bench.guard_fails = True
    with pytest.raises(RunnerError, match="disk is full"):
        await bench.start(lease_of(1))
    bench.guard_fails = False
    await bench.start(lease_of(2))
    await asyncio.sleep(1)
    assert bench.guards == [True] and len(bench.told) == 1
    assert await bench.runner.adopt(lease_of(1).id, bench.told.append) == [], "the first one never began"


async def test_the_guard_is_taken_out_when_nothing_ran_for_a_while(bench: Bench) -> None:
    await bench.start(lease_of(1))
    await asyncio.sleep(UNGUARD_AFTER - 1)
    await bench.start(lease_of(2))
    await asyncio.sleep(UNGUARD_AFTER - 1)
    assert bench.guards == [True]
    await asyncio.sleep(2)
    assert bench.guards == [True, False]


async def test_the_guard_is_taken_out_at_the_fence_if_nothing_runs_any_more(bench: Bench) -> None:
    bench.fence_in = 1.0
    await bench.start(lease_of(1))
    await asyncio.sleep(1.5)
    assert bench.guards == [True, False]
    bench.fence_in = -5.0
    await bench.start(lease_of(2))
    await asyncio.sleep(0.1)
    assert bench.guards == [True, False] * 2


async def test_the_guard_stays_at_the_fence_while_one_runs(bench: Bench) -> None:
    """That is what it is for: a handler that blocks, or passes over its cancellation."""
    bench.fence_in = 1.0
    for number, handler in enumerate((_for_ever, _at_once), 1):
        bench.does = handler
        await bench.start(lease_of(number))
        await asyncio.sleep(30)
    assert len(bench.told) == 1
    assert bench.guards == [True]


async def test_a_start_while_the_guard_is_taken_out_writes_it_again_first(bench: Bench) -> None:
    began: list[list[bool]] = []

    async def does(job: InProcessJob) -> None:
        began.append(list(bench.guards))

    bench.does = does
    await bench.start(lease_of(1))
    bench.guard_takes = 1.0
    await asyncio.sleep(UNGUARD_AFTER + 0.5)
    assert bench.guards == [True], "it is being taken out"
    await bench.start(lease_of(2))
    await asyncio.sleep(1)
    assert began == [[True], [True, False, True]]


async def test_a_start_before_the_guard_is_taken_out_keeps_it(bench: Bench) -> None:
    """It was asked for, and behind a lock: meanwhile a job began."""
    gate = asyncio.Event()

    async def does(job: InProcessJob) -> None:
        await gate.wait()

    await bench.start(lease_of(1))
    await asyncio.sleep(1)
    bench.does = does
    async with bench.runner._guarding:
        await asyncio.sleep(UNGUARD_AFTER)
        bench.runner.prepare(lease_of(2))
        assert isinstance(bench.runner.start(lease_of(2).id, 0, bench.told.append), datetime)
    await asyncio.sleep(1)
    assert bench.guards == [True]
    gate.set()


async def test_the_fence_file_names_this_daemon_while_a_handler_runs(tmp_path: Path) -> None:
    """With the file as the shepherd reads it."""
    fence = FenceFile(tmp_path)
    assert fence.left() == math.inf
    await fence.write(fence.now() + 1000)
    assert 900 < fence.left() <= 1000
    named: list[bool] = []

    def is_named() -> bool:
        return "daemon" in json.loads((tmp_path / "fence").read_text())

    async def task(job: InProcessJob) -> None:
        named.append(is_named())

    told: list[StepEnd] = []
    async with InProcessRunner({"task": task}, guard=fence.guard, fence_in=fence.left, timeout=None) as runner:
        assert not is_named()
        runner.prepare(lease_of())
        at = runner.start(lease_of().id, 0, told.append)
        assert isinstance(at, Awaitable)
        await at
        await asyncio.sleep(1)
        assert named == [True] and len(told) == 1
    assert not is_named()
