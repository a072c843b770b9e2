"""What an attempt's log is made with, whichever daemon makes it: its secrets with their replacements, and its caps.

May import ``model``. Called by the log book. On disk beside the run's raw files (0600), and gone with them. A file of
these is never written again, so attempts with the same secrets may share one: a name more, where each its own file
would cost as much as all else that a short job's log does.
"""

from __future__ import annotations

import logging
import os

import msgspec

from supervisor.sinks.local import make_directory

log = logging.getLogger(__name__)


class Pinned(msgspec.Struct, frozen=True):
    """``values``: secret and replacement. ``disk`` and ``database``: caps on a step's redacted bytes."""

    values: list[tuple[bytes, bytes]]
    disk: int
    database: int


def load(run: str) -> Pinned | None:
    """What the attempt was opened with before, if it was."""
    path = f"{run}/redaction"
    try:
        with open(path, "rb", buffering=0) as file:
            return msgspec.json.decode(file.read(), type=Pinned)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # After a power failure at worst: it is renamed into place.
        log.error("%s is damaged and made anew", path)
        return None


def share(run: str, of: str) -> bool:
    """Pins what is pinned for the run ``of``; False: that is gone, or this can't be."""
    try:
        os.link(f"{of}/redaction", f"{run}/redaction")
    except OSError:
        return False
    return True


def save(run: str, pinned: Pinned) -> None:
    """Raises OSError."""
    new = f"{run}/redaction.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        descriptor = os.open(new, flags, 0o600)
    except FileNotFoundError:
        make_directory(run)
        descriptor = os.open(new, flags, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(pinned))
    os.rename(new, f"{run}/redaction")
