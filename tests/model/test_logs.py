"""Log records as stored: what was packed is what comes out, gaps and all, and slices begin where they are asked to."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.job import LogRecord, Stream
from supervisor.model.logs import (
    decode_records,
    encode_records,
    format_size,
    is_wanted,
    next_offset,
    slice_records,
    split_record,
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[LogRecord]]:
    """An offset and the records of a chunk that begins there; some behind a gap, some empty."""
    begin = offset = draw(st.integers(0, 1 << 40))
    records = []
    for _ in range(draw(st.integers(0, 6))):
        offset += draw(st.sampled_from([0, 0, 0, 1, 5 << 30]))
        data = draw(st.binary(max_size=20))
        at = draw(st.floats(0, 4e9))
        records.append(LogRecord(offset, draw(st.integers(0, 999)), draw(st.sampled_from(Stream)), at, data))
        offset += len(data)
    return begin, records


@given(runs())
def test_records_come_out_as_they_were_packed(run: tuple[int, list[LogRecord]]) -> None:
    offset, records = run
    assert decode_records(encode_records(records, offset), offset) == records


@given(runs(), st.integers(0, 200))
def test_a_slice_is_what_lies_behind_the_offset(run: tuple[int, list[LogRecord]], ahead: int) -> None:
    begin, records = run
    offset = begin + ahead
    kept = slice_records(records, offset)

    def place(records: list[LogRecord]) -> dict[int, int]:
        return {r.offset + i: byte for r in records for i, byte in enumerate(r.data)}

    assert place(kept) == {at: byte for at, byte in place(records).items() if at >= offset}
    assert next_offset(kept, offset) == max(offset, next_offset(records, begin))


def test_a_reader_comes_through_a_gap_wherever_it_stands() -> None:
    records = [LogRecord(0, 0, Stream.OUT, 1.0, b"ab"), LogRecord(1000, 0, Stream.NOTE, 2.0, b"")]
    for offset in (0, 1, 2, 500, 999):
        assert next_offset(slice_records(records, offset), offset) == 1000
    assert slice_records(records, 1000) == []


def test_records_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="begins before"):
        encode_records([LogRecord(5, 0, Stream.OUT, 1.0, b"ab"), LogRecord(6, 0, Stream.OUT, 1.0, b"c")])


@given(st.binary(max_size=60) | st.binary(max_size=60).map(zlib.compress))
def test_garbage_is_refused_in_one_way(data: bytes) -> None:
    try:
        decode_records(data, 0)
    except InvalidInput as refused:
        assert refused.field == "log chunk"


@given(st.binary(max_size=50), st.integers(1, 9))
def test_a_record_is_split_without_a_loss(data: bytes, size: int) -> None:
    parts = split_record(LogRecord(7, 1, Stream.ERR, 3.0, data), size)
    assert b"".join(part.data for part in parts) == data
    assert all(0 < len(part.data) <= size for part in parts)
    assert all(part.offset == 7 + size * n for n, part in enumerate(parts))


def test_a_filter_by_stream_leaves_notes_out() -> None:
    assert is_wanted(2, Stream.NOTE, only_step=None, only_stream=None)
    assert is_wanted(2, Stream.NOTE, only_step=2, only_stream=None)
    assert not is_wanted(2, Stream.NOTE, only_step=2, only_stream=Stream.OUT)
    assert not is_wanted(1, Stream.OUT, only_step=2, only_stream=Stream.OUT)


@pytest.mark.parametrize(
    ("size", "words"),
    [(1 << 30, "1 GiB"), (64 << 20, "64 MiB"), (1536, "1.5 KiB"), (17, "17 bytes"), (1, "1 byte"), (0, "0 bytes")],
)
def test_sizes_read_well(size: int, words: str) -> None:
    assert format_size(size) == words
