"""What a command prints with: colours where they help, a live line, JSON, errors. The only place that asks what a
stream is.

Called by every command. Output that is asked for goes to standard output, everything about it (progress, questions,
errors) to standard error, so that a pipe gets only what it can use.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Any, TextIO

from supervisor.cli.text import clip, fold, safe

STYLES = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "cyan": "36",
}

STATE_STYLE = {
    "waiting": "dim",
    "pending": "dim",
    "skipped": "dim",
    "suspended": "yellow",
    "ready": "cyan",
    "running": "blue",
    "succeeded": "green",
    "ok": "green",
    "failed": "red",
    "lost": "red",
    "fail": "red",
    "canceled": "yellow",
    "released": "yellow",
    "superseded": "yellow",
    "unknown": "yellow",
    "warn": "yellow",
    "draining": "yellow",
    "expired": "red",
}


class Terminal:
    """Standard output and error of one command. ``width``: columns of the terminal, None where output is not one."""

    def __init__(
        self, out: TextIO, err: TextIO, *, json: bool, width: int | None, colour_out: bool, colour_err: bool, live: bool
    ) -> None:
        self.out = out
        self.err = err
        self.json = json
        self.width = width
        self._colour_out = colour_out
        self._colour_err = colour_err
        self.is_live = live
        self._live_shown = False

    @classmethod
    def standard(cls, *, json: bool) -> Terminal:
        """For this process's own streams, as the environment asks: NO_COLOR, TERM, COLUMNS."""
        out, err = sys.stdout, sys.stderr
        for stream in (out, err):
            # A name that the locale can't say must not end a command.
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")
        is_tty = out.isatty()
        return cls(
            out,
            err,
            json=json,
            width=_columns(out) if is_tty and not json else None,
            colour_out=wanted and is_tty and not json,
            colour_err=wanted and err.isatty(),
            live=err.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not json,
        )

    @property
    def bytes_out(self) -> IO[bytes]:
        """For a log's exact bytes. What was printed as text before is flushed first."""
        self.out.flush()
        return self.out.buffer

    @property
    def can_ask(self) -> bool:
        return sys.stdin.isatty() and self.err.isatty()

    # --- to standard output ------------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        """As it is."""
        self.clear_live()
        self.out.write(text)

    def line(self, text: str = "") -> None:
        self.text(text + "\n")

    def item(self, head: str, text: str, indent: int) -> None:
        """A line that begins with ``head`` (``indent`` columns wide); on a terminal what is too long goes on below,
        indented.
        """
        self.line(head + _hanging(safe(text), self.width, indent))

    def object(self, value: object) -> None:
        """One line of JSON."""
        import msgspec

        self.clear_live()
        self.out.write(msgspec.json.encode(value).decode() + "\n")

    def table(self, columns: Any, rows: Any) -> None:
        """See ``table.render``."""
        from supervisor.cli.table import render

        for row in render(columns, rows, self.width, self.paint):
            self.line(row)

    def paint(self, text: str, style: str | None) -> str:
        """The text in a style (a key of STYLES) where standard output shows colours."""
        return _painted(text, style, self._colour_out)

    def state(self, state: str) -> str:
        return self.paint(state, STATE_STYLE.get(state))

    # --- to standard error -------------------------------------------------------------------------------------

    def note(self, text: str, style: str | None = None) -> None:
        """A remark about what happens."""
        self.clear_live()
        self._flush_out()
        # What stands in columns, or fits, is left alone.
        lines = [line if line.startswith(" ") else _hanging(line, self._err_width, 0) for line in text.split("\n")]
        self.err.write(_painted("\n".join(lines), style, self._colour_err) + "\n")
        self.err.flush()

    def error(self, message: str, hint: str = "") -> None:
        self.clear_live()
        self._flush_out()
        self.err.write(f"bsup: {_painted('error:', 'red', self._colour_err)} {self._below(message, 13)}\n")
        if hint:
            self.err.write(f"      {_painted('hint:', 'cyan', self._colour_err)} {self._below(hint, 12)}\n")
        self.err.flush()

    def warn(self, message: str) -> None:
        self.clear_live()
        self._flush_out()
        self.err.write(f"bsup: {_painted('warning:', 'yellow', self._colour_err)} {self._below(message, 15)}\n")
        self.err.flush()

    def ask(self, question: str) -> bool:
        """Yes or no, no being the default."""
        self.clear_live()
        self._flush_out()
        self.err.write(f"{question} [y/N] ")
        self.err.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def live(self, text: str) -> None:
        """Shows the text as the one line that is overwritten; nothing where nobody looks."""
        if self.is_live:
            self._flush_out()
            self.err.write("\r\x1b[2K" + _painted(clip(text, _columns(self.err) - 1), "dim", self._colour_err))
            self.err.flush()
            self._live_shown = True

    def clear_live(self) -> None:
        if self._live_shown:
            self._live_shown = False
            self.err.write("\r\x1b[2K")
            self.err.flush()

    def flush(self) -> None:
        self.clear_live()
        self.out.flush()
        self.err.flush()

    def _below(self, text: str, indent: int) -> str:
        return _hanging(safe(text), self._err_width, indent)

    @property
    def _err_width(self) -> int | None:
        return _columns(self.err) if self.is_live else None

    def _flush_out(self) -> None:
        # Both streams may be one terminal: what was printed first must be seen first.
        self.out.flush()


def _columns(stream: TextIO) -> int:
    """COLUMNS, or the terminal's width; at least 40, as nothing fits less. (shutil's function costs 4 ms to import.)"""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked):
        return max(40, int(asked))
    try:
        return max(40, os.get_terminal_size(stream.fileno()).columns or 80)
    except (OSError, ValueError):
        return 80


def _hanging(text: str, width: int | None, indent: int) -> str:
    """The text folded beside ``indent`` columns that are taken; as it is where no terminal shows it."""
    if width is None:
        return text
    return ("\n" + " " * indent).join(fold(text, max(20, width - indent)))


def _painted(text: str, style: str | None, colour: bool) -> str:
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if colour and style and text else text
