"""PostgreSQL dies and comes back: a backend, the whole server, and everything at once with the daemons."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import history
import pytest
import stamps
from harness import alive, until
from servers import Server, children, has_server
from world import Load, World

from tests.conftest import require

pytestmark = pytest.mark.slow

MakeWorld = Callable[..., World]

PATIENT = (0.5, 30.0, 3.0)
TERMS = (0.5, 6.0, 1.5)
WITHIN = 30.0
"""Seconds in which work is to go on: the issue's bar."""


@pytest.fixture(autouse=True)
def _parts() -> None:
    require("Debian's PostgreSQL 15", has_server())


def test_the_server_dies_in_mid_load_and_comes_back(make_world: MakeWorld) -> None:
    """A backend is killed, so that PostgreSQL ends all others and recovers; an immediate stop; kill -9 of all of it.
    Nothing is lost, no end goes unrecorded, and no host is taken for dead."""
    with Server() as server:
        world = make_world(server.dsn)
        for name in ("a", "b"):
            world.host(name, terms=PATIENT)
        gate = world.root / "gate"
        held = [world.run(gate=gate), world.run(gate=gate)]
        running = [world.until_stamped(job) for job in held]

        def crash_a_backend() -> None:
            before = children(server.pid)
            os.kill(server.backends("bsup")[0][0], signal.SIGKILL)
            until(lambda: not set(before) & set(children(server.pid)), "it ends all others")
            server.until_ready()

        def stop_and_start() -> None:
            server.stop_immediately()
            server.start()

        def kill_and_start() -> None:
            server.kill()
            server.start()

        with Load(world, lambda number: stamps.job(world.stamps, ticks=number % 3, steps=1 + number % 2), every=0.05):
            for how in (crash_a_backend, stop_and_start, kill_and_start):
                known = len(world.accepted)
                until(lambda: len(world.accepted) > known + 10, "a load")  # noqa: B023
                how()
                since, known = time.monotonic(), len(world.accepted)

                def has_gone_on() -> bool:
                    return any(world.state(job) in history.FINAL for job in world.accepted[known:])  # noqa: B023

                until(lambda: len(world.accepted) > known and has_gone_on(), "work goes on", WITHIN)  # noqa: B023
                print(f"{how.__name__}: work went on after {time.monotonic() - since:.2f} s")
        assert all(alive(stamp.pid) for stamp in running)
        gate.touch()
        found = history.check(world)
        assert {job.losses for job in found.jobs.values()} == {0}
        assert {attempt.outcome for attempt in found.attempts} <= {*history.TOLD, "released"}
        assert [world.stamps_of(job)[-1].pid for job in held] == [stamp.pid for stamp in running]


def test_all_daemons_and_the_server_die_at_once(make_world: MakeWorld) -> None:
    """Begun again in time, all goes on as it was, and what ended while nobody was there to hear of it is recorded as it
    was. Begun again after the fences, what they ended runs again."""
    with Server() as server:
        world = make_world(server.dsn)
        hosts = [world.host(name, slots=6, terms=TERMS) for name in ("a", "b")]
        for in_time in (True, False):
            quick, gate = world.root / f"quick-{in_time}", world.root / f"gate-{in_time}"
            ending = [world.run(gate=quick, code=code) for code in (0, 7)]
            lasting = [world.run(gate=gate) for _ in range(4)]
            first = {job: world.until_stamped(job) for job in (*ending, *lasting)}
            for host in hosts:
                assert host.process is not None
                host.process.kill()
            server.kill()
            quick.touch()
            for job in ending:
                world.until_stamped(job, "end")
            for host in hosts:
                host.die()
            if not in_time:
                until(lambda: not any(alive(first[job].pid) for job in lasting), "the fences end them")  # noqa: B023
            server.start()
            for host in hosts:
                host.start(ready=False)
            for host in hosts:
                host.until_ready()
            if not in_time:
                for job in lasting:
                    world.until_stamped(job, attempt=2)
            gate.touch()
            world.settle()
            found = history.check(world)
            told = {job: [a.outcome for a in found.attempts if a.job == job] for job in first}
            assert in_time is all(told[job] == ["succeeded"] for job in lasting)
            if in_time:
                assert [told[job] for job in ending] == [["succeeded"], ["failed"]]
            else:
                # Released: its daemon was back between the fence and the end of the term, and knew who had ended it.
                assert {told[job][0] for job in lasting} <= {"lost", "superseded", "released"}
                assert {tuple(told[job][1:]) for job in lasting} == {("succeeded",)}
            print(f"{'in time' if in_time else 'too late'}: {told}")
