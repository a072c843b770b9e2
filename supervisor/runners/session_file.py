"""``session.json`` and the lock of a state directory: which session this directory held last, and that one daemon has
it.

The file names the machine, the boot and the directory it was written for. One of another machine or directory (a cloned
image) is set aside, so that two hosts never renew one session, and with it all that tells of its runs: where the image
was cloned on one machine, the processes that they name are another daemon's. One of another boot is good, but nothing
it ran still runs.

May import model, ports and its neighbour ``handles``. ``app`` takes the lock first of all and hands the rest to the
root actor as its ``SessionFile``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

import anyio.to_thread
import msgspec

from supervisor.model.errors import BsupError
from supervisor.model.job import Me
from supervisor.ports import SavedSession
from supervisor.runners.handles import UNREADABLE, write_json_in_room

log = logging.getLogger("supervisor.session")

VERSION = 1
"""Of ``session.json``. It rises when an older daemon would misread it, not for a field that it may pass over."""


class StateDirectoryTaken(BsupError):
    """Another daemon runs on this state directory."""


class _Stored(msgspec.Struct, kw_only=True):
    """``session.json``. ``dir`` is "<st_dev>:<st_ino>" of the state directory."""

    session: str
    incarnation: str
    next_incarnation: str | None = None
    epoch: int
    machine_id: str
    boot_id: str
    boot_epoch: int = 0
    dir: str
    version: int = VERSION


class StateLock:
    """The lock of a state directory, held until ``release`` or the end of this process; no child inherits it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_state(state: Path) -> StateLock:
    """Raises StateDirectoryTaken, or OSError where the directory can't be written."""
    fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StateDirectoryTaken(f"another bsup daemon runs on {state}: stop it, or give this one a --state") from None
    except BaseException:
        os.close(fd)
        raise
    return StateLock(fd)


FOREIGN = "foreign"
_OF_A_SESSION = ("logs", "work", "runs", "fence", "session.json")
"""The session last: a move that is cut short leaves the rest to the next start."""


class StateSessionFile:
    """Keeps the promises of ``ports.SessionFile``. ``machine_id`` and ``boot_id`` are this machine's, as it runs
    now."""

    def __init__(self, state: Path, machine_id: str, boot_id: str) -> None:
        self._state = state
        self._path = state / "session.json"
        self._machine_id = machine_id
        self._boot_id = boot_id

    def set_aside_foreign(self) -> Path | None:
        """Moves what another machine's or directory's session left out of the way; says where. Before the shepherd
        starts: it would end what the runs name."""
        if (stored := self._stored()) is None or self._is_ours(stored):
            return None
        aside = self._first_free(f"{FOREIGN}.{{}}")
        aside.mkdir(mode=0o700)
        for name in _OF_A_SESSION:
            with contextlib.suppress(FileNotFoundError):
                (self._state / name).rename(aside / name)
        return aside

    async def load(self) -> SavedSession | None:
        return await anyio.to_thread.run_sync(self._load)

    async def save(self, me: Me, next_incarnation: str | None = None, boot_epoch: int = 0) -> None:
        await anyio.to_thread.run_sync(self._save, me, next_incarnation, boot_epoch)

    def _load(self) -> SavedSession | None:
        try:
            stored = msgspec.json.decode(self._path.read_bytes(), type=_Stored)
        except FileNotFoundError:
            return None
        except UNREADABLE:
            # It is written by rename: only something else than bsup, or a bad disk, leaves it like this.
            log.warning("session.json can't be read: it is set aside, and a new session is begun")
            self._set_aside("unreadable")
            return None
        if not self._is_ours(stored):
            self._set_aside("foreign")
            return None
        if stored.version > VERSION:
            log.warning("session.json is of version %s, a newer bsup's: a new session is begun", stored.version)
            self._set_aside("newer")
            return None
        return SavedSession(
            session=stored.session,
            incarnation=stored.incarnation,
            next_incarnation=stored.next_incarnation,
            epoch=stored.epoch,
            same_boot=stored.boot_id == self._boot_id,
            boot_epoch=stored.boot_epoch,
        )

    def _save(self, me: Me, next_incarnation: str | None, boot_epoch: int) -> None:
        boot_id = self._boot_id
        if next_incarnation is not None:
            # Only the intent to take it up: until that is done, what runs is still what the boot before left.
            before = self._stored()
            boot_id = boot_id if before is None else before.boot_id
        stored = _Stored(
            session=me.session,
            incarnation=me.incarnation,
            next_incarnation=next_incarnation,
            epoch=me.epoch,
            machine_id=self._machine_id,
            boot_id=boot_id,
            boot_epoch=boot_epoch,
            dir=self._directory(),
        )
        # In room of its own: a daemon that starts on a full disk takes its jobs up all the same.
        write_json_in_room(self._path, stored, durable=True)

    def _stored(self) -> _Stored | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Stored)
        except (FileNotFoundError, *UNREADABLE):
            return None

    def _is_ours(self, stored: _Stored) -> bool:
        return stored.machine_id == self._machine_id and stored.dir == self._directory()

    def _set_aside(self, why: str) -> None:
        self._path.rename(self._first_free(f"session.{why}.{{}}.json"))

    def _first_free(self, pattern: str) -> Path:
        """``pattern`` with the lowest number that nothing has: an older one set aside is evidence too."""
        number = 0
        while (aside := self._state / pattern.format(number)).exists():
            number += 1
        return aside

    def _directory(self) -> str:
        found = self._state.stat()
        return f"{found.st_dev}:{found.st_ino}"
