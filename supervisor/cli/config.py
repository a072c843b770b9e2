"""``config check`` and ``config show``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from supervisor.cli.configuration import checked, facts, file_of, in_file, load, read
from supervisor.cli.exits import CommandError, Exit
from supervisor.cli.terminal import Terminal
from supervisor.model.errors import InvalidInput


def config(args: Namespace, terminal: Terminal) -> int:
    if args.file:
        args.config = args.file
    return _check(args, terminal) if args.action == "check" else _show(args, terminal)


def _check(args: Namespace, terminal: Terminal) -> int:
    """All that would end a daemon's start: its kinds are loaded too."""
    from supervisor import kinds
    from supervisor.model.settings import resolve

    path = file_of(args)
    settings = read(path)
    resolved = checked(path, lambda: resolve(settings, facts()))
    try:
        kinds.load(resolved.jobs.kinds)
    except InvalidInput as error:
        raise in_file(path, error) from None
    for problem in _files_missing(resolved.redact.values_file, *(c.password_file for c in resolved.git.credentials)):
        raise CommandError(f"{path}: {problem}", "the daemon reads it when it starts", Exit.USAGE)
    if terminal.json:
        terminal.object({"ok": True, "file": None if path is None else str(path)})
    else:
        terminal.line(f"{path}: ok" if path is not None else "no configuration file: the defaults hold, and are ok")
    return Exit.OK


def _files_missing(*paths: str | None) -> list[str]:
    return [f"{path} does not exist" for path in paths if path is not None and not Path(path).exists()]


def _show(args: Namespace, terminal: Terminal) -> int:
    """What holds on this host, every "auto" resolved; passwords masked."""
    import msgspec

    from supervisor.store.dsn import safe_dsn

    settings = load(args)
    dsns = {"dsn": settings.database.dsn, "listen_dsn": settings.database.listen_dsn}
    shown = {key: safe_dsn(dsn) for key, dsn in dsns.items() if dsn not in ("embedded", "")}
    settings = msgspec.structs.replace(settings, database=msgspec.structs.replace(settings.database, **shown))
    if terminal.json:
        terminal.object(msgspec.to_builtins(settings))
        return Exit.OK
    from supervisor.cli.toml_text import to_toml

    path = file_of(args)
    terminal.line(f"# {path if path is not None else 'no configuration file'}; with the environment and flags applied")
    terminal.text(to_toml(settings))
    return Exit.OK
