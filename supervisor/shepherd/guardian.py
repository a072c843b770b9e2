"""The shepherd's parent: begins it anew when it was killed, and ends it when it hangs. Standard library only;
``__main__`` calls it.

It waits, and does nothing else: so there is nothing in it to go wrong. A shepherd that was killed leaves its jobs'
processes behind, as children of this one (a subreaper); the next shepherd ends them before it takes any work. One that
answers nobody although the fence has passed can't have kept it: it hangs in an exec from a dead network file system,
say, and is killed, as its jobs are about to be passed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable

from supervisor.shepherd import linux
from supervisor.shepherd.fence import Fence
from supervisor.shepherd.files import StateDirectory, say
from supervisor.shepherd.loop import now

LEFT, CANT_BEGIN = 0, 1
_LOOK = 1.0
_LATE = 3.0
"""Seconds behind the fence after which a shepherd is to answer, and how long it may take to."""
_FIRST_PAUSE = 0.05
_LAST_PAUSE = 5.0
_GOOD_RUN = 60.0
_ENDING = (signal.SIGTERM, signal.SIGINT)


def guard(state: StateDirectory, shepherd: Callable[[], int], begun: Callable[[], None]) -> int:
    """Runs ``shepherd`` in a child until it leaves (0) or can't begin (1), which is returned.

    ``begun`` is called once it runs.
    """
    linux.become_subreaper()
    waited = {signal.SIGCHLD, *_ENDING}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fence = Fence(state)
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(shepherd, waited)
        begun()
        status = _wait(pid, state, fence, waited)
        if os.WIFEXITED(status) and (code := os.WEXITSTATUS(status)) in (LEFT, CANT_BEGIN):
            return code
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        say(f"shepherd {pid} was ended by {how}: beginning anew")
        pause = _FIRST_PAUSE if time.monotonic() - began > _GOOD_RUN else min(pause * 2, _LAST_PAUSE)
        time.sleep(pause)


def _run(shepherd: Callable[[], int], waited: set[signal.Signals]) -> None:
    code = CANT_BEGIN
    try:
        linux.name_process("bsup-shepherd")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
        code = shepherd()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(shepherd: int, state: StateDirectory, fence: Fence, waited: set[signal.Signals]) -> int:
    """How the shepherd ended. Reaps whatever else ends."""
    asked: float | None = None
    while True:
        while (found := _reap()) is not None:
            pid, status = found
            if pid == shepherd:
                return status
        told = signal.sigtimedwait(waited, _LOOK)
        if told is not None and told.si_signo in _ENDING:
            os.kill(shepherd, told.si_signo)
        if fence.has_passed and fence.at != asked and fence.at is not None and now() > fence.at + _LATE:
            asked = fence.at
            if not _answers(state):
                say(f"the fence has passed and shepherd {shepherd} answers nobody: killing it")
                os.kill(shepherd, signal.SIGKILL)


def _reap() -> tuple[int, int] | None:
    with contextlib.suppress(ChildProcessError):
        pid, status = os.waitpid(-1, os.WNOHANG)
        return (pid, status) if pid else None
    return None


def _answers(state: StateDirectory) -> bool:
    """Whether it greets who connects: its loop goes round, then. One that doesn't listen yet has no work either."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(_LATE)
        try:
            link.connect(f"/proc/self/fd/{state.fd}/shepherd.sock")
            return bool(link.recv(1))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            return False
