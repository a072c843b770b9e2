"""The dispatcher and its parts, where the whole daemon is too coarse: stalls, crashes, comparing, the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.actors.adoption import compare
from supervisor.actors.dispatcher import CRASHES, Dispatcher
from supervisor.actors.ledger import Owner
from supervisor.mailbox import Lane, Mailbox
from supervisor.messages import (
    Beat,
    DispatcherMessage,
    DispatcherUp,
    JobMessage,
    JobStart,
    KeeperMessage,
    Reconfigure,
    Renewed,
    RootMessage,
    SessionOpened,
)
from supervisor.model.attempt_words import Crashed, LeaseGone, Stalled
from supervisor.model.job import HostInfo, Lease, LeaseId
from supervisor.model.policies import Capacity
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost
from tests.actors.harness import until

pytestmark = pytest.mark.anyio

HOST = HostInfo("h", (), 4, None, None, "1", "m", "b", 1)


class StubJob:
    """An actor that does what the test says: hears nothing, or crashes."""

    def __init__(self, lease: Lease, start: JobStart, crash: bool) -> None:
        self.lease = lease
        self.start = start
        self.mailbox: Mailbox[JobMessage] = Mailbox("stub")
        self.abandoned = False
        self._crash = crash

    def begin(self, owner: Owner, on_over: Callable[[Exception | None], None]) -> bool:
        if self._crash:
            asyncio.get_running_loop().call_soon(on_over, ValueError("boom"))
        return False

    def abandon(self) -> None:
        self.abandoned = True


class Stage:
    """A dispatcher whose jobs are stubs."""

    def __init__(self, *, crash: bool = False) -> None:
        self.store = FakeStore()
        self.jobs: list[StubJob] = []
        self.mailbox: Mailbox[DispatcherMessage] = Mailbox("dispatcher")
        self.keeper: Mailbox[KeeperMessage] = Mailbox("keeper")
        self.root: Mailbox[RootMessage] = Mailbox("root")
        self.crash = crash
        self.dispatcher = Dispatcher(
            self.mailbox,
            store=self.store,  # type: ignore[arg-type]  # as in the harness
            runners={"steps": FakeHost()},
            make_job=self._make,
            keeper=self.keeper,
            root=self.root,
            host=Reconfigure(Capacity(4), (), 1.0, 10.0),
            stall_after=30.0,
            rng=Random(0),
        )

    def _make(self, lease: Lease, start: JobStart) -> StubJob:
        job = StubJob(lease, start, self.crash)
        self.jobs.append(job)
        return job


@asynccontextmanager
async def on_stage(*, crash: bool = False, kinds: Sequence[str] = ("steps",)) -> AsyncIterator[Stage]:
    stage = Stage(crash=crash)
    stage.store.kinds = list(kinds)
    task = asyncio.create_task(stage.dispatcher.run())
    grant = await stage.store.open_session(HOST, 180.0)
    stage.mailbox.tell(SessionOpened(grant.me, 0), Lane.CONTROL)
    assert isinstance(await stage.keeper.receive(), DispatcherUp)
    yield stage
    task.cancel()
    await asyncio.wait([task])


async def test_a_silent_actor_is_followed_by_one_that_ends_its_job() -> None:
    async with on_stage() as stage:
        stage.store.add(1)
        await until(lambda: bool(stage.jobs))
        first = stage.jobs[0]
        stage.mailbox.tell(Beat(), Lane.CONTROL)
        await asyncio.sleep(1)
        assert isinstance(first.mailbox.receive_nowait(), Beat)
        await asyncio.sleep(31)
        stage.mailbox.tell(Beat(), Lane.CONTROL)
        await until(lambda: len(stage.jobs) == 2)
        assert stage.jobs[1].start == JobStart(adopt=True, doom=Stalled(10.0))
        assert first.abandoned


async def test_an_actor_that_crashes_is_followed_a_few_times_and_harms_no_one_else() -> None:
    async with on_stage(crash=True) as stage:
        stage.store.add(1)
        await until(lambda: len(stage.jobs) == 1 + CRASHES)
        assert {job.start.doom for job in stage.jobs[1:]} == {Crashed("ValueError: boom")}
        stage.crash = False
        stage.store.add(1)
        await until(lambda: stage.jobs[-1].lease.job == 2)


async def test_a_lease_that_the_database_forgot_is_looked_for_twice_then_its_work_is_ended() -> None:
    async with on_stage() as stage:
        stage.store.add(1)
        await until(lambda: bool(stage.jobs))
        [job] = stage.jobs
        [session] = stage.store.sessions
        stage.store.jobs[1].lease = None
        await asyncio.sleep(10)
        assert job.mailbox.stats().depth_control == 0
        calls = stage.store.calls.count("leases")
        me = stage.dispatcher._me
        assert me is not None and me.session == session
        stage.mailbox.tell(Renewed(me, 0, 0, asyncio.get_running_loop().time()), Lane.CONTROL)
        await until(lambda: job.mailbox.stats().depth_control > 0)
        assert isinstance(job.mailbox.receive_nowait(), LeaseGone)
        assert stage.store.calls.count("leases") >= calls + 2


async def test_a_host_that_serves_no_need_does_not_claim() -> None:
    async with on_stage(kinds=["other"]) as stage:
        stage.store.add(1, kind="other")
        await asyncio.sleep(30)
        assert "needs" in stage.store.calls and "claim" not in stage.store.calls


ids = st.sets(st.integers(1, 8))


@given(rows=ids, handles=ids, before=ids, after=ids, ending=ids)
def test_every_lease_seen_anywhere_falls_into_one_place(
    rows: set[int], handles: set[int], before: set[int], after: set[int], ending: set[int]
) -> None:
    """In the database and unknown here: taken up or released. Here at both looks and not there, its end not under way:
    missing. On disk only: an orphan. What either look knew is never adopted, released or buried."""

    def lease(number: int) -> LeaseId:
        return LeaseId("s", number)

    found = compare(
        rows=[_row(lease(n)) for n in rows],
        handles=[lease(n) for n in handles],
        before=[lease(n) for n in before],
        after=[lease(n) for n in after],
        expected=[lease(n) for n in before & after],
        ending=[lease(n) for n in ending],
    )
    known = before | after
    assert {row.id.counter for row in found.adopt} == (rows & handles) - known
    assert {row.id.counter for row in found.release} == rows - handles - known
    assert {lease.counter for lease in found.missing} == (before & after) - rows - ending
    assert {lease.counter for lease in found.orphans} == handles - rows - known


def _row(id: LeaseId) -> Lease:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    return Lease(id, id.counter, 1, "steps", "j", msgspec.Raw(b"{}"), {}, {}, 1, 0, 0, at)
