"""The wall clock of a daemon is set an hour ahead and an hour back while it works: nothing happens to its jobs.

The daemon runs under ``faketime``, whose file says how wrong the clock is and is changed while it runs. No other clock
is false, as none but the wall clock can be set; nor is the shepherd's, which begins with an environment of its own.
(Clocks of a whole host and of PostgreSQL: ``tests/vm``.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import history
import pytest
import stamps
from harness import alive, until
from world import Host, Load, World

from tests.conftest import require

pytestmark = pytest.mark.slow

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
HOUR = 3600.0
PATIENT = (0.5, 60.0, 5.0)


class Clock:
    """``env`` for a daemon that is to follow it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)
        self.env = {
            "LD_PRELOAD": str(LIBRARIES[-1]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            # Else it guesses wrong which clock a wait is for, and threads spin.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def set(self, hours: int) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{hours:+d}h\n")
        os.replace(fresh, self._file)


@pytest.fixture(autouse=True)
def _parts() -> None:
    require("faketime", bool(LIBRARIES))


def mixed(world: World, number: int) -> dict[str, Any]:
    """All with a limit of time that they keep, some of them tried again after a while."""
    if number % 4 == 3:
        return stamps.in_process(world.stamps, ticks=3, timeout=30)
    again = {"attempts": 2, "backoff": 0.2, "fail_first": 1} if number % 5 == 1 else {}
    return stamps.job(world.stamps, ticks=number % 3, timeout=30, steps=1 + number % 2, **again)


def is_preloaded(pid: int | None) -> bool:
    return "libfaketime" in Path(f"/proc/{pid}/maps").read_text()


def test_a_clock_that_is_stepped_in_mid_load(world: World) -> None:
    """An hour ahead, two back, two ahead and back again; with restarts, so that what runs is taken up at another time
    than that at which it began."""
    clock = Clock(world.root / "clock")
    host: Host = world.host("a", terms=PATIENT, slots=6, env=clock.env)
    assert is_preloaded(host.pid) and not is_preloaded(host.shepherd)
    gate = world.root / "gate"
    held = [world.run(gate=gate, timeout=300) for _ in range(2)]
    running = [world.until_stamped(job) for job in held]
    before = world.query("SELECT id FROM bsup.session WHERE dead_at IS NULL")
    with Load(world, lambda number: mixed(world, number), every=0.1):
        for hours in (1, -1, 1, 0):
            clock.set(hours)
            known = len(world.accepted)
            until(lambda: len(world.accepted) > known + 25, "a load")  # noqa: B023
            if hours == 1:
                host.kill()
                host.start()
            assert all(alive(stamp.pid) for stamp in running)
    gate.touch()
    found = history.check(world)
    assert {job.state for job in found.jobs.values()} == {"succeeded"}
    for attempt in found.attempts:
        if found.jobs[attempt.job].kind == "steps":
            assert attempt.outcome in history.TOLD, history.story(found, [attempt.job])
    assert [world.stamps_of(job)[-1].pid for job in held] == [stamp.pid for stamp in running]
    assert world.query("SELECT id FROM bsup.session WHERE dead_at IS NULL") == before
    (spread,) = world.query("SELECT extract(epoch FROM max(ended_at) - min(ended_at))::float8 FROM bsup.attempt")
    assert spread[0] > HOUR, "the clock did not step"
    print(f"{len(found.accepted)} jobs, told ends {spread[0]:.0f} s apart, none disturbed")
