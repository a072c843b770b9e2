"""The history checker: holds the invariants 1 to 3 and 5 of a chaos run over what was recorded and what was stamped.

``check(world)`` reads both when all accepted jobs have ended, and fails the test with every rule that was broken.
``violations(history)`` is the judgement alone, a pure function: ``test_history`` shows that it sees each kind.

| rule | what it holds |
|---|---|
| ``lost`` | an accepted job is there, in exactly one place, and that is a final one |
| ``two ends`` | at most one attempt ends the job, the last one; attempts are numbered without a gap, each under a lease of its own; the counts follow from them |
| ``overlap`` | two runs of one job never live at once, over all hosts |
| ``started twice`` | a step starts at most once under one lease |
| ``unrecorded`` | every run belongs to the attempt that names its lease; one that was never begun did not run |
| ``exit code`` | a recorded exit code is the one that was stamped |
| ``killed`` | no run was ended by a signal, as none sends itself one (but those of ``may_be_killed``) |
| ``success`` | a job that succeeded has a run that stamped its end, with 0, in every step |
| ``log`` | the log is what the run wrote, to the byte; of a run that was cut off, the beginning of it |
"""  # noqa: E501 - a table's row can't be broken

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import stamps
from stamps import Stamp

from supervisor.model.logs import decode_records

if TYPE_CHECKING:
    from world import World

FINAL = ("succeeded", "failed", "canceled")
OUT, ERR = 1, 2
TOLD = ("succeeded", "failed")
"""Outcomes that say how the run itself ended."""


@dataclass(frozen=True)
class Job:
    """``places``: the tables that hold it; it is to be one."""

    id: int
    kind: str
    state: str
    attempt: int
    exit_code: int | None
    failures: int
    losses: int
    releases: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    job: int
    attempt: int
    lease: str
    outcome: str
    became: str
    exit_code: int | None = None
    signal: int | None = None
    host: str = ""
    reason: str | None = None


@dataclass
class History:
    """``logs``: what is stored of an attempt, by step and stream."""

    accepted: list[int]
    jobs: dict[int, Job]
    attempts: list[Attempt]
    stamps: list[Stamp]
    logs: dict[tuple[int, int], dict[tuple[int, int], bytes]] = field(default_factory=dict)
    events: list[tuple[int | None, str]] = field(default_factory=list)
    may_be_killed: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Violation:
    rule: str
    job: int
    said: str

    def __str__(self) -> str:
        return f"{self.rule}: job {self.job}: {self.said}"


@dataclass(frozen=True)
class Run:
    """All stamps of one lease, in order of time."""

    stamps: tuple[Stamp, ...]

    @property
    def lease(self) -> str:
        return self.stamps[0].lease

    @property
    def began(self) -> float:
        return self.stamps[0].at

    @property
    def last(self) -> float:
        return self.stamps[-1].at

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(stamp.pid for stamp in self.of("start"))

    @property
    def code(self) -> int | None:
        """That of its last end; None: it stamped none."""
        ends = self.of("end")
        return int(ends[-1].words[0]) if ends else None

    def of(self, what: str) -> list[Stamp]:
        return [stamp for stamp in self.stamps if stamp.what == what]

    def lines(self, step: int) -> int:
        """How many it has written at least."""
        said = [int(s.words[-1]) for s in self.stamps if s.step == step and s.what in ("tick", "end")]
        return max(said, default=0)


def runs(all_stamps: Iterable[Stamp]) -> dict[int, list[Run]]:
    """Each job's runs, in order of their first stamps."""
    by_lease: dict[tuple[int, str], list[Stamp]] = defaultdict(list)
    for stamp in all_stamps:
        by_lease[stamp.job, stamp.lease].append(stamp)
    found: dict[int, list[Run]] = defaultdict(list)
    for (job, _), own in by_lease.items():
        found[job].append(Run(tuple(own)))
    return {job: sorted(each, key=lambda run: run.began) for job, each in found.items()}


def gaps(history: History) -> list[float]:
    """Seconds between the last sign of a run and the start of the job's next one; below 0: they overlapped."""
    return [after.began - before.last for each in runs(history.stamps).values() for before, after in pairwise(each)]


# --- the judgement ----------------------------------------------------------------------------------------------------


def violations(history: History) -> list[Violation]:
    by_job: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in sorted(history.attempts, key=lambda a: (a.job, a.attempt)):
        by_job[attempt.job].append(attempt)
    of_job = runs(history.stamps)
    broken: list[Violation] = []
    for id in history.accepted:
        job, own, ran = history.jobs.get(id), by_job.get(id, []), of_job.get(id, [])
        broken += _placed(id, job)
        broken += _running(id, ran)
        if job is not None:
            broken += _ends(job, own)
            broken += _recorded(job, own, ran)
            if id not in history.may_be_killed:
                broken += _killed(own)
            broken += _logs(job, own, ran, history.logs)
    leases = [attempt.lease for attempt in history.attempts]
    for attempt in history.attempts:
        if leases.count(attempt.lease) > 1:
            broken.append(Violation("two ends", attempt.job, f"lease {attempt.lease} is that of several attempts"))
    return broken


def _placed(id: int, job: Job | None) -> Iterator[Violation]:
    if job is None:
        yield Violation("lost", id, "it was accepted, and is nowhere")
    elif len(job.places) != 1 or job.places[0] != "finished" or job.state not in FINAL:
        yield Violation("lost", id, f"it is {job.state}, in {', '.join(job.places) or 'no table'}")


def _ends(job: Job, own: Sequence[Attempt]) -> Iterator[Violation]:
    numbers = [attempt.attempt for attempt in own]
    if job.places == ("finished",) and numbers != list(range(1, job.attempt + 1)):
        yield Violation("two ends", job.id, f"attempts {numbers}, but the job counts {job.attempt}")
    ends = [attempt for attempt in own if attempt.became in FINAL]
    if len(ends) > 1 or (ends and ends[0] is not own[-1]):
        said = ", ".join(f"{a.attempt}: {a.outcome}, {a.became}" for a in own)
        yield Violation("two ends", job.id, f"more than one end, or an attempt after it ({said})")
    if ends and job.state in FINAL and ends[-1].became != job.state:
        yield Violation("two ends", job.id, f"it is {job.state}, its last attempt made it {ends[-1].became}")
    for name, outcomes, count in (
        ("failures", ("failed",), job.failures),
        ("losses", ("lost", "superseded"), job.losses),
        ("releases", ("released",), job.releases),
    ):
        told = sum(attempt.outcome in outcomes and attempt.became != "canceled" for attempt in own)
        if told != count:
            yield Violation("two ends", job.id, f"{count} {name} are counted, {told} attempts tell of one")


def _running(id: int, ran: Sequence[Run]) -> Iterator[Violation]:
    for run in ran:
        for stamp in run.of("alive"):
            yield Violation("overlap", id, f"when {run.lease} began, pid {stamp.words[0]} of {stamp.words[1]} lived")
        started = [stamp.step for stamp in run.of("start")]
        for step in sorted({step for step in started if started.count(step) > 1}):
            yield Violation("started twice", id, f"step {step} under lease {run.lease}, pids {run.pids}")
        for before, after in pairwise(stamp for stamp in run.stamps if stamp.what in ("start", "end")):
            if before.what == after.what and before.step != after.step:
                yield Violation("started twice", id, f"steps {before.step} and {after.step} ran at once")
    for before, after in pairwise(ran):
        if after.began < before.last:
            said = f"{before.lease} lived at {before.last}, {after.lease} began at {after.began}"
            yield Violation("overlap", id, said)


def _recorded(job: Job, own: Sequence[Attempt], ran: Sequence[Run]) -> Iterator[Violation]:
    by_lease = {run.lease: run for run in ran}
    known = {(attempt.lease, attempt.attempt) for attempt in own}
    if job.places == ("finished",):
        for run in ran:
            if (run.lease, run.stamps[0].attempt) not in known:
                yield Violation("unrecorded", job.id, f"lease {run.lease} ran, and no attempt tells of it")
    for attempt in own:
        match = by_lease.get(attempt.lease)
        if attempt.outcome == "released" and attempt.reason == "orphan" and match is not None:
            yield Violation("unrecorded", job.id, f"attempt {attempt.attempt} is told as never begun, and it ran")
        if attempt.outcome == "succeeded" and (match is None or not _ended_well(match)):
            said = "no run of it is stamped" if match is None else "its run did not stamp its end with 0"
            yield Violation("success", job.id, f"attempt {attempt.attempt} succeeded, but {said}")
        stamped = None if match is None else match.code
        if attempt.outcome in TOLD and attempt.exit_code is not None and attempt.exit_code != stamped:
            said = f"attempt {attempt.attempt} ended with {attempt.exit_code}, stamped is {stamped}"
            yield Violation("exit code", job.id, said)
    if own and job.state == "succeeded" and job.exit_code not in (0, None):
        yield Violation("exit code", job.id, f"it succeeded with {job.exit_code}")


def _killed(own: Sequence[Attempt]) -> Iterator[Violation]:
    for attempt in own:
        if attempt.outcome == "failed" and attempt.signal is not None:
            yield Violation("killed", attempt.job, f"attempt {attempt.attempt} was ended by signal {attempt.signal}")


def _ended_well(run: Run) -> bool:
    started = {stamp.step for stamp in run.of("start")}
    return bool(started) and {stamp.step for stamp in run.of("end") if stamp.words[0] == "0"} == started


def _logs(
    job: Job, own: Sequence[Attempt], ran: Sequence[Run], logs: dict[tuple[int, int], dict[tuple[int, int], bytes]]
) -> Iterator[Violation]:
    if job.kind != "steps":
        return
    by_lease = {run.lease: run for run in ran}
    for attempt in own:
        stored = logs.get((job.id, attempt.attempt), {})
        run = by_lease.get(attempt.lease)
        steps = sorted({stamp.step for stamp in run.of("start")}) if run is not None else []
        for step, stream in sorted({(step, stream) for step in steps for stream in (OUT, ERR)} | stored.keys()):
            found = stored.get((step, stream), b"")
            if run is None or step not in steps:
                if found:
                    yield Violation("log", job.id, f"attempt {attempt.attempt} did not run step {step}, but has a log")
                continue
            # One that was told how it ended had all of its output read; of one that was cut off, what was written
            # last may be on a host that is gone.
            is_whole = attempt.outcome in TOLD and any(end.step == step for end in run.of("end"))
            wrote = _written(job.id, attempt.attempt, step, stream, run.lines(step))
            if not is_whole and stream == OUT and len(found) > len(wrote):
                # A line is written before it is stamped: one that was killed may have written one more than it told.
                wrote = _written(job.id, attempt.attempt, step, stream, run.lines(step) + 1)
            if found != wrote if is_whole else not wrote.startswith(found):
                said = f"attempt {attempt.attempt}, step {step}, stream {stream}: {found[-80:]!r}, not {wrote[-80:]!r}"
                yield Violation("log", job.id, said)


def _written(job: int, attempt: int, step: int, stream: int, lines: int) -> bytes:
    return stamps.error_text(job, attempt, step) if stream == ERR else stamps.text(job, attempt, step, lines)


# --- what was recorded ------------------------------------------------------------------------------------------------

_JOBS = """
SELECT v.id, v.kind, v.state, v.attempt, v.exit_code, v.failures, v.losses, v.releases,
       array_remove(ARRAY[
           CASE WHEN EXISTS (SELECT FROM bsup.waiting w WHERE w.job_id = v.id) THEN 'waiting' END,
           CASE WHEN EXISTS (SELECT FROM bsup.ready r WHERE r.job_id = v.id) THEN 'ready' END,
           CASE WHEN EXISTS (SELECT FROM bsup.lease l WHERE l.job_id = v.id) THEN 'lease' END,
           CASE WHEN EXISTS (SELECT FROM bsup.finished f WHERE f.job_id = v.id AND f.retried_at IS NULL)
                THEN 'finished' END], NULL) AS places
FROM bsup.jobs v ORDER BY v.id
"""
_ATTEMPTS = """
SELECT a.job_id, a.attempt, replace(a.session::text, '-', '') || '-' || a.counter AS lease, a.outcome, a.became,
       a.exit_code, a.signal, a.host, a.reason
FROM bsup.attempt a ORDER BY a.job_id, a.attempt
"""
_CHUNKS = "SELECT c.job_id, c.attempt, c.offset_, c.data FROM bsup.log_chunk c ORDER BY c.job_id, c.attempt, c.offset_"
_EVENTS = "SELECT e.job_id, e.type FROM bsup.event e ORDER BY e.id"


def read(world: World) -> History:
    """What the database holds and the jobs have stamped, now."""
    history = History(
        accepted=list(world.accepted),
        jobs={row[0]: Job(*row[:8], places=tuple(row[8])) for row in world.query(_JOBS)},
        attempts=[Attempt(*row) for row in world.query(_ATTEMPTS)],
        stamps=stamps.read(world.stamps),
        events=[(row[0], row[1]) for row in world.query(_EVENTS)],
        may_be_killed=set(world.may_be_killed),
    )
    for job, attempt, offset, data in world.query(_CHUNKS):
        log = history.logs.setdefault((job, attempt), defaultdict(bytes))
        for record in decode_records(data, offset):
            if record.stream in (OUT, ERR):
                log[record.step, record.stream] += record.data
    return history


def check(world: World, *, deadline: float = 60.0) -> History:
    """Waits until every accepted job has ended, and fails with all that was broken. Returns what it read."""
    world.settle(deadline=deadline)
    history = read(world)
    broken = violations(history)
    if broken:
        shown = "\n".join(f"  {violation}" for violation in broken[:20])
        raise AssertionError(f"{len(broken)} violations:\n{shown}\n{story(history, {v.job for v in broken[:3]})}")
    return history


def story(history: History, jobs: Iterable[int]) -> str:
    """All that is known of some jobs, for a person."""
    said: list[Any] = []
    for job in sorted(jobs):
        said.append(history.jobs.get(job))
        said += [attempt for attempt in history.attempts if attempt.job == job]
        said += [stamp for stamp in history.stamps if stamp.job == job and stamp.what != "tick"]
    return "\n".join(f"  {one}" for one in said)
