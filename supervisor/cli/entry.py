"""Where ``bsup`` begins: finds the command, parses its arguments, calls it, and says in one line what went wrong.

Called by ``supervisor.__main__`` and by tests. Whatever ends a command on purpose is a ``BsupError``; anything else
is a fault of bsup's own and keeps its traceback, as that is what a report of it needs.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from supervisor.cli import parser
from supervisor.cli.exits import Exit, code_and_hint, in_words
from supervisor.cli.terminal import Terminal
from supervisor.model.errors import BsupError

Handler = Callable[[Namespace, Terminal], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    terminal = Terminal.standard(json="--json" in words)
    try:
        code = _run(words, terminal)
        terminal.flush()
        return code
    except BsupError as error:
        code, hint = code_and_hint(error)
        terminal.error(in_words(error), hint)
        return int(code)
    except KeyboardInterrupt:
        terminal.clear_live()
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error. Python would complain again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.PIPE)


def _run(words: list[str], terminal: Terminal) -> int:
    if words and words[0] == "help":
        words = [*words[1:], "--help"]
    name, rest = parser.split(words)
    if name is None:
        terminal.text(parser.overview(terminal.width or 100))
        return int(Exit.OK if "-h" in rest or "--help" in rest else Exit.USAGE)
    command = parser.find(name)
    if "-h" in rest or "--help" in rest:
        terminal.text(parser.help_of(command, terminal.width or 100))
        return int(Exit.OK)
    args = parser.parse(command, rest)
    handler: Handler = getattr(importlib.import_module(f"supervisor.cli.{command.module}"), command.function)
    gc.enable()  # ``__main__`` put it off
    return handler(args, terminal)
