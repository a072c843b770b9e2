"""A whole machine that stands still: for less than the margin, and for so long that another host took its jobs.

The machine's daemon and one on this computer share a database here. Stamps of both have this computer's time. A paused
machine does not know it was: its clocks stood, too. So the margin covers a pause, and after a longer one the work that
went on runs until the next renewal, which the database refuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import history
import pytest
import stamps
from guest import Guest, Wire, linked, told
from harness import until
from machine import Machine
from stamps import Stamp
from world import World

from tests.conftest import require

pytestmark = [pytest.mark.slow, pytest.mark.root]

RENEW, TERM, MARGIN = TERMS = (3.0, 20.0, 5.0)
SHORT = 0.75 * MARGIN


def test_a_paused_machine_runs_nothing_twice(
    make_machine: Callable[..., Machine], make_world: Callable[[str], World], dsn: str
) -> None:
    """Invariants 1 to 3 and 5. Pauses below the margin change nothing. One below the margin while the machine is cut
    off: the fence ends the jobs before the other host begins them. One that outlasts the term: the zombie's writes are
    refused, and its work has ended after its next renewal."""
    link = linked(dsn)
    require("a PostgreSQL on a Unix socket", link is not None)
    assert link is not None
    machine = make_machine("vm").boot(links={5432: link[1]})
    world = make_world(dsn)
    guest = Guest(machine, world, "bsup", link[0]).install(TERMS, slots=3)
    Wire(guest)
    guest.start()
    there, gate = is_of(machine), world.root / "gate"
    # The gate is this computer's: a job that waits for it ends here, and goes on in the machine.
    gate.touch()

    lasting = [world.submit(told(stamps.job(world.stamps, ticks=5, every=0.1, gate=gate))) for _ in range(2)]
    assert all(there(world.until_stamped(job)) for job in lasting)
    other = world.host("other", terms=TERMS)

    for _ in range(3):
        ticked = [len(world.stamps_of(job)) for job in lasting]
        pause(machine, SHORT)
        for job, before in zip(lasting, ticked, strict=True):
            until(lambda job=job, before=before: len(world.stamps_of(job)) > before + 5, "it goes on")
    assert world.query("SELECT job_id, attempt, outcome, reason, error FROM bsup.attempt") == []
    assert world.states() == dict.fromkeys(lasting, "running")

    machine.plug(network=False)
    pause(machine, SHORT)
    world.settle(lasting)
    held = history.check(world)
    assert [(job.losses, job.state) for job in held.jobs.values()] == [(1, "succeeded")] * 2
    gaps = history.gaps(held)
    assert len(gaps) == 2 and min(gaps) > 0
    print(f"cut off and paused for {SHORT} s: {min(gaps):.2f} s between the runs")
    machine.plug(network=True)
    other.end()

    until(lambda: renewed(world), "the machine's daemon is back, with a session anew")
    last = world.root / "last"
    last.touch()
    ending = world.submit(told(stamps.job(world.stamps, ticks=5, every=0.1, gate=last)))
    jobs = [ending, *(world.submit(told(stamps.job(world.stamps, ticks=5, every=0.1, gate=gate))) for _ in range(2))]
    assert all(there(world.until_stamped(job)) for job in jobs)
    other.start()
    # One job ends by itself as soon as the machine is awake, before the next renewal, as it is paused just after one.
    # Only its battery's clock tells that it slept.
    asleep = "$(( $(cat /sys/class/rtc/rtc0/since_epoch) - $(date +%s) ))"
    machine.check(f"(until [ {asleep} -gt 5 ]; do sleep 0.05; done; touch {last}) >/dev/null 2>&1 &")
    before = renewed(world)
    until(lambda: renewed(world) > before, "it renews", every=0.01)
    machine.pause()
    for job in jobs:
        assert not there(world.until_stamped(job, attempt=2))
    world.settle(jobs)
    woken = machine.resume()
    machine.until('test -z "$(ls /var/lib/bsup/runs)"', "the machine has ended its runs and cleaned up")
    overlaps = [max(stamp.at for stamp in world.stamps_of(job) if there(stamp)) - woken for job in jobs]
    print(f"paused for longer than the term: work went on for {max(overlaps):.2f} s after the wake-up")
    held = history.read(world)
    assert [v for v in history.violations(held) if v.rule != "overlap" or v.job not in jobs] == []
    for job in jobs:
        runs = history.runs(held.stamps)[job]
        assert [there(run.stamps[0]) for run in runs] == [True, False]
        assert (held.jobs[job].state, held.jobs[job].attempt, held.jobs[job].losses) == ("succeeded", 2, 1)
    # It ended with success before the daemon knew, and was not believed.
    assert history.runs(held.stamps)[ending][0].code == 0
    assert {a.outcome for a in held.attempts if a.job in jobs and a.attempt == 1} <= {"lost", "superseded"}


def is_of(machine: Machine) -> Callable[[Stamp], bool]:
    """Whether a stamp is of a run in the machine."""
    return lambda stamp: stamp.host.startswith(machine.boot_id)


def pause(machine: Machine, seconds: float) -> None:
    machine.pause()
    time.sleep(seconds)  # the fault itself
    machine.resume()


def renewed(world: World) -> Any:
    """When the machine's daemon renewed its session last; None: it has none."""
    rows = world.query("SELECT renewed_at FROM bsup.session WHERE host = 'bsup' AND dead_at IS NULL")
    return rows[0][0] if rows else None
