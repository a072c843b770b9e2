"""Things that die: a daemon for good, a daemon for a moment, PostgreSQL for a while. Nothing is lost, nothing runs
twice.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness import Daemon, alive, steps, until

from supervisor.store import embedded

Start = Callable[..., Daemon]


def stamped(folder: Path, wait: str) -> str:
    """A step that writes its pid under its attempt's number, waits as told, and stamps its end."""
    begin, end = f"echo $$ > {folder}/pid.$BSUP_ATTEMPT; echo begun $BSUP_ATTEMPT", f"date > {folder}/end.$BSUP_ATTEMPT"
    return f"{begin}; {wait}; {end}"


def shared(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def pid_in(file: Path) -> int:
    """The pid that a job wrote into a file, once it has."""
    return int(until(lambda: file.exists() and file.read_text().strip(), "the job runs"))


def test_a_dead_daemons_jobs_are_fenced_then_run_elsewhere(daemons: Start, short_dir: Path) -> None:
    """Invariants 1 to 3: the fence ends the first run before the reaper re-queues; one loss; never shown as queued
    before.
    """
    folder = shared(short_dir, "s")
    one = daemons("a")
    wait = (
        f"test $BSUP_ATTEMPT = 1 && sleep 1000; test -d /proc/$(cat {folder}/pid.1) && echo overlap > {folder}/overlap"
    )
    job = one.cli.submit(steps(f"{stamped(folder, wait)}; true"))
    pid = pid_in(folder / "pid.1")
    two = daemons("b")
    one.kill()
    while alive(pid):
        assert two.cli.state(job) == "running", "shown as queued while its process lived"
    assert two.cli.wait(job) == 0
    shown = two.cli.show(job)
    assert (shown["state"], shown["losses"], shown["host"]) == ("succeeded", 1, "b")
    assert [a["outcome"] for a in two.cli.attempts(job)] == ["lost", "succeeded"]
    assert not (folder / "overlap").exists()


def test_a_restarted_daemon_goes_on_with_its_jobs(daemons: Start, short_dir: Path) -> None:
    """Invariant 7: kill -9 and a new daemon on the same state: same process, one attempt, the log whole."""
    folder = shared(short_dir, "s")
    one = daemons("a")
    gate = folder / "gate"
    wait = f"while ! test -e {gate}; do sleep 0.1; done; echo after"
    job = one.cli.submit(steps(stamped(folder, wait), "echo second step"))
    pid = pid_in(folder / "pid.1")
    one.kill()
    assert alive(pid)
    one.start()
    assert alive(pid)
    gate.touch()
    assert one.cli.wait(job) == 0
    assert [a["outcome"] for a in one.cli.attempts(job)] == ["succeeded"]
    assert one.cli.raw(job) == b"begun 1\nafter\nsecond step\n"


def test_a_job_that_ends_while_no_daemon_lives_is_recorded_truly(daemons: Start, short_dir: Path) -> None:
    """The shepherd keeps the exit status; the next daemon records it, whatever it was."""
    folder = shared(short_dir, "s")
    one = daemons("a")
    gate = folder / "gate"
    job = one.cli.submit(steps(f"echo $$ > {folder}/pid; while ! test -e {gate}; do sleep 0.05; done; exit 9"))
    pid = pid_in(folder / "pid")
    one.kill()
    gate.touch()
    until(lambda: not alive(pid), "the job ended")
    one.start()
    assert one.cli.wait(job) == 9
    assert len(one.cli.attempts(job)) == 1


def test_detach_keeps_jobs_and_drain_waits_for_them(daemons: Start, short_dir: Path) -> None:
    """SIGTERM with --on-term detach leaves the job running; with drain the daemon ends after the job did."""
    folder = shared(short_dir, "s")
    one = daemons("a", args=("--on-term", "detach"))
    gate = folder / "gate"
    job = one.cli.submit(steps(f"echo $$ > {folder}/pid; while ! test -e {gate}; do sleep 0.05; done"))
    pid = pid_in(folder / "pid")
    assert one.stop() == 0
    assert alive(pid)
    one.start("--on-term", "drain")
    assert one.process is not None
    one.process.send_signal(signal.SIGTERM)
    until(lambda: "drain" in one.cli.run("status", check=False).stdout.decode().lower(), "status says it drains")
    gate.touch()
    assert one.process.wait(60) == 0
    two = daemons("b")
    assert two.cli.state(job) == "succeeded"
    assert len(two.cli.attempts(job)) == 1


def test_jobs_go_on_while_the_database_is_away(short_dir: Path) -> None:
    """Invariants 2, 4 and 9: for longer than half a term nothing is stopped, reaped or run twice; ends are recorded
    after.
    """
    folder = shared(short_dir, "s")
    server = short_dir / "server"
    server.mkdir()
    server.chmod(0o755)
    dsn = embedded.ensure_running(server)
    daemon = Daemon(short_dir, dsn, config="[lease]\nrenew = 1\nterm = 60\nmargin = 5\n")
    try:
        daemon.start()
        cli = daemon.cli
        gate = folder / "gate"
        wait = f"while ! test -e {gate}; do sleep 0.05; done"
        held = [cli.submit(steps(stamped(shared(folder, str(i)), wait))) for i in range(2)]
        pids = [pid_in(folder / str(i) / "pid.1") for i in range(2)]
        embedded.stop(server)
        until(lambda: not cli.lines("status")[0]["database"]["available"], "status says that the database is away")
        status = cli.run("status").stdout.decode()
        assert "database" in status and "away" in status
        assert all(alive(pid) for pid in pids)
        cli.run("stop", str(held[0]), "--kill", check=False)
        until(lambda: not alive(pids[0]), "a stop works without the database")
        assert alive(pids[1])
        gate.touch()
        until(lambda: not alive(pids[1]), "the other job ended")
        embedded.ensure_running(server)
        cli.wait(*held)
        assert [cli.state(job) for job in held] == ["canceled", "succeeded"]
        assert [len(cli.attempts(job)) for job in held] == [1, 1]
        assert [cli.show(job)["losses"] for job in held] == [0, 0]
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
        daemon.end_shepherd()
        embedded.stop(server)


def test_a_daemon_whose_socket_is_taken_begins_nothing(daemons: Start, short_dir: Path) -> None:
    """It says so in a line and ends; it takes no session, and so no jobs that it could not answer for."""
    first = daemons("a")
    second = Daemon(short_dir, first.dsn, name="b")
    second.socket = first.socket
    assert second.start(ready=False).process is not None
    assert second.process is not None
    assert second.process.wait(60) == 1
    assert second.tail().count("\n") <= 2
    assert f"another bsup daemon listens on {first.socket}" in second.tail()
    assert [host["name"] for host in first.cli.lines("hosts")] == ["a"]


def test_a_copy_of_a_state_directory_is_another_host(daemons: Start, short_dir: Path) -> None:
    """It begins a session of its own, and harms nothing of the original's, though both are on one machine."""
    folder = shared(short_dir, "marks")
    go = folder / "go"
    first = daemons("a")
    job = first.cli.submit(steps(stamped(folder, f"while [ ! -e {go} ]; do sleep 0.05; done")))
    pid = pid_in(folder / "pid.1")
    subprocess.run(["cp", "-a", str(first.state), str(short_dir / "b")], check=True)
    second = daemons("b")
    assert len({host["session"] for host in second.cli.lines("hosts")}) == 2
    assert alive(pid)
    go.touch()
    assert second.cli.wait(job) == 0
    assert second.cli.show(job)["attempt"] == 1
    assert [path.name for path in second.state.glob("foreign.*")] == ["foreign.0"]
