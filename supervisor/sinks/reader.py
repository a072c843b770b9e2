"""Reads an attempt's log from where it is: the copy of this host, else the database.

May import ``model`` and the ports. Called by the log book, which knows the attempts that are open here.

Offsets are the same in both, so a reader may change over in the middle. There is no queue per follower: each reads the
file at its own pace, and is woken when there is more. The copy is used while its attempt is open here or once it is
whole; the remains of an attempt that this host lost are not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
import msgspec
from anyio import CapacityLimiter, to_thread

from supervisor.model.errors import StoreUnavailable
from supervisor.model.job import LogRecord, Stream
from supervisor.model.logs import is_wanted, next_offset, slice_records, split_record
from supervisor.ports import LogStore
from supervisor.sinks.local import Cursor, LocalCopy

_PAGE = 256 * 1024
_PATIENCE = 40
"""How often in a row a follower finds the database away before it gives up: with the pauses, about half a minute."""


class Where(msgspec.Struct, frozen=True):
    """What a reader asks for."""

    job: int
    attempt: int
    step: int | None
    stream: Stream | None


class _Page(msgspec.Struct):
    """``ended``: nothing is behind it now; ``is_final``: and nothing will be."""

    records: list[LogRecord]
    ended: bool
    is_final: bool


class LogFiles:
    """Pages of local copies. Bounds how many threads read for clients at once."""

    def __init__(self, path_of: Callable[[int, int], str]) -> None:
        self._path_of = path_of
        self._threads = CapacityLimiter(4)

    async def page(self, where: Where, cursor: Cursor, *, is_open: bool) -> _Page | None:
        """The next page behind ``cursor``, which moves; None: this host has no copy to trust."""
        return await to_thread.run_sync(self._page, where, cursor, is_open, limiter=self._threads)

    def _page(self, where: Where, cursor: Cursor, is_open: bool) -> _Page | None:
        copy = LocalCopy(self._path_of(where.job, where.attempt))
        is_whole = copy.is_closed()
        if not is_open and not is_whole:
            return None
        try:
            pieces = copy.pieces(cursor, _PAGE)
            wanted = [
                piece
                for piece in pieces
                if piece.length and is_wanted(piece.step, piece.stream, only_step=where.step, only_stream=where.stream)
            ]
            found = copy.read(wanted)
        except FileNotFoundError:
            # Nothing is written yet where it is open; where it is not, the copy went just now.
            return _Page([], ended=True, is_final=False) if is_open else None
        records = [
            LogRecord(piece.offset, piece.step, Stream(piece.stream), piece.at, data)
            for piece, data in zip(wanted, found, strict=True)
        ]
        return _Page(records, ended=not pieces, is_final=not pieces and is_whole and not is_open)


async def read_log(
    where: Where,
    offset: int,
    follow: bool,
    *,
    files: LogFiles,
    store: LogStore,
    growth: Callable[[int, int], anyio.Event | None],
    pause: Callable[[float], Awaitable[None]],
    interval: float,
) -> AsyncGenerator[LogRecord, None]:
    """Records from ``offset`` on. ``growth``: what is set when the log of an attempt that is open here grows or ends.

    Raises StoreUnavailable when the log is only in the database and that is away (for a follower: away for long).
    """
    cursor = Cursor(offset)
    failures = 0
    while True:
        grown = growth(where.job, where.attempt)  # asked for before the page: what comes after it is not missed
        page = await files.page(where, cursor, is_open=grown is not None)
        if page is None:
            try:
                page = await _stored_page(store, where, cursor)
                failures = 0
            except StoreUnavailable:
                failures += 1
                if not follow or failures > _PATIENCE:
                    raise
                await pause(min(1.0, interval * failures))
                continue
            grown = None
        for record in page.records:
            for part in split_record(record):
                yield part
        if page.is_final or (page.ended and not follow):
            return
        if page.ended:
            if grown is not None:
                await grown.wait()
            else:
                await pause(interval)


async def _stored_page(store: LogStore, where: Where, cursor: Cursor) -> _Page:
    stored = await store.read_log(where.job, where.attempt, cursor.offset, _PAGE)
    records = slice_records(stored.records, cursor.offset)
    # Entries of the local index mean nothing here; should the log come to be here, the place is looked up by offset.
    cursor.entry = -1
    cursor.offset = next_offset(records, cursor.offset)
    wanted = [
        record
        for record in records
        if is_wanted(record.step, record.stream, only_step=where.step, only_stream=where.stream)
    ]
    return _Page(wanted, ended=not records, is_final=stored.complete)
