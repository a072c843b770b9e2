"""The errors of bsup: one root; each says whose fault it is and what to do next. No I/O."""

from __future__ import annotations


class BsupError(Exception):
    """Root of all errors raised on purpose. ``str()`` is a sentence fit for a user; it never holds a secret."""


class InvalidInput(BsupError):
    """The caller's fault: nothing was changed. Names the field, what was wrong, and what is allowed."""

    def __init__(self, field: str, problem: str, allowed: str = "") -> None:
        self.field = field
        self.problem = problem
        self.allowed = allowed
        super().__init__(f"{field}: {problem}" + (f" (allowed: {allowed})" if allowed else ""))


class UnknownJob(BsupError):
    """No job has this id."""

    def __init__(self, job: int) -> None:
        self.job = job
        super().__init__(f"no job {job}")


class WrongState(BsupError):
    """The job is not in a state in which that can be done; nothing was changed."""

    def __init__(self, job: int, state: str, problem: str) -> None:
        self.job = job
        self.state = state
        self.problem = problem
        super().__init__(f"job {job} is {state}: {problem}")


class PermissionDenied(BsupError):
    """The peer's role does not allow the call."""


class StoreUnavailable(BsupError):
    """The database did not answer or refused the connection. Nothing is known of the write: read back, or try again."""


class SessionRefused(BsupError):
    """The session is gone or another incarnation holds it: this daemon must end its work and begin a new session."""


class RunnerError(BsupError):
    """The host could not do what the job asked (start, prepare, stop)."""


class HandleLost(RunnerError):
    """What a run has on disk can't be read any more. Nothing of it runs; it may have run."""


class Busy(BsupError):
    """A bounded queue is full. Try again later."""
