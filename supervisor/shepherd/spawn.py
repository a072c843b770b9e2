"""Fork to exec: what turns a copy of the shepherd into a job's process. Standard library only; called by ``step``.

The child reports what went wrong, as JSON, on a socket that exec closes: an end without a word is a command that runs.
What the job's own directory or command can do to these steps happens after the change of uid.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
from typing import NoReturn

from supervisor.shepherd import linux
from supervisor.shepherd.files import chown_tree
from supervisor.shepherd.spec import StepSpec

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOT_FOUND = 127
_NOT_EXECUTABLE = 126


class _CantStart(Exception):
    def __init__(self, code: int, problem: str) -> None:
        self.code = code
        super().__init__(problem)


def spawn(spec: StepSpec, workspace: str, out: int, err: int, files: tuple[int, int]) -> tuple[int, socket.socket]:
    """Forks the step's process; returns its pid and the line to it (non-blocking).

    The child executes nothing before it gets a byte on the line, so that ``started`` is on disk first; closing the
    line instead calls it off. ``workspace`` is the absolute path, without symlinks; ``files`` the limit of open files
    the step is to have. Raises OSError when there can be no process.
    """
    line, child_line = socket.socketpair()
    shepherd = os.getpid()
    try:
        pid = fork_quietly()
    except OSError:
        line.close()
        child_line.close()
        raise
    if pid == 0:
        line.close()
        _become_the_step(spec, workspace, out, err, child_line, shepherd, files)
    child_line.close()
    line.setblocking(False)
    return pid, line


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
    """All to their defaults, none blocked: an ignored signal stays ignored after exec, and Python ignores SIGPIPE and
    SIGXFSZ."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def read_report(line: socket.socket) -> tuple[int, str] | None:
    """What the child said: (exit code, error). None: nothing (yet)."""
    try:
        data = line.recv(1 << 16)
    except OSError:
        return None
    try:
        said = json.loads(data) if data else None
        return (int(said["code"]), str(said["error"])) if said else None
    except (ValueError, KeyError, TypeError):
        return _NOT_EXECUTABLE, "the step could not be started"


def private_tmp_problem() -> str | None:
    """Why this host can't give a step a /tmp of its own; None if it can. Tried in a child, at start."""
    if os.geteuid() != 0:
        return "not root"
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        problem = ""
        try:
            linux.own_mounts()
            linux.bind(os.open("/tmp", os.O_PATH | os.O_CLOEXEC), "/tmp")
        except OSError as error:
            problem = error.strerror or "mount failed"
        finally:
            os.write(write, problem.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as file:
        return file.read().decode() or None


def _become_the_step(
    spec: StepSpec, workspace: str, out: int, err: int, line: socket.socket, shepherd: int, files: tuple[int, int]
) -> NoReturn:
    try:
        _reset(out, err, files)
        if spec.private_tmp:
            _make_tmp_private(workspace)
        if spec.own:
            _own(spec, workspace)
        _change_user(spec)
        linux.give_up_new_privileges()
        # Without the shepherd nobody would end it at the fence, nor keep its exit status.
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() != shepherd:
            os._exit(_NOT_EXECUTABLE)
        environment = _environment(spec, workspace)
        if line.recv(1) != b"!":
            os._exit(_NOT_EXECUTABLE)
        _enter(spec, workspace)
        _execute(spec.argv, environment)
    except _CantStart as problem:
        _tell(line, problem.code, str(problem))
    except OSError as error:
        _tell(line, _NOT_EXECUTABLE, f"the step could not be set up: {error.strerror or error}")
    except BaseException as error:
        _tell(line, _NOT_EXECUTABLE, f"the step could not be set up: {error}")
    finally:
        os._exit(_NOT_EXECUTABLE)


def _tell(line: socket.socket, code: int, problem: str) -> None:
    line.sendall(json.dumps({"code": code, "error": problem[:2000]}).encode())
    os._exit(code)


def _reset(out: int, err: int, files: tuple[int, int]) -> None:
    os.setsid()
    reset_signals()
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    # dup2 makes the copies inheritable; everything else the shepherd has open is close-on-exec.
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    os.umask(0o022)


def _make_tmp_private(workspace: str) -> None:
    """Binds the workspace's tmp to /tmp. A workspace that is itself below /tmp is shown again at its place."""
    linux.own_mounts()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(workspace, flags)
    tmp = os.open("tmp", flags, dir_fd=top)
    if workspace.startswith("/tmp/"):
        place = os.dup(tmp)
        for name in workspace.split("/")[2:]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o711, dir_fd=place)
            place = os.open(name, flags, dir_fd=place)
        linux.bind(top, f"/proc/self/fd/{place}")
    linux.bind(tmp, "/tmp", recursive=True)


def _own(spec: StepSpec, workspace: str) -> None:
    directory = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    uid, gid = spec.ids or (os.geteuid(), os.getegid())
    chown_tree(directory, uid, gid)
    os.close(directory)


def _change_user(spec: StepSpec) -> None:
    if spec.ids is None:
        return
    uid, gid = spec.ids
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _environment(spec: StepSpec, workspace: str) -> dict[str, str]:
    defaults = {
        "PATH": _DEFAULT_PATH,
        "HOME": f"{workspace}/home",
        "TMPDIR": "/tmp" if spec.private_tmp else f"{workspace}/tmp",
    }
    return {**defaults, **spec.env, "BSUP_RUN": spec.token}


def _enter(spec: StepSpec, workspace: str) -> None:
    try:
        os.chdir(workspace)
    except PermissionError as error:
        raise _CantStart(_NOT_EXECUTABLE, f"the workspace can't be entered: {_blocker(workspace)}") from error
    try:
        os.chdir(os.path.join(workspace, spec.cwd))
        here = os.getcwd()
    except FileNotFoundError as error:
        raise _CantStart(_NOT_FOUND, f"directory not found: {spec.cwd}") from error
    except NotADirectoryError as error:
        raise _CantStart(_NOT_EXECUTABLE, f"not a directory: {spec.cwd}") from error
    except OSError as error:
        raise _CantStart(_NOT_EXECUTABLE, f"directory {spec.cwd}: {error.strerror}") from error
    # Asked of the kernel after the fact: so neither ``..`` nor a symlink of the job's can lead out.
    if here != workspace and not here.startswith(workspace + "/"):
        raise _CantStart(_NOT_EXECUTABLE, f"directory {spec.cwd} leads out of the workspace")


def _blocker(path: str) -> str:
    """The first directory on the way that this uid may not pass."""
    at = ""
    for name in path.split("/")[1:]:
        at = f"{at}/{name}"
        if not os.access(at, os.X_OK):
            return f"uid {os.getuid()} may not pass {at}"
    return "permission denied"


def _execute(argv: list[str], environment: dict[str, str]) -> None:
    command = argv[0]
    try:
        os.execvpe(command, argv, environment)
    except FileNotFoundError as error:
        if os.path.exists(command) and "/" in command:
            raise _CantStart(_NOT_FOUND, f"interpreter of {command} not found") from error
        raise _CantStart(_NOT_FOUND, f"command not found: {command}") from error
    except NotADirectoryError as error:
        raise _CantStart(_NOT_FOUND, f"command not found: {command}") from error
    except PermissionError as error:
        raise _CantStart(_NOT_EXECUTABLE, f"permission denied: {command}") from error
    except OSError as error:
        text = "argument list too long" if error.errno == errno.E2BIG else error.strerror
        raise _CantStart(_NOT_EXECUTABLE, f"{command}: {text}") from error
    except ValueError as error:
        raise _CantStart(_NOT_EXECUTABLE, f"{command}: {error}") from error
