"""The keeper: fence arithmetic, patience, and the order of a take-up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from supervisor.actors.keeper import Keeper, Terms
from supervisor.mailbox import Ask, Lane, Mailbox
from supervisor.messages import (
    AskLastRenewal,
    Beat,
    DispatcherMessage,
    DispatcherUp,
    FencePassed,
    KeeperMessage,
    Renewed,
    SessionGone,
    SessionOpened,
    WorkEnded,
)
from supervisor.model.errors import RunnerError
from supervisor.model.job import HostInfo
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import FakeHost
from tests.actors.harness import until

pytestmark = pytest.mark.anyio

TERMS = Terms(renew=10.0, term=180.0, margin=15.0)
HOST = HostInfo("h", (), 1, None, None, "1", "m", "b", 1)


class Stage:
    """A keeper, and a dispatcher that only notes what it is told (and says that its work has ended)."""

    def __init__(self, store: FakeStore, host: FakeHost) -> None:
        self.store = store
        self.host = host
        self.mailbox: Mailbox[KeeperMessage] = Mailbox("keeper")
        self.dispatcher: Mailbox[DispatcherMessage] = Mailbox("dispatcher", control=4096)
        self.told: list[DispatcherMessage] = []
        self.ends_work = True
        self.keeper = Keeper(
            self.mailbox,
            store=store,  # type: ignore[arg-type]  # as in the harness
            file=host,
            fence=host,
            dispatcher=self.dispatcher,
            host=lambda: HOST,
            terms=TERMS,
            rng=Random(0),
        )

    async def note(self) -> None:
        async for message in self.dispatcher:
            assert not isinstance(message, Ask)
            if not isinstance(message, Beat):
                self.told.append(message)
            if isinstance(message, SessionGone) and self.ends_work:
                self.mailbox.tell(WorkEnded(), Lane.CONTROL)

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.told)


@asynccontextmanager
async def on_stage(store: FakeStore | None = None, host: FakeHost | None = None) -> AsyncIterator[Stage]:
    stage = Stage(store or FakeStore(), host or FakeHost())
    tasks = [asyncio.create_task(stage.keeper.run()), asyncio.create_task(stage.note())]
    yield stage
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_the_fence_is_counted_from_before_the_renewal_was_sent() -> None:
    """However slow the answer: the database's expiry is never before sent + term."""
    async with on_stage() as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
        stage.store.delay = 4.0
        before = len(stage.host.fences)
        await until(lambda: len(stage.host.fences) > before)
        fence = stage.host.fences[-1]
        [session] = stage.store.sessions.values()
        assert fence == pytest.approx(session.expires - 2.0 - TERMS.margin, abs=0.1)
        assert fence < stage.host.now() + TERMS.term - TERMS.margin - 3.9


async def test_a_failed_renewal_moves_no_fence_and_is_repeated_soon() -> None:
    async with on_stage() as stage:
        await until(lambda: stage.count(Renewed) == 1)
        fences = list(stage.host.fences)
        stage.store.down = True
        await asyncio.sleep(100)
        assert stage.host.fences == fences
        assert stage.store.calls.count("renew") > 15
        assert stage.count(SessionGone) == 1  # the one at the very begin, before any session
        stage.store.down = False
        await until(lambda: len(stage.host.fences) > len(fences), 6)


async def test_a_fence_that_cant_be_written_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not end the keeper: the work ends at the fence that is there, if no later one can be written."""
    async with on_stage() as stage:
        await until(lambda: stage.count(Renewed) == 1)

        async def refuse(_: float) -> None:
            raise RunnerError("no space left on device")

        with monkeypatch.context() as full:
            full.setattr(stage.host, "write", refuse)
            await asyncio.sleep(TERMS.term)
            assert stage.count(Renewed) == 1
            assert stage.count(FencePassed) == 1
        await until(lambda: stage.count(Renewed) == 2, 20)
        assert stage.count(SessionGone) == 1


async def test_a_renewal_that_hangs_is_given_up() -> None:
    async with on_stage() as stage:
        await until(lambda: stage.count(Renewed) == 1)
        stage.store.delay = 10_000.0
        await asyncio.sleep(25)
        stage.store.delay = 0.0
        await until(lambda: stage.count(Renewed) == 2, 20)


async def test_the_fence_passes_by_the_boot_time_clock() -> None:
    """A machine that slept: the loop's clock stood still, the fence's did not. It is told once."""
    async with on_stage() as stage:
        await until(lambda: stage.count(Renewed) == 1)
        stage.store.down = True
        stage.host.clock_ahead = 1000.0
        await until(lambda: stage.count(FencePassed) == 1, 20)
        await asyncio.sleep(300)
        assert stage.count(FencePassed) == 1
        stage.store.down = False
        await until(lambda: stage.count(Renewed) == 2, 20)
        stage.store.down = True
        await until(lambda: stage.count(FencePassed) == 2, 200)


async def test_no_new_sessions_fence_before_the_old_work_has_ended() -> None:
    async with on_stage() as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
        stage.ends_work = False
        stage.store.sessions.clear()
        await until(lambda: stage.count(SessionGone) >= 2)
        fences = len(stage.host.fences)
        await asyncio.sleep(60)
        assert len(stage.host.fences) == fences and stage.count(SessionOpened) == 1
        stage.mailbox.tell(WorkEnded(), Lane.CONTROL)
        await until(lambda: stage.count(SessionOpened) == 2, 1)
        assert len(stage.host.fences) == fences + 1


async def test_a_dispatcher_that_began_anew_gets_an_epoch_never_told() -> None:
    async with on_stage() as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
        stage.mailbox.tell(DispatcherUp(), Lane.CONTROL)
        await until(lambda: stage.count(SessionOpened) == 2, 1)
        first, second = (message.me for message in stage.told if isinstance(message, SessionOpened))
        assert second.session == first.session and second.epoch == first.epoch + 1
        assert second.incarnation != first.incarnation


async def test_the_next_incarnation_is_on_disk_before_the_swap() -> None:
    store, host = FakeStore(), FakeHost()
    async with on_stage(store, host) as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
    store.faults = lambda call: "after" if call == "resume_session" else None
    async with on_stage(store, host):
        await asyncio.sleep(0.01)
        assert host.saved is not None
        [session] = store.sessions.values()
        assert host.saved.next_incarnation == session.incarnation
    store.faults = lambda call: None
    async with on_stage(store, host) as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
        assert len(store.sessions) == 1


async def test_after_the_last_renewal_there_is_no_other() -> None:
    async with on_stage() as stage:
        await until(lambda: stage.count(SessionOpened) == 1)
        assert await stage.mailbox.ask(AskLastRenewal(), 5)
        renewals = stage.store.calls.count("renew")
        await asyncio.sleep(100)
        assert stage.store.calls.count("renew") == renewals
