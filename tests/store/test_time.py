"""What expires, and what must not: the pulse, the reaper, and sessions that are taken up again."""

from __future__ import annotations

import anyio
import asyncpg
import pytest

from supervisor.model.errors import SessionRefused
from supervisor.model.job import Outcome, State
from supervisor.ports import SessionGrant
from supervisor.store.pg import PgStore
from tests.store.store_bench import TERM, Daemon, add, advance, host, pass_time, told

pytestmark = pytest.mark.anyio

FRESH = "f" * 32


async def settle(store: PgStore, sql: asyncpg.Connection) -> None:
    """Until the reaper may reap: the first pulse puts it off by a term."""
    await store.pulse(TERM)
    await pass_time(store, sql, TERM + 1)


async def until_there_are(sql: asyncpg.Connection, count: str, wanted: int) -> None:
    for _ in range(1000):
        if await sql.fetchval(count) == wanted:
            return
        await anyio.sleep(0.01)
    raise AssertionError(f"not {wanted}: {count}")


class TestReaping:
    async def test_the_pulse_says_whether_there_is_anything_to_reap(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await settle(store, sql)
        daemon = await Daemon.begin(store)
        (parent,) = await add(store, attempts=2)
        await add(store, after=[parent])
        assert await store.pulse(TERM) is False
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED, retry_delay=30.0)
        assert await store.pulse(TERM) is False
        await pass_time(store, sql, 31)
        assert await store.pulse(TERM) is True
        assert (await store.reap()).promoted == 1
        assert await store.pulse(TERM) is False
        await daemon.claim_one()
        await pass_time(store, sql, TERM)
        assert await store.pulse(TERM) is True
        assert (await store.reap()).requeued == 1
        assert await store.pulse(TERM) is False

    async def test_a_dead_hosts_job_goes_to_another(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await settle(store, sql)
        (job,) = await add(store)
        dead = await Daemon.begin(store, "dead")
        alive = await Daemon.begin(store, "alive")
        await dead.claim_one()
        await pass_time(store, sql, TERM - 10)
        await store.renew(alive.me, TERM, False)
        assert (await store.reap()).sessions == []
        await pass_time(store, sql, 12)
        (row,) = await store.states([job])
        # Expired, but not yet reaped: still its lease, never shown as queued.
        assert row.state is State.RUNNING
        reaped = await store.reap()
        assert (reaped.requeued, reaped.sessions, reaped.reap_not_before) == (1, [dead.me.session], None)
        (row,) = await store.states([job])
        assert (row.state, row.losses) == (State.READY, 1)
        assert (await alive.claim_one()).job == job
        assert [event.type for event in await told(store, 2)] == ["session_expired", "loss"]
        assert [(h.name, h.leases) for h in await store.hosts()] == [("alive", 1)]

    async def test_no_more_than_the_limit_a_pass_and_the_session_until_the_last(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await settle(store, sql)
        await add(store, 5)
        dead = await Daemon.begin(store)
        leases = await dead.claim(5)
        await pass_time(store, sql, TERM + 1)
        first = await store.reap(limit=3)
        assert (first.requeued, first.sessions) == (3, [])
        # Marked dead at the first pass: it can't be renewed back to life for what is left.
        with pytest.raises(SessionRefused):
            await store.renew(dead.me, TERM, False)
        with pytest.raises(SessionRefused):
            await dead.finish(leases[4])
        assert await store.resume_session(dead.me.session, dead.me.incarnation, host(), TERM, FRESH) is None
        second = await store.reap(limit=3)
        assert (second.requeued, second.sessions) == (2, [dead.me.session])

    async def test_a_session_that_is_renewed_meanwhile_is_left(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await settle(store, sql)
        daemon = await Daemon.begin(store)
        await pass_time(store, sql, TERM + 1)
        async with sql.transaction():
            # Its row is locked, as by a renewal under way.
            await sql.execute("SELECT FROM bsup.session WHERE id = $1 FOR NO KEY UPDATE", daemon.me.session)
            assert (await store.reap()).sessions == []
        await store.renew(daemon.me, TERM, False)
        assert (await store.reap()).sessions == []

    async def test_a_clock_that_steps_back_within_a_pass_reaps_nobody(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        """The pass has read the clock an hour ahead, then it was set right, and a host renewed."""
        await settle(store, sql)
        daemon = await Daemon.begin(store)
        clock = await sql.fetchval("SELECT pg_get_functiondef('bsup.clock'::regproc)")
        await sql.execute("UPDATE bsup.pulse SET at = bsup.clock() + interval '59 min 59 s'")
        await sql.execute("""
            CREATE SEQUENCE test.looks;
            CREATE OR REPLACE FUNCTION bsup.clock() RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
                SELECT clock_timestamp() + c.ahead + make_interval(hours => (nextval('test.looks') = 1)::integer)
                FROM test.clock c
            $$""")
        try:
            assert (await store.reap()).sessions == []
        finally:
            await sql.execute(f"{clock}; DROP SEQUENCE test.looks")
        await store.renew(daemon.me, TERM, False)

    async def test_a_lost_job_that_was_asked_to_stop_is_canceled(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await settle(store, sql)
        (job,) = await add(store)
        dead = await Daemon.begin(store)
        await dead.claim_one()
        await store.stop([job], grace=None, kill=False, by="ann")
        await pass_time(store, sql, TERM + 1)
        reaped = await store.reap()
        assert (reaped.requeued, reaped.failed) == (0, 0)
        (row,) = await store.states([job])
        assert (row.state, row.reason, row.losses) == (State.CANCELED, "stop", 0)

    async def test_a_job_lost_too_often_fails(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await settle(store, sql)
        (job,) = await add(store)
        for _ in range(5):
            dead = await Daemon.begin(store)
            await dead.claim(8)
            await pass_time(store, sql, TERM + 1)
            reaped = await store.reap()
        assert (reaped.requeued, reaped.failed) == (0, 1)
        (row,) = await store.states([job])
        assert (row.state, row.losses, row.reason) == (State.FAILED, 5, "losses")


class TestPulse:
    async def test_nothing_is_reaped_before_the_first_pulse_or_for_a_term_after(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await add(store)
        await (await Daemon.begin(store)).claim_one()
        await advance(sql, 10 * TERM)
        assert (await store.reap()).sessions == []
        await store.pulse(TERM)
        reaped = await store.reap()
        assert reaped.sessions == [] and reaped.reap_not_before is not None
        await pass_time(store, sql, TERM - 1)
        assert (await store.reap()).sessions == []
        await pass_time(store, sql, 2)
        assert len((await store.reap()).sessions) == 1

    @pytest.mark.parametrize(("jump", "reason"), [(3600.0, "gap"), (-3600.0, "clock went back")])
    async def test_a_jump_expires_nobody(
        self, store: PgStore, sql: asyncpg.Connection, jump: float, reason: str
    ) -> None:
        """An outage of an hour, or a clock set back by one: hosts that could not renew get a term to do so."""
        await settle(store, sql)
        await add(store)
        daemon = await Daemon.begin(store)
        await daemon.claim_one()
        await advance(sql, jump)
        # The pulse is old now: even before anybody has noticed the jump, it does not count.
        assert (await store.reap()).sessions == []
        await store.pulse(TERM)
        assert (await told(store, 1))[-1].detail["reason"] == reason
        await pass_time(store, sql, TERM - 2)
        reaped = await store.reap()
        assert reaped.sessions == [] and reaped.reap_not_before is not None
        await store.renew(daemon.me, TERM, False)
        await pass_time(store, sql, 4)
        assert (await store.reap()).sessions == []

    async def test_a_new_timeline_puts_reaping_off(self, store: PgStore, sql: asyncpg.Connection) -> None:
        """A failover, as the timeline of the last pulse shows it."""
        await settle(store, sql)
        await Daemon.begin(store)
        await pass_time(store, sql, TERM + 1)
        await sql.execute("UPDATE bsup.pulse SET timeline = '0000FFFF'")
        assert (await store.reap()).sessions == []
        await store.pulse(TERM)
        reaped = await store.reap()
        assert reaped.sessions == [] and reaped.reap_not_before is not None
        assert (await told(store, 1))[-1].detail["reason"] == "new timeline"

    async def test_the_longest_term_of_a_session_counts(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await Daemon.begin(store, term=1000.0)
        await store.pulse(10.0)
        ahead = await sql.fetchval("SELECT extract(epoch FROM reap_not_before - at) FROM bsup.pulse")
        assert float(ahead) == 1000.0

    async def test_one_of_many_writes_it(self, store: PgStore, other: PgStore, sql: asyncpg.Connection) -> None:
        await store.pulse(TERM)
        before = await sql.fetchval("SELECT at FROM bsup.pulse")
        await other.pulse(TERM)
        assert await sql.fetchval("SELECT at FROM bsup.pulse") == before
        async with sql.transaction():
            await sql.execute("SELECT FROM bsup.pulse FOR UPDATE")
            await other.pulse(TERM)


class TestSessions:
    async def test_renewing_tells_what_is_held(self, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        renewal = await store.renew(daemon.me, TERM, False)
        assert (renewal.count, renewal.checksum, renewal.stops) == (0, 0, [])
        await add(store, 3)
        leases = await daemon.claim(3)
        renewal = await store.renew(daemon.me, TERM, False)
        checksum = 0
        for lease in leases:
            checksum ^= lease.id.counter
        assert (renewal.count, renewal.checksum) == (3, checksum)

    async def test_a_session_that_expired_but_was_not_reaped_can_be_renewed(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        """After an outage longer than the term, this is what keeps the jobs."""
        daemon = await Daemon.begin(store)
        await advance(sql, TERM + 100)
        assert (await store.renew(daemon.me, TERM, False)).count == 0

    async def test_an_expired_session_is_not_taken_up(self, store: PgStore, sql: asyncpg.Connection) -> None:
        daemon = await Daemon.begin(store)
        await advance(sql, TERM + 1)
        assert await store.resume_session(daemon.me.session, daemon.me.incarnation, host(), TERM, FRESH) is None

    async def test_a_swap_is_made_once_by_one(self, store: PgStore) -> None:
        old = (await Daemon.begin(store)).me
        first = await store.resume_session(old.session, old.incarnation, host(), TERM, FRESH)
        assert first is not None and (first.me.epoch, first.expires_in) == (2, TERM)
        assert await store.resume_session(old.session, old.incarnation, host(), TERM, "e" * 32) is None
        # Its answer was lost: the same swap again is that swap, with another epoch.
        again = await store.resume_session(old.session, old.incarnation, host(), TERM, FRESH)
        assert again is not None and (again.me.incarnation, again.me.epoch) == (FRESH, 3)
        assert await store.resume_session("a" * 32, old.incarnation, host(), TERM, FRESH) is None

    async def test_a_shorter_term_counts_from_the_first_renewal_on(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        """Until the fence of the new term is written, jobs may run by the one of the old."""
        left = "SELECT extract(epoch FROM expires_at - bsup.clock()) FROM bsup.session"
        old = (await Daemon.begin(store)).me
        grant = await store.resume_session(old.session, old.incarnation, host(), TERM / 6, FRESH)
        assert grant is not None and grant.expires_in == TERM / 6
        assert await sql.fetchval(left) > TERM - 10
        await store.renew(grant.me, TERM / 6, False)
        assert await sql.fetchval(left) <= TERM / 6

    async def test_a_session_is_taken_up_after_the_completions_that_have_begun(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        """A daemon died as it gave a job back, and the statement waits for a lock. The next daemon must not find the
        lease held, and start the job, before that is decided."""
        await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        waiting = """
            SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"""
        granted: list[SessionGrant | None] = []

        async def take_up() -> None:
            granted.append(await store.resume_session(daemon.me.session, daemon.me.incarnation, host(), TERM, FRESH))

        async with anyio.create_task_group() as tasks, sql.transaction():
            await sql.execute("SELECT FROM bsup.lease WHERE job_id = $1 FOR UPDATE", lease.job)
            tasks.start_soon(daemon.finish, lease, Outcome.RELEASED)
            await until_there_are(sql, waiting, 1)
            tasks.start_soon(take_up)
            await until_there_are(sql, waiting, 2)
            assert granted == []
        (grant,) = granted
        assert grant is not None
        assert await store.leases(grant.me) == []
        with pytest.raises(SessionRefused):
            await daemon.finish(lease, Outcome.RELEASED)

    async def test_closing_releases_what_is_left(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        await daemon.claim_one()
        await store.close_session(daemon.me)
        (row,) = await store.states([job])
        assert (row.state, row.releases, row.losses) == (State.READY, 1, 0)
        assert await store.hosts() == []
        with pytest.raises(SessionRefused):
            await store.renew(daemon.me, TERM, False)
