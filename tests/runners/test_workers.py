"""Workers: short works share a task, those that wait keep one, and none meets what another left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.runners.workers import MOST_IDLE, TURN, Workers
from tests.actors.virtual_loop import VirtualLoop, run

pytestmark = pytest.mark.anyio

Task = asyncio.Task[None]


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    made = Workers()
    yield made
    await made.cancel(1.0)


class Ran:
    """Works that note the task they ran in."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    @property
    def names(self) -> list[str]:
        return [task.get_name() for task in self.tasks]

    async def short(self, task: Task) -> bool:
        assert task is asyncio.current_task()
        self.tasks.append(task)
        return True

    async def waits(self, task: Task) -> bool:
        self.tasks.append(task)
        await asyncio.sleep(1)
        return True

    async def unclean(self, task: Task) -> bool:
        self.tasks.append(task)
        return False


async def test_short_works_share_a_task_one_after_another(workers: Workers) -> None:
    ran = Ran()
    for _ in range(3 * TURN):
        workers.submit(ran.short)
    assert ran.tasks == [], "never within the submission"
    await asyncio.sleep(1)
    assert len(ran.tasks) == 3 * TURN and len(set(ran.tasks)) <= 4
    before = set(ran.tasks)
    for _ in range(TURN):
        workers.submit(ran.short)
    await asyncio.sleep(1)
    assert set(ran.tasks) == before, "they waited for more"


async def test_works_that_wait_run_side_by_side(workers: Workers) -> None:
    ran = Ran()
    for _ in range(100):
        workers.submit(ran.waits)
    workers.submit(ran.short)
    await asyncio.sleep(0.5)
    assert len(ran.tasks) == 101, "the last one waits for none of the others"
    assert len(set(ran.tasks)) >= 100


async def test_many_short_works_leave_the_loop_its_turns(workers: Workers) -> None:
    ran = Ran()
    seen: list[int] = []
    loop = asyncio.get_running_loop()

    def look() -> None:
        seen.append(len(ran.tasks))
        if len(ran.tasks) < 20 * TURN:
            loop.call_soon(look)

    for _ in range(20 * TURN):
        workers.submit(ran.short)
    loop.call_soon(look)
    await asyncio.sleep(1)
    assert len(ran.tasks) == 20 * TURN
    assert len(set(seen)) >= 6


async def test_a_task_that_is_not_clean_is_not_used_again(workers: Workers) -> None:
    """Because the work says so, its context was changed, or a cancellation is still on its way."""
    setting: ContextVar[int] = ContextVar("setting", default=0)
    ran = Ran()

    async def changes(task: Task) -> bool:
        ran.tasks.append(task)
        setting.set(setting.get() + 1)
        return True

    async def canceled(task: Task) -> bool:
        ran.tasks.append(task)
        task.cancel()
        return True

    async def fresh(task: Task) -> bool:
        ran.tasks.append(task)
        assert setting.get() == 0 and not task.cancelling()
        await asyncio.sleep(0)
        return True

    spoils: list[Callable[[Task], Any]] = [ran.unclean, changes, canceled]
    for spoil in spoils:
        ran.tasks.clear()
        workers.submit(spoil)
        workers.submit(fresh)
        workers.submit(spoil)
        await asyncio.sleep(1)
        assert len(ran.tasks) == 3
        assert ran.tasks[0] is not ran.tasks[1] and ran.tasks[0] is not ran.tasks[2]


async def test_idle_workers_are_few(workers: Workers) -> None:
    ran = Ran()
    others = len(asyncio.all_tasks())
    for _ in range(10 * MOST_IDLE):
        workers.submit(ran.waits)
    await asyncio.sleep(0.5)
    assert len(asyncio.all_tasks()) - others == 10 * MOST_IDLE
    await asyncio.sleep(5)
    assert len(asyncio.all_tasks()) - others <= MOST_IDLE


async def test_cancel_ends_all_that_runs_and_drops_what_was_not_begun() -> None:
    workers = Workers()
    ran = Ran()
    left = 3

    async def deaf(task: Task) -> bool:
        nonlocal left
        while left:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                left -= 1
        return False

    workers.submit(ran.waits)
    workers.submit(deaf)
    await asyncio.sleep(0.5)
    workers.submit(ran.short)
    others = len(asyncio.all_tasks()) - 2
    await workers.cancel(1.0)
    assert left == 0 and len(ran.tasks) == 1
    assert len(asyncio.all_tasks()) == others
    workers.submit(ran.short)
    await asyncio.sleep(1)
    assert len(ran.tasks) == 1, "nothing is begun any more"
    await workers.cancel(1.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "submit", "turn"]), st.sampled_from([None, 0.0, 0.3]), st.booleans()
        ),
        max_size=80,
    )
)
def test_every_work_runs_once_and_two_never_share_a_task_at_a_time(
    script: list[tuple[str, float | None, bool]],
) -> None:
    """Whatever waits, for how long, and is clean or not; they begin in the order in which they were handed in."""

    async def play() -> None:
        workers = Workers()
        begun: list[int] = []
        ended: list[int] = []
        in_task: dict[Task, int] = {}

        def work(number: int, wait: float | None, clean: bool) -> Callable[[Task], Any]:
            async def does(task: Task) -> bool:
                assert task not in in_task
                in_task[task] = number
                begun.append(number)
                if wait is not None:
                    await asyncio.sleep(wait)
                ended.append(number)
                del in_task[task]
                return clean

            return does

        count = 0
        for action, wait, clean in script:
            if action == "turn":
                await asyncio.sleep(0)
            else:
                workers.submit(work(count, wait, clean))
                count += 1
        await asyncio.sleep(5)
        assert begun == list(range(count)) and sorted(ended) == begun
        await workers.cancel(1.0)

    run(play())
