"""Steps of a shepherd that was killed go on under this one. Standard library only; ``host`` has it.

A step goes on if its output was held for it all the time, it is known to have started, and its end is known or will be:
its main process is below the guardian, which notes it. Whatever else was claimed and not closed is for the sweep, and
a loss.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from supervisor.shepherd import kill
from supervisor.shepherd.bond import Bond, Names
from supervisor.shepherd.files import Refusal, exists, read_json, say
from supervisor.shepherd.guardian import NOTE, is_below
from supervisor.shepherd.loop import now
from supervisor.shepherd.spec import Policy, read_spec
from supervisor.shepherd.step import STOPPING, Ground, Place, Step, Taken

_LOOK = 0.1


class Heirs:
    def __init__(self, ground: Ground, bond: Bond) -> None:
        self._ground = ground
        self._bond = bond
        self._open: set[Step] = set()
        self._mains: dict[int, tuple[Step, int]] = {}
        self._handles: set[int] = set()

    def take_up(self, policy: Policy) -> list[Step]:
        """Those that go on. What the guardian holds of the others is let go of."""
        for names in list(self._bond.estate.fifos):
            if not self._take_up(names, policy):
                self._bond.drop(names)
        self._bond.flush()
        if self._open:
            say(f"{len(self._open)} steps of the shepherd before go on")
        return list(self._open)

    def strays(self) -> set[int]:
        """What may be theirs: orphans of the shepherd before are the guardian's children."""
        if not self._open:
            return set()
        return kill.children(self._bond.guardian) - {os.getpid(), *self._mains}

    def closed(self, step: Step) -> None:
        self._open.discard(step)

    def look(self) -> None:
        """The guardian has noted an end."""
        for pid in list(self._mains):
            self._look(pid)

    def close(self) -> None:
        for handle in list(self._handles):
            self._let_go(handle)

    # --- taking up ---

    def _take_up(self, names: Names, policy: Policy) -> bool:
        state = self._ground.state
        fifos = self._bond.estate.fifos.pop(names)
        directory = -1
        try:
            directory = state.open("runs", *names)
            taken = self._read(directory)
            if taken is not None:
                spec = read_spec(state, policy, directory)
                place = Place(f"{state.path}/runs/{'/'.join(names)}", *names, directory)
                step = Step(self._ground, place, spec)
                step.take_up(taken, fifos)
                self._open.add(step)
                self._await(step, taken)
                return True
        except (Refusal, OSError, ValueError) as problem:
            say(f"{'/'.join(names)}: can't be taken up: {problem}")
        if directory >= 0:
            os.close(directory)
        for fd in fifos:
            if fd >= 0:
                os.close(fd)
        return False

    def _read(self, directory: int) -> Taken | None:
        """Raises ValueError or OSError."""
        started = read_json(directory, "started")
        if started is None or exists(directory, "closed"):
            return None
        taken = Taken(
            pid=_whole(started, "pid"),
            start_time=_whole(started, "start_time"),
            at=_number(started, "at"),
            at_boot=_number(started, "at_boot"),
            end=read_json(directory, "exit"),
            stopping=read_json(directory, STOPPING) or {},
        )
        if taken.end is None and read_json(directory, NOTE) is None:
            lives = kill.start_time(taken.pid) == taken.start_time and is_below(taken.pid, self._bond.guardian)
            return taken if lives else None
        return taken

    # --- their ends ---

    def _await(self, step: Step, taken: Taken) -> None:
        if taken.end is not None:
            self._ground.loop.at(now(), step.reaped)
            return
        self._mains[taken.pid] = step, taken.start_time
        try:
            handle = os.pidfd_open(taken.pid)
        except OSError:
            self._ground.loop.at(now(), functools.partial(self._look, taken.pid))
        else:
            self._handles.add(handle)
            self._ground.loop.watch(handle, functools.partial(self._on_death, taken.pid, handle))

    def _on_death(self, pid: int, handle: int) -> None:
        self._let_go(handle)
        self._look(pid)

    def _let_go(self, handle: int) -> None:
        self._handles.discard(handle)
        self._ground.loop.unwatch(handle)
        os.close(handle)

    def _look(self, pid: int) -> None:
        """For the guardian's note, which is there before it reaps: where both are gone, nobody knows how it ended."""
        found = self._mains.get(pid)
        if found is None:
            return
        step, start_time = found
        is_reaped = kill.start_time(pid) != start_time
        note = None
        try:
            if (note := read_json(step.place.directory, NOTE)) is not None:
                code, status, at = _whole(note, "code"), _status(note), _number(note, "at")
        except OSError:
            is_reaped = False  # it can't be read now
        except ValueError as problem:
            say(f"{step.place.path}: {problem}")
            note = None
        if note is not None:
            del self._mains[pid]
            step.exited(code, status, at=at, cause="fence" if note.get("cause") == "fence" else None)
            step.reaped()
        elif is_reaped:
            del self._mains[pid]
            step.lost()
        elif kill.is_dead(pid):
            self._ground.loop.at(now() + _LOOK, functools.partial(self._look, pid))


def _whole(record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} is not a whole number above 0")
    return value


def _status(record: dict[str, Any]) -> int:
    value = record.get("status")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255:
        raise ValueError("status is none")
    return value


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number")
    return float(value)
