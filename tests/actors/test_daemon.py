"""The daemon as a whole, on fakes and a virtual clock: root, keeper, dispatcher, reaper and jobs together."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.mailbox import Lane
from supervisor.messages import AskActors, AskDrain, AskResume, AskRunning, AskStatus, AskStop, Drained, ReloadAsked
from supervisor.model.errors import Busy
from supervisor.model.job import Outcome, Phase, State
from supervisor.model.lifecycle import JobEvent, apply
from supervisor.ports import StopOrder
from tests.actors.fake_store import FakeStore, outcomes
from tests.actors.fakes import FakeHost, Run, Script, overlaps, sometimes
from tests.actors.harness import TERMS, Daemon, until
from tests.actors.in_process_world import all_final
from tests.actors.virtual_loop import run

pytestmark = pytest.mark.anyio


async def test_jobs_run_to_their_end_and_nothing_is_left_behind(store: FakeStore, daemon: Daemon) -> None:
    store.add(20)
    await until(lambda: all_final(store))
    assert store.states() == {State.SUCCEEDED}
    await until(lambda: not daemon.host.disk)
    assert len(daemon.host.history) == 20
    assert sorted(daemon.sink.closed) == sorted(daemon.sink.opened)
    assert daemon.notifier.said[0] == "ready"


async def test_no_more_jobs_than_slots_run_at_once(store: FakeStore, daemon: Daemon) -> None:
    store.add(12)
    most = 0
    while not all_final(store):
        most = max(most, len(daemon.host.running()))
        await asyncio.sleep(0.1)
    assert most == 4


async def test_an_idle_host_is_woken_and_says_it_is_idle_before_it_sleeps(store: FakeStore, daemon: Daemon) -> None:
    """A new job starts at once, not at the next poll."""
    await until(lambda: any(session.idle for session in store.sessions.values()))
    await asyncio.sleep(0.01)
    store.add(1)
    assert await until(lambda: bool(daemon.host.history)) < 0.1


async def test_a_failure_is_retried_within_its_budget(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(1.0, 3)])
    store.add(1, attempts=3)
    await until(lambda: all_final(store))
    job = store.jobs[1]
    assert (job.life.state, job.life.failures, job.life.attempt) == (State.FAILED, 3, 3)
    assert [end.exit_code for end in job.ends.values()] == [3, 3, 3]
    assert [end.retry_delay is None for end in job.ends.values()] == [False, False, True]


async def test_a_stop_here_works_while_the_database_is_away(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(1000.0, 0)], deaf=True)
    store.add(1)
    await until(lambda: bool(daemon.host.running()))
    store.down = True
    assert await daemon.at.dispatcher.ask(AskStop((1, 99), 5.0, False, "ann"), 1) == [1]
    assert await until(lambda: not daemon.host.running()) == pytest.approx(5, abs=0.2)
    [shown] = await daemon.at.dispatcher.ask(AskRunning(), 1)
    assert (shown.phase, shown.stop_asked) == (Phase.STOPPING, True)
    await asyncio.sleep(5)
    [shown] = await daemon.at.dispatcher.ask(AskRunning(), 1)
    assert shown.waiting_for_store
    assert (await daemon.at.dispatcher.ask(AskStatus(), 1)).problems
    store.down = False
    await until(lambda: all_final(store))
    assert store.jobs[1].life.state is State.CANCELED
    assert store.jobs[1].ends.popitem()[1].error == "stopped by ann"


async def test_a_stop_order_of_the_database_is_fetched_when_it_wakes(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(1000.0, 0)])
    store.add(1)
    await until(lambda: bool(daemon.host.running()))
    job = store.jobs[1]
    assert job.lease is not None
    job.stop = StopOrder(job.lease, 1, None, False, "bob")
    store.wake("stop")
    assert await until(lambda: all_final(store)) < 2
    assert job.life.state is State.CANCELED


async def test_jobs_go_on_through_an_outage_and_their_ends_are_recorded_after_it(
    store: FakeStore, daemon: Daemon
) -> None:
    daemon.host.script = Script([(20.0, 0), (20.0, 0)])
    store.add(4)
    await until(lambda: len(daemon.host.running()) == 4)
    store.down = True
    await asyncio.sleep(60)
    assert len(daemon.host.history) == 8
    store.down = False
    await until(lambda: all_final(store))
    assert outcomes(store) == [Outcome.SUCCEEDED] * 4
    assert all(job.life.losses == 0 for job in store.jobs.values())


async def test_an_outage_beyond_the_fence_ends_the_jobs_and_they_are_released(store: FakeStore, daemon: Daemon) -> None:
    """The session is still there afterwards (an outage expires nobody): uncounted, and they run again."""
    daemon.host.script = Script([(500.0, 0)])
    store.add(2)
    await until(lambda: len(daemon.host.running()) == 2)
    store.down = True
    await asyncio.sleep(TERMS.term)
    assert not daemon.host.running()
    for session in store.sessions.values():
        session.expires += 10_000
    store.down = False
    await until(lambda: all_final(store))
    assert {end.reason for job in store.jobs.values() for end in job.ends.values()} == {"fence", None}
    assert all(job.life.losses == 0 and job.life.releases == 1 for job in store.jobs.values())
    assert not overlaps(daemon.host.history)


async def test_a_session_that_is_gone_ends_all_work_before_a_new_one_begins(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(300.0, 0)])
    store.add(2)
    await until(lambda: len(daemon.host.running()) == 2)
    [old] = store.sessions
    fences = len(daemon.host.fences)
    for session in store.sessions.values():
        session.expires = 0
    await store.reap()
    await until(lambda: len(daemon.host.fences) > fences)
    assert not [run for run in daemon.host.running() if run.lease.session == old]
    await until(lambda: all_final(store))
    assert all(job.life.losses == 1 for job in store.jobs.values())
    assert all([end.outcome for end in job.superseded] == [Outcome.SUPERSEDED] for job in store.jobs.values())
    await until(lambda: not daemon.host.disk)


async def test_a_restarted_daemon_takes_its_session_and_its_jobs_up(store: FakeStore) -> None:
    host = FakeHost()
    host.script = Script([(20.0, 0), (20.0, 0)])
    first = Daemon(store, host).start()
    store.add(4)
    await until(lambda: len(host.running()) == 4)
    await first.die()
    await asyncio.sleep(30)
    assert len(host.history) == 4
    second = Daemon(store, host).start()
    await until(lambda: all_final(store))
    assert len(store.sessions) == 1
    assert len(host.history) == 8
    assert all(job.life.attempt == 1 and job.life.losses == 0 for job in store.jobs.values())
    await second.die()


async def test_after_a_boot_the_leases_of_before_are_losses_at_once(store: FakeStore) -> None:
    host = FakeHost()
    host.script = Script([(20.0, 0)])
    first = Daemon(store, host).start()
    store.add(2)
    await until(lambda: len(host.running()) == 2)
    await first.die()
    host.boot()
    second = Daemon(store, host).start()
    assert await until(lambda: all(job.life.losses == 1 for job in store.jobs.values())) < 5
    await until(lambda: all_final(store))
    await second.die()


async def test_what_a_power_cut_took_from_the_disk_is_a_loss_too(store: FakeStore) -> None:
    """A job that takes its machine down would otherwise be run for ever: as never begun, which is not counted."""
    host = FakeHost()
    host.script = Script([(20.0, 0)])
    first = Daemon(store, host).start()
    store.add(1)
    await until(lambda: len(host.running()) == 1)
    await first.die()
    host.boot(synced=False)
    second = Daemon(store, host).start()
    await until(lambda: all_final(store))
    assert (store.jobs[1].life.losses, store.jobs[1].life.releases) == (1, 0)
    await second.die()


async def test_a_boot_is_not_forgotten_by_a_daemon_that_dies_before_it_has_looked(store: FakeStore) -> None:
    host = FakeHost()
    host.script = Script([(20.0, 0)])
    first = Daemon(store, host).start()
    store.add(1)
    await until(lambda: len(host.running()) == 1)
    await first.die()
    host.boot(synced=False)
    store.faults = lambda call: "before" if call == "leases" else None
    second = Daemon(store, host).start()
    await until(lambda: host.saved is not None and host.saved.same_boot)
    await second.die()
    store.faults = lambda call: None
    third = Daemon(store, host).start()
    await until(lambda: all_final(store))
    assert (store.jobs[1].life.losses, store.jobs[1].life.releases) == (1, 0)
    await third.die()


async def test_a_handle_without_a_lease_is_killed_and_kept_as_superseded(store: FakeStore) -> None:
    """The daemon was away for longer than the term, and the shepherd's fence did not fire (its clock was wrong)."""
    host = FakeHost()
    host.script = Script([(5000.0, 0)])
    first = Daemon(store, host).start()
    store.add(1)
    await until(lambda: len(host.running()) == 1)
    await first.die()
    [old] = host.running()
    host.clock_ahead = -10_000
    for session in store.sessions.values():
        session.expires = 0
    await store.reap()
    host.script = Script()
    second = Daemon(store, host).start()
    await until(lambda: old.ended is not None)
    await until(lambda: all_final(store) and not host.disk)
    [kept] = store.jobs[1].superseded
    assert (kept.attempt, kept.steps[0].state.value) == (1, "canceled")
    assert not overlaps(host.history)
    await second.die()


async def test_what_a_daemon_left_after_its_end_was_recorded_is_removed(store: FakeStore) -> None:
    """Killed between the verdict and the clean-up: same session, a handle, no lease."""
    host = FakeHost()
    host.script = Script([(20.0, 0)])
    first = Daemon(store, host).start()
    store.add(1)
    await until(lambda: bool(host.running()))
    await first.die()
    store.jobs[1].life = apply(store.jobs[1].life, JobEvent.SUCCEEDED)
    store.jobs[1].lease = None
    second = Daemon(store, host).start()
    await until(lambda: not host.disk)
    assert len(store.sessions) == 1
    await second.die()


async def test_a_claim_whose_answer_was_lost_is_released_uncounted(store: FakeStore, daemon: Daemon) -> None:
    lost = iter(["after"])
    store.faults = lambda call: next(lost, None) if call == "claim" else None
    store.add(2)
    assert await until(lambda: all_final(store)) < 8, "it was looked for only at the next renewal"
    assert all((job.life.releases, job.life.losses, job.life.attempt) == (1, 0, 2) for job in store.jobs.values())
    assert len(daemon.host.history) == 2


async def test_a_lost_answer_of_a_finish_is_resolved_by_repeating_it(store: FakeStore, daemon: Daemon) -> None:
    lost = iter(["after", "before", "after"])
    store.faults = lambda call: next(lost, None) if call == "finish" else None
    store.add(3)
    await until(lambda: all_final(store) and not daemon.host.disk)
    assert outcomes(store) == [Outcome.SUCCEEDED] * 3
    assert not any(job.superseded for job in store.jobs.values())


async def test_a_lost_swap_of_the_session_does_not_end_the_work(store: FakeStore) -> None:
    host = FakeHost()
    host.script = Script([(100.0, 0)])
    first = Daemon(store, host).start()
    store.add(1)
    await until(lambda: bool(host.running()))
    await first.die()
    lost = iter(["after", "before", "after"])
    store.faults = lambda call: next(lost, None) if call == "resume_session" else None
    second = Daemon(store, host).start()
    await until(lambda: all_final(store))
    assert len(host.history) == 1
    assert len(store.sessions) == 1
    await second.die()


async def test_one_end_that_can_not_be_digested_does_not_hold_up_the_others(store: FakeStore, daemon: Daemon) -> None:
    store.poisoned = {2}
    store.add(3)
    await until(lambda: all_final(store))
    assert outcomes(store) == [Outcome.SUCCEEDED] * 3
    [bare] = store.jobs[2].ends.values()
    assert bare.steps == []


async def test_a_runner_that_hangs_in_preparing_can_be_stopped(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.hang = {"prepare"}
    store.add(1)
    await until(lambda: bool(store.live()))
    await daemon.at.dispatcher.ask(AskStop((1,), 5.0, False, "ann"), 1)
    assert await until(lambda: all_final(store)) < 15
    assert store.jobs[1].life.state is State.CANCELED


async def test_a_stop_that_does_not_reach_the_shepherd_is_repeated(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(5000.0, 0)])
    store.add(1)
    await until(lambda: bool(daemon.host.running()))
    failing = iter(["before"] * 3)
    daemon.host.faults = lambda call: next(failing, None) if call == "stop" else None
    await daemon.at.dispatcher.ask(AskStop((1,), 5.0, False, "ann"), 1)
    assert await until(lambda: all_final(store)) < 60
    assert daemon.host.stops[-1][2]


async def test_a_start_whose_answer_was_lost_is_killed_and_the_attempt_fails(store: FakeStore, daemon: Daemon) -> None:
    lost = iter(["after"])
    daemon.host.faults = lambda call: next(lost, None) if call == "start" else None
    daemon.host.script = Script([(5000.0, 0)])
    store.add(1)
    await until(lambda: all_final(store))
    assert not daemon.host.running()
    [end] = store.jobs[1].ends.values()
    assert end.error == "step 'step 0' could not be started: start: the answer was lost"


async def test_a_start_that_may_come_late_is_not_told_as_none(store: FakeStore, daemon: Daemon) -> None:
    """The shepherd hung, with the start still to be looked at: until it answers what was asked behind that, the job is
    not given to another host."""
    faults = {"start": iter(["late"]), "stop": iter(["before"] * 4)}
    daemon.host.faults = lambda call: next(faults[call], None) if call in faults else None
    daemon.host.script = Script([(5000.0, 0)])
    store.add(1)
    await until(lambda: all_final(store))
    assert not daemon.host.late
    assert [run.end is not None for run in daemon.host.history] == [True]


async def test_the_jobs_own_timeout_ends_it(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(30.0, 0), (30.0, 0)], timeout=40.0)
    store.add(1)
    await until(lambda: all_final(store))
    [end] = store.jobs[1].ends.values()
    assert (end.outcome, end.reason, end.error) == (Outcome.FAILED, "timeout", "the job timed out after 40 s")
    assert daemon.sink.notes == ["the job timed out after 40 s"]


async def test_texts_leave_redacted(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.faults = lambda call: (_ for _ in ()).throw(ValueError("hunter2\0")) if call == "prepare" else None
    store.add(1)
    await until(lambda: all_final(store))
    [end] = store.jobs[1].ends.values()
    assert end.error is not None and "hunter2" not in end.error and "\0" not in end.error


async def test_a_log_that_can_not_be_completed_does_not_hold_the_job_for_ever(store: FakeStore, daemon: Daemon) -> None:
    daemon.sink.faults = lambda call: "broken" if call == "complete" else None
    store.add(1)
    await until(lambda: all_final(store))


async def test_a_log_that_can_not_be_opened_yet_fails_no_job(store: FakeStore, daemon: Daemon) -> None:
    away = iter(["away"] * 5)
    daemon.sink.faults = lambda call: next(away, None) if call == "open" else None
    store.add(1)
    await until(lambda: all_final(store))
    assert store.states() == {State.SUCCEEDED}


async def test_drain_lets_jobs_end_and_closes_the_session(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(100.0, 0)])
    store.add(6)
    await until(lambda: len(daemon.host.running()) == 4)
    daemon.terminate()
    assert await daemon.end() == 0
    assert outcomes(store) == [Outcome.SUCCEEDED] * 4
    assert not store.sessions and not daemon.host.disk
    assert daemon.notifier.said[-1] == "stopping"


async def test_a_drain_that_is_told_twice_to_be_over_closes_the_session_once(
    store: FakeStore, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """A second close finds no session, or no keeper to ask any more, and says that it expires."""
    await until(lambda: "ready" in daemon.notifier.said)
    daemon.terminate()
    for _ in range(3):
        daemon.at.root.tell(Drained(clean=True), Lane.CONTROL)
    assert await daemon.end() == 0
    assert not store.sessions and "could not be closed" not in caplog.text


async def test_drain_beyond_its_time_releases_and_a_second_word_at_once(store: FakeStore) -> None:
    host = FakeHost()
    host.script = Script([(100_000.0, 0)], deaf=True)
    daemon = Daemon(store, host, drain=100.0).start()
    store.add(1)
    await until(lambda: bool(host.running()))
    began = asyncio.get_running_loop().time()
    daemon.terminate()
    assert await daemon.end() == 0
    assert asyncio.get_running_loop().time() - began == pytest.approx(110, abs=2)
    assert store.jobs[1].life.releases == 1
    again = Daemon(store, host, drain=100.0).start()
    await until(lambda: bool(host.running()))
    began = asyncio.get_running_loop().time()
    again.terminate()
    await asyncio.sleep(1)
    again.terminate()
    await asyncio.sleep(1)
    again.terminate()
    assert await again.end() == 0
    assert asyncio.get_running_loop().time() - began < 5


async def test_detach_leaves_the_jobs_and_renews_once_more(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(100.0, 0)])
    store.add(1)
    await until(lambda: bool(daemon.host.running()))
    await asyncio.sleep(5)
    daemon.terminate(detach=True)
    assert await daemon.end() == 0
    assert daemon.host.running()
    assert daemon.host.fence_at == pytest.approx(daemon.host.now() + TERMS.term - TERMS.margin, abs=0.1)
    assert store.sessions


async def test_draining_ends_though_the_database_does_not_come_back(store: FakeStore) -> None:
    host = FakeHost()
    daemon = Daemon(store, host, drain=50.0).start()
    store.add(1)
    await until(lambda: bool(host.running()))
    store.down = True
    daemon.terminate()
    assert await daemon.end() == 0
    store.down = False
    assert host.disk
    after = Daemon(store, host).start()
    await until(lambda: all_final(store))
    assert outcomes(store) == [Outcome.SUCCEEDED]
    await after.die()


async def test_drain_and_resume_by_command(store: FakeStore, daemon: Daemon) -> None:
    await until(lambda: bool(store.sessions))
    await daemon.at.dispatcher.ask(AskDrain(None), 1)
    store.add(1)
    await asyncio.sleep(30)
    assert not daemon.host.history and not daemon.task.done()  # type: ignore[union-attr]
    await daemon.at.dispatcher.ask(AskResume(), 1)
    await until(lambda: all_final(store))


async def test_a_daemon_that_was_told_to_end_is_not_resumed(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(50.0, 0)])
    store.add(1)
    await until(lambda: bool(daemon.host.running()))
    daemon.terminate()
    await asyncio.sleep(1)
    with pytest.raises(Busy, match="about to end"):
        await daemon.at.dispatcher.ask(AskResume(), 1)
    store.add(1)
    assert await daemon.end() == 0
    assert [job.life.state for job in store.jobs.values()] == [State.SUCCEEDED, State.READY]


async def test_every_core_actor_answers_without_a_database(store: FakeStore) -> None:
    """Also before there ever was a session."""
    store.down = True
    daemon = Daemon(store, FakeHost()).start()
    await asyncio.sleep(30)
    for name, mailbox in daemon.at.by_name().items():
        status = await mailbox.ask(AskStatus(), 1)
        assert status.facts, name
    assert "no session" in (await daemon.at.keeper.ask(AskStatus(), 1)).problems[0]
    infos = await daemon.at.root.ask(AskActors(), 1)
    assert {"root", "control", "dispatcher", "keeper", "reaper"} <= {info.name for info in infos}
    assert "ready" in daemon.notifier.said
    store.down = False
    store.add(1)
    await until(lambda: all_final(store))
    await daemon.die()


async def test_a_crashed_core_actor_is_restarted_and_adopts_what_runs(store: FakeStore, daemon: Daemon) -> None:
    daemon.host.script = Script([(50.0, 0)])
    store.add(2)
    await until(lambda: len(daemon.host.running()) == 2)
    daemon.at.dispatcher.tell("nonsense")  # type: ignore[arg-type]
    daemon.at.keeper.tell("nonsense")  # type: ignore[arg-type]
    await until(lambda: all_final(store))
    assert len(daemon.host.history) == 2
    infos = {info.name: info for info in await daemon.at.root.ask(AskActors(), 1)}
    assert (infos["dispatcher"].restarts, infos["keeper"].restarts) == (1, 1)


async def test_an_actor_that_crashes_too_often_ends_the_daemon_but_not_the_jobs(store: FakeStore) -> None:
    class Broken:
        async def run(self) -> None:
            raise ValueError("broken")

    host = FakeHost()
    host.script = Script([(50.0, 0)])
    store.add(1)
    daemon = Daemon(store, host, control=Broken).start()
    assert await daemon.end() == 1


async def test_reload_is_told_to_the_service_manager(store: FakeStore, daemon: Daemon) -> None:
    await until(lambda: "ready" in daemon.notifier.said)
    daemon.at.root.tell(ReloadAsked())
    await until(lambda: daemon.reloads == 1)
    assert daemon.notifier.said[-2:] == ["reloading", "ready"]


# --- at random ----------------------------------------------------------------------------------------------------

FALLIBLE = ["claim", "finish", "renew", "leases", "set_idle", "needs", "record_steps", "supersede", "reap", "pulse"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), chance=st.sampled_from([0.05, 0.3]), delay=st.sampled_from([0.0, 0.4]))
def test_two_hosts_with_a_failing_store_and_dying_daemons(seed: int, chance: float, delay: float) -> None:
    """The store fails before or after commits, the shepherd fails, daemons are killed and started again, one for good:
    every job ends succeeded, no two leases of one ever run at once, and on each host disk and database agree in the
    end."""

    async def play() -> None:
        rng = Random(seed)
        store = FakeStore()
        store.delay = delay
        history: list[Run] = []
        hosts = [FakeHost(history), FakeHost(history)]
        for host in hosts:
            host.script = Script([(rng.uniform(0.1, 30), 0), (rng.uniform(0.1, 30), 0)])
            host.faults = sometimes(rng, 0.05, ["stop", "adopt", "handles"])
        store.faults = sometimes(rng, chance, [*FALLIBLE, "open_session", "resume_session"])
        daemons = [Daemon(store, host, seed=rng.randrange(1000)).start() for host in hosts]
        store.add(24, attempts=3)
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(rng.uniform(0, 40))
            victim = rng.randrange(2)
            await daemons[victim].die()
            await asyncio.sleep(rng.choice([0.0, 5.0, 250.0]))
            daemons[victim] = Daemon(store, hosts[victim], seed=rng.randrange(1000)).start()
        await daemons[0].die()
        await until(lambda: all_final(store), 20_000)
        store.faults = lambda call: None
        await asyncio.sleep(60)
        assert not overlaps(history)
        assert store.states() == {State.SUCCEEDED}
        for job in store.jobs.values():
            assert [end.outcome for end in job.ends.values()].count(Outcome.SUCCEEDED) == 1
        assert not hosts[1].disk
        await daemons[1].die()

    run(play())


async def test_the_host_s_disk_is_swept_at_start_and_hourly_whatever_becomes_of_it(
    store: FakeStore, daemon: Daemon
) -> None:
    """A sweep that fails is tried again, and harms nothing."""
    await until(lambda: daemon.host.sweeps == 1)
    daemon.host.faults = lambda call: "before" if call == "sweep" else None
    await asyncio.sleep(7200)
    assert daemon.host.sweeps == 1
    daemon.host.faults = lambda call: None
    await until(lambda: daemon.host.sweeps == 2, within=2 * 3600)
    store.add(1)
    await until(lambda: all_final(store))
    assert await until(lambda: daemon.host.sweeps == 3, within=2 * 3600) > 1800


async def test_nothing_is_claimed_between_the_fence_and_the_next_renewal(store: FakeStore, daemon: Daemon) -> None:
    """The database may answer claims before it takes a renewal: a job leased then could not be started."""
    store.add(1)
    await until(lambda: all_final(store))
    store.faults = lambda call: "before" if call == "renew" else None
    await asyncio.sleep(TERMS.term)
    store.add(3)
    await asyncio.sleep(60)
    assert {job.life.state for job in store.jobs.values()} == {State.SUCCEEDED, State.READY}
    for session in store.sessions.values():
        session.expires += 10_000
    store.faults = lambda call: None
    await until(lambda: all_final(store))
    assert store.states() == {State.SUCCEEDED}
    assert all(job.life.releases == 0 for job in store.jobs.values())
