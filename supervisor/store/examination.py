"""Looks at each server that a DSN names, one by one, for ``bsup doctor``: changes nothing, and needs no daemon.

May import asyncpg, ``dsn`` and ``model``; the command line calls ``examine``. It asks every host by itself, as a
client that connects to whichever answers first would never tell that a standby is gone.
"""

from __future__ import annotations

import asyncio
import os
import time
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.store.dsn import Dsn, Host
from supervisor.store.statements import STATEMENTS

ROLES = ("bsup_submitter", "bsup_host", "bsup_reader")


class Standby(msgspec.Struct, frozen=True):
    """A replica as its primary tells it. ``lag``: seconds that its replay is behind."""

    name: str
    state: str
    sync_state: str
    lag: float


class ServerFacts(msgspec.Struct, kw_only=True):
    """One server. ``error`` is set where it could not be asked, and then nothing else is.

    ``skew``: its clock minus this machine's, seconds; ``uncertain``: half of the round trip in which that was asked.
    ``roles``: which of bsup's roles there are, and whether the user of the DSN has their rights.
    """

    address: str
    error: str | None = None
    version: str = ""
    version_number: int = 0
    in_recovery: bool = False
    skew: float = 0.0
    uncertain: float = 0.0
    user: str = ""
    database: str = ""
    synchronous_names: str = ""
    synchronous_commit: str = ""
    standbys: list[Standby] = []
    connections: int = 0
    max_connections: int = 0
    migrated: bool = False
    may_migrate: bool = False
    roles: dict[str, bool] = {}
    reads: bool = False
    writes: bool = False


async def examine(dsn: Dsn, timeout: float = 5.0) -> list[ServerFacts]:
    """The facts of every host of the DSN, in its order, asked all at once; an unreachable one is a fact too."""
    hosts: list[Host | None] = list(dsn.hosts) or [None]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(_ask(dsn, host, timeout)) for host in hosts]
    return [task.result() for task in asked]


async def _ask(dsn: Dsn, host: Host | None, timeout: float) -> ServerFacts:
    options = {key: value for key, value in dsn.options.items() if key != "target_session_attrs"}
    one = msgspec.structs.replace(dsn, hosts=() if host is None else (host,), options=options)
    address = "the default host" if host is None else str(host)
    try:
        async with asyncio.timeout(timeout):
            connection: Any = await asyncpg.connect(
                one.url(),
                server_settings={"application_name": "bsup doctor"},
                # A pooler may stand before it, where what was prepared by name is another session's.
                statement_cache_size=0,
            )
            try:
                return await _facts(address, connection)
            finally:
                await connection.close(timeout=1)
    except TimeoutError:
        return ServerFacts(address=address, error=f"no answer within {timeout:g} s")
    except OSError as error:
        # asyncio words it as "[Errno 111] Connect call failed ('127.0.0.1', 5432)"; the host is named already.
        said = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        return ServerFacts(address=address, error=said[:1].lower() + said[1:])
    except (asyncpg.PostgresError, asyncpg.InterfaceError, InvalidInput, ValueError) as error:
        return ServerFacts(address=address, error=str(error) or type(error).__name__)


async def _facts(address: str, connection: Any) -> ServerFacts:
    before = time.time()
    row = await connection.fetchrow(STATEMENTS["examine_server"].sql)
    after = time.time()
    now: datetime = row["now"]
    standbys = [] if row["in_recovery"] else await connection.fetch(STATEMENTS["examine_standbys"].sql)
    roles = await connection.fetch(STATEMENTS["examine_roles"].sql, list(ROLES))
    grants = {"reads": False, "writes": False}
    if row["migrated"]:
        grants = await connection.fetchrow(STATEMENTS["examine_grants"].sql)
    return ServerFacts(
        address=address,
        version=row["version"].split()[0],
        version_number=row["version_number"],
        in_recovery=row["in_recovery"],
        skew=now.timestamp() - (before + after) / 2,
        uncertain=(after - before) / 2,
        user=row["me"],
        database=row["database"],
        synchronous_names=row["synchronous_names"],
        synchronous_commit=row["synchronous_commit"],
        standbys=[Standby(s["name"], s["state"], s["sync_state"], s["lag"]) for s in standbys],
        connections=row["connections"],
        max_connections=row["max_connections"],
        migrated=row["migrated"],
        may_migrate=row["may_migrate"],
        roles={role["name"]: role["mine"] for role in roles},
        reads=grants["reads"],
        writes=grants["writes"],
    )
