"""bsup's own lines of an attempt's log, on disk before they are in it: ``runs/<lease>/notes``, one JSON a line.

May import ``model``. Called by the transcript. Synchronous; raises OSError.
"""

from __future__ import annotations

import os

import msgspec

from supervisor.sinks.local import make_directory


class Note(msgspec.Struct, frozen=True):
    """A line of bsup's own for ``step``, behind ``after`` records of its raw index; None: behind the step's end."""

    step: int
    after: int | None
    at: float
    text: str


def append_note(run: str, note: Note) -> None:
    if not os.path.isdir(run):
        make_directory(run)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with open(os.open(f"{run}/notes", flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(note) + b"\n")


def read_notes(run: str) -> list[Note]:
    """Raises FileNotFoundError."""
    with open(f"{run}/notes", "r+b") as file:
        raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # killed while it wrote: that note was never answered for
            file.truncate(len(whole))
    return [_note_of(line) for line in whole.splitlines()]


def _note_of(line: bytes) -> Note:
    """One that is damaged keeps its place, as notes are counted, and keeps nobody from the rest of the log."""
    try:
        return msgspec.json.decode(line, type=Note)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Note(0, 0, 0.0, "a note of bsup's own is damaged")
