"""How an attempt's redacted log is cut into records and packed for storage. No I/O.

May import the other modules of this floor. Called by the log sink (packs chunks), the store (unpacks pages), readers.

An attempt has one redacted log: a sequence of bytes in which every byte has an offset, the same on the host that wrote
it and in the database. Records are the tagged pieces of it, in order of offset. A chunk is a run of records as stored.

A chunk may leave bytes out (a step over its cap in the database): then a record begins beyond the end of the one before
it, and offsets after the gap stay what they are on the host. A gap is always followed by a record, if need be an empty
one, so that ``next_offset`` of what was read is always where reading goes on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

from supervisor.model.errors import InvalidInput
from supervisor.model.job import LogRecord, Stream

MAX_RECORD = 64 * 1024
"""Readers get no piece longer than this, in bytes."""

_VERSION = 1
_HEAD = struct.Struct("<BI")  # format version, number of records
_TAG = struct.Struct("<dQIHB")  # at (unix seconds), gap before the record, length, step, stream
# Tags first and data after them, not interleaved: zlib does better on each alone, and one unpack reads all tags.


def encode_records(records: Sequence[LogRecord], offset: int | None = None) -> bytes:
    """Packs records in order of offset; ``offset`` is where the chunk begins (default: where its first record does)."""
    at = offset if offset is not None else (records[0].offset if records else 0)
    parts = [_HEAD.pack(_VERSION, len(records))]
    for record in records:
        if record.offset < at:
            raise ValueError(f"record at {record.offset} begins before {at}")
        parts.append(_TAG.pack(record.at, record.offset - at, len(record.data), record.step, record.stream))
        at = record.offset + len(record.data)
    parts.extend(record.data for record in records)
    return zlib.compress(b"".join(parts), 1)


def decode_records(data: bytes, offset: int) -> list[LogRecord]:
    """The records of a chunk that begins at ``offset``. Raises InvalidInput if the bytes are not such a chunk."""
    try:
        raw = zlib.decompress(data)
        version, count = _HEAD.unpack_from(raw)
        if version != _VERSION:
            raise InvalidInput("log chunk", f"format {version} is not known", f"{_VERSION}")
        begin = _HEAD.size + count * _TAG.size
        records = []
        for at, gap, length, step, stream in _TAG.iter_unpack(raw[_HEAD.size : begin]):
            offset += gap
            if begin + length > len(raw):
                raise InvalidInput("log chunk", "ends within a record")
            records.append(LogRecord(offset, step, Stream(stream), at, raw[begin : begin + length]))
            begin += length
            offset += length
    except (zlib.error, struct.error, ValueError) as error:
        raise InvalidInput("log chunk", f"not readable ({error})") from error
    if len(records) != count:
        raise InvalidInput("log chunk", "ends within its tags")
    return records


def next_offset(records: Sequence[LogRecord], offset: int) -> int:
    """Where to read on after ``records``; ``offset`` if there are none."""
    return records[-1].offset + len(records[-1].data) if records else offset


def slice_records(records: Iterable[LogRecord], offset: int) -> list[LogRecord]:
    """What of ``records`` lies at ``offset`` or behind it; the record across it loses its beginning.

    An empty record that marks the end of a gap is kept if the gap's end lies behind ``offset``.
    """
    kept = []
    for record in records:
        if record.offset + len(record.data) <= offset:
            continue
        if record.offset < offset:
            record = LogRecord(offset, record.step, record.stream, record.at, record.data[offset - record.offset :])
        kept.append(record)
    return kept


def is_wanted(step: int, stream: int, *, only_step: int | None, only_stream: int | None) -> bool:
    """Whether a piece passes a reader's filter; None lets all pass. A filter by stream leaves bsup's notes out."""
    return only_step in (None, step) and only_stream in (None, stream)


def split_record(record: LogRecord, size: int = MAX_RECORD) -> list[LogRecord]:
    """The record as pieces of at most ``size`` bytes; nothing for an empty one."""
    if 0 < len(record.data) <= size:
        return [record]
    return [
        LogRecord(record.offset + i, record.step, record.stream, record.at, record.data[i : i + size])
        for i in range(0, len(record.data), size)
    ]


def format_size(size: int) -> str:
    """A size for a sentence: 1 GiB, 64 MiB, 1.5 KiB, 17 bytes; exact where it is a whole number of a unit."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return "1 byte" if size == 1 else f"{size} bytes"
