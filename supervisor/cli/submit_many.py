"""``submit --many``: a job a line, sent in chunks as they are read. Called by ``submit``.

A chunk is submitted as a whole or not at all. With ``--key`` each has a key of its own, made from that and the number
of its first line, so that the same command again, also with a later line mended, submits what is missing and no job
twice.
"""

from __future__ import annotations

import contextlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import IO, NamedTuple

import msgspec

from supervisor.cli.configuration import connect, max_frame
from supervisor.cli.connection import Connection
from supervisor.cli.exits import CommandError, Exit, code_and_hint, in_words
from supervisor.cli.parser import UsageError
from supervisor.cli.terminal import Terminal
from supervisor.cli.text import plural
from supervisor.model.errors import BsupError, InvalidInput
from supervisor.protocol import SubmitManyParams, SubmitManyReply

AT_ONCE = 5_000
"""Jobs of a chunk, at most; fewer where a call can't hold them."""
_ENVELOPE = 1_000
"""Bytes of a call beside its jobs, at most."""
_NAMED = re.compile(r"jobs\[(?P<at>\d+)\]\.?(?P<field>.*)", re.DOTALL)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Line(NamedTuple):
    number: int
    job: msgspec.Raw


class _Sent:
    """What is known to be submitted."""

    def __init__(self) -> None:
        self.jobs = 0
        self.line = 0
        self.lowest = self.highest = 0

    def add(self, chunk: list[_Line], ids: list[int]) -> None:
        self.jobs += len(ids)
        self.line = chunk[-1].number
        self.lowest = min(self.lowest or ids[0], *ids)
        self.highest = max(self.highest, *ids)

    def __str__(self) -> str:
        if not self.jobs:
            return "no job is submitted"
        return f"lines 1 to {self.line} are submitted ({plural(self.jobs, 'job')})"


def submit_many(args: Namespace, terminal: Terminal) -> int:
    if args.file or args.kind or args.set or args.after or args.follow or args.wait:
        raise UsageError("--many takes no other file, --kind, --set, --after, --follow or --wait", "each line is a job")
    sent = _Sent()
    with _opened(args.many) as (name, file), connect(args) as daemon:
        chunk: list[_Line] = []
        try:
            for chunk in _chunks(name, file, max_frame(args)):
                ids = _send(daemon, name, chunk, args.key)
                sent.add(chunk, ids)
                if terminal.json:
                    terminal.object({"first_line": chunk[0].number, "ids": ids})
                    terminal.out.flush()
                terminal.live(f"· {plural(sent.jobs, 'job')} submitted")
        except BsupError as error:
            raise _told(error, sent, chunk, has_key=bool(args.key)) from error
        except KeyboardInterrupt:
            terminal.note(f"bsup: interrupted; {sent}, and perhaps a chunk more", "yellow")
            return Exit.INTERRUPTED
    if not sent.jobs:
        raise CommandError(f"{name} has no job", "a job a line, as JSON", Exit.NOTHING)
    if not terminal.json:
        ids_are = f"id {sent.lowest}" if sent.jobs == 1 else f"ids {sent.lowest} to {sent.highest}"
        terminal.line(f"{plural(sent.jobs, 'job')} submitted, {ids_are}")
    return Exit.OK


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[str, IO[bytes]]]:
    if name == "-":
        yield "standard input", sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115 - left open for the caller
    except OSError as error:
        raise InvalidInput(name, f"can't be read: {error.strerror}", "a file with a job a line, or `-`") from None
    with file:
        yield name, file


def _chunks(name: str, file: IO[bytes], limit: int) -> Iterator[list[_Line]]:
    """Which lines go together depends on nothing but them and the limit: a repeat makes the same chunks."""
    room = limit - _ENVELOPE
    chunk: list[_Line] = []
    size = 0
    for number, text in enumerate(file, 1):
        text = text.strip()
        if not text:
            continue
        # What stands before a bad line in its chunk stays behind too: mended, the file makes the same chunks.
        if len(text) > room:
            allowed = f"at most {room:,}, so that the daemon takes it"
            raise InvalidInput(f"{name}: line {number}", f"is {len(text):,} bytes", allowed)
        try:
            _OBJECT.decode(text)
            text.decode()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"{name}: line {number}", f"is not an object of JSON: {error}") from None
        if chunk and (len(chunk) == AT_ONCE or size + len(text) > room):
            yield chunk
            chunk, size = [], 0
        chunk.append(_Line(number, msgspec.Raw(text)))
        size += len(text) + 1
    if chunk:
        yield chunk


def _send(daemon: Connection, name: str, chunk: list[_Line], key: str | None) -> list[int]:
    first = chunk[0].number
    params = SubmitManyParams(jobs=[line.job for line in chunk], key=None if key is None else f"{key}:{first}")
    try:
        return daemon.call("SubmitMany", params, SubmitManyReply).ids
    except InvalidInput as error:
        if (found := _NAMED.fullmatch(error.field)) is None:
            raise
        field = f": {found['field']}" if found["field"] else ""
        where = f"{name}: line {chunk[int(found['at'])].number}{field}"
        raise InvalidInput(where, error.problem, error.allowed) from None


def _told(error: BsupError, sent: _Sent, chunk: list[_Line], *, has_key: bool) -> CommandError:
    """The error, with what has become of the jobs and what to do next."""
    code, hint = code_and_hint(error)
    is_known = code in (Exit.USAGE, Exit.DENIED)
    words = [str(sent) + (", the others not" if is_known and sent.jobs else "")]
    if not is_known and chunk and chunk[-1].number > sent.line:
        words.append(f"of lines {chunk[0].number} to {chunk[-1].number} it is not known")
    if sent.jobs or not is_known:
        again = "the same command again submits the rest and no job twice"
        words.append(again if has_key else f"with --key, {again}")
    return CommandError(in_words(error), "; ".join([*words, *filter(None, [hint])]), code)
