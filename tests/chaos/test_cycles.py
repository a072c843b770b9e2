"""A daemon is started, does its work and is stopped, again and again: nothing is left of it.

Most cycles are in one process (``cycler``): descriptors, threads and tasks that a daemon forgets go with its process,
so that only there they add up. Some are processes of their own, as a user has them, for what outlives a process:
others, files, rows, cgroups. ``BSUP_CHAOS_CYCLES``: how many, of which one in ten is of the second kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import until
from world import HERE, PATIENT, Host, World, count_of

pytestmark = pytest.mark.slow

CYCLES = count_of("BSUP_CHAOS_CYCLES", ci=200)
APART = max(3, CYCLES // 10)
SETTLED = 12
"""Cycles after which what is made once is made: caches, spares, threads."""


def on_disk(host: Host) -> Counter[str]:
    """The files and directories of the host's state, by their kind: all but logs, of which each job leaves some."""
    found: Counter[str] = Counter()
    for folder, folders, files in os.walk(host.state):
        place = Path(folder).relative_to(host.state)
        if place.parts[:1] == ("logs",):
            continue
        found.update(f"{place.parts[0] if place.parts else '.'}/{kind}" for kind in ["d"] * len(folders))
        found.update(str(place / name) if not place.parts else f"{place.parts[0]}/f" for name in files)
    return found


def processes(host: Host) -> list[str]:
    """The command lines of all processes that have to do with the host's state directory, or run for it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = os.readlink(folder / "cwd")
        except OSError:
            continue
        if str(host.state) in line or where.startswith(str(host.state)):
            found.append(line)
    return found


def cgroups() -> set[str]:
    return {folder for folder, _, _ in os.walk("/sys/fs/cgroup") if "bsup" in folder}


def sessions(world: World) -> tuple[int, int]:
    """Rows of sessions and of leases."""
    [(held, leases)] = world.query("SELECT (SELECT count(*) FROM bsup.session), (SELECT count(*) FROM bsup.lease)")
    return held, leases


def nothing_is_left(world: World, host: Host, cgroups_before: set[str]) -> None:
    """Once the shepherd, which stays for a moment, is gone too."""
    assert sessions(world) == (0, 0)
    host.end()
    until(lambda: not processes(host), "no process is left")
    for name in ("runs", "work"):
        left = [entry.name for entry in (host.state / name).iterdir() if not entry.name.startswith(".")]
        assert left == [], name
    until(lambda: cgroups() <= cgroups_before, "no cgroup is left")


def test_in_one_process(world: World) -> None:
    """No descriptor, thread, task or child more than after the first few; nothing outside once it has ended."""
    cycles = max(SETTLED + 3, CYCLES - APART)
    host = world.host(terms=PATIENT, start=False)
    cgroups_before = cgroups()
    words = [str(host.config), world.dsn, str(host.state), str(host.socket), str(cycles)]
    done = subprocess.run(
        [sys.executable, str(HERE / "cycler.py"), *words],
        capture_output=True,
        text=True,
        env=host.environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["code"] for one in said] == [0] * cycles
    before, after = said[SETTLED - 1], said[-1]
    print(f"{cycles} cycles; after the last: {after}")
    for kind in ("descriptors", "threads", "tasks", "objects", "children"):
        assert after[kind] == before[kind], f"{kind} after {SETTLED} cycles and after {cycles}"
    assert after["tasks"] == 0 and after["children"] == 0
    [(jobs, ended)] = world.query(
        "SELECT (SELECT count(*) FROM bsup.job), (SELECT count(*) FROM bsup.finished WHERE state = 'succeeded')"
    )
    assert jobs - ended == (1 if (cycles - 1) % 3 == 1 else 0)
    if jobs == ended:
        nothing_is_left(world, host, cgroups_before)


def test_as_processes_of_their_own(world: World) -> None:
    """One shepherd serves them all, and has no more descriptors and children in the end than in the beginning."""
    host = world.host(terms=PATIENT, start=False)
    cgroups_before = cgroups()
    seen = []
    for cycle in range(APART):
        detach = cycle % 3 == 1
        host.start("--on-term", "detach" if detach else "drain")
        job = world.run(ticks=1)
        world.run_in_process(ticks=1)
        world.settle()
        if detach:
            world.until_stamped(world.run(ticks=4))
        assert host.stop() == 0
        if not detach:
            seen.append((sessions(world), on_disk(host), of_shepherd(host)))
        assert world.stamps_of(job)
    assert seen[-1] == seen[1]
    if APART % 3 == 2:
        host.start()
        world.settle()
        host.stop()
    nothing_is_left(world, host, cgroups_before)


def of_shepherd(host: Host) -> tuple[int, int, int]:
    """Its pid, and how many descriptors and children it has once it is at rest."""
    pid = host.shepherd
    assert pid is not None

    def counts() -> tuple[int, int, int]:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return pid, len(os.listdir(f"/proc/{pid}/fd")), len(children)

    before = counts()
    while (now := counts()) != before:
        before = now
    return now
