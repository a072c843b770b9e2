"""The spec of a job of an in-process kind: a function of the host's own, called with ``args``. No I/O.

May import msgspec and this floor. Called by ``spec``, which says what a canonical form is; ``decode_task`` by whatever
runs such a job. Which kinds there are only the database knows: here any well-formed name is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.model.spec_checks import (
    DEFAULT_ATTEMPTS,
    DEFAULT_BACKOFF,
    DEFAULT_PRIORITY,
    check_labels,
    check_names,
    check_ranges,
    check_redact,
    check_secrets,
    explain,
    known_only,
    read_units,
)

KIND_FORM = "lower-case letters, digits and _ . -, beginning with a letter, at most 64"

_KIND = re.compile(r"[a-z][a-z0-9_.-]{0,63}", re.ASCII)
_LARGEST = 1.7976931348623157e308


class _Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    kind: str
    name: str
    args: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    priority: int = DEFAULT_PRIORITY
    timeout: float | None = None
    attempts: int = DEFAULT_ATTEMPTS
    backoff: float = DEFAULT_BACKOFF
    cpu: float = 0.0
    memory: int = 0


class TaskSpec(_Common, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """As it is stored: ``secrets`` are names, the values come with the lease."""

    secrets: tuple[str, ...] = ()


class _AskedTask(_Common, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """As a user gives it."""

    secrets: dict[str, str] = {}
    redact: dict[str, str] = {}


_STORED = msgspec.json.Decoder(TaskSpec)


def check_kind(kind: str) -> None:
    """Raises InvalidInput for what can't be the name of a kind."""
    if not _KIND.fullmatch(kind):
        raise InvalidInput("kind", f"there is no kind {kind[:64]!r}", KIND_FORM)


def normalize_task(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical dict of a job of a kind other than ``steps``; ``raw`` holds only what JSON has. Raises
    InvalidInput."""
    job = dict(raw)
    check_kind(job["kind"])
    if "steps" in job:
        raise InvalidInput("steps", f"are for jobs of kind `steps`, and this one's kind is {job['kind']!r}", "steps")
    job["secrets"] = check_secrets(job.get("secrets"), stored=False)
    job["redact"] = check_redact(job.get("redact"))
    if job.get("args") is not None:
        _check_args(job["args"])
    read_units(job)
    if job.get("name") is None:
        job["name"] = job["kind"]
    try:
        spec = msgspec.convert(known_only(_AskedTask, job), _AskedTask)
    except msgspec.ValidationError as error:
        raise explain(str(error), {"": _AskedTask}) from None
    check_ranges(spec.priority, spec.attempts, spec.backoff, spec.cpu)
    check_names([spec.name], "name")
    spec = msgspec.structs.replace(spec, name=spec.name.strip(), labels=check_labels(spec.labels))
    # By way of JSON, as for steps: tuples come back as lists.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(spec))
    return plain


def decode_task(data: bytes | msgspec.Raw) -> TaskSpec:
    """The spec of a stored job of a kind other than ``steps``. Types are checked; what came in was checked by SQL, in
    full. Raises InvalidInput."""
    try:
        return _STORED.decode(data)
    except msgspec.ValidationError as error:
        raise explain(str(error), {"": TaskSpec}) from None
    except msgspec.DecodeError as error:
        raise InvalidInput("spec", f"is not JSON: {error}") from None


def _check_args(raw: object) -> None:
    if not isinstance(raw, Mapping):
        raise InvalidInput("args", "is not a mapping", "an object of JSON")
    waiting: list[object] = [raw]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        # What other readers of JSON take for infinite.
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise InvalidInput("args", "holds a number out of range", "numbers that a double can express")
