"""The history checker sees each kind of violation: histories made by hand, each with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import stamps
from history import ERR, OUT, Attempt, History, Job, gaps, violations
from stamps import Stamp


def stamp(at: float, lease: str, what: str, *words: str, attempt: int = 1, step: int = 0, pid: int = 100) -> Stamp:
    return Stamp(at, "a" if lease.startswith("a") else "b", 1, lease, attempt, step, pid, 5, what, words)


def run(
    lease: str, begin: float, *, attempt: int = 1, code: int | None = 0, step: int = 0, pid: int = 100
) -> list[Stamp]:
    """A second long, with two ticks; ``code`` None: cut off before its end."""
    own = {"attempt": attempt, "step": step, "pid": pid}
    found = [stamp(begin, lease, "start", **own)]
    found += [stamp(begin + 0.3 * n, lease, "tick", str(n), **own) for n in (1, 2)]
    return found if code is None else [*found, stamp(begin + 1.0, lease, "end", str(code), "2", **own)]


def log(attempt: int, *, step: int = 0, lines: int = 2) -> dict[tuple[int, int], bytes]:
    return {(step, OUT): stamps.text(1, attempt, step, lines), (step, ERR): stamps.error_text(1, attempt, step)}


def good() -> History:
    """A job that was lost with its host, failed once, and succeeded in two steps."""
    return History(
        accepted=[1],
        jobs={1: Job(1, "steps", "succeeded", 3, 0, failures=1, losses=1, releases=0, places=("finished",))},
        attempts=[
            Attempt(1, 1, "a-1", "lost", "ready"),
            Attempt(1, 2, "b-1", "failed", "ready", exit_code=7),
            Attempt(1, 3, "b-2", "succeeded", "succeeded", exit_code=0),
        ],
        stamps=[
            *run("a-1", 10.0, code=None),
            *run("b-1", 20.0, attempt=2, code=7),
            *run("b-2", 30.0, attempt=3),
            *run("b-2", 31.0, attempt=3, step=1, pid=101),
        ],
        logs={(1, 1): log(1, lines=1), (1, 2): log(2), (1, 3): {**log(3), **log(3, step=1)}},
    )


def test_a_good_history_passes() -> None:
    assert violations(good()) == []
    assert gaps(good()) == [pytest.approx(20.0 - 10.6), pytest.approx(9.0)]


Spoil = Callable[[History], None]


def job(**changes: object) -> Spoil:
    def spoil(history: History) -> None:
        history.jobs[1] = replace(history.jobs[1], **changes)  # type: ignore[arg-type]  # as the table below gives them

    return spoil


def attempt(number: int, **changes: object) -> Spoil:
    def spoil(history: History) -> None:
        found = history.attempts[number - 1]
        history.attempts[number - 1] = replace(found, **changes)  # type: ignore[arg-type]  # as above

    return spoil


def stamped(*more: Stamp) -> Spoil:
    return lambda history: history.stamps.extend(more)


def without(lease: str, what: str) -> Spoil:
    def spoil(history: History) -> None:
        history.stamps = [s for s in history.stamps if (s.lease, s.what) != (lease, what)]

    return spoil


def logged(number: int, step: int, text: bytes, stream: int = OUT) -> Spoil:
    return lambda history: history.logs[1, number].update({(step, stream): text})


def end_twice(history: History) -> None:
    history.attempts[1] = replace(history.attempts[1], became="failed")


def reuse_a_lease(history: History) -> None:
    history.attempts[1] = replace(history.attempts[1], lease="b-2")


ANOTHER = Attempt(1, 4, "b-3", "succeeded", "succeeded", exit_code=0)

SPOILED: dict[str, tuple[str, Spoil]] = {
    "the job is nowhere": ("lost", lambda history: history.jobs.clear()),
    "the job waits for ever": ("lost", job(state="ready", places=("ready",))),
    "the job runs for ever": ("lost", job(state="running", places=("lease",))),
    "the job is in two places": ("lost", job(places=("ready", "finished"))),
    "an attempt is missing": ("two ends", lambda history: history.attempts.pop(0)),
    "an attempt follows the end": ("two ends", lambda history: history.attempts.append(ANOTHER)),
    "two attempts end it": ("two ends", end_twice),
    "the job says another end than its attempt": ("two ends", job(state="failed")),
    "a loss is counted twice": ("two ends", job(losses=2)),
    "a failure is not counted": ("two ends", job(failures=0)),
    "a release is counted that was none": ("two ends", job(releases=1)),
    "two attempts have one lease": ("two ends", reuse_a_lease),
    "runs overlap by their stamps": ("overlap", stamped(stamp(20.5, "a-1", "tick", "3"))),
    "a run found another alive": ("overlap", stamped(stamp(20.0, "b-1", "alive", "100", "a-1", attempt=2))),
    "a lease starts twice": ("started twice", stamped(stamp(20.5, "b-1", "start", attempt=2, pid=103))),
    "two steps run at once": ("started twice", stamped(stamp(30.5, "b-2", "start", attempt=3, step=2))),
    "a run that nobody recorded": ("unrecorded", stamped(*run("c-9", 50.0, attempt=4))),
    "it ran and is told as never begun": ("unrecorded", attempt(1, outcome="released", reason="orphan")),
    "a wrong exit code": ("exit code", attempt(2, exit_code=8)),
    "an exit code that no run told": ("exit code", without("b-1", "end")),
    "a run that was killed": ("killed", attempt(2, exit_code=None, signal=9)),
    "a success without a run": ("success", attempt(3, lease="b-7")),
    "a success without an end stamped": ("success", without("b-2", "end")),
    "a success of a run that failed": ("success", attempt(2, outcome="succeeded")),
    "a log that differs": ("log", logged(3, 1, stamps.text(1, 3, 1, 2).replace(b"line 2", b"line 3"))),
    "a log that lacks its end": ("log", logged(3, 1, stamps.text(1, 3, 1, 1))),
    "a log that has more than was written": ("log", logged(2, 0, stamps.text(1, 2, 0, 3))),
    "a log twice": ("log", logged(2, 0, 2 * stamps.text(1, 2, 0, 2))),
    "a log with another attempt's text": ("log", logged(3, 0, stamps.text(1, 2, 0, 2))),
    "no errors where there were some": ("log", logged(3, 0, b"", ERR)),
    "a log that is missing": ("log", lambda history: history.logs.pop((1, 3))),
    "a log of a run that was cut off, with a hole": ("log", logged(1, 0, stamps.text(1, 1, 0, 2)[10:])),
    "a log of a step that did not run": ("log", logged(2, 4, b"words")),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_history_does_not(what: str) -> None:
    rule, spoil = SPOILED[what]
    history = good()
    spoil(history)
    history.stamps.sort(key=lambda found: found.at)
    found = violations(history)
    assert rule in {violation.rule for violation in found}, found
    assert all(str(violation).startswith(f"{violation.rule}: job 1: ") for violation in found)


def test_a_run_that_was_cut_off_may_have_written_a_line_more_than_it_stamped() -> None:
    history = good()
    history.logs[1, 1] = log(1, lines=3)
    assert violations(history) == []
    history.logs[1, 1] = log(1, lines=4)
    assert [violation.rule for violation in violations(history)] == ["log"]
