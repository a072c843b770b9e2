"""A job from its submission to its end, through every statement a daemon uses."""

from __future__ import annotations

from datetime import UTC, datetime

import anyio
import asyncpg
import msgspec
import pytest

from supervisor.model.errors import SessionRefused, UnknownJob, WrongState
from supervisor.model.job import Filter, JobRow, LeaseId, Outcome, State, StepRecord, StepState
from supervisor.store.pg import PgStore
from tests.store.store_bench import TERM, Daemon, add, advance, end_of, host, pass_time, spec, stale, told

pytestmark = pytest.mark.anyio

STARTED = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


async def state_of(store: PgStore, job: int) -> State:
    (row,) = await store.states([job])
    return row.state


class TestSucceeding:
    async def test_a_job_is_claimed_run_and_finished(self, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        (job,) = await add(store, name="build", labels=["docker"], priority=7, attempts=3)
        (ready,) = await store.states([job])
        assert (ready.state, ready.revision, ready.labels, ready.priority) == (State.READY, 2, ["docker"], 7)

        lease = await daemon.claim_one()
        assert (lease.job, lease.attempt, lease.attempts, lease.kind, lease.name) == (job, 1, 3, "steps", "build")
        assert msgspec.json.decode(lease.spec)["labels"] == ["docker"]
        assert lease.id == LeaseId(daemon.me.session, (1 << 32) + 1)
        (running,) = await store.states([job])
        assert (running.state, running.revision, running.host) == (State.RUNNING, 3, "alpha")
        assert running.lease == str(lease.id)

        step = StepRecord(index=0, name="s", state=StepState.RUNNING, started_at=STARTED)
        await store.record_steps(daemon.me, [(lease.id, step)])
        (running,) = await store.states([job])
        assert (running.step, running.step_name, running.steps_total) == (0, "s", 1)

        ended = StepRecord(index=0, name="s", state=StepState.SUCCEEDED, exit_code=0, started_at=STARTED)
        assert await daemon.finish(lease, steps=[ended], exit_code=0, started_at=STARTED) == (True, "succeeded")
        (done,) = await store.states([job])
        assert (done.state, done.revision, done.exit_code, done.host) == (State.SUCCEEDED, 4, 0, "alpha")
        assert done.started_at == STARTED and done.ended_at is not None

        (attempt,) = await store.attempts(job)
        assert (attempt.outcome, attempt.lease, attempt.steps) == (Outcome.SUCCEEDED, str(lease.id), [ended])
        assert await daemon.claim() == []

    async def test_progress_never_overwrites_the_end_of_a_step(self, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        await add(store)
        lease = await daemon.claim_one()
        over = StepRecord(index=0, name="s", state=StepState.FAILED, exit_code=3)
        late = StepRecord(index=0, name="s", state=StepState.RUNNING)
        await store.record_steps(daemon.me, [(lease.id, late), (lease.id, over)])
        await store.record_steps(daemon.me, [(lease.id, late)])
        (attempt,) = await store.attempts(lease.job)
        assert attempt.steps == [over] and attempt.outcome is None

    async def test_an_error_with_bytes_that_text_can_not_hold_is_stored(self, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        await add(store)
        lease = await daemon.claim_one()
        assert await daemon.finish(lease, Outcome.FAILED, error="a\0b\udcff" + "x" * 100_000) == (True, "failed")
        (row,) = await store.states([lease.job])
        assert row.error is not None and row.error.startswith("a\ufffdb?") and len(row.error) <= 16 * 1024


class TestClaiming:
    async def test_order_is_priority_then_age(self, store: PgStore) -> None:
        low, high, older = await add(store), await add(store, priority=200), await add(store)
        daemon = await Daemon.begin(store)
        assert [lease.job for lease in await daemon.claim(2)] == high + low
        assert [lease.job for lease in await daemon.claim(2)] == older

    async def test_only_needs_the_host_can_serve(self, store: PgStore) -> None:
        (plain,), (special,) = await add(store), await add(store, labels=["gpu"])
        daemon = await Daemon.begin(store)
        needs = {need.labels: need.id for need in await store.needs(0)}
        assert [lease.job for lease in await daemon.claim(needs=(needs[()],))] == [plain]
        assert await store.needs(max(needs.values())) == []
        assert [lease.job for lease in await daemon.claim(needs=tuple(needs.values()))] == [special]

    async def test_a_big_job_is_not_overtaken_by_small_ones(self, store: PgStore) -> None:
        first, big, small = await add(store, cpu=1), await add(store, cpu=4), await add(store, cpu=1)
        daemon = await Daemon.begin(store)
        assert [lease.job for lease in await daemon.claim(cpu=2.0)] == first
        assert await daemon.claim(cpu=3.0) == []
        assert [lease.job for lease in await daemon.claim(cpu=5.0)] == big + small

    async def test_memory_bounds_too(self, store: PgStore) -> None:
        one, two = await add(store, memory="1GiB"), await add(store, memory="2GiB")
        daemon = await Daemon.begin(store)
        assert [lease.job for lease in await daemon.claim(memory=2 << 30)] == one
        assert [lease.job for lease in await daemon.claim(memory=2 << 30)] == two

    async def test_a_job_that_no_room_of_this_host_could_hold_is_left_for_others(self, store: PgStore) -> None:
        await add(store, cpu=64)
        (small,) = await add(store, cpu=1)
        grant = await store.open_session(host(cpu=4.0, memory=None), TERM)
        daemon = Daemon(store, grant.me)
        assert [lease.job for lease in await daemon.claim(cpu=4.0)] == [small]

    async def test_a_job_lost_twice_runs_alone(self, store: PgStore) -> None:
        (poison,) = await add(store, priority=200)
        (neighbour,) = await add(store)
        daemon = await Daemon.begin(store)
        for _ in range(2):
            assert await daemon.finish(await daemon.claim_one(), Outcome.LOST) == (True, "ready")
        assert await daemon.claim(7) == []
        (alone,) = await daemon.claim(8)
        assert (alone.job, alone.alone, alone.losses) == (poison, True, 2)
        await daemon.finish(alone)
        assert [lease.job for lease in await daemon.claim(8)] == [neighbour]

    async def test_two_claimers_get_each_job_once(self, store: PgStore, other: PgStore) -> None:
        jobs = await add(store, 60)
        daemons = [await Daemon.begin(store, "alpha"), await Daemon.begin(other, "beta")]
        taken: list[int] = []

        async def drain(daemon: Daemon) -> None:
            empty = 0
            while empty < 2:
                leases = await daemon.claim(3)
                taken.extend(lease.job for lease in leases)
                # Once may mean that the other one had the rest locked.
                empty = 0 if leases else empty + 1

        async with anyio.create_task_group() as tasks:
            for daemon in daemons:
                tasks.start_soon(drain, daemon)
        taken.extend(lease.job for lease in await daemons[0].claim(60))
        assert sorted(taken) == jobs

    async def test_what_others_hold_locked_is_passed_over(self, store: PgStore, sql: asyncpg.Connection) -> None:
        first, second = await add(store, 2)
        daemon = await Daemon.begin(store)
        async with sql.transaction():
            await sql.execute("SELECT FROM bsup.ready WHERE job_id = $1 FOR UPDATE", first)
            assert [lease.job for lease in await daemon.claim(1)] == [second]
        assert [lease.job for lease in await daemon.claim(1)] == [first]

    async def test_an_expired_session_claims_nothing_until_it_is_renewed(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        await add(store)
        daemon = await Daemon.begin(store)
        await advance(sql, TERM + 1)
        assert await daemon.claim() == []
        await store.renew(daemon.me, TERM, False)
        assert len(await daemon.claim()) == 1


class TestFailing:
    async def test_a_retry_waits_for_its_time(self, store: PgStore, sql: asyncpg.Connection) -> None:
        (job,) = await add(store, attempts=2)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        assert await daemon.finish(lease, Outcome.FAILED, retry_delay=30.0, exit_code=1) == (True, "waiting")
        (row,) = await store.states([job])
        assert (row.state, row.failures, row.revision) == (State.WAITING, 1, 4) and row.run_at is not None
        assert (await store.reap()).promoted == 0
        await advance(sql, 31)
        assert (await store.reap()).promoted == 1
        again = await daemon.claim_one()
        assert (again.attempt, again.failures) == (2, 1)
        assert await daemon.finish(again, Outcome.FAILED, exit_code=1) == (True, "failed")
        assert [row.outcome for row in await store.attempts(job)] == [Outcome.FAILED, Outcome.FAILED]
        (row,) = await store.states([job])
        assert (row.failures, row.exit_code, row.attempt) == (2, 1, 2)

    async def test_a_retry_without_delay_is_ready_at_once(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        assert await daemon.finish(await daemon.claim_one(), Outcome.FAILED, retry_delay=0.0) == (True, "ready")
        (row,) = await store.states([job])
        assert (row.failures, row.revision) == (1, 5)

    async def test_a_release_counts_no_failure(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        assert await daemon.finish(await daemon.claim_one(), Outcome.RELEASED, reason="drain") == (True, "ready")
        (row,) = await store.states([job])
        assert (row.failures, row.losses, row.releases) == (0, 0, 1)

    async def test_the_budget_of_losses_ends_a_job(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        verdicts = [await daemon.finish((await daemon.claim(8))[0], Outcome.LOST) for _ in range(5)]
        assert verdicts == [(True, "ready")] * 4 + [(True, "failed")]
        (row,) = await store.states([job])
        assert (row.losses, row.reason) == (5, "losses")


class TestFencing:
    async def test_a_lease_that_was_never_given_changes_nothing(self, store: PgStore) -> None:
        await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        wrong = [
            msgspec.structs.replace(end_of(lease), lease=LeaseId(lease.id.session, lease.id.counter + 1)),
            msgspec.structs.replace(end_of(lease), lease=stale(lease)),
            msgspec.structs.replace(end_of(lease), attempt=2),
            msgspec.structs.replace(end_of(lease), job=lease.job + 1),
        ]
        for end in wrong:
            (verdict,) = await store.finish(daemon.me, [end])
            assert not verdict.recorded
        assert await state_of(store, lease.job) is State.RUNNING
        assert [row.outcome for row in await store.attempts(lease.job)] == [None]
        step = StepRecord(index=0, name="s", state=StepState.RUNNING)
        await store.record_steps(daemon.me, [(LeaseId(lease.id.session, 99), step)])
        assert (await store.attempts(lease.job))[0].steps == []

    async def test_a_lease_that_is_gone_is_refused_with_the_state_now(self, store: PgStore) -> None:
        await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        await daemon.finish(lease, Outcome.RELEASED)
        second = await daemon.claim_one()
        # The first lease's release was recorded: a repeat, whatever it says, gets what was recorded.
        assert await daemon.finish(lease, Outcome.SUCCEEDED) == (True, "ready")
        assert await state_of(store, lease.job) is State.RUNNING
        assert await daemon.finish(second) == (True, "succeeded")

    async def test_a_repeat_of_a_completion_whose_answer_was_lost_is_recorded(self, store: PgStore) -> None:
        first, second = await add(store, 2)
        daemon = await Daemon.begin(store)
        one, two = await daemon.claim(2)
        await daemon.finish(one)
        verdicts = await store.finish(daemon.me, [end_of(one), end_of(two, Outcome.FAILED)])
        assert [(v.lease, v.recorded, v.state) for v in verdicts] == [
            (one.id, True, "succeeded"),
            (two.id, True, "failed"),
        ]
        assert len(await store.attempts(first)) == len(await store.attempts(second)) == 1

    async def test_every_write_names_the_incarnation(self, store: PgStore) -> None:
        await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        old = daemon.me
        fresh = "0" * 31 + "1"
        grant = await store.resume_session(old.session, old.incarnation, host(), TERM, fresh)
        assert grant is not None and grant.me.incarnation == fresh and grant.me.epoch == 2
        step = StepRecord(index=0, name="s", state=StepState.RUNNING)
        for write in (
            lambda: store.finish(old, [end_of(lease)]),
            lambda: store.renew(old, TERM, False),
            lambda: store.record_steps(old, [(lease.id, step)]),
            lambda: store.set_idle(old, True),
            lambda: store.leases(old),
            lambda: store.stop_orders(old),
            lambda: store.close_session(old),
            lambda: Daemon(store, old).claim(),
        ):
            with pytest.raises(SessionRefused):
                await write()
        (taken_up,) = await store.leases(grant.me)
        assert (taken_up.id, taken_up.job) == (lease.id, lease.job)
        assert await Daemon(store, grant.me).finish(lease) == (True, "succeeded")

    async def test_a_lost_attempt_of_a_holder_that_comes_back_is_kept_as_superseded(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        (job,) = await add(store)
        gone = await Daemon.begin(store, "gone")
        lease = await gone.claim_one()
        await store.pulse(TERM)
        await pass_time(store, sql, 2 * TERM)
        reaped = await store.reap()
        assert (reaped.requeued, reaped.failed, reaped.sessions) == (1, 0, [gone.me.session])
        with pytest.raises(SessionRefused):
            await gone.finish(lease)
        step = StepRecord(index=0, name="s", state=StepState.SUCCEEDED, exit_code=0)
        await store.supersede([end_of(lease, steps=[step], exit_code=0)])
        (attempt,) = await store.attempts(job)
        assert (attempt.outcome, attempt.exit_code, attempt.steps) == (Outcome.SUPERSEDED, 0, [step])
        assert await state_of(store, job) is State.READY
        # One that was recorded is not touched.
        back = await Daemon.begin(store, "back")
        again = await back.claim_one()
        await back.finish(again)
        await store.supersede([end_of(again, Outcome.FAILED)])
        assert (await store.attempts(job))[1].outcome is Outcome.SUCCEEDED


class TestStopping:
    async def test_a_job_that_does_not_run_is_canceled(self, store: PgStore) -> None:
        (job,) = await add(store)
        (child,) = await add(store, after=[job])
        (result,) = await store.stop([job], grace=None, kill=False, by="ann")
        assert (result.did, result.is_over) == ("canceled", False)
        assert [(row.state, row.reason) for row in await store.states([job, child])] == [
            (State.CANCELED, "stop"),
            (State.CANCELED, "upstream"),
        ]
        (result,) = await store.stop([job], grace=None, kill=False, by="ann")
        assert (result.did, result.is_over) == ("canceled", True)
        assert [event.type for event in await told(store, 1)] == ["stop"]

    async def test_the_host_of_a_running_job_is_told(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        (result,) = await store.stop([job], grace=5.0, kill=False, by="ann")
        assert result.did == "stopping"
        (order,) = (await store.renew(daemon.me, TERM, False)).stops
        assert (order.lease, order.job, order.grace, order.kill, order.by) == (lease.id, job, 5.0, False, "ann")
        # Asked again it gets harder, never softer.
        await store.stop([job], grace=1.0, kill=True, by="bob")
        await store.stop([job], grace=9.0, kill=False, by="bob")
        (order,) = await store.stop_orders(daemon.me)
        assert (order.grace, order.kill, order.by) == (1.0, True, "ann")
        (row,) = await store.states([job])
        assert row.stop_asked_at is not None

    @pytest.mark.parametrize(
        ("outcome", "facts", "state"),
        [
            (Outcome.CANCELED, {}, "canceled"),
            (Outcome.RELEASED, {}, "canceled"),
            (Outcome.LOST, {}, "canceled"),
            (Outcome.FAILED, {"retry_delay": 10.0}, "canceled"),
            (Outcome.FAILED, {}, "failed"),
            (Outcome.SUCCEEDED, {}, "succeeded"),
        ],
    )
    async def test_a_stop_turns_every_way_back_into_the_end(
        self, store: PgStore, outcome: Outcome, facts: dict[str, float], state: str
    ) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        await store.stop([job], grace=None, kill=False, by="ann")
        assert await daemon.finish(lease, outcome, **facts) == (True, state)

    async def test_jobs_in_every_state_are_stopped_at_once(self, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        done, failed, running = await add(store, 3)
        outcomes = {done: Outcome.SUCCEEDED, failed: Outcome.FAILED}
        for lease in await daemon.claim(3):
            if lease.job in outcomes:
                await daemon.finish(lease, outcomes[lease.job])
        (ready,) = await add(store)
        (waiting,) = await add(store, after=[ready, running])
        (below,) = await add(store, after=[waiting])
        asked = [below, ready, done, waiting, running, failed, ready]
        results = await store.stop(asked, grace=None, kill=False, by="ann")
        assert [(result.job, result.did, result.is_over) for result in results] == [
            (done, "succeeded", True),
            (failed, "failed", True),
            (running, "stopping", False),
            (ready, "canceled", False),
            (waiting, "canceled", False),
            (below, "canceled", False),
        ]
        rows = {row.id: row for row in await store.states([ready, waiting, below, running])}
        assert {rows[job].reason for job in (ready, waiting, below)} == {"stop"}
        assert rows[running].state is State.RUNNING and rows[running].stop_asked_at is not None
        events = [event for event in await told(store, 4) if event.type == "stop"]
        assert [event.job for event in events] == [running, ready, waiting, below]

    async def test_one_unknown_job_stops_none(self, store: PgStore) -> None:
        (job,) = await add(store)
        with pytest.raises(UnknownJob) as unknown:
            await store.stop([job, job + 1], grace=None, kill=False, by="ann")
        assert unknown.value.job == job + 1
        assert await state_of(store, job) is State.READY


class TestRetryingAndDeleting:
    async def test_a_retry_opens_the_next_generation(self, store: PgStore) -> None:
        (job,) = await add(store)
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED, exit_code=2)
        (row,) = await store.retry([job], by="ann")
        assert (row.state, row.generation, row.failures, row.attempt) == (State.READY, 2, 0, 1)
        assert row.revision == 6 and row.exit_code is None
        lease = await daemon.claim_one()
        assert lease.attempt == 2
        await daemon.finish(lease)
        assert [(a.attempt, a.generation) for a in await store.attempts(job)] == [(1, 1), (2, 2)]
        assert [r.id async for page in store.list_jobs(Filter(states=(State.FAILED,))) for r in page] == []

    async def test_only_what_has_ended(self, store: PgStore) -> None:
        done, live = await add(store, 2)
        await store.stop([done], grace=None, kill=False, by="ann")
        for call in (store.retry([done, live], by="ann"), store.delete([done, live], by="ann")):
            with pytest.raises(WrongState) as wrong:
                await call
            assert (wrong.value.job, wrong.value.state) == (live, "ready")
        assert await state_of(store, done) is State.CANCELED
        with pytest.raises(UnknownJob):
            await store.retry([live + 7], by="ann")

    async def test_a_job_with_secrets_can_not_be_retried(self, store: PgStore) -> None:
        (job,) = await add(store, secrets={"TOKEN": "s3cret"})
        await store.stop([job], grace=None, kill=False, by="ann")
        with pytest.raises(WrongState, match="secrets were deleted"):
            await store.retry([job], by="ann")

    async def test_a_child_is_retried_with_its_parent(self, store: PgStore) -> None:
        (parent,) = await add(store)
        (child,) = await add(store, after=[parent])
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED)
        with pytest.raises(WrongState, match=f"job {parent}, which it waits for"):
            await store.retry([child], by="ann")
        rows = await store.retry([child, parent], by="ann")
        assert [(row.id, row.state) for row in rows] == [(child, State.WAITING), (parent, State.READY)]
        await daemon.finish(await daemon.claim_one())
        assert (await daemon.claim_one()).job == child

    async def test_a_parent_that_succeeds_twice_counts_once(self, store: PgStore) -> None:
        (first,) = await add(store)
        (second,) = await add(store)
        (child,) = await add(store, after=[first, second])
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one())
        await store.retry([first], by="ann")
        leases = {lease.job: lease for lease in await daemon.claim(2)}
        await daemon.finish(leases[first])
        (row,) = await store.states([child])
        assert (row.state, row.parents_left) == (State.WAITING, 1)
        await daemon.finish(leases[second])
        assert await state_of(store, child) is State.READY

    async def test_deleting_leaves_no_row(self, store: PgStore, sql: asyncpg.Connection) -> None:
        (job,) = await add(store)
        (child,) = await add(store, after=[job])
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        await daemon.finish(lease, steps=[StepRecord(index=0, name="s", state=StepState.SUCCEEDED)])
        await store.stop([child], grace=None, kill=False, by="ann")
        assert await store.delete([job, child], by="ann") == 2
        with pytest.raises(UnknownJob):
            await store.show(job)
        for table in ("job", "finished", "attempt", "step", "edge", "log", "log_chunk", "job_secret"):
            assert await sql.fetchval(f"SELECT count(*) FROM bsup.{table}") == 0, table
        assert [event.type for event in await told(store, 2)] == ["delete", "delete"]

    async def test_the_sweeper_deletes_what_ended_long_ago(self, store: PgStore, sql: asyncpg.Connection) -> None:
        old, retried, live = await add(store, 3)
        await store.stop([old, retried], grace=None, kill=False, by="ann")
        await store.retry([retried], by="ann")
        await advance(sql, 1000)
        (young,) = await add(store)
        await store.stop([young], grace=None, kill=False, by="ann")
        assert await store.sweep(500) == 1
        assert [row.id async for page in store.list_jobs(Filter(all=True)) for row in page] == [young, live, retried]


class TestReading:
    async def test_lists_are_newest_first_and_filtered(self, store: PgStore) -> None:
        plain = await add(store, 3)
        labelled = await add(store, 2, labels=["docker", "arch=amd64"])
        (waiting,) = await add(store, after=[plain[0]])
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED)
        running = await daemon.claim_one()

        async def ids(**where: object) -> list[int]:
            return [row.id async for page in store.list_jobs(Filter(**where)) for row in page]  # type: ignore[arg-type]

        assert await ids() == [*reversed(labelled), plain[2], plain[1]]
        assert await ids(all=True) == [waiting, *reversed(labelled), *reversed(plain)]
        assert await ids(limit=2) == list(reversed(labelled))
        assert await ids(labels=("docker",)) == list(reversed(labelled))
        assert await ids(kinds=("other",)) == []
        assert await ids(states=(State.RUNNING,)) == [running.job]
        assert await ids(states=(State.FAILED, State.READY)) == [*reversed(labelled), plain[2], plain[0]]
        assert await ids(states=(State.CANCELED,)) == [waiting]

    async def test_each_field_is_its_column(self, store: PgStore, sql: asyncpg.Connection) -> None:
        """Rows are taken over by position."""
        daemon = await Daemon.begin(store)
        done, _, other = await add(store, 3, labels=["docker"])
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED, exit_code=3, error="no", reason="step")
        running = await daemon.claim_one()
        await store.record_steps(daemon.me, [(running.id, StepRecord(index=0, name="s", state=StepState.RUNNING))])
        await store.stop([running.job], grace=None, kill=False, by="x")
        (waiting,) = await add(store, after=[running.job])
        rows = [row async for page in store.list_jobs(Filter(all=True)) for row in page]
        assert rows == await store.states([waiting, other, running.job, done])
        lines = [line async for page in store.list_lines(Filter(all=True)) for line in page]
        for line, row in zip(lines, rows, strict=True):
            told = msgspec.structs.asdict(line)
            age, duration = told.pop("age"), told.pop("duration")
            labels = row.labels if row.state is State.READY else None
            assert told == {name: labels if name == "labels" else getattr(row, name) for name in told}
            assert 0 <= age < 60
            if row.started_at is None:
                assert duration is None
            elif row.ended_at is not None:
                assert duration == pytest.approx((row.ended_at - row.started_at).total_seconds(), abs=0.001)
            else:
                assert 0 <= duration <= age
        for row in rows:
            stored = await sql.fetchrow("SELECT * FROM bsup.jobs WHERE id = $1", row.id)
            assert stored is not None
            lease = f"{stored['session'].hex}-{stored['counter']}" if stored["session"] else None
            assert msgspec.structs.asdict(row) == {
                name: lease if name == "lease" else stored[name] for name in JobRow.__struct_fields__
            }
            assert row.submitted_at.tzinfo is UTC

    async def test_lists_go_on_over_pages(self, store: PgStore, sql: asyncpg.Connection) -> None:
        await sql.execute("SELECT bsup.submit($1) FROM generate_series(1, 1300)", msgspec.json.encode(spec()).decode())
        found = [row.id async for page in store.list_jobs(Filter()) for row in page]
        assert len(found) == 1300 and found == sorted(found, reverse=True)
        assert sum([len(page) async for page in store.list_jobs(Filter(limit=501))]) == 501

    async def test_show_masks_secrets_and_names_neighbours(self, store: PgStore) -> None:
        (parent,) = await add(store)
        (job,) = await add(store, after=[parent], secrets={"TOKEN": "s3cret"}, redact={"hush": "***"})
        (child,) = await add(store, after=[job])
        row, shown, parents, children = await store.show(job)
        assert (row.id, row.state, row.parents_left) == (job, State.WAITING, 1)
        assert (parents, children) == ([parent], [child])
        assert shown["secrets"] == ["TOKEN"] and "redact" not in shown

    async def test_states_answer_in_order_or_not_at_all(self, store: PgStore) -> None:
        first, second = await add(store, 2)
        assert [row.id for row in await store.states([second, first])] == [second, first]
        with pytest.raises(UnknownJob):
            await store.states([first, 999])
        with pytest.raises(UnknownJob):
            await store.attempts(999)

    async def test_an_event_of_an_open_transaction_is_not_overtaken(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        """Who asks for what came after the last he saw would never see it."""
        first, second = await add(store, 2)
        transaction = sql.transaction()
        await transaction.start()
        await sql.execute("SELECT bsup.cancel($1)", first)
        await store.stop([second], grace=None, kill=False, by="ann")
        assert await store.events(0) == []
        await transaction.commit()
        assert [event.job for event in await told(store, 2)] == [first, second]
        assert await store.events(await store.last_event()) == []

    async def test_hosts_tell_their_state(self, store: PgStore, sql: asyncpg.Connection) -> None:
        one = await Daemon.begin(store, "one")
        two = await Daemon.begin(store, "two")
        await add(store)
        await one.claim_one()
        await store.renew(two.me, TERM, True)
        assert [(row.name, row.leases, row.state) for row in await store.hosts()] == [
            ("one", 1, "active"),
            ("two", 0, "draining"),
        ]
        await advance(sql, TERM + 1)
        assert {row.state for row in await store.hosts()} == {"expired"}
        assert await store.last_event() == 0


class TestSecrets:
    @pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELED])
    async def test_they_live_until_the_job_ends(
        self, store: PgStore, sql: asyncpg.Connection, outcome: Outcome
    ) -> None:
        (job,) = await add(store, secrets={"TOKEN": "s3cret"}, redact={"hush": "***"}, attempts=2)
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        assert (lease.secrets, lease.redact) == ({"TOKEN": "s3cret"}, {"hush": "***"})
        assert b"s3cret" not in bytes(lease.spec) and b"hush" not in bytes(lease.spec)
        assert msgspec.json.decode(lease.spec)["secrets"] == ["TOKEN"]
        await daemon.finish(lease, Outcome.FAILED, retry_delay=0.0)
        assert await sql.fetchval("SELECT count(*) FROM bsup.job_secret WHERE job_id = $1", job) == 2
        (again,) = await daemon.claim()
        assert (await store.leases(daemon.me))[0].secrets == {"TOKEN": "s3cret"}
        await daemon.finish(again, outcome)
        assert await sql.fetchval("SELECT count(*) FROM bsup.job_secret") == 0
