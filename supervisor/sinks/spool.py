"""The raw spool of one step, as the shepherd writes it. Read only.

May import ``model``. Called by the transcript. The formats are the shepherd's: ``out`` and ``err`` hold raw bytes,
``idx`` a record of 17 bytes for each arrival, ``exit`` how the step ended; with ``closed`` no more output will come.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from supervisor.model.job import Stream

_RECORD = struct.Struct("<dqB")  # at (unix seconds), end offset in its stream, code
_READ_RECORDS = 4096
_NAMES = {Stream.OUT: "out", Stream.ERR: "err"}
_T = TypeVar("_T")


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
    def __init__(self, directory: str | Path) -> None:
        # Looked at often: a Path takes twice as long.
        self._directory = str(directory)
        self._idx = f"{self._directory}/idx"

    def count(self) -> int:
        """Whole records in the index; one that is half written does not count."""
        return _size(self._idx) // _RECORD.size

    def arrivals(self, first: int) -> list[Arrival]:
        """Records from number ``first`` on, some 4,000 at most."""
        count = min(self.count() - first, _READ_RECORDS)
        if count <= 0:
            return []
        raw = _read(self._idx, first * _RECORD.size, count * _RECORD.size)
        return [Arrival._make(values) for values in _RECORD.iter_unpack(raw[: len(raw) // _RECORD.size * _RECORD.size])]

    def read(self, stream: Stream, start: int, length: int) -> bytes:
        try:
            return _read(self._path(stream), start, length)
        except FileNotFoundError:
            return b""

    def size(self, stream: Stream) -> int:
        return _size(self._path(stream))

    def is_silent(self) -> bool:
        """No output is on disk, and none that the index speaks of."""
        return not (_size(self._idx) or self.size(Stream.OUT) or self.size(Stream.ERR))

    def written_at(self) -> float:
        """When output was last written, by the files' own stamps; 0.0 if there is none."""
        stamps = [0.0]
        for stream in _NAMES:
            try:
                stamps.append(os.stat(self._path(stream)).st_mtime)
            except FileNotFoundError:
                continue
        return max(stamps)

    def has_begun(self) -> bool:
        return self.count() > 0 or os.path.exists(f"{self._directory}/claim")

    def is_closed(self) -> bool:
        return os.path.exists(f"{self._directory}/closed")

    def dropped(self) -> int:
        """Bytes of output that were dropped over the limit."""
        end = self._decode("exit", _Exit)
        return end.out_dropped + end.err_dropped if end else 0

    def limit(self) -> int | None:
        """The step's limit on raw output in bytes, if known."""
        spec = self._decode("spec", _Spec)
        return spec.max_output if spec else None

    def _path(self, stream: Stream) -> str:
        return f"{self._directory}/{_NAMES[stream]}"

    def _decode(self, name: str, type: type[_T]) -> _T | None:
        path = f"{self._directory}/{name}"
        try:
            return msgspec.json.decode(_read(path, 0, os.stat(path).st_size), type=type)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _read(path: str, start: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, start)
    finally:
        os.close(descriptor)
