"""The daemon's own log on stderr: lines for a person, JSON for a collector; without the host's secrets.

Under systemd stderr is the journal's; lines then carry their priority (``sd-daemon(3)``) and no time, which the journal
adds. May import ``model``; ``app`` calls ``set_up`` before anything else speaks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

Redact = Callable[[str], str]


def _clean(text: str) -> str:
    """One line, whatever a peer or a job put into it."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


class HumanLines(logging.Formatter):
    """``12:01:07 warning keeper: …``; a traceback follows on lines of its own."""

    def __init__(self, redact: Redact, *, journal: bool) -> None:
        super().__init__()
        self._redact = redact
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("supervisor.")
        text = self._redact(_clean(record.getMessage()))
        lines = [f"{name}: {text}"]
        if record.exc_info:
            lines += self._redact(self.formatException(record.exc_info)).splitlines()
        if self._journal:
            priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
            return "\n".join(f"<{priority}>{line}" for line in lines)
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        return "\n".join([f"{at} {record.levelname.lower():7} {lines[0]}", *(f"    {line}" for line in lines[1:])])


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and error with its traceback."""

    def __init__(self, redact: Redact) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._redact(record.getMessage()),
        }
        if record.exc_info:
            line["error"] = self._redact(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


def set_up(level: str, form: str, redact: Redact) -> None:
    """``level`` and ``form`` as in ``[log]`` of the configuration. Replaces what was set up before."""
    in_journal = "JOURNAL_STREAM" in os.environ
    is_json = form == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(redact) if is_json else HumanLines(redact, journal=in_journal and form == "auto"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.WARNING)
