"""Hosts in network namespaces, cut off from PostgreSQL: for less than their term, for more, or some connections only.

Nothing is refused where a network is cut: packets vanish, and whoever waits for an answer waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import history
import network
import pytest
import stamps
from harness import alive, until
from network import Network, Wire
from servers import Server, has_server
from world import Host, Load, World

from tests.conftest import require

pytestmark = pytest.mark.slow

MakeWorld = Callable[..., World]

TERMS = (0.5, 6.0, 1.5)
PATIENT = (1.0, 60.0, 5.0)
WITHIN = 10.0
"""Seconds in which work is to go on: the issue's bar."""


@pytest.fixture(autouse=True)
def _parts() -> None:
    require("root, ip, nft and nsenter", network.is_there())
    require("Debian's PostgreSQL 15", has_server())


def host(
    world: World, server: Server, wire: Wire, name: str, terms: tuple[float, float, float], *, slots: int = 8
) -> Host:
    made = world.host(name, slots=slots, terms=terms, prefix=wire.prefix, start=False)
    made.dsn = server.tcp(wire.database)
    return made.start()


def renewed_ago(host: Host) -> float:
    return float(host.status().actors["keeper"]["renewed_ago"])


def ends_within(world: World, what: str, since: float) -> None:
    """A job that is submitted now ends within the bar."""
    job = world.run()
    until(lambda: world.state(job) == "succeeded", f"work goes on: {what}", WITHIN)
    print(f"{what}: work went on after {time.monotonic() - since:.2f} s")


def test_a_host_that_is_cut_off(make_world: MakeWorld) -> None:
    """For less than its term: nothing happens. For more: its jobs are stopped before another host starts them."""
    with Network() as cables, Server(prefix=cables.prefix, address="*") as server:
        world = make_world(server.dsn)
        wires = {name: cables.join(name) for name in ("a", "b")}
        a = host(world, server, wires["a"], "a", TERMS, slots=4)
        gate = world.root / "gate"
        mine = [world.run(gate=gate, every=0.02) for _ in range(4)]
        first = {job: world.until_stamped(job) for job in mine}
        host(world, server, wires["b"], "b", TERMS)
        jobs = [*mine, *(world.run(gate=gate, every=0.02) for _ in range(2))]
        first = {job: world.until_stamped(job) for job in jobs}
        assert [job for job in jobs if first[job].host == "a"] == mine

        cables.cut(wires["a"])
        until(lambda: renewed_ago(a) > 2.5, "renewals fail", every=0.02)
        cables.heal(wires["a"])
        until(lambda: renewed_ago(a) < 1.0, "it is renewed", every=0.02)
        assert all(alive(first[job].pid) for job in jobs)
        assert {row[0] for row in world.query("SELECT count(*) FROM bsup.attempt")} == {0}

        cables.cut(wires["a"])
        for job in mine:
            world.until_stamped(job, attempt=2)
            assert not alive(first[job].pid)
        assert all(alive(first[job].pid) for job in jobs if job not in mine)
        cables.heal(wires["a"])
        gate.touch()
        until(lambda: a.status().actors["dispatcher"].get("reconciled"), "it is back")
        with Load(world, lambda _: stamps.job(world.stamps), every=0.05):
            until(
                lambda: any(stamp.host == "a" for job in world.accepted[6:] for stamp in world.stamps_of(job)),
                "a works",
            )
        found = history.check(world)
        told = {job: [(a.host, a.outcome) for a in found.attempts if a.job == job] for job in jobs}
        for job in jobs:
            assert told[job][-1] == ("b", "succeeded") and len(told[job]) == 1 + (job in mine)
            assert job not in mine or told[job][0] in (("a", "lost"), ("a", "superseded"))
        overlap = [gap for gap in history.gaps(found) if gap < 0.0]
        assert len(history.gaps(found)) == len(mine) and not overlap
        print(f"{len(mine)} jobs passed on, overlap 0; between two runs: {sorted(history.gaps(found))} s")


def test_the_network_is_a_black_hole_for_a_while(make_world: MakeWorld) -> None:
    """In the midst of work, for longer than any connection lasts, but less than the term: what had ended meanwhile is
    recorded, what ran runs on, and work goes on within 10 s of its return."""
    with Network() as cables, Server(prefix=cables.prefix, address="*") as server:
        world = make_world(server.dsn)
        wire = cables.join("a")
        a = host(world, server, wire, "a", PATIENT)
        gate = world.root / "gate"
        held = [world.run(gate=gate), world.run(gate=gate)]
        running = [world.until_stamped(job) for job in held]
        with Load(world, lambda number: stamps.job(world.stamps, ticks=number % 3), every=0.1):
            until(lambda: "succeeded" in world.states().values(), "it works")
            cables.cut(wire)
            before = set(server.backends("bsup"))
            # The server, too, has let go of what nobody answers to.
            until(lambda: not before & set(server.backends("bsup")), "the server's sessions of it are gone", 30)
            assert not a.status().database.available and all(alive(stamp.pid) for stamp in running)
            cables.heal(wire)
            ends_within(world, "the whole network, from its return", time.monotonic())
        gate.touch()
        found = history.check(world)
        assert {job.losses for job in found.jobs.values()} == {0}
        assert [world.stamps_of(job)[-1].pid for job in held] == [stamp.pid for stamp in running]


def test_connections_die_without_a_word(make_world: MakeWorld) -> None:
    """All that there are, in the midst of work, while new ones can be made (a firewall forgot them); then the one that
    listens alone, of a host at rest: in a black hole, and by the server's hand."""
    with Network() as cables, Server(prefix=cables.prefix, address="*") as server:
        world = make_world(server.dsn)
        a = host(world, server, cables.join("a"), "a", PATIENT)
        with Load(world, lambda number: stamps.job(world.stamps, ticks=number % 3), every=0.1):
            until(lambda: "succeeded" in world.states().values(), "it works")
            cables.kill_flows(port for _, port in server.backends("bsup"))
            ends_within(world, "all connections, from their loss", time.monotonic())
        world.settle()

        def ear() -> set[tuple[int, int]]:
            return set(server.backends("bsup", listening=True))

        for how in ("a black hole", "pg_terminate_backend"):
            until(lambda: a.status().database.listening and len(ear()) == 1, "the server knows of one that listens")
            ((pid, port),) = before = ear()
            since = time.monotonic()
            if how == "a black hole":
                cables.kill_flows([port])
            else:
                server.query(f"SELECT pg_terminate_backend({pid})")
            ends_within(world, f"the one that listens, {how}", since)
            left = WITHIN - (time.monotonic() - since)
            until(lambda: a.status().database.listening and ear() - before, "it listens again", left)  # noqa: B023
            print(f"the one that listens, {how}: another one after {time.monotonic() - since:.2f} s")
        found = history.check(world)
        assert {job.losses for job in found.jobs.values()} == {0}
