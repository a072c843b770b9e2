"""The raw spool of one step, as the shepherd writes it. Read only.

May import ``model``. Called by the transcript. The formats are the shepherd's: ``out`` and ``err`` hold raw bytes,
``idx`` a record of 17 bytes for each arrival, ``exit`` how the step ended; with ``closed`` no more output will come.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

from supervisor.model.job import Stream

_RECORD = struct.Struct("<dqB")  # at (unix seconds), end offset in its stream, code
_READ_RECORDS = 4096
_NAMES = {Stream.OUT: "out", Stream.ERR: "err"}


class Arrival(NamedTuple):
    """Output of ``code`` 1 (out) or 2 (err) up to ``end``; code 4 or 5: out or err was cut at ``end``."""

    at: float
    end: int
    code: int


class _Exit(msgspec.Struct):
    out_dropped: int = 0
    err_dropped: int = 0


class _Spec(msgspec.Struct):
    max_output: int | None = None


class StepSpool:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._idx = str(directory / "idx")  # polled often: a Path takes twice as long

    def count(self) -> int:
        """Whole records in the index; one that is half written does not count."""
        try:
            return os.stat(self._idx).st_size // _RECORD.size
        except FileNotFoundError:
            return 0

    def arrivals(self, first: int) -> list[Arrival]:
        """Records from number ``first`` on, some 4,000 at most."""
        count = min(self.count() - first, _READ_RECORDS)
        if count <= 0:
            return []
        with open(self._idx, "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), count * _RECORD.size, first * _RECORD.size)
        return [Arrival._make(values) for values in _RECORD.iter_unpack(raw[: len(raw) // _RECORD.size * _RECORD.size])]

    def read(self, stream: Stream, start: int, length: int) -> bytes:
        try:
            with (self._directory / _NAMES[stream]).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, start)
        except FileNotFoundError:
            return b""

    def size(self, stream: Stream) -> int:
        try:
            return (self._directory / _NAMES[stream]).stat().st_size
        except FileNotFoundError:
            return 0

    def written_at(self) -> float:
        """When output was last written, by the files' own stamps; 0.0 if there is none."""
        stamps = [0.0]
        for name in _NAMES.values():
            try:
                stamps.append((self._directory / name).stat().st_mtime)
            except FileNotFoundError:
                continue
        return max(stamps)

    def has_begun(self) -> bool:
        return self.count() > 0 or (self._directory / "claim").exists()

    def is_closed(self) -> bool:
        return (self._directory / "closed").exists()

    def dropped(self) -> int:
        """Bytes of output that were dropped over the limit."""
        try:
            end = msgspec.json.decode((self._directory / "exit").read_bytes(), type=_Exit)
        except (FileNotFoundError, msgspec.DecodeError):
            return 0
        return end.out_dropped + end.err_dropped

    def limit(self) -> int | None:
        """The step's limit on raw output in bytes, if known."""
        try:
            return msgspec.json.decode((self._directory / "spec").read_bytes(), type=_Spec).max_output
        except (FileNotFoundError, msgspec.DecodeError):
            return None
