"""From the table of commands to parsed arguments and help texts. Called by ``entry``; imports argparse and nothing
heavy.

Only the parser of the command that was named is built. Global flags are taken anywhere: those before the command's
name are moved behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from supervisor.cli.commands import BY_NAME, COMMANDS, CONFIG, GLOBAL, SOCKET, Argument, Command
from supervisor.cli.exits import MEANING, CommandError, Exit
from supervisor.model.errors import InvalidInput
from supervisor.model.units import parse_duration

_WITH_VALUE = {name for argument in (SOCKET, CONFIG) for name in argument.names}
_ALONE = {name for argument in GLOBAL for name in argument.names} - _WITH_VALUE


class UsageError(CommandError):
    """The command line is wrong."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, Exit.USAGE)


def split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command's name (None: there is none) and all other arguments, global flags before it included."""
    before: list[str] = []
    words = iter(range(len(argv)))
    for at in words:
        word = argv[at]
        if word in _WITH_VALUE and at + 1 < len(argv):
            before += [word, argv[next(words)]]
        elif word in _ALONE or any(word.startswith(f"{name}=") for name in _WITH_VALUE):
            before.append(word)
        elif word == "--version":
            return "version", [*before, *argv[at + 1 :]]
        elif word.startswith("-"):
            raise UsageError(f"unknown option {word}", "options of a command come after its name; see `bsup --help`")
        else:
            return word, [*before, *argv[at + 1 :]]
    return None, before


def parse(command: Command, rest: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises UsageError."""
    parser = build(command)
    # Flags may stand between the values of a positional: that alone needs the slower way, which writes a usage first.
    has_many = any(argument.positional and argument.nargs for argument in command.arguments)
    return parser.parse_intermixed_args(list(rest)) if has_many else parser.parse_args(list(rest))


def find(name: str) -> Command:
    """The command of this name. Raises UsageError with the nearest one."""
    if name in BY_NAME:
        return BY_NAME[name]
    import difflib

    near = difflib.get_close_matches(name, BY_NAME, n=1)
    raise UsageError(f"no command {name!r}", f"did you mean `bsup {near[0]}`?" if near else "`bsup --help` lists them")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # With a width of its own: to ask for the terminal's, argparse imports shutil and what belongs to that, 4 ms.
    return argparse.HelpFormatter(prog, width=80)


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, and says where to look."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"`{self.prog} --help` shows how it is used")


def build(command: Command) -> argparse.ArgumentParser:
    """The parser of one command, global flags included; ``-h`` is a flag like the others, printed by ``help_of``."""
    parser = _Parser(prog=f"bsup {command.name}", add_help=False, allow_abbrev=False, formatter_class=_formatter)
    for argument in (*command.arguments, *GLOBAL):
        parser.add_argument(*argument.names, **_options(argument))
    return parser


def _options(argument: Argument) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if argument.kind == "switch":
        return {"action": "store_true", "dest": argument.dest}
    if not argument.positional:
        options["dest"] = argument.dest
    if argument.repeat:
        options |= {"action": "extend" if argument.nargs else "append", "default": []}
    if argument.nargs:
        options["nargs"] = argument.nargs
    if argument.choices and not argument.repeat:
        options["choices"] = argument.choices
    if argument.value and not argument.choices:
        options["metavar"] = argument.value
    match argument.kind:
        case "id":
            options["type"] = job_id
        case "int":
            options["type"] = _count
        case "duration":
            options["type"] = _duration
        case _:
            pass
    return options


def job_id(text: str) -> int:
    """A job's id. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a job's id (a whole number from 1)")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(f"{error.problem} (allowed: {error.allowed})") from None


def usage_of(command: Command) -> str:
    """One line: the command with its arguments as one would type them."""
    return " ".join(["bsup", command.name, *(_usage(argument) for argument in command.arguments)])


def _usage(argument: Argument) -> str:
    value = argument.value
    if argument.positional:
        return {"?": f"[{value}]", "+": f"{value}…", "*": f"[{value}…]"}.get(argument.nargs or "", value)
    name = argument.names[0]
    if argument.kind == "switch":
        return f"[{name}]"
    return f"[{name} {value}{'…' if argument.nargs or argument.repeat else ''}]"


def flags_of(argument: Argument) -> str:
    """How help names an argument: ``-f, --follow`` or ``--step S``."""
    return (
        ", ".join(argument.names) + (f" {argument.value}" if argument.value else "")
        if not argument.positional
        else (argument.value)
    )


def help_of(command: Command, width: int) -> str:
    """``bsup COMMAND --help``."""
    lines = [*_wrapped(usage_of(command), width, "       ", "usage: "), "", _sentence(command.summary)]
    if command.notes:
        lines += ["", *_wrapped(command.notes, width)]
    for title, arguments in (("arguments", command.arguments), ("everywhere", GLOBAL)):
        if arguments:
            lines += ["", f"{title}:", *_described([(flags_of(a), _choices(a)) for a in arguments], width)]
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"


def overview(width: int) -> str:
    """``bsup --help``."""
    lines = ["usage: bsup COMMAND …", "", "bsup runs build jobs so that they outlive the daemon and none is lost."]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        members = [(command.name, command.summary) for command in COMMANDS if command.group == group]
        lines += ["", f"{group}:", *_described(members, width)]
    lines += ["", "Everywhere:", *_described([(flags_of(a), a.help) for a in GLOBAL], width)]
    codes = [(str(int(code)), MEANING[code]) for code in MEANING if code is not Exit.PIPE]
    lines += ["", "Exit codes:", *_described(codes, width)]
    lines += ["", "`bsup COMMAND --help` says more. First steps: `bsup demo`, then `bsup daemon`."]
    return "\n".join(lines) + "\n"


def _choices(argument: Argument) -> str:
    if argument.choices and "|".join(argument.choices) != argument.value:
        return f"{argument.help}: {', '.join(argument.choices)}"
    return argument.help


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _described(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    left = min(24, max(len(name) for name, _ in rows))
    lines: list[str] = []
    for name, text in rows:
        indent = " " * (left + 4)
        if len(name) > left:
            lines += [f"  {name}", *_wrapped(text, width, indent, indent)]
        else:
            lines += _wrapped(text, width, indent, f"  {name:<{left}}  ")
    return lines


def _wrapped(text: str, width: int, indent: str = "", first: str = "") -> list[str]:
    import textwrap

    return textwrap.wrap(
        text,
        max(40, width),
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
