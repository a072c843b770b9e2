"""The table of commands: names, flags and words. The parser, the completions, the help and docs/reference/cli.md
are made from it, so they can't disagree. Data only: imports nothing but typing, as every start of ``bsup`` pays for
it.
"""

from __future__ import annotations

from typing import NamedTuple

STATES = ("waiting", "ready", "running", "suspended", "succeeded", "failed", "canceled")
SHELLS = ("bash", "zsh", "fish")


class Argument(NamedTuple):
    """A flag (names begin with ``-``) or a positional. ``kind``: switch, text, int, duration, id or path: what a
    value is.

    ``nargs`` as argparse has it; ``repeat``: may be given again and adds up. ``value`` is how help names it.
    """

    names: tuple[str, ...]
    help: str
    kind: str = "switch"
    value: str = ""
    nargs: str | None = None
    choices: tuple[str, ...] = ()
    repeat: bool = False

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def dest(self) -> str:
        longest = max(self.names, key=len)
        return longest.lstrip("-").replace("-", "_")


class Command(NamedTuple):
    """A command. ``module``: below ``supervisor.cli``; ``function``: in it. ``notes``: paragraphs of help beyond
    the summary.
    """

    name: str
    group: str
    summary: str
    module: str
    function: str
    arguments: tuple[Argument, ...] = ()
    notes: str = ""
    examples: tuple[str, ...] = ()


JSON = Argument(("--json",), "print JSON, one object a line; times RFC 3339 UTC, durations in seconds")
SOCKET = Argument(("--socket",), "the daemon's control socket (BSUP_SOCKET)", "path", "S")
CONFIG = Argument(("--config",), "the configuration file (BSUP_CONFIG; default /etc/bsup/bsup.toml)", "path", "F")
HELP = Argument(("-h", "--help"), "say how a command is used")
GLOBAL = (JSON, SOCKET, CONFIG, HELP)
"""Taken before and after the command's name."""

_ID = Argument(("id",), "the job's id", "id", "ID")
_IDS = Argument(("ids",), "the jobs' ids", "id", "ID", nargs="+")
_MAYBE_IDS = Argument(("ids",), "the jobs' ids; or choose by filters", "id", "ID", nargs="*")
_DSN = Argument(("--dsn",), "the database: `embedded` or a libpq DSN (BSUP_DSN)", "text", "D")
_STATE_DIR = Argument(("--state",), "the state directory", "path", "DIR")
_FOLLOW = Argument(("-f", "--follow"), "go on with what comes")
_YES = Argument(("-y", "--yes"), "do it without asking")
_CHOICE = (
    Argument(
        ("--state",), "only jobs in this state (again, or a comma, for more)", "text", "S", None, STATES, repeat=True
    ),
    Argument(("--kind",), "only jobs of this kind", "text", "K", repeat=True),
    Argument(("--label",), "only jobs that need this label (again: all of them)", "text", "L", repeat=True),
    Argument(("-n", "--limit"), "at most N jobs", "int", "N"),
)
_FILTERS = (*_CHOICE, Argument(("-a", "--all"), "jobs that are over too"))
_BULK_FILTERS = (*_CHOICE, Argument(("-a", "--all"), "every job that it can be done to"))
_BULK = "Name jobs by id, or choose them by filters: then what would be hit is shown, and --yes (or an answer) does it."

COMMANDS: tuple[Command, ...] = (
    Command(
        "submit",
        "Jobs",
        "submit a job; prints its id",
        "submit",
        "submit",
        (
            Argument(("file",), "the job file: YAML, TOML or JSON; `-` reads standard input", "path", "F", nargs="?"),
            Argument(
                ("--set",), "set a key of the job: dotted path, value as in YAML", "text", "K=V", nargs="+", repeat=True
            ),
            Argument(("--kind",), "a job of this kind instead of a file; --set sets its args", "text", "K"),
            Argument(
                ("--many",), "submit many jobs: a file with one a line, as JSON; `-` reads standard input", "path", "F"
            ),
            Argument(("--after",), "wait until these jobs succeeded", "text", "ID", nargs="+", repeat=True),
            Argument(("-f", "--follow"), "show the log as it is written; end with the job's exit code"),
            Argument(("-w", "--wait"), "wait for the job's end; end with its exit code"),
            Argument(("--key",), "a name for this submission: the same key twice gives the same job", "text", "K"),
        ),
        "The id alone is printed on standard output; with --follow the log comes after it. "
        "Ctrl-C ends the view, not the job. With --many the jobs go in chunks, each as a whole or not at all; "
        "the number of jobs and their ids are printed.",
        (
            "bsup submit build.yaml --follow",
            "bsup submit build.yaml --set repository.commit=main --set priority=200",
            "bsup submit --kind noop --set args.sleep=5",
            "bsup submit --many jobs.ndjson --key nightly-2026-03-01",
        ),
    ),
    Command("ps", "Jobs", "list jobs: by default those that are not over", "jobs", "ps", _FILTERS),
    Command("show", "Jobs", "all of one job: state, steps, attempts, what it waits for", "jobs", "show", (_ID,)),
    Command("attempts", "Jobs", "every attempt of a job with its steps", "jobs", "attempts", (_ID,)),
    Command(
        "logs",
        "Jobs",
        "a job's log",
        "logs",
        "logs",
        (
            _ID,
            _FOLLOW,
            Argument(("--step",), "only this step: its name, or its number in `bsup show`, from 1", "text", "S"),
            Argument(("--stream",), "only this stream", "text", "out|err", None, ("out", "err")),
            Argument(("--attempt",), "this attempt (default: the last)", "int", "N"),
            Argument(("--since-offset",), "from this byte of the attempt's log on", "int", "B"),
            Argument(("--raw",), "the job's bytes exactly: no notes of bsup's own, no headers"),
        ),
        "In a pipe the log's bytes are printed as they are, with bsup's own notes; "
        "on a terminal with a header for each step.",
        ("bsup logs -f 12", "bsup logs 12 --step test --stream err", "bsup logs 12 --raw > build.log"),
    ),
    Command(
        "wait",
        "Jobs",
        "wait until jobs are over; ends with their exit code",
        "wait",
        "wait",
        (
            _IDS,
            Argument(("--any",), "until the first is over"),
            Argument(("--timeout",), "give up after this time, with exit code 124", "duration", "T"),
        ),
        "Ends 0 if all succeeded, else with the exit code of the first in the order given that did not "
        "(128+n for signal n).",
    ),
    Command(
        "stop",
        "Jobs",
        "stop jobs: SIGTERM, then after the grace kill all they started",
        "bulk",
        "stop",
        (
            _MAYBE_IDS,
            Argument(("--grace",), "time between SIGTERM and SIGKILL (default: the host's)", "duration", "T"),
            Argument(("--kill",), "SIGKILL at once"),
            *_BULK_FILTERS,
            _YES,
        ),
        f"{_BULK} Ends 3 where nothing was left to stop.",
    ),
    Command(
        "retry",
        "Jobs",
        "run jobs that are over again",
        "bulk",
        "retry",
        (_MAYBE_IDS, *_BULK_FILTERS, _YES),
        f"{_BULK} Filters mean only those that failed or were canceled.",
    ),
    Command(
        "delete",
        "Jobs",
        "delete jobs that are over, with their logs",
        "bulk",
        "delete",
        (_MAYBE_IDS, *_BULK_FILTERS, _YES),
        _BULK,
    ),
    Command("status", "Host", "what this host's daemon does, and in words what is wrong", "host", "status"),
    Command("hosts", "Host", "every host that shares the database", "host", "hosts"),
    Command(
        "drain",
        "Host",
        "take no new jobs",
        "host",
        "drain",
        (
            Argument(("--wait",), "until nothing runs here any more"),
            Argument(("--deadline",), "after this time give back what still runs, uncounted", "duration", "T"),
        ),
    ),
    Command("resume", "Host", "take jobs again after a drain", "host", "resume"),
    Command("reload", "Host", "read the configuration again; says what changed", "host", "reload"),
    Command("events", "Host", "rare events: stops, losses, releases, retries", "host", "events", (_FOLLOW,)),
    Command("actors", "Host", "the daemon's actors and their mailboxes", "host", "actors"),
    Command(
        "daemon",
        "Running it",
        "run the daemon in the foreground",
        "daemon",
        "daemon",
        (
            _DSN,
            _STATE_DIR,
            Argument(
                ("--on-term",),
                "what SIGTERM does to running jobs: drain waits for them, detach leaves them to the next daemon",
                "text",
                "drain|detach",
                None,
                ("drain", "detach"),
            ),
        ),
        "SIGTERM drains or detaches, a second one stops the jobs; SIGHUP reads the configuration again.",
    ),
    Command(
        "config",
        "Running it",
        "check the configuration file, or show what holds",
        "config",
        "config",
        (
            Argument(("action",), "what to do", "text", "check|show", None, ("check", "show")),
            Argument(("file",), "the file (default: the one that the daemon would read)", "path", "F", nargs="?"),
        ),
    ),
    Command(
        "doctor",
        "Running it",
        "check database, docker, git, cgroups, isolation, disk, clock, journald, socket; says how to mend each",
        "doctor",
        "doctor",
        (_DSN, _STATE_DIR),
        "Ends 1 if a check fails; warnings alone end 0.",
    ),
    Command("migrate", "Running it", "bring the database's schema up to date", "daemon", "migrate", (_DSN, _STATE_DIR)),
    Command("version", "Running it", "the version of this command and of the daemon", "host", "version"),
    Command(
        "completion",
        "Running it",
        "print a shell's completion script",
        "completion",
        "completion",
        (Argument(("shell",), "the shell", "text", "SHELL", None, SHELLS),),
        "",
        ('eval "$(bsup completion bash)"', "bsup completion fish > ~/.config/fish/completions/bsup.fish"),
    ),
    Command(
        "demo",
        "Running it",
        "run a real build on an embedded database, and clean up",
        "demo",
        "demo",
        (Argument(("--keep",), "leave the state directory, and say where it is"),),
        "In a checkout of bsup it builds and tests bsup itself; elsewhere a small repository that it makes.",
    ),
)

BY_NAME: dict[str, Command] = {command.name: command for command in COMMANDS}
