"""The store against a model of it (Hypothesis): whatever daemons and users do, in any order, on the real PostgreSQL.

Held after each step: every job is in exactly one place, with the state and counters that ``model.lifecycle`` gives
(invariant 1); a job has at most the one lease that the model knows, and writes with any other change nothing
(invariant 2); each attempt's log is exactly what was appended by its holder (invariant 5).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio.from_thread
import asyncpg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from supervisor.model.errors import SessionRefused, WrongState
from supervisor.model.job import Lease, LeaseId, LogChunk, LogRecord, Outcome, State, Stream
from supervisor.model.lifecycle import JobEvent, Life, apply, event_of_end
from supervisor.model.logs import decode_records, encode_records
from supervisor.store.pg import PgStore
from tests.store.conftest import EMPTY
from tests.store.store_bench import Daemon, advance, end_of, host, spec

SLOTS = 3
TERM = 12.0
DELAY = 8.0
# Few that are alive at once, so that much happens to each.
MOST_ALIVE = 4
OUTCOMES = [
    *[Outcome.SUCCEEDED, Outcome.FAILED, Outcome.LOST] * 2,
    Outcome.RELEASED,
    Outcome.CANCELED,
]

WHERE = """
SELECT j.id, v.state, v.revision, v.generation, v.attempt, v.failures, v.losses, v.releases, v.parents_left,
       replace(v.session::text, '-', '') AS session, v.counter,
       (SELECT count(*) FROM bsup.waiting t WHERE t.job_id = j.id)
       + (SELECT count(*) FROM bsup.ready t WHERE t.job_id = j.id)
       + (SELECT count(*) FROM bsup.lease t WHERE t.job_id = j.id)
       + (SELECT count(*) FROM bsup.finished t WHERE t.job_id = j.id AND t.retried_at IS NULL) AS places,
       (SELECT count(*) FROM bsup.job_secret t WHERE t.job_id = j.id) AS secrets,
       ARRAY(SELECT a.outcome FROM bsup.attempt a WHERE a.job_id = j.id ORDER BY a.attempt) AS outcomes
FROM bsup.job j LEFT JOIN bsup.jobs v ON v.id = j.id ORDER BY j.id
"""

CHUNKS = "SELECT job_id, attempt, offset_, data FROM bsup.log_chunk ORDER BY job_id, attempt, offset_"


@dataclass
class Job:
    """A job as it should be."""

    life: Life
    priority: int
    undone: set[int]
    secret: bool
    lease: Lease | None = None
    stop_asked: bool = False
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass
class Ended:
    """An attempt that ended: how, and by which daemon; ``reaped``: without its holder."""

    daemon: Daemon
    lease: Lease
    verdict: str
    reaped: bool


class Model(RuleBasedStateMachine):
    def __init__(self, run: Callable[..., Any], store: PgStore, sql: asyncpg.Connection) -> None:
        super().__init__()
        self.run, self.store, self.sql = run, store, sql
        self.jobs: dict[int, Job] = {}
        self.daemons: list[Daemon] = []
        self.dead: list[Daemon] = []
        self.ended: list[Ended] = []
        self.logs: dict[tuple[int, int], bytes] = {}

    @initialize()
    def empty(self) -> None:
        self.run(self.sql.execute, EMPTY)
        self.run(self.store.pulse, 0.001)
        self.begin()
        self.begin()

    # --- the model's own moves -------------------------------------------------------------------------------------

    def move(self, job: int, event: JobEvent) -> None:
        one = self.jobs[job]
        one.life = apply(one.life, event)
        if one.life.state is State.RUNNING:
            return
        one.lease, one.stop_asked = None, False
        if one.life.state is State.SUCCEEDED:
            for child, other in self.jobs.items():
                if job in other.undone and other.life.state is State.WAITING:
                    other.undone.discard(job)
                    if not other.undone:
                        self.move(child, JobEvent.DUE)
        elif one.life.state.is_final:
            for child, other in self.jobs.items():
                if job in other.undone and other.life.state is State.WAITING:
                    self.move(child, JobEvent.UPSTREAM)

    def end(self, daemon: Daemon, lease: Lease, outcome: Outcome, *, retry: bool, wait: bool, reaped: bool) -> str:
        """The end of an attempt; returns the state that must follow."""
        one = self.jobs[lease.job]
        event = event_of_end(outcome, retry=retry, stop_asked=one.stop_asked, losses=one.life.losses)
        assert event is not None
        one.outcomes.append(outcome)
        self.move(lease.job, event)
        if event is JobEvent.RETRIED and not wait:
            self.move(lease.job, JobEvent.DUE)
        self.ended.append(Ended(daemon, lease, one.life.state.value, reaped))
        return one.life.state.value

    def due(self) -> None:
        """Time has passed: what waits for nothing but time is ready."""
        for job, one in self.jobs.items():
            if one.life.state is State.WAITING and not one.undone:
                self.move(job, JobEvent.DUE)

    def held(self) -> list[tuple[Daemon, Lease]]:
        owners = {daemon.me.session: daemon for daemon in self.daemons}
        return [(owners[one.lease.id.session], one.lease) for one in self.jobs.values() if one.lease is not None]

    # --- users -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: sum(not one.life.state.is_final for one in self.jobs.values()) < MOST_ALIVE)
    @rule(data=st.data(), priority=st.sampled_from([127, 127, 1]), secret=st.sampled_from([False, False, False, True]))
    def submit(self, data: st.DataObject, priority: int, secret: bool) -> None:
        # Mostly ones that can still succeed.
        parents = sorted(self.jobs, key=lambda job: self.jobs[job].life.state in (State.FAILED, State.CANCELED))[:5]
        after = data.draw(st.lists(st.sampled_from(parents), max_size=2)) if parents else []
        job = spec(priority=priority, **({"secrets": {"T": "s3cret"}} if secret else {}))
        made: int = self.run(self.store.submit, job, key=None, after=after, submitter="x")
        states = {parent: self.jobs[parent].life.state for parent in after}
        undone = {parent for parent, state in states.items() if state is not State.SUCCEEDED}
        self.jobs[made] = Job(Life(state=State.WAITING), priority, undone, secret)
        if any(state in (State.FAILED, State.CANCELED) for state in states.values()):
            self.move(made, JobEvent.UPSTREAM)
        elif not undone:
            self.move(made, JobEvent.DUE)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), what=st.sampled_from(["retry", "stop what runs", "retry", "stop"]))
    def ask(self, data: st.DataObject, what: str) -> None:
        # Ended ones are what a retry is for; any may be asked for.
        jobs = sorted(self.jobs, key=lambda job: not self.jobs[job].life.state.is_final)
        running = [lease.job for _, lease in self.held()]
        job = data.draw(st.sampled_from(running if what == "stop what runs" and running else jobs))
        if what == "retry":
            self.retry(job)
        else:
            self.stop(job)

    def stop(self, job: int) -> None:
        one = self.jobs[job]
        (result,) = self.run(self.store.stop, [job], grace=None, kill=False, by="x")
        if one.life.state.is_final:
            assert result.did == one.life.state
        elif one.life.state is State.RUNNING:
            assert result.did == "stopping"
            one.stop_asked = True
        else:
            assert result.did == "canceled"
            self.move(job, JobEvent.CANCELED)

    def retry(self, job: int) -> None:
        one = self.jobs[job]
        blocked = any(self.jobs[parent].life.state in (State.FAILED, State.CANCELED) for parent in one.undone)
        if not one.life.state.is_final or one.secret or blocked:
            try:
                self.run(self.store.retry, [job], by="x")
            except WrongState:
                return
            raise AssertionError("a retry that must be refused was not")
        self.run(self.store.retry, [job], by="x")
        one.life = apply(one.life, JobEvent.REOPENED)
        one.undone = {parent for parent in one.undone if self.jobs[parent].life.state is not State.SUCCEEDED}
        if not one.undone:
            self.move(job, JobEvent.DUE)

    # --- daemons ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.daemons.append(self.run(Daemon.begin, self.store, term=TERM, slots=SLOTS))

    @precondition(lambda self: any(one.life.state is State.READY for one in self.jobs.values()))
    @rule(data=st.data(), slots=st.integers(1, SLOTS))
    def claim(self, data: st.DataObject, slots: int) -> None:
        daemon = data.draw(st.sampled_from(self.daemons))
        ready = [job for job, one in self.jobs.items() if one.life.state is State.READY]
        ready.sort(key=lambda job: (-self.jobs[job].priority, job))
        wanted, left = [], slots
        for job in ready:
            left -= SLOTS if self.jobs[job].life.is_alone else 1
            if left < 0:
                break
            wanted.append(job)
        leases = self.run(daemon.claim, slots)
        assert [lease.job for lease in leases] == wanted
        for lease in leases:
            self.move(lease.job, JobEvent.CLAIMED)
            one = self.jobs[lease.job]
            one.lease = lease
            assert (lease.attempt, lease.failures, lease.losses) == (
                one.life.attempt,
                one.life.failures,
                one.life.losses,
            )
            assert lease.secrets == ({"T": "s3cret"} if one.secret else {})
            self.logs[lease.job, lease.attempt] = b""

    @precondition(lambda self: self.held())
    @rule(
        data=st.data(),
        outcome=st.sampled_from(OUTCOMES),
        delay=st.sampled_from([None, 0.0, DELAY]),
    )
    def finish(self, data: st.DataObject, outcome: Outcome, delay: float | None) -> None:
        daemon, lease = data.draw(st.sampled_from(self.held()))
        state = self.end(daemon, lease, outcome, retry=delay is not None, wait=delay == DELAY, reaped=False)
        retry = {"retry_delay": delay} if outcome is Outcome.FAILED else {}
        assert self.run(daemon.finish, lease, outcome, **retry) == (True, state)

    # A rule that is there twice is taken twice as often: most of what happens to jobs is this.
    claim_more = claim
    finish_more = finish
    finish_most = finish
    submit_more = submit

    @precondition(lambda self: self.held() and self.ended)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.SUCCEEDED, Outcome.FAILED, Outcome.LOST]),
        forged=st.sampled_from([0, 1, 5]),
    )
    def stray(self, data: st.DataObject, outcome: Outcome, forged: int) -> None:
        """A write with a lease that is gone, or never was."""
        if forged:
            self.forge(data, forged)
        else:
            self.finish_again(data, outcome)

    def finish_again(self, data: st.DataObject, outcome: Outcome) -> None:
        """A repeat, or a holder that comes back late: nothing changes."""
        ended = data.draw(st.sampled_from(self.ended))
        try:
            answer = self.run(ended.daemon.finish, ended.lease, outcome)
        except SessionRefused:
            assert ended.daemon in self.dead
        else:
            assert ended.daemon in self.daemons and answer == (True, ended.verdict)

    def forge(self, data: st.DataObject, other: int) -> None:
        """A lease that nobody has, for a job that runs."""
        daemon, lease = data.draw(st.sampled_from(self.held()))
        for wrong in (LeaseId(lease.id.session, lease.id.counter + (other << 40)), LeaseId("0" * 32, lease.id.counter)):
            end = end_of(lease)
            end.lease = wrong
            (verdict,) = self.run(self.store.finish, daemon.me, [end])
            assert not verdict.recorded
            chunk = LogChunk(wrong, lease.job, lease.attempt, 0, 1, b"x")
            assert self.run(self.store.append_log, [chunk]) == [False]

    @precondition(lambda self: self.held())
    @rule(data=st.data(), dies=st.booleans())
    def falter(self, data: st.DataObject, dies: bool) -> None:
        daemon, _ = data.draw(st.sampled_from(self.held()))
        if dies:
            self.die(daemon)
        else:
            self.take_up(daemon)

    def take_up(self, daemon: Daemon) -> None:
        """The daemon restarts: the session goes on under another incarnation, and the old one is refused."""
        old = daemon.me
        fresh = f"{old.epoch:032x}"
        grant = self.run(self.store.resume_session, old.session, old.incarnation, host(slots=SLOTS), TERM, fresh)
        assert grant is not None and grant.me.epoch == old.epoch + 1
        daemon.me, daemon.made = grant.me, 0
        try:
            self.run(self.store.renew, old, TERM, False)
        except SessionRefused:
            pass
        else:
            raise AssertionError("the old incarnation was not refused")
        mine = {one.lease.id for one in self.jobs.values() if one.lease and one.lease.id.session == old.session}
        assert {lease.id for lease in self.run(self.store.leases, grant.me)} == mine

    def die(self, daemon: Daemon) -> None:
        """A host falls silent; the other goes on. A reaper takes its leases, and nobody else's."""
        self.daemons.remove(daemon)
        self.dead.append(daemon)
        for _ in range(40):
            self.pass_time(4.0)
            reaped = self.run(self.store.reap)
            if reaped.sessions:
                break
        assert reaped.sessions == [daemon.me.session]
        for one in list(self.jobs.values()):
            if one.lease is not None and one.lease.id.session == daemon.me.session:
                self.end(daemon, one.lease, Outcome.LOST, retry=False, wait=False, reaped=True)
        self.due()
        self.begin()

    @precondition(lambda self: any(one.life.state is State.WAITING and not one.undone for one in self.jobs.values()))
    @rule()
    def wait(self) -> None:
        for _ in range(3):
            self.pass_time(4.0)
        self.run(self.store.reap)
        self.due()

    def pass_time(self, seconds: float) -> None:
        self.run(advance, self.sql, seconds)
        self.run(self.store.pulse, TERM)
        for daemon in self.daemons:
            renewal = self.run(self.store.renew, daemon.me, TERM, False)
            mine = [one for one in self.jobs.values() if one.lease and one.lease.id.session == daemon.me.session]
            checksum = 0
            for one in mine:
                assert one.lease is not None
                checksum ^= one.lease.id.counter
            assert (renewal.count, renewal.checksum) == (len(mine), checksum)
            assert {order.job for order in renewal.stops} == {
                one.lease.job for one in mine if one.lease is not None and one.stop_asked
            }

    # --- logs ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held() or self.ended)
    @rule(data=st.data(), piece=st.binary(min_size=1, max_size=20), again=st.booleans())
    def append(self, data: st.DataObject, piece: bytes, again: bool) -> None:
        """By the holder, or by one whose attempt has ended or was lost: its log, and no other's, grows."""
        lease = data.draw(st.sampled_from([lease for _, lease in self.held()] + [one.lease for one in self.ended]))
        stored = self.logs[lease.job, lease.attempt]
        record = LogRecord(len(stored), 0, Stream.OUT, 1.0, piece)
        chunk = LogChunk(lease.id, lease.job, lease.attempt, len(stored), len(piece), encode_records([record]))
        assert self.run(self.store.append_log, [chunk] * (2 if again else 1)) == [True] * (2 if again else 1)
        self.logs[lease.job, lease.attempt] = stored + piece

    @precondition(lambda self: any(one.reaped for one in self.ended))
    @rule(data=st.data())
    def supersede(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from([one for one in self.ended if one.reaped]))
        self.run(self.store.supersede, [end_of(ended.lease)])
        self.jobs[ended.lease.job].outcomes[ended.lease.attempt - 1] = Outcome.SUPERSEDED

    # --- what must always hold -------------------------------------------------------------------------------------

    @invariant()
    def every_job_is_where_it_should_be(self) -> None:
        rows = {row["id"]: row for row in self.run(self.sql.fetch, WHERE)}
        assert rows.keys() == self.jobs.keys()
        for job, one in self.jobs.items():
            row = rows[job]
            assert row["places"] == 1
            found = Life(
                state=State(row["state"]),
                **{key: row[key] for key in ("generation", "revision", "attempt", "failures", "losses", "releases")},
            )
            assert found == one.life
            if one.life.state is State.WAITING:
                assert row["parents_left"] == len(one.undone)
            assert row["secrets"] == (1 if one.secret and not one.life.state.is_final else 0)
            assert row["outcomes"] == [outcome.value for outcome in one.outcomes]
            if one.lease is not None:
                assert (row["session"], row["counter"]) == (one.lease.id.session, one.lease.id.counter)

    @invariant()
    def logs_are_what_was_appended(self) -> None:
        stored = dict.fromkeys(self.logs, b"")
        for row in self.run(self.sql.fetch, CHUNKS):
            for record in decode_records(row["data"], row["offset_"]):
                assert record.offset == len(stored[row["job_id"], row["attempt"]])
                stored[row["job_id"], row["attempt"]] += record.data
        assert stored == self.logs


def test_the_store_keeps_to_the_model(migrated_dsn: str) -> None:
    with anyio.from_thread.start_blocking_portal() as portal:

        def run(call: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
            async def awaited() -> Any:
                return await call(*args, **kwargs)

            return portal.call(awaited)

        sql = run(asyncpg.connect, migrated_dsn)
        with portal.wrap_async_context_manager(PgStore(migrated_dsn)) as store:
            run_state_machine_as_test(
                lambda: Model(run, store, sql),
                settings=settings(
                    max_examples=50,
                    stateful_step_count=50,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        run(sql.close)
