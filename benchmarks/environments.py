"""The peers' own environments, below ``.build-cache/bench`` of the repository: made when first asked for, from pinned
lists, and kept until a list changes. ``Missing`` says why one can't be had here; the benchmarks then go on without it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
CACHE = Path(__file__).parent.parent / ".build-cache" / "bench"
# What a peer needs beyond Python 3.11.
PYTHON = {"oban": (3, 12)}


class Missing(Exception):
    """A contestant that can't take part."""


def python(peer: str) -> str:
    """The Python of a peer's environment."""
    requirements = PEERS / "requirements" / f"{peer}.txt"
    base = _interpreter(PYTHON.get(peer, (3, 11)))
    home = CACHE / f"{peer}-{_digest(base, requirements)}"
    if not (home / "made").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        print(f"    making the environment of {peer}", file=sys.stderr, flush=True)
        _run([base, "-m", "venv", str(home)])
        pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "-r", str(requirements)])
        (home / "made").touch()
    return str(home / "bin/python")


def node_path() -> str:
    """The directory of the modules that Node's peers need."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Missing("there is no node and npm on this machine")
    lists = [PEERS / "node" / name for name in ("package.json", "package-lock.json")]
    home = CACHE / f"node-{_digest('node', *lists)}"
    if not (home / "made").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        for name in lists:
            shutil.copy(name, home)
        print("    making the environment of Node's peers", file=sys.stderr, flush=True)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], home)
        (home / "made").touch()
    return str(home / "node_modules")


def _interpreter(least: tuple[int, int]) -> str:
    """A Python that is new enough: bsup's own, or one on the PATH or of pyenv's."""
    if sys.version_info >= least:
        return sys.executable
    for minor in range(20, least[1] - 1, -1):
        of_pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for found in (shutil.which(f"python3.{minor}"), *map(str, of_pyenv)):
            # pyenv puts programs on the PATH that only say which version to choose.
            if found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
                return found
    raise Missing(f"it needs Python {least[0]}.{least[1]} or newer, which is not on this machine")


def _digest(base: str, *files: Path) -> str:
    digest = hashlib.sha256(base.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _run(argv: list[str], directory: Path | None = None) -> None:
    done = subprocess.run(argv, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Missing(f"its environment can't be made here: {said[-1] if said else 'pip or npm failed'}")
