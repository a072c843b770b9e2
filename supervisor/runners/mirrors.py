"""The host's cache of git repositories, and how a commit is brought into one. Standard library only.

May import its neighbour ``git``. Called by ``checkout``, in the checkout's own process.

A mirror is a bare repository ``<sha256 of the URL>.git`` with all branches and tags; only what it lacks is fetched, and
a commit named by its full id that is there costs no network at all. Shallow checkouts of a repository that has no
mirror yet use ``<sha256>.shallow.git``, so that they don't pay for the whole history. Nothing is ever collected from a
mirror while it lives: a commit that was there stays there, even when its branch is gone.

One flock a mirror: exclusive to fetch or to remove it, shared to read. What a killed fetch leaves (git's own lock
files) is removed under the exclusive lock. The lock file's mtime is the mirror's last use: the longest unused go first
(``host_disk``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from supervisor.runners.git import CheckoutError, Git, GitFailed, explain_remote, says_no_commit

Say = Callable[[str], None]

ALL_OF_MIRROR = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
ALL_OF_CLONE = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")

_FULL_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_PLAIN_FETCH = ("fetch", "--quiet", "--no-tags", "--force", "--update-shallow", "--no-write-fetch-head")
_DAMAGED = re.compile(
    r"bad object|corrupt|not a git repository|unable to read|broken|missing (blob|tree|commit)|did not send all",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Wanted:
    """A commit of a repository, and how much of its history and content."""

    url: str
    commit: str
    depth: int | None = None
    filter: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a checkout takes its objects from: the mirror (it has ``commit`` already), or the repository itself."""

    url: str
    commit: str | None


@contextlib.contextmanager
def opened(git: Git, mirrors: Path | None, wanted: Wanted, say: Say, *, anew: bool = False) -> Iterator[Source]:
    """Brings the commit into the host's mirror and holds it there; without a mirror the source is the repository.

    Jobs that find their commit there share the mirror; only one that must fetch waits for the others. ``anew``: the
    mirror is known to be damaged, and made again.
    """
    mirror = _mirror_for(mirrors, wanted) if mirrors is not None else None
    if mirror is None:
        yield Source(wanted.url, None)
        return
    mirror.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _locked(mirror, fcntl.LOCK_SH, wanted, say)
    try:
        commit = None if anew or not mirror.exists() else _look_up(git, mirror, wanted, wanted.url).found
        if commit is None:
            os.close(lock)
            lock = -1
            lock = _locked(mirror, fcntl.LOCK_EX, wanted, say)
            if anew:
                shutil.rmtree(mirror, ignore_errors=True)
            commit = _updated(git, mirror, wanted, say)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield Source(f"file://{mirror}", commit)
    finally:
        if lock >= 0:
            os.close(lock)


def lock_of(mirror: Path) -> Path:
    return mirror.with_suffix(".lock")


def is_damaged(git: Git, source: Source, failure: GitFailed) -> bool:
    """Whether reading from a mirror failed because of the mirror."""
    mirror = Path(source.url.removeprefix("file://"))
    return _DAMAGED.search(failure.stderr) is not None or not _is_sound(git, mirror)


def _mirror_for(mirrors: Path, wanted: Wanted) -> Path | None:
    name = hashlib.sha256(wanted.url.encode()).hexdigest()
    whole = mirrors / f"{name}.git"
    if whole.exists() or (wanted.depth is None and wanted.filter is None):
        return whole
    # A partial mirror could serve only who wants the same part: such a checkout asks the repository itself.
    return mirrors / f"{name}.shallow.git" if wanted.filter is None else None


def _locked(mirror: Path, how: int, wanted: Wanted, say: Say) -> int:
    """The mirror's lock, held; a lock file that was removed while this waited for it holds nothing."""
    while True:
        lock = os.open(lock_of(mirror), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another job that uses the mirror of {wanted.url}")
            fcntl.flock(lock, how)
        if os.fstat(lock).st_nlink:
            os.utime(lock)
            return lock
        os.close(lock)


def _updated(git: Git, mirror: Path, wanted: Wanted, say: Say) -> str:
    if not mirror.name.endswith(".shallow.git"):
        wanted = Wanted(wanted.url, wanted.commit)
    existed = mirror.exists()
    for leftover in mirror.rglob("*.lock"):
        leftover.unlink(missing_ok=True)
    try:
        _initialised(git, mirror)
        return bring(git, mirror, wanted, wanted.url, ALL_OF_MIRROR, say)
    except (GitFailed, CheckoutError) as error:
        made_nothing = not existed and isinstance(error, CheckoutError)
        if not made_nothing and not (existed and _DAMAGED.search(str(error)) and not _is_sound(git, mirror)):
            raise
        shutil.rmtree(mirror, ignore_errors=True)
        if made_nothing:
            raise
    say("The mirror is damaged: making it anew")
    _initialised(git, mirror)
    return bring(git, mirror, wanted, wanted.url, ALL_OF_MIRROR, say)


def _initialised(git: Git, mirror: Path) -> None:
    mirror.mkdir(mode=0o700, exist_ok=True)
    git.run(mirror, "init", "--quiet", "--bare", ".")


def _is_sound(git: Git, mirror: Path) -> bool:
    return git.try_run(mirror, "fsck", "--connectivity-only", "--no-dangling", "--no-progress") is not None


def bring(git: Git, repository: Path, wanted: Wanted, remote: str, everything: tuple[str, ...], say: Say) -> str:
    """Fetches what ``repository`` lacks of the commit from ``remote``; returns the commit's full id.

    A full id that is there needs no network. One that the server doesn't give by id (many allow only tips of branches
    and tags) is looked for in ``everything``. Raises CheckoutError: what is wrong with the repository or the commit.
    """
    there = _look_up(git, repository, wanted, remote)
    if there.found:
        return there.found
    say(f"Fetching {wanted.url}" + (f" (depth {wanted.depth})" if wanted.depth else ""))
    part = _part(wanted)
    if part and there.wanted and _fetch_one(git, repository, wanted, remote, there.wanted, part):
        found = git.commit_id(repository, there.revision)
        if found:
            return found
    # Without its depth: the commit may be anywhere in the history.
    part = tuple(option for option in part if not option.startswith("--depth"))
    _fetch(git, repository, wanted, *part, "--prune", remote, *everything)
    found = git.commit_id(repository, there.revision)
    if found is None and there.wanted and _fetch_one(git, repository, wanted, remote, there.wanted, part):
        found = git.commit_id(repository, there.revision)
    if found is None:
        raise CheckoutError(f"{wanted.url}: commit {wanted.commit!r} is not found: no such branch, tag or commit")
    return found


@dataclass(frozen=True)
class _Lookup:
    """What is known of a commit before anything is fetched.

    ``revision``: what to resolve it by; ``found``: its full id, if it is there, deep enough; ``wanted``: the ref or id
    to ask the server for, None where only the whole history can tell (``main~2``, a short id).
    """

    revision: str
    found: str | None
    wanted: str | None


def _look_up(git: Git, repository: Path, wanted: Wanted, remote: str) -> _Lookup:
    base, suffix = _split(wanted.commit)
    ref: str | None = None
    commit: str | None = base
    if not _FULL_ID.fullmatch(base):
        ref, commit = _advertised(git, repository, wanted, base, remote)
    # What the server calls HEAD or a branch is asked of the server; what lies before it (`~2`) is git's to find here.
    revision = (commit or base) + suffix
    found = git.commit_id(repository, revision) if commit else None
    if found and not _deep_enough(git, repository, found, wanted.depth):
        found = None
    return _Lookup(revision, found, (ref or commit) if not suffix else None)


def _split(revision: str) -> tuple[str, str]:
    """A name and what follows it: ``main~2`` → ``main``, ``~2``."""
    end = min((at for at in (revision.find(mark) for mark in "~^@") if at > 0), default=len(revision))
    return revision[:end], revision[end:]


def _part(wanted: Wanted) -> tuple[str, ...]:
    depth = (f"--depth={wanted.depth}",) if wanted.depth else ()
    return (*depth, f"--filter={wanted.filter}") if wanted.filter else depth


def _advertised(git: Git, repository: Path, wanted: Wanted, name: str, remote: str) -> tuple[str | None, str | None]:
    """The full ref and commit that the server has under a branch's or tag's name; a tag goes first, as in git."""
    asked = [name] if name == "HEAD" or name.startswith("refs/") else [f"refs/tags/{name}", f"refs/heads/{name}"]
    patterns = [pattern for ref in asked for pattern in (ref, f"{ref}^{{}}")]
    try:
        answer = git.run(repository, "ls-remote", "--quiet", remote, *patterns)
    except GitFailed as error:
        raise explain_remote(error, wanted.url) from None
    found = {ref: commit for commit, _, ref in (line.partition("\t") for line in answer.splitlines())}
    for ref in asked:
        if ref in found:
            return ref, found.get(f"{ref}^{{}}", found[ref])
    return None, None


def _fetch(git: Git, repository: Path, wanted: Wanted, *args: str) -> None:
    try:
        git.run(repository, *_PLAIN_FETCH, *args)
    except GitFailed as error:
        raise explain_remote(error, wanted.url) from None


def _fetch_one(git: Git, repository: Path, wanted: Wanted, remote: str, what: str, part: tuple[str, ...]) -> bool:
    """Fetches a ref, or a commit by its id. False: the server has no such thing, or doesn't give it by id."""
    # Kept under one of 256 names of our own: what a later fetch says it has already, and no more refs than that.
    kept = f"refs/bsup/{hashlib.sha256(what.encode()).hexdigest()[:2]}"
    try:
        git.run(repository, *_PLAIN_FETCH, *part, remote, f"+{what}:{kept}")
    except GitFailed as error:
        if says_no_commit(error):
            return False
        raise explain_remote(error, wanted.url) from None
    return True


def _deep_enough(git: Git, repository: Path, commit: str, depth: int | None) -> bool:
    """Whether ``depth`` commits of history (None: all the repository has) are here, or all there are."""
    try:
        cut = set((repository / "shallow").read_text(encoding="ascii").split())
    except FileNotFoundError:
        return True
    if depth is None:
        return True
    parents = {
        line.split()[0]: line.split()[1:] for line in git.run(repository, "rev-list", "--parents", commit).splitlines()
    }
    front, seen = {commit}, {commit}
    for _ in range(depth - 1):
        if front & cut:
            return False
        front = {parent for known in front for parent in parents.get(known, ())} - seen
        seen |= front
    return True
