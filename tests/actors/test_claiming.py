"""How leases are taken: at once where there are few, in large claims where there are many; needs; turns of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from random import Random

import msgspec
import pytest

from supervisor.actors.claiming import CALM, GATHER, GATHERED_ABOVE, MOST_AT_ONCE, TURN, Claimer
from supervisor.model.job import HostInfo, Lease, LeaseId, Me
from supervisor.model.policies import Free
from supervisor.ports import Need, Room
from tests.actors.fake_store import FakeStore
from tests.actors.fakes import now
from tests.actors.harness import until

pytestmark = pytest.mark.anyio

POLL = 100.0
HOST = HostInfo("h", (), 4, None, None, "1", "m", "b", 1)


class Host:
    """A claimer with room for ``slots`` jobs, of which none ever ends unless a test says so."""

    def __init__(self, store: FakeStore, slots: int, poll: float) -> None:
        self.store = store
        self.slots = slots
        self.taken: list[Lease] = []
        self.claims: list[tuple[float, int]] = []
        """When, and for how many, each claim was made."""
        self.lacking: str | None = None
        self.claimer = Claimer(
            store,
            kinds=frozenset(["steps", "task"]),
            labels=frozenset(),
            slots=slots,
            poll=poll,
            free=lambda: Free(max(0, self.slots - len(self.taken)), None, None),
            take=self._take,
            reconcile=self._reconcile,
            on_refused=lambda me: None,
            on_paused=lambda: None,
            hears=lambda: store.health().listening,
            lacking=lambda: self.lacking,
            rng=Random(0),
        )
        store.on_wake(lambda payload: self.claimer.wake(ready=True))
        self.on_take: Callable[[], None] = lambda: None

    def end(self, count: int) -> None:
        """So many jobs end: there is room again."""
        del self.taken[:count]
        self.claimer.wake()

    def _take(self, lease: Lease) -> None:
        self.taken.append(lease)
        self.on_take()

    async def _reconcile(self, me: Me) -> None:
        pass


@asynccontextmanager
async def claiming(store: FakeStore, slots: int, poll: float = POLL) -> AsyncIterator[Host]:
    """A host that is idle: it has said so, and waits."""
    host = Host(store, slots, poll)
    claim = store.claim

    async def noted(me: Me, first: int, room: object) -> list[Lease]:
        got = await claim(me, first, room)  # type: ignore[arg-type]  # as it came
        host.claims.append((now(), len(got)))
        return got

    store.claim = noted  # type: ignore[method-assign]  # to see when
    grant = await store.open_session(HOST, 1e6)
    host.claimer.set_session(grant.me)
    task = asyncio.create_task(host.claimer.run())
    await until(lambda: any(session.idle for session in store.sessions.values()))
    await asyncio.sleep(POLL / 4)
    host.claims.clear()
    store.calls.clear()
    yield host
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


async def test_a_wake_up_is_followed_by_a_claim_and_by_nothing_before_it(store: FakeStore) -> None:
    """Of a kind that is known already, which nearly all are."""
    store.add(1)
    async with claiming(store, 4) as host:
        began = now()
        store.add(1)
        await until(lambda: len(host.taken) == 2)
        assert store.calls[0] == "claim"
        assert host.claims[0] == (began, 1)


async def test_a_host_that_waits_claims_once_for_a_job(store: FakeStore) -> None:
    """Who commits another one after that claim wakes it again."""
    store.add(1)
    async with claiming(store, 4) as host:
        for number in (2, 3):
            store.add(1)
            await until(lambda number=number: len(host.taken) == number)
            await asyncio.sleep(POLL / 4)
        assert store.calls.count("claim") == 2


async def test_a_host_that_is_short_of_something_takes_nothing_until_it_has_it_again(store: FakeStore) -> None:
    """It does not say that it is idle meanwhile: a commit would wake it in vain."""
    async with claiming(store, 4) as host:
        host.lacking = "no room"
        store.add(2)
        await asyncio.sleep(3 * POLL)
        assert (host.taken, host.claimer.lacking) == ([], "no room")
        assert not any(session.idle for session in store.sessions.values())
        host.lacking = None
        await until(lambda: len(host.taken) == 2)
        assert host.claimer.lacking is None


async def test_a_large_claim_is_not_followed_by_another_where_something_runs_short(store: FakeStore) -> None:
    async with claiming(store, 3 * MOST_AT_ONCE) as host:
        host.on_take = lambda: setattr(host, "lacking", "no room")
        store.add(3 * MOST_AT_ONCE)
        await until(lambda: host.claimer.lacking is not None)
        # The one that was under way already when the first of its jobs was begun.
        assert len(host.taken) <= 2 * MOST_AT_ONCE


async def test_a_job_of_a_kind_that_is_new_to_the_host_is_found(store: FakeStore) -> None:
    store.add(1)
    async with claiming(store, 4) as host:
        began = now()
        store.add(1, kind="task")
        await until(lambda: len(host.taken) == 2)
        assert host.taken[-1].kind == "task"
        assert [at for at, count in host.claims if count] == [began], "it was found at the next poll only"


async def test_a_kind_that_the_host_does_not_run_is_looked_at_once(store: FakeStore) -> None:
    store.add(1)
    async with claiming(store, 4) as host:
        store.add(1, kind="elsewhere")
        await asyncio.sleep(POLL / 2)
        assert len(host.taken) == 1 and store.calls.count("needs") <= 2
        assert len(store.calls) < 8


async def test_a_poll_makes_sure_where_no_wake_up_comes(store: FakeStore) -> None:
    """The kind is new, too."""
    store.add(1)
    async with claiming(store, 4) as host:
        for session in store.sessions.values():
            session.idle = False
        store.add(1, kind="task")
        assert await until(lambda: len(host.taken) == 2) <= POLL * 1.2


@pytest.mark.parametrize("hears", [True, False])
async def test_a_host_that_hears_wake_ups_looks_ever_more_seldom(store: FakeStore, hears: bool) -> None:
    store.add(1)
    store.hears = hears
    async with claiming(store, 4) as host:
        await asyncio.sleep(50 * POLL)
        looks = [at for at, _ in host.claims]
        assert len(looks) < 20 if hears else len(looks) > 40
        last = looks[-1] - looks[-2]
        assert last > 3 * POLL if hears else last < 1.5 * POLL
        # Nobody is told of a job whose transaction was open all the while; it is found nonetheless.
        for session in store.sessions.values():
            session.idle = False
        store.add(1)
        assert await until(lambda: len(host.taken) == 2) < (CALM if hears else 1) * POLL * 1.2


async def test_a_wake_up_after_a_long_rest_is_followed_by_a_claim_too(store: FakeStore) -> None:
    store.add(1)
    async with claiming(store, 4) as host:
        await asyncio.sleep(100 * POLL)
        store.calls.clear()
        store.add(1)
        await until(lambda: len(host.taken) == 2)
        assert store.calls[0] == "claim"


async def test_room_is_gathered_for_a_moment_where_more_is_ready_than_fits(store: FakeStore) -> None:
    """One large claim instead of many small ones."""
    slots = 4 * GATHERED_ABOVE
    async with claiming(store, slots) as host:
        store.add(5 * slots)
        await until(lambda: len(host.taken) == slots)
        host.claims.clear()
        began = now()
        for _ in range(10):
            host.end(1)
            await asyncio.sleep(GATHER / 20)
        assert host.claims == []
        await until(lambda: len(host.taken) == slots)
        assert host.claims == [(pytest.approx(began + GATHER), 10)]


async def test_a_quarter_of_the_slots_is_not_waited_for(store: FakeStore) -> None:
    slots = 4 * GATHERED_ABOVE
    async with claiming(store, slots) as host:
        store.add(5 * slots)
        await until(lambda: len(host.taken) == slots)
        host.claims.clear()
        began = now()
        host.end(slots // 4)
        await until(lambda: len(host.taken) == slots)
        assert host.claims == [(began, slots // 4)]


@pytest.mark.parametrize(
    ("slots", "longest"),
    [pytest.param(GATHERED_ABOVE, 0.0, id="few slots"), pytest.param(4 * GATHERED_ABOVE, GATHER, id="many slots")],
)
async def test_a_few_jobs_are_not_held_up(store: FakeStore, slots: int, longest: float) -> None:
    """However full the host is: where nothing else is ready there is nothing to gather room for."""
    store.add(slots - 3)
    async with claiming(store, slots) as host:
        for _ in range(5):
            host.claims.clear()
            began = now()
            store.add(1)
            assert host.claims == []
            await until(lambda: len(host.taken) == slots - 2)
            assert host.claims[0] == (began, 1)
            host.end(1)
            await asyncio.sleep(1)
        store.add(3)
        await until(lambda: len(host.taken) == slots)
        host.claims.clear()
        began = now()
        host.end(1)
        store.add(1)
        await until(lambda: len(host.taken) == slots)
        assert host.claims[0][0] <= began + longest + 1e-6, "the claim before was filled, but nothing was left"


async def test_a_claim_is_bounded(store: FakeStore) -> None:
    """While there is more, the host is not idle: commits need not wake it."""
    async with claiming(store, 3 * MOST_AT_ONCE) as host:
        store.add(4 * MOST_AT_ONCE)
        await until(lambda: len(host.taken) == 3 * MOST_AT_ONCE)
        assert {count for _, count in host.claims if count} == {MOST_AT_ONCE}
        await asyncio.sleep(1)
        assert store.idle_calls == [True, False]


async def test_a_large_claim_leaves_the_loop_its_turns(store: FakeStore) -> None:
    """Its jobs are begun in parts, between which whatever else is ready has its turn."""
    async with claiming(store, MOST_AT_ONCE) as host:
        others: list[int] = []
        loop = asyncio.get_running_loop()

        def other() -> None:
            others.append(len(host.taken))
            if len(host.taken) < MOST_AT_ONCE:
                loop.call_soon(other)

        store.add(MOST_AT_ONCE)
        loop.call_soon(other)
        await until(lambda: len(host.taken) == MOST_AT_ONCE)
        assert max(after - before for before, after in pairwise(others)) <= TURN


async def test_a_host_that_is_full_is_not_woken_for_nothing(store: FakeStore) -> None:
    """It says that it is idle no more, and claims again as soon as there is room."""
    async with claiming(store, 2) as host:
        store.add(5)
        await until(lambda: not any(session.idle for session in store.sessions.values()))
        assert len(host.taken) == 2
        claims = len(host.claims)
        await asyncio.sleep(POLL / 2)
        assert len(host.claims) == claims
        host.end(2)
        await until(lambda: len(host.taken) == 2, within=0.2)


async def test_leases_of_a_session_that_is_gone_meanwhile_are_not_begun(store: FakeStore) -> None:
    """They are left to its reaper: another host may have them soon."""
    async with claiming(store, MOST_AT_ONCE) as host:
        host.on_take = lambda: host.claimer.set_session(None) if len(host.taken) == 10 else None
        store.add(MOST_AT_ONCE)
        await until(lambda: bool(host.taken))
        await asyncio.sleep(1)
        assert len(host.taken) == TURN


async def test_a_backlog_of_what_is_known_does_not_hide_a_new_need(store: FakeStore) -> None:
    """A host that is never idle sees it, too: its jobs may be the more urgent ones."""
    async with claiming(store, 2, poll=5.0) as host:
        store.add(1000)
        store.add(1, kind="task")
        await until(lambda: len(host.taken) == 2)
        for _ in range(20):
            await asyncio.sleep(1)
            host.end(1)
        assert store.calls.count("needs") >= 1 and host.claimer.needs == 2
        assert store.calls.count("needs") <= 4, "but not before each claim"


class Endless:
    """A store that has always more, and a host whose jobs end at once: claims never come back short."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sessions: list[Me] = []
        self.taken = 0
        self.claimer = Claimer(
            self,  # type: ignore[arg-type]  # a claimer calls no more than these
            kinds=frozenset(["steps"]),
            labels=frozenset(),
            slots=4 * MOST_AT_ONCE,
            poll=1.0,
            free=lambda: Free(4 * MOST_AT_ONCE, None, None),
            take=self._take,
            reconcile=self._reconcile,
            on_refused=lambda me: None,
            on_paused=lambda: self.said.append("paused"),
            rng=Random(0),
        )

    @property
    def claims(self) -> int:
        return self.said.count("claim")

    async def needs(self, after: int) -> list[Need]:
        self.said.append("needs")
        return [Need(1, "steps", ())] if after == 0 else []

    async def claim(self, me: Me, first: int, room: Room) -> list[Lease]:
        self.said.append("claim")
        self.sessions.append(me)
        await asyncio.sleep(0.01)
        at = datetime(2024, 1, 1, tzinfo=UTC)
        return [
            Lease(LeaseId(me.session, first + n), n, 1, "steps", "j", msgspec.Raw(b"{}"), {}, {}, 1, 0, 0, at)
            for n in range(room.slots)
        ]

    async def set_idle(self, me: Me, idle: bool) -> None:
        self.said.append(f"idle {idle}")

    def _take(self, lease: Lease) -> None:
        self.taken += 1

    async def _reconcile(self, me: Me) -> None:
        self.said.append("reconcile")

    async def more(self, claims: int) -> list[str]:
        """What it does in so many claims more."""
        before, said = self.claims, len(self.said)
        await until(lambda: self.claims >= before + claims, within=60)
        return self.said[said:]


@asynccontextmanager
async def endless() -> AsyncIterator[Endless]:
    host = Endless()
    host.claimer.set_session(Me("5e55" * 8, "1" * 32, 1))
    task = asyncio.create_task(host.claimer.run())
    await host.more(5)
    yield host
    task.cancel()
    await asyncio.wait([task])


async def test_the_next_claim_is_under_way_while_jobs_are_begun() -> None:
    async with endless() as host:
        assert host.claimer.in_flight
        begun = host.taken
        assert set(await host.more(5)) == {"claim"}
        assert host.taken > begun and len(set(host.sessions)) == 1


async def test_a_long_backlog_lets_the_host_do_what_else_is_to_be_done() -> None:
    """What is asked for in the middle of it is done after the claim that is under way, or the next."""
    async with endless() as host:
        host.claimer.want_reconciliation()
        assert "reconcile" in await host.more(3)
        assert "needs" in await host.more(400), "new needs are looked for"
        host.claimer.set_session(Me("5e55" * 8, "2" * 32, 2))
        assert (await host.more(3)).count("reconcile") == 1
        await host.more(2)
        assert host.sessions[-1].epoch == 2


@pytest.mark.parametrize("reason", ["fenced", "paused"])
async def test_no_backlog_keeps_a_host_claiming_that_must_not(reason: str) -> None:
    async with endless() as host:
        setattr(host.claimer, reason, True)
        claims = host.claims
        await asyncio.sleep(60)
        assert host.claims <= claims + 1 and not host.claimer.in_flight
        setattr(host.claimer, reason, False)
        host.claimer.wake()
        await host.more(3)


async def test_a_host_that_was_idle_says_at_once_that_it_works() -> None:
    """Else each commit would wake it for as long as the backlog lasts."""
    async with endless() as host:
        host.claimer._idle = True
        assert "idle False" in await host.more(3)
