"""The redacted copy of an attempt's log on this host: two files, written by one pump and read by anyone here.

May import ``model``. The transcript writes it, the shipper and the readers read it. There is none until there is
something to write: most jobs that are over in milliseconds say nothing, and to create files is what a log costs most.

``<attempt>.log`` holds the bytes. ``<attempt>.idx`` is a header with the lease's id, then entries of fixed size: one
for each piece of the log, with the state of the transcript behind it. So the index is its own checkpoint: bytes go to
the log first and entries after, and a daemon that was killed anywhere in between goes on behind the last entry that is
marked as a commit, with all that came later cut off. What is not committed was never shipped.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import os
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

from supervisor.model.job import LeaseId

_MAGIC = b"bsuplog1"
HEADER_SIZE = 72
# at, log end, raw position of out and of err, bytes of the step, raw records done, notes done, step of the piece,
# active step, stream, flags
_ENTRY = struct.Struct("<dqqqqIIHHBBxx")
_READ_ENTRIES = 1024


class Flag(enum.IntFlag):
    """``COMMIT`` and ``LEFT_OUT`` speak of the entry, the others of the active step from here on."""

    COMMIT = 1
    LEFT_OUT = 2  # the piece is not stored in the database: behind the step's cap there
    STORE_CUT = 4  # the step's stored log is cut
    DISK_CUT = 8  # the step's local log is cut
    RAW_CUT = 16  # the shepherd cut the step's raw output
    DONE = 32  # all of the step is in the log
    CLOSED = 64  # the attempt is over: nothing will follow


_NO_FLAGS = Flag(0)


class State(msgspec.Struct):
    """How far the transcript is: what it must know to go on behind an entry.

    ``raw_out`` and ``raw_err`` are the positions in the active step's raw files up to which all is in the log: a tail
    that the redactor holds back lies behind them and is read again. ``records`` counts the raw index's records done,
    ``notes`` bsup's notes written, ``size`` the step's bytes in the log without notes.
    """

    active: int = 0
    raw_out: int = 0
    raw_err: int = 0
    size: int = 0
    records: int = 0
    notes: int = 0
    flags: Flag = _NO_FLAGS

    def begin(self, step: int) -> None:
        self.active, self.raw_out, self.raw_err, self.size, self.records = step, 0, 0, 0, 0
        self.flags = _NO_FLAGS

    def is_done(self, step: int) -> bool:
        return step < self.active or (step == self.active and Flag.DONE in self.flags)


class Piece(NamedTuple):
    """An entry of the index as readers see it; ``length`` 0: a mark, such as a step's end."""

    offset: int
    length: int
    step: int
    stream: int
    at: float
    flags: Flag


class _Entry(NamedTuple):
    at: float
    end: int
    raw_out: int
    raw_err: int
    size: int
    records: int
    notes: int
    step: int
    active: int
    stream: int
    flags: int


class Cursor(msgspec.Struct):
    """Where a reader stands: the next entry, and the offset in the log. ``entry`` -1: to be looked up."""

    offset: int
    entry: int = -1


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written


def make_directory(path: str) -> None:
    """For the owner alone, and so the one above it."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        os.mkdir(path, 0o700)


class LocalWriter:
    """Writes one local copy. Not safe for threads: the transcript holds a lock over it. Raises OSError (disk full …).

    ``add`` and ``commit`` only collect; ``flush`` writes. A flush that failed is repeated whole by the next one.
    ``path`` is the copy's, without a suffix.
    """

    def __init__(self, path: str | Path, lease: LeaseId) -> None:
        self._log, self._idx = f"{path}.log", f"{path}.idx"
        self._data: list[bytes] = []
        self._entries: list[_Entry] = []
        self._committed = 0
        self.collected = 0
        self.size = 0
        self.entries = 0
        self.at = 0.0
        self.is_begun = False
        self._last_byte = b"\n"
        self._header = (_MAGIC + str(lease).encode()).ljust(HEADER_SIZE, b"\0")

    def open(self) -> tuple[State, bool]:
        """Takes up the copy behind its last commit; (state, whether there was none). Cheap where there is none."""
        try:
            idx = os.open(self._idx, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return State(), True
        try:
            state = self._resume(idx)
        finally:
            os.close(idx)
        if state is not None:
            self.is_begun = True
            return state, False
        # A copy of another lease under this name is from another database: job ids begin anew there. Its index goes
        # first: without it the other file is nothing.
        for path in (self._idx, self._log):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return State(), True

    def _resume(self, idx: int) -> State | None:
        if os.pread(idx, HEADER_SIZE, 0) != self._header:
            return None
        try:
            log = os.open(self._log, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            log_size = os.fstat(log).st_size
            count = (os.fstat(idx).st_size - HEADER_SIZE) // _ENTRY.size
            while count > 0:
                raw = os.pread(idx, _ENTRY.size, HEADER_SIZE + (count - 1) * _ENTRY.size)
                entry = _Entry._make(_ENTRY.unpack(raw))
                # After a power failure the index may be ahead of the log.
                if entry.flags & Flag.COMMIT and entry.end <= log_size:
                    break
                count -= 1
            else:
                return None
            os.ftruncate(idx, HEADER_SIZE + count * _ENTRY.size)
            os.ftruncate(log, entry.end)
            if entry.end:
                self._last_byte = os.pread(log, 1, entry.end - 1)
        finally:
            os.close(log)
        self.size, self.entries, self.at = entry.end, count, entry.at
        flags = Flag(entry.flags) & ~(Flag.COMMIT | Flag.LEFT_OUT | Flag.CLOSED)
        return State(entry.active, entry.raw_out, entry.raw_err, entry.size, entry.records, entry.notes, flags)

    @property
    def is_flushed(self) -> bool:
        return not self._entries

    @property
    def is_at_line_start(self) -> bool:
        return self._last_byte == b"\n"

    def add(self, step: int, stream: int, at: float, data: bytes, flags: Flag = _NO_FLAGS) -> None:
        end = (self._entries[-1].end if self._entries else self.size) + len(data)
        self._entries.append(_Entry(at, end, 0, 0, 0, 0, 0, step, 0, stream, int(flags)))
        if data:
            self._data.append(data)
            self.collected += len(data)
            self._last_byte = data[-1:]

    def commit(self, state: State) -> None:
        """The entries added since the last commit hold together, and ``state`` is how far they bring the transcript."""
        if len(self._entries) == self._committed:
            return
        last = self._entries[-1]
        self._entries[-1] = last._replace(
            raw_out=state.raw_out,
            raw_err=state.raw_err,
            size=state.size,
            records=state.records,
            notes=state.notes,
            active=state.active,
            flags=last.flags | int(state.flags) | Flag.COMMIT,
        )
        self._committed = len(self._entries)

    def flush(self) -> bool:
        """Writes what was collected; whether there was anything. The first time it makes the files."""
        if not self._entries:
            return False
        packed = b"".join(_ENTRY.pack(*entry) for entry in self._entries)
        place = HEADER_SIZE + self.entries * _ENTRY.size
        if not self.is_begun:
            make_directory(os.path.dirname(self._log))
            packed, place = self._header + packed, 0
        if self._data or not self.is_begun:
            self._write(self._log, b"".join(self._data), self.size)
        self._write(self._idx, packed, place)
        self.is_begun = True
        self.size, self.at = self._entries[-1].end, self._entries[-1].at
        self.entries += len(self._entries)
        self._data, self._entries, self._committed, self.collected = [], [], 0, 0
        return True

    def _write(self, path: str, data: bytes, position: int) -> None:
        # Opened for each write: a host may run more jobs than it may hold descriptors.
        flags = os.O_WRONLY | os.O_CLOEXEC | (0 if self.is_begun else os.O_CREAT | os.O_TRUNC)
        descriptor = os.open(path, flags, 0o600)
        try:
            _write_all(descriptor, data, position)
        finally:
            os.close(descriptor)


class LocalCopy:
    """Reads a local copy, also while it is being written. Raises FileNotFoundError when there is none (any more)."""

    __slots__ = ("_idx", "_log")

    def __init__(self, path: str | Path) -> None:
        self._log, self._idx = f"{path}.log", f"{path}.idx"

    def is_closed(self) -> bool:
        """Whether the copy is whole: its attempt was closed."""
        try:
            with open(self._idx, "rb", buffering=0) as file:
                count = self._count(file.fileno())
                return count > 0 and bool(self._entry(file.fileno(), count - 1).flags & Flag.CLOSED)
        except FileNotFoundError:
            return False

    def lease(self) -> str:
        """The id of the lease whose log this is; empty if unreadable."""
        with open(self._idx, "rb") as file:
            header = file.read(HEADER_SIZE)
        return header[len(_MAGIC) :].rstrip(b"\0").decode("ascii", "replace") if header.startswith(_MAGIC) else ""

    def pieces(self, cursor: Cursor, size: int, *, to_store: bool = False) -> list[Piece]:
        """The next pieces, of ``size`` bytes and some 1,000 entries at most; moves the cursor. The last may be cut.

        ``to_store``: pieces that are left out of the database come whole and count nothing; they will not be read.
        """
        found: list[Piece] = []
        with open(self._idx, "rb", buffering=0) as file:
            idx = file.fileno()
            count = self._count(idx)
            if cursor.entry < 0:
                cursor.entry = bisect.bisect_right(
                    range(count), cursor.offset, key=lambda index: self._entry(idx, index).end
                )
            wanted = min(_READ_ENTRIES, count - cursor.entry)
            raw = os.pread(idx, wanted * _ENTRY.size, HEADER_SIZE + cursor.entry * _ENTRY.size)
        for values in _ENTRY.iter_unpack(raw[: len(raw) // _ENTRY.size * _ENTRY.size]):
            entry = _Entry._make(values)
            length = max(0, entry.end - cursor.offset)
            passed = to_store and entry.flags & Flag.LEFT_OUT
            taken = length if passed else min(length, size)
            found.append(Piece(cursor.offset, taken, entry.step, entry.stream, entry.at, Flag(entry.flags)))
            cursor.offset += taken
            if taken < length:
                break
            cursor.entry += 1
            size -= 0 if passed else taken
            if size <= 0:
                break
        return found

    def read(self, pieces: list[Piece]) -> list[bytes]:
        """The bytes of pieces."""
        with open(self._log, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), piece.length, piece.offset) for piece in pieces]

    @staticmethod
    def _count(idx: int) -> int:
        return max(0, os.fstat(idx).st_size - HEADER_SIZE) // _ENTRY.size

    @staticmethod
    def _entry(idx: int, index: int) -> _Entry:
        return _Entry._make(_ENTRY.unpack(os.pread(idx, _ENTRY.size, HEADER_SIZE + index * _ENTRY.size)))
