"""``python supervisor/shepherd --state DIR``: runs the shepherd. With ``--detach`` it returns when the shepherd
listens.

Started by its client (or a service manager), with the interpreter's isolated mode: nothing in the environment or the
working directory, and no installed package, is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace

if not __package__:
    # Run as a directory, which puts that directory itself first: its modules are to be found as a package's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from supervisor.shepherd import linux, mounts
from supervisor.shepherd.bond import Bond, Estate
from supervisor.shepherd.files import StateDirectory, log_is_full, log_to, say
from supervisor.shepherd.guardian import CANT_BEGIN, LEFT, Guardian
from supervisor.shepherd.host import Host
from supervisor.shepherd.launcher import Charter
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.server import SOCKET, Server
from supervisor.shepherd.spec import Policy, is_uid_range, service_ids
from supervisor.shepherd.sweep import sweep
from supervisor.shepherd.uids import UidRanges

_LOG_CHECK = 60.0
_OTHERS_TIME = 10.0
_PAUSE = 0.01
_CRASHED = 70


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shepherd", description="Owns the processes of bsup's jobs on this host.")
    parser.add_argument("--state", required=True, help="the daemon's state directory")
    parser.add_argument("--uid", type=int, default=os.geteuid(), help="the daemon's uid, whose requests are taken")
    parser.add_argument("--uid-base", type=int, default=200_000, help="the first uid given to jobs")
    parser.add_argument("--uid-count", type=int, default=0, help="how many; 0: jobs run as the shepherd's own uid")
    parser.add_argument("--linger", type=float, default=10.0, help="seconds to stay with no job and no client")
    parser.add_argument("--detach", action="store_true", help="go to the background, and return when it listens")
    options = parser.parse_args(arguments)
    if not is_uid_range(options.uid_base, options.uid_count):
        parser.error("--uid-base and --uid-count must make a range of uids above 0")
    policy = Policy(service_ids(options.uid), options.uid_base, options.uid_count)
    if policy.allows(options.uid):
        parser.error("--uid must not be one of the jobs'")
    state = StateDirectory(options.state, policy.owner)
    if not options.detach:
        return _run(state, policy, options.linger, _Waiter(), None)
    read, write = os.pipe2(os.O_CLOEXEC)
    if os.fork() > 0:
        os.close(write)
        return 0 if os.read(read, 1) else 1
    os.close(read)
    os.setsid()
    log_to(state)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    command = (sys.executable, "-I", "-S", os.path.dirname(os.path.abspath(__file__)))
    words = sys.argv[1:] if arguments is None else arguments
    return _run(state, policy, options.linger, _Waiter(write), (*command, *words))


class _Waiter:
    """Who started it in the background, and is told once that it listens; if all let go of it before, that it can't."""

    def __init__(self, write: int = -1) -> None:
        self._write = write

    def tell(self) -> None:
        if self._write >= 0:
            os.write(self._write, b"!")
        self.let_go()

    def let_go(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1


def _run(state: StateDirectory, policy: Policy, linger: float, waiter: _Waiter, command: tuple[str, ...] | None) -> int:
    """``command``: what begins another one like this in the background; None: this isn't in the background."""
    os.umask(0o077)
    os.chdir(state.fd)
    linux.name_process("bsup-guardian")
    lock = os.open("shepherd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _is_first(lock):
        os.close(lock)
        waiter.tell()
        return 0
    files = _raise_file_limit()
    uids = UidRanges(state)
    if policy.is_root:
        uids.open()
    estate = Estate()
    while True:
        bond = Guardian(state, estate, waiter.let_go).run()
        if isinstance(bond, int):
            return bond
        code = CANT_BEGIN
        try:
            found = _serve(state, policy, linger, waiter, uids, bond, Charter(files, bond.guardian, command))
            if isinstance(found, Estate):
                # The guardian is dead. From here on this is one.
                estate = found
                continue
            code = found
        except BaseException:
            traceback.print_exc()
        os._exit(code)


def _is_first(lock: int) -> bool:
    """False: another one serves this directory, which is as good. It may be at the sweep still, or about to leave."""
    deadline = time.monotonic() + _OTHERS_TIME
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(SOCKET)
            return False
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)


def _serve(
    state: StateDirectory,
    policy: Policy,
    linger: float,
    waiter: _Waiter,
    uids: UidRanges,
    bond: Bond,
    charter: Charter,
) -> int | Estate:
    """Until nobody needs it (a code), or its guardian is gone (what it leaves to the next). A child of the
    guardian's."""
    linux.become_subreaper()
    state.make("runs", 0o700)
    state.make("work", 0o711)
    with open(state.create_or_empty("shepherd.pid"), "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    if bond.estate.uids is not None:
        policy = replace(policy, uid_base=bond.estate.uids[0], uid_count=bond.estate.uids[1])
    before = None
    if policy.gives_uids:
        before = uids.remembered(policy.uid_base, policy.uid_count)
        policy = replace(policy, uid_shift=uids.take(policy.uid_base, policy.uid_count, policy.service[0]))
    tmp_problem = mounts.problem()
    loop = Loop()
    host = Host(loop, state, policy, uids, bond, charter=charter, tmp_problem=tmp_problem)
    sweep(state, policy, host.take_up(), by_uid=uids.are_locked and before == policy.uid_shift)
    server = Server(
        loop,
        host,
        peers=frozenset({os.geteuid(), policy.service[0]}),
        linger=linger,
    )
    host.on_event = server.announce
    bond.listen(loop, host.on_news)
    loop.on_signal(signal.SIGCHLD, host.reap)
    loop.on_signal(signal.SIGTERM, server.end)
    loop.on_signal(signal.SIGINT, server.end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if charter.command is not None:
        _keep_log_small(loop, state)
    # What is here now stays: a fork that doesn't touch it copies less.
    gc.collect()
    gc.freeze()
    say(f"shepherd {os.getpid()} serves {state.path}")
    bond.serve()
    waiter.tell()
    try:
        loop.run()
    except BaseException:
        traceback.print_exc()
        return _CRASHED
    server.close()
    if bond.is_lost and not host.is_idle:
        estate = host.hand_over()
        bond.close()
        loop.close()
        return estate
    host.launcher.close()
    say(f"shepherd {os.getpid()} leaves")
    return LEFT


def _raise_file_limit() -> tuple[int, int]:
    """Six descriptors a step; the steps themselves get the limit this process began with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _keep_log_small(loop: Loop, state: StateDirectory) -> None:
    if log_is_full():
        log_to(state)
    loop.at(now() + _LOG_CHECK, lambda: _keep_log_small(loop, state))


if __name__ == "__main__":
    sys.exit(main())
