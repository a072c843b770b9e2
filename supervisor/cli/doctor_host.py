"""The checks of ``doctor`` on this host: docker, git, cgroups, isolation, disk, clock, journald."""

from __future__ import annotations

import ctypes
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from supervisor.cli.findings import Finding, Level
from supervisor.model.settings import Settings
from supervisor.model.units import format_size

OLDEST_GIT = (2, 32)
"""The first with GIT_CONFIG_GLOBAL, by which a checkout keeps the host's own configuration out."""
LITTLE_DISK, LOW_DISK = 1 << 30, 10 << 30
"""Bytes free below which jobs fail soon, and below which somebody should look."""
LOW_INODES = 0.05
_STA_UNSYNC = 0x40


def docker(settings: Settings) -> list[Finding]:
    """Is there an engine? No step needs one yet: absent is fine."""
    path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    without = "steps run as processes and need no engine"
    if not Path(path).exists():
        cli = "the docker command is here, but no engine" if shutil.which("docker") else "no engine here"
        return [Finding("docker", Level.OK, f"{cli} ({path} is not there): {without}")]
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(3)
            sock.connect(path)
            sock.sendall(b"GET /version HTTP/1.0\r\nHost: docker\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
    except OSError as error:
        mend = "add the daemon's user to the group docker" if isinstance(error, PermissionError) else "start dockerd"
        return [Finding("docker", Level.WARN, f"{path} does not answer: {error.strerror or error}", mend)]
    version = re.search(rb'"Version":"([^"]+)"', answer)
    return [Finding("docker", Level.OK, f"Docker {version[1].decode() if version else '(unknown)'} answers on {path}")]


def git(settings: Settings) -> list[Finding]:
    path = shutil.which("git")
    if path is None:
        return [Finding("git", Level.FAIL, "git is not installed: no repository can be checked out", "install git")]
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10)
    found = re.search(r"(\d+)\.(\d+)(\.\d+)?", done.stdout)
    if found is None:
        return [Finding("git", Level.FAIL, f"{path} does not tell its version: {done.stderr.strip()}", "reinstall git")]
    if (int(found[1]), int(found[2])) < OLDEST_GIT:
        return [Finding("git", Level.FAIL, f"git {found[0]} is too old", "install git 2.32 or newer")]
    return [Finding("git", Level.OK, f"git {found[0]} ({path})")]


def cgroups(settings: Settings) -> list[Finding]:
    root = Path("/sys/fs/cgroup")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    v2 = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    instead = "processes of a job are found by uid, process group and environment instead"
    if not v2:
        return [
            Finding(
                "cgroups",
                Level.WARN,
                f"no cgroup v2 is mounted: {instead}",
                "boot with systemd.unified_cgroup_hierarchy=1",
            )
        ]
    mine = _own_cgroup(v2[0])
    where = mine if mine.is_dir() else v2[0]
    kind = "cgroup v2" if v2[0] == root else f"cgroup v1, with v2 at {v2[0]}"
    if not os.access(where / "cgroup.procs", os.W_OK):
        return [
            Finding(
                "cgroups",
                Level.WARN,
                f"{kind}, and {where} is not writable: {instead}",
                "run the daemon by its unit, with Delegate=yes",
            )
        ]
    if v2[0] != root:
        return [
            Finding(
                "cgroups",
                Level.WARN,
                f"{kind}: without controllers there",
                "boot with systemd.unified_cgroup_hierarchy=1 to have limits",
            )
        ]
    return [Finding("cgroups", Level.OK, f"{kind}, writable at {where}")]


def _own_cgroup(mount: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return mount / line[3:].lstrip("/")
    return mount


def isolation(settings: Settings) -> list[Finding]:
    """What holds jobs apart: uids of their own need root, and uids that nobody has."""
    jobs = settings.jobs
    if jobs.uids == "off":
        return [
            Finding(
                "isolation",
                Level.WARN,
                'jobs share one uid (jobs.uids = "off")',
                'set jobs.uids = "auto" and run as root',
            )
        ]
    if os.geteuid() != 0:
        return [
            Finding(
                "isolation",
                Level.WARN,
                "not root: all jobs run as this user, and can read and harm one another",
                "run the daemon by its unit, or as root",
            )
        ]
    taken = [entry for entry in pwd.getpwall() if jobs.uid_base <= entry.pw_uid < jobs.uid_base + jobs.uid_count]
    if taken:
        return [
            Finding(
                "isolation",
                Level.FAIL,
                f"uid {taken[0].pw_uid} of the jobs' range belongs to {taken[0].pw_name}",
                "set jobs.uid_base to a range that no account has",
            )
        ]
    closed = [parent for parent in Path(settings.state.dir).parents if parent.exists() and not _passable(parent)]
    if closed:
        return [
            Finding(
                "isolation",
                Level.FAIL,
                f"jobs' uids can't reach {settings.state.dir}: {closed[-1]} is closed to others",
                f'chmod o+x {closed[-1]}, move state.dir, or set jobs.uids = "off"',
            )
        ]
    last = jobs.uid_base + jobs.uid_count - 1
    return [Finding("isolation", Level.OK, f"each job gets a uid of its own, {jobs.uid_base}–{last}")]


def _passable(directory: Path) -> bool:
    return bool(directory.stat().st_mode & stat.S_IXOTH)


def disk(settings: Settings) -> list[Finding]:
    where = Path(settings.state.dir)
    while not where.exists():
        where = where.parent
    facts = os.statvfs(where)
    free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    found: list[Finding] = []
    text = f"{format_size(free)} of {format_size(total)} free below {settings.state.dir}"
    mend = "free some, move state.dir, or lower logs.keep_local"
    if free < LITTLE_DISK:
        found.append(Finding("disk", Level.FAIL, f"only {text}", mend))
    elif free < LOW_DISK:
        found.append(Finding("disk", Level.WARN, f"only {text}", mend))
    else:
        found.append(Finding("disk", Level.OK, text))
    if facts.f_files and facts.f_favail < LOW_INODES * facts.f_files:
        found.append(Finding("disk", Level.WARN, f"only {facts.f_favail:,} of {facts.f_files:,} inodes are free", mend))
    if not os.access(where, os.W_OK):
        found.append(
            Finding("disk", Level.FAIL, f"{where} is not writable for this user", "run it as the daemon's user")
        )
    return found


class _Timex(ctypes.Structure):
    """The head of ``struct timex`` (adjtimex(2)), and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock(settings: Settings) -> list[Finding]:
    """The kernel knows whether something disciplines its clock, whichever program does it."""
    timex = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        return [Finding("clock", Level.WARN, "the kernel does not tell whether the clock is synchronised")]
    if timex.status & _STA_UNSYNC:
        return [
            Finding(
                "clock",
                Level.WARN,
                "the clock is not synchronised; leases follow the database's, but times in logs will drift",
                "start systemd-timesyncd or chrony",
            )
        ]
    return [Finding("clock", Level.OK, f"synchronised, within {max(1, timex.maxerror // 1000)} ms")]


def journald(settings: Settings) -> list[Finding]:
    path = Path("/run/systemd/journal/socket")
    if path.is_socket():
        return [Finding("journald", Level.OK, f"{path} takes logs")]
    return [
        Finding(
            "journald",
            Level.WARN,
            "no journal here: the daemon's own log goes to standard error",
            "under systemd it is there; elsewhere keep standard error in a file",
        )
    ]
