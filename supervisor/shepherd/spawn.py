"""From a step's order to its process, without a copy of a Python process. Standard library only; the ``launcher`` does
it.

A fork copies the page tables of a Python process, and its child faults in what it touches: 5 ms a step. So nothing is
forked: the launcher itself takes on what a process hands down (mounts, groups, ids, directory, umask), calls
``posix_spawn``, which shares memory until exec, and steps back. It has one thread: nothing else of it runs meanwhile.

What the job's own directory or command can do to this happens with the job's rights: they are entered, looked up and
executed after the change of uid. The saved uid stays 0, which is the way back; exec sets it to the effective one. With
the job's real uid it can be killed by the process that it has just made: it is not the shepherd for that reason. Where
anything can't be taken back it ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import traceback
from typing import NoReturn

from supervisor.shepherd import linux
from supervisor.shepherd.mounts import PrivateTmp

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_NO_PROCESS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


# (run, step), argv, cwd, environment, (uid, gid) to change to, workspace (absolute, without symlinks), private /tmp
Order = tuple[tuple[str, str], list[str], str, dict[str, str], tuple[int, int] | None, str, bool]


class CantExecute(Exception):
    """The command, or its directory, is at fault: how the step ends. ``code``: 126 or 127."""

    def __init__(self, code: int, problem: str) -> None:
        self.code = code
        super().__init__(problem)


class Spawner:
    """``home``: its working directory; ``files``: the limit of open files the steps are to have."""

    def __init__(self, home: int, files: tuple[int, int]) -> None:
        # Inherited by every step: no setuid program gives it another uid, so what has the job's uid is all there is.
        linux.give_up_new_privileges()
        self._home = home
        self._files = files
        self._own_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._groups = os.getgroups()
        self._tmp = PrivateTmp()
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        # An ignored signal stays ignored after exec, and Python ignores SIGPIPE and SIGXFSZ.
        self._signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}

    def spawn(self, order: Order, out: int, err: int) -> int:
        """The pid of the step's process, which runs its command by then.

        Raises CantExecute, or OSError where there can be no process.
        """
        _, argv, cwd, environment, ids, workspace, private_tmp = order
        try:
            os.umask(0o022)
            if private_tmp:
                self._tmp.enter(workspace)
            if ids is not None:
                uid, gid = ids
                os.setgroups([])
                os.setresgid(gid, gid, 0)
                os.setresuid(uid, uid, 0)
            _enter(workspace, cwd)
            if self._files != self._own_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._files)
            return self._execute(argv, environment, out, err)
        except OSError as error:
            if error.errno in _NO_PROCESS:
                raise
            raise CantExecute(_NOT_EXECUTABLE, f"the step could not be set up: {error.strerror or error}") from error
        finally:
            self._step_back(ids is not None, private_tmp)

    def _step_back(self, has_ids: bool, private_tmp: bool) -> None:
        try:
            if has_ids:
                os.setresuid(0, 0, 0)
                os.setresgid(0, 0, 0)
                os.setgroups(self._groups)
            if self._files != self._own_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._own_files)
            os.umask(self._umask)
            if private_tmp:
                self._tmp.leave()
            os.fchdir(self._home)
        except BaseException:
            _give_up()

    def _execute(self, argv: list[str], environment: dict[str, str], out: int, err: int) -> int:
        """As ``execvpe`` looks for it, by the step's own PATH."""
        command = argv[0]
        if "/" in command:
            try:
                return self._spawn(command, argv, environment, out, err)
            except FileNotFoundError as error:
                if os.path.exists(command):
                    raise CantExecute(_NOT_FOUND, f"interpreter of {command} not found") from error
                raise CantExecute(_NOT_FOUND, f"command not found: {command}") from error
            except OSError as error:
                raise _refused(command, error) from error
            except ValueError as error:
                raise CantExecute(_NOT_EXECUTABLE, f"{command}: {error}") from error
        directories = environment.get("PATH", os.defpath).split(":")
        for directory in directories:
            path = f"{directory}/{command}"
            if directory and os.access(path, os.X_OK):
                with contextlib.suppress(OSError):
                    return self._spawn(path, argv, environment, out, err)
                break
        # Why not is for the long way to say.
        problem: OSError | None = None
        for directory in directories:
            path = os.path.join(directory, command)
            try:
                os.stat(path)  # an exec in vain costs more than this
                return self._spawn(path, argv, environment, out, err)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                problem = problem or error
        if problem is not None:
            raise _refused(command, problem) from problem
        raise CantExecute(_NOT_FOUND, f"command not found: {command}")

    def _spawn(self, path: str, argv: list[str], environment: dict[str, str], out: int, err: int) -> int:
        # The copies are inheritable; everything else the shepherd has open is close-on-exec.
        return os.posix_spawn(
            path,
            argv,
            environment,
            file_actions=(
                (os.POSIX_SPAWN_DUP2, self._nothing, 0),
                (os.POSIX_SPAWN_DUP2, out, 1),
                (os.POSIX_SPAWN_DUP2, err, 2),
            ),
            setsid=True,
            setsigmask=(),
            setsigdef=self._signals,
        )


def fork_quietly() -> int:
    """Forks with all signals blocked; the child calls ``reset_signals``. A signal it took before that would be written
    into the wake-up pipe it shares with the shepherd, which would take it for its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = -1
    try:
        pid = os.fork()
        return pid
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reset_signals() -> None:
    """All to their defaults, none blocked."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _enter(workspace: str, cwd: str) -> None:
    try:
        os.chdir(workspace)
    except PermissionError as error:
        raise CantExecute(_NOT_EXECUTABLE, f"the workspace can't be entered: {_blocker(workspace)}") from error
    try:
        os.chdir(os.path.join(workspace, cwd))
        here = os.getcwd()
    except FileNotFoundError as error:
        raise CantExecute(_NOT_FOUND, f"directory not found: {cwd}") from error
    except NotADirectoryError as error:
        raise CantExecute(_NOT_EXECUTABLE, f"not a directory: {cwd}") from error
    except OSError as error:
        raise CantExecute(_NOT_EXECUTABLE, f"directory {cwd}: {error.strerror}") from error
    # Asked of the kernel after the fact: so neither ``..`` nor a symlink of the job's can lead out.
    if here != workspace and not here.startswith(workspace + "/"):
        raise CantExecute(_NOT_EXECUTABLE, f"directory {cwd} leads out of the workspace")


def _blocker(path: str) -> str:
    """The first directory on the way that this uid may not pass."""
    at = ""
    for name in path.split("/")[1:]:
        at = f"{at}/{name}"
        if not os.access(at, os.X_OK, effective_ids=True):
            return f"uid {os.geteuid()} may not pass {at}"
    return "permission denied"


def _refused(command: str, error: OSError) -> Exception:
    """Why a command that is there isn't executed; the error itself where there can be no process at all."""
    if error.errno in _NO_PROCESS:
        return error
    if isinstance(error, NotADirectoryError):
        return CantExecute(_NOT_FOUND, f"command not found: {command}")
    if isinstance(error, PermissionError):
        return CantExecute(_NOT_EXECUTABLE, f"permission denied: {command}")
    text = "argument list too long" if error.errno == errno.E2BIG else error.strerror
    return CantExecute(_NOT_EXECUTABLE, f"{command}: {text}")


def _give_up() -> NoReturn:
    """With a job's rights, mounts or directory nothing more may be done."""
    traceback.print_exc()
    os._exit(_NOT_EXECUTABLE)
