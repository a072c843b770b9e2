"""What ``demo`` builds: bsup itself where it is run in a checkout, else a small repository that it makes. Called by
``demo``.
"""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from supervisor.cli.exits import CommandError

_PASSED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
_USER_AND_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")
_CONFIG_LINE = re.compile(r"(?:global|install|wheel|download)\.(?P<name>[\w-]+)=(?P<value>.*)", re.DOTALL)
_OF_USERS = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_LOG", "PIP_CACHE_DIR", "PIP_CONFIG_FILE"}
"""Where pip writes for the user who runs the demo: not for a job."""

_HELLO = "This file was written by bsup beside the checkout, before the first step.\n"


class Build(NamedTuple):
    """A job, how to call what it builds, and what to tell about the choice."""

    spec: dict[str, Any]
    title: str
    remarks: list[str]


def choose(state: Path, *, own_uids: bool) -> Build:
    """The build for where the demo was called."""
    python = find_python(own_uids)
    if python is None:
        raise CommandError("no Python 3.11 or newer with venv is here for the build's steps", "install python3-venv")
    root = checkout()
    if root is None:
        return _sample(state, python)
    commit = _git(root, "rev-parse", "HEAD").strip()
    remarks = []
    if _git(root, "status", "--porcelain", "--untracked-files=no").strip():
        remarks.append("the checkout has changes that are not committed: they are not part of the build")
    return Build(_own(root, commit, python), f"bsup itself, {root} at {commit[:12]}, with {python}", remarks)


def checkout() -> Path | None:
    """A checkout of bsup with a commit: the one around the current directory, else the one that this module is part
    of.
    """
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        try:
            root = Path(_git(start, "rev-parse", "--show-toplevel").strip())
            _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
            tracked = _git(root, "ls-tree", "--name-only", "HEAD", "pyproject.toml", "supervisor/__init__.py")
        except CommandError:
            continue
        if len(tracked.split()) == 2 and re.search(r'^name = "bsup"$', _git(root, "show", "HEAD:pyproject.toml"), re.M):
            return root
    return None


def uids_policy() -> tuple[str, str]:
    """The host's ``jobs.uids``, and a remark where jobs can't have uids of their own."""
    if os.geteuid() == 0 and find_python(own_uids=True) is None:
        return "off", "no Python here can be run by other users: the steps run as root, without uids of their own"
    return "auto", ""


def find_python(own_uids: bool) -> str | None:
    """An interpreter for the steps: this one if they may run it, else one of the system's; None: there is none.

    With uids of their own the jobs are other users, whom a Python below a home directory is closed to.
    """
    candidates = [getattr(sys, "_base_executable", None) or sys.executable]
    candidates += [
        f"{directory}/{name}"
        for directory in ("/usr/local/bin", "/usr/bin")
        for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
    ]
    for candidate in candidates:
        if Path(candidate).exists() and _fits(candidate, own_uids):
            return candidate
    return None


def _fits(python: str, own_uids: bool) -> bool:
    test = "import ensurepip, venv, sys; assert sys.version_info >= (3, 11); print(sys.base_prefix, ensurepip.__file__)"
    done = subprocess.run([python, "-I", "-c", test], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return False
    return not own_uids or all(_open_to_others(Path(path)) for path in (python, *done.stdout.split()))


def _open_to_others(path: Path) -> bool:
    real = path.resolve()
    return all(p.stat().st_mode & stat.S_IXOTH for p in real.parents) and bool(real.stat().st_mode & stat.S_IROTH)


def _own(root: Path, commit: str, python: str) -> dict[str, Any]:
    """bsup's own wheel, and its unit tests run on it."""
    env, secrets = surroundings(os.environ, _pip_config())
    venv = '"$HOME/venv/bin/'
    steps: list[dict[str, Any]] = [
        {"name": "hello", "run": "cat demo/hello.txt\nid\nuname -srm\n$PYTHON --version"},
        {
            "name": "wheel",
            "run": f'$PYTHON -m venv "$HOME/venv"\n{venv}pip" wheel --quiet --no-deps --wheel-dir dist .\nls -l dist',
            "timeout": "10m",
        },
        {
            "name": "install",
            "run": f'{venv}pip" install -qq dist/*.whl pytest hypothesis\n{venv}bsup" version 2>/dev/null',
            "timeout": "10m",
        },
        {"name": "test", "run": f'{venv}pytest" -q -p no:cacheprovider tests/model', "timeout": "15m"},
        {"name": "cleanup", "run": 'rm -rf "$HOME/venv" dist\necho removed what was built', "always": True},
    ]
    for step in steps:
        step["run"] = f"set -e\n{step['run']}"
        step["env"] = {"PYTHON": python, **env}
    return {
        "kind": "steps",
        "name": "bsup",
        "repository": {"url": str(root), "commit": commit},
        "files": {"demo/hello.txt": _HELLO},
        "steps": steps,
        "timeout": "30m",
        **({"secrets": secrets} if secrets else {}),
    }


def surroundings(environ: Mapping[str, str], pip_config: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """How pip in a job reaches the index that pip here does: plain variables, and those with a password, as secrets."""
    env = {name: value for name, value in environ.items() if name.startswith("PIP_") and name not in _OF_USERS}
    env |= {name: value for name, value in environ.items() if name.upper() in _PASSED}
    env = {**{name: value for name, value in pip_config.items() if name not in _OF_USERS}, **env}
    env = {name: value for name, value in env.items() if value}
    secrets = {name: value for name, value in env.items() if _USER_AND_PASSWORD.search(value)}
    return {name: value for name, value in env.items() if name not in secrets}, secrets


def _pip_config() -> dict[str, str]:
    """pip's configuration files as variables, as a job's user can't read the files of this one."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    return dict(_pip_variables(done.stdout)) if done.returncode == 0 else {}


def _pip_variables(listing: str) -> Iterator[tuple[str, str]]:
    for line in listing.splitlines():
        match = _CONFIG_LINE.fullmatch(line)
        if match is None:
            continue
        try:
            value = str(ast.literal_eval(match["value"]))
        except (SyntaxError, ValueError):
            continue
        yield f"PIP_{match['name'].upper().replace('-', '_')}", " ".join(value.split())


def _sample(state: Path, python: str) -> Build:
    """A repository with a package and its tests, made anew; needs nothing from any index."""
    root = state / "sample"
    files = {
        "greeting/__init__.py": 'def greet(name: str) -> str:\n    return f"hello, {name}"\n',
        "greeting/__main__.py": "import sys\n\nfrom greeting import greet\n\nprint(greet(sys.argv[1]))\n",
        "tests/__init__.py": "",
        "tests/test_greeting.py": (
            "import unittest\n\nfrom greeting import greet\n\n\nclass TestGreeting(unittest.TestCase):\n"
            "    def test_it_names_whom_it_greets(self) -> None:\n"
            '        self.assertEqual(greet("bsup"), "hello, bsup")\n'
        ),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    _git(root, "init", "--quiet")
    _git(root, "add", "-A")
    _git(root, "-c", "user.name=bsup demo", "-c", "user.email=demo@localhost", "commit", "--quiet", "-m", "A greeting")
    commit = _git(root, "rev-parse", "HEAD").strip()
    steps: list[dict[str, Any]] = [
        {"name": "hello", "run": "cat demo/hello.txt\nid\nuname -srm\n$PYTHON --version"},
        {
            "name": "build",
            "run": "$PYTHON -m compileall -q greeting\ntar -czf greeting.tar.gz greeting\nls -l greeting.tar.gz",
        },
        {"name": "test", "run": "$PYTHON -m unittest discover -v -s tests -t ."},
        {"name": "cleanup", "run": "rm -f greeting.tar.gz\necho removed what was built", "always": True},
    ]
    for step in steps:
        step["run"] = f"set -e\n{step['run']}"
        step["env"] = {"PYTHON": python}
    spec = {
        "kind": "steps",
        "name": "greeting",
        "repository": {"url": str(root), "commit": commit},
        "files": {"demo/hello.txt": _HELLO},
        "steps": steps,
    }
    return Build(
        spec, f"a sample repository at {commit[:12]}", ["no checkout of bsup is here: a sample is built instead"]
    )


def _git(where: Path, *words: str) -> str:
    """What git says. Raises CommandError."""
    try:
        done = subprocess.run(
            # The checkout may belong to another user than the one (root, say) who runs the demo; it is only read.
            ["git", "-c", "safe.directory=*", "-C", str(where), *words],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise CommandError(f"git can't be run: {error.strerror}", "install git") from None
    if done.returncode != 0:
        raise CommandError(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout
