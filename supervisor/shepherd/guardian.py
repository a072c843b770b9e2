"""The shepherd's parent: begins it anew when it was killed, keeps what it would lose with it, and ends it when it
hangs. Standard library only; ``__main__`` calls it.

It does next to nothing, so that next to nothing can go wrong in it. When a shepherd was killed its steps go on, as
children of this one (a subreaper): it holds their output (``bond``), and writes down how each ends, before the kernel
forgets; the next shepherd goes on from there. While none serves, this one keeps the fence. A shepherd that answers
nobody although the fence has passed can't have kept it: it hangs in an exec from a dead network file system, say, and
is killed, as its jobs are about to be passed on.

A shepherd whose guardian was killed becomes the guardian itself, of a next shepherd.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

from supervisor.shepherd import kill, linux
from supervisor.shepherd.bond import Bond, Estate, Holder, Names, pair
from supervisor.shepherd.fence import Fence
from supervisor.shepherd.files import Refusal, StateDirectory, exists, read_json, say
from supervisor.shepherd.launcher import LAUNCHER
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.spawn import fork_quietly, reset_signals

LEFT, CANT_BEGIN = 0, 1
NOTE = "status"
"""How a main process ended whose parent was the guardian: ``code`` and ``status`` as ``waitid`` says them, ``at``, and
``cause`` (fence, where this one ended it)."""
_LOOK = 1.0
_SHORT_LOOK = 0.05
_LATE = 3.0
"""Seconds behind the fence after which a shepherd is to answer, and how long it may take to."""
_FIRST_PAUSE = 0.05
_LAST_PAUSE = 5.0
_GOOD_RUN = 5.0
_REAP_TURN = 500
_LAUNCHER_TIME = 1.0


class Guardian:
    """``begun`` is called when the first shepherd runs. ``estate``: what one that was guarded by another left."""

    def __init__(self, state: StateDirectory, estate: Estate, begun: Callable[[], None]) -> None:
        self._state = state
        self._estate = estate
        self._begun = begun
        self._fence = Fence(state)
        self._fenced = False
        self._asked = 0.0
        self._mains: dict[int, Names] = {}
        self._loop = Loop()
        self._shepherd = 0
        self._status: int | None = None
        self._holder: Holder | None = None
        self._is_told_to_end = False

    def run(self) -> int | Bond:
        """In the guardian: until a shepherd leaves (0) or none can begin (1). In each shepherd: its bond, at once."""
        linux.name_process("bsup-guardian")
        linux.become_subreaper()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._loop.on_signal(signal.SIGCHLD, self._reap)
        self._loop.on_signal(signal.SIGTERM, lambda: self._pass_on(signal.SIGTERM))
        self._loop.on_signal(signal.SIGINT, lambda: self._pass_on(signal.SIGINT))
        self._look()
        is_heir = bool(self._estate.fifos)
        self._take_over()
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            bond = self._fork()
            if bond is not None:
                return bond
            self._begun()
            status = self._until_it_ends()
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            if code == LEFT or (code == CANT_BEGIN and not is_heir):
                return code
            is_heir = True
            how = f"signal {os.WTERMSIG(status)}" if code is None else f"code {code}"
            say(f"shepherd {self._shepherd} was ended by {how}: beginning anew")
            self._shepherd = 0
            self._take_over()
            pause = _FIRST_PAUSE if time.monotonic() - began > _GOOD_RUN else min(pause * 2, _LAST_PAUSE)
            self._rest(pause)
            if self._is_told_to_end:
                self._end_all()
                return LEFT

    # --- a shepherd ---

    def _fork(self) -> Bond | None:
        ours, theirs = pair()
        guardian = os.getpid()
        pid = fork_quietly()
        if pid == 0:
            reset_signals()
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_IGN)
            linux.name_process("bsup-shepherd")
            self._loop.close()
            ours.close()
            return Bond(theirs, guardian, self._estate)
        theirs.close()
        self._shepherd, self._status = pid, None
        self._holder = Holder(ours, self._estate)
        self._loop.watch(ours.fileno(), self._on_said)
        return None

    def _on_said(self) -> None:
        if self._holder is not None and not self._holder.read():
            # Its end is told by SIGCHLD.
            self._loop.unwatch(self._holder.fileno())

    def _until_it_ends(self) -> int:
        self._reap()
        self._loop.running = self._status is None
        self._loop.run()
        assert self._status is not None
        return self._status

    def _rest(self, seconds: float) -> None:
        def wake() -> None:
            self._loop.running = False

        self._loop.at(now() + seconds, wake)
        self._loop.running = True
        self._loop.run()

    def _pass_on(self, number: signal.Signals) -> None:
        if self._shepherd:
            os.kill(self._shepherd, number)
        else:
            self._is_told_to_end = True

    # --- what it left ---

    def _take_over(self) -> None:
        """From here on the steps' main processes are this one's children, and known."""
        if self._holder is not None:
            self._holder.read()
            self._loop.unwatch(self._holder.fileno())
            self._holder.close()
            self._holder = None
        self._end_launchers()
        self._find_mains()
        self._reap()

    def _end_launchers(self) -> None:
        """Nothing is started behind the next shepherd's back. What a launcher was starting just then has its name."""
        deadline = time.monotonic() + _LAUNCHER_TIME
        while time.monotonic() < deadline:
            found = {pid for pid in kill.children(os.getpid()) if kill.name_of(pid) == LAUNCHER}
            if not {pid for pid in found if not kill.is_dead(pid)}:
                return
            kill.send(found, signal.SIGKILL)
            time.sleep(0.001)

    def _find_mains(self) -> None:
        known = set(self._mains.values())
        for names in self._estate.fifos:
            if names not in known and (pid := self._main_of(names)) is not None:
                self._mains[pid] = names

    def _main_of(self, names: Names) -> int | None:
        """The step's main process, dead or alive, if its end will be told to this one. A launcher that can't be killed
        now may be between."""
        try:
            directory = self._state.open("runs", *names)
        except Refusal:
            return None
        try:
            started = read_json(directory, "started") or {}
        except (OSError, ValueError):
            return None
        finally:
            os.close(directory)
        pid, start_time = started.get("pid"), started.get("start_time")
        if not isinstance(pid, int) or not start_time or kill.start_time(pid) != start_time:
            return None
        return pid if is_below(pid, os.getpid()) else None

    # --- ends ---

    def _reap(self) -> None:
        for _ in range(_REAP_TURN):
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_pid not in self._mains and info.si_pid != self._shepherd and kill.is_exiting(self._shepherd):
                # A main process whose launcher was killed too gets here before its shepherd is wholly dead.
                if self._holder is not None:
                    self._holder.read()
                self._find_mains()
            names = self._mains.get(info.si_pid)
            if names is not None and not self._note(names, info):
                self._loop.at(now() + _LOOK, self._reap)
                return
            _, status = os.waitpid(info.si_pid, 0)
            self._mains.pop(info.si_pid, None)
            if info.si_pid == self._shepherd:
                self._status = status
                self._loop.running = False
                return  # what it held is to be known before its children are reaped
        self._loop.at(now(), self._reap)

    def _note(self, names: Names, info: os.waitid_result) -> bool:
        """On disk before it is reaped; False: the disk refuses, and the kernel keeps it."""
        note = {
            "pid": info.si_pid,
            "code": info.si_code,
            "status": info.si_status,
            "at": time.time(),
            "cause": "fence" if self._fenced else None,
        }
        try:
            directory = self._state.open("runs", *names)
        except Refusal:
            return True  # its run was removed
        try:
            if not exists(directory, "exit"):
                self._state.write_json(directory, NOTE, note)
        except OSError as error:
            say(f"{'/'.join(names)}: how it ended can't be written: {error}")
            return False
        finally:
            os.close(directory)
        if self._holder is not None:
            self._holder.poke()
        return True

    # --- the fence ---

    def _look(self) -> None:
        serves = self._shepherd != 0 and self._holder is not None and self._holder.serves
        has_passed, at = self._fence.has_passed, self._fence.at
        self._fenced = has_passed and not serves
        if self._fenced:
            self._end_all()
        elif has_passed and at is not None and at != self._asked and now() > at + _LATE:
            self._asked = at
            if not self._answers():
                say(f"the fence has passed and shepherd {self._shepherd} answers nobody: killing it")
                os.kill(self._shepherd, signal.SIGKILL)
        self._loop.at(now() + (_LOOK if serves or not self._mains else _SHORT_LOOK), self._look)

    def _end_all(self) -> None:
        """All but the shepherd, again and again until it serves: it would do the same. Parents first: they don't see
        how their children end."""
        parents = kill.children(os.getpid()) - {self._shepherd}
        below = kill.tree(parents) - parents
        for pids in (parents, below):
            kill.send(pids, signal.SIGKILL)

    def _answers(self) -> bool:
        """Whether it greets who connects: its loop goes round, then."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_LATE)
            try:
                link.connect(f"/proc/self/fd/{self._state.fd}/shepherd.sock")
                return bool(link.recv(1))
            except (FileNotFoundError, ConnectionRefusedError):
                return True
            except OSError:
                return False


def is_below(pid: int, guardian: int) -> bool:
    above = kill.parent(pid)
    return guardian in (above, kill.parent(above))
