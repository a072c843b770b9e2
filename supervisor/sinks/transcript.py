"""Turns the raw spool of an attempt's steps into its one redacted log. Synchronous: runs in the pump's thread.

May import ``model``. Called by the log book.

The log is a function of the raw files, their index, bsup's notes and what was pinned when the attempt was opened
(secrets and limits), whatever the pace and the breaks at which it is made: a daemon that was killed goes on where the
committed local copy ends and makes the same bytes at the same offsets, so nothing that was shipped is contradicted.

- Steps come one after another. Within a step the index orders arrivals of both streams; each has its own redactor.
- Arrivals of one stream close in time are taken together: a chatty job must not cost a search per line.
- A note says behind how many index records it stands; it is on disk before it is in the log.
- Nothing is on disk of a log that has no byte yet; what is known of it follows from the raw files.
- Where the shepherd cut the output, and where a cap of this copy or of the stored one is reached, a note says so
  *there*. Behind the cap of the stored log, pieces are marked as left out: so offsets are the same here and in the
  database.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec

from supervisor.model.job import Stream
from supervisor.model.logs import format_size
from supervisor.model.redaction import Redactor, SecretSet
from supervisor.sinks.local import Flag, LocalWriter, State
from supervisor.sinks.notes import Note, append_note, read_notes
from supervisor.sinks.scanner import Scanner
from supervisor.sinks.spool import Arrival, StepSpool

SLICE = 256 * 1024
"""Raw bytes read and redacted at once."""
_TOGETHER = 0.05
"""Arrivals of one stream within this many seconds become one piece."""
_MAX_NOTE = 4096
_ALL = -1


class Limits(msgspec.Struct, frozen=True):
    """Caps on a step's redacted bytes, notes not counted: in the local copy and in the database."""

    disk: int
    database: int


class Transcript:
    """The making of one attempt's log.

    ``advance``, ``note`` and ``close`` take a lock, may be called from any thread and raise OSError; ``begin``, ``end``
    and ``settle_silent`` are for the event loop and never wait. ``pin`` is called before the first byte is written.
    """

    def __init__(
        self, run: str | Path, writer: LocalWriter, secrets: SecretSet, limits: Limits, pin: Callable[[], None]
    ) -> None:
        self._run = str(run)
        self._writer = writer
        self._secrets = secrets
        self._limits = limits
        self._pin = pin
        self._lock = threading.Lock()
        self._told: deque[tuple[int, bool]] = deque()  # (step, has ended), from the event loop
        self._live: set[int] = set()
        self._ended: set[int] = set()
        self._notes: list[Note] = []
        self._state = State()
        self._is_closed = False
        self._spool: StepSpool | None = None
        self._arrivals: deque[Arrival] = deque()
        self._fed = {Stream.OUT: 0, Stream.ERR: 0}
        self._scanner = Scanner(secrets.sought) if secrets else None
        self._redactors: dict[Stream, Redactor] = {}

    def open(self, names: list[str]) -> bool:
        """Goes on with the log, or begins it; whether it is new. Takes up every step that is found begun on disk.
        ``names``: those in the run's directory.
        """
        self._state, is_new = self._writer.open()
        if not is_new:
            self._fed = {Stream.OUT: self._state.raw_out, Stream.ERR: self._state.raw_err}
            self._redactors = self._new_redactors()
            self._spool = StepSpool(f"{self._run}/{self._state.active}")
        for name in names:
            if name == "notes":
                self._notes = read_notes(self._run)
            elif name.isdecimal():
                spool = StepSpool(f"{self._run}/{name}")
                if spool.is_closed():
                    self.end(int(name))
                elif spool.has_begun():
                    self.begin(int(name))
        return is_new

    def begin(self, step: int) -> None:
        """The step's output is to be followed. Nothing happens if all of it is in the log."""
        self._told.append((step, False))

    def end(self, step: int) -> None:
        """All of the step's output is on disk."""
        self._told.append((step, True))

    def end_all(self) -> None:
        """No step runs any more: those that were begun have ended."""
        self._told.append((_ALL, True))

    @property
    def size(self) -> int:
        """Bytes of the log that are committed."""
        return self._writer.size

    @property
    def entries(self) -> int:
        return self._writer.entries

    @property
    def is_settled(self) -> bool:
        """Nothing is left to do until a step begins or a note comes."""
        return not (self._told or self._live or self._state.notes < len(self._notes)) and self._writer.is_flushed

    @property
    def is_begun(self) -> bool:
        """Whether anything of it is on disk."""
        return self._writer.is_begun

    def settle_silent(self) -> bool:
        """Ends the steps that ended without a byte; whether nothing is left to do. A few looks at the disk, no write:
        what needs more, or is busy, is left to ``advance``.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._hear()
            if self._is_closed or not self._writer.is_flushed or self._state.notes < len(self._notes):
                return False
            for step in sorted(self._live):
                spool = StepSpool(f"{self._run}/{step}")
                if step not in self._ended or not spool.is_silent() or spool.dropped() or self._writer.is_begun:
                    return False
                self._state.begin(step)
                self._spool = None
                self._end_step(step, 0.0)
            return self.is_settled
        finally:
            self._lock.release()

    def note(self, step: int, text: str, at: float) -> None:
        line = " ".join(self._secrets.text(text)[:_MAX_NOTE].split("\n"))
        with self._lock:
            self._hear()
            open_here = not self._state.is_done(step) and step not in self._ended
            after = StepSpool(f"{self._run}/{step}").count() if open_here else None
            note = Note(step, after, at, line)
            append_note(self._run, note)
            self._notes.append(note)

    def close_silent(self) -> bool:
        """Ends it if nothing was written, for the event loop; else False."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._is_closed = not self._writer.is_begun and self._writer.is_flushed
            return self._is_closed
        finally:
            self._lock.release()

    def close(self, at: float) -> None:
        """Ends it, and marks the copy as whole."""
        with self._lock:
            self._is_closed = True
            if self._writer.is_begun or not self._writer.is_flushed:
                self._writer.add(self._state.active, Stream.NOTE, at, b"", Flag.CLOSED)
                self._writer.commit(self._state)
                self._flush()

    def advance(self, budget: int = SLICE) -> bool:
        """Takes about ``budget`` raw bytes into the log; whether there is more to do at once."""
        with self._lock:
            if self._is_closed:
                return False
            self._hear()
            self._flush()  # what a full disk refused before
            more = False
            while budget > 0:
                moved = self._move()
                if moved is None:
                    break
                self._writer.commit(self._state)
                # Replacements may be longer than what they replace: both counts bound the memory.
                budget -= max(moved, 512)
                if self._writer.collected > 4 * SLICE:
                    budget = 0
            else:
                more = True
            self._flush()
            return more

    def _flush(self) -> None:
        if not self._writer.is_begun and not self._writer.is_flushed:
            self._pin()
        self._writer.flush()

    def _hear(self) -> None:
        while self._told:
            step, has_ended = self._told[0]
            if step == _ALL:
                self._ended |= self._live
            elif not self._state.is_done(step):
                self._live.add(step)
                if has_ended:
                    self._ended.add(step)
            self._told.popleft()  # last, so that there is no moment at which this seems settled

    # --- one move: a note, a run of arrivals, a cut or an end; None: nothing to do now -----------------------------

    def _move(self) -> int | None:
        step = min(self._live, default=None)
        note = self._notes[self._state.notes] if self._state.notes < len(self._notes) else None
        if note is not None and self._is_due(note, step):
            self._write_note(note.step, note.at, note.text)
            self._state.notes += 1
            return 0
        if step is None:
            return None
        if self._spool is None or step != self._state.active:
            self._enter(step)
        assert self._spool is not None
        if not self._arrivals:
            self._arrivals.extend(self._spool.arrivals(self._state.records))
        if not self._arrivals:
            return self._finish(step, self._spool) if step in self._ended else None
        end, code = self._arrivals[0].end, self._arrivals[0].code
        if code in (Stream.OUT, Stream.ERR):
            fence = note.after if note is not None and note.step == step else None
            return self._take(self._spool, Stream(code), fence, is_ended=step in self._ended)
        if code in (4, 5):
            stream, at = Stream(code - 3), self._arrivals[0].at
            if moved := self._feed_to(self._spool, stream, end, at):  # a tail held back before a restart
                return moved
            self._cut(self._spool, stream, at)
        self._arrivals.popleft()
        self._state.records += 1
        return 0

    def _is_due(self, note: Note, step: int | None) -> bool:
        if step is None or note.step < step:
            return True
        # A step that was begun but not entered yet has all its records before it.
        done = self._state.records if step == self._state.active else 0
        return note.step == step and note.after is not None and done >= note.after

    def _enter(self, step: int) -> None:
        self._state.begin(step)
        self._spool = StepSpool(f"{self._run}/{step}")
        self._arrivals.clear()
        self._fed = {Stream.OUT: 0, Stream.ERR: 0}
        self._redactors = self._new_redactors()

    def _take(self, spool: StepSpool, stream: Stream, fence: int | None, *, is_ended: bool) -> int | None:
        """Feeds a run of arrivals of one stream, at most a slice; none that lies behind the next note."""
        first = self._arrivals[0]
        start = self._fed[stream]
        count, end = 1, first.end
        for arrival in islice(self._arrivals, 1, None):
            if arrival.code != first.code or arrival.end > start + SLICE or arrival.at > first.at + _TOGETHER:
                break
            if fence is not None and self._state.records + count >= fence:
                break
            count, end = count + 1, arrival.end
        stop = min(end, start + SLICE)
        if stop > start:
            arrived = self._feed(spool, stream, start, stop, first.at, must_arrive=not is_ended)
            if not arrived:
                return None
        if stop >= end:
            for _ in range(count):
                self._arrivals.popleft()
            self._state.records += count
        return max(0, stop - start)

    def _feed(self, spool: StepSpool, stream: Stream, start: int, stop: int, at: float, *, must_arrive: bool) -> bool:
        redactor = self._redactors[stream]
        if Flag.DISK_CUT not in self._state.flags:
            data = spool.read(stream, start, stop - start)
            if must_arrive and len(data) < stop - start:
                return False
            self._emit(stream, at, redactor.feed(data))
        self._fed[stream] = stop
        self._set_raw(stream, stop - self._redactors[stream].pending)
        return True

    def _feed_to(self, spool: StepSpool, stream: Stream, end: int, at: float) -> int:
        """Feeds a slice of what is on disk before ``end`` and was not fed yet; how much that was."""
        start = self._fed[stream]
        stop = min(end, spool.size(stream), start + SLICE)
        if stop <= start:
            return 0
        self._feed(spool, stream, start, stop, at, must_arrive=False)
        return stop - start

    def _cut(self, spool: StepSpool, stream: Stream, at: float) -> None:
        self._emit(stream, at, self._redactors[stream].finish(cut=True))
        self._set_raw(stream, self._fed[stream])
        if not self._state.flags & (Flag.RAW_CUT | Flag.DISK_CUT):
            limit = spool.limit()
            # Below the limit the shepherd's disk was full.
            is_over = limit is not None and spool.size(Stream.OUT) + spool.size(Stream.ERR) >= limit
            over = f": over the limit of {format_size(limit)} for a step" if limit and is_over else ""
            self._write_note(self._state.active, at, f"output cut here{over}")
        self._state.flags |= Flag.RAW_CUT

    def _finish(self, step: int, spool: StepSpool) -> int:
        """The step's end: what the index does not know of (a shepherd was killed), what was held back, the mark."""
        at = spool.written_at() or self._writer.at
        for stream in (Stream.OUT, Stream.ERR):
            if moved := self._feed_to(spool, stream, spool.size(stream), at):
                return moved
        for stream in (Stream.OUT, Stream.ERR):
            self._emit(stream, at, self._redactors[stream].finish())
            self._set_raw(stream, self._fed[stream])
        dropped = spool.dropped()
        if dropped:
            self._write_note(step, at, f"{format_size(dropped)} of output dropped")
        self._end_step(step, at)
        return 0

    def _end_step(self, step: int, at: float) -> None:
        self._state.flags |= Flag.DONE
        # Where nothing was written, the step's end need not be known either: it is found again in the raw files.
        if self._writer.is_begun or not self._writer.is_flushed:
            self._writer.add(step, Stream.NOTE, at, b"", Flag.DONE)
        self._live.discard(step)
        self._ended.discard(step)

    # --- into the local copy ---------------------------------------------------------------------------------------

    def _emit(self, stream: Stream, at: float, data: bytes) -> None:
        state, limits = self._state, self._limits
        if not data or Flag.DISK_CUT in state.flags:
            return
        over_disk = state.size + len(data) > limits.disk
        if over_disk:
            data = data[: limits.disk - state.size]
        if Flag.STORE_CUT not in state.flags and state.size + len(data) > limits.database:
            stored, data = data[: limits.database - state.size], data[limits.database - state.size :]
            self._add(stream, at, stored, Flag(0))
            limit = format_size(limits.database)
            self._write_note(
                state.active, at, f"stored log cut here: over the limit of {limit} for a step; the rest is on its host"
            )
            state.flags |= Flag.STORE_CUT
        self._add(stream, at, data, Flag.LEFT_OUT if Flag.STORE_CUT in state.flags else Flag(0))
        if over_disk:
            self._write_note(
                state.active, at, f"output cut here: over the limit of {format_size(limits.disk)} for a step"
            )
            state.flags |= Flag.DISK_CUT
            self._redactors = self._new_redactors()

    def _add(self, stream: Stream, at: float, data: bytes, flags: Flag) -> None:
        if data:
            self._writer.add(self._state.active, stream, at, data, flags)
            self._state.size += len(data)

    def _write_note(self, step: int, at: float, text: str) -> None:
        begin = "" if self._writer.is_at_line_start else "\n"
        line = text if text.startswith("[bsup:") else f"[bsup: {text}]"
        self._writer.add(step, Stream.NOTE, at, f"{begin}{line}\n".encode("utf-8", "replace"))

    # --- small things ----------------------------------------------------------------------------------------------

    def _new_redactors(self) -> dict[Stream, Redactor]:
        return {stream: Redactor(self._secrets, self._scanner) for stream in (Stream.OUT, Stream.ERR)}

    def _set_raw(self, stream: Stream, position: int) -> None:
        if stream is Stream.OUT:
            self._state.raw_out = position
        else:
            self._state.raw_err = position


def names_in(run: str) -> list[str]:
    """The names in a run's directory, which may not be there yet."""
    try:
        return os.listdir(run)
    except FileNotFoundError:
        return []
