"""Ships local copies to the database: one batch of chunks over all attempts at a time.

May import ``model`` and the ports. Called by the log book.

What waits is on disk, not in memory: a shipper knows of each attempt how far the database is and reads on from there.
So a batch whose outcome is unknown (``StoreUnavailable``) is let go, and the database asked how far it is: that also
mends a log that a failover set back.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import anyio
import msgspec
from anyio import CapacityLimiter, to_thread

from supervisor.model.errors import SessionRefused, StoreUnavailable
from supervisor.model.job import LeaseId, LogChunk, LogRecord, Stream
from supervisor.model.logs import encode_records, next_offset
from supervisor.ports import LogStore
from supervisor.sinks.local import Cursor, Flag, LocalCopy

BATCH = 1 << 20
"""Log bytes of a batch, over all attempts."""
_LEAST = 64 * 1024  # of one attempt in a batch, if it has as much: small chunks cost the database more than they save
INTERVAL = 0.1
_LONGEST_PAUSE = 5.0
_MOST_LOOKS = 16  # at pages of pieces that are all left out, before others get their turn

log = logging.getLogger(__name__)


class Shipment(msgspec.Struct, eq=False):
    """One attempt on its way to the database.

    ``entries`` are the committed entries of its local copy, told by the pump. ``stored`` is how much the database has
    (None: to be asked), ``sent`` where the next chunk begins, ``cursor`` how far the copy was looked through: ahead of
    ``sent`` while pieces are left out. ``is_refused``: the lease is not ours any more; nothing more is shipped.
    ``is_forgotten``: the attempt was closed. ``problem``: why its copy could not be read the last time.
    """

    lease: LeaseId
    job: int
    attempt: int
    copy: LocalCopy
    entries: int = 0
    stored: int | None = None
    sent: int = 0
    cursor: Cursor = msgspec.field(default_factory=lambda: Cursor(0))
    is_refused: bool = False
    is_forgotten: bool = False
    problem: str | None = None

    @property
    def is_due(self) -> bool:
        return not self.is_refused and (self.stored is None or self.cursor.entry < self.entries)


class Shipper:
    """``on_moved`` is told of a shipment of which more is known than before: how much is stored, or that it is
    refused. ``has_priority`` says whether something else has now: then batches keep their distance."""

    def __init__(
        self,
        store: LogStore,
        on_moved: Callable[[Shipment], None],
        has_priority: Callable[[], bool],
        pause: Callable[[float], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        self._store = store
        self._on_moved = on_moved
        self._has_priority = has_priority
        self._pause = pause
        self._rng = rng
        self._due: dict[LeaseId, Shipment] = {}
        self._thread = CapacityLimiter(1)
        self._arrived = anyio.Event()
        self._rest: anyio.CancelScope | None = None
        self._is_hurried = False
        self.failures = 0

    async def run(self) -> None:
        """A batch each ``INTERVAL``, and at once where much waits or somebody hurries; ever more slowly while the
        database is away."""
        while True:
            await self.wait()
            self._is_hurried = False
            try:
                moved = await self.ship_once()
            except StoreUnavailable as error:
                if self.failures == 0:
                    log.warning("logs wait on disk for the database: %s", error)
                self.failures += 1
                longest = min(_LONGEST_PAUSE, INTERVAL * 2 ** min(self.failures, 10))
                await self._pause(longest * self._rng.uniform(0.5, 1.0))
                continue
            self.failures = 0
            if moved and (self._is_hurried or (self.has_more and not self._has_priority())):
                continue
            with anyio.CancelScope() as self._rest:
                await self._pause(INTERVAL)
            self._rest = None

    def hurry(self) -> None:
        """Somebody waits for what is due now."""
        self._is_hurried = True
        if self._rest is not None:
            self._rest.cancel()

    @property
    def is_idle(self) -> bool:
        return not self._due

    @property
    def has_more(self) -> bool:
        """Whether more waits than one batch took: no pause then."""
        return bool(self._due)

    def tell(self, shipment: Shipment, entries: int) -> None:
        """The local copy has grown, or is new."""
        shipment.entries = entries
        if shipment.is_due:
            self._due[shipment.lease] = shipment
            self._arrived.set()

    def forget(self, shipment: Shipment) -> None:
        shipment.is_forgotten = True
        self._due.pop(shipment.lease, None)

    async def wait(self) -> None:
        """Until there is something to ship."""
        while self.is_idle:
            self._arrived = anyio.Event()
            await self._arrived.wait()

    async def ship_once(self) -> bool:
        """Ships one batch; whether there was one. Raises StoreUnavailable; nothing is lost by that."""
        await self._ask_sizes()
        due = [shipment for shipment in self._due.values() if shipment.stored is not None]
        batch, looked_at = await to_thread.run_sync(_cut_batch, due, limiter=self._thread)
        for shipment in looked_at:
            # Turns go round: who was looked at goes behind those that were not.
            if self._due.pop(shipment.lease, None) is not None and shipment.is_due:
                self._due[shipment.lease] = shipment
        if not batch:
            return False
        try:
            answers = await self._store.append_log([chunk for _, chunk in batch])
        except SessionRefused:
            answers = [False] * len(batch)
        except StoreUnavailable:
            for shipment, _ in batch:
                if not shipment.is_forgotten:
                    shipment.stored = None
                    self._due[shipment.lease] = shipment
            raise
        for (shipment, chunk), is_stored in zip(batch, answers, strict=True):
            if is_stored:
                shipment.stored = chunk.offset + chunk.length
            else:
                shipment.is_refused = True
                self._due.pop(shipment.lease, None)
                log.warning("log of job %s attempt %s is not stored: its lease is gone", shipment.job, shipment.attempt)
            self._on_moved(shipment)
        return True

    async def _ask_sizes(self) -> None:
        for shipment in [shipment for shipment in self._due.values() if shipment.stored is None]:
            size = await self._store.log_size(shipment.job, shipment.attempt)
            shipment.stored = shipment.sent = size
            shipment.cursor = Cursor(size)
            # That may be all there is: then no chunk follows, and nothing else would tell.
            self._on_moved(shipment)


def _cut_batch(shipments: list[Shipment]) -> tuple[list[tuple[Shipment, LogChunk]], list[Shipment]]:
    """A batch, and the shipments that had their turn. In a thread: reads and compresses."""
    share = max(_LEAST, BATCH // max(1, len(shipments)))
    batch: list[tuple[Shipment, LogChunk]] = []
    room = BATCH
    for turn, shipment in enumerate(shipments):
        if room <= 0:
            return batch, shipments[:turn]
        before = Cursor(shipment.cursor.offset, shipment.cursor.entry), shipment.sent
        try:
            chunk, size = _cut_chunk(shipment, min(share, room))
        except OSError as error:
            # One unreadable copy must not hold up the others; it is tried again with each batch.
            shipment.cursor, shipment.sent = before
            if shipment.problem != str(error):
                log.error("log of job %s attempt %s can't be read: %s", shipment.job, shipment.attempt, error)
            shipment.problem = str(error)
            continue
        shipment.problem = None
        room -= size
        if chunk is not None:
            batch.append((shipment, chunk))
    return batch, shipments


def _cut_chunk(shipment: Shipment, size: int) -> tuple[LogChunk | None, int]:
    """The next chunk, of at most ``size`` bytes of data, and how many it has; None if all that is new is left out."""
    begin = shipment.sent
    records: list[LogRecord] = []
    for _ in range(_MOST_LOOKS):
        pieces = shipment.copy.pieces(shipment.cursor, size, to_store=True)
        kept = [piece for piece in pieces if Flag.LEFT_OUT not in piece.flags]
        for piece, data in zip(kept, shipment.copy.read(kept), strict=True):
            # A mark is stored only where it ends a gap: so the gap's end is known to whoever reads on from it.
            if data or piece.offset > next_offset(records, begin):
                records.append(LogRecord(piece.offset, piece.step, Stream(piece.stream), piece.at, data))
        if records or not pieces:
            break
    if not records:
        return None, 0
    shipment.sent = next_offset(records, begin)
    chunk = LogChunk(
        lease=shipment.lease,
        job=shipment.job,
        attempt=shipment.attempt,
        offset=begin,
        length=shipment.sent - begin,
        data=encode_records(records, begin),
    )
    return chunk, sum(len(record.data) for record in records)
