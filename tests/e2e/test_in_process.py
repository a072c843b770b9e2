"""In-process kinds end to end: the built-in one and a user's own, with daemons that are killed, drained, detached."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from harness import Daemon, alive, steps, until

from supervisor.store import embedded

Start = Callable[..., Daemon]

QUICK = "[lease]\nrenew = 1\nterm = 6\nmargin = 1.5\n"
SECRET = "s3cr3t-Value-88"

GALLERY = """
import asyncio
import logging
import os
import time
from pathlib import Path

from supervisor.kinds import InProcessJob


async def thumbnail(job: InProcessJob) -> None:
    marks = Path(job.args["marks"])
    (marks / f"begun.{job.attempt}").write_text(str(job.id))
    while not (marks / "go").exists() and not job.stop_asked.is_set():
        await asyncio.sleep(0.02)
    if job.stop_asked.is_set():
        return
    (marks / f"ended.{job.attempt}").write_text(job.args["path"])


async def broken(job: InProcessJob) -> None:
    logging.getLogger("gallery").warning("logging in")
    raise ConnectionError(f"login with {job.secrets['TOKEN']} as {job.name} refused")


async def leave(job: InProcessJob) -> None:
    raise SystemExit(3)


async def block(job: InProcessJob) -> None:
    marks = Path(job.args["marks"])
    if job.attempt == 1:
        (marks / "pid").write_text(str(os.getpid()))
        time.sleep(1000)
    if Path("/proc", (marks / "pid").read_text()).exists():
        (marks / "overlap").touch()
"""


def noop(**job: Any) -> dict[str, Any]:
    return {"kind": "noop", **job}


@pytest.fixture
def gallery(short_dir: Path) -> dict[str, Any]:
    """What a daemon needs to know kinds of a user's own: a module on its path, and their names."""
    (short_dir / "gallery").mkdir()
    (short_dir / "gallery" / "jobs.py").write_text(GALLERY)
    kinds = {name: f"gallery.jobs:{name}" for name in ("thumbnail", "broken", "leave", "block")}
    entries = ", ".join(f'"{name}" = "{path}"' for name, path in kinds.items())
    path = os.pathsep.join([str(short_dir), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"config": f"{QUICK}[jobs]\ngrace = 5\nkinds = {{ {entries} }}\n", "env": {"PYTHONPATH": path}}


@pytest.fixture
def marks(short_dir: Path) -> Path:
    folder = short_dir / "marks"
    folder.mkdir()
    return folder


def thumbnail(marks: Path) -> dict[str, Any]:
    return {"kind": "thumbnail", "args": {"marks": str(marks), "path": "a.png"}}


def query(dsn: str, statement: str, *args: Any) -> list[asyncpg.Record]:
    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return list(await connection.fetch(statement, *args))
        finally:
            await connection.close()

    return asyncio.run(run())


def test_a_noop_succeeds_without_steps_and_with_an_empty_log(daemons: Start, dsn: str) -> None:
    """By the command and by SQL; its log is complete, and has nothing in it."""
    cli = daemons().cli
    [row] = query(dsn, "SELECT bsup.submit($1::jsonb)", json.dumps(noop(args={"sleep": 0.01}, name="by sql")))
    jobs = [cli.submit(noop()), int(row[0])]
    assert cli.wait(*jobs) == 0
    for job, name in zip(jobs, ("noop", "by sql"), strict=True):
        shown = cli.show(job)
        assert (shown["state"], shown["kind"], shown["name"], shown["exit_code"]) == ("succeeded", "noop", name, 0)
        (attempt,) = cli.attempts(job)
        assert (attempt["outcome"], attempt["steps"]) == ("succeeded", [])
        assert attempt["started_at"] is not None and attempt["ended_at"] is not None
        assert cli.raw(job) == b""
        assert cli.run("logs", str(job), "--follow").stdout == b""
    assert query(dsn, "SELECT 1 FROM bsup.step WHERE job_id = ANY($1)", jobs) == []


def test_bad_args_fail_once_and_a_kind_that_nobody_runs_is_refused(daemons: Start) -> None:
    cli = daemons().cli
    job = cli.submit(noop(args={"sleep": -1}, attempts=5))
    assert cli.wait(job) != 0
    shown = cli.show(job)
    assert (shown["state"], shown["reason"], len(cli.attempts(job))) == ("failed", "invalid", 1)
    assert "args.sleep" in shown["error"]
    refused = cli.run("submit", "-", stdin=json.dumps({"kind": "thumbnail"}), check=False)
    assert refused.returncode in (1, 2) and refused.stdout == b""
    for word in ("kind", "thumbnail", "noop", "steps"):
        assert word in refused.stderr.decode()


def test_a_killed_daemons_jobs_are_lost_once_and_run_again(daemons: Start) -> None:
    """Nobody but the daemon knew how far they were."""
    one = daemons(config=f"slots = 4\n{QUICK}")
    jobs = [one.cli.submit(noop(args={"sleep": 1000})) for _ in range(3)]
    begun_all(one, jobs)
    kept = one.cli.submit(steps("true"))
    assert one.cli.wait(kept) == 0
    one.kill()
    one.start()
    until(lambda: all(one.cli.show(job)["losses"] == 1 for job in jobs), "they are lost")
    begun_all(one, jobs)
    one.cli.run("stop", *map(str, jobs), "--kill", "--yes")
    one.cli.wait(*jobs)
    for job in jobs:
        assert [attempt["outcome"] for attempt in one.cli.attempts(job)] == ["lost", "canceled"]
        assert one.cli.show(job)["losses"] == 1


def test_a_host_that_is_gone_for_good_is_followed_by_another(daemons: Start, gallery: Any, marks: Path) -> None:
    one = daemons("a", **gallery)
    job = one.cli.submit(thumbnail(marks))
    until((marks / "begun.1").exists, "it runs")
    two = daemons("b", **gallery)
    one.kill()
    (marks / "go").touch()
    assert two.cli.wait(job) == 0
    shown = two.cli.show(job)
    assert (shown["state"], shown["losses"], shown["host"]) == ("succeeded", 1, "b")
    assert not (marks / "ended.1").exists() and (marks / "ended.2").read_text() == "a.png"


def test_a_drain_waits_for_them(daemons: Start, gallery: Any, marks: Path) -> None:
    one = daemons("a", **gallery, args=("--on-term", "drain"))
    job = one.cli.submit(thumbnail(marks))
    until((marks / "begun.1").exists, "it runs")
    assert one.process is not None
    one.process.send_signal(signal.SIGTERM)
    until(lambda: "drain" in one.cli.run("status", check=False).stdout.decode().lower(), "status says it drains")
    (marks / "go").touch()
    assert one.process.wait(60) == 0
    two = daemons("b")
    assert two.cli.state(job) == "succeeded" and len(two.cli.attempts(job)) == 1


def test_a_detach_gives_them_back_uncounted_and_leaves_processes_alone(
    daemons: Start, gallery: Any, marks: Path, short_dir: Path
) -> None:
    """For an upgrade: the next daemon begins them anew, and takes the processes up."""
    one = daemons("a", **gallery, args=("--on-term", "detach"))
    job = one.cli.submit(thumbnail(marks))
    until((marks / "begun.1").exists, "it runs")
    pid_file = short_dir / "pids"
    pid_file.mkdir()
    pid_file.chmod(0o1777)
    process = one.cli.submit(steps(f"echo $$ > {pid_file}/pid; while ! test -e {pid_file}/go; do sleep 0.05; done"))
    pid = int(until(lambda: (pid_file / "pid").exists() and (pid_file / "pid").read_text().strip(), "the step runs"))
    assert one.stop() == 0
    assert alive(pid) and "daemon" not in json.loads((one.state / "fence").read_text())
    one.start()
    until((marks / "begun.2").exists, "it runs again")
    for folder in (marks, pid_file):
        (folder / "go").touch()
    assert one.cli.wait(job, process) == 0
    assert [attempt["outcome"] for attempt in one.cli.attempts(job)] == ["released", "succeeded"]
    assert one.cli.show(job)["losses"] == 0
    assert [attempt["outcome"] for attempt in one.cli.attempts(process)] == ["succeeded"]


def test_a_kind_of_the_users_own_fails_without_telling_its_secret(daemons: Start, gallery: Any) -> None:
    """The error names what went wrong; the value is in no reply, no event, no journal, no file of the host."""
    daemon = daemons("a", **gallery)
    cli = daemon.cli
    job = cli.submit({"kind": "broken", "name": "sync", "secrets": {"TOKEN": SECRET}, "attempts": 2, "backoff": 0})
    assert cli.wait(job) != 0
    shown = cli.show(job)
    assert shown["state"] == "failed" and len(cli.attempts(job)) == 2
    assert shown["error"].startswith("ConnectionError: login with ") and shown["error"].endswith(" as sync refused")
    for words in (("show", str(job), "--json"), ("attempts", str(job), "--json"), ("events", "--json"), ("ps", "-a")):
        assert SECRET not in cli.run(*words).stdout.decode(), words
    assert "logging in" in daemon.tail() and SECRET not in daemon.tail()
    for file in daemon.state.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_handler_that_exits_ends_its_job_and_not_the_daemon(daemons: Start, gallery: Any) -> None:
    daemon = daemons("a", **gallery)
    job = daemon.cli.submit({"kind": "leave"})
    assert daemon.cli.wait(job) != 0
    assert "SystemExit" in daemon.cli.show(job)["error"]
    assert daemon.process is not None and daemon.process.poll() is None


def test_a_daemon_that_a_handler_blocks_is_killed_at_the_fence_before_another_runs_its_job(
    daemons: Start, gallery: Any, marks: Path
) -> None:
    """It can neither renew nor end the job, so the shepherd ends it: no job runs on two hosts at once."""
    two = daemons("b", config=QUICK)
    one = daemons("a", **gallery)
    job = two.cli.submit({"kind": "block", "args": {"marks": str(marks)}})
    until((marks / "pid").exists, "it blocks")
    assert one.process is not None and one.process.wait(60) == -signal.SIGKILL
    daemons("c", **gallery)
    assert two.cli.wait(job) == 0
    shown = two.cli.show(job)
    assert (shown["losses"], shown["host"], shown["attempt"]) == (1, "c", 2)
    assert not (marks / "overlap").exists()


def test_a_stop_is_heard(daemons: Start, gallery: Any, marks: Path) -> None:
    """It gives up well before the grace is over, and that is no success."""
    cli = daemons("a", **gallery).cli
    job = cli.submit(thumbnail(marks))
    until((marks / "begun.1").exists, "it runs")
    cli.run("stop", str(job), "--grace", "1h")
    cli.wait(job)
    assert cli.state(job) == "canceled" and not (marks / "ended.1").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('"thumbnail" = "gallery.jobs:thumb"', ["jobs.kinds.thumbnail", "no attribute 'thumb'"]),
        ('"thumbnail" = "no_such_gallery:thumbnail"', ["jobs.kinds.thumbnail", "no_such_gallery"]),
        ('"thumbnail" = "gallery.jobs"', ["jobs.kinds.thumbnail", "module:function"]),
        ('"thumbnail" = "os.path:join"', ["jobs.kinds.thumbnail", "coroutine function"]),
        ('"steps" = "supervisor.kinds:noop"', ["jobs.kinds.steps", "not a name"]),
    ],
)
def test_a_bad_kind_ends_the_start_in_a_line(short_dir: Path, gallery: Any, entry: str, words: list[str]) -> None:
    """It names the key; nothing is begun, and so nothing left running: no server, no session, no shepherd."""
    daemon = Daemon(short_dir, "embedded", config=f"[jobs]\nkinds = {{ {entry} }}\n", env=gallery["env"])
    assert daemon.start(ready=False).process is not None
    assert daemon.process is not None
    try:
        assert daemon.process.wait(60) in (1, 2)
    finally:
        daemon.process.kill()
        daemon.end_shepherd()
        left = {path.name for path in daemon.state.iterdir()}
        if "pg" in left:
            embedded.stop(daemon.state)
    said = daemon.tail()
    assert "Traceback" not in said and len(said.splitlines()) <= 3, said
    for word in words:
        assert word in said
    assert not {"pg", "session.json", "shepherd.pid"} & left


def begun_all(daemon: Daemon, jobs: list[int]) -> None:
    """By the daemon's own word: their handlers have begun."""

    def running() -> bool:
        return all(daemon.cli.show(job)["phase"] == "running" for job in jobs)

    until(running, "they run")
