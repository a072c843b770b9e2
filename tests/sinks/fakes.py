"""A shepherd that only writes files, a log store in memory that fails on demand, and a log book driven by hand."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio
import msgspec

from supervisor.model.errors import StoreUnavailable
from supervisor.model.job import Lease, LeaseId, LogChunk, LogRecord, Stream
from supervisor.model.logs import decode_records, slice_records
from supervisor.ports import LogReader, Plan, StoredLog
from supervisor.sinks.log import LogBook

PLAN = Plan((), None)


def a_lease(
    job: int = 1, attempt: int = 1, secrets: dict[str, str] | None = None, redact: dict[str, str] | None = None
) -> Lease:
    return Lease(
        id=LeaseId("ab" * 16, (1 << 32) + job),
        job=job,
        attempt=attempt,
        kind="steps",
        name="a job",
        spec=msgspec.Raw(b"{}"),
        secrets=secrets or {},
        redact=redact or {},
        attempts=1,
        failures=0,
        losses=0,
        leased_at=datetime.now(UTC),
    )


class FakeStep:
    """The raw spool of one step, written as the shepherd does: bytes first, then their record."""

    def __init__(self, state: Path, lease: Lease, index: int, max_output: int = 1 << 30) -> None:
        self.directory = state / "runs" / str(lease.id) / str(index)
        self.directory.mkdir(parents=True)
        (self.directory / "spec").write_text(json.dumps({"argv": ["x"], "max_output": max_output}))
        self.ends = {Stream.OUT: 0, Stream.ERR: 0}
        self.at = 1_700_000_000.0

    def claim(self) -> None:
        (self.directory / "claim").touch()
        for name in ("out", "err", "idx"):
            (self.directory / name).touch()

    def write_raw(self, stream: Stream, data: bytes) -> None:
        with (self.directory / ("out" if stream is Stream.OUT else "err")).open("ab") as file:
            file.write(data)
        self.ends[stream] += len(data)

    def record(self, code: int, end: int, size: int = 17) -> None:
        with (self.directory / "idx").open("ab") as file:
            file.write(struct.pack("<dqB", self.at, end, code)[:size])

    def write(self, stream: Stream, data: bytes, after: float = 1.0) -> None:
        self.at += after
        self.write_raw(stream, data)
        self.record(stream, self.ends[stream])

    def cut(self, stream: Stream) -> None:
        self.record(stream + 3, self.ends[stream])

    def exit(self, dropped: int = 0) -> None:
        (self.directory / "exit").write_text(json.dumps({"exit_code": 0, "out_dropped": dropped, "err_dropped": 0}))
        (self.directory / "closed").touch()


class FakeLogStore:
    """The promises of ``LogStore``. ``faults``: the next calls fail 'before' or 'after' they did their work.

    Like the real one it refuses a chunk that leaves a hole or overlaps: StoreUnavailable, when the others are stored.
    """

    def __init__(self) -> None:
        self.chunks: dict[tuple[int, int], list[LogChunk]] = {}
        self.gone: set[LeaseId] = set()
        self.complete: set[tuple[int, int]] = set()
        self.faults: list[str] = []
        self.away = False
        self.appends = 0
        self.asked = 0

    def _fail(self, when: str) -> None:
        if self.away or (self.faults and self.faults[0] == when):
            if self.faults:
                self.faults.pop(0)
            raise StoreUnavailable("the database does not answer")

    async def append_log(self, chunks: Sequence[LogChunk]) -> list[bool]:
        await anyio.lowlevel.checkpoint()
        self._fail("before")
        self.appends += 1
        assert sum(len(record.data) for chunk in chunks for record in self.records_of(chunk)) <= 1 << 20
        assert len({(chunk.job, chunk.attempt) for chunk in chunks}) == len(chunks)
        answers = [chunk.lease not in self.gone and self._append(chunk) for chunk in chunks]
        self._fail("after")
        if None in answers:
            raise StoreUnavailable("the log ends elsewhere")
        return [bool(answer) for answer in answers]

    def _append(self, chunk: LogChunk) -> bool | None:
        kept = self.chunks.setdefault((chunk.job, chunk.attempt), [])
        end = kept[-1].offset + kept[-1].length if kept else 0
        if chunk.offset != end:
            return True if chunk.offset + chunk.length <= end else None
        assert chunk.length > 0
        kept.append(chunk)
        return True

    @staticmethod
    def records_of(chunk: LogChunk) -> list[LogRecord]:
        return decode_records(chunk.data, chunk.offset)

    async def log_size(self, job: int, attempt: int) -> int:
        await anyio.lowlevel.checkpoint()
        self._fail("before")
        self.asked += 1
        return sum(chunk.length for chunk in self.chunks.get((job, attempt), []))

    async def read_log(self, job: int, attempt: int, offset: int, limit: int = 1 << 20) -> StoredLog:
        await anyio.lowlevel.checkpoint()
        self._fail("before")
        chunks = [c for c in self.chunks.get((job, attempt), []) if c.offset + c.length > offset]
        page: list[LogRecord] = []
        while chunks and sum(len(record.data) for record in page) < limit:
            page += slice_records(self.records_of(chunks.pop(0)), offset)
        return StoredLog(page, complete=not chunks and (job, attempt) in self.complete)

    def records(self, job: int = 1, attempt: int = 1) -> list[LogRecord]:
        return [record for chunk in self.chunks.get((job, attempt), []) for record in self.records_of(chunk)]


def joined(records: list[LogRecord], *streams: Stream) -> bytes:
    return b"".join(record.data for record in records if not streams or record.stream in streams)


def local_log(state: Path, lease: Lease) -> bytes:
    """The bytes of the local copy; there is none until there is something to write."""
    try:
        return (state / "logs" / str(lease.job) / f"{lease.attempt}.log").read_bytes()
    except FileNotFoundError:
        return b""


def rss() -> int:
    """This process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def serving(book: LogBook) -> AsyncIterator[LogBook]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(book.run)
        yield book
        tasks.cancel_scope.cancel()


async def settle(book: LogBook) -> None:
    """Everything that is on disk now, by hand."""
    while await book.pump_once():
        pass
    while await book.ship_once():
        pass


async def complete(book: LogBook, *leases: LeaseId) -> list[int]:
    async with serving(book):
        with anyio.fail_after(20):
            return [await book.complete(lease) for lease in leases]


async def read_all(book: LogReader, job: int = 1, **asked: object) -> list[LogRecord]:
    return [record async for record in book.read(job, 1, **asked)]  # type: ignore[arg-type]
