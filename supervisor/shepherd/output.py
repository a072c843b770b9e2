"""What a step writes: from its FIFOs to raw files, with an index of when. Standard library only; called by ``step``,
``sweep``.

The job holds its FIFOs open for reading too (O_RDWR), so it gets no SIGPIPE if the shepherd dies. Bytes are spliced:
they never pass through this process's memory, and none is lost between a read and a write if it is killed.

``out``, ``err`` and ``idx`` are made when there is something to write: most steps of a build say little on one stream.

``idx`` is a sequence of ``<dqB``: unix time, end offset in its stream's file, and what: 1 out, 2 err, 4 out was cut at
this offset, 5 err was cut. It is written after the bytes it speaks of; an offset may cover several pieces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import struct
import time
from collections.abc import Callable

from supervisor.shepherd.files import StateDirectory, say

FIFOS = ("fifo.out", "fifo.err")
RECORD = struct.Struct("<dqB")
_CUT = 3
_PIECE = 1 << 20
_TURN = 1 << 20
_PIPE = 1 << 16
_WIDE = 1 << 20
_REFUSES_SPLICE = {errno.EINVAL, errno.ENOSYS}
_NOW = os.SPLICE_F_NONBLOCK
_EXISTING = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Channel:
    """One stream. ``fifo`` is None once every writer has closed it; ``size`` bytes are kept, ``dropped`` were not.

    ``file`` is None until there are bytes. ``before_close`` is called with the FIFO.
    """

    def __init__(self, number: int, fifo: int | None, file: int | None = None) -> None:
        self.number = number
        self.fifo = fifo
        self.file = file
        self.size = 0 if file is None else os.fstat(file).st_size
        self.dropped = 0
        self.before_close: Callable[[int], None] | None = None
        self._is_wide = False

    def widen(self) -> None:
        """For a writer that fills the pipe and waits at every turn: in a bigger one it is several times as fast. Only
        for such, as an ordinary user may have 64 of them."""
        if not self._is_wide and self.fifo is not None:
            self._is_wide = True
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.fifo, fcntl.F_SETPIPE_SZ, _WIDE)

    def close_fifo(self) -> None:
        if self.fifo is not None:
            if self.before_close is not None:
                self.before_close(self.fifo)
            os.close(self.fifo)
            self.fifo = None


class Output:
    """Both streams of a step, capped together at ``limit`` bytes: past it they are drained still, and counted.

    ``directory`` is the step's, open, and stays so until ``close``.
    """

    def __init__(self, state: StateDirectory, directory: int, out: Channel, err: Channel, limit: int) -> None:
        self.channels = (out, err)
        self._state = state
        self._directory = directory
        self._index: int | None = None
        self._index_size = 0
        self._unsaid: list[tuple[float, int, int]] = []
        self._limit = limit
        self._splices = True
        self._devnull: int | None = None

    @classmethod
    def make(cls, state: StateDirectory, directory: int, limit: int, reader: int | None) -> Output:
        """Makes the FIFOs, of which the launcher opens the ends that the step gets as its stdout and stderr.

        ``reader``: the step's uid. ``> /dev/stdout`` opens the FIFO anew, with the job's rights.
        """
        opened: list[int] = []
        try:
            for fifo in FIFOS:
                # The reading end first: it needs no writer, and it is open before there can be one.
                opened.append(_open_fifo(directory, fifo))
                # One of a run before may have another owner, and what mode that liked.
                found, owner = os.fstat(opened[-1]), os.geteuid() if reader is None else reader
                if not stat.S_ISFIFO(found.st_mode):
                    raise FileExistsError(errno.EEXIST, "is there and no FIFO", fifo)
                if stat.S_IMODE(found.st_mode) != 0o600:
                    os.fchmod(opened[-1], 0o600)
                if found.st_uid != owner:
                    os.fchown(opened[-1], owner, -1)
            return cls(state, directory, Channel(1, opened[0]), Channel(2, opened[1]), limit)
        except OSError:
            for fd in opened:
                os.close(fd)
            raise

    @classmethod
    def reopen(cls, state: StateDirectory, directory: int) -> Output | None:
        """The output of a step whose shepherd died: takes what is in the FIFOs still. None if it had none."""
        fifos: list[int] = []
        try:
            for name in FIFOS:
                fifos.append(os.open(name, os.O_RDONLY | _EXISTING, dir_fd=directory))
            return cls.resume(state, directory, (fifos[0], fifos[1]), 1 << 62)
        except OSError:
            for fd in fifos:
                os.close(fd)
            return None

    @classmethod
    def resume(cls, state: StateDirectory, directory: int, fifos: tuple[int, int], limit: int) -> Output:
        """Goes on where another shepherd was ended. ``fifos``: -1 for one that was closed; taken only if nothing is
        raised. Raises OSError."""
        files: list[int | None] = []
        try:
            for name, mode in (("out", os.O_WRONLY), ("err", os.O_WRONLY), ("idx", os.O_RDWR)):
                try:
                    files.append(os.open(name, mode | _EXISTING, dir_fd=directory))
                except FileNotFoundError:
                    files.append(None)
        except OSError:
            for fd in files:
                if fd is not None:
                    os.close(fd)
            raise
        out, err, index = files
        ends = [None if fd < 0 else fd for fd in fifos]
        output = cls(state, directory, Channel(1, ends[0], out), Channel(2, ends[1], err), limit)
        if index is not None:
            output._index = index
            output._index_size = os.fstat(index).st_size // RECORD.size * RECORD.size
        output._mend()
        return output

    @property
    def is_open(self) -> bool:
        """Whether somebody still holds a stream open for writing."""
        return any(channel.fifo is not None for channel in self.channels)

    def counts(self) -> dict[str, int]:
        out, err = self.channels
        return {"out_bytes": out.size, "err_bytes": err.size, "out_dropped": out.dropped, "err_dropped": err.dropped}

    def pump(self, channel: Channel, turn: int = _TURN) -> bool:
        """Moves what is there, ``turn`` bytes or a little more at most; False: it is empty or closed now."""
        if channel.fifo is None:
            return False
        moved = 0
        before = channel.size
        more = True
        while more and moved < turn and channel.fifo is not None:
            try:
                count = self._move(channel, channel.fifo)
            except BlockingIOError:
                more = False
            else:
                moved += count
                if count == 0:
                    channel.close_fifo()
                    more = False
        if moved >= _PIPE:
            channel.widen()
        if channel.size > before:
            self._say(channel.size, channel.number)
        return more

    def drain(self, most: int = 4 << 20) -> None:
        """Until both are empty. What is in a pipe at the exit is 1 MiB at most; who still writes after it waits."""
        for channel in self.channels:
            left = most
            while left > 0 and self.pump(channel):
                left -= _TURN

    def hand_over(self) -> tuple[int, int]:
        """Closes all but the FIFOs, which are the caller's from here on (-1: it is closed)."""
        ends = []
        for channel in self.channels:
            ends.append(-1 if channel.fifo is None else os.dup(channel.fifo))
        self.close()
        return ends[0], ends[1]

    def close(self) -> None:
        self._write_index()
        for channel in self.channels:
            channel.close_fifo()
        for fd in (*(channel.file for channel in self.channels), self._index, self._devnull):
            if fd is not None:
                os.close(fd)

    def _move(self, channel: Channel, fifo: int) -> int:
        """Takes some bytes out of the FIFO; returns how many, 0 at its end. Raises BlockingIOError when there are none
        now."""
        room = self._limit - sum(each.size for each in self.channels)
        if channel.dropped or room <= 0:
            return self._drop(channel, fifo)
        try:
            file = channel.file
            if file is None:
                if not _has_bytes(fifo):
                    return 0
                file = channel.file = self._state.create(self._directory, "out" if channel.number == 1 else "err")
            if self._splices:
                count = os.splice(fifo, file, min(room, _PIECE), offset_dst=channel.size, flags=_NOW)
                channel.size += count
                return count
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _REFUSES_SPLICE:
                # A full or broken disk must not stop the job, nor this process: from here on its output is cut.
                say(f"output: stream {channel.number} is cut: {error}")
                return self._drop(channel, fifo)
            self._splices = False
        assert file is not None
        return self._copy(channel, file, fifo, min(room, 1 << 16))

    def _copy(self, channel: Channel, file: int, fifo: int, most: int) -> int:
        """For file systems that know no splice. A kill between the read and the write loses what was read."""
        data = os.read(fifo, most)
        kept = 0
        try:
            while kept < len(data):
                kept += os.pwrite(file, data[kept:], channel.size + kept)
        except OSError as error:
            say(f"output: stream {channel.number} is cut: {error}")
        channel.size += kept
        self._count_dropped(channel, len(data) - kept)
        return len(data)

    def _drop(self, channel: Channel, fifo: int) -> int:
        if self._devnull is None:
            self._devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        count = os.splice(fifo, self._devnull, _PIECE, flags=_NOW) if self._splices else len(os.read(fifo, 1 << 16))
        self._count_dropped(channel, count)
        return count

    def _count_dropped(self, channel: Channel, count: int) -> None:
        if count and not channel.dropped:
            self._say(channel.size, channel.number)
            self._say(channel.size, channel.number + _CUT)
        channel.dropped += count

    def _say(self, offset: int, what: int) -> None:
        last = self._unsaid[-1] if self._unsaid else None
        if last and last[2] == what:
            self._unsaid[-1] = (time.time(), offset, what)
        else:
            self._unsaid.append((time.time(), offset, what))
        self._write_index()

    def _write_index(self) -> None:
        """At a place of its own and not appended: a record torn by a full disk is written over the next time."""
        if not self._unsaid:
            return
        data = b"".join(RECORD.pack(*record) for record in self._unsaid)
        with contextlib.suppress(OSError):
            if self._index is None:
                self._index = self._state.create(self._directory, "idx")
            if os.pwrite(self._index, data, self._index_size) == len(data):
                self._index_size += len(data)
                self._unsaid.clear()

    def _mend(self) -> None:
        """Adds the records of bytes that were spliced and not yet indexed when the shepherd was killed; drops a torn
        one."""
        if self._index is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._index, self._index_size)
        said = {1: 0, 2: 0}
        cut = set()
        at = 0
        while self._index is not None and at < self._index_size:
            data = os.pread(self._index, RECORD.size * 4096, at)
            for _, offset, what in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
                if what in said:
                    said[what] = offset
                else:
                    cut.add(what - _CUT)
            at += len(data)
        for channel in self.channels:
            if channel.number in cut:
                channel.dropped = 1
            if channel.size > said[channel.number]:
                self._say(channel.size, channel.number)


def _open_fifo(directory: int, name: str) -> int:
    """Takes one over that is there and was found free (``spares``)."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        os.mkfifo(name, 0o600, dir_fd=directory)
        return os.open(name, flags, dir_fd=directory)


def _has_bytes(fifo: int) -> bool:
    """False at its end. Raises BlockingIOError when there are none now."""
    poll = select.poll()
    poll.register(fifo, select.POLLIN)
    ready = poll.poll(0)
    if not ready:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return bool(ready[0][1] & select.POLLIN)
