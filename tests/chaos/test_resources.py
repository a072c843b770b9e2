"""Jobs and clients that use a host up: its processes, memory, disk, open files, its capacity to log. The others go on.

What a job does to its host is seen in its neighbours: they run once, stamp at their pace and end as they should.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import history
import pytest
from harness import alive, until
from world import PATIENT, TERMS, Host, World, count_of

from supervisor.client import Client
from supervisor.model.settings import LeaseTerms

pytestmark = pytest.mark.slow

MIB = 1 << 20
PACE = LeaseTerms().renew
"""Seconds between two stamps of a neighbour, at most, as between two beats. It stamps ten a second when undisturbed."""

MOST_PROCESSES = 200
MOST_MEMORY = 256 * MIB
FLOOD = count_of("BSUP_CHAOS_FLOOD", ci=8)
"""Seconds for which a job logs as fast as it can."""

GROWTH = 96 * MIB
"""What it may cost the daemon, and the shepherd, in memory: a small part of what is written in this time."""

BOMB = ["prlimit", f"--nproc={MOST_PROCESSES}", "perl", "-e", "$SIG{TERM} = 'IGNORE'; while (1) { defined fork or select undef, undef, undef, 0.02 }"]  # fmt: skip  # noqa: E501
HOG = ["prlimit", f"--as={MOST_MEMORY}", "perl", "-e", "$x .= 'x' x 1048576 while 1"]


def harmful(world: World, run: list[str] | str, **spec: Any) -> int:
    """A job that stamps nothing; it is not among those that ``history`` holds."""
    job = world.submit({"kind": "steps", "steps": [{"name": "harm", "run": run}], **spec})
    world.accepted.remove(job)
    return job


def status_says(host: Host) -> str:
    status = host.status()
    return "" if status is None else "; ".join(status.problems)


def pace(world: World, job: int) -> float:
    """The longest time between two stamps of a job."""
    return max(b.at - a.at for a, b in pairwise(world.stamps_of(job)))


def hold_undisturbed(world: World, *neighbours: int) -> None:
    """All that was accepted has ended as it should; these ran once, and were never held up."""
    found = history.check(world)
    assert {job.state for id, job in found.jobs.items() if id in world.accepted} == {"succeeded"}
    for job in neighbours:
        assert [a.attempt for a in found.attempts if a.job == job] == [1]
        assert pace(world, job) < PACE


def processes_of(uid: int) -> int:
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                count += entry.stat().st_uid == uid and alive(int(entry.name))
    return count


def peak(pid: int) -> int:
    """The most that was ever resident, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_bombs_hogs_and_floods(world: World) -> None:
    """A fork bomb at its bound, of which a stop leaves nothing; a job that wants more memory than it may have; one that
    logs as fast as it can, whose cost in memory is bounded: one after another, beside the same neighbours."""
    host = world.host(slots=6, terms=PATIENT, config='[logs]\nmax_disk = "128MiB"\nmax_database = "8MiB"')
    notes = world.root / "notes"
    notes.mkdir()
    notes.chmod(0o777)
    gate = world.root / "gate"
    neighbours = [world.run(gate=gate, every=0.1), world.run(gate=gate, every=0.1)]
    for job in neighbours:
        world.until_stamped(job, "tick")

    bomb = harmful(
        world, ["sh", "-c", f'id -u > {notes}/uid.new; mv {notes}/uid.new {notes}/uid; exec "$@"', "-", *BOMB]
    )
    uid = int(until(lambda: (notes / "uid").exists() and (notes / "uid").read_text(), "the bomb is armed"))
    until(lambda: processes_of(uid) >= MOST_PROCESSES, "it is at its bound", every=0.1)
    beside = world.run()
    world.settle([beside])
    asked = time.monotonic()
    host.cli.run("stop", str(bomb), "--grace", "1s")
    world.settle([bomb])
    print(
        f"fork bomb: {MOST_PROCESSES} processes, gone {time.monotonic() - asked:.1f} s after the stop, with 1 s grace"
    )
    assert processes_of(uid) == 0
    assert world.state(bomb) == "canceled"

    hog = harmful(world, HOG)
    world.settle([hog])
    assert world.state(hog) == "failed"

    shepherd = host.shepherd
    assert shepherd is not None
    before = peak(host.pid), peak(shepherd)
    flood = harmful(world, f"timeout {FLOOD} yes 'what a job says, as fast as it can'; echo over >&2")
    until(lambda: world.state(flood) == "running", "it logs")
    while_it_logs = world.run()
    world.settle([while_it_logs])
    world.settle([flood])
    assert world.state(flood) == "succeeded"
    grew = peak(host.pid) - before[0], peak(shepherd) - before[1]
    print(f"flood of {FLOOD} s: the daemon grew {grew[0] / MIB:.1f} MiB, the shepherd {grew[1] / MIB:.1f} MiB")
    assert max(grew) < GROWTH
    assert host.shepherd == shepherd and host.is_up
    assert status_says(host) == ""
    gate.touch()
    hold_undisturbed(world, *neighbours, beside, while_it_logs)


@pytest.fixture
def small_disk(world: World) -> Iterator[Path]:
    """What will be the state directory of host ``a``: a file system of its own."""
    state = world.root / "a"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=0711", "bsup-chaos", str(state)], check=True)
    yield state
    world.close()
    subprocess.run(["umount", "-l", str(state)], check=True)
    shutil.rmtree(world.root)  # which could not go while this was mounted in it


def fill(state: Path, left: int) -> None:
    """So that this many bytes are free there."""
    found = os.statvfs(state)
    with (state / "ballast").open("ab") as file:
        free = found.f_bavail * found.f_frsize
        file.write(b"x" * (free - left))


def test_a_full_disk(world: World, small_disk: Path) -> None:
    """Below the mark nothing new is taken, and status says why; with not a byte left those that run go on, for longer
    than their term, also under a daemon that starts on the full disk, and lose no end; when there is room again all
    goes on by itself."""
    host = world.host(terms=TERMS, config='[state]\nmin_free = "16MiB"')
    gate = world.root / "gate"
    neighbours = [world.run(gate=gate, every=0.1), world.run(gate=gate, every=0.1)]
    for job in neighbours:
        world.until_stamped(job, "tick")
    fill(small_disk, left=8 * MIB)
    until(lambda: "state.min_free is 16MiB" in status_says(host), "status says it")
    late = [world.run() for _ in range(3)]
    fill(small_disk, left=0)
    full_since = time.monotonic()
    until(lambda: time.monotonic() > full_since + 1.5 * TERMS[1], "longer than the term")
    assert {world.state(job) for job in late} == {"ready"}
    assert {world.state(job) for job in neighbours} == {"running"}
    host.kill()
    host.start()
    assert {world.state(job) for job in neighbours} == {"running"}
    gate.touch()
    for job in neighbours:
        world.until_stamped(job, "end")
    (small_disk / "ballast").unlink()
    hold_undisturbed(world, *neighbours, *late)
    assert status_says(host) == ""


def test_out_of_file_descriptors(world: World) -> None:
    """Clients take all the files that the daemon may open: it refuses the next ones, takes no more jobs, and says so to
    those that it has; what runs goes on, for longer than its term. When they leave all goes on by itself."""
    host = world.host(terms=TERMS)
    gate = world.root / "gate"
    neighbours = [world.run(gate=gate, every=0.1), world.run(gate=gate, every=0.1)]
    for job in neighbours:
        world.until_stamped(job, "tick")
    client = Client(str(host.socket))
    world.loop.run(client.__aenter__())
    at_rest = len(os.listdir(f"/proc/{host.pid}/fd"))
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (at_rest + 30, at_rest + 30))
    with contextlib.ExitStack() as clients:

        def connect() -> bool:
            """Whether it was refused."""
            sock = clients.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(host.socket))
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                return b"files open" in sock.recv(4096)
            return False

        until(connect, "connections are refused", every=0)
        late = [world.run() for _ in range(3)]
        until(
            lambda: "files open, its limit is" in "; ".join(world.loop.run(client.status()).problems), "status says it"
        )
        since = time.monotonic()
        until(lambda: time.monotonic() > since + 1.5 * TERMS[1], "longer than the term")
        assert {world.state(job) for job in late} == {"ready"}
        assert {world.state(job) for job in neighbours} == {"running"}
    gate.touch()
    hold_undisturbed(world, *neighbours, *late)
    assert world.loop.run(client.status()).problems == []
    world.loop.run(client.__aexit__(None, None, None))
