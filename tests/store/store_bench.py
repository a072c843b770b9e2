"""Words for the tests of the store: hosts, specs, a daemon as the store sees it, and time."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import anyio
import asyncpg

from supervisor.model.job import AttemptEnd, EventRow, HostInfo, Lease, LeaseId, Me, Outcome, StepRecord
from supervisor.ports import Room
from supervisor.store.pg import PgStore

TERM = 180.0


async def told(store: PgStore, count: int) -> list[EventRow]:
    """The events, once there are ``count``. They are told late while any transaction of the server is older, as
    those of the tests beside this one may be; nothing tells of another test's commit, so it is asked for."""
    events: list[EventRow] = []
    for _ in range(1500):
        events = await store.events(0)
        if len(events) >= count:
            break
        await anyio.sleep(0.02)
    return events


async def advance(connection: asyncpg.Connection, seconds: float) -> None:
    """Moves the database's clock."""
    await connection.execute("UPDATE test.clock SET ahead = ahead + make_interval(secs => $1)", seconds)


async def pass_time(store: PgStore, connection: asyncpg.Connection, seconds: float) -> None:
    """Moves the clock as it goes where daemons live: with a pulse each few seconds."""
    while seconds > 0:
        await advance(connection, min(seconds, 4.0))
        await store.pulse(TERM)
        seconds -= 4.0


def host(name: str = "alpha", **changes: Any) -> HostInfo:
    facts: dict[str, Any] = dict(
        name=name, labels=("docker",), slots=8, cpu=None, memory=None, version="0", machine_id="m", boot_id="b", pid=1
    )
    return HostInfo(**(facts | changes))


def spec(name: str = "hi", **changes: Any) -> dict[str, Any]:
    return {"kind": "steps", "name": name, "steps": [{"name": "s", "run": ["true"]}], **changes}


class Daemon:
    """A host as the store sees it: a session, its counters, and shorthand for what a dispatcher asks."""

    def __init__(self, store: PgStore, me: Me, slots: int = 8) -> None:
        self.store = store
        self.me = me
        self.slots = slots
        self.made = 0

    @classmethod
    async def begin(cls, store: PgStore, name: str = "alpha", *, term: float = TERM, slots: int = 8) -> Daemon:
        grant = await store.open_session(host(name, slots=slots), term)
        return cls(store, grant.me, slots)

    async def claim(self, slots: int | None = None, **room: Any) -> list[Lease]:
        needs = tuple(need.id for need in await self.store.needs(0))
        facts: dict[str, Any] = dict(
            slots=slots or self.slots, slots_total=self.slots, cpu=None, memory=None, needs=needs
        )
        first = (self.me.epoch << 32) + self.made + 1
        leases = await self.store.claim(self.me, first, Room(**(facts | room)))
        self.made += len(leases)
        return leases

    async def claim_one(self) -> Lease:
        (lease,) = await self.claim(1)
        return lease

    async def finish(self, lease: Lease, outcome: Outcome = Outcome.SUCCEEDED, **facts: Any) -> tuple[bool, str]:
        (verdict,) = await self.store.finish(self.me, [end_of(lease, outcome, **facts)])
        return verdict.recorded, verdict.state


def end_of(
    lease: Lease, outcome: Outcome = Outcome.SUCCEEDED, steps: Sequence[StepRecord] = (), **facts: Any
) -> AttemptEnd:
    return AttemptEnd(lease=lease.id, job=lease.job, attempt=lease.attempt, outcome=outcome, steps=list(steps), **facts)


def stale(lease: Lease) -> LeaseId:
    """A lease id that was never given."""
    return LeaseId(uuid.uuid4().hex, lease.id.counter)


async def add(store: PgStore, count: int = 1, after: Sequence[int] = (), **changes: Any) -> list[int]:
    return [await store.submit(spec(**changes), key=None, after=after, submitter="tester") for _ in range(count)]
