"""The checks of a job's spec that types alone can't express, each raising InvalidInput with the field's path. No I/O.

May import msgspec, ``errors`` and ``units``. Called by ``spec`` and ``spec_task``.
Values that may be secret (of ``secrets``, ``redact``, ``files``) are never quoted in an error.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.model.units import parse_duration, parse_size

DEFAULT_PRIORITY = 127
DEFAULT_ATTEMPTS = 1
DEFAULT_BACKOFF = 10.0
MAX_BACKOFF = 600.0
MAX_NAME = 64
MAX_FILES = 4096
MAX_LABELS = 64
MAX_PATH_PART = 255
MAX_PATH = 3000
MAX_DEPTH = 8

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:=+-]{0,127}", re.ASCII)
_FILTER = re.compile(r"blob:none|blob:limit=\d{1,15}[kmg]?|tree:\d{1,9}", re.ASCII)
_PATH_OF_ERROR = re.compile(r"^(?P<text>.*?)(?: - at `(?P<path>.*)`)?$", re.DOTALL)

ENV_FORM = "letters, digits and _, not beginning with a digit"
COMMIT_FORM = "a commit's id, a branch or a tag"
PATH_FORM = "a relative path without `..`"


def keys_of(struct: type[msgspec.Struct]) -> str:
    """The keys a struct takes, for the ``allowed`` of an error."""
    return ", ".join(sorted(struct.__struct_encode_fields__))


def known_only(struct: type[msgspec.Struct], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without known keys that are null (as good as left out); unknown ones stay, to be refused."""
    known = set(struct.__struct_encode_fields__)
    return {key: value for key, value in raw.items() if value is not None or key not in known}


def check_plain(raw: Mapping[Any, Any]) -> None:
    """JSON's types only, text that PostgreSQL can store (valid Unicode, no NUL), finite numbers, bounded nesting."""
    waiting: list[tuple[str, object, int]] = [("", raw, 0)]
    while waiting:
        field, value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise InvalidInput(field, "is nested too deep")
        if isinstance(value, str):
            _check_text(value, field)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidInput(field, "is not a finite number")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                waiting.append((_below(field, key), item, depth + 1))
        elif isinstance(value, list | tuple):
            waiting.extend((f"{field}[{index}]", item, depth + 1) for index, item in enumerate(value))
        elif value is not None and not isinstance(value, bool | int):
            kind = type(value).__name__
            raise InvalidInput(field, f"is a {kind}, which JSON doesn't have", "text (in quotes), numbers, lists, maps")


def _below(field: str, key: object) -> str:
    if not isinstance(key, str):
        raise InvalidInput(field or "job", f"has a key that is not text but {type(key).__name__}", "text as keys")
    # The keys of `redact` are the secret values themselves.
    inside_redact = field == "redact"
    _check_text(key, field if inside_redact else "a key" + (f" in {field}" if field else ""))
    if inside_redact:
        return field
    return f"{field}.{key[:80]}" if field else key[:80]


def _check_text(text: str, field: str) -> None:
    if "\0" in text:
        raise InvalidInput(field, "holds a NUL character", "text without NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, "is not valid Unicode (a lone surrogate)", "text that UTF-8 can express") from None


_WORDS = {
    "str": "text",
    "array": "a list",
    "object": "a mapping",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
}


def explain(message: str, structs: Mapping[str, type[msgspec.Struct]]) -> InvalidInput:
    """A msgspec.ValidationError in our words. ``structs``: the struct at each path (``"steps[]"``), for its keys."""
    found = _PATH_OF_ERROR.match(message)
    text, path = (found["text"], found["path"] or "$") if found else (message, "$")
    path = path.removeprefix("$").removeprefix(".").replace("[...]", "")
    if unknown := re.match(r"Object contains unknown field `(.*)`$", text, re.DOTALL):
        struct = structs.get(re.sub(r"\[\d+\]", "[]", path))
        return unknown_key(path, unknown[1], struct)
    if missing := re.match(r"Object missing required field `(.*)`$", text):
        return InvalidInput(_join(path, missing[1]), "is missing")
    if wrong := re.match(r"Expected `(.*)`, got `(.*)`$", text):
        wanted = " or ".join(_WORDS.get(word, word) for word in wrong[1].split(" | ") if word != "null")
        return InvalidInput(path or "job", f"is {_WORDS.get(wrong[2], wrong[2])}", wanted)
    if path.endswith("submodules"):
        return InvalidInput(path, "is not known", 'true, false or "recursive"')
    return InvalidInput(path or "job", text[:1].lower() + text[1:])


def unknown_key(path: str, key: str, struct: type[msgspec.Struct] | None) -> InvalidInput:
    """The error for a key that a struct at ``path`` does not have, with the nearest that it has."""
    keys = struct.__struct_encode_fields__ if struct else ()
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return InvalidInput(_join(path, key[:80] or '""'), "is not a known key" + hint, ", ".join(sorted(keys)))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def check_names(names: Iterable[str], field: str) -> None:
    """Names are printable, at most 64 characters, and unique. ``field`` may hold ``{}`` for the index."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        stripped = name.strip()
        where = field.format(index)
        if not stripped:
            raise InvalidInput(where, "is empty", f"1 to {MAX_NAME} characters")
        if len(stripped) > MAX_NAME:
            raise InvalidInput(where, f"has {len(stripped)} characters", f"1 to {MAX_NAME} characters")
        if not stripped.isprintable():
            raise InvalidInput(where, "holds a character that can't be printed", "printable characters")
        if stripped in seen:
            raise InvalidInput(where, f"{stripped!r} is the name of an earlier step too", "names that differ")
        seen.add(stripped)


def read_units(job: dict[str, Any]) -> None:
    """Durations and sizes of a job's own keys, in place, as numbers."""
    if job.get("timeout") is not None:
        job["timeout"] = parse_duration(job["timeout"], "timeout", zero=False)
    if job.get("backoff") is not None:
        job["backoff"] = parse_duration(job["backoff"], "backoff")
    if job.get("memory") is not None:
        job["memory"] = parse_size(job["memory"], "memory")


def check_ranges(priority: int, attempts: int, backoff: float, cpu: float) -> None:
    if priority < 0 or priority > 255:
        raise InvalidInput("priority", f"{_short(priority)} is out of range", "0 to 255, higher first")
    if attempts < 1 or attempts > 1000:
        raise InvalidInput("attempts", f"{_short(attempts)} is out of range", "1 to 1000")
    if backoff > MAX_BACKOFF:
        raise InvalidInput("backoff", "is too long", f"at most {MAX_BACKOFF:g} seconds")
    if not 0 <= cpu <= 4096:
        raise InvalidInput("cpu", "is out of range", "0 (not asked for) to 4096 cores")


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**12 else "it"


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    for index, label in enumerate(labels):
        if not _LABEL.fullmatch(label):
            allowed = "letters, digits and . _ / : = + -, like arch=amd64"
            raise InvalidInput(f"labels[{index}]", "is not a label", allowed)
    unique = tuple(sorted(set(labels)))
    if len(unique) > MAX_LABELS:
        raise InvalidInput("labels", f"has {len(unique)} labels", f"at most {MAX_LABELS}")
    return unique


def check_env(raw: object, field: str) -> dict[str, str] | None:
    """An environment. Numbers become text, as a job file says ``PORT: 8080``; true and false have no one spelling."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InvalidInput(field, "is not a mapping of names to values", "a mapping of names to values")
    env = {}
    for name, value in raw.items():
        where = f"{field}.{name[:80]}"
        _check_env_name(name, where)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InvalidInput(where, "is not text", 'text or a number; write "true" in quotes')
        env[name] = value if isinstance(value, str) else _number_text(value, where)
    return env


def _number_text(value: int | float, field: str) -> str:
    try:
        return str(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits.
        raise InvalidInput(field, "has too many digits", "text or a number") from None


def _check_env_name(name: str, field: str) -> None:
    if not _ENV_NAME.fullmatch(name):
        raise InvalidInput(field, "is not a name of an environment variable", ENV_FORM)
    if name.startswith("BSUP_") or name == "BSUP":
        raise InvalidInput(field, "is set by bsup itself", "names that do not begin with BSUP_")


def check_secrets(raw: object, *, stored: bool) -> dict[str, str | None] | None:
    """Secrets by name. A stored spec has only their names: a list of them, or a map whose values don't count."""
    if raw is None:
        return None
    if stored and isinstance(raw, list | tuple):
        raw = {name: None for name in raw if isinstance(name, str)}
    if not isinstance(raw, Mapping):
        raise InvalidInput("secrets", "is not a mapping of names to values", "a mapping of names to values")
    secrets: dict[str, str | None] = {}
    for name, value in raw.items():
        _check_env_name(name, f"secrets.{name[:80]}")
        if stored:
            secrets[name] = None
        elif not isinstance(value, str):
            raise InvalidInput(f"secrets.{name[:80]}", "is not text", "text; put a number in quotes")
        elif not value:
            raise InvalidInput(f"secrets.{name[:80]}", "is empty", "text of one or more characters")
        else:
            secrets[name] = value
    return dict(sorted(secrets.items()))


def check_redact(raw: object) -> dict[str, str] | None:
    """What else to replace in the output: value → replacement. The values are secret and never shown."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InvalidInput("redact", "is not a mapping of values to replacements", "a mapping")
    for value, replacement in raw.items():
        if not value:
            raise InvalidInput("redact", "holds an empty value", "values of one or more characters")
        if not isinstance(replacement, str):
            raise InvalidInput("redact", "holds a replacement that is not text", "text")
    return dict(raw)


def check_credential(raw: object) -> object:
    """A credential names a secret; a value written in its place is not quoted back."""
    if not isinstance(raw, Mapping):
        raise InvalidInput("repository.credential", "is not a mapping", "secret, username")
    for key in raw:
        if key not in ("secret", "username"):
            raise InvalidInput(f"repository.credential.{key[:80]}", "is not a known key", "secret, username")
    if not isinstance(raw.get("secret"), str):
        raise InvalidInput("repository.credential.secret", "is missing or not text", "the name of one of `secrets`")
    username = raw.get("username")
    if username is not None and (not isinstance(username, str) or not username or not username.isprintable()):
        raise InvalidInput("repository.credential.username", "is not a user's name", "printable text")
    return {key: value for key, value in raw.items() if value is not None}


def check_files(raw: object) -> dict[str, str] | None:
    """Files to write into the checkout: canonical relative path → text. No path may be another's directory."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InvalidInput("files", "is not a mapping of paths to contents", "a mapping of paths to contents")
    if len(raw) > MAX_FILES:
        raise InvalidInput("files", f"has {len(raw)} files", f"at most {MAX_FILES}")
    files: dict[str, str] = {}
    for path, content in raw.items():
        field = f"files[{path[:200]!r}]"
        if not isinstance(content, str):
            raise InvalidInput(field, "has a content that is not text", "text")
        if path.endswith("/"):
            raise InvalidInput(field, "names a directory", "the path of a file")
        canonical = relative_dir(path, field)
        if not canonical:
            raise InvalidInput(field, "names no file", PATH_FORM)
        if canonical in files:
            raise InvalidInput(field, "is given twice", "one content for each file")
        files[canonical] = content
    for path in files:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in files:
                raise InvalidInput(f"files[{path[:200]!r}]", f"lies below {parent[:200]!r}, which is a file", PATH_FORM)
            parent = parent.rpartition("/")[0]
    return dict(sorted(files.items()))


def relative_dir(path: str, field: str) -> str:
    """A relative path that can't leave where it starts, without empty and ``.`` parts; "" is the start itself."""
    if path.startswith("/"):
        raise InvalidInput(field, "is an absolute path", PATH_FORM)
    if "\0" in path:
        raise InvalidInput(field, "holds a NUL character", PATH_FORM)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidInput(field, "leaves the workspace with `..`", PATH_FORM)
    if any(len(part.encode()) > MAX_PATH_PART for part in parts) or len(path.encode()) > MAX_PATH:
        raise InvalidInput(field, "is too long for a path", PATH_FORM)
    return "/".join(parts)


def check_filter(text: str, field: str) -> None:
    if not _FILTER.fullmatch(text):
        raise InvalidInput(field, "is not a filter for a partial clone", "blob:none, blob:limit=<size>, tree:<depth>")


def check_revision(commit: str, field: str) -> None:
    """A revision as it may stand in git's arguments and refspecs. Full syntax (``HEAD~2``) needs no network's say."""
    if not commit.strip():
        raise InvalidInput(field, "is empty", COMMIT_FORM)
    if commit.startswith("-") or len(commit) > 512:
        raise InvalidInput(field, "is not a revision", COMMIT_FORM)
    if re.search(r"[\s\x00-\x1f\x7f:?*\[\\]|\.\.", commit):
        raise InvalidInput(field, "holds characters that no branch, tag or commit has", COMMIT_FORM)
