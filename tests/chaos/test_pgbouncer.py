"""PgBouncer in transaction mode between the hosts and PostgreSQL, with fewer connections than they have.

Each statement may run in another session of the server: what one connection prepared or set, another would meet there.
Everything works but LISTEN, for which there is ``database.listen_dsn``; without it hosts poll.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import history
import pytest
import stamps
from harness import until
from servers import Bouncer, Server, has_bouncer, has_server
from world import Host, Load, World

from supervisor.store.migrate import ensure_schema, migrations
from tests.conftest import require

pytestmark = pytest.mark.slow

MakeWorld = Callable[..., World]

SETTINGS = "statement_timeout,jit,plan_cache_mode,enable_seqscan,enable_bitmapscan,tcp_user_timeout,"
SETTINGS += "tcp_keepalives_idle,tcp_keepalives_interval,tcp_keepalives_count"
"""What bsup sets in a session of its own: a bouncer that is told to pass over them gives no sign of what it is."""

PATIENT = (1.0, 60.0, 5.0)
"""Nothing is to be lost here, however busy the machine is."""


@pytest.fixture(autouse=True)
def _parts() -> None:
    require("Debian's PostgreSQL 15", has_server())
    require("PgBouncer", has_bouncer())


def host(world: World, name: str, dsn: str, *, config: str = "") -> Host:
    made = world.host(name, terms=PATIENT, config=config, start=False)
    made.dsn = dsn
    return made.start()


@pytest.mark.parametrize("ignoring", ["", SETTINGS], ids=["refuses settings", "passes over settings"])
def test_all_but_listen_works_behind_it(make_world: MakeWorld, ignoring: str) -> None:
    """Two hosts under load, one of which is begun anew (its names for statements would be those of the one before)."""
    with Server() as server, Bouncer(server, ignoring=ignoring) as bouncer:
        server.query("CREATE DATABASE fresh")
        with ThreadPoolExecutor(1) as pool:
            fresh = ensure_schema(bouncer.dsn.replace("/bsup?", "/fresh?"), True)
            assert len(pool.submit(asyncio.run, fresh).result()) == len(migrations())
        world = make_world(server.dsn)
        a, b = host(world, "a", bouncer.dsn), host(world, "b", bouncer.dsn)

        def make(number: int) -> dict[str, object]:
            if number % 3 == 2:
                return stamps.in_process(world.stamps, ticks=2)
            return stamps.job(world.stamps, ticks=number % 4, code=(0, 7)[number % 5 == 4], steps=1 + number % 2)

        with Load(world, make, every=0.05):
            until(lambda: len(world.accepted) > 30, "a load")
            a.kill()
            a.start()
            more = len(world.accepted) + 30
            until(lambda: len(world.accepted) > more, "a load")
        gate = world.root / "gate"
        held = world.run(gate=gate)
        world.until_stamped(held)
        assert a.cli.submit(stamps.job(world.stamps)) > held
        b.cli.run("stop", str(held))
        found = history.check(world)
        assert found.jobs.pop(held).state == "canceled"
        assert {job.losses for job in found.jobs.values() if job.kind == "steps"} == {0}
        assert {attempt.host for attempt in found.attempts} == {"a", "b"}
        status = b.status()
        assert status.database.available and not status.database.listening
        assert "prepared statement" not in server.log, "names clashed"
        assert len(server.backends("bsup")) <= 3


def test_wake_ups_come_by_a_dsn_of_their_own(make_world: MakeWorld) -> None:
    """Hosts that poll once a minute find each job at once; the wake-up of a stop comes that way too."""
    with Server() as server, Bouncer(server) as bouncer:
        world = make_world(server.dsn)
        config = f'[database]\npoll = "1m"\nlisten_dsn = "{server.dsn}"\n'
        a = host(world, "a", bouncer.dsn, config=config)
        until(lambda: a.status().database.listening, "it listens")
        began = time.monotonic()
        for _ in range(3):
            world.settle([world.run()])
        took = time.monotonic() - began
        assert took < 30.0, "they were found by polling"
        history.check(world)
