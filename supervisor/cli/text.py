"""How long text is on a screen, how it is cut, and how times and sizes read. No I/O; called by what prints.

Names and errors of jobs come from users: ``safe`` keeps their control characters from a terminal.
"""

from __future__ import annotations

from datetime import UTC, datetime


def safe(text: str) -> str:
    """The text with control characters (a terminal would obey them) and lone surrogates written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def width_of(text: str) -> int:
    """Columns the text takes: two for East Asian wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(char: str) -> int:
    from unicodedata import category, east_asian_width

    if char.isascii():
        return 1
    if category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if east_asian_width(char) in "WF" else 1


def clip(text: str, width: int) -> str:
    """The text in at most ``width`` columns, with … where it was cut."""
    if width_of(text) <= width:
        return text
    kept, used = [], 0
    for char in text:
        columns = _columns(char)
        if used + columns > width - 1:
            break
        kept.append(char)
        used += columns
    return "".join(kept).rstrip() + "…" if width > 0 else ""


def fold(text: str, width: int) -> list[str]:
    """The text in lines of at most ``width`` columns, broken between words; a word that is wider stays whole, so that
    a path can be copied.
    """
    first, *others = text.split(" ")
    lines = [first]
    for word in others:
        longer = f"{lines[-1]} {word}"
        if width_of(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def duration(seconds: float | None) -> str:
    """A duration in its two largest units: ``12.3s``, ``3m12s``, ``1h05m``, ``2d04h``; a dash for None."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def age(seconds: float | None) -> str:
    """How long ago, in one unit: ``5s``, ``12m``, ``3h``, ``9d``."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if whole >= 2 * size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def local(at: datetime | None) -> str:
    """A time in this machine's own zone, with the zone said."""
    return "-" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def now() -> datetime:
    return datetime.now(UTC)


def since(at: datetime | None) -> float | None:
    """Seconds from a time until now by this machine's clock."""
    return None if at is None else (now() - at).total_seconds()


def plural(count: int, word: str, many: str = "") -> str:
    """``1 job``, ``2 jobs``; ``many`` where an s does not do."""
    return f"{count} {word}" if count == 1 else f"{count} {many or word + 's'}"
