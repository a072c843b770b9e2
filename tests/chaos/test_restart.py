"""Daemons that are restarted or die all at once while many jobs run: the jobs never notice.

Adoption is to take at most 2 seconds from the new daemon's readiness, with 50 jobs: the issue's bar.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import history
import pytest
import stamps
from harness import BSUP, alive, until
from world import PATIENT, Host, Load, World

from supervisor.client import Client

pytestmark = pytest.mark.slow

JOBS = 50
ADOPTED_WITHIN = 2.0
TALK = r"""
block=0123456789abcdefghijklmnopqrstuvwxyz
for k in 1 2 3 4 5 6; do block=$block$block; done
n=0
talk() {
    n=$((n + 1))
    echo "@NUMBER@ burst $n $block"
    echo "@NUMBER@ error $n" >&2
}
"""
"""2 KiB at a time, the same whatever job, attempt and host it is: what two runs wrote can be compared."""

BURSTS = 100


def talker(number: int, gate: Path) -> dict[str, Any]:
    """It writes its bursts, a few each quarter of a second until ``gate`` is there, then what is left of them."""
    talk = TALK.replace("@NUMBER@", str(number))
    slow = f"while [ ! -e {gate} ] && [ $n -lt {BURSTS // 2} ]; do talk; sleep 0.25; done\n"
    wait = f"while [ ! -e {gate} ]; do sleep 0.25; done\n"
    rest = f"while [ $n -lt {BURSTS} ]; do talk; done\nexit {number % 3}"
    return {"kind": "steps", "steps": [{"name": "talk", "run": talk + slow + wait + rest}]}


def digests(world: World, jobs: list[int]) -> list[dict[int, str]]:
    """The sha256 of each stream of the jobs' logs, in order of the jobs."""
    logs = history.read(world).logs
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for (job, attempt), log in logs.items():
        assert attempt == 1
        for (_, stream), data in log.items():
            found[job][stream] = hashlib.sha256(data).hexdigest()
    return [found[job] for job in jobs]


def phases(world: World, host: Host) -> dict[int, str]:
    """By the daemon's own word."""

    async def ask() -> dict[int, str]:
        async with Client(str(host.socket)) as client:
            return {job.id: str(job.phase) async for job in client.list(states=["running"])}  # type: ignore[list-item]

    return world.loop.run(ask())


def pids(host: Host) -> dict[str, tuple[int, int]]:
    """Each run's process and its start time, from the handles."""
    found = {}
    for file in (host.state / "runs").glob("*/0/started"):
        started = json.loads(file.read_text())
        found[file.parts[-3]] = started["pid"], started["start_time"]
    return found


def test_a_restart_with_fifty_running_jobs(world: World) -> None:
    """0 lost, 0 run again, the same pids, adopted within 2 s of readiness, logs as those of an undisturbed run. Once as
    an upgrade does it (SIGTERM, detach) and once by kill -9."""
    gate = world.root / "gate"
    host = world.host(slots=JOBS, terms=PATIENT, args=("--on-term", "detach"))
    gate.touch()
    undisturbed = [world.submit(talker(number, gate)) for number in range(JOBS)]
    world.settle()
    gate.unlink()

    disturbed = [world.submit(talker(number, gate)) for number in range(JOBS)]
    until(lambda: len(pids(host)) == JOBS, "all run")
    before = pids(host)
    for how in (signal.SIGTERM, signal.SIGKILL):
        assert host.process is not None
        host.process.send_signal(how)
        assert host.die() == (0 if how == signal.SIGTERM else -signal.SIGKILL)
        assert all(alive(pid) for pid, _ in before.values())
        host.start("--on-term", "detach")
        ready = time.monotonic()
        until(
            lambda: list(phases(world, host).values()).count("running") == JOBS,
            "all are taken up",
            ADOPTED_WITHIN,
            0.02,
        )
        print(f"{how.name}: {JOBS} jobs taken up {time.monotonic() - ready:.3f} s after readiness")
        assert pids(host) == before and all(alive(pid) for pid, _ in before.values())
    gate.touch()
    world.settle()
    found = history.read(world)
    assert [(a.attempt, a.exit_code, a.outcome) for a in found.attempts] == 2 * [
        (1, number % 3, "failed" if number % 3 else "succeeded") for number in range(JOBS)
    ]
    assert digests(world, disturbed) == digests(world, undisturbed)
    out = sum(len(found.logs[job, 1][0, history.OUT]) for job in disturbed)
    assert out > JOBS * BURSTS * 2000


def test_all_daemons_are_killed_at_once(world: World) -> None:
    """Back in time: every process job goes on. Away for longer than their terms: the fences end the jobs, which run
    again."""
    names, term = ("a", "b", "c"), 5.0
    for name in names:
        world.host(name, slots=4, terms=(0.5, term, 1.0))
    world.query("UPDATE bsup.kind SET loss_budget = 1000")
    hosts = list(world.hosts.values())
    with Load(world, lambda number: stamps.job(world.stamps, ticks=(2, 2, 30)[number % 3], every=0.1), every=0.1):
        for away in (0.0, 0.0, term + 1.0):
            until(lambda: sum(len(pids(host)) for host in hosts) >= 6, "they work")
            for host in hosts:
                assert host.process is not None
                host.process.kill()
            for host in hosts:
                host.die()
            ran = {pid for host in hosts for pid, _ in pids(host).values()}
            if away:
                until(lambda ran=ran: not any(map(alive, ran)), "the fences end the jobs", term + 5.0)  # type: ignore[misc]
                until(
                    lambda: not world.query("SELECT FROM bsup.session WHERE expires_at >= bsup.clock()"), "so are they"
                )
            for host in hosts:
                host.start(ready=False)
            for host in hosts:
                host.until_ready()
    found = history.check(world)
    lost = [attempt for attempt in found.attempts if attempt.outcome in ("lost", "superseded")]
    assert lost and {job.state for job in found.jobs.values()} == {"succeeded"}


def test_a_second_daemon_on_a_state_directory_is_refused(world: World) -> None:
    """In a line, before it harms anything; of two that begin at once one gets it."""
    first = world.host(terms=PATIENT)
    gate = world.root / "gate"
    job = world.run(gate=gate)
    pid = world.until_stamped(job).pid

    def rival(name: str) -> subprocess.Popen[bytes]:
        words = ["--config", str(first.config), "--dsn", world.dsn, "--state", str(first.state)]
        words += ["--socket", str(world.root / f"{name}.sock")]
        with (world.root / f"{name}.log").open("wb") as log:
            return subprocess.Popen([*BSUP, "daemon", *words], stdout=log, stderr=log, env=first.environment)

    second = rival("r")
    assert second.wait(30) == 1
    said = (world.root / "r.log").read_text()
    assert f"another bsup daemon runs on {first.state}" in said and "Traceback" not in said
    assert alive(pid) and first.is_up and not (world.root / "r.sock").exists()
    first.kill()
    both = [rival("r1"), rival("r2")]
    try:
        until(lambda: [p.poll() for p in both].count(1) == 1, "one of them is refused")
        gate.touch()
        found = history.check(world)
        assert world.stamps_of(job)[-1].pid == pid and len(found.attempts) == 1
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_a_clone_of_a_dead_daemons_state_begins_anew(world: World) -> None:
    """The image is made while no daemon lives and jobs run, and begins first: it takes neither the session nor the
    jobs, and harms no process. The original finds all as it was."""
    original = world.host(slots=8, terms=PATIENT)
    gate = world.root / "gate"
    held = [world.run(gate=gate) for _ in range(4)]
    before = [world.until_stamped(job).pid for job in held]
    original.kill()
    subprocess.run(["cp", "-a", str(original.state), str(world.root / "b")], check=True)
    clone = world.host("b", terms=PATIENT)
    other = world.run()
    world.settle([other])
    assert all(map(alive, before))
    assert [path.name for path in clone.state.glob("foreign.*")] == ["foreign.0"]
    original.start()
    gate.touch()
    found = history.check(world)
    assert [world.stamps_of(job)[-1].pid for job in held] == before
    assert {(a.job, a.host) for a in found.attempts} == {(job, "a") for job in held} | {(other, "b")}
