"""In-process jobs and a daemon that dies, leaves or loses touch; and what crashes within it. On a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from supervisor.kinds import InProcessJob
from supervisor.messages import AskStop
from supervisor.model.job import Outcome, State
from tests.actors.fake_store import FakeStore, outcomes
from tests.actors.fakes import FakeHost, now
from tests.actors.harness import TERMS, Daemon, until
from tests.actors.in_process_world import GRACE, Work, all_final, counts, deaf, for_ever, seconds, until_asked

pytestmark = pytest.mark.anyio


async def a_claim_under_way(store: FakeStore) -> None:
    """Returns in the middle of one: it will take a while yet."""
    store.delay = 1.0
    claims = store.calls.count("claim")
    await until(lambda: store.calls.count("claim") > claims)


# --- a daemon that dies, leaves or loses touch --------------------------------------------------------------------


async def test_a_daemon_that_dies_loses_them_once_and_the_next_runs_them_again(
    store: FakeStore, host: FakeHost
) -> None:
    work = Work(for_ever)
    first = Daemon(store, host, handlers=work.handlers).start()
    store.add(3, kind="task")
    await until(lambda: work.running.total() == 3)
    await first.die()
    work.does = seconds(5.0)
    second = Daemon(store, host, handlers=work.handlers).start()
    await until(lambda: all_final(store))
    assert len(store.sessions) == 1, "the session was not taken up again"
    for job in store.jobs.values():
        assert (job.life.state, counts(job)) == (State.SUCCEEDED, (0, 1, 0))
        assert [end.outcome for end in job.ends.values()] == [Outcome.LOST, Outcome.SUCCEEDED]
    assert set(work.runs.values()) == {2}
    await second.die()


async def test_a_daemon_that_is_gone_for_good_loses_them_once_and_another_host_runs_them(store: FakeStore) -> None:
    work = Work(for_ever)
    first = Daemon(store, FakeHost(), handlers=work.handlers).start()
    store.add(2, kind="task")
    await until(lambda: work.running.total() == 2)
    second = Daemon(store, FakeHost(), handlers=work.handlers).start()
    await first.die()
    work.does = seconds(5.0)
    assert await until(lambda: all_final(store)) == pytest.approx(TERMS.term, rel=0.2)
    assert [counts(job) for job in store.jobs.values()] == [(0, 1, 0)] * 2
    assert set(work.runs.values()) == {2}
    await second.die()


async def test_a_poison_job_that_kills_its_daemon_is_not_run_for_ever(store: FakeStore, host: FakeHost) -> None:
    """Each death is a loss, and the budget of losses is bounded."""
    work = Work(for_ever)
    store.add(1, kind="task")
    for _ in range(5):
        daemon = Daemon(store, host, handlers=work.handlers).start()
        await until(lambda: work.running.total() == 1)
        await daemon.die()
    daemon = Daemon(store, host, handlers=work.handlers).start()
    await until(lambda: all_final(store))
    assert store.jobs[1].life.state is State.FAILED and work.runs == {1: 5}
    await daemon.die()


async def test_a_daemon_that_detaches_gives_them_back_uncounted(store: FakeStore, host: FakeHost) -> None:
    """They can't outlive it: asked to stop first, given back, and run by the next daemon."""
    work = Work(until_asked)
    first = Daemon(store, host, handlers=work.handlers).start()
    store.add(2, kind="task")
    store.add(1)
    await until(lambda: work.running.total() == 2 and bool(host.running()))
    began = now()
    first.terminate(detach=True)
    assert await first.end() == 0
    assert now() - began < GRACE
    assert [job.life.state for job in store.jobs.values()][:2] == [State.READY] * 2
    assert store.sessions and not host.is_guarded
    work.does = seconds(5.0)
    second = Daemon(store, host, handlers=work.handlers).start()
    await until(lambda: all_final(store))
    assert [counts(job) for job in store.jobs.values()] == [(0, 0, 1), (0, 0, 1), (0, 0, 0)]
    assert store.states() == {State.SUCCEEDED}
    assert set(work.runs.values()) == {2} and len(host.history) == 1
    await second.die()


async def test_a_detach_waits_for_no_job_that_never_was(store: FakeStore, daemon: Daemon) -> None:
    """A claim was under way when it was told to go, and found nothing."""
    await until(lambda: any(session.idle for session in store.sessions.values()))
    await a_claim_under_way(store)
    daemon.terminate(detach=True)
    began = now()
    assert await daemon.end() == 0
    assert now() - began < GRACE


async def test_what_is_claimed_while_the_daemon_detaches_is_given_back_too(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    store.add(1, kind="task")
    await until(lambda: all_final(store))
    work.does = until_asked
    store.add(2, kind="task")
    await a_claim_under_way(store)
    daemon.terminate(detach=True)
    assert await daemon.end() == 0
    assert [(job.life.state, counts(job)) for job in store.jobs.values()][1:] == [(State.READY, (0, 0, 1))] * 2
    assert max(work.runs.values()) == 1


async def test_a_drain_ends_though_a_claim_that_found_nothing_was_under_way(store: FakeStore, daemon: Daemon) -> None:
    await until(lambda: any(session.idle for session in store.sessions.values()))
    await a_claim_under_way(store)
    daemon.terminate()
    began = now()
    assert await daemon.end() == 0
    assert now() - began < 60


async def test_a_handler_that_does_not_stop_holds_up_a_detach_for_the_grace_only(
    store: FakeStore, host: FakeHost
) -> None:
    """It ends with the daemon, is lost, counted, and runs again."""
    work = Work(deaf(5))
    first = Daemon(store, host, handlers=work.handlers).start()
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    began = now()
    first.terminate(detach=True)
    assert await first.end() == 0
    assert now() - began < GRACE + 20
    work.does = seconds(1.0)
    second = Daemon(store, host, handlers=work.handlers).start()
    await until(lambda: all_final(store))
    assert counts(store.jobs[1]) == (0, 1, 0) and work.runs == {1: 2}
    await second.die()


async def test_a_drain_lets_them_end_and_gives_back_what_is_left(store: FakeStore, host: FakeHost) -> None:
    work = Work()

    async def does(job: InProcessJob) -> None:
        await (seconds(30.0) if job.id == 1 else until_asked)(job)

    work.does = does
    daemon = Daemon(store, host, handlers=work.handlers, drain=100.0).start()
    store.add(2, kind="task")
    await until(lambda: len(work.begun) == 2)
    daemon.terminate()
    assert await daemon.end() == 0
    assert [job.life.state for job in store.jobs.values()] == [State.SUCCEEDED, State.READY]
    assert counts(store.jobs[2]) == (0, 0, 1)
    assert not store.sessions and not host.is_guarded


async def test_a_claim_of_this_daemon_whose_answer_was_lost_is_given_back_uncounted(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    """Nothing of it ever began here, and no daemon before this one can have begun it."""
    lost = iter(["after"])
    store.faults = lambda call: next(lost, None) if call == "claim" else None
    store.add(2, kind="task")
    await until(lambda: all_final(store))
    assert [counts(job) for job in store.jobs.values()] == [(0, 0, 1)] * 2
    assert set(work.runs.values()) == {1}


async def test_a_kind_that_this_host_has_no_more_is_given_back(store: FakeStore, host: FakeHost) -> None:
    work = Work(for_ever)
    first = Daemon(store, host, handlers=work.handlers).start()
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    await first.die()
    second = Daemon(store, host).start()
    await until(lambda: store.jobs[1].life.state is State.READY)
    store.add(1)
    await until(lambda: store.jobs[2].life.state is State.SUCCEEDED)
    assert store.jobs[1].life.state is State.READY and work.runs == {1: 1}
    await second.die()
    work.does = seconds(1.0)
    third = Daemon(store, host, handlers=work.handlers).start()
    await until(lambda: all_final(store))
    assert store.jobs[1].life.state is State.SUCCEEDED
    await third.die()


async def test_an_outage_beyond_the_fence_ends_them_and_takes_the_guard_out(
    store: FakeStore, daemon: Daemon, host: FakeHost, work: Work
) -> None:
    """Without grace, whatever they are at; the shepherd has no reason to kill the daemon."""
    work.does = for_ever
    store.add(2, kind="task")
    await until(lambda: work.running.total() == 2)
    assert host.is_guarded
    store.down = True
    await until(lambda: host.fence_at is not None and host.now() > host.fence_at)
    await until(lambda: not work.running.total(), within=1)
    await until(lambda: not host.is_guarded, within=1)
    await asyncio.sleep(TERMS.margin)
    assert host.daemon_kills == 0
    for session in store.sessions.values():
        session.expires += 10_000
    work.does = seconds(1.0)
    store.down = False
    await until(lambda: all_final(store))
    assert [(job.life.state, counts(job)) for job in store.jobs.values()] == [(State.SUCCEEDED, (0, 0, 1))] * 2
    reasons = [[end.reason for end in job.ends.values()] for job in store.jobs.values()]
    assert reasons == [["fence", None]] * 2


async def test_a_daemon_whose_jobs_ended_just_before_the_fence_is_not_killed(
    store: FakeStore, daemon: Daemon, host: FakeHost, work: Work
) -> None:
    """It runs nothing any more when the fence passes, though the last of its jobs ended a moment ago."""
    store.add(1, kind="task", spec={"args": {}})
    gate = asyncio.Event()

    async def does(job: InProcessJob) -> None:
        await gate.wait()

    work.does = does
    await until(lambda: bool(work.begun))
    store.down = True
    await until(lambda: host.fence_at is not None and host.fence_at - host.now() < 1.0)
    gate.set()
    await until(lambda: not work.running.total())
    await asyncio.sleep(TERMS.margin)
    assert host.daemon_kills == 0


async def test_a_session_that_is_gone_ends_them_before_a_new_one_begins(
    store: FakeStore, daemon: Daemon, host: FakeHost, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.does = for_ever
    store.add(2, kind="task")
    await until(lambda: work.running.total() == 2)
    for session in store.sessions.values():
        session.expires = 0
    await store.reap()
    work.does = seconds(1.0)
    left: list[int] = []
    write = host.write

    async def look(fence_at: float) -> None:
        left.append(work.running.total())
        await write(fence_at)

    monkeypatch.setattr(host, "write", look)
    await until(lambda: all_final(store))
    assert left[0] == 0, "they ran on under the new session's fence"
    for job in store.jobs.values():
        assert counts(job) == (0, 1, 0)
        assert [end.outcome for end in job.superseded] == [Outcome.SUPERSEDED]
    assert outcomes(store) == [Outcome.SUCCEEDED] * 2


# --- crashes within -----------------------------------------------------------------------------------------------


async def test_a_dispatcher_that_crashed_takes_them_up_again(store: FakeStore, daemon: Daemon, work: Work) -> None:
    """The daemon did not die, so they run on: nothing is lost, and nothing runs twice."""
    work.does = seconds(50.0)
    store.add(2, kind="task")
    await until(lambda: work.running.total() == 2)
    daemon.at.dispatcher.tell("nonsense")  # type: ignore[arg-type]
    await until(lambda: all_final(store))
    assert set(work.runs.values()) == {1}
    assert [counts(job) for job in store.jobs.values()] == [(0, 0, 0)] * 2
    assert store.states() == {State.SUCCEEDED}


async def test_one_that_ended_while_no_dispatcher_lived_is_recorded_truly(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    work.does = seconds(3.0)
    store.add(1, kind="task")
    await until(lambda: bool(work.begun))
    store.faults = lambda call: "before" if call == "resume_session" else None
    daemon.at.dispatcher.tell("nonsense")  # type: ignore[arg-type]
    await until(lambda: not work.running.total())
    store.faults = lambda call: None
    await until(lambda: all_final(store))
    assert (store.jobs[1].life.state, work.runs) == (State.SUCCEEDED, {1: 1})


async def test_an_effect_that_crashes_ends_this_job_and_no_other(
    store: FakeStore, daemon: Daemon, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("broken")

    work.does = seconds(60.0)
    store.add(2, kind="task")
    await until(lambda: work.running.total() == 2)
    stop = daemon.in_process.stop
    monkeypatch.setattr(daemon.in_process, "stop", broken)
    await daemon.at.dispatcher.ask(AskStop((1,), None, False, "ann"), 1)
    await asyncio.sleep(1)
    monkeypatch.setattr(daemon.in_process, "stop", stop)
    await until(lambda: all_final(store))
    assert [job.life.state for job in store.jobs.values()] == [State.CANCELED, State.SUCCEEDED]


async def test_an_actor_that_crashes_is_followed_and_its_run_ended(
    store: FakeStore, daemon: Daemon, work: Work
) -> None:
    """bsup's own fault: counted as a failure, so that the attempts bound it; the handler is not left running."""
    work.does = for_ever
    store.add(1, kind="task", attempts=2)
    await until(lambda: bool(work.begun))
    [run] = daemon.in_process._runs.values()
    assert run.tell is not None
    run.tell(None)  # type: ignore[arg-type]  # what no runner tells: the actor trips over it
    work.does = seconds(1.0)
    await until(lambda: all_final(store))
    assert (store.jobs[1].life.state, counts(store.jobs[1])) == (State.SUCCEEDED, (1, 0, 0))
    assert work.runs == {1: 2} and not work.running.total()
