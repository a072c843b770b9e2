"""Repositories to check out, and the checkout run as the program it is. Used by this folder's tests only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GIT_ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(where: Path, *args: str, feed: bytes = b"") -> str:
    done = subprocess.run(
        ["git", "-C", str(where), "-c", "protocol.file.allow=always", *args],
        env=GIT_ENV,
        check=True,
        capture_output=True,
        input=feed,
    )
    return done.stdout.decode().strip()


@dataclass
class Result:
    code: int
    out: str
    err: str
    src: Path
    error: str | None

    def tree(self) -> set[str]:
        files = (path.relative_to(self.src) for path in self.src.rglob("*") if not path.is_dir())
        return {str(path) for path in files if ".git" not in path.parts}


@dataclass
class World:
    """Repositories to check out, and the program that does it."""

    root: Path
    runs: int = 0
    mirrors: bool = True
    environ: dict[str, str] = field(default_factory=dict)

    def repository(self, name: str = "origin", files: dict[str, str] | None = None) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        git(path, "init", "-q", "-b", "main", ".")
        self.commit(path, files or {"README": "hello\n", "lib/a.txt": "a\n", "doc/b.txt": "b\n"}, "first")
        return path

    def commit(self, path: Path, files: dict[str, str], message: str) -> str:
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        git(path, "add", "-A")
        git(path, "commit", "-q", "-m", message)
        return git(path, "rev-parse", "HEAD")

    def checkout(self, repository: dict[str, Any] | None = None, **plan: Any) -> Result:
        self.runs += 1
        src = self.root / f"work-{self.runs}" / "src"
        src.mkdir(parents=True)
        step = self.root / f"step-{self.runs}"
        step.mkdir()
        whole = {
            "src": str(src),
            "allow": ["*"],
            "mirrors": str(self.root / "mirrors") if self.mirrors else None,
            "repository": repository,
            "files": None,
            "credentials": [],
        } | plan
        (step / "plan.json").write_text(json.dumps(whole))
        done = subprocess.run(
            [sys.executable, "-S", "-s", "-P", "-m", "supervisor.runners.checkout", str(step / "plan.json")],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | self.environ,
            capture_output=True,
            text=True,
            cwd=src,
            check=False,
        )
        error = step / "error"
        assert not (step / "git").exists(), "the scratch directory with its credentials is left behind"
        return Result(done.returncode, done.stdout, done.stderr, src, error.read_text() if error.exists() else None)

    def good(self, repository: dict[str, Any] | None = None, **plan: Any) -> Result:
        result = self.checkout(repository, **plan)
        assert result.code == 0, result.err
        return result

    def bad(self, repository: dict[str, Any] | None = None, **plan: Any) -> str:
        """The one line of a checkout that must fail."""
        result = self.checkout(repository, **plan)
        last = result.err.splitlines()[-1]
        assert result.code == 1, result.err
        assert last == f"error: {result.error}"
        assert "Traceback" not in result.err
        return last


def with_submodules(world: World) -> Path:
    world.repository("inner", {"i": "inner\n"})
    middle = world.repository("middle", {"m": "middle\n"})
    git(middle, "submodule", "--quiet", "add", "../inner", "deps/inner")
    git(middle, "commit", "-q", "-m", "inner")
    outer = world.repository("outer", {"o": "outer\n"})
    git(outer, "submodule", "--quiet", "add", str(middle), "third party/middle")
    git(outer, "commit", "-q", "-m", "middle")
    return outer
