"""The named SQL statements of ``sql/*.sql``: each begins with ``-- name: …`` and a comment that says its purpose.

Used by the modules of this package, at import. A name is used once over all files.
"""

from __future__ import annotations

import re
from importlib import resources

import msgspec

_HEAD = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


class Statement(msgspec.Struct, frozen=True):
    """One statement: ``sql`` has neither a semicolon at its end nor the comment that says its purpose."""

    name: str
    purpose: str
    sql: str


def parse(text: str) -> list[Statement]:
    """The statements of a file. Raises ValueError where one has no purpose or no SQL."""
    parts = _HEAD.split(text)
    if parts[0].strip():
        raise ValueError("there is something before the first `-- name:`")
    found = []
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = body.strip().splitlines()
        head = lines[: _comment_lines(lines)]
        sql = "\n".join(lines[len(head) :]).strip().removesuffix(";")
        if not head or not sql:
            raise ValueError(f"statement {name} needs a line of purpose and its SQL")
        found.append(Statement(name, " ".join(line.removeprefix("--").strip() for line in head), sql))
    return found


def _comment_lines(lines: list[str]) -> int:
    return next((at for at, line in enumerate(lines) if not line.startswith("--")), len(lines))


def load() -> dict[str, Statement]:
    """All statements by name."""
    found: dict[str, Statement] = {}
    for file in sorted(resources.files(__package__).joinpath("sql").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".sql"):
            for statement in parse(file.read_text(encoding="utf-8")):
                if statement.name in found:
                    raise ValueError(f"statement {statement.name} is there twice")
                found[statement.name] = statement
    return found


STATEMENTS = load()
