"""The log is a function of what is on disk: the bytes less redactions, in order, with its notes, however it is made."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.model.job import Lease, LogRecord, Stream
from supervisor.model.redaction import Redactor, SecretSet
from supervisor.sinks import local
from supervisor.sinks.local import Cursor, Flag, LocalCopy, LocalWriter
from supervisor.sinks.transcript import Limits, Transcript, names_in
from tests.sinks.fakes import FakeStep, a_lease, joined, local_log

SECRETS = {b"abba": b"***", b"bab": b"<b>", b"ab": b"#"}
PLENTY = Limits(1 << 40, 1 << 40)


def make(state: Path, lease: Lease, limits: Limits = PLENTY, secrets: dict[bytes, bytes] = SECRETS) -> Transcript:
    writer = LocalWriter(path_of(state, lease), lease.id)
    run = state / "runs" / str(lease.id)
    run.mkdir(parents=True, exist_ok=True)
    transcript = Transcript(run, writer, SecretSet(secrets), limits, pin=lambda: None)
    transcript.open(names_in(str(run)))
    return transcript


def path_of(state: Path, lease: Lease) -> Path:
    return state / "logs" / str(lease.job) / str(lease.attempt)


def records(state: Path, lease: Lease) -> list[LogRecord]:
    copy, cursor, found = LocalCopy(path_of(state, lease)), Cursor(0), []
    if not local_log(state, lease):
        return []
    while pieces := copy.pieces(cursor, 1 << 16):
        found += [
            LogRecord(piece.offset, piece.step, Stream(piece.stream), piece.at, data)
            for piece, data in zip(pieces, copy.read(pieces), strict=True)
        ]
    return found


def run_out(transcript: Transcript, budget: int = 1 << 18) -> None:
    while transcript.advance(budget):
        pass


def redacted(data: bytes) -> bytes:
    redactor = Redactor(SECRETS)
    return redactor.feed(data) + redactor.finish()


def test_both_streams_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease)
    step = FakeStep(tmp_path, lease, 0)
    transcript.begin(0)
    for stream, data in [(Stream.OUT, b"1"), (Stream.ERR, b"2"), (Stream.OUT, b"3"), (Stream.OUT, b"4")]:
        step.write(stream, data)
        run_out(transcript)
    transcript.end(0)
    run_out(transcript)
    assert transcript.is_settled
    found = [(r.offset, r.step, r.stream, r.data) for r in records(tmp_path, lease)]
    assert found == [
        (0, 0, Stream.OUT, b"1"),
        (1, 0, Stream.ERR, b"2"),
        (2, 0, Stream.OUT, b"3"),
        (3, 0, Stream.OUT, b"4"),
        (4, 0, Stream.NOTE, b""),
    ]


def test_a_secret_across_arrivals_and_between_other_streams_output_is_replaced(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease, secrets={b"s3cret": b"***"})
    step = FakeStep(tmp_path, lease, 0)
    transcript.begin(0)
    for stream, data in [(Stream.OUT, b"x s3c"), (Stream.ERR, b"oops\n"), (Stream.OUT, b"ret y")]:
        step.write(stream, data)
        run_out(transcript)
    transcript.end(0)
    run_out(transcript)
    assert local_log(tmp_path, lease) == b"x oops\n*** y"


def test_arrivals_close_in_time_become_one_piece(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease)
    step = FakeStep(tmp_path, lease, 0)
    for n in range(100):
        step.write(Stream.OUT, b"x\n", after=0.001 if n % 20 else 1.0)
    transcript.end(0)
    run_out(transcript)
    assert [len(r.data) for r in records(tmp_path, lease)] == [40] * 5 + [0]


def test_a_record_half_written_and_bytes_the_index_does_not_know_of(tmp_path: Path) -> None:
    """A shepherd killed between the bytes and their record loses none."""
    lease = a_lease()
    transcript = make(tmp_path, lease)
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"one ")
    step.write_raw(Stream.OUT, b"two")
    step.record(Stream.OUT, 7, size=9)
    step.write_raw(Stream.ERR, b"three")
    transcript.begin(0)
    run_out(transcript)
    assert local_log(tmp_path, lease) == b"one "
    transcript.end(0)
    run_out(transcript)
    assert local_log(tmp_path, lease) == b"one twothree"


def test_a_step_that_never_wrote_ends_too(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease)
    transcript.begin(3)
    transcript.end(3)
    run_out(transcript)
    assert transcript.is_settled and local_log(tmp_path, lease) == b""


def test_a_cut_is_marked_where_it_is_and_says_how_much_was_dropped(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease, secrets={b"s3cret": b"***"})
    step = FakeStep(tmp_path, lease, 0, max_output=9)
    step.write(Stream.OUT, b"text s3cr")
    step.cut(Stream.OUT)
    step.cut(Stream.ERR)
    transcript.begin(0)
    run_out(transcript)
    before = local_log(tmp_path, lease)
    assert before == b"text ***\n[bsup: output cut here: over the limit of 9 bytes for a step]\n"
    step.exit(dropped=4096)
    transcript.end(0)
    run_out(transcript)
    assert local_log(tmp_path, lease) == before + b"[bsup: 4 KiB of output dropped]\n"


def test_what_was_held_back_before_a_restart_is_there_at_the_cut(tmp_path: Path) -> None:
    lease, secrets = a_lease(), {b"s3cret": b"***"}
    step = FakeStep(tmp_path, lease, 0)
    for data in (b"text s3c", b"r"):
        step.write(Stream.OUT, data)
        run_out(make(tmp_path, lease, secrets=secrets))
    transcript = make(tmp_path, lease, secrets=secrets)
    step.cut(Stream.OUT)
    run_out(transcript)
    assert local_log(tmp_path, lease) == b"text ***\n[bsup: output cut here]\n"


def test_notes_stand_where_they_were_made(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease, secrets={b"hush": b"***"})
    transcript.note(0, "hush: before\nthe step", 1.0)
    step = FakeStep(tmp_path, lease, 0)
    transcript.begin(0)
    step.write(Stream.OUT, b"one", after=0.0)
    transcript.note(0, "amid", 2.0)
    step.write(Stream.OUT, b"two", after=0.0)
    transcript.end(0)
    transcript.note(0, "at its end", 3.0)
    transcript.note(2, "[bsup: ready made]", 4.0)
    run_out(transcript)
    assert local_log(tmp_path, lease).decode().splitlines() == [
        "[bsup: ***: before the step]",
        "one",
        "[bsup: amid]",
        "two",
        "[bsup: at its end]",
        "[bsup: ready made]",
    ]
    assert [(r.step, r.at) for r in records(tmp_path, lease) if r.stream is Stream.NOTE and r.data][-1] == (2, 4.0)


def test_the_stored_log_is_cut_at_its_cap_and_the_local_one_goes_on(tmp_path: Path) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease, Limits(disk=20, database=10))
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"0123456789")
    transcript.begin(0)
    run_out(transcript)
    assert local_log(tmp_path, lease) == b"0123456789", "exactly the cap is no cut"
    step.write(Stream.ERR, b"x" * 5)
    step.write(Stream.OUT, b"y" * 50)
    transcript.end(0)
    run_out(transcript)
    log = local_log(tmp_path, lease).decode().splitlines()
    assert log[0] == "0123456789" and log[1].startswith("[bsup: stored log cut here: over the limit of 10 bytes")
    assert log[2] == "xxxxxyyyyy" and log[3] == "[bsup: output cut here: over the limit of 20 bytes for a step]"
    pieces = LocalCopy(path_of(tmp_path, lease)).pieces(Cursor(0), 1 << 20)
    assert [Flag.LEFT_OUT in piece.flags for piece in pieces] == [False, False, True, True, False, False]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease)
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"hello")
    transcript.end(0)
    with monkeypatch.context() as patch:
        patch.setattr(local, "_write_all", Disk(room=3).write)
        with pytest.raises(OSError):
            transcript.advance()
        assert not transcript.is_settled
    run_out(transcript)
    assert transcript.is_settled and local_log(tmp_path, lease) == b"hello"


class Disk:
    """Writes until ``room`` bytes are written, and then as a full disk or a killed process does: only a part."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = local._write_all

    def write(self, descriptor: int, data: bytes, position: int) -> None:
        part = data[: self.room]
        self._write(descriptor, part, position)
        self.room -= len(part)
        if len(part) < len(data):
            raise OSError(28, "no room")


arrival = st.tuples(
    st.sampled_from([Stream.OUT, Stream.ERR]),
    st.lists(st.sampled_from(b"ab\n"), min_size=1, max_size=8).map(bytes),
    st.sampled_from([0.0, 1.0]),
)
event = st.one_of(arrival, st.just("note"), st.just("pump"), st.integers(0, 300), st.just("step"))


@settings(max_examples=150, deadline=None)
@given(st.lists(event, max_size=30), st.sampled_from([PLENTY, Limits(30, 12)]))
def test_a_log_made_with_kills_is_the_log_made_without(events: list[object], limits: Limits) -> None:
    """An integer is a kill (of the daemon) in the middle of writing, after so many bytes; the next one goes on."""
    lease = a_lease()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        state = Path(directory)
        transcript = make(state, lease, limits)
        index, step = 0, FakeStep(state, lease, 0)
        step.claim()
        transcript.begin(0)
        written: dict[tuple[int, Stream], bytes] = {}
        for happened in events:
            match happened:
                case (Stream() as stream, bytes() as data, float() as after):
                    step.write(stream, data, after)
                    written[index, stream] = written.get((index, stream), b"") + data
                case "note":
                    transcript.note(index, "noted", 1.0)
                case "pump":
                    run_out(transcript, budget=1)
                case "step":
                    step.exit()
                    transcript.end(index)
                    index, step = index + 1, FakeStep(state, lease, index + 1)
                    step.claim()
                    transcript.begin(index)
                case int(room):
                    patch.setattr(local, "_write_all", Disk(room).write)
                    with suppress(OSError):
                        run_out(transcript)
                    patch.undo()
                    kept = local_log(state, lease)[: transcript.size]
                    transcript = make(state, lease, limits)
                    assert local_log(state, lease).startswith(kept), "what was committed was contradicted"
        step.exit()
        transcript.end(index)
        run_out(transcript)
        assert transcript.is_settled
        found = records(state, lease)
        made = local_log(state, lease)

        # The same again, from the files alone and at one go.
        for path in (state / "logs").rglob("1.*"):
            path.unlink()
        again = make(state, lease, limits)
        run_out(again)
        assert again.is_settled and local_log(state, lease) == made

        if limits is PLENTY:
            for (number, stream), data in written.items():
                mine = [record for record in found if record.step == number]
                assert joined(mine, stream) == redacted(data)
        assert [r.step for r in found] == sorted(r.step for r in found)
        assert joined(found).count(b"[bsup: noted]") == events.count("note")


@pytest.mark.parametrize("how", ["cut off", "not UTF-8"])
def test_a_damaged_note_keeps_nobody_from_the_rest_of_the_log(tmp_path: Path, how: str) -> None:
    lease = a_lease()
    transcript = make(tmp_path, lease)
    step = FakeStep(tmp_path, lease, 0)
    step.write(Stream.OUT, b"out\n")
    transcript.begin(0)
    transcript.note(0, "the first", 1.0)
    transcript.note(0, "the second", 2.0)
    notes = tmp_path / "runs" / str(lease.id) / "notes"
    first, second = notes.read_bytes().splitlines(keepends=True)
    notes.write_bytes((b"{\n" if how == "cut off" else first.replace(b"first", b"f\xffrst")) + second)
    again = make(tmp_path, lease)
    again.end(0)
    run_out(again)
    assert again.is_settled
    log = local_log(tmp_path, lease)
    assert b"out\n" in log
    assert log.endswith(b"[bsup: the second]\n")
    assert log.count(b"[bsup: a note of bsup's own is damaged]\n") == 1
