"""Finds which of many secrets a stretch of output holds, in one pass, with hyperscan where that is installed.

May import ``model``. Called by the transcript, in the pump's thread; the only module that knows hyperscan.

It is the extra ``bsup[hyperscan]`` and changes nothing but the speed: a search for each secret does some 120 MB/s with
50 of them and holds the interpreter's lock meanwhile, hyperscan does 2 to 4 GB/s without the lock. It only says which
secrets *may* be there; ``SecretSet`` looks for those and decides. So only their beginnings are compiled, which keeps
long ones cheap; matches are told once a secret and buffer, so that a log full of secrets costs no call for each; and
a secret that spans two buffers is none of its business, as the redactor holds its beginning back.

Compiling 50 secrets takes 1 to 2 ms, and once in many sets a few hundred, so it waits until the output is worth it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hyperscan

_BEGINNING = 32
"""Bytes of a secret that are searched for."""
_FEWEST = 3
"""Below that many, one search each is as fast."""
_MOST = 10_000
"""Above that many, compiling takes seconds."""
_WORTH = 16 << 20
"""Bytes of output times secrets after which compiling pays: with 50 secrets 330 KB, with three 5.6 MB."""
_SHORT = 4096
"""Bytes of a buffer below which one search each is as fast."""

log = logging.getLogger(__name__)


class Scanner:
    """A ``Finder`` for ``SecretSet.sought``. For one thread at a time, as hyperscan's scratch space is."""

    def __init__(self, sought: Sequence[bytes], worth: int = _WORTH) -> None:
        self._sought = sought
        self._left = worth
        self._is_off = not _FEWEST <= len(sought) <= _MOST
        self._database: hyperscan.Database | None = None
        self._scratch: hyperscan.Scratch | None = None
        self._groups: list[list[int]] = []
        self._lengths: list[int] = []
        self._found: list[tuple[int, int]] = []

    @property
    def is_on(self) -> bool:
        """Whether hyperscan is in use."""
        return self._database is not None

    def __call__(self, buffer: bytes) -> list[tuple[int, int]] | None:
        if self._is_off or len(buffer) < _SHORT:
            return None
        if self._database is None:
            self._left -= len(buffer) * len(self._sought)
            if self._left > 0 or not self._compile():
                return None
        return [(index, begin) for group, begin in self._scan(buffer) for index in self._groups[group]]

    def _scan(self, buffer: bytes) -> list[tuple[int, int]]:
        """The groups whose beginning is there, with where it is first."""
        assert self._database is not None
        self._found = []
        self._database.scan(buffer, self._on_match, scratch=self._scratch)
        return self._found

    def _on_match(self, group: int, _begin: int, end: int, _flags: int, _context: object) -> None:
        self._found.append((group, end - self._lengths[group]))

    def _compile(self) -> bool:
        """Whether there is a scanner now. Not having one is no fault: it is an extra, and a CPU may be too old."""
        try:
            import hyperscan
        except ImportError:
            self._is_off = True
            return False
        groups: dict[bytes, list[int]] = {}
        for index, value in enumerate(self._sought):
            groups.setdefault(value[:_BEGINNING], []).append(index)
        self._groups, self._lengths = list(groups.values()), [len(beginning) for beginning in groups]
        try:
            database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
            database.compile(
                # As expressions, byte for byte: as literals they would end at their first NUL.
                expressions=[b"".join(b"\\x%02x" % byte for byte in beginning) for beginning in groups],
                ids=list(range(len(groups))),
                elements=len(groups),
                flags=hyperscan.HS_FLAG_DOTALL | hyperscan.HS_FLAG_SINGLEMATCH,
            )
            self._database, self._scratch = database, hyperscan.Scratch(database)
            # Trusted with secrets only once it has found each of these.
            if len(self._scan(b"\n".join(groups))) < len(groups):
                raise hyperscan.error("it does not find what it was given")
        except hyperscan.error as error:
            log.error("hyperscan can't be used, logs are redacted without it: %s", error)
            self._is_off, self._database, self._scratch = True, None, None
            return False
        return True
