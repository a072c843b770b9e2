"""A store in memory with the real one's fencing rules, and faults before or after the commit. Time is the loop's."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from supervisor.model.errors import SessionRefused, StoreUnavailable
from supervisor.model.job import AttemptEnd, HostInfo, Lease, LeaseId, Me, Outcome, State, StepRecord
from supervisor.model.lifecycle import JobEvent, Life, apply, event_of_end
from supervisor.ports import Need, Reaped, Renewal, Room, SessionGrant, StopOrder, StoreHealth, Verdict
from tests.actors.fakes import now, wall

T = TypeVar("T")


class FakeJob:
    def __init__(
        self, id: int, kind: str, attempts: int, cpu: float, memory: int, spec: Mapping[str, Any] | None = None
    ) -> None:
        self.id = id
        self.kind = kind
        self.attempts = attempts
        self.cpu = cpu
        self.memory = memory
        self.spec = msgspec.Raw(msgspec.json.encode({"backoff": 2.0, **(spec or {})}))
        self.life = Life(state=State.READY)
        self.lease: LeaseId | None = None
        self.run_at = 0.0
        self.stop: StopOrder | None = None
        self.ends: dict[LeaseId, AttemptEnd] = {}
        self.superseded: list[AttemptEnd] = []
        self.steps: list[StepRecord] = []


class FakeSession:
    def __init__(self, incarnation: str, expires: float) -> None:
        self.incarnation = incarnation
        self.expires = expires
        self.epoch = 1
        self.idle = False
        self.draining = False


class FakeStore:
    """``faults`` is asked before each call: None, ``before`` (nothing is done) or ``after`` (done, but the answer is
    lost). ``delay``: seconds each call takes."""

    def __init__(self) -> None:
        self.jobs: dict[int, FakeJob] = {}
        self.sessions: dict[str, FakeSession] = {}
        self.calls: list[str] = []
        self.faults: Callable[[str], str | None] = lambda call: None
        self.delay = 0.0
        self.down = False
        self.poisoned: set[int] = set()
        self.idle_calls: list[bool] = []
        self._wakes: list[Callable[[str], None]] = []
        self.kinds = ["steps"]
        self.hears = True

    # --- for tests --------------------------------------------------------------------------------------------

    def add(
        self,
        count: int = 1,
        *,
        kind: str = "steps",
        attempts: int = 1,
        cpu: float = 0.0,
        memory: int = 0,
        spec: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if kind not in self.kinds:
            self.kinds.append(kind)
        first = len(self.jobs) + 1
        for number in range(first, first + count):
            self.jobs[number] = FakeJob(number, kind, attempts, cpu, memory, spec)
        if any(session.idle for session in self.sessions.values()):
            self.wake("ready")
        return list(range(first, first + count))

    def wake(self, payload: str) -> None:
        for tell in list(self._wakes):
            tell(payload)

    def states(self) -> set[State]:
        return {job.life.state for job in self.jobs.values()}

    def live(self, session: str | None = None) -> list[FakeJob]:
        return [job for job in self.jobs.values() if job.lease is not None and session in (None, job.lease.session)]

    def on_wake(self, tell: Callable[[str], None]) -> Callable[[], None]:
        self._wakes.append(tell)
        return lambda: self._wakes.remove(tell)

    # --- the port ---------------------------------------------------------------------------------------------

    def health(self) -> StoreHealth:
        return StoreHealth(not self.down, wall(), None, "fake", self.hears and not self.down, len(self.calls), None)

    async def _call(self, name: str, work: Callable[[], T]) -> T:
        self.calls.append(name)
        fault = "before" if self.down else self.faults(name)
        if self.delay:
            await asyncio.sleep(self.delay / 2)
        if fault == "before" or self.down:
            raise StoreUnavailable(f"{name}: the database is away")
        result = work()
        if self.delay:
            await asyncio.sleep(self.delay / 2)
        if fault == "after":
            raise StoreUnavailable(f"{name}: the answer was lost")
        return result

    def _own(self, me: Me) -> FakeSession:
        session = self.sessions.get(me.session)
        if session is None or session.incarnation != me.incarnation:
            raise SessionRefused("the session is gone")
        return session

    async def open_session(self, host: HostInfo, term: float) -> SessionGrant:
        def work() -> SessionGrant:
            me = Me(secrets.token_hex(16), secrets.token_hex(16), 1)
            self.sessions[me.session] = FakeSession(me.incarnation, now() + term)
            return SessionGrant(me, term)

        return await self._call("open_session", work)

    async def resume_session(
        self, session: str, incarnation: str, host: HostInfo, term: float, next_incarnation: str
    ) -> SessionGrant | None:
        def work() -> SessionGrant | None:
            found = self.sessions.get(session)
            if found is None or found.incarnation != incarnation or found.expires < now():
                return None
            found.incarnation = next_incarnation
            found.epoch += 1
            found.expires = now() + term
            return SessionGrant(Me(session, next_incarnation, found.epoch), term)

        return await self._call("resume_session", work)

    async def renew(self, me: Me, term: float, draining: bool) -> Renewal:
        def work() -> Renewal:
            session = self._own(me)
            session.expires = now() + term
            session.draining = draining
            checksum = 0
            mine = self.live(me.session)
            for job in mine:
                assert job.lease is not None
                checksum ^= job.lease.counter
            return Renewal(len(mine), checksum, [job.stop for job in mine if job.stop is not None])

        return await self._call("renew", work)

    async def stop_orders(self, me: Me) -> list[StopOrder]:
        def work() -> list[StopOrder]:
            self._own(me)
            return [job.stop for job in self.live(me.session) if job.stop is not None]

        return await self._call("stop_orders", work)

    async def leases(self, me: Me) -> list[Lease]:
        def work() -> list[Lease]:
            self._own(me)
            return [self._lease(job) for job in self.live(me.session)]

        return await self._call("leases", work)

    async def close_session(self, me: Me) -> None:
        def work() -> None:
            self._own(me)
            for job in self.live(me.session):
                self._move(job, JobEvent.RELEASED)
            del self.sessions[me.session]

        await self._call("close_session", work)

    async def pulse(self, term: float) -> bool:
        def work() -> bool:
            has_expired = any(session.expires < now() for session in self.sessions.values())
            return has_expired or any(j.life.state is State.WAITING and j.run_at <= now() for j in self.jobs.values())

        return await self._call("pulse", work)

    async def reap(self, limit: int = 500) -> Reaped:
        def work() -> Reaped:
            dead = [id for id, session in self.sessions.items() if session.expires < now()]
            count = 0
            for session in dead:
                for job in self.live(session):
                    self._move(job, JobEvent.LOST)
                    count += 1
                del self.sessions[session]
            due = [j for j in self.jobs.values() if j.life.state is State.WAITING and j.run_at <= now()]
            for job in due:
                self._move(job, JobEvent.DUE)
            return Reaped(count, 0, dead, len(due), None)

        return await self._call("reap", work)

    async def sweep(self, retention: float, limit: int = 500) -> int:
        return await self._call("sweep", lambda: 0)

    async def needs(self, after: int) -> list[Need]:
        needs = [Need(n, kind, ()) for n, kind in enumerate(self.kinds, 1)]
        return await self._call("needs", lambda: [need for need in needs if need.id > after])

    async def claim(self, me: Me, first_counter: int, room: Room) -> list[Lease]:
        def work() -> list[Lease]:
            self._own(me)
            kinds = {self.kinds[need - 1] for need in room.needs}
            ready = [j for j in self.jobs.values() if j.life.state is State.READY and j.kind in kinds]
            cpu, got = room.cpu, []
            for number, job in enumerate(ready[: room.slots]):
                if cpu is not None and job.cpu > cpu:
                    break
                cpu = None if cpu is None else cpu - job.cpu
                id = LeaseId(me.session, first_counter + number)
                assert not any(id in other.ends or other.lease == id for other in self.jobs.values()), "id made twice"
                job.life = apply(job.life, JobEvent.CLAIMED)
                job.lease = id
                got.append(self._lease(job))
            return got

        return await self._call("claim", work)

    async def set_idle(self, me: Me, idle: bool) -> None:
        def work() -> None:
            self._own(me).idle = idle
            self.idle_calls.append(idle)

        await self._call("set_idle", work)

    async def finish(self, me: Me, ends: Sequence[AttemptEnd]) -> list[Verdict]:
        if self.poisoned & {end.job for end in ends if end.steps}:
            raise ValueError("invalid byte sequence")

        def work() -> list[Verdict]:
            self._own(me)
            return [self._finish(end) for end in ends]

        return await self._call("finish", work)

    async def supersede(self, ends: Sequence[AttemptEnd]) -> None:
        def work() -> None:
            for end in ends:
                if end.job in self.jobs:
                    self.jobs[end.job].superseded.append(end)

        await self._call("supersede", work)

    async def record_steps(self, me: Me, steps: Sequence[tuple[LeaseId, StepRecord]]) -> None:
        def work() -> None:
            self._own(me)
            for lease, step in steps:
                for job in self.live(me.session):
                    if job.lease == lease:
                        job.steps.append(step)

        await self._call("record_steps", work)

    def _finish(self, end: AttemptEnd) -> Verdict:
        job = self.jobs[end.job]
        if end.lease in job.ends:
            return Verdict(end.lease, True, job.life.state.value)
        if job.lease != end.lease:
            return Verdict(end.lease, False, job.life.state.value)
        event = event_of_end(
            end.outcome, retry=end.retry_delay is not None, stop_asked=job.stop is not None, losses=job.life.losses
        )
        assert event is not None
        job.ends[end.lease] = end
        job.run_at = now() + (end.retry_delay or 0.0)
        self._move(job, event)
        return Verdict(end.lease, True, job.life.state.value)

    def _move(self, job: FakeJob, event: JobEvent) -> None:
        job.life = apply(job.life, event)
        job.lease = None

    def _lease(self, job: FakeJob) -> Lease:
        assert job.lease is not None
        return Lease(
            id=job.lease,
            job=job.id,
            attempt=job.life.attempt,
            kind=job.kind,
            name=f"job {job.id}",
            spec=job.spec,
            secrets={"TOKEN": "hunter2"},
            redact={},
            attempts=job.attempts,
            failures=job.life.failures,
            losses=job.life.losses,
            leased_at=wall(),
            cpu=job.cpu,
            memory=job.memory,
            alone=job.life.is_alone,
        )


def outcomes(store: FakeStore) -> list[Outcome]:
    return [end.outcome for job in store.jobs.values() for end in job.ends.values()]
