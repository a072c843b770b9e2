"""The embedded server: made once, found again, stopped, and never taken for what it is not."""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

import supervisor
from supervisor.store import embedded, server_files
from supervisor.store.server_files import EmbeddedError

pytestmark = pytest.mark.anyio

FAST = {"fsync": "off"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def state(short_tmp: Path) -> Iterator[Path]:
    """A state directory; its server is stopped afterwards."""
    yield short_tmp
    embedded.stop(short_tmp)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory with a stopped server, to be copied: initdb is the slow part."""
    path = Path("/tmp") / f"bsup-cluster-{os.getpid()}"
    path.mkdir(mode=0o711)
    embedded.ensure_running(path, settings=FAST)
    embedded.stop(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def copied(cluster: Path, state: Path) -> Path:
    copy_cluster(cluster, state)
    return state


def copy_cluster(cluster: Path, state: Path) -> None:
    subprocess.run(["cp", "-a", str(cluster / "pg"), str(state / "pg")], check=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def kill_and_wait(pid: int) -> None:
    """kill -9, and wait for the end: a signal is only sent when kill returns."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 30)
    finally:
        os.close(pidfd)


async def fetch(dsn: str, query: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_it_is_made_started_found_again_and_stopped(state: Path) -> None:
    """A second call finds the server that the first one started, and gives the same DSN."""
    assert not embedded.status(state).running
    dsn = embedded.ensure_running(state, settings=FAST)
    first = embedded.status(state)
    assert first.running
    assert first.dsn == dsn
    assert embedded.ensure_running(state) == dsn
    assert embedded.status(state).pid == first.pid
    assert await fetch(dsn, "SELECT current_database()") == "bsup"
    assert embedded.stop(state)
    assert not embedded.stop(state)
    after = embedded.status(state)
    assert not after.running
    assert after.version == first.version
    with pytest.raises(OSError):
        await fetch(dsn, "SELECT 1")


async def test_it_listens_on_no_network_and_only_to_who_may_enter(copied: Path) -> None:
    """The socket's directory is the only way in, and it is 0700; so is the data."""
    dsn = embedded.ensure_running(copied)
    assert await fetch(dsn, "SHOW listen_addresses") == ""
    assert await fetch(dsn, "SHOW fsync") == "on"
    for name in ("s", "data"):
        assert mode(copied / "pg" / name) == 0o700


def test_it_outlives_the_process_that_started_it(copied: Path) -> None:
    """It is nobody's child, in a session of its own: neither a death nor a signal to its starter's group reaches it."""
    code = (
        f"from supervisor.store import embedded; embedded.ensure_running({str(copied)!r}); import os; os.killpg(0, 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], start_new_session=True, cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    found = embedded.status(copied)
    assert found.running
    assert found.pid is not None
    assert os.getsid(found.pid) != os.getsid(0)
    embedded.ensure_running(copied)
    assert embedded.status(copied).pid == found.pid


async def test_what_was_committed_is_there_after_a_crash_of_the_server(copied: Path) -> None:
    """kill -9 of the postmaster: the next start recovers, in spite of the pid file that stayed."""
    dsn = embedded.ensure_running(copied)
    await fetch(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    pid = embedded.status(copied).pid
    assert pid is not None
    kill_and_wait(pid)
    dsn = embedded.ensure_running(copied)
    assert embedded.status(copied).pid != pid
    assert await fetch(dsn, "SELECT answer FROM kept") == 42


def test_a_pid_file_that_names_another_process_is_stale(copied: Path) -> None:
    """A pid lives again as another process of the same user after a reboot, in a container above all."""
    bystander = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    try:
        pid_file = copied / "pg" / "data" / "postmaster.pid"
        pid_file.write_text(f"{bystander.pid}\n{copied}/pg/data\n1\n5432\n{copied}/pg/s\n\n1 1\nready   \n")
        assert not embedded.status(copied).running
        assert not embedded.stop(copied)
        embedded.ensure_running(copied)
        assert embedded.status(copied).pid != bystander.pid
        assert bystander.poll() is None
    finally:
        bystander.communicate()


def test_a_half_made_cluster_is_thrown_away(state: Path) -> None:
    """initdb works beside and is renamed at the end: what a crash left is not taken for a cluster, and goes."""
    half = state / "pg" / "init-abc" / "data"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    embedded.ensure_running(state, settings=FAST)
    assert list((state / "pg").glob("init-*")) == []


def test_data_of_another_version_is_refused_and_left_alone(copied: Path) -> None:
    version = copied / "pg" / "data" / "PG_VERSION"
    version.write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"of PostgreSQL 12.*pg_dump"):
        embedded.ensure_running(copied)
    assert version.read_text() == "12\n"


def test_a_directory_that_is_no_cluster_is_refused_and_left_alone(state: Path) -> None:
    data = state / "pg" / "data"
    data.mkdir(parents=True)
    (data / "thesis.txt").write_text("ten years")
    if os.geteuid() == 0:
        os.chown(data, server_files.SERVER_UID, -1)
    with pytest.raises(EmbeddedError, match="not a PostgreSQL data directory"):
        embedded.ensure_running(state)
    assert (data / "thesis.txt").read_text() == "ten years"


async def test_a_state_directory_with_a_long_path(cluster: Path, short_tmp: Path) -> None:
    """A socket's path holds 107 bytes. Beyond, it goes to a private directory in /tmp, found again by a later start."""
    state = short_tmp / ("x" * 120) / "and spaces 'quotes'"
    state.mkdir(parents=True)
    copy_cluster(cluster, state)
    dsn = embedded.ensure_running(state)
    try:
        assert await fetch(dsn, "SELECT 1") == 1
        sockets = Path((state / "pg" / "socket").read_text())
        assert mode(sockets) == 0o700
        assert embedded.status(state).dsn == dsn
        embedded.stop(state)
        assert embedded.ensure_running(state) == dsn
    finally:
        embedded.stop(state)
    shutil.rmtree(sockets)
    assert embedded.ensure_running(state) != dsn
    embedded.stop(state)
    shutil.rmtree((state / "pg" / "socket").read_text())


def test_a_server_that_cannot_start_says_why(copied: Path) -> None:
    with pytest.raises(EmbeddedError, match="no_such_setting"):
        embedded.ensure_running(copied, settings={"no_such_setting": "1"})
    assert embedded.ensure_running(copied).startswith("postgresql://")


@pytest.mark.root
class TestAsRoot:
    """PostgreSQL refuses to run as root: it gets a uid of its own, of no account, and files it can read."""

    def test_it_runs_under_a_uid_of_its_own(self, copied: Path) -> None:
        embedded.ensure_running(copied)
        pid = embedded.status(copied).pid
        assert Path(f"/proc/{pid}").stat().st_uid == server_files.SERVER_UID
        assert (copied / "pg").stat().st_uid == 0
        assert (copied / "pg" / "data").stat().st_uid == server_files.SERVER_UID

    def test_binaries_out_of_its_reach_are_copied(
        self, copied: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A virtual environment under /root, say."""
        installed = server_files.ServerFiles.find(copied / "pg", 0).root
        hidden = short_tmp / "hidden"
        hidden.mkdir(mode=0o700)
        shutil.copytree(
            installed, hidden / "pginstall18", symlinks=True, ignore=shutil.ignore_patterns("include", "*.bc")
        )
        monkeypatch.setattr(server_files, "_installed", lambda: hidden / "pginstall18")
        embedded.ensure_running(copied)
        copies = list((copied / "pg").glob("dist-*"))
        assert len(copies) == 1
        pid = embedded.status(copied).pid
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(os.fsencode(copies[0]))

    def test_a_state_directory_out_of_its_reach_is_named(self, short_tmp: Path) -> None:
        closed = short_tmp / "closed"
        closed.mkdir(mode=0o700)
        with pytest.raises(EmbeddedError, match=rf"can't pass through {closed}.*chmod o\+x"):
            embedded.ensure_running(closed / "state")

    def test_data_of_root_is_refused(self, state: Path) -> None:
        (state / "pg" / "data").mkdir(parents=True)
        with pytest.raises(EmbeddedError, match="belongs to root"):
            embedded.ensure_running(state)

    def test_an_unprivileged_user_runs_it_as_himself(self, short_tmp: Path) -> None:
        """And has no other uid to fear, nor files to give away."""
        mine = short_tmp / "mine"
        mine.mkdir()
        os.chown(mine, 65534, 65534)
        code = (
            "import sys; from supervisor.store import embedded; state = sys.argv[1];"
            "embedded.ensure_running(state); print(embedded.status(state).running); embedded.stop(state)"
        )
        source = Path(supervisor.__file__).parents[1]
        # The interpreter of a virtual environment may lie where nobody can't go; the code needs no package but its own.
        pythons = [p for p in (Path(sys.executable).resolve(), Path("/usr/bin/python3")) if _can_run(65534, p)]
        if not pythons or not _can_run(65534, Path("/bin/sh"), source):
            pytest.skip("nobody can't reach an interpreter, or this source")
        path = os.pathsep.join([str(source), *[p for p in sys.path if p.endswith("site-packages")]])
        done = subprocess.run(
            [str(pythons[0]), "-c", code, str(mine)],
            env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
        assert done.stdout == "True\n", done.stderr


def _can_run(uid: int, program: Path, directory: Path = Path("/")) -> bool:
    probe = ["/bin/sh", "-c", 'cd "$2" && test -x "$1"', "sh", str(program), str(directory)]
    return subprocess.run(probe, user=uid, group=uid, cwd="/", stderr=subprocess.DEVNULL).returncode == 0
