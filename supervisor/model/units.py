"""Durations and sizes as people write them: ``"1h30m"``, ``"512MiB"``, or a plain number. No I/O.

May import ``errors``. Called by ``spec`` and by whatever reads a setting or an option of the command line.
A duration is a float of seconds; a size an int of bytes. Both are bounded, so that neither PostgreSQL's intervals and
bigints nor a timer can overflow.
"""

from __future__ import annotations

import math
import re

from supervisor.model.errors import InvalidInput

DURATION_FORM = 'seconds as a number, or like "500ms", "90s", "10m", "1h30m", "2d"'
SIZE_FORM = 'bytes as a whole number, or like "64KiB", "512MiB", "1GB"'

MAX_DURATION = 3650 * 86400.0
MAX_SIZE = 2**62

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)

# K, M, G and T alone are powers of 1024, as `docker run --memory` and systemd's MemoryMax= read them.
_BYTES = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)
_LONGEST_TEXT = 64


def parse_duration(value: object, field: str = "duration", *, zero: bool = True) -> float:
    """Seconds from a number or a text; raises InvalidInput naming ``field``. ``zero``: whether 0 is allowed."""
    seconds: float
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidInput(field, "is not a duration", DURATION_FORM)
    if isinstance(value, str):
        seconds = _duration_of_text(value, field)
    else:
        # An int of thousands of digits doesn't fit a float; comparing it first costs nothing and can't raise.
        seconds = float(value) if -MAX_DURATION <= value <= MAX_DURATION else math.inf
    if seconds < 0:
        raise InvalidInput(field, "is negative", DURATION_FORM)
    if not math.isfinite(seconds) or seconds > MAX_DURATION:
        raise InvalidInput(field, "is not a duration of at most ten years", DURATION_FORM)
    if seconds == 0 and not zero:
        raise InvalidInput(field, "must be more than zero", DURATION_FORM)
    return seconds


def _duration_of_text(text: str, field: str) -> float:
    compact = text.strip().replace(" ", "")
    if not compact or len(compact) > _LONGEST_TEXT:
        raise InvalidInput(field, "is not a duration", DURATION_FORM)
    if _NUMBER.fullmatch(compact):
        return float(compact)
    total = 0.0
    position = 0
    last = math.inf
    while position < len(compact):
        part = _DURATION_PART.match(compact, position)
        # Units must fall in size: "30m1h" is more often a slip than meant.
        if part is None or _SECONDS[part[2]] >= last:
            raise InvalidInput(field, f"{text!r} is not a duration", DURATION_FORM)
        last = _SECONDS[part[2]]
        total += float(part[1]) * last
        position = part.end()
    return total


def format_duration(seconds: float) -> str:
    """The text of a duration, to the millisecond, which ``parse_duration`` reads back: ``5400`` → ``"1h30m"``."""
    milliseconds = round(seconds * 1000)
    sign = "-" if milliseconds < 0 else ""
    rest = abs(milliseconds)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return sign + ("".join(parts) or "0s")


def parse_size(value: object, field: str = "size", *, zero: bool = True) -> int:
    """Bytes from a number or a text; raises InvalidInput naming ``field``. ``zero``: whether 0 is allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidInput(field, "is not a size", SIZE_FORM)
    size: float
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower()) if len(value) <= _LONGEST_TEXT else None
        if match is None or match[2] not in _BYTES:
            raise InvalidInput(field, f"{value[:_LONGEST_TEXT]!r} is not a size", SIZE_FORM)
        number = float(match[1]) if "." in match[1] else int(match[1])
        size = number * _BYTES[match[2]]
    elif isinstance(value, float) and not value.is_integer():
        raise InvalidInput(field, "is not a whole number of bytes", SIZE_FORM)
    else:
        size = value
    if size < 0:
        raise InvalidInput(field, "is negative", SIZE_FORM)
    if size > MAX_SIZE:
        raise InvalidInput(field, "is too large", SIZE_FORM)
    if int(size) == 0 and not zero:
        raise InvalidInput(field, "must be more than zero", SIZE_FORM)
    return int(size)


def format_size(size: int) -> str:
    """The text of a size: exact (and so read back by ``parse_size``) where a unit divides it, else to one decimal."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size // factor}{unit}" if size % factor == 0 else f"{size / factor:.1f}{unit}"
    return f"{size}B"
