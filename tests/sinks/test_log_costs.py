"""What a log may cost: nothing where nothing is said, and no waiting that helps nobody."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import anyio
import pytest

from supervisor.model.job import LogRecord, Stream
from supervisor.sinks.log import LogBook
from supervisor.sinks.shipper import Shipper
from tests.sinks.fakes import PLAN, FakeLogStore, FakeStep, a_lease, joined, local_log, read_all, serving, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> FakeLogStore:
    return FakeLogStore()


async def test_an_attempt_that_says_nothing_leaves_nothing(tmp_path: Path, store: FakeLogStore) -> None:
    """No file, no row, no question; a follower sees its end, and so does who comes later or asks elsewhere."""
    lease = a_lease()
    async with serving(LogBook(tmp_path, store)) as book, anyio.create_task_group() as tasks:
        await book.open(lease, PLAN)
        found: list[LogRecord] = []

        async def follow() -> None:
            found.extend(await read_all(book, follow=True))

        tasks.start_soon(follow)
        for index in range(2):
            step = FakeStep(tmp_path, lease, index)
            step.claim()
            book.step_started(lease.id, index)
            await anyio.lowlevel.checkpoint()
            step.exit()
            book.step_ended(lease.id, index)
        with anyio.fail_after(20):
            assert await book.complete(lease.id) == 0
            assert await read_all(book) == []
            store.complete.add((1, 1))  # the attempt's end is recorded before its log is closed
            await book.close(lease.id)
            while tasks._tasks:  # type: ignore[attr-defined]
                await anyio.lowlevel.checkpoint()
        for reader in (book, LogBook(tmp_path / "elsewhere", store)):
            assert await read_all(reader) == await read_all(reader, follow=True) == []
        assert found == []
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "runs" / str(lease.id) / "redaction").exists()
    assert (store.appends, store.asked) == (0, 0)


async def test_attempts_share_what_is_pinned_of_the_hosts_secrets(tmp_path: Path, store: FakeLogStore) -> None:
    """One file for all of them, which outlives the attempt that wrote it and holds for a daemon with other secrets."""
    first, second = a_lease(1), a_lease(2)
    book = LogBook(tmp_path, store, host_secrets={"PG": "old"})
    for lease in (first, second):
        FakeStep(tmp_path, lease, 0).write(Stream.OUT, b"old new")
        await book.open(lease, PLAN)
    runs = [tmp_path / "runs" / str(lease.id) for lease in (first, second)]
    assert (runs[0] / "redaction").samefile(runs[1] / "redaction")
    shutil.rmtree(runs[0])
    third = a_lease(3)
    (tmp_path / "runs" / str(third.id)).mkdir()
    await book.open(third, PLAN)
    assert (tmp_path / "runs" / str(third.id) / "redaction").samefile(runs[1] / "redaction")
    other = LogBook(tmp_path, store, host_secrets={"PG": "new"})
    await other.open(second, PLAN)
    await settle(other)
    assert local_log(tmp_path, second) == b"*** new"


async def test_caps_are_pinned_with_the_first_byte(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    first = LogBook(tmp_path, store, max_database=10)
    await first.open(lease, PLAN)
    step = FakeStep(tmp_path, lease, 0)
    first.step_started(lease.id, 0)
    assert not (step.directory.parent / "redaction").exists()
    step.write(Stream.OUT, b"01234567")
    await settle(first)
    step.write(Stream.OUT, b"secret89")
    second = LogBook(tmp_path, store, max_database=1000, host_secrets={"PG": "secret"})
    await second.open(lease, PLAN)
    await settle(second)
    kept, cut = local_log(tmp_path, lease).splitlines()[:2]
    assert kept == b"01234567se" and cut.startswith(b"[bsup: stored log cut here: over the limit of 10 bytes")


async def test_who_waits_for_the_end_does_not_wait_for_the_shippers_rest(tmp_path: Path, store: FakeLogStore) -> None:
    resting = anyio.Event()

    async def pause(seconds: float) -> None:
        resting.set()
        await anyio.sleep_forever()

    lease = a_lease()
    async with serving(LogBook(tmp_path, store, pause=pause)) as book:
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        book.step_started(lease.id, 0)
        step.write(Stream.OUT, b"one ")
        with anyio.fail_after(20):
            await resting.wait()
            step.write(Stream.OUT, b"two")
            step.exit()
            book.step_ended(lease.id, 0)
            assert await book.complete(lease.id) == 7
    assert joined(store.records()) == b"one two"


@pytest.mark.parametrize("is_behind", [True, False])
async def test_the_database_waits_while_the_disk_does_not_keep_up(
    tmp_path: Path, store: FakeLogStore, is_behind: bool
) -> None:
    """Batches follow each other at once only while the pump has nothing better to do with the machine."""
    lease = a_lease()
    book = LogBook(tmp_path, store)
    await book.open(lease, PLAN)
    FakeStep(tmp_path, lease, 0).write(Stream.OUT, b"x" * 3_000_000)
    book.step_started(lease.id, 0)
    while await book.pump_once():
        pass
    rested: list[int] = []

    async def pause(seconds: float) -> None:
        rested.append(store.appends)
        await anyio.lowlevel.checkpoint()

    shipper = Shipper(store, lambda _: None, lambda: is_behind, pause, random.Random(1))
    shipper.tell(book._open[lease.id].shipment, book._open[lease.id].transcript.entries)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shipper.run)
        with anyio.fail_after(20):
            while len(rested) < (3 if is_behind else 1):
                await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert rested == ([1, 2, 3] if is_behind else [3])


async def test_an_attempt_without_a_log_is_read_to_its_end(tmp_path: Path, store: FakeLogStore) -> None:
    """In-process kinds write none: a follower waits for the end while it runs, and finds nothing."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            store.complete.add((1, 1))

    book = LogBook(tmp_path, store, pause=pause)
    assert await read_all(book) == []
    assert await read_all(book, follow=True) == []
    assert len(pauses) == 3
    assert await read_all(book) == await read_all(book, follow=True) == []
