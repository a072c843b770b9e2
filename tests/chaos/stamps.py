"""What a job of the chaos tests does: it stamps its start, its progress and its end, and writes a text that is known.

Stamps are lines appended (O_APPEND) to one file a job, which all hosts share, as they are one machine::

    <boot-time clock> <host> <job> <lease> <attempt> <step> <pid> <pid's start time> <what> …

``start``; ``tick N`` (N lines written so far); ``end CODE N`` just before it exits; ``alive PID LEASE`` when at its
start another run of the same job still lived. The clock (``/proc/uptime``) is never set, and has ticks of 10 ms.

``job`` makes the spec of a process job, ``in_process`` that of an in-process one, which the daemon runs as
``stamps:stamped`` (so this module imports the standard library alone). ``text`` is what a run writes.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "BSUP_CHAOS_HOST"
"""The variable that tells a job which host it runs on; passed on by the daemon (``jobs.pass_env``)."""

_PROGRAM = r"""
umask 0
n=0 i=$BSUP_STEP_INDEX f=@FILES@/$BSUP_JOB_ID
read -r s </proc/$$/stat
set -- $s
shift 21
born=$1
stamp() {
    read -r up _ </proc/uptime
    echo "$up $BSUP_CHAOS_HOST $BSUP_JOB_ID $BSUP_LEASE $BSUP_ATTEMPT $i $$ $born $*" >>"$f"
}
others() {
    while read -r _ _ _ lease _ _ pid b what _; do
        [ "$what" = start ] && [ "$lease" != "$BSUP_LEASE" ] && [ -e "/proc/$pid/stat" ] || continue
        s=
        { read -r s <"/proc/$pid/stat"; } 2>/dev/null
        set -- $s
        [ $# -gt 30 ] || continue
        case $3 in Z | X) continue ;; esac
        shift 21
        [ "$1" = "$b" ] && stamp alive "$pid" "$lease"
    done <"$f"
}
line() {
    n=$((n + 1))
    echo "job $BSUP_JOB_ID attempt $BSUP_ATTEMPT step $i line $n"
}
finish() {
    stamp end "$1" $n
    exit "$1"
}
stamp start
others
echo "job $BSUP_JOB_ID attempt $BSUP_ATTEMPT step $i begins" >&2
"""


def job(
    files: Path,
    *,
    ticks: int = 2,
    every: float = 0.05,
    gate: Path | None = None,
    code: int = 0,
    fail_first: int = 0,
    steps: int = 1,
    **spec: Any,
) -> dict[str, Any]:
    """A process job: each of ``steps`` steps writes a line and stamps a tick ``ticks`` times, ``every`` seconds apart,
    then goes on so until the file ``gate`` is there. The last step exits with ``code``, or with 1 in the first
    ``fail_first`` attempts. More keys of the spec can be given."""
    once = f"line; stamp tick $n; sleep {every}"
    work = f"k=0\nwhile [ $k -lt {ticks} ]; do k=$((k + 1)); {once}; done\n"
    if gate is not None:
        work += f"while [ ! -e {shlex.quote(str(gate))} ]; do {once}; done\n"
    program = _PROGRAM.replace("@FILES@", shlex.quote(str(files))) + work
    last = f"[ $BSUP_ATTEMPT -gt {fail_first} ] || finish 1\nfinish {code}\n"
    runs = [program + (last if step == steps else "finish 0\n") for step in range(1, steps + 1)]
    return {"kind": "steps", "steps": [{"name": f"s{n}", "run": run} for n, run in enumerate(runs, 1)], **spec}


def in_process(
    files: Path, *, ticks: int = 2, every: float = 0.05, gate: Path | None = None, block: float = 0.0, **spec: Any
) -> dict[str, Any]:
    """An in-process job of the kind ``stamped``. ``block``: seconds for which its first attempt holds the whole daemon
    up."""
    args = {"files": str(files), "ticks": ticks, "every": every, "gate": gate and str(gate), "block": block}
    return {"kind": "stamped", "args": args, **spec}


async def stamped(job: Any) -> None:
    """The handler of the kind ``stamped``."""
    args = job.args
    file = Path(args["files"]) / str(job.id)
    who = f"{os.environ[HOST]} {job.id} {job._lease.id} {job.attempt} 0 {os.getpid()} {_born()}"
    _append(file, f"{who} start")
    if args["block"] and job.attempt == 1:
        time.sleep(args["block"])  # noqa: ASYNC251 - what a bad handler does
    tick = 0
    while tick < args["ticks"] or (args["gate"] and not os.path.exists(args["gate"])):  # noqa: ASYNC240 - a short look
        tick += 1
        _append(file, f"{who} tick {tick}")
        await asyncio.sleep(args["every"])
    _append(file, f"{who} end 0 0")


def _born() -> str:
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def write(files: Path, who: Stamp) -> None:
    """A stamp of a run that a test plays itself; its time is now."""
    words = " ".join((who.what, *who.words))
    said = f"{who.host} {who.job} {who.lease} {who.attempt} {who.step} {who.pid} {who.born} {words}"
    _append(files / str(who.job), said)


def _append(file: Path, said: str) -> None:
    with open("/proc/uptime", encoding="ascii") as clock:
        up = clock.read().split()[0]
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(fd, f"{up} {said}\n".encode())
    finally:
        os.close(fd)


def text(job: int, attempt: int, step: int, lines: int) -> bytes:
    """What a process run has written to its standard output after so many lines."""
    return "".join(f"job {job} attempt {attempt} step {step} line {n}\n" for n in range(1, lines + 1)).encode()


def error_text(job: int, attempt: int, step: int) -> bytes:
    """What a process run writes to its standard error."""
    return f"job {job} attempt {attempt} step {step} begins\n".encode()


@dataclass(frozen=True)
class Stamp:
    at: float
    host: str
    job: int
    lease: str
    attempt: int
    step: int
    pid: int
    born: int
    what: str
    words: tuple[str, ...] = ()


def read(files: Path) -> list[Stamp]:
    """All stamps, in order of time (of equal ones: as they were written)."""
    found = [stamp for file in sorted(files.iterdir()) for stamp in of_file(file)]
    return sorted(found, key=lambda stamp: stamp.at)


def of_file(file: Path) -> Iterator[Stamp]:
    for line in file.read_text().splitlines():
        at, host, job, lease, attempt, step, pid, born, what, *words = line.split()
        yield Stamp(float(at), host, int(job), lease, int(attempt), int(step), int(pid), int(born), what, tuple(words))
