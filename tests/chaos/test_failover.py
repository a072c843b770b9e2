"""PostgreSQL fails over to its synchronous standby while hosts work: what was accepted and what had ended is there,
nobody is taken for dead, and work goes on within 30 s of the promotion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import history
import network
import pytest
import stamps
from harness import alive, until
from network import Network
from servers import Server, has_server
from world import Load, World

from tests.conftest import require

pytestmark = pytest.mark.slow

MakeWorld = Callable[..., World]

TERMS = (0.5, 30.0, 3.0)
WITHIN = 30.0
"""Seconds from the promotion in which work is to go on: the issue's bar."""
ATTRS = "target_session_attrs=read-write"


@pytest.fixture(autouse=True)
def _parts() -> None:
    require("root, ip, nft and nsenter", network.is_there())
    require("Debian's PostgreSQL 15", has_server())


def mixed(world: World, number: int) -> dict[str, Any]:
    if number % 4 == 3:
        return stamps.in_process(world.stamps, ticks=3)
    return stamps.job(world.stamps, ticks=number % 3, code=(0, 5)[number % 7 == 6], steps=1 + number % 2)


def sessions(world: World) -> set[tuple[Any, ...]]:
    return set(world.query("SELECT host, id, incarnation FROM bsup.session WHERE dead_at IS NULL"))


@pytest.mark.parametrize("how", ["its processes are killed", "its machine vanishes"])
def test_a_failover_in_mid_load(make_world: MakeWorld, how: str) -> None:
    """The DSN names both and asks for the one that takes writes; what the primary had acknowledged the standby has. A
    machine that vanishes refuses nothing: what is sent to it is not answered."""
    with Network() as cables:
        machine = cables.join("db")
        synchronous = {"synchronous_standby_names": "two", "synchronous_commit": "on"}
        with Server("one", prefix=machine.prefix, address=machine.address, port=5433, settings=synchronous) as primary:
            standby = primary.standby("two", port=5434, prefix=cables.prefix, address="127.0.0.1")
            until(lambda: "sync" in primary.query("SELECT sync_state FROM pg_stat_replication"), "it is synchronous")

            def fail() -> None:
                if how == "its machine vanishes":
                    cables.cut(machine)
                primary.kill()

            fail_over(make_world, cables, primary, standby, fail)


def fail_over(
    make_world: MakeWorld, cables: Network, primary: Server, standby: Server, fail: Callable[[], None]
) -> None:
    homes = f"{primary.home},{standby.home}"
    world = make_world(f"postgresql://postgres@/bsup?host={homes}&port=5433,5434&{ATTRS}")
    for name in ("a", "b"):
        made = world.host(name, terms=TERMS, prefix=cables.prefix, start=False)
        made.dsn = f"postgresql://postgres@{primary.address}:5433,{standby.address}:5434/bsup?{ATTRS}"
        made.start()
    gate = world.root / "gate"
    held = [world.run(gate=gate) for _ in range(2)]
    running = [world.until_stamped(job) for job in held]
    before = sessions(world)
    with Load(world, lambda number: mixed(world, number), every=0.05):
        until(lambda: list(world.states().values()).count("succeeded") > 20, "a load")
        fail()
        for host in world.hosts.values():
            until(lambda host=host: not host.status().database.available, "it is missed")  # type: ignore[misc]
        standby.promote()
        promoted = time.monotonic()
        known = len(world.accepted)

        def has_gone_on() -> bool:
            return any(world.state(job) in history.FINAL for job in world.accepted[known:])

        until(lambda: len(world.accepted) > known and has_gone_on(), "work goes on", WITHIN)
        print(f"work went on {time.monotonic() - promoted:.2f} s after the promotion")
        more = len(world.accepted) + 20
        until(lambda: len(world.accepted) > more, "a load")
    assert all(alive(stamp.pid) for stamp in running)
    gate.touch()
    found = history.check(world)
    assert sessions(world) == before, "a host lost its session"
    assert not [attempt for attempt in found.attempts if attempt.outcome in ("lost", "superseded")]
    assert {job.losses for job in found.jobs.values()} == {0}
    assert [world.stamps_of(job)[-1].pid for job in held] == [stamp.pid for stamp in running]
    ended = sum(run.code is not None for each in history.runs(found.stamps).values() for run in each)
    assert ended == sum(attempt.outcome in history.TOLD for attempt in found.attempts)
    print(f"{len(found.accepted)} jobs accepted, {ended} ends stamped and recorded, none reaped")
