"""The power of a whole machine, cut in the middle of everything, and a job that takes its host with it each time it
runs.

The machine has it all: daemon, PostgreSQL, the jobs and their stamps, on one disk that keeps only what was synced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import history
import pytest
import stamps
from guest import OWN_DSN, Guest, Wire, own_server, told
from harness import until
from machine import Machine
from world import Load, World

pytestmark = [pytest.mark.slow, pytest.mark.root]

BUDGET = 3
"""Losses after which the job that kills its host has failed. From its second loss on it runs alone."""


def test_a_machine_whose_power_is_cut_loses_no_job_and_invents_no_end(
    make_machine: Callable[..., Machine], make_world: Callable[[str], World], free_port: int
) -> None:
    """Invariants 1 to 3 and 5 over four boots: each accepted job ends once and truly, or was counted as lost and ran
    again; what was recorded before the power went is still there; a job that kills its host fails after its budget, its
    neighbours don't."""
    machine = make_machine("vm").boot(forward={free_port: 5432})
    world = make_world(f"postgresql://postgres@127.0.0.1:{free_port}/bsup?sslmode=disable")
    own_server(machine)
    # The job is nobody's root: the machine lets it.
    guest = Guest(machine, world, "bsup", OWN_DSN).install((2, 20, 5), slots=3, before="chmod 222 /proc/sysrq-trigger")
    wire = Wire(guest)
    guest.start()
    machine.check("systemctl enable bsup")

    deadly = told(
        stamps.job(world.stamps, ticks=10_000, every=0.2, priority=255),
        then='[ "$BSUP_ATTEMPT" -gt 1 ] && echo c >/proc/sysrq-trigger',
    )

    def work(number: int) -> dict[str, Any]:
        return told(stamps.job(world.stamps, ticks=number % 5, every=0.1, steps=1 + number % 2, code=number % 3 % 2))

    with Load(world, work, every=0.3):
        until_ended(world, 4)
        world.query("UPDATE bsup.kind SET loss_budget = $1", BUDGET)
        killer = world.submit(deadly)
        world.query("UPDATE bsup.kind SET loss_budget = 5")
        world.until_stamped(killer)
        until_ended(world, 2)
        recorded = ends(world)
        machine.cut()
    for _ in range(BUDGET - 1):
        machine.boot(forward={free_port: 5432})
        machine.wait_for_end(120)
    machine.boot(forward={free_port: 5432})
    world.settle(deadline=180)
    late = wire.complete()
    held = history.check(world)
    assert recorded and recorded <= ends(world)

    ended = held.jobs[killer]
    assert (ended.state, ended.losses, ended.attempt) == ("failed", BUDGET, BUDGET)
    [(reason,)] = world.query("SELECT reason FROM bsup.finished WHERE job_id = $1", killer)
    assert reason == "losses"
    runs = history.runs(held.stamps)[killer]
    assert [run.stamps[0].host.partition("@")[0] for run in runs] == list(machine.ends)
    # As it ran alone the last time, nobody was lost by it more often than twice.
    others = [job for id, job in held.jobs.items() if id != killer]
    assert all(job.losses == job.attempt - 1 < BUDGET for job in others)
    print(f"{len(others)} neighbours, {sum(j.losses for j in others)} losses of theirs, {late} stamps the wire lost")


def ends(world: World) -> set[tuple[Any, ...]]:
    return set(world.query("SELECT job_id, state, exit_code, counter FROM bsup.finished"))


def until_ended(world: World, more: int) -> None:
    """Until ``more`` jobs than now have stamped an end."""

    def stamped() -> int:
        return sum(stamp.what == "end" for stamp in stamps.read(world.stamps))

    enough = stamped() + more
    until(lambda: stamped() >= enough, f"{more} more ends")
