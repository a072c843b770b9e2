"""The runner of kind ``steps`` with a real shepherd: what a job sees, how ends are told, what is left on disk."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from checkout_world import World, git
from steps_bench import Bench, Ends, lease_of

from supervisor.model.errors import InvalidInput, RunnerError
from supervisor.runners.run_files import StepsSettings
from supervisor.runners.shepherd_client import ShepherdClient

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.root, id="uids"), pytest.param(0, id="shared")])
async def bench(request: pytest.FixtureRequest, short_tmp: Path) -> AsyncIterator[Bench]:
    """A runner whose jobs have a uid each (root only), and one whose jobs share the daemon's."""
    bench = Bench(short_tmp, uids=request.param)
    await bench.open()
    yield bench
    await bench.close()


def job(*steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"kind": "steps", "steps": list(steps), **keys}


def sh(command: str, name: str = "a", **keys: Any) -> dict[str, Any]:
    return {"name": name, "run": command, **keys}


async def test_steps_in_order_with_their_output_and_codes(bench: Bench) -> None:
    run = await bench.attempt(
        lease_of(
            job(
                {"name": "list", "run": ["printf", "%s|", "a b", "$HOME"]},
                sh("echo out; echo err >&2; exit 3", "fails"),
                sh("echo never", "skipped"),
                sh("echo always", "tidy", always=True),
            )
        )
    )
    assert run.codes == {"list": 0, "fails": 3, "tidy": 0}
    assert run.out == {"list": "a b|$HOME|", "fails": "out\n", "tidy": "always\n"}
    assert run.err["fails"] == "err\n"
    end = run.ends["fails"]
    assert (end.signal, end.cause, end.error) == (None, None, None)
    assert end.started_at is not None
    assert end.ended_at is not None
    assert end.started_at <= end.ended_at


async def test_environment_is_clean(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the daemon's but what the config passes; secrets, and the step's own last."""
    monkeypatch.setenv("DAEMON_ONLY", "x")
    monkeypatch.setenv("PASSED", "on")
    bench.runner.settings = StepsSettings(pass_env=("PASSED", "NOT_THERE"))
    lease = lease_of(
        job(sh("env", env={"TOKEN": "own", "N": 5}), sh("pwd; echo $TOKEN", "b"), secrets={"TOKEN": "s3cret", "X": "y"})
    )
    run = await bench.attempt(lease)
    env = dict(line.split("=", 1) for line in run.out["a"].splitlines() if "=" in line)
    assert env.pop("TMPDIR").startswith("/")
    assert len(env.pop("BSUP_RUN")) == 32
    src = bench.workspace(lease) / "src"
    expected = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(bench.workspace(lease) / "home"),
        "LANG": "C.UTF-8",
        "SHELL": "/bin/sh",
        "USER": "bsup",
        "LOGNAME": "bsup",
        "CI": "true",
        "BSUP": "1",
        "BSUP_JOB_ID": "41",
        "BSUP_JOB_NAME": "a",
        "BSUP_ATTEMPT": "2",
        "BSUP_STEP": "a",
        "BSUP_STEP_INDEX": "0",
        "BSUP_LEASE": str(lease.id),
        "BSUP_WORKSPACE": str(src),
        "PASSED": "on",
        "TOKEN": "own",
        "N": "5",
        "X": "y",
    }
    assert {name: value for name, value in env.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")} == expected
    assert run.out["b"] == f"{src}\ns3cret\n"


async def test_dir_is_below_the_checkout(bench: Bench) -> None:
    run = await bench.attempt(lease_of(job(sh("mkdir -p x/y"), sh("pwd", "b", dir="x/y"))))
    assert run.out["b"].endswith("/src/x/y\n")
    nowhere = await bench.attempt(lease_of(job(sh("pwd", dir="nowhere")), 2))
    assert nowhere.ends["a"].cause == "exec"
    assert "nowhere" in (nowhere.ends["a"].error or "")


async def test_command_not_found(bench: Bench) -> None:
    run = await bench.attempt(lease_of(job({"name": "a", "run": ["no-such-command"]})))
    end = run.ends["a"]
    assert (end.exit_code, end.cause) == (127, "exec")
    assert "no-such-command" in (end.error or "")


async def test_a_step_that_takes_too_long(bench: Bench) -> None:
    run = await bench.attempt(lease_of(job(sh("trap '' TERM; sleep 1000 & wait; sleep 1000", timeout="300ms"))))
    end = run.ends["a"]
    assert end.cause == "timeout"
    assert end.signal == signal.SIGKILL


async def test_stop_ends_it_with_all_it_started_and_is_told_once(bench: Bench) -> None:
    lease, ends = lease_of(job(sh("trap '' TERM; setsid sleep 1000 & echo up; sleep 1000"))), Ends()
    await bench.runner.prepare(lease)
    await bench.runner.start(lease.id, 0, ends.tell)
    await bench.runner.stop(lease.id, 0.1, False)
    end = await ends.of(0)
    assert end.cause == "stop"
    # Whatever is told or hinted later, the end was told.
    await bench.runner.stop(lease.id, 0.1, True)
    await bench.runner.discard(lease.id)
    assert ends.told == [end]


async def test_starting_twice_runs_once(bench: Bench) -> None:
    lease, ends = lease_of(job(sh("echo once >> ../once"))), Ends()
    await bench.runner.prepare(lease)
    first = await bench.runner.start(lease.id, 0, ends.tell)
    await ends.of(0)
    assert await bench.runner.start(lease.id, 0, ends.tell) == first
    assert (bench.workspace(lease) / "once").read_text() == "once\n"


async def test_prepare_again_gives_the_same_run(bench: Bench) -> None:
    lease = lease_of(job(sh("true"), timeout=5))
    plan = await bench.runner.prepare(lease)
    spec = (bench.state / "runs" / str(lease.id) / "spec").read_bytes()
    await bench.restart()
    assert await bench.runner.prepare(lease) == plan
    assert (bench.state / "runs" / str(lease.id) / "spec").read_bytes() == spec
    assert plan.timeout == 5


async def test_what_is_on_disk_is_the_daemon_s_alone_and_the_run_s_spec_holds_no_secret(bench: Bench) -> None:
    lease = lease_of(job(sh("true"), secrets={"T": "s3cret"}, files={"f": "x"}))
    await bench.attempt(lease)
    run_dir = bench.state / "runs" / str(lease.id)
    assert "s3cret" not in (run_dir / "spec").read_text()
    for path in (run_dir, *run_dir.rglob("*")):
        assert not path.stat().st_mode & 0o077 or stat.S_ISFIFO(path.stat().st_mode), path


async def test_a_secret_whose_value_is_gone(bench: Bench) -> None:
    lease = lease_of(job(sh("true"), secrets={"T": "s3cret"}))
    lease.secrets.clear()
    with pytest.raises(InvalidInput, match="T are gone"):
        await bench.runner.prepare(lease)


async def test_checkout_comes_first_and_its_tree_becomes_the_job_s(bench: Bench, world: World) -> None:
    origin = world.repository()
    commit = git(origin, "rev-parse", "HEAD")
    lease = lease_of(
        job(
            sh("stat -c %u . README .git/config lib | sort -u; id -u; git rev-parse HEAD; cat new", "look"),
            sh("echo more > lib/more; git status --porcelain", "write"),
            repository={"url": str(origin), "commit": "main"},
            files={"new": "mine\n"},
        )
    )
    run = await bench.attempt(lease)
    assert [step.name for step in run.plan.steps] == ["checkout", "look", "write"]
    assert set(run.codes.values()) == {0}, run.err
    assert f'Checked out {commit[:7]} "first"' in run.out["checkout"]
    owner, *rest = run.out["look"].splitlines()
    assert rest == [owner, commit, "mine"]
    assert (owner == "0") == (bench.uids == 0 and os.getuid() == 0)
    assert run.out["write"] == "?? lib/more\n?? new\n"
    assert any((bench.state / "mirrors").iterdir())


async def test_checkout_that_fails_says_why_and_always_steps_still_own_the_workspace(bench: Bench) -> None:
    lease = lease_of(
        job(
            sh("echo never", "build"),
            sh("echo x > here && echo tidy", "tidy", always=True),
            repository={"url": "/nowhere/at/all", "commit": "main"},
        )
    )
    run = await bench.attempt(lease)
    assert run.codes == {"checkout": 1, "tidy": 0}
    error = run.ends["checkout"].error or ""
    assert "/nowhere/at/all: the repository doesn't exist" in error
    assert run.err["checkout"].splitlines()[-1] == f"error: {error}"
    assert run.out["tidy"] == "tidy\n"


async def test_a_job_s_files_can_t_leave_through_a_link(bench: Bench, world: World) -> None:
    origin = world.repository()
    os.symlink(bench.state.parent, origin / "link")
    world.commit(origin, {}, "link")
    lease = lease_of(
        job(sh("true"), repository={"url": str(origin), "commit": "main"}, files={"link/bsup-was-here": "x"})
    )
    run = await bench.attempt(lease)
    assert "files['link/bsup-was-here']: leads through the symbolic link" in (run.ends["checkout"].error or "")
    assert not (bench.state.parent / "bsup-was-here").exists()


async def test_discard_leaves_nothing_and_kept_workspaces_are_no_handles(bench: Bench) -> None:
    gone, kept = lease_of(job(sh("echo x > f")), 1), lease_of(job(sh("echo x > f"), keep_workspace=True), 2)
    for lease in (gone, kept):
        await bench.attempt(lease)
    assert await bench.runner.handles() == [gone.id, kept.id]
    for lease in (gone, kept, gone):
        await bench.runner.discard(lease.id)
    assert await bench.runner.handles() == []
    assert not bench.workspace(gone).exists()
    assert (bench.workspace(kept) / "src/f").read_text() == "x\n"
    assert (bench.workspace(kept) / "src/f").stat().st_uid == os.getuid()
    assert list((bench.state / "runs").iterdir()) == []


@pytest.mark.root
async def test_each_job_has_a_uid_until_it_is_discarded(short_tmp: Path) -> None:
    """Two jobs never share one; none free is an error; a restart knows which are taken."""
    bench = Bench(short_tmp, uids=2)
    await bench.open()
    leases = [lease_of(job(sh("id -u")), number) for number in (1, 2, 3)]
    first = await bench.attempt(leases[0])
    await bench.restart()
    second = await bench.attempt(leases[1])
    # Which ones depends on the other shepherds of this machine: each has a range of its own.
    uids = [int(taken.out["a"]) for taken in (first, second)]
    assert abs(uids[0] - uids[1]) == 1
    assert min(uids) >= 200_000
    with pytest.raises(RunnerError, match="all 2 users for jobs are taken"):
        await bench.runner.prepare(leases[2])
    await bench.runner.discard(leases[0].id)
    third = await bench.attempt(leases[2])
    assert third.out["a"] == first.out["a"]
    assert str(min(uids)) in bench.runner.isolation()["users"]
    await bench.close()


@pytest.mark.root
async def test_a_job_can_t_read_another_s_workspace_or_the_mirrors(short_tmp: Path, world: World) -> None:
    bench = Bench(short_tmp, uids=2)
    await bench.open()
    origin = world.repository()
    one = lease_of(job(sh("echo private > f"), repository={"url": str(origin), "commit": "main"}), 1)
    await bench.attempt(one)
    spy = f"cat {bench.workspace(one)}/src/f; ls {bench.state}/mirrors {bench.state}/runs; echo done"
    run = await bench.attempt(lease_of(job(sh(spy)), 2))
    assert run.out["a"] == "done\n"
    await bench.close()


async def test_a_new_daemon_takes_up_what_runs(bench: Bench) -> None:
    """Ended steps with their ends, the running one told later, what never started left out."""
    lease = lease_of(job(sh("exit 0"), sh("until [ -e ../go ]; do sleep 0.05; done; exit 7", "b"), sh("true", "c")))
    ends = Ends()
    await bench.runner.prepare(lease)
    await bench.runner.start(lease.id, 0, ends.tell)
    await ends.of(0)
    started = await bench.runner.start(lease.id, 1, ends.tell)
    await bench.restart()
    later = Ends()
    taken = await bench.runner.adopt(lease.id, later.tell)
    assert taken is not None
    assert [(step.index, step.end is not None) for step in taken] == [(0, True), (1, False)]
    assert taken[0].end == ends.told[0]
    assert taken[1].started_at == started
    assert taken[0].age is not None and taken[1].age is not None and 0.0 < taken[1].age < taken[0].age
    (bench.workspace(lease) / "go").touch()
    assert (await later.of(1)).exit_code == 7
    assert len(ends.told) == 1
    await bench.runner.start(lease.id, 2, later.tell)
    assert (await later.of(2)).exit_code == 0


async def test_a_step_that_ended_while_no_daemon_was_there(bench: Bench) -> None:
    lease = lease_of(job(sh("until [ -e ../go ]; do sleep 0.05; done; exit 7")))
    await bench.runner.prepare(lease)
    await bench.runner.start(lease.id, 0, Ends().tell)
    await bench.close()
    closed = anyio.Event()
    alone = ShepherdClient(bench.state, uid_count=bench.uids)
    alone.on_hint(lambda kind, _: closed.set() if kind == "closed" else None)
    await alone.connect()
    (bench.workspace(lease) / "go").touch()
    with anyio.fail_after(30):
        await closed.wait()
    await alone.aclose()
    await bench.restart()
    taken = await bench.runner.adopt(lease.id, Ends().tell)
    assert taken is not None
    assert taken[0].end is not None
    assert taken[0].end.exit_code == 7


async def test_adopting_what_is_not_here(bench: Bench) -> None:
    assert await bench.runner.adopt(lease_of(job(sh("true"))).id, Ends().tell) is None


async def test_a_job_goes_on_when_the_shepherd_is_killed(bench: Bench) -> None:
    lease, ends = lease_of(job(sh("until [ -e ../go ]; do sleep 0.01; done; exit 7"))), Ends()
    await bench.runner.prepare(lease)
    await bench.runner.start(lease.id, 0, ends.tell)
    status = await bench.client.status()
    os.kill(int(status["pid"]), signal.SIGKILL)
    with anyio.fail_after(30):
        assert (await bench.client.status())["pid"] != status["pid"]
    (bench.workspace(lease) / "go").touch()
    assert (await ends.of(0)).exit_code == 7


async def test_shepherd_and_guardian_killed_is_a_loss(bench: Bench) -> None:
    """Nobody saw how it ended: ``gone``, never an exit code that was made up."""
    lease, ends = lease_of(job(sh("sleep 1000"))), Ends()
    await bench.runner.prepare(lease)
    await bench.runner.start(lease.id, 0, ends.tell)
    status = await bench.client.status()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (int(status["pid"]), int(status["guardian"])):
            os.kill(pid, number)
    end = await ends.of(0)
    assert (end.cause, end.exit_code, end.signal) == ("gone", None, None)
