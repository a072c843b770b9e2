"""Attempts' logs in the database: ``ports.LogStore``. Composed by ``pg``; on connections of its own."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.model.errors import StoreUnavailable, UnknownJob
from supervisor.model.job import LogChunk
from supervisor.model.logs import decode_records, slice_records
from supervisor.ports import StoredLog
from supervisor.store.connection import Link


class Logs:
    _logs: Link

    async def append_log(self, chunks: Sequence[LogChunk]) -> list[bool]:
        """In the order of ``chunks``. A chunk that doesn't begin where the log ends raises StoreUnavailable: read
        ``log_size``, and go on from there; the chunks that fit are stored."""
        if not chunks:
            return []
        rows = await self._logs.rows(
            "append_log",
            [chunk.lease.session for chunk in chunks],
            [chunk.lease.counter for chunk in chunks],
            [chunk.job for chunk in chunks],
            [chunk.attempt for chunk in chunks],
            [chunk.offset for chunk in chunks],
            [chunk.length for chunk in chunks],
            [chunk.data for chunk in chunks],
        )
        for chunk, row in zip(chunks, rows, strict=True):
            if row["stored"] is None:
                raise StoreUnavailable(
                    f"append_log: the log of job {chunk.job}, attempt {chunk.attempt} ends at {row['size']}, "
                    f"not at {chunk.offset}"
                )
        return [row["stored"] for row in rows]

    async def log_size(self, job: int, attempt: int) -> int:
        return await self._logs.value("log_size", job, attempt, reading=True) or 0

    async def read_log(self, job: int, attempt: int, offset: int, limit: int = 1 << 20) -> StoredLog:
        """About ``limit`` bytes: whole chunks, at least one. Raises UnknownJob."""
        rows = await self._logs.rows("read_log", job, attempt, offset, limit, reading=True)
        if not rows:
            raise UnknownJob(job)
        chunks = [row for row in rows if row["offset_"] is not None]
        records = [record for row in chunks for record in decode_records(row["data"], row["offset_"])]
        end = chunks[-1]["offset_"] + chunks[-1]["length"] if chunks else offset
        nothing_follows = rows[0]["ended"] or rows[0]["final"]
        return StoredLog(slice_records(records, offset), nothing_follows and end >= rows[0]["size"])
