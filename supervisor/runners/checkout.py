"""bsup's own first step: brings a repository's commit and a job's files into the workspace.

A program of its own, ``python -I -m supervisor.runners.checkout PLAN``, run by the shepherd as the daemon's user before
the workspace is given to the job's. Standard library only, and light ``model`` modules: it must start fast.
Its neighbours: ``git`` (how git is run), ``mirrors`` (the host's cache), ``workspace_files``.

What it leaves in ``src`` is whole: no object borrowed from the mirror (which the job's user can't read), no credential,
``origin`` naming the repository's own URL. It says what it does in plain lines on stdout; if it fails, the last line on
stderr begins with ``error: ``, the file ``error`` beside the plan holds it too, and it ends 1 (the job asked for what
can't be had) or 2 (the host can't).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.model.errors import InvalidInput
from supervisor.model.urls import check_url, is_allowed, resolve_submodule_url
from supervisor.runners import mirrors
from supervisor.runners.git import CheckoutError, Credential, Git, GitFailed, explain_remote, last_line, printable
from supervisor.runners.mirrors import ALL_OF_CLONE, Wanted
from supervisor.runners.workspace_files import write_files

MAX_NESTING = 16


@dataclass(frozen=True)
class Plan:
    """What the runner asks for; the JSON of the plan file has these keys.

    ``repository`` has the keys of ``model.spec.RepositorySpec``. ``mirrors`` is the cache's directory, None for none.
    ``credentials``: url, username and either password or password_file; the first that fits is tried first.
    """

    src: str
    allow: tuple[str, ...] = ("*",)
    mirrors: str | None = None
    repository: dict[str, Any] | None = None
    files: dict[str, str] | None = None
    credentials: tuple[dict[str, str], ...] = ()

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> Plan:
        return cls(
            src=raw["src"],
            allow=tuple(raw["allow"]),
            mirrors=raw["mirrors"],
            repository=raw["repository"],
            files=raw["files"],
            credentials=tuple(raw["credentials"]),
        )


@dataclass(frozen=True)
class Submodule:
    name: str
    path: str
    url: str
    commit: str


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print("usage: python -I -m supervisor.runners.checkout PLAN", file=sys.stderr)
        return 2
    plan_file = Path(argv[0])
    # A branch, a path or a commit's subject may hold what the locale can't print: that must not end the checkout.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        raw = json.loads(plan_file.read_bytes())
        run(Plan.decode(raw), plan_file.parent / "git")
    except (CheckoutError, InvalidInput, GitFailed) as error:
        problem = f"git: {last_line(error.stderr)}" if isinstance(error, GitFailed) else str(error)
        return _fail(plan_file, problem, error.code if isinstance(error, CheckoutError) else 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _fail(plan_file, f"the checkout failed on this host: {error}", 2)
    return 0


def _fail(plan_file: Path, problem: str, code: int) -> int:
    line = printable(problem, 2000)
    plan_file.with_name("error").write_text(line, encoding="utf-8")
    print(f"error: {line}", file=sys.stderr)
    return code


def run(plan: Plan, scratch: Path) -> None:
    """Makes the checkout. ``scratch`` is made for it, holds its credentials, and is gone at the end, good or bad."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    try:
        if plan.repository is not None:
            git = Git(
                scratch,
                [_credential(raw) for raw in plan.credentials],
                # A server that is allowed must not send us on to one that isn't.
                follow_redirects="*" in plan.allow,
            )
            Checkout(git, plan).repository(plan.repository)
        if plan.files:
            write_files(plan.src, plan.files)
            print(f"Wrote {len(plan.files)} file{'' if len(plan.files) == 1 else 's'}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _credential(raw: dict[str, str]) -> Credential:
    password = raw.get("password")
    if password is None:
        try:
            password = Path(raw["password_file"]).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise CheckoutError(
                f"git.credentials: {raw['password_file']} can't be read: {error.strerror}", 2
            ) from error
    if not password.isprintable():
        raise CheckoutError("repository.credential: the secret holds a line break or another control character")
    return Credential(raw["url"], raw["username"], password)


class _MirrorDamaged(Exception):
    """What the mirror holds can't be read: it is to be made anew."""


class Checkout:
    """One checkout, submodules included."""

    def __init__(self, git: Git, plan: Plan) -> None:
        self._git = git
        self._src = Path(plan.src)
        self._allow = plan.allow
        self._mirrors = Path(plan.mirrors) if plan.mirrors else None

    def repository(self, repository: dict[str, Any]) -> None:
        wanted = Wanted(repository["url"], repository["commit"], repository.get("depth"), repository.get("filter"))
        self._clone(self._src, wanted, tuple(repository.get("sparse") or ()), "repository.url")
        subject = self._git.run(self._src, "log", "-1", "--no-show-signature", "--format=%h %s")
        short, _, text = subject.strip().partition(" ")
        print(f'Checked out {printable(short)} "{printable(text, 120)}"')
        submodules = repository.get("submodules")
        if submodules and self._submodules(self._src, wanted, submodules == "recursive", 1):
            # At the end and from the top: git moves every nested repository below .git/modules by itself.
            self._git.run(self._src, "submodule", "--quiet", "absorbgitdirs")

    def _clone(self, target: Path, wanted: Wanted, sparse: tuple[str, ...], field: str) -> None:
        check_url(wanted.url, field)
        if not is_allowed(wanted.url, self._allow):
            raise CheckoutError(
                f"{field}: {wanted.url} is not allowed on this host (git.allow: {', '.join(self._allow)})"
            )
        self._git.run(target, "init", "--quiet", ".")
        self._git.run(target, "remote", "add", "origin", wanted.url)
        try:
            self._fill(target, wanted, sparse)
        except _MirrorDamaged:
            print("The mirror is damaged: making it anew")
            self._fill(target, wanted, sparse, anew=True)
        self._git.run(target, "remote", "set-url", "origin", wanted.url)

    def _fill(self, target: Path, wanted: Wanted, sparse: tuple[str, ...], *, anew: bool = False) -> None:
        git = self._git
        with mirrors.opened(git, self._mirrors, wanted, print, anew=anew) as source:
            git.run(target, "remote", "set-url", "origin", source.url)
            if source.commit is None:
                commit = mirrors.bring(git, target, wanted, "origin", ALL_OF_CLONE, print)
            else:
                commit = source.commit
                try:
                    self._take_over(target, wanted, commit)
                except GitFailed as error:
                    if not anew and mirrors.is_damaged(git, source, error):
                        raise _MirrorDamaged from error
                    raise
            if sparse:
                feed = "".join(f"{path}\n" for path in sparse).encode()
                git.run(target, "sparse-checkout", "set", "--cone", "--stdin", feed=feed)
            try:
                git.run(target, "checkout", "--quiet", "--detach", commit, "--")
            except GitFailed as error:
                # A partial clone fetches what it lacks only now.
                raise explain_remote(error, wanted.url) if wanted.filter else error from None

    def _take_over(self, target: Path, wanted: Wanted, commit: str) -> None:
        """From the mirror: a copy, as the job's user must own its objects and can't read the mirror's."""
        part = [f"--depth={wanted.depth}"] if wanted.depth else []
        if wanted.filter:
            part.append(f"--filter={wanted.filter}")
        refs = () if wanted.depth else ALL_OF_CLONE
        self._git.run(
            target, "fetch", "--quiet", "--no-tags", "--force", "--update-shallow", *part, "origin", *refs, commit
        )

    def _submodules(self, parent: Path, wanted: Wanted, recursive: bool, nesting: int) -> int:
        """Checks out each submodule that the commit (and its sparse part) has; returns how many."""
        if nesting > MAX_NESTING:
            raise CheckoutError(f"{wanted.url}: submodules are nested deeper than {MAX_NESTING}")
        count = 0
        for submodule in self._listed(parent, wanted.url):
            field = f"submodule {printable(submodule.path)!r}"
            target = parent / submodule.path
            _require_real(parent, submodule.path, field)
            inner = Wanted(submodule.url, submodule.commit, wanted.depth, wanted.filter)
            self._clone(target, inner, (), field)
            self._git.run(parent, "config", f"submodule.{submodule.name}.url", submodule.url)
            self._git.run(parent, "config", f"submodule.{submodule.name}.active", "true")
            print(f"Checked out {submodule.commit[:7]} in {printable(str(target.relative_to(self._src)))}")
            count += 1
            if recursive:
                count += self._submodules(target, inner, True, nesting + 1)
        return count

    def _listed(self, parent: Path, url: str) -> Iterator[Submodule]:
        links = {}
        for entry in self._git.run(parent, "ls-files", "-z", "--stage", "-t").split("\0"):
            # "<tag> <mode> <id> <stage>\t<path>"; the tag S: outside the sparse part.
            head, _, path = entry.partition("\t")
            if path and head.split()[1] == "160000" and head.split()[0] != "S":
                links[path] = head.split()[2]
        if not links:
            return
        names, urls = self._gitmodules(parent)
        for path, commit in links.items():
            if path not in names or names[path] not in urls:
                raise CheckoutError(f"{url}: submodule {printable(path)!r} has no entry in .gitmodules")
            name = names[path]
            yield Submodule(name, path, resolve_submodule_url(urls[name], url), commit)

    def _gitmodules(self, parent: Path) -> tuple[dict[str, str], dict[str, str]]:
        """What the commit's ``.gitmodules`` says: path → name, name → URL."""
        listed = self._git.try_run(parent, "config", "--blob", "HEAD:.gitmodules", "-z", "--list") or ""
        names: dict[str, str] = {}
        urls: dict[str, str] = {}
        for entry in listed.split("\0"):
            key, _, value = entry.partition("\n")
            section, _, rest = key.partition(".")
            name, _, variable = rest.rpartition(".")
            # As git does: a name with `..` would be a path out of .git/modules.
            if section != "submodule" or not name or ".." in name.split("/"):
                continue
            if variable == "path":
                names[value] = name
            elif variable == "url":
                urls[name] = value
        return names, urls


def _require_real(parent: Path, path: str, field: str) -> None:
    """The submodule's directory as the checkout made it, reached through no symbolic link."""
    target = parent / path
    if os.path.realpath(target) != os.path.join(os.path.realpath(parent), path) or not target.is_dir():
        raise CheckoutError(f"{field}: leads through a symbolic link, or is no directory")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
