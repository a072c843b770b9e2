"""``kill -9`` of daemons under load, again and again: at each named point in turn, and at random moments.

No job is lost, none runs twice at once, none is recorded twice; what ran goes on under the same pid, and ends with its
own exit code. ``BSUP_CHAOS_KILLS``: how many, both tests together.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import cycle
from typing import Any

import history
import pytest
import stamps
from world import Host, Load, World, count_of

from supervisor.failpoints import POINTS

pytestmark = pytest.mark.slow

KILLS = count_of("BSUP_CHAOS_KILLS", ci=30)

MOMENTS = ("any time", "starting")
"""Besides the points: while it works, and before it does."""

LONG = 3.0
"""Seconds that the longer jobs run: through several kills."""

CODES = (0, 0, 3, 0, 77)


def mixed(world: World, number: int) -> dict[str, Any]:
    """Short jobs and longer ones, of one step or three; some fail, some at first only; in-process ones among them."""
    if number % 5 == 4:
        return stamps.in_process(world.stamps, ticks=1 + number % 4)
    if number % 7 == 3:
        return stamps.job(world.stamps, ticks=int(LONG / 0.1), every=0.1)
    code = CODES[number % len(CODES)]
    again = {"attempts": 2, "backoff": 0.1, "fail_first": 1} if number % 6 == 1 else {}
    return stamps.job(world.stamps, ticks=number % 3, steps=1 + 2 * (number % 4 == 2), code=code, **again)


def uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Killer:
    """Kills and begins anew, with the next point armed. ``killed``: when, by the boot-time clock."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._whens = cycle([*POINTS, *MOMENTS, MOMENTS[0]])
        self.killed: list[float] = []

    def kill_once(self, host: Host, *, away: float = 0.0) -> None:
        """``host`` is down when this is called, and when it returns. ``away``: seconds before it begins."""
        when = next(self._whens)
        time.sleep(away)
        if when in POINTS:
            # What happens once a start is not waited for a second time.
            count = 1 if when == "resume-sent" else self._rng.randint(1, 5)
            host.start(ready=False, failpoints=f"{when}=kill:{count}")
            assert host.die() == -9, f"at {when}: {host.tail()}"
        else:
            host.start(ready=when != "starting")
            time.sleep(self._rng.uniform(0.0, 0.6))
            host.kill()
        self.killed.append(uptime())


def patient(world: World) -> None:
    """Jobs that are lost more often than a user's would be are to end by their own doing all the same."""
    world.query("UPDATE bsup.kind SET loss_budget = 1000")


def held(world: World) -> history.History:
    """The invariants, and each job's end is its own."""
    found = history.check(world, deadline=90)
    for job in found.accepted:
        ran = history.runs(found.stamps)[job][-1]
        assert found.jobs[job].state == ("succeeded" if ran.code == 0 else "failed"), history.story(found, [job])
    outcomes = Counter((found.jobs[attempt.job].kind, attempt.outcome) for attempt in found.attempts)
    print(f"{len(found.accepted)} jobs; attempts: {dict(outcomes)}; least gap {min(history.gaps(found), default=None)}")
    return found


def lived_through(found: history.History, moments: list[float]) -> int:
    """How many runs of processes were going on at one of these moments and ended well after it."""
    ran = [run for job, each in history.runs(found.stamps).items() if found.jobs[job].kind == "steps" for run in each]
    return sum(run.code is not None and any(run.began < moment < run.last for moment in moments) for run in ran)


def test_one_host_that_is_back_in_time_loses_nothing(world: World) -> None:
    """Every process job has one run for each attempt that its own exit codes asked for: not one was lost."""
    kills = max(1, KILLS // 2)
    # Long enough for a machine that is busy with other tests.
    host = world.host(slots=6, terms=(0.5, 60.0, 5.0))
    patient(world)
    host.kill()
    killer = Killer(seed=kills)
    with Load(world, lambda number: mixed(world, number), every=0.15):
        for _ in range(kills):
            killer.kill_once(host)
    host.start()
    found = held(world)
    assert len(killer.killed) == kills and lived_through(found, killer.killed) > 0
    for attempt in found.attempts:
        if found.jobs[attempt.job].kind == "steps":
            told = (attempt.outcome, attempt.reason)
            assert attempt.outcome in history.TOLD or told == ("released", "orphan"), history.story(
                found, [attempt.job]
            )


def test_two_hosts_one_of_which_is_always_dying(world: World) -> None:
    """Now and then one is away for longer than its term: its jobs pass to the other, never before they were ended."""
    kills = max(1, KILLS - KILLS // 2)
    term = 4.0
    hosts = [world.host(name, slots=4, terms=(0.5, term, 1.0)) for name in ("a", "b")]
    patient(world)
    killer = Killer(seed=kills)
    with Load(world, lambda number: mixed(world, number), every=0.15):
        for number in range(kills):
            host = hosts[number % 2]
            host.kill()
            is_long = number % 6 == min(3, kills - 1)
            killer.kill_once(host, away=term + 1.0 if is_long else 0.0)
            host.start()
    found = held(world)
    assert len(killer.killed) == kills and lived_through(found, killer.killed) > 0
    assert {attempt.host for attempt in found.attempts} == {"a", "b"}
    lost = [a for a in found.attempts if a.outcome in ("lost", "superseded") and found.jobs[a.job].kind == "steps"]
    assert lost, "no host was away for long enough"
