"""Finds and reads the configuration file, and says what holds on this host: file, environment and flags together.

Called by the commands. A flag beats the environment, the environment beats the file, the file beats the defaults.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from supervisor.cli.exits import CommandError, Exit
from supervisor.model.errors import BsupError, InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from supervisor.cli.connection import Connection
    from supervisor.model.settings import HostFacts, Settings

SYSTEM_FILE = "/etc/bsup/bsup.toml"


def file_of(args: Namespace) -> Path | None:
    """The configuration file that is named, or the system's if there is one; None: the defaults hold."""
    named = getattr(args, "config", None) or os.environ.get("BSUP_CONFIG")
    if not named and not os.path.exists(SYSTEM_FILE):
        return None
    from pathlib import Path  # only here: a command that needs no file starts without it

    return Path(named or SYSTEM_FILE)


def facts() -> HostFacts:
    """What "auto" means on this host, for this user."""
    from supervisor.model.settings import HostFacts

    uid = os.getuid()
    home = os.path.expanduser("~")
    return HostFacts(
        hostname=os.uname().nodename,
        cpus=len(os.sched_getaffinity(0)),
        root=uid == 0,
        runtime_dir=os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/bsup-{uid}",
        state_home=os.environ.get("XDG_STATE_HOME") or f"{home}/.local/state",
    )


def read(path: Path | None) -> Settings:
    """The settings as the file has them, "auto" not resolved. Raises CommandError that names the file and the key."""
    from supervisor.model.settings import Settings, decode

    if path is None:
        return Settings()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"can't read the configuration {path}: {error.strerror}", "name another one with --config", Exit.USAGE
        ) from None
    return checked(path, lambda: decode(data))


def checked(path: Path | None, make: Callable[[], Settings]) -> Settings:
    """``make()``, with the file named in its errors."""
    try:
        return make()
    except InvalidInput as error:
        raise in_file(path, error) from None


def in_file(path: Path | None, error: InvalidInput) -> InvalidInput:
    """The error, with the file named."""
    where = "" if path is None else f"{path}: "
    return InvalidInput(f"{where}{error.field}", error.problem, error.allowed)


def load(args: Namespace) -> Settings:
    """What holds for a daemon started with these arguments."""
    import msgspec

    from supervisor.model.settings import resolve

    path = file_of(args)
    settings = read(path)
    replace = msgspec.structs.replace
    if dsn := (getattr(args, "dsn", None) or os.environ.get("BSUP_DSN")):
        settings = replace(settings, database=replace(settings.database, dsn=dsn))
    if state := getattr(args, "state", None):
        settings = replace(settings, state=replace(settings.state, dir=os.path.abspath(state)))
    if socket := (getattr(args, "socket", None) or os.environ.get("BSUP_SOCKET")):
        settings = replace(settings, control=replace(settings.control, socket=os.path.abspath(socket)))
    if on_term := getattr(args, "on_term", None):
        settings = replace(settings, shutdown=replace(settings.shutdown, on_term=on_term))
    return checked(path, lambda: resolve(settings, facts()))


def socket_of(args: Namespace) -> str:
    """The socket that a command talks to. Reads the configuration only where nothing else names it."""
    named = getattr(args, "socket", None) or os.environ.get("BSUP_SOCKET")
    if named:
        return os.path.abspath(named)
    path = file_of(args)
    if path is not None and os.access(path, os.R_OK):
        configured = read(path).control.socket
        if configured:
            return configured
    system = "/run/bsup/control.sock"
    if os.getuid() == 0:
        return system
    own = f"{os.environ.get('XDG_RUNTIME_DIR') or f'/tmp/bsup-{os.getuid()}'}/bsup/control.sock"
    # The system's daemon serves users too: a user without a daemon of their own means that one.
    return own if os.path.exists(own) or not os.path.exists(system) else system


def max_frame(args: Namespace) -> int:
    """The largest call that the daemon takes, if its configuration can be read here."""
    from supervisor.protocol import MAX_FRAME

    try:
        path = file_of(args)
        return MAX_FRAME if path is None else read(path).control.max_frame
    except BsupError:
        return MAX_FRAME


def connect(args: Namespace) -> Connection:
    """A connection to the daemon that the arguments and the environment name."""
    from supervisor.cli.connection import Connection

    return Connection(socket_of(args))
