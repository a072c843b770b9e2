"""The log book: from the spool to the local copy, to the database and to readers, through restarts and outages."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress
from pathlib import Path

import anyio
import pytest

from supervisor.model.errors import RunnerError, StoreUnavailable
from supervisor.model.job import Stream
from supervisor.ports import LogReader, LogSink, LogStore
from supervisor.sinks.log import LogBook
from tests.sinks.fakes import (
    PLAN,
    FakeLogStore,
    FakeStep,
    a_lease,
    complete,
    joined,
    local_log,
    read_all,
    rss,
    serving,
    settle,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> FakeLogStore:
    return FakeLogStore()


def test_it_keeps_the_promises_of_the_ports(tmp_path: Path, store: FakeLogStore) -> None:
    log_store: LogStore = store
    book = LogBook(tmp_path, log_store)
    sink: LogSink = book
    reader: LogReader = book
    assert sink is reader


async def test_an_attempt_from_its_first_byte_to_its_last(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease(secrets={"TOKEN": "s3cret"}, redact={"hush": "[quiet]"})
    async with serving(LogBook(tmp_path, store, host_secrets={"PG": "hostpw"})) as book:
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        book.step_started(lease.id, 0)
        step.write(Stream.OUT, b"a s3c")
        step.write(Stream.ERR, b"hostpw \xff\x00")
        step.write(Stream.OUT, b"ret hush\n")
        step.exit()
        book.step_ended(lease.id, 0)
        with anyio.fail_after(20):
            size = await book.complete(lease.id)
        assert book.redact(lease.id, "s3cret hush hostpw") == "*** [quiet] ***"
        await book.close(lease.id)
    assert joined(store.records(), Stream.OUT) == b"a *** [quiet]\n"
    assert joined(store.records(), Stream.ERR) == b"*** \xff\x00"
    assert size == len(local_log(tmp_path, lease)) == len(joined(store.records()))
    assert joined(await read_all(book)) == local_log(tmp_path, lease)


async def test_secrets_and_logs_are_for_the_owner_alone(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease(secrets={"TOKEN": "s3cret"})
    book = LogBook(tmp_path, store)
    await book.open(lease, PLAN)
    await book.note(lease.id, 0, "it is s3cret")
    await settle(book)
    run = tmp_path / "runs" / str(lease.id)
    for path in (run / "redaction", run / "notes", *(tmp_path / "logs" / "1").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    for path in (run / "notes", *(tmp_path / "logs" / "1").iterdir()):
        assert b"s3cret" not in path.read_bytes(), path


async def test_what_was_pinned_holds_after_a_restart(tmp_path: Path, store: FakeLogStore) -> None:
    """A daemon that comes back with other host secrets and caps makes the same log as the one before."""
    lease = a_lease()
    first = LogBook(tmp_path, store, host_secrets={"PG": "old"}, max_database=100)
    await first.open(lease, PLAN)
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"old new " * 20)
    step.exit()
    second = LogBook(tmp_path, store, host_secrets={"PG": "new"}, max_database=5)
    await second.open(lease, PLAN)
    await settle(second)
    assert local_log(tmp_path, lease).startswith(b"*** new " * 10)
    assert second.redact(lease.id, "old new") == "*** ***"


async def test_a_follower_here_sees_each_line_and_then_the_end(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    async with serving(LogBook(tmp_path, store)) as book, anyio.create_task_group() as tasks:
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        book.step_started(lease.id, 0)
        lines = book.read(1, 1, follow=True)
        with anyio.fail_after(20):
            for n in range(5):
                line = f"line {n}\n".encode()
                step.write(Stream.OUT, line)
                assert (await anext(lines)).data == line
            step.exit()
            book.step_ended(lease.id, 0)

            async def end() -> None:
                await book.complete(lease.id)
                await book.close(lease.id)

            tasks.start_soon(end)
            with pytest.raises(StopAsyncIteration):
                await anext(lines)


async def test_a_follower_elsewhere_polls_until_the_log_is_complete(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    here = LogBook(tmp_path / "here", store)
    await here.open(lease, PLAN)
    step = FakeStep(tmp_path / "here", lease, 0)
    here.step_started(lease.id, 0)
    script = iter([b"one\n", b"two\n", b"three\n"])
    pauses = []

    async def pause(seconds: float) -> None:
        """Each time the follower waits, a line is written; then the attempt ends."""
        pauses.append(seconds)
        if line := next(script, None):
            step.write(Stream.OUT, line)
        else:
            store.complete.add((1, 1))
        await settle(here)
        if len(pauses) == 2:
            store.faults = ["before"]  # a follower outlives a blip

    there = LogBook(tmp_path / "there", store, pause=pause)
    assert joined(await read_all(there, follow=True)) == b"one\ntwo\nthree\n"
    assert max(pauses) <= 0.15


async def test_readers_filter_and_begin_in_the_middle(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    book = LogBook(tmp_path / "here", store)
    await book.open(lease, PLAN)
    for n in range(2):
        step = FakeStep(tmp_path / "here", lease, n)
        step.write(Stream.OUT, b"out%d\n" % n)
        step.write(Stream.ERR, b"err%d\n" % n)
        book.step_ended(lease.id, n)
    await book.note(lease.id, 1, "a note")
    await settle(book)
    elsewhere = LogBook(tmp_path / "there", store)
    for reader in (book, elsewhere):
        assert joined(await read_all(reader, step=1)) == b"out1\nerr1\n[bsup: a note]\n"
        assert joined(await read_all(reader, stream=Stream.ERR)) == b"err0\nerr1\n"
        first = (await read_all(reader, offset=7))[0]
        assert (first.offset, first.data) == (7, b"r0\n")
        assert await read_all(reader, offset=1000) == []


async def test_a_lost_attempts_remains_are_not_taken_for_its_log(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    book = LogBook(tmp_path, store)
    await book.open(lease, PLAN)
    step = FakeStep(tmp_path, lease, 0)
    book.step_started(lease.id, 0)
    step.write(Stream.OUT, b"stored ")
    await settle(book)
    step.write(Stream.OUT, b"not stored")
    await book.pump_once()
    assert joined(await read_all(LogBook(tmp_path, store))) == b"stored "


async def test_an_unknown_commit_stores_nothing_twice(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    book = LogBook(tmp_path, store)
    await book.open(lease, PLAN)
    step = FakeStep(tmp_path, lease, 0)
    book.step_started(lease.id, 0)
    for n, fault in enumerate(["after", "before", "after", "after"]):
        step.write(Stream.OUT, b"%d" % n)
        await book.pump_once()
        store.faults = [fault]
        with pytest.raises(StoreUnavailable):
            await book.ship_once()
        step.write(Stream.OUT, b".")  # more has come when it is offered again
        await book.pump_once()
    await settle(book)
    assert joined(store.records()) == b"0.1.2.3."


async def test_a_log_that_a_failover_set_back_is_made_whole(tmp_path: Path, store: FakeLogStore) -> None:
    lease, other = a_lease(1), a_lease(2)
    book = LogBook(tmp_path, store)
    steps = []
    for each in (lease, other):
        await book.open(each, PLAN)
        steps.append(FakeStep(tmp_path, each, 0))
        book.step_started(each.id, 0)
    for n in range(4):
        for step in steps:
            step.write(Stream.OUT, b"line %d\n" % n)
        with suppress(StoreUnavailable) if n == 3 else nullcontext():
            await settle(book)
        if n == 2:
            del store.chunks[1, 1][1:]  # the new primary never saw these
    await settle(book)
    for job in (1, 2):
        assert joined(store.records(job)) == b"".join(b"line %d\n" % n for n in range(4))


async def test_a_log_that_was_stored_whole_before_a_restart_is_complete(tmp_path: Path, store: FakeLogStore) -> None:
    """The pump says that nothing more comes before the database says that it has it all: the latter must be told too,
    or the attempt waits for ever."""
    lease = a_lease()
    first = LogBook(tmp_path, store)
    await first.open(lease, PLAN)
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"all of it\n")
    step.exit()
    first.step_ended(lease.id, 0)
    await settle(first)
    second = LogBook(tmp_path, store)
    await second.open(lease, PLAN)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(second.complete, lease.id)
            await anyio.lowlevel.checkpoint()
            while await second.pump_once():
                pass
            await anyio.lowlevel.checkpoint()
            await second.ship_once()


async def test_a_database_that_is_away_holds_up_only_the_end(tmp_path: Path, store: FakeLogStore) -> None:
    pauses: list[float] = []
    back = anyio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await anyio.lowlevel.checkpoint()
        if len(pauses) == 12:
            store.away = False
            back.set()

    lease = a_lease()
    store.away = True
    async with serving(LogBook(tmp_path, store, pause=pause, rng=random.Random(1))) as book:
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        book.step_started(lease.id, 0)
        step.write(Stream.OUT, b"x" * 3_000_000)
        step.exit()
        book.step_ended(lease.id, 0)
        with anyio.fail_after(20):
            size = await book.complete(lease.id)
    assert back.is_set() and size == 3_000_000
    assert joined(store.records()) == b"x" * 3_000_000
    assert 1.0 < max(pauses[:12]) <= 5.0, "it comes back ever more slowly"


async def test_status_says_what_waits(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease()
    first = anyio.Event()

    async def pause(seconds: float) -> None:
        first.set()
        await anyio.sleep_forever()

    async with serving(LogBook(tmp_path, store, pause=pause)) as book:
        await book.open(lease, PLAN)
        store.away = True
        await book.note(lease.id, 0, "x" * 1000)
        with anyio.fail_after(20):
            await first.wait()
        assert book.problems() == ["1009 bytes of logs wait on disk for the database"]


async def test_a_lease_that_is_gone_stops_the_shipping_alone(tmp_path: Path, store: FakeLogStore) -> None:
    gone, kept = a_lease(1), a_lease(2)
    book = LogBook(tmp_path, store)
    for lease in (gone, kept):
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        step.write(Stream.OUT, b"hello")
        step.exit()
        book.step_ended(lease.id, 0)
    store.gone.add(gone.id)
    await settle(book)
    assert await complete(book, gone.id, kept.id) == [5, 5]
    assert store.records(1) == [] and joined(store.records(2)) == b"hello"
    assert local_log(tmp_path, gone) == b"hello"


@pytest.mark.parametrize("seed", range(25))
async def test_offsets_are_the_same_here_and_there_through_restarts_and_a_cut(
    tmp_path: Path, store: FakeLogStore, seed: int
) -> None:
    """What the database has is the local log without the bytes behind the cap, each byte at its own offset."""
    rng = random.Random(seed)
    lease = a_lease(secrets={"S": "secret"})
    books = []

    async def restart() -> LogBook:
        books.append(LogBook(tmp_path, store, max_database=200))
        await books[-1].open(lease, PLAN)
        return books[-1]

    book = await restart()
    for index in range(3):
        step = FakeStep(tmp_path, lease, index)
        step.claim()
        book.step_started(lease.id, index)
        for _ in range(rng.randrange(30)):
            text = bytes(rng.choices(b"secret\n", k=rng.randrange(30))) + rng.choice([b"", b"sec", b"ret", b"secret"])
            step.write(rng.choice([Stream.OUT, Stream.ERR]), text)
            match rng.randrange(8):
                case 0:
                    await book.pump_once()
                case 1:
                    store.faults = [rng.choice(["before", "after", "none"])]
                    with suppress(StoreUnavailable):
                        await settle(book)
                    store.faults = []
                case 2:
                    book = await restart()
                case 3:
                    await book.note(lease.id, index, "a note")
        step.exit()
        book.step_ended(lease.id, index)
    await settle(book)
    [size] = await complete(book, lease.id)
    log = local_log(tmp_path, lease)
    assert size == len(log) == await store.log_size(1, 1)
    assert b"secret" not in log
    stored = store.records()
    for record in stored:
        assert log[record.offset : record.offset + len(record.data)] == record.data
    local = await read_all(book)
    left_out = {r.offset + i for r in local for i in range(len(r.data))} - {
        r.offset + i for r in stored for i in range(len(r.data))
    }
    notes = [r for r in local if r.stream is Stream.NOTE]
    assert not any(note.offset + i in left_out for note in notes for i in range(len(note.data)))
    for index in range(3):
        kept = joined([r for r in stored if r.step == index], Stream.OUT, Stream.ERR)
        made = joined([r for r in local if r.step == index], Stream.OUT, Stream.ERR)
        assert len(kept) == min(200, len(made))
        assert (b"stored log cut here" in joined([n for n in notes if n.step == index])) == (len(made) > 200)
    # A reader elsewhere that is interrupted anywhere goes on without a byte twice or missed.
    elsewhere = LogBook(tmp_path / "elsewhere", store)
    for offset in range(0, size, 7):
        rest = await read_all(elsewhere, offset=offset)
        assert joined(rest) == bytes(log[i] for i in range(offset, size) if i not in left_out)


async def test_busy_attempts_do_not_starve_a_quiet_one(tmp_path: Path, store: FakeLogStore) -> None:
    """However much others write, one look at all of them takes a line of each."""
    book = LogBook(tmp_path, store)
    steps = []
    for job in range(1, 8):
        lease = a_lease(job)
        await book.open(lease, PLAN)
        steps.append(FakeStep(tmp_path, lease, 0))
        book.step_started(lease.id, 0)
    for step in steps[:-1]:
        step.write(Stream.OUT, b"y\n" * 1_000_000)
    steps[-1].write(Stream.OUT, b"a line\n")
    assert await book.pump_once()
    assert local_log(tmp_path, a_lease(7)) == b"a line\n"
    await book.ship_once()
    await book.ship_once()
    assert joined(store.records(7)) == b"a line\n"


async def test_idle_attempts_are_not_looked_at(tmp_path: Path, store: FakeLogStore) -> None:
    book = LogBook(tmp_path, store)
    await book.open(a_lease(), PLAN)
    await settle(book)
    assert book._pump.is_idle and book._shipper.is_idle


async def test_a_long_line_and_much_output_leave_memory_flat(tmp_path: Path, store: FakeLogStore) -> None:
    lease = a_lease(secrets={"S": "needle in the line"})
    async with serving(LogBook(tmp_path, store, max_database=8 << 20)) as book:
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        book.step_started(lease.id, 0)
        piece = b"\xff\x00" * (1 << 19)
        before = rss()
        for _ in range(100):  # a line of 100 MiB
            step.write(Stream.OUT, piece)
        step.write(Stream.OUT, b"needle in the line\n")
        step.exit()
        book.step_ended(lease.id, 0)
        with anyio.fail_after(120):
            size = await book.complete(lease.id)
        assert rss() - before < 64 << 20
        count = 0
        async for record in book.read(1, 1, stream=Stream.OUT):
            assert len(record.data) <= 65536
            count += len(record.data)
        assert rss() - before < 64 << 20
    assert count == (100 << 20) + 4
    assert size == await store.log_size(1, 1)
    assert sum(len(r.data) for r in store.records() if r.stream is Stream.OUT) == 8 << 20


async def test_local_copies_stay_within_their_budget_oldest_first(tmp_path: Path, store: FakeLogStore) -> None:
    book = LogBook(tmp_path, store, keep_local=300_000)
    open_one = a_lease(99)
    await book.open(open_one, PLAN)
    await book.note(open_one.id, 0, "the oldest, but it is open")
    await book.pump_once()
    for job in range(1, 7):
        lease = a_lease(job)
        await book.open(lease, PLAN)
        step = FakeStep(tmp_path, lease, 0)
        step.write(Stream.OUT, b"z" * 90_000)
        step.exit()
        book.step_ended(lease.id, 0)
        assert await complete(book, lease.id) == [90_000]
        await book.close(lease.id)
    kept = sorted(int(path.parent.name) for path in (tmp_path / "logs").glob("*/*.log"))
    assert kept == [5, 6, 99]
    # What is not here any more comes from the database.
    store.complete.add((1, 1))
    assert len(joined(await read_all(book, job=1))) == 90_000


async def test_a_copy_of_another_database_is_begun_anew(tmp_path: Path, store: FakeLogStore) -> None:
    old = a_lease()
    book = LogBook(tmp_path, store)
    await book.open(old, PLAN)
    await book.note(old.id, 0, "of another life")
    await settle(book)
    new = a_lease()
    new = type(new)(**{**{f: getattr(new, f) for f in new.__struct_fields__}, "id": type(new.id)("cd" * 16, 7)})
    other = LogBook(tmp_path, FakeLogStore())
    await other.open(new, PLAN)
    await settle(other)
    assert local_log(tmp_path, new) == b""


async def test_what_the_disk_refuses_is_said_as_the_hosts_fault(tmp_path: Path, store: FakeLogStore) -> None:
    (tmp_path / "logs").write_text("not a directory")
    with pytest.raises(RunnerError, match="the log can't be opened"):
        await LogBook(tmp_path, store).open(a_lease(), PLAN)


async def test_one_broken_attempt_does_not_stop_the_others(tmp_path: Path, store: FakeLogStore) -> None:
    book = LogBook(tmp_path, store)
    steps = {}
    for job in (1, 2):
        lease = a_lease(job)
        await book.open(lease, PLAN)
        steps[job] = FakeStep(tmp_path, lease, 0)
        steps[job].write(Stream.OUT, b"hello")
        book.step_started(lease.id, 0)
    out = steps[1].directory / "out"
    out.unlink()
    out.mkdir()
    await settle(book)
    assert joined(store.records(2)) == b"hello"
    assert len(book.problems()) == 1 and "job 1" in book.problems()[0]
    out.rmdir()
    out.write_bytes(b"hello")
    await settle(book)
    assert joined(store.records(1)) == b"hello" and not book.problems()


async def test_calls_for_an_attempt_that_is_not_open_do_nothing(tmp_path: Path, store: FakeLogStore) -> None:
    book = LogBook(tmp_path, store, host_secrets={"A": "alpha"})
    lease = a_lease()
    book.step_started(lease.id, 0)
    book.step_ended(lease.id, 0)
    await book.note(lease.id, 0, "x")
    assert await book.complete(lease.id) == 0
    await book.close(lease.id)
    assert book.redact(lease.id, "alpha beta") == "*** beta"
