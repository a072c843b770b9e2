"""Faults planted in what a test runs, never in the product: one rule of the lease switched off at a time.

- In a daemon: a ``sitecustomize`` on its path, which patches it before it begins.
- In a shepherd: the daemon is made to start an edited copy of it.
- In the database: an edited function.

Each edit must find what it edits: where the product changes, the test that plants fails, and not silently.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from world import World

import supervisor

_SOURCE = Path(supervisor.__file__).parent


@dataclass(frozen=True)
class Plant:
    """``daemon``: Python that patches it. ``shepherd``: (file, what, by what). ``sql``: (function, what, by what)."""

    daemon: str = ""
    shepherd: tuple[tuple[str, str, str], ...] = ()
    sql: tuple[tuple[str, str, str], ...] = ()


NOTHING = Plant()


def plant(world: World, *plants: Plant) -> dict[str, str]:
    """Edits the database, and returns the environment of daemons that are to be planted."""
    program = "\n".join(each.daemon for each in plants if each.daemon)
    edits = [edit for each in plants for edit in each.shepherd]
    for each in plants:
        for function, what, by in each.sql:
            _edit_function(world, function, what, by)
    if edits:
        program += (
            f"\nimport supervisor.runners.shepherd_client as c\nc._SHEPHERD = {_edited_shepherd(world, edits)!r}\n"
        )
    if not program:
        return {}
    folder = world.root / "planted"
    folder.mkdir(exist_ok=True)
    # Where it does not work out, no test shall take it for a rule that was not needed.
    body = "\n".join(f"    {line}" for line in program.splitlines())
    failed = "    import os, traceback\n    traceback.print_exc()\n    os._exit(99)\n"
    (folder / "sitecustomize.py").write_text(f"try:\n{body}\nexcept BaseException:\n{failed}")
    return {"PYTHONPATH": str(folder)}


def _edited_shepherd(world: World, edits: list[tuple[str, str, str]]) -> str:
    """A copy of it, in a package of its own, as it finds its modules from where it is."""
    package = world.root / "edited" / "supervisor"
    shutil.copytree(_SOURCE / "shepherd", package / "shepherd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_SOURCE / "__init__.py", package)
    for name, what, by in edits:
        file = package / "shepherd" / name
        file.write_text(_replaced(file.read_text(), what, by))
    return str(package / "shepherd")


def _edit_function(world: World, function: str, what: str, by: str) -> None:
    [(definition,)] = world.query("SELECT pg_get_functiondef($1::regproc)", function)
    world.query(_replaced(definition, what, by))


def _replaced(text: str, what: str, by: str) -> str:
    assert what in text, f"{what!r} is not there: what is planted no longer fits the product"
    return text.replace(what, by)
