"""PostgreSQL and PgBouncer of a test's own, which it may kill: Debian's, run as its user ``postgres``.

    with Server() as server:                              # its schema is there already
        server.kill()                                     # kill -9 of all its processes
        server.start()

    with Server("a", prefix=network.prefix, address="127.0.0.1", port=5433) as primary:
        standby = primary.standby("b", port=5434, prefix=network.prefix, address="127.0.0.1")   # streams from it
        standby.promote()

``dsn`` leads through a Unix socket, ``tcp(address)`` through the network. fsync is off: what is killed here are
processes, and the machine's memory keeps what they wrote.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType

from harness import alive, until
from network import run

from supervisor.store.migrate import ensure_schema

BIN = Path("/usr/lib/postgresql/15/bin")
BOUNCER = "/usr/sbin/pgbouncer"
USER = "postgres"
DATABASE = "bsup"
AS_POSTGRES = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--")

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "wal_keep_size": "256MB",
    "log_line_prefix": "%m [%p] %a ",
    "unix_socket_permissions": "0777",
}
_TRUST = "local all all trust\nhost all all all trust\nlocal replication all trust\nhost replication all all trust\n"


def has_server() -> bool:
    return (BIN / "postgres").exists() and _user() is not None


def has_bouncer() -> bool:
    return Path(BOUNCER).exists() and _user() is not None


def _user() -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(USER)
    return None


class Process:
    """Something that runs as ``postgres`` below ``root``, and is started and killed at will."""

    def __init__(self, root: Path, name: str, prefix: tuple[str, ...]) -> None:
        self.home = root / name
        self.home.mkdir(mode=0o755)
        give(self.home)
        self.prefix = prefix
        self._log = self.home / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self, *command: str) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.prefix, *AS_POSTGRES, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int, deadline: float = 30.0) -> None:
        """Sends it and waits until it has ended; nothing to do where it has."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(number)
            self._process.wait(deadline)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def tail(self) -> str:
        return self.log[-3000:]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            print(f"--- {self.home.name}\n{self.tail()}")  # shown by pytest where the test failed
        self.kill()


class Server(Process):
    """A cluster with bsup's schema in the database ``bsup``. Left, it and its standbys are killed and removed."""

    def __init__(
        self,
        name: str = "pg",
        *,
        beside: Server | None = None,
        prefix: tuple[str, ...] = (),
        address: str = "",
        port: int = 5432,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bsup-pg-", dir="/var/tmp")) if beside is None else beside.root
        self.root.chmod(0o755)
        super().__init__(self.root, name, prefix)
        self.address = address
        self.port = port
        self._settings = {**_SETTINGS, **(settings or {})}
        self._standbys: list[Server] = []
        subprocess.run(["cp", "-a", str(template()), str(self.home / "data")], check=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for standby in self._standbys:
            standby.__exit__(kind, error, at)
        super().__exit__(kind, error, at)
        shutil.rmtree(self.home, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()

    @property
    def dsn(self) -> str:
        return f"postgresql://{USER}@/{DATABASE}?host={self.home}&port={self.port}"

    def tcp(self, address: str) -> str:
        return f"postgresql://{USER}@{address}:{self.port}/{DATABASE}"

    def start(self) -> None:
        told = {
            **self._settings,
            "port": str(self.port),
            "listen_addresses": self.address,
            "unix_socket_directories": str(self.home),
        }
        words = [word for key, value in told.items() for word in ("-c", f"{key}={value}")]
        self.spawn(str(BIN / "postgres"), "-D", str(self.home / "data"), *words)
        self.until_ready()

    def until_ready(self) -> None:
        def is_ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"PostgreSQL ended {self._process.returncode}:\n{self.tail()}")
            asked = [str(BIN / "pg_isready"), "-q", "-h", str(self.home), "-p", str(self.port), "-U", USER]
            return subprocess.run(asked).returncode == 0

        until(is_ready, f"PostgreSQL {self.home.name} is ready\n{self.tail()}")

    def query(self, statement: str) -> list[str]:
        """As the superuser: a line for each row."""
        asked = [str(BIN / "psql"), "-h", str(self.home), "-p", str(self.port), "-U", USER, "-d", DATABASE]
        return run(*asked, "-XAtqc", statement).splitlines()

    def backends(self, application: str, *, listening: bool | None = None) -> list[tuple[int, int]]:
        """(pid, client's port) of its connections; ``listening``: only those that (don't) LISTEN."""
        rows = self.query(
            "SELECT pid, client_port, query ILIKE 'LISTEN%' OR query ILIKE '%pg_listening_channels%'"
            f" FROM pg_stat_activity WHERE application_name = '{application}' AND backend_type = 'client backend'"
        )
        found = [row.split("|") for row in rows]
        return [(int(pid), int(port)) for pid, port, is_ear in found if listening in (None, is_ear == "t")]

    def stop_immediately(self) -> None:
        """As in a crash: no checkpoint, no word to the clients."""
        self.signal(signal.SIGQUIT)

    def kill(self) -> None:
        """kill -9 of the postmaster and of every process of it."""
        if self._process is None or self._process.poll() is not None:
            return
        pids = children(self._process.pid)
        super().kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(alive, pids)), "PostgreSQL's processes are gone", 30)

    def standby(self, name: str, *, port: int, prefix: tuple[str, ...], address: str) -> Server:
        """A copy that streams from this one, started. This one must never have been started before it was copied, or
        still have all that it wrote since (``wal_keep_size``)."""
        other = Server(name, beside=self, prefix=prefix, address=address, port=port)
        (other.home / "data" / "standby.signal").touch()
        give(other.home / "data" / "standby.signal")
        other._settings["primary_conninfo"] = f"host={self.home} port={self.port} user={USER} application_name={name}"
        self._standbys.append(other)
        other.start()
        until(
            lambda: self.query(
                f"SELECT pid FROM pg_stat_replication WHERE application_name = '{name}' AND state = 'streaming'"
            ),
            f"{name} streams",
        )
        return other

    def promote(self) -> None:
        """Returns when it takes writes."""
        self.query("SELECT pg_promote()")


class Bouncer(Process):
    """PgBouncer in transaction mode before a server, with fewer connections than its clients have. ``ignoring``:
    settings of clients that it takes and forgets."""

    PORT = 6432

    def __init__(self, server: Server, *, connections: int = 3, ignoring: str = "") -> None:
        super().__init__(server.root, "bouncer", server.prefix)
        self._ini = self.home / "pgbouncer.ini"
        self._ini.write_text(
            f"[databases]\n* = host={server.home} port={server.port} user={USER}\n"
            f"[pgbouncer]\npool_mode = transaction\nauth_type = any\nlisten_port = {self.PORT}\n"
            f"unix_socket_dir = {self.home}\nlogfile = {self.home / 'bouncer.log'}\n"
            f"max_client_conn = 200\ndefault_pool_size = {connections}\n"
            f"ignore_startup_parameters = {ignoring}\n"
        )

    def __enter__(self) -> Bouncer:
        self.start()
        return self

    @property
    def dsn(self) -> str:
        return f"postgresql://{USER}@/{DATABASE}?host={self.home}&port={self.PORT}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        shutil.rmtree(self.home, ignore_errors=True)

    def start(self) -> None:
        self.spawn(BOUNCER, str(self._ini))
        socket = self.home / f".s.PGSQL.{self.PORT}"
        until(lambda: socket.exists() or self._has_ended(), f"PgBouncer is ready\n{self.tail()}")

    def _has_ended(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"PgBouncer ended {self._process.returncode}:\n{self.tail()}")
        return False


@cache
def template() -> Path:
    """A cluster with the schema, shut down, to copy others from: made once in each process."""
    root = Path(tempfile.mkdtemp(prefix="bsup-pg-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    root.chmod(0o755)
    data = root / "made" / "data"
    maker = Process(root, "made", ())
    run(*AS_POSTGRES, str(BIN / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
    (data / "pg_hba.conf").write_text(_TRUST)
    settings = ["-c", "fsync=off", "-c", "listen_addresses=", "-c", f"unix_socket_directories={maker.home}"]
    maker.spawn(str(BIN / "postgres"), "-D", str(data), *settings)
    asked = ["-h", str(maker.home), "-U", USER]
    try:
        until(lambda: subprocess.run([str(BIN / "pg_isready"), "-q", *asked]).returncode == 0, "the first one is ready")
        run(str(BIN / "createdb"), *asked, DATABASE)
        dsn = f"postgresql://{USER}@/{DATABASE}?host={maker.home}"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: asyncio.run(ensure_schema(dsn, True))).result()
    finally:
        maker.signal(signal.SIGINT)
    return data


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def give(path: Path) -> None:
    found = _user()
    assert found is not None
    os.chown(path, found.pw_uid, found.pw_gid)
