"""``doctor``: looks at everything the daemon depends on, and says how to mend what is wrong. Changes nothing.

A check is a function that returns findings; it never raises, so that one that meets the unexpected doesn't hide the
others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator

from supervisor.cli import doctor_database, doctor_host
from supervisor.cli.configuration import file_of, load, socket_of
from supervisor.cli.connection import Connection
from supervisor.cli.exits import CommandError, Exit
from supervisor.cli.findings import Finding, Level
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import plural
from supervisor.model.errors import BsupError
from supervisor.model.settings import Settings
from supervisor.protocol import StatusParams, StatusReply

_MARK = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


def doctor(args: Namespace, terminal: Terminal) -> int:
    worst = {level: 0 for level in Level}
    for finding in findings(args):
        worst[finding.level] += 1
        _say(terminal, finding)
        terminal.out.flush()
    if not terminal.json:
        terminal.line()
        if worst[Level.FAIL] or worst[Level.WARN]:
            parts = [plural(worst[Level.FAIL], "failure")] if worst[Level.FAIL] else []
            parts += [plural(worst[Level.WARN], "warning")] if worst[Level.WARN] else []
            terminal.line(", ".join(parts))
        else:
            terminal.line("all is well")
    return Exit.ERROR if worst[Level.FAIL] else Exit.OK


def findings(args: Namespace) -> Iterator[Finding]:
    """Every check's findings, in the order in which one would mend things."""
    try:
        settings = load(args)
    except BsupError as error:
        hint = error.hint if isinstance(error, CommandError) else "mend that key; `bsup config check` checks it again"
        yield Finding("config", Level.FAIL, str(error), hint)
        return
    path = file_of(args)
    yield Finding("config", Level.OK, f"{path} is valid" if path is not None else "no file: the defaults hold")
    checks: tuple[Callable[[Settings], list[Finding]], ...] = (
        doctor_database.database,
        doctor_host.docker,
        doctor_host.git,
        doctor_host.cgroups,
        doctor_host.isolation,
        doctor_host.disk,
        doctor_host.clock,
        doctor_host.journald,
    )
    for check in checks:
        yield from _guarded(check, settings)
    yield _socket(socket_of(args))


def _guarded(check: Callable[[Settings], list[Finding]], settings: Settings) -> list[Finding]:
    try:
        return check(settings)
    except Exception as error:  # what is wrong with a host is not known beforehand; the other checks must be heard
        return [
            Finding(
                check.__name__,
                Level.WARN,
                f"this check itself failed: {type(error).__name__}: {error}",
                "please report that",
            )
        ]


def _socket(path: str) -> Finding:
    try:
        with Connection(path) as daemon:
            status = daemon.call("Status", StatusParams(), StatusReply, timeout=10.0).status
    except CommandError as error:
        return Finding("socket", Level.WARN, str(error), error.hint)
    except BsupError as error:
        return Finding("socket", Level.WARN, f"a daemon answers on {path}, but: {error}", "ask an admin for a role")
    if status.problems:
        return Finding("socket", Level.WARN, f"the daemon says: {'; '.join(status.problems)}", "see `bsup status`")
    return Finding("socket", Level.OK, f"bsup {status.version} answers on {path} (pid {status.pid})")


def _say(terminal: Terminal, finding: Finding) -> None:
    if terminal.json:
        terminal.object(finding)
        return
    mark = terminal.paint(f"{finding.level:<4}", _MARK[finding.level])
    terminal.item(f"{mark}  {finding.check:<10} ", finding.text, 17)
    if finding.mend and finding.level is not Level.OK:
        terminal.item(f"                 {terminal.paint('→', 'cyan')} ", finding.mend, 19)
