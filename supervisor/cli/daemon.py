"""``daemon`` and ``migrate``: what needs the database itself and not a daemon. Imports the rest of bsup only when
called.
"""

from __future__ import annotations

from argparse import Namespace

from supervisor.cli.configuration import load
from supervisor.cli.exits import Exit
from supervisor.cli.terminal import Terminal


def daemon(args: Namespace, terminal: Terminal) -> int:
    settings = load(args)
    from supervisor.app import run_daemon

    terminal.flush()
    return run_daemon(settings, reload=lambda: load(args))


def migrate(args: Namespace, terminal: Terminal) -> int:
    """Applies what the schema lacks. An embedded server that does not run is started for it, and stopped again."""
    import asyncio

    from supervisor.store import embedded
    from supervisor.store.dsn import safe_dsn
    from supervisor.store.migrate import ensure_schema

    settings = load(args)
    dsn, state = settings.database.dsn, settings.state.dir
    is_ours = False
    if dsn == "embedded":
        is_ours = not embedded.status(state).running
        dsn = embedded.ensure_running(state)
    try:
        applied = asyncio.run(ensure_schema(dsn, True, connect_timeout=settings.database.connect_timeout))
    finally:
        if is_ours:
            embedded.stop(state)
    if terminal.json:
        terminal.object({"applied": applied})
        return Exit.OK
    for name in applied:
        terminal.line(f"applied {name}")
    terminal.line(f"{safe_dsn(dsn)}: the schema is up to date")
    return Exit.OK
