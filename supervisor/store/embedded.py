"""The embedded PostgreSQL: ``dsn = "embedded"``. Starts the server of a Python wheel below the state directory.

For trying bsup out and for a single host. The server is a process of its own, in its own session, detached: it
survives the daemon's death, and a restarted daemon finds it again and goes on with it. It listens on a Unix socket in
a 0700 directory and on no network; who can enter the directory is trusted.

May import the standard library and ``store.server_files``. All functions are synchronous and may take seconds: ``app``
and the CLI call them before the event loop starts, or in a thread.

Layout of ``<state>/pg``, owned by the caller (root keeps what only root need write):

    lock              flock held while starting or stopping
    postgresql.conf   written at each start; pg_hba.conf beside it
    data/             the cluster; complete since it is there (made as init-*, then renamed)
    dist-<version>/   a copy of the binaries, only if the server's uid can't reach the installed ones
    s/                the socket's directory; where its path is too long, ``socket`` names a private one in /tmp
    log               what the server says
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from supervisor.store.server_files import (
    ENVIRONMENT,
    EmbeddedError,
    Identity,
    ServerFiles,
    check_reachable,
    give_tree,
    installer,
    run,
    server_uid,
)

DATABASE = "bsup"
SUPERUSER = "bsup"
PORT = 5432
# sizeof(sun_path) - 1, less the longest name PostgreSQL makes in the directory.
LONGEST_SOCKET_DIR = 107 - len(f"/.s.PGSQL.{PORT}.lock")
LOG_LIMIT = 16 << 20

# Durable, small, and nothing that reaches beyond the host. No parallel query, as POSIX shared memory is 64 MB in many
# containers.
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
}


@dataclasses.dataclass(frozen=True)
class EmbeddedStatus:
    """What there is of the embedded server. ``version`` is the data directory's major version (None: none made yet)."""

    running: bool
    pid: int | None
    version: str | None
    dsn: str | None
    data: Path


@dataclasses.dataclass(frozen=True)
class _Postmaster:
    """The first lines of postmaster.pid, as far as they are true of a living process."""

    pid: int
    ready: bool


def ensure_running(state: Path | str, *, settings: Mapping[str, str] | None = None, timeout: float = 60) -> str:
    """Finds the server of this state directory, or makes and starts it; returns its DSN (libpq URL).

    ``settings`` are added to the server's configuration when it is started here. Raises EmbeddedError, which says
    what to do.
    """
    home = _home(state)
    try:
        return _ensure_running(home, settings or {}, timeout)
    except OSError as exc:
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {exc}") from exc


def _ensure_running(home: Path, settings: Mapping[str, str], timeout: float) -> str:
    home.mkdir(mode=0o711, parents=True, exist_ok=True)
    if os.geteuid() == 0:
        home.chmod(0o711)  # the server's own uid has to pass through
    with _locked(home):
        uid = server_uid(home / "data")
        postmaster = _postmaster(home)
        if postmaster is None:
            check_reachable(home, uid)
            files = ServerFiles.find(home, uid)
            _check_version(home, files)
            if not (home / "data").exists():
                _make_cluster(home, files, uid)
            sockets = _socket_dir(home, uid)
            _write_configuration(home, sockets, settings)
            _start(home, files, uid, timeout)
        else:
            sockets = _recorded_socket_dir(home)
            _wait_ready(home, postmaster.pid, time.monotonic() + timeout)
    return _dsn(sockets)


def stop(state: Path | str, *, timeout: float = 60) -> bool:
    """Stops the server (a fast shutdown: sessions are ended, the data is flushed). False: it was not running."""
    home = _home(state)
    if not home.exists():
        return False
    with _locked(home):
        postmaster = _postmaster(home)
        if postmaster is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(postmaster.pid, signal.SIGINT)
        deadline = time.monotonic() + timeout
        while _postmaster(home) is not None:
            if time.monotonic() > deadline:
                raise EmbeddedError(f"the embedded PostgreSQL (pid {postmaster.pid}) did not stop within {timeout:g} s")
            time.sleep(0.02)
        return True


def status(state: Path | str) -> EmbeddedStatus:
    """Looks, changes nothing. ``running`` means that it accepts connections."""
    home = _home(state)
    data = home / "data"
    version = None
    with contextlib.suppress(OSError):
        version = (data / "PG_VERSION").read_text().strip()
    postmaster = _postmaster(home)
    if postmaster is None:
        return EmbeddedStatus(running=False, pid=None, version=version, dsn=None, data=data)
    dsn = _dsn(_recorded_socket_dir(home))
    return EmbeddedStatus(running=postmaster.ready, pid=postmaster.pid, version=version, dsn=dsn, data=data)


def _home(state: Path | str) -> Path:
    return Path(state).absolute() / "pg"


def _dsn(sockets: Path) -> str:
    return f"postgresql://{SUPERUSER}@/{DATABASE}?host={quote(str(sockets), safe='/')}&port={PORT}"


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    fd = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- the cluster -------------------------------------------------------------------------------------------------


def _check_version(home: Path, files: ServerFiles) -> None:
    try:
        found = (home / "data" / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        if (home / "data").exists():
            raise EmbeddedError(
                f"{home / 'data'} is not a PostgreSQL data directory (no PG_VERSION); move it away to begin anew"
            ) from None
        return
    if found != files.major:
        raise EmbeddedError(
            f"the data in {home / 'data'} is of PostgreSQL {found}, the installed server is {files.major}: "
            f"install the bsup that made it and dump it with pg_dump, or move it away to begin anew"
        )


def _make_cluster(home: Path, files: ServerFiles, uid: int) -> None:
    """Runs initdb in a directory beside, and renames it when all is in it: half a cluster is never taken for one."""
    for leftover in home.glob("init-*"):
        shutil.rmtree(leftover)
    who = installer(uid)
    new = Path(tempfile.mkdtemp(prefix="init-", dir=home))
    if who.user is not None:
        os.chown(new, who.user, -1)
    data = str(new / "data")
    initdb = [files.binary("initdb"), "-D", data, "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C"]
    _expect(run([*initdb, "--no-instructions", "--data-checksums"], who), "initdb")
    single = [files.binary("postgres"), "--single", "-D", data, "postgres"]
    _expect(run(single, who, stdin=f"CREATE DATABASE {DATABASE};\n"), "creating the database")
    if who.user is not None:
        give_tree(new / "data", uid)
        os.chown(new, 0, 0)
    (new / "data").rename(home / "data")
    shutil.rmtree(new)
    _fsync_directory(home)


def _expect(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode != 0:
        tail = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise EmbeddedError(f"the embedded PostgreSQL: {what} failed: " + " / ".join(tail))


def _socket_dir(home: Path, uid: int) -> Path:
    """The directory of the socket, made if need be: 0700, the server's own. In /tmp if its path would be too long."""
    plain = home / "s"
    if len(os.fsencode(plain)) <= LONGEST_SOCKET_DIR:
        plain.mkdir(mode=0o700, exist_ok=True)
        os.chown(plain, uid, -1, follow_symlinks=False)
        (home / "socket").unlink(missing_ok=True)
        return plain
    with contextlib.suppress(OSError):
        recorded = Path((home / "socket").read_text())
        found = recorded.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid and stat.S_IMODE(found.st_mode) == 0o700:
            return recorded
    made = Path(tempfile.mkdtemp(prefix="bsup-pg-", dir="/tmp"))
    os.chown(made, uid, -1)
    _replace(home / "socket", str(made))
    return made


def _recorded_socket_dir(home: Path) -> Path:
    try:
        return Path((home / "socket").read_text())
    except FileNotFoundError:
        return home / "s"


def _write_configuration(home: Path, sockets: Path, more: Mapping[str, str]) -> None:
    """Writes the files outside the data directory, so that they stay the caller's and follow the installed bsup."""
    values = {
        "data_directory": str(home / "data"),
        "hba_file": str(home / "pg_hba.conf"),
        "ident_file": str(home / "pg_ident.conf"),
        "unix_socket_directories": '"' + str(sockets).replace('"', '""') + '"',
        **SETTINGS,
        **more,
    }
    lines = ["# Written by bsup at each start of the embedded server; changes by hand are lost. Use ALTER SYSTEM."]
    for key, value in values.items():
        quoted = value.replace("\\", "\\\\").replace("'", "''")
        lines.append(f"{key} = '{quoted}'")
    _replace(home / "postgresql.conf", "\n".join(lines) + "\n", mode=0o644)
    _replace(home / "pg_ident.conf", "", mode=0o644)
    _replace(
        home / "pg_hba.conf", "# The socket's directory lets in whom it should.\nlocal all all trust\n", mode=0o644
    )


# --- the process -------------------------------------------------------------------------------------------------


def _start(home: Path, files: ServerFiles, uid: int, timeout: float) -> None:
    """Starts the server and waits until it is ready.

    After a kill -9 its old children may live for a moment; PostgreSQL refuses to start beside them, and is asked again.
    """
    deadline = time.monotonic() + timeout
    while True:
        _drop_stale_locks(home)
        pid = _launch(home, files, uid)
        try:
            return _wait_ready(home, pid, deadline)
        except EmbeddedError:
            if "is still in use" not in _log_tail(home) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _launch(home: Path, files: ServerFiles, uid: int) -> int:
    """Starts the server; returns its pid. ``sh`` puts it in the background and ends: init reaps it, not the caller."""
    log = home / "log"
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_LIMIT:
            log.replace(home / "log.1")
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    command = [files.binary("postgres"), "-c", _config_argument(home)]
    try:
        who = Identity.of(uid)
        started = subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >&2 & echo $!', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
            check=True,
            umask=0o077,
            user=who.user,
            group=who.group,
            extra_groups=who.extra_groups,
        )
        return int(started.stdout)
    finally:
        os.close(out)


def _wait_ready(home: Path, pid: int, deadline: float) -> None:
    """Waits until the server ``pid`` says in its pid file that it accepts connections: after recovery, that is."""
    while True:
        postmaster = _postmaster(home)
        if postmaster is not None and postmaster.ready:
            return
        if not _arguments(pid):
            raise EmbeddedError("the embedded PostgreSQL ended while starting; its log ends: " + _log_tail(home))
        if time.monotonic() > deadline:
            raise EmbeddedError(
                "the embedded PostgreSQL is not ready in time (a long recovery, perhaps: try again); its log ends: "
                + _log_tail(home)
            )
        time.sleep(0.02)


def _postmaster(home: Path) -> _Postmaster | None:
    """The living server of this data directory, or None. A pid is believed only if its process was started for it."""
    lines = _pid_file(home)
    if not lines or not lines[0].strip().isdigit():
        return None
    pid = int(lines[0])
    if not _is_postmaster(pid, home):
        return None
    return _Postmaster(pid=pid, ready=len(lines) > 7 and lines[7].strip() == "ready")


def _config_argument(home: Path) -> str:
    return f"config_file={home / 'postgresql.conf'}"


def _is_postmaster(pid: int, home: Path) -> bool:
    """Whether ``pid`` is the server that was started for ``home``, by its arguments.

    They can be read of any process; its working directory can't where root lacks CAP_SYS_PTRACE (most containers).
    """
    arguments = _arguments(pid)
    ours = os.fsencode(_config_argument(home)) in arguments
    return ours and os.path.basename(arguments[0]) == b"postgres"


def _arguments(pid: int) -> list[bytes]:
    """The command line of a living process; [] if it is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return []


def _pid_file(home: Path) -> list[str]:
    try:
        fd = os.open(home / "data" / "postmaster.pid", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return []
    with os.fdopen(fd, errors="replace") as file:
        return file.read(8192).split("\n")


def _drop_stale_locks(home: Path) -> None:
    """Removes the lock files of a dead server whose pid exists again, as another process or still as a zombie.

    Both are usual in containers, whose pids are few and whose init may not reap; PostgreSQL would refuse to start.
    Where the pid is gone the files are left: PostgreSQL looks for the old server's children by them. Callers hold the
    lock and know that no server lives.
    """
    lines = _pid_file(home)
    if lines and lines[0].strip().isdigit() and Path(f"/proc/{int(lines[0])}").exists():
        (home / "data" / "postmaster.pid").unlink(missing_ok=True)
        (_recorded_socket_dir(home) / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)


def _log_tail(home: Path) -> str:
    try:
        lines = (home / "log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return "(no log)"
    return " / ".join(lines[-3:])


def _replace(path: Path, text: str, mode: int = 0o600) -> None:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(fd, "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    os.replace(name, path)


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
