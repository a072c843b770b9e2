"""Exit codes, and which error ends a command with which. Imported by every command; imports nothing heavy."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from supervisor.model.errors import (
    BsupError,
    Busy,
    InvalidInput,
    PermissionDenied,
    StoreUnavailable,
    UnknownJob,
    WrongState,
)

if TYPE_CHECKING:
    from supervisor.protocol import JobView


class Exit(enum.IntEnum):
    """What ``$?`` says. Codes of a job that are mirrored (``wait``, ``submit --follow``) may be any of 0–255."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOTHING = 3
    UNKNOWN = 4
    DENIED = 5
    UNREACHABLE = 6
    WRONG_STATE = 7
    TIMEOUT = 124
    INTERRUPTED = 130
    PIPE = 141


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.ERROR: "an error that none of the others names: the database is away, the daemon's own fault",
    Exit.USAGE: "the command line, a job file or the configuration is wrong; nothing was changed",
    Exit.NOTHING: "nothing to do: no job matched the filters, or all that were named to `stop` were over already",
    Exit.UNKNOWN: "no job has this id",
    Exit.DENIED: "the caller's role does not allow it",
    Exit.UNREACHABLE: "no daemon answers on the socket",
    Exit.WRONG_STATE: "the job is not in a state in which that can be done; nothing was changed",
    Exit.TIMEOUT: "`--timeout` passed",
    Exit.INTERRUPTED: "interrupted with Ctrl-C; jobs that were watched go on",
    Exit.PIPE: "the reader of standard output went away",
}


class CommandError(BsupError):
    """Ends a command: a sentence, what to do about it, and the exit code."""

    def __init__(self, message: str, hint: str = "", code: Exit = Exit.ERROR) -> None:
        self.hint = hint
        self.code = code
        super().__init__(message)


class Unreachable(CommandError):
    """No daemon answers, or it went away in the middle."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, Exit.UNREACHABLE)


def code_and_hint(error: BsupError) -> tuple[Exit, str]:
    """How a command that met this error ends, and what the user can do next."""
    match error:
        case CommandError():
            return error.code, error.hint
        case InvalidInput():
            return Exit.USAGE, ""
        case UnknownJob():
            return Exit.UNKNOWN, "`bsup ps --all` lists every job that is kept"
        case PermissionDenied():
            return Exit.DENIED, "an admin of this host can give you a role: [roles] in bsup.toml, then `bsup reload`"
        case WrongState():
            return Exit.WRONG_STATE, f"see it with `bsup show {error.job}`"
        case StoreUnavailable():
            return (
                Exit.ERROR,
                "jobs that run go on; `bsup status` says since when the database is away, `bsup doctor` why",
            )
        case Busy():
            return Exit.ERROR, "try again in a moment"
        case _ if type(error).__name__ == "CallTimeout":
            return Exit.TIMEOUT, ""
        case _:
            return Exit.ERROR, ""


def in_words(error: BsupError) -> str:
    """The error as it is printed. A driver's bare "connection refused" would be taken for the daemon's socket."""
    text = str(error)
    return text if not isinstance(error, StoreUnavailable) or "database" in text else f"the database is away: {text}"


def mirrored(job: JobView) -> int:
    """The exit code that stands for a job's end: its own, 128+n for signal n, 1 where it failed without one."""
    if job.state == "succeeded":
        return 0
    if job.exit_code:
        return job.exit_code
    if job.signal:
        return 128 + job.signal
    return 1
