"""Attempts' logs in the database: contiguous, append-only, fenced by the lease; read by offset."""

from __future__ import annotations

import asyncpg
import msgspec
import pytest

from supervisor.model.errors import StoreUnavailable, UnknownJob
from supervisor.model.job import Lease, LeaseId, LogChunk, LogRecord, Outcome, Stream
from supervisor.model.logs import encode_records
from supervisor.store.pg import PgStore
from tests.store.store_bench import TERM, Daemon, add, pass_time

pytestmark = pytest.mark.anyio


def chunk(lease: Lease, offset: int, *pieces: bytes) -> LogChunk:
    records, at = [], offset
    for piece in pieces:
        records.append(LogRecord(at, 0, Stream.OUT, 1.5, piece))
        at += len(piece)
    return LogChunk(lease.id, lease.job, lease.attempt, offset, at - offset, encode_records(records, offset))


async def running(store: PgStore) -> tuple[Daemon, Lease]:
    await add(store)
    daemon = await Daemon.begin(store)
    return daemon, await daemon.claim_one()


async def text(store: PgStore, lease: Lease, offset: int = 0, limit: int = 1 << 20) -> bytes:
    page = await store.read_log(lease.job, lease.attempt, offset, limit)
    return b"".join(record.data for record in page.records)


class TestAppending:
    async def test_chunks_are_read_back_from_any_offset(self, store: PgStore) -> None:
        daemon, lease = await running(store)
        assert await store.log_size(lease.job, 1) == 0
        batch = [chunk(lease, 0, b"hello ", b"world\n"), chunk(lease, 12, b"more\0\xff\n")]
        assert await store.append_log(batch) == [True, True]
        assert await store.log_size(lease.job, 1) == 19
        whole = b"hello world\nmore\0\xff\n"
        for offset in range(len(whole) + 2):
            assert await text(store, lease, offset) == whole[offset:]
        page = await store.read_log(lease.job, 1, 3)
        assert [record.offset for record in page.records] == [3, 6, 12] and not page.complete
        await daemon.finish(lease)
        assert (await store.read_log(lease.job, 1, 3)).complete
        assert (await store.attempts(lease.job))[0].log_bytes == 19

    async def test_a_page_is_bounded_but_never_empty(self, store: PgStore) -> None:
        daemon, lease = await running(store)
        await store.append_log([chunk(lease, at * 100, b"x" * 100) for at in range(10)])
        await daemon.finish(lease)
        page = await store.read_log(lease.job, 1, 0, limit=250)
        assert sum(len(record.data) for record in page.records) == 300 and not page.complete
        page = await store.read_log(lease.job, 1, 950, limit=1)
        assert [(record.offset, len(record.data)) for record in page.records] == [(950, 50)] and page.complete

    async def test_a_repeat_is_stored_once(self, store: PgStore) -> None:
        _, lease = await running(store)
        first, second = chunk(lease, 0, b"one"), chunk(lease, 3, b"two")
        assert await store.append_log([first]) == [True]
        assert await store.append_log([first, second]) == [True, True]
        assert await store.append_log([second]) == [True]
        assert await text(store, lease) == b"onetwo"

    async def test_a_gap_or_an_overlap_is_no_append(self, store: PgStore) -> None:
        _, lease = await running(store)
        await store.append_log([chunk(lease, 0, b"one")])
        for wrong in (chunk(lease, 4, b"two"), chunk(lease, 2, b"two"), chunk(lease, 0, b"longer")):
            with pytest.raises(StoreUnavailable, match="ends at 3"):
                await store.append_log([wrong])
        assert await text(store, lease) == b"one"

    async def test_the_order_of_a_batch_does_not_matter(self, store: PgStore) -> None:
        _, lease = await running(store)
        stranger = msgspec.structs.replace(chunk(lease, 3, b"!"), attempt=2)
        stored = await store.append_log([chunk(lease, 3, b"two"), stranger, chunk(lease, 0, b"one")])
        assert stored == [True, False, True]
        assert await text(store, lease) == b"onetwo"


class TestFencing:
    async def test_a_lease_that_is_not_this_attempts_writes_nothing(self, store: PgStore) -> None:
        daemon, lease = await running(store)
        await daemon.finish(lease, Outcome.RELEASED)
        again = await daemon.claim_one()
        forged = [
            msgspec.structs.replace(chunk(again, 0, b"x"), lease=lease.id),
            msgspec.structs.replace(chunk(lease, 0, b"x"), lease=again.id),
            msgspec.structs.replace(chunk(again, 0, b"x"), lease=LeaseId(lease.id.session, 77)),
            msgspec.structs.replace(chunk(again, 0, b"x"), job=again.job + 1),
        ]
        assert await store.append_log(forged) == [False] * 4
        assert await store.log_size(again.job, 2) == 0

    async def test_an_attempt_that_ended_or_was_lost_keeps_its_log(
        self, store: PgStore, sql: asyncpg.Connection
    ) -> None:
        _, lease = await running(store)
        await store.append_log([chunk(lease, 0, b"before ")])
        await store.pulse(TERM)
        await pass_time(store, sql, 2 * TERM)
        assert (await store.reap()).requeued == 1
        assert await store.append_log([chunk(lease, 7, b"after")]) == [True]
        assert await text(store, lease) == b"before after"
        # The next attempt has a log of its own.
        back = await Daemon.begin(store)
        again = await back.claim_one()
        await store.append_log([chunk(again, 0, b"second")])
        assert (await text(store, lease), await text(store, again)) == (b"before after", b"second")


class TestReading:
    async def test_an_unknown_job_is_an_error_an_attempt_to_come_is_not(self, store: PgStore) -> None:
        (job,) = await add(store)
        page = await store.read_log(job, 1, 0)
        assert (page.records, page.complete) == ([], False)
        await store.stop([job], grace=None, kill=False, by="x")
        assert (await store.read_log(job, 1, 0)).complete
        with pytest.raises(UnknownJob):
            await store.read_log(job + 1, 1, 0)
