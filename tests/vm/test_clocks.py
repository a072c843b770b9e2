"""Wall clocks that step by an hour, forward and back, in the middle of work: a host's, PostgreSQL's, and both at once.

Two databases, the machine's own and one of this computer; each has a daemon in the machine and one beside it. When the
machine's clock steps, so does PostgreSQL's for the daemons of the first database, and its host's for one of each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import history
import pytest
import stamps
from guest import OWN_DSN, Guest, Wire, linked, own_server, told
from harness import until
from machine import Machine, now
from world import Load, World

from tests.conftest import require

pytestmark = [pytest.mark.slow, pytest.mark.root]

TERMS = (2.0, 15.0, 4.0)
HOUR = 3600.0
STEPS = (HOUR, -2 * HOUR, HOUR)
PLACES = ("machine", "beside")


def test_a_clock_that_steps_is_no_event(
    make_machine: Callable[..., Machine], make_world: Callable[[str], World], dsn: str, free_port: int
) -> None:
    """Invariants 1 to 5: no lease ends, no session begins anew, what is submitted runs at once; each job has one
    attempt."""
    link = linked(dsn)
    require("a PostgreSQL on a Unix socket", link is not None)
    assert link is not None
    machine = make_machine("vm").boot(links={5432: link[1]}, forward={free_port: 5432})
    own_server(machine)
    stepped = make_world(f"postgresql://postgres@127.0.0.1:{free_port}/bsup?sslmode=disable")
    steady = make_world(dsn)
    worlds = [stepped, steady]
    for world, name, its_dsn in ((stepped, "bsup", OWN_DSN), (steady, "bsup-2", link[0])):
        guest = Guest(machine, world, name, its_dsn).install(TERMS, labels=(PLACES[0],))
        Wire(guest)
        guest.start()
        beside = world.host(PLACES[1], slots=3, terms=TERMS, start=False)
        beside.config.write_text(beside.config.read_text().replace("slots =", f'labels = ["{PLACES[1]}"]\nslots =', 1))
        beside.start()
    before = [sessions(world) for world in worlds]

    lasting = [
        (world, world.submit(work(world, place, gate=world.root / "gate"))) for world in worlds for place in PLACES
    ]
    for world, job in lasting:
        world.until_stamped(job)
    with ExitStack() as loads:
        for world in worlds:
            loads.enter_context(Load(world, lambda n, world=world: work(world, PLACES[n % 2], ticks=n % 3), every=1.5))
        for step in STEPS:
            machine.step_clock(step)
            # Whoever took the step for a time that passed has ended or passed on what it held by then.
            later = now() + TERMS[1] + TERMS[2]
            for world, job in lasting:
                until(lambda: world.stamps_of(job)[-1].at > later, f"job {job} goes on", every=0.1)  # noqa: B023
    for world in worlds:
        (world.root / "gate").touch()
        machine.check(f"touch {world.root}/gate")
    for world, sessions_before in zip(worlds, before, strict=True):
        held = history.check(world)
        assert len(held.jobs) > 8
        told_of = {(job.state, job.attempt, job.losses, job.releases) for job in held.jobs.values()}
        assert told_of == {("succeeded", 1, 0, 0)}
        assert sessions(world) == sessions_before


def work(world: World, place: str, **job: Any) -> dict[str, Any]:
    return told(stamps.job(world.stamps, every=0.1, labels=[place], **job))


def sessions(world: World) -> set[tuple[Any, ...]]:
    return set(world.query("SELECT id, incarnation, host FROM bsup.session"))
