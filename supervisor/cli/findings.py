"""What a check of ``doctor`` finds. No I/O; called by ``doctor`` and its checks."""

from __future__ import annotations

import enum

import msgspec


class Level(enum.StrEnum):
    """``warn``: something works less well, or is not there and may be missed. ``fail``: the daemon can't work so."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """One sentence on one thing, and how to mend it (empty where nothing is to be mended)."""

    check: str
    level: Level
    text: str
    mend: str = ""
