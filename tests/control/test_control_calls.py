"""Every call over the real socket with the real client, on a store in memory: what it does, and without one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pytest
from control_world import NOW, SPEC, RawPeer, World, attempt_row, job_row, running_job

from supervisor.client import Client
from supervisor.framing import CallTimeout, InternalError
from supervisor.messages import AskDrain, AskResume, AskStop
from supervisor.model.errors import InvalidInput, StoreUnavailable, UnknownJob, WrongState
from supervisor.model.job import EventRow, JobRow, Outcome, State, Stream
from supervisor.protocol import LOG_PIECE, METHODS, JobView, LineView, LogEnd, LogPiece, LogStream

pytestmark = pytest.mark.anyio


async def test_every_method_has_a_call(world: World) -> None:
    async with world.serve():
        assert world.control is not None
        assert set(world.control._handlers) == set(METHODS)


# --- submit, list, show ---


async def test_submit_stores_the_canonical_spec_under_the_peers_name(world: World) -> None:
    world.store.add(job_row(1), job_row(2))
    async with world.serve(), Client(world.path) as client:
        assert await client.submit(SPEC, key="k1", after=[2, 1, 2]) == 3
    ((did, spec, key, after, submitter),) = world.store.calls
    assert (did, key, after, submitter) == ("submit", "k1", [2, 1], "alice")
    assert spec["kind"] == "steps" and spec["steps"][0]["name"] == "hi"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"kind": "steps", "steps": []}, "steps"),
        ({**SPEC, "stepz": 1}, "stepz"),
        ({**SPEC, "priority": "high"}, "priority"),
    ],
)
async def test_a_bad_spec_names_its_field_and_changes_nothing(world: World, spec: dict[str, Any], field: str) -> None:
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(InvalidInput) as caught:
            await client.submit(spec)
    assert caught.value.field.startswith(field)
    assert world.store.calls == []


async def test_many_are_submitted_as_they_came_and_their_secrets_are_not_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    specs = [{"kind": "noop", "args": {"n": n}, "secrets": {"TOKEN": "hush"}} for n in range(3)]
    world.store.add(job_row(4))
    async with world.serve(), Client(world.path) as client:
        assert await client.submit_many(specs, key="k") == [5, 6, 7]
        with pytest.raises(InvalidInput, match="jobs"):
            await client.submit_many([])
        with pytest.raises(InvalidInput, match="jobs"):
            await client.submit_many({"kind": "noop"} for _ in range(10_001))
        with pytest.raises(InvalidInput, match="jobs: is too large"):
            await client.submit_many([{"name": "x" * 2_000_000}])
    assert world.store.calls == [("submit_many", specs, "k", "alice")]
    assert "submitted 3 jobs from 5 on" in caplog.text and "hush" not in caplog.text


async def test_list_adds_what_only_this_host_knows(world: World) -> None:
    world.store.add(
        job_row(1),
        job_row(2, State.RUNNING, attempt=1, host="build1", step=0, step_name="old", steps_total=5),
        job_row(3, State.SUCCEEDED, exit_code=0),
        job_row(4, State.RUNNING, attempt=2, host="build2"),
    )
    world.dispatcher.running = [running_job(2), running_job(4, attempt=1)]
    async with world.serve(), Client(world.path) as client:
        jobs = {job.id: job async for job in client.list()}
        every = [job.id async for job in client.list(all=True)]
        final = [job.id async for job in client.list(states=[State.SUCCEEDED])]
    assert set(jobs) == {1, 2, 4} and every == [1, 2, 3, 4] and final == [3]
    assert jobs[2].phase == "running" and jobs[2].progress is not None
    assert (jobs[2].progress.step, jobs[2].progress.steps, jobs[2].progress.name) == (2, 5, "test")
    assert jobs[1].age == 90.0 and jobs[1].phase is None
    # The host's word on an attempt that is over is not mixed into the next one's row.
    assert jobs[4].phase is None


async def test_a_brief_list_tells_the_same_of_what_it_tells_and_leaves_out_the_rest(world: World) -> None:
    world.store.add(
        job_row(1),
        job_row(2, State.RUNNING, attempt=1, started_at=NOW - timedelta(seconds=20), step=0, steps_total=5),
        job_row(3, State.FAILED, attempt=1, signal=9, reason="step", started_at=NOW, ended_at=NOW),
        job_row(4, State.WAITING, parents_left=2, run_at=NOW),
    )
    world.dispatcher.running = [running_job(2)]
    async with world.serve(), Client(world.path) as client, RawPeer.connect(world.path) as raw:
        whole = {job.id: job async for job in client.list(all=True)}
        brief = {job.id: job async for job in client.list(all=True, brief=True)}
        raw.call("List", {"brief": True}, more=True)
        first = await raw.reply()
    shown = set(LineView.__struct_fields__)
    for job in brief.values():
        for name in shown:
            assert getattr(job, name) == getattr(whole[job.id], name) or name in ("parents_left", "labels")
        assert all(not getattr(job, name) for name in set(JobView.__struct_fields__) - shown)
    assert brief[4].parents_left == 2 and brief[1].labels == ["docker"]
    assert brief[2].progress is not None and brief[2].progress.name == "test" and brief[3].exit_code == 137
    assert first is not None and msgspec.json.decode(first.parameters) == {
        "job": {"id": 1, "name": "job-1", "kind": "steps", "state": "ready", "age": 90.0, "labels": ["docker"]}
    }
    world.store.away = True
    async with world.serve(), Client(world.path) as client:
        (told,) = [job async for job in client.list(brief=True)]
    assert (told.id, told.state, told.host, told.duration) == (2, State.RUNNING, "build1", 20.0)


async def test_list_without_the_database_tells_the_jobs_of_this_host_and_says_so_first(world: World) -> None:
    world.store.away = True
    notices: list[str] = []
    async with world.serve(), Client(world.path) as client:
        assert [job async for job in client.list(on_notice=notices.append)] == []
        assert len(notices) == 1 and "database" in notices[0]
        world.dispatcher.running = [running_job(8), running_job(7)]
        jobs = [job async for job in client.list(on_notice=notices.append)]
        assert [(job.id, job.state, job.host, job.duration) for job in jobs] == [
            (7, State.RUNNING, "build1", 20.0),
            (8, State.RUNNING, "build1", 20.0),
        ]
        assert [job async for job in client.list(states=[State.READY])] == []
        assert [job.id async for job in client.list(limit=1)] == [7]


async def test_a_list_cut_short_by_an_outage_is_an_error_not_a_short_list(world: World) -> None:
    async def rows() -> AsyncGenerator[JobRow, None]:
        yield job_row(1)
        raise StoreUnavailable("gone")

    world.store.rows = rows()
    async with world.serve(), Client(world.path) as client:
        got = []
        with pytest.raises(StoreUnavailable):
            async for job in client.list():
                got.append(job.id)
    assert got == [1]


async def test_show_and_attempts_tell_signals_as_exit_codes(world: World) -> None:
    world.store.add(job_row(5, State.FAILED, attempt=2, exit_code=None, signal=9, reason="stop"))
    world.store.tries[5] = [attempt_row(5, 1, Outcome.LOST), attempt_row(5, 2, Outcome.FAILED, signal=9)]
    async with world.serve(), Client(world.path) as client:
        shown = await client.show(5)
        attempts = [one async for one in client.attempts(5)]
        with pytest.raises(UnknownJob):
            await client.show(6)
        with pytest.raises(UnknownJob):
            [one async for one in client.attempts(6)]
    assert (shown.job.exit_code, shown.job.signal) == (137, 9)
    assert (shown.parents, shown.children, shown.spec) == ([1], [2, 3], SPEC)
    assert [(one.exit_code, one.duration) for one in attempts] == [(None, 20.0), (137, 20.0)]
    assert attempts[0].steps[0].exit_code == 0


# --- stop, retry, delete ---


async def test_stop_asks_here_and_records_everywhere(world: World) -> None:
    world.store.add(job_row(1), job_row(2, State.RUNNING, attempt=1), job_row(3, State.SUCCEEDED))
    world.dispatcher.running = [running_job(2)]
    async with world.serve(), Client(world.path) as client:
        did = [(one.id, one.did, one.recorded) async for one in client.stop([3, 2, 1, 2], grace=4, kill=True)]
    assert did == [(3, "succeeded", True), (2, "stopping", True), (1, "canceled", True)]
    assert world.dispatcher.asked == [AskStop((3, 2, 1), 4.0, True, "alice")]
    assert world.store.calls == [("stop", [3, 2, 1], 4.0, True, "alice")]


async def test_a_job_that_a_stop_ends_at_once_was_not_over_before(world: World) -> None:
    """An in-process job may be recorded as canceled before the database hears of the stop."""
    world.store.add(
        job_row(2, State.RUNNING, attempt=1), job_row(3, State.RUNNING, attempt=1), job_row(4, State.CANCELED)
    )
    world.dispatcher.running = [running_job(2), running_job(3)]
    world.dispatcher.on_stop = lambda: (
        world.store.change(2, state=State.CANCELED),
        world.store.change(3, state=State.SUCCEEDED),
    )
    async with world.serve(), Client(world.path) as client:
        did = [(one.id, one.did, one.is_over) async for one in client.stop([2, 3, 4])]
    assert did == [(2, "canceled", False), (3, "succeeded", True), (4, "canceled", True)]


async def test_stop_does_nothing_if_one_id_is_unknown(world: World) -> None:
    world.store.add(job_row(2, State.RUNNING, attempt=1))
    world.dispatcher.running = [running_job(2)]
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(UnknownJob) as caught:
            [one async for one in client.stop([2, 99])]
    assert caught.value.job == 99
    assert world.dispatcher.asked == [] and world.store.calls == []


async def test_stop_without_the_database_stops_what_runs_here_and_says_what_it_could_not(world: World) -> None:
    world.store.away = True
    world.dispatcher.running = [running_job(2)]
    got = []
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(StoreUnavailable, match="7"):
            async for one in client.stop([2, 7]):
                got.append((one.id, one.did, one.recorded))
        here = [(one.id, one.did) async for one in client.stop([2])]
    assert got == [(2, "stopping", False), (7, "unavailable", False)]
    assert here == [(2, "stopping")]


async def test_stop_goes_through_the_database_where_the_dispatcher_is_silent(world: World) -> None:
    world.store.add(job_row(2, State.RUNNING, attempt=1))
    world.dispatcher.silent = True
    async with world.serve(), Client(world.path) as client:
        assert [(one.did, one.recorded) async for one in client.stop([2])] == [("stopping", True)]


@pytest.mark.parametrize("state", [State.READY, State.WAITING, State.RUNNING])
async def test_retry_touches_none_if_one_is_in_the_wrong_state(world: World, state: State) -> None:
    world.store.add(job_row(1, State.FAILED), job_row(2, state))
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(WrongState) as caught:
            [job async for job in client.retry([1, 2])]
        assert (caught.value.job, caught.value.state) == (2, state.value)
        assert world.store.calls == []
        assert [(job.id, job.state) async for job in client.retry([1])] == [(1, State.READY)]


async def test_delete_takes_only_what_has_ended(world: World) -> None:
    world.store.add(job_row(1, State.FAILED), job_row(2, State.RUNNING))
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(WrongState):
            await client.delete([1, 2])
        with pytest.raises(UnknownJob):
            await client.delete([1, 3])
        assert world.store.calls == []
        assert await client.delete([1]) == 1


# --- wait ---


async def test_wait_tells_each_job_when_it_is_final_through_an_outage(world: World) -> None:
    world.store.add(job_row(1, State.SUCCEEDED), job_row(2, State.RUNNING, attempt=1))
    got = []
    async with world.serve(), Client(world.path) as client, aclosing(client.wait([2, 1])) as ended:
        async for job in ended:
            got.append((job.id, job.exit_code))
            if job.id == 1:
                world.store.away = True
                world.store.asked_states = anyio.Event()
                await world.store.asked_states.wait()
                world.store.away = False
                world.store.change(2, state=State.FAILED, exit_code=3)
    assert got == [(1, 0), (2, 3)]


async def test_wait_any_ends_with_the_first_and_timeout_is_an_error(world: World) -> None:
    world.store.add(job_row(1, State.SUCCEEDED), job_row(2))
    async with world.serve(), Client(world.path) as client:
        assert [job.id async for job in client.wait([2, 1], any=True)] == [1]
        with pytest.raises(CallTimeout, match="2"):
            [job async for job in client.wait([2], timeout=0.02)]
        with pytest.raises(UnknownJob):
            [job async for job in client.wait([2, 5])]


# --- logs ---


async def test_logs_give_every_byte_in_pieces_that_fit_a_frame_and_then_the_end(world: World) -> None:
    world.store.add(job_row(1, State.SUCCEEDED, attempt=1))
    world.store.tries[1] = [attempt_row(1, 1, Outcome.SUCCEEDED, exit_code=0)]
    big = bytes(range(256)) * 1024
    world.logs.write(1, 1, b"first\n")
    world.logs.write(1, 1, big, stream=Stream.ERR)
    async with world.serve(), Client(world.path) as client:
        items = [item async for item in client.logs(1)]
        later = [item async for item in client.logs(1, offset=4, stream=LogStream.OUT)]
    pieces = [item for item in items if isinstance(item, LogPiece)]
    assert b"".join(piece.data for piece in pieces) == b"first\n" + big
    assert max(len(piece.data) for piece in pieces) == LOG_PIECE
    assert [piece.offset for piece in pieces] == [0, *range(6, 6 + len(big), LOG_PIECE)]
    assert {piece.step_name for piece in pieces} == {"hi"} and pieces[0].at.utcoffset() is not None
    assert isinstance(items[-1], LogEnd)
    assert (items[-1].outcome, items[-1].exit_code, items[-1].next_offset) == ("succeeded", 0, 6 + len(big))
    assert isinstance(later[0], LogPiece) and (later[0].offset, later[0].data) == (4, b"t\n") and len(later) == 2


async def test_following_waits_for_the_first_attempt_and_goes_on_to_the_next_until_the_job_is_final(
    world: World,
) -> None:
    world.store.add(job_row(1))
    got: list[tuple[int, bytes | str | None]] = []
    async with world.serve(), Client(world.path) as client, aclosing(client.logs(1, follow=True)) as items:
        await start(world, 1)
        async for item in items:
            if isinstance(item, LogPiece):
                got.append((item.attempt, item.data))
                world.store.tries.setdefault(1, []).append(
                    attempt_row(1, item.attempt, Outcome.FAILED if item.attempt == 1 else Outcome.SUCCEEDED)
                )
                world.store.change(1, state=State.WAITING if item.attempt == 1 else State.SUCCEEDED)
                world.logs.finish(1, item.attempt)
            else:
                got.append((item.attempt, item.outcome))
                if item.attempt == 1:
                    await start(world, 2)
    assert got == [(1, b"try 1"), (1, "failed"), (2, b"try 2"), (2, "succeeded")]


async def start(world: World, attempt: int) -> None:
    world.store.change(1, state=State.RUNNING, attempt=attempt)
    world.logs.write(1, attempt, b"try %d" % attempt)


async def test_following_goes_on_where_it_was_after_an_outage(world: World) -> None:
    world.store.add(job_row(1, State.SUCCEEDED, attempt=1))
    world.logs.write(1, 1, b"one ")
    world.logs.write(1, 1, b"two")
    world.logs.finish(1, 1)
    world.logs.fail_once = StoreUnavailable("gone")
    async with world.serve(), Client(world.path) as client:
        items = [item async for item in client.logs(1, follow=True)]
    assert [item.data for item in items if isinstance(item, LogPiece)] == [b"one ", b"two"]
    assert world.logs.reads == [(1, 1, 0), (1, 1, 4)]


async def test_logs_by_step_and_what_is_not_there(world: World) -> None:
    spec = {**SPEC, "repository": {"url": "u", "commit": "c"}, "steps": [{"name": "a"}, {"name": "0"}]}
    world.store.add(job_row(1, State.SUCCEEDED, attempt=1), job_row(2))
    world.store.specs[1] = spec
    for step in range(3):
        world.logs.write(1, 1, b"%d" % step, step=step)
    async with world.serve(), Client(world.path) as client:

        async def data(**asked: Any) -> bytes:
            return b"".join([item.data async for item in client.logs(1, **asked) if isinstance(item, LogPiece)])

        assert [await data(step=step) for step in ("checkout", "a", "0", "1")] == [b"0", b"1", b"2", b"1"]
        with pytest.raises(InvalidInput, match="checkout, a, 0"):
            await data(step="zz")
        with pytest.raises(InvalidInput, match="1 to 1"):
            await data(attempt=2)
        with pytest.raises(UnknownJob):
            [item async for item in client.logs(3)]
        # A job that has not begun has no log yet; that is no error.
        assert [item async for item in client.logs(2)] == []


async def test_logs_of_a_job_of_this_host_need_no_database(world: World) -> None:
    world.store.away = True
    world.dispatcher.running = [running_job(1, attempt=3)]
    world.logs.write(1, 3, b"here")
    async with world.serve(), Client(world.path) as client:
        items = [item async for item in client.logs(1)]
        assert isinstance(items[0], LogPiece) and items[0].data == b"here"
        assert isinstance(items[1], LogEnd) and items[1].outcome is None and items[1].state is None
        with pytest.raises(StoreUnavailable):
            [item async for item in client.logs(2)]


# --- the host ---


async def test_status_says_what_is_wrong_in_words_and_needs_no_database(world: World) -> None:
    async with world.serve(), Client(world.path) as client:
        well = await client.status()
        assert well.ok and well.problems == [] and well.running == 0 and well.database.server == "18.0"
        assert set(well.actors) == {"root", "dispatcher", "keeper"} and well.isolation == {"uid": "own uid"}
        assert well.socket.path == world.path and well.socket.connections == 1
        world.store.away = True
        world.dispatcher.running = [running_job(1)]
        world.actors["keeper"].problems = ["the lease runs out in 20 s"]
        ill = await client.status()
        assert not ill.ok and ill.running == 1
        assert "connection refused" in ill.problems[0] and ill.problems[1] == "the lease runs out in 20 s"
        world.actors["keeper"].silent = True
        silent = await client.status()
        assert any("keeper did not answer" in problem for problem in silent.problems)


async def test_an_actor_that_ended_is_a_problem_not_an_error(world: World) -> None:
    async with world.serve(), Client(world.path) as client:
        world.dispatcher.mailbox.close()
        status = await client.status()
        assert status.running is None and any("dispatcher" in problem for problem in status.problems)


async def test_drain_waits_until_nothing_runs(world: World) -> None:
    world.dispatcher.running = [running_job(1)]
    async with world.serve(), Client(world.path) as client:
        assert await client.drain(deadline=60) == 1
        async with anyio.create_task_group() as tasks:
            left: list[int] = []

            async def drain() -> None:
                left.append(await client.drain(wait=True))

            tasks.start_soon(drain)
            while len(world.dispatcher.asked) < 2:
                await anyio.lowlevel.checkpoint()
            assert left == []
            world.dispatcher.running = []
        await client.resume()
        assert left == [0]
    assert world.dispatcher.asked == [AskDrain(60.0), AskDrain(None), AskResume()]


async def test_a_resume_ends_the_wait_of_a_drain(world: World) -> None:
    world.dispatcher.running = [running_job(1)]
    async with world.serve(), Client(world.path) as client, anyio.create_task_group() as tasks:
        left: list[int] = []

        async def drain() -> None:
            left.append(await client.drain(wait=True))

        tasks.start_soon(drain)
        while not world.dispatcher.asked:
            await anyio.lowlevel.checkpoint()
        await client.resume()
    assert left == [1]


async def test_reload_tells_what_changed_or_what_is_wrong(world: World) -> None:
    async with world.serve(), Client(world.path) as client:
        assert await client.reload() == {"roles.viewer": ["bob"]}
        world.reload_error = InvalidInput("lease.term", "is too short", "6 × renew")
        with pytest.raises(InvalidInput, match=r"lease\.term"):
            await client.reload()


async def test_hosts_actors_and_version(world: World) -> None:
    async with world.serve(), Client(world.path) as client:
        assert [host.name async for host in client.hosts()] == ["build1"]
        assert [actor.name async for actor in client.actors()] == ["root"]
        assert (await client.version()).interface == "io.bsup.Supervisor"


async def test_events_page_and_follow(world: World) -> None:
    world.store.happened = [EventRow(id=n, at=NOW, job=n, type="stop", detail={"by": "alice"}) for n in range(1, 701)]
    async with world.serve(), Client(world.path) as client:
        assert [event.id async for event in client.events()] == list(range(1, 701))
        assert [event.id async for event in client.events(after=698)] == [699, 700]
        got = []
        async with aclosing(client.events(after=699, follow=True)) as events:
            async for event in events:
                got.append(event.id)
                if event.id == 701:
                    break
                world.store.happened.append(EventRow(id=701, at=NOW, job=None, type="loss", detail={}))
    assert got == [700, 701]


async def test_a_fault_inside_is_told_with_a_reference_and_ends_nothing_else(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.reload_error = ZeroDivisionError("secret detail")
    async with world.serve(), Client(world.path) as client:
        with pytest.raises(InternalError) as caught:
            await client.reload()
        assert "secret detail" not in str(caught.value)
        reference = str(caught.value).split()[-1]
        assert any(reference in record.getMessage() and record.exc_info for record in caplog.records)
        assert (await client.version()).version


async def test_calls_that_change_something_are_logged_with_their_peer_and_without_the_spec(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "supervisor.control")
    world.store.add(job_row(1))
    async with world.serve(), Client(world.path) as client:
        await client.submit({**SPEC, "secrets": {"TOKEN": "hunter2"}}, key="k")
        [one async for one in client.stop([1], grace=3)]
        await client.status()
    lines = [record.getMessage() for record in caplog.records]
    assert any("alice (uid " in line and "calls Submit key=k" in line for line in lines)
    assert any("submitted job 2" in line for line in lines)
    assert any("calls Stop ids=[1] grace=3.0" in line for line in lines)
    assert not any("hunter2" in line or "Status" in line for line in lines)
