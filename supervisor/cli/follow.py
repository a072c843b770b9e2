"""Watching jobs: their log as it comes, and their ends; through a restart of the daemon too. Called by logs, submit
and wait.

A daemon that is upgraded goes away for a moment while the jobs go on. A view therefore takes itself up again where
it was, for as long as PATIENCE, and only then says that the daemon is unreachable.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from supervisor.cli.configuration import connect
from supervisor.cli.connection import Connection, Tick
from supervisor.cli.exits import CommandError, Unreachable
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import duration, plural, safe
from supervisor.cli.views import end_of, progress
from supervisor.model.errors import BsupError
from supervisor.protocol import (
    JobReply,
    JobView,
    LogEnd,
    LogPiece,
    LogsParams,
    LogsReply,
    LogStream,
    Parameters,
    ShowParams,
    ShowReply,
    WaitParams,
)

PATIENCE = 60.0
"""Seconds that a view waits for a daemon that went away."""
BETWEEN_TRIES = 0.25
LIVE_EVERY = 0.5
"""Seconds between two drawings of the live line while nothing comes."""

S = TypeVar("S", bound=msgspec.Struct)


class Watch:
    """A connection that is made again when the daemon restarts."""

    def __init__(self, args: Namespace, terminal: Terminal, patience: float = PATIENCE) -> None:
        self._args = args
        self._terminal = terminal
        self._patience = patience
        self._connection: Connection | None = connect(args)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, method: str, params: Parameters, reply: type[S]) -> S:
        return self._open().call(method, params, reply)

    def ticking(self, method: str, params: Parameters, reply: type[S], every: float | None) -> Iterator[S | Tick]:
        """As ``Connection.ticking``; afterwards the connection is good for another call."""
        yield from self._open().ticking(method, params, reply, every=every)

    def another(self) -> Connection | None:
        """A connection beside this one; None where there is none to be had."""
        try:
            return connect(self._args)
        except CommandError:
            return None

    def again(self, lost: Unreachable) -> None:
        """Waits for the daemon to be back. Raises what was lost if it is not in time."""
        self.close()
        self._terminal.note(f"bsup: {lost}; waiting for it to come back (jobs go on)", "yellow")
        deadline = time.monotonic() + self._patience
        while True:
            time.sleep(BETWEEN_TRIES)
            try:
                self._open()
            except CommandError:
                if time.monotonic() > deadline:
                    raise lost from None
            else:
                self._terminal.note("bsup: the daemon is back", "dim")
                return

    def _open(self) -> Connection:
        if self._connection is None:
            self._connection = connect(self._args)
        return self._connection


class LogView:
    """Prints a log's pieces: as bytes in a pipe, with step headers and a live line on a terminal.

    ``steps``: how many there are, where known; only the headers show it. ``headers``: in a pipe too.
    """

    def __init__(
        self,
        terminal: Terminal,
        job: int,
        *,
        raw: bool,
        steps: int | None = None,
        flush: bool = True,
        headers: bool = False,
    ) -> None:
        self._terminal = terminal
        self._job = job
        self._raw = raw
        self._steps = steps
        self._flush = flush
        self._headers = not raw and (headers or terminal.width is not None) and not terminal.json
        self._at_line_start = True
        self._step: tuple[int, int] | None = None
        self._idle_words = ""
        self._idle_since = time.monotonic()
        self._attempt = 0

    @property
    def has_said(self) -> bool:
        """Whether any piece of the log was printed."""
        return self._step is not None

    def piece(self, piece: LogPiece) -> None:
        if self._terminal.json:
            self._terminal.object(_piece_json(self._job, piece))
            if self._flush:
                self._terminal.out.flush()
            return
        is_note = piece.stream == LogStream.NOTE
        if is_note and self._raw:
            return
        self._terminal.clear_live()
        data = piece.data
        if (piece.attempt, piece.step) != self._step:
            self._begin_step(piece)
        if is_note and self._headers:
            data = self._terminal.paint(data.decode(errors="replace").rstrip("\n"), "dim").encode() + b"\n"
            if not self._at_line_start:
                data = b"\n" + data
        out = self._terminal.bytes_out
        out.write(data)
        if data:
            self._at_line_start = data.endswith(b"\n")
        if self._flush:
            out.flush()

    def _begin_step(self, piece: LogPiece) -> None:
        if self._headers:
            if self._attempt and piece.attempt != self._attempt:
                self._headline(f"══ attempt {piece.attempt}")
            of = f"/{self._steps}" if self._steps else ""
            name = f" {safe(piece.step_name)}" if piece.step_name else ""
            self._headline(f"── step {piece.step + 1}{of}{name}")
        self._step = (piece.attempt, piece.step)
        self._attempt = piece.attempt

    def _headline(self, text: str) -> None:
        self.end_line()
        self._terminal.line(self._terminal.paint(text, "bold"))

    def end_line(self) -> None:
        """Ends a line that the job left open, before something else is printed; only on a terminal."""
        if self._headers and not self._at_line_start:
            # The job's colours end with it.
            self._terminal.line("\x1b[0m" if self._terminal.paint("x", "dim") != "x" else "")
            self._at_line_start = True

    def end(self, end: LogEnd) -> None:
        if self._terminal.json:
            self._terminal.object({"id": self._job, "end": end})
        elif end.outcome in ("failed", "lost", "released") and end.state in ("waiting", "ready", "running"):
            self.end_line()
            how = end_of(end.exit_code, end.signal)
            self._terminal.note(
                f"bsup: attempt {end.attempt} {end.outcome}{f' ({how})' if how else ''}; the job will run again",
                "yellow",
            )

    def idle(self, told: JobView | None) -> None:
        """Nothing came for a moment: says how far the job is where somebody looks, unless a line of it is open there.

        ``told``: what the daemon says; a step that prints nothing is known from there alone.
        """
        if not self._at_line_start and self._headers:
            return
        words = "no output yet" if self._step is None else "running"
        if told is not None:
            words = told.state if told.progress is None else f"step {safe(progress(told))}"
        if words != self._idle_words:
            self._idle_words, self._idle_since = words, time.monotonic()
        self._terminal.live(f"· job {self._job}: {words} · {duration(time.monotonic() - self._idle_since)}")


def follow_log(watch: Watch, view: LogView, params: LogsParams, *, live: bool) -> LogEnd | None:
    """Prints the log that ``params`` asks for until it ends; the last attempt's end, None if there was no attempt."""
    every = LIVE_EVERY if live and params.follow else None
    with _Side(watch, params.id, wanted=every is not None) as side:
        return _follow(watch, view, params, every, side)


def _follow(watch: Watch, view: LogView, params: LogsParams, every: float | None, side: _Side) -> LogEnd | None:
    ended: LogEnd | None = None
    done = 0
    while True:
        attempt, offset = params.attempt, params.offset
        try:
            for reply in watch.ticking("Logs", params, LogsReply, every):
                if isinstance(reply, Tick):
                    view.idle(side.job())
                elif reply.record is not None and reply.record.attempt > done:
                    view.piece(reply.record)
                    attempt = reply.record.attempt
                    offset = reply.record.offset + len(reply.record.data)
                elif reply.end is not None and reply.end.attempt > done:
                    ended, done = reply.end, reply.end.attempt
                    attempt, offset = None, 0
                    view.end(reply.end)
        except Unreachable as lost:
            if not params.follow:
                raise
            view.end_line()
            watch.again(lost)
            params = msgspec.structs.replace(params, attempt=attempt, offset=offset)
            continue
        # A view that was taken up again named the attempt it was at; the later ones are to be seen too.
        resumed = params.attempt is not None and done == params.attempt and view_goes_on(ended)
        if not resumed or not params.follow:
            return ended
        params = msgspec.structs.replace(params, attempt=None, offset=0)


def view_goes_on(end: LogEnd | None) -> bool:
    """Whether the job may have another attempt."""
    return end is not None and end.state not in ("succeeded", "failed", "canceled")


def wait_for(
    watch: Watch, terminal: Terminal, ids: Sequence[int], *, first: bool = False, timeout: float | None = None
) -> Iterator[JobView]:
    """Each of the jobs when it is over, with a live line meanwhile. Raises CallTimeout."""
    left = list(dict.fromkeys(ids))
    total = len(left)
    began = time.monotonic()
    while left:
        remaining = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
        params = WaitParams(ids=left, any=first, timeout=remaining)
        try:
            with _Side(watch, left[0], wanted=terminal.is_live and len(left) == 1) as side:
                for reply in watch.ticking("Wait", params, JobReply, LIVE_EVERY if terminal.is_live else None):
                    if isinstance(reply, Tick):
                        terminal.live(_waiting(left, total, side.job(), time.monotonic() - began))
                    elif reply.job is not None:
                        terminal.clear_live()
                        left.remove(reply.job.id)
                        yield reply.job
                        if first:
                            return
            return
        except Unreachable as lost:
            watch.again(lost)


def _waiting(left: Sequence[int], total: int, job: JobView | None, elapsed: float) -> str:
    if job is None:
        return f"· {total - len(left)} of {plural(total, 'job')} over · {duration(elapsed)}"
    shown = progress(job)
    step = f", step {shown}" if job.progress else "" if shown == "-" else f" {shown}"
    return f"· job {job.id}: {job.state}{safe(step)} · {duration(elapsed)}"


class _Side:
    """A second connection that asks how far one job is, while the first waits for its log or its end."""

    def __init__(self, watch: Watch, job: int, *, wanted: bool) -> None:
        self._job = job
        self._connection = watch.another() if wanted else None

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def job(self) -> JobView | None:
        """None: it can't be told now. The line is a nicety; what matters comes on the other connection."""
        if self._connection is None:
            return None
        try:
            return self._connection.call("Show", ShowParams(id=self._job), ShowReply, timeout=2.0).job
        except BsupError:
            self._close()
            return None

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _piece_json(job: int, piece: LogPiece) -> dict[str, object]:
    """A piece as a line of JSON: ``text`` for people, ``data`` (base64) for the exact bytes where the text can't be
    them.
    """
    data = piece.data
    line: dict[str, object] = {
        "id": job,
        "attempt": piece.attempt,
        "offset": piece.offset,
        "step": piece.step,
        "step_name": piece.step_name,
        "stream": piece.stream,
        "at": piece.at,
    }
    try:
        return {**line, "text": data.decode()}
    except UnicodeDecodeError:
        return {**line, "text": data.decode(errors="replace"), "data": piece.data}
