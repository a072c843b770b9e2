"""Where a claim begins to look: at the start, but in the midst of a long drain; and nothing is overlooked for it."""

from __future__ import annotations

import pytest

from supervisor.model.job import AttemptEnd, Lease, Outcome
from supervisor.ports import Room
from supervisor.store import place
from supervisor.store.pg import PgStore
from supervisor.store.place import START, Place
from tests.store.store_bench import Daemon, add, end_of

BATCH = 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def in_a_long_drain(clock: Clock) -> Place:
    at = Place(clock)
    assert at.begin("a") == START
    at.filled(place.LONG_DRAIN, (127, 2000))
    return at


def test_a_claim_begins_where_the_last_one_ended_after_many_leases() -> None:
    at = Place(Clock())
    assert at.begin("a") == START
    at.filled(place.LONG_DRAIN - 1, (127, 1999))
    assert at.begin("a") == START
    at.filled(1, (127, 2000))
    assert at.begin("a") == (127, 2000)
    at.filled(500, (127, 2500))
    assert at.begin("a") == (127, 2500)


def test_jobs_that_overtook_do_not_move_it_back() -> None:
    at = in_a_long_drain(Clock())
    at.filled(10, (200, 9000))
    assert at.begin("a") == (127, 2000)
    at.filled(10, (5, 1))
    assert at.begin("a") == (5, 1)


def test_it_looks_from_the_start_after_some_time_and_after_some_claims() -> None:
    clock = Clock()
    at = in_a_long_drain(clock)
    clock.now += place.MOST_SECONDS
    assert at.begin("a") == START
    at.filled(500, (127, 2500))
    assert at.begin("a") == (127, 2500)
    for _ in range(place.MOST_CLAIMS):
        at.filled(1, (127, 2500))
    assert at.begin("a") == START


def test_it_forgets_when_the_drain_ends_or_is_another_one() -> None:
    at = in_a_long_drain(Clock())
    at.reset()
    assert at.begin("a") == START
    at = in_a_long_drain(Clock())
    assert at.begin("b") == START


@pytest.mark.anyio
class TestThroughTheStore:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(place, "LONG_DRAIN", BATCH)
        monkeypatch.setattr(place, "MOST_SECONDS", 3600.0)

    async def drain(self, store: PgStore, daemon: Daemon, slots: int = BATCH, **room: object) -> list[Lease]:
        leases = await daemon.claim(slots, **room)
        ends: list[AttemptEnd] = [end_of(lease) for lease in leases]
        await store.finish(daemon.me, ends)
        return leases

    async def test_what_came_to_lie_behind_is_found_before_a_claim_says_that_there_is_no_more(
        self, store: PgStore
    ) -> None:
        jobs = await add(store, 3 * BATCH)
        daemon = await Daemon.begin(store, slots=BATCH)
        (back,) = await daemon.claim(1)
        assert [lease.job for lease in await self.drain(store, daemon)] == jobs[1 : BATCH + 1]
        await daemon.finish(back, Outcome.RELEASED)
        assert [lease.job for lease in await self.drain(store, daemon)] == jobs[BATCH + 1 : 2 * BATCH + 1]
        last = await self.drain(store, daemon)
        assert [lease.job for lease in last] == [*jobs[2 * BATCH + 1 :], back.job]
        assert len({lease.id for lease in last}) == len(last)
        assert await daemon.claim() == []

    async def test_a_higher_priority_is_always_found(self, store: PgStore) -> None:
        jobs = await add(store, 3 * BATCH)
        daemon = await Daemon.begin(store, slots=BATCH)
        await self.drain(store, daemon)
        (urgent,) = await add(store, priority=200)
        assert [lease.job for lease in await self.drain(store, daemon)] == [urgent, *jobs[BATCH : 2 * BATCH - 1]]

    async def test_the_rest_of_a_claim_fits_in_what_its_beginning_left(self, store: PgStore) -> None:
        """One claim is two statements then; together they take no more than there was room for."""
        back_job, *_ = await add(store, BATCH + 1, cpu=1)
        light, heavy = await add(store, cpu=1), await add(store, cpu=3)
        daemon = await Daemon.begin(store, slots=BATCH)
        (back,) = await daemon.claim(1, cpu=1.0)
        assert len(await self.drain(store, daemon, cpu=100.0)) == BATCH
        await daemon.finish(back, Outcome.RELEASED)
        # The place is before `light`, which takes all but half a core; the job that came back needs a whole one.
        assert [lease.job for lease in await daemon.claim(cpu=1.5)] == light
        assert [lease.job for lease in await daemon.claim(cpu=1.5)] == [back_job]
        assert [lease.job for lease in await daemon.claim(cpu=3.0)] == heavy

    async def test_another_daemons_needs_are_known_to_this_one(self, store: PgStore, other: PgStore) -> None:
        """Kinds are looked up when a claim names a need that this store was not asked for."""
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        needs = tuple(need.id for need in await store.needs(0))
        room = Room(slots=1, slots_total=8, cpu=None, memory=None, needs=needs)
        leases = await other.claim(daemon.me, (daemon.me.epoch << 32) + 1, room)
        assert [(lease.job, lease.kind) for lease in leases] == [(job, "steps")]
