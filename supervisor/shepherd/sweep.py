"""What a shepherd that died left behind and nobody can go on with: ended before any new work is taken. Standard library
only; ``__main__`` calls it.

Its guardian died too, say: the processes are children of init now, and nobody will have an exit status. So each step
that was claimed, never closed and not taken up (``heirs``) is killed by all its marks, what is left in its FIFOs is
kept, and ``closed`` says ``gone`` where there is no ``exit``: a loss.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass

from supervisor.shepherd import kill
from supervisor.shepherd.bond import Names
from supervisor.shepherd.fence import boot_id
from supervisor.shepherd.files import Refusal, StateDirectory, exists, read_json, say
from supervisor.shepherd.output import FIFOS, Output
from supervisor.shepherd.spec import Policy

_PATIENCE = 5.0
_PAUSE = 0.01


@dataclass
class _Left:
    path: str
    directory: int
    uid: int | None
    token: str
    pid: int
    start_time: int
    output: Output | None


def sweep(state: StateDirectory, policy: Policy, go_on: set[Names], *, by_uid: bool) -> int:
    """Ends and closes all that was left; returns how many steps. Takes up to 5 s where processes are slow to die.

    ``go_on``: steps that were taken up. ``by_uid``: the host's uids are this shepherd's alone, and the same ones as
    before it.
    """
    left = _find(state, policy, go_on, by_uid)
    if not left:
        return 0
    say(f"a shepherd before this one left {len(left)} steps: ending them")
    deadline = time.monotonic() + _PATIENCE
    while (alive := _alive(left)) and time.monotonic() < deadline:
        for uid in {each.uid for each in left if each.uid is not None}:
            kill.send_uid(uid, (signal.SIGKILL,))
        kill.send(alive, signal.SIGKILL)
        _take_output(left)
        # These aren't children of this process: there is nothing to wait on but their absence.
        time.sleep(_PAUSE)
    _take_output(left)
    for each in left:
        _close(state, each)
    return len(left)


def _find(state: StateDirectory, policy: Policy, go_on: set[Names], by_uid: bool) -> list[_Left]:
    left = []
    top = state.open("runs")
    runs = sorted(os.listdir(top))
    os.close(top)
    for run in runs:
        try:
            directory = state.open("runs", run)
        except Refusal:
            continue
        steps = sorted(os.listdir(directory))
        os.close(directory)
        for index in steps:
            with contextlib.suppress(Refusal):
                at = state.open("runs", run, index)
                if (run, index) not in go_on and exists(at, "claim") and not exists(at, "closed"):
                    left.append(_read(state, f"{state.path}/runs/{run}/{index}", at, policy, by_uid))
                else:
                    os.close(at)
    return left


def _read(state: StateDirectory, path: str, directory: int, policy: Policy, by_uid: bool) -> _Left:
    try:
        spec = read_json(directory, "spec") or {}
        started = read_json(directory, "started") or {}
    except (OSError, ValueError) as error:
        say(f"{path}: can't be read: {error}")
        spec, started = {}, {}
    uid = spec.get("uid")
    # The uids are locked, and it is the same range as before: nobody else's process has one.
    own = by_uid and isinstance(uid, int) and policy.allows(uid) and not spec.get("as_service")
    same_boot = started.get("boot_id") == boot_id()
    pid, start_time = started.get("pid"), started.get("start_time")
    return _Left(
        path=path,
        directory=directory,
        uid=policy.real(uid) if isinstance(uid, int) and own else None,
        token=str(spec.get("token") or ""),
        pid=pid if same_boot and isinstance(pid, int) else 0,
        start_time=start_time if isinstance(start_time, int) else 0,
        output=Output.reopen(state, directory),
    )


def _alive(left: list[_Left]) -> set[int]:
    uids = {each.uid for each in left if each.uid is not None}
    tokens = {each.token for each in left if each.token}
    leaders = {each.pid for each in left if each.pid and not _is_anothers(each)}
    known = {(each.pid, each.start_time) for each in left}
    found = set()
    for pid in kill.processes():
        if pid == os.getpid():
            continue
        fields = kill.stat(pid)
        if not fields or fields[0] in (b"Z", b"X"):
            continue
        # A session is the leader's for as long as it has members: its number goes to no new process meanwhile.
        if (
            (pid, int(fields[19])) in known
            or int(fields[3]) in leaders
            or (uids and uids & kill.uids(pid))
            or (tokens and kill.token_of(pid) in tokens)
        ):
            found |= kill.tree({pid})
    return found - {os.getpid()}


def _is_anothers(each: _Left) -> bool:
    """Whether its pid is that of another process by now: then its session has no members any more."""
    fields = kill.stat(each.pid)
    return bool(fields) and int(fields[19]) != each.start_time


def _take_output(left: list[_Left]) -> None:
    for each in left:
        if each.output is not None:
            each.output.drain()


def _close(state: StateDirectory, each: _Left) -> None:
    record: dict[str, object] = {"at": time.time(), "gone": not exists(each.directory, "exit")}
    if each.output is None:
        record |= {"out_bytes": _size(each.directory, "out"), "err_bytes": _size(each.directory, "err")}
        record |= {"out_dropped": 0, "err_dropped": 0, "output_closed": True}
    else:
        record |= {**each.output.counts(), "output_closed": not each.output.is_open}
        each.output.close()
    try:
        state.write_json(each.directory, "closed", record)
        for name in FIFOS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=each.directory)
    except OSError as error:
        say(f"{each.path}: closed can't be written: {error}")
    os.close(each.directory)


def _size(directory: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
