"""Jobs of in-process kinds in the whole daemon, on a virtual clock: how they end, are ended, and guarded meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from supervisor.kinds import InProcessJob
from supervisor.messages import AskRunning, AskStop
from supervisor.model.errors import InvalidInput
from supervisor.model.job import Outcome, Phase, State
from supervisor.ports import StopOrder
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost, now
from tests.actors.harness import Daemon, until
from tests.actors.in_process_world import (
    GRACE,
    Work,
    all_final,
    counts,
    deaf,
    for_ever,
    raises,
    seconds,
    until_asked,
)

pytestmark = pytest.mark.anyio


# --- how they end -------------------------------------------------------------------------------------------------


async def test_jobs_succeed_without_steps_or_a_log(store: FakeStore, daemon: Daemon, work: Work) -> None:
    store.add(20, kind="task")
    await until(lambda: work.running.total() == 4)
    [shown, *_] = await daemon.at.dispatcher.ask(AskRunning(), 1)
    assert (shown.phase, shown.steps_total, shown.step, shown.step_name) == (Phase.RUNNING, 0, None, None)
    assert shown.started_at is not None and shown.kind == "task"
    await until(lambda: all_final(store))
    assert store.states() == {State.SUCCEEDED}
    assert work.most == 4
    for job in store.jobs.values():
        [end] = job.ends.values()
        assert (end.exit_code, end.error, end.steps) == (0, None, [])
        assert end.started_at is not None and end.ended_at is not None
    assert "record_steps" not in store.calls and not daemon.sink.opened
    await until(lambda: not daemon.in_process._runs)
    assert await daemon.at.dispatcher.ask(AskRunning(), 1) == []


async def test_a_handler_gets_its_job(store: FakeStore, daemon: Daemon, work: Work) -> None:
    got: list[InProcessJob] = []

    async def does(job: InProcessJob) -> None:
        got.append(job)

    work.does = does
    store.add(1, kind="task", spec={"args": {"path": "a/b", "deep": [1, {"x": None}]}})
    store.add(1, kind="task")
    await until(lambda: all_final(store))
    first, second = got
    assert (first.id, first.name, first.kind, first.attempt) == (1, "job 1", "task", 1)
    assert first.args == {"path": "a/b", "deep": [1, {"x": None}]}
    assert dict(first.secrets) == {"TOKEN": "hunter2"}
    assert second.args == {}


async def test_a_failure_is_tried_again_within_its_budget(store: FakeStore, daemon: Daemon, work: Work) -> None:
    work.does = raises(ValueError("no such picture"))
    store.add(1, kind="task", attempts=3)
    await until(lambda: all_final(store))
    job = store.jobs[1]
    assert job.life.state is State.FAILED and counts(job) == (3, 0, 0)
    assert work.begun == [(1, 1), (1, 2), (1, 3)]
    assert {end.error for end in job.ends.values()} == {"ValueError: no such picture"}
    assert [end.retry_delay is None for end in job.ends.values()] == [False, False, True]
    assert all(end.exit_code is None for end in job.ends.values())


async def test_what_is_invalid_is_not_tried_again(store: FakeStore, daemon: Daemon, work: Work) -> None:
    work.does = raises(InvalidInput("args.path", "is missing", "a path"))
    store.add(1, kind="task", attempts=5)
    await until(lambda: all_final(store))
    [end] = store.jobs[1].ends.values()
    assert (end.outcome, end.reason, end.retry_delay) == (Outcome.FAILED, "invalid", None)
    assert end.error is not None and "args.path" in end.error
    assert work.begun == [(1, 1)]


async def test_an_error_leaves_redacted_and_bounded(store: FakeStore, daemon: Daemon, work: Work) -> None:
    work.does = raises(RuntimeError("login with hunter2\0 refused" + "x" * 10_000))
    store.add(1, kind="task")
    await until(lambda: all_final(store))
    [end] = store.jobs[1].ends.values()
    assert end.error is not None and end.error.startswith("RuntimeError: login with ")
    assert "hunter2" not in end.error and "\0" not in end.error and len(end.error) <= 4000


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyError("name")


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(SystemExit(3), id="exit"),
        pytest.param(BaseExceptionGroup("both", [SystemExit(1), ValueError("x")]), id="group"),
        pytest.param(asyncio.CancelledError("its own task was canceled"), id="canceled itself"),
        pytest.param(_Unspeakable(), id="an error that can't be told"),
    ],
)
async def test_whatever_a_handler_raises_is_its_own_failure(
    store: FakeStore, daemon: Daemon, work: Work, error: BaseException
) -> None:
    """The daemon lives, the other job too; the failure is counted, so its budget of attempts bounds it."""
    work.does = raises(error)
    store.add(1, kind="task", attempts=2)
    await until(lambda: all_final(store), within=60)
    job = store.jobs[1]
    assert (job.life.state, counts(job)) == (State.FAILED, (2, 0, 0))
    assert all(type(error).__name__ in (end.error or "") for end in job.ends.values())
    work.does = seconds(1.0)
    store.add(1, kind="task")
    await until(lambda: all_final(store), within=60)
    assert store.jobs[2].life.state is State.SUCCEEDED


# --- how they are ended -------------------------------------------------------------------------------------------


async def test_the_jobs_own_timeout_asks_then_cancels(store: FakeStore, daemon: Daemon, work: Work) -> None:
    work.does = for_ever
    store.add(1, kind="task", spec={"timeout": 40})
    await until(lambda: bool(work.begun))
    took = await until(lambda: all_final(store))
    assert took == pytest.approx(40 + GRACE, abs=0.5)
    [end] = store.jobs[1].ends.values()
    assert (end.outcome, end.reason, end.error) == (Outcome.FAILED, "timeout", "the job timed out after 40 s")


async def test_the_hosts_timeout_is_for_jobs_that_name_none(store: FakeStore, host: FakeHost) -> None:
    work = Work(for_ever)
    daemon = Daemon(store, host, handlers=work.handlers, timeout=20.0).start()
    store.add(1, kind="task")
    store.add(1, kind="task", spec={"timeout": 60})
    await until(lambda: len(work.begun) == 2)
    began = now()
    await until(lambda: store.jobs[1].life.state.is_final)
    assert now() - began == pytest.approx(20 + GRACE, abs=0.5)
    assert store.jobs[2].life.state is State.RUNNING
    await until(lambda: all_final(store))
    assert {end.reason for job in store.jobs.values() for end in job.ends.values()} == {"timeout"}
    await daemon.die()


@pytest.mark.parametrize(
    ("kill", "takes"), [pytest.param(False, GRACE, id="after the grace"), pytest.param(True, 0.0, id="killed at once")]
)
async def test_a_stop_cancels_a_handler_that_does_not_listen(
    store: FakeStore, daemon: Daemon, work: Work, kill: bool, takes: float
) -> None:
    work.does = for_ever
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    assert await daemon.at.dispatcher.ask(AskStop((1,), None, kill, "ann"), 1) == [1]
    assert await until(lambda: all_final(store)) == pytest.approx(takes, abs=0.2)
    [end] = store.jobs[1].ends.values()
    assert (end.outcome, end.reason, end.error) == (Outcome.CANCELED, "stop", "stopped by ann")


async def test_a_handler_that_listens_ends_within_the_grace(store: FakeStore, daemon: Daemon, work: Work) -> None:
    """It gave up where it stood: that is no success."""
    work.does = until_asked
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    await daemon.at.dispatcher.ask(AskStop((1,), None, False, "ann"), 1)
    assert await until(lambda: all_final(store)) < 1
    assert store.jobs[1].life.state is State.CANCELED


async def test_a_handler_that_listens_and_gives_up_loudly_has_not_failed(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    """What it raises on being asked to stop is how it stops, and spends none of its attempts."""

    async def does(job: InProcessJob) -> None:
        await job.stop_asked.wait()
        raise RuntimeError("half done")

    work.does = does
    store.add(1, kind="task", attempts=3)
    await until(lambda: bool(work.begun))
    await daemon.at.dispatcher.ask(AskStop((1,), None, False, "ann"), 1)
    assert await until(lambda: all_final(store)) < 1
    assert store.jobs[1].life.state is State.CANCELED


async def test_a_stop_that_came_too_late_leaves_the_natural_outcome(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    """It never looked whether it should stop, and was done before the grace was over."""
    work.does = seconds(20.0)
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    await asyncio.sleep(15)
    await daemon.at.dispatcher.ask(AskStop((1,), None, False, "ann"), 1)
    await until(lambda: all_final(store))
    assert store.jobs[1].life.state is State.SUCCEEDED


async def test_a_stop_order_of_the_database_reaches_it(store: FakeStore, daemon: Daemon, work: Work) -> None:
    work.does = for_ever
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    job = store.jobs[1]
    assert job.lease is not None
    job.stop = StopOrder(job.lease, 1, 3.0, False, "bob")
    store.wake("stop")
    assert await until(lambda: all_final(store)) < 5
    assert job.life.state is State.CANCELED


async def test_a_handler_that_swallows_its_cancellation_is_canceled_again(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    work.does = deaf(3)
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    await daemon.at.dispatcher.ask(AskStop((1,), None, False, "ann"), 1)
    await until(lambda: all_final(store), within=60)
    assert store.jobs[1].life.state is State.CANCELED
    assert not work.running.total()


async def test_a_thousand_are_stopped_at_once(store: FakeStore, host: FakeHost) -> None:
    work = Work(for_ever)
    daemon = Daemon(store, host, slots=1000, handlers=work.handlers).start()
    store.add(1000, kind="task")
    await until(lambda: work.running.total() == 1000)
    await daemon.at.dispatcher.ask(AskStop(tuple(store.jobs), None, True, "ann"), 1)
    assert await until(lambda: all_final(store)) < 1
    assert store.states() == {State.CANCELED} and not work.running.total()
    await daemon.die()


# --- the guard ----------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(host: FakeHost, work: Work) -> Iterator[None]:
    """No handler begins without the guard."""

    def check() -> None:
        assert host.is_guarded, "a handler began before the guard was written"

    work.on_begin = check
    yield


@pytest.mark.usefixtures("guarded")
async def test_the_guard_stands_from_before_the_first_handler_until_after_the_last(
    store: FakeStore, daemon: Daemon, host: FakeHost, work: Work
) -> None:
    """And is not written for each job while they come and go."""
    store.add(40, kind="task")
    await until(lambda: all_final(store))
    assert store.states() == {State.SUCCEEDED}
    assert host.guards == [True]
    await until(lambda: not host.is_guarded, within=60)
    assert host.guards == [True, False]
    store.add(1, kind="task")
    await until(lambda: all_final(store))
    assert host.guards == [True, False, True] and store.jobs[41].life.state is State.SUCCEEDED


@pytest.mark.usefixtures("guarded")
async def test_a_guard_that_can_not_be_written_begins_nothing(
    store: FakeStore, daemon: Daemon, host: FakeHost, work: Work
) -> None:
    host.faults = lambda call: "before" if call == "guard" else None
    store.add(1, kind="task", attempts=2)
    await until(lambda: store.jobs[1].life.failures == 1)
    assert not work.begun
    [end] = store.jobs[1].ends.values()
    assert (end.reason, end.retry_delay is not None) == ("exec", True)
    host.faults = lambda call: None
    await until(lambda: all_final(store))
    assert store.jobs[1].life.state is State.SUCCEEDED


async def test_a_guard_that_can_not_be_taken_out_is_tried_again(
    store: FakeStore, daemon: Daemon, host: FakeHost
) -> None:
    store.add(1, kind="task")
    await until(lambda: all_final(store))
    host.faults = lambda call: "before" if call == "guard" else None
    await asyncio.sleep(60)
    assert host.is_guarded
    host.faults = lambda call: None
    await until(lambda: not host.is_guarded, within=10)
