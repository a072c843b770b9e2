"""Reads a job file: YAML, TOML or JSON, from a path or standard input, with ``--set`` on top. Called by ``submit``.

YAML is read as its core schema (1.2) has it: ``on``, ``no`` and ``12:30`` are text, dates stay text, a key given
twice is an error. The 1.1 rules of PyYAML's own loader turn ``name: no`` into false, which a job file's author
never means.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from supervisor.model.errors import InvalidInput

_FORMATS = {".json": "JSON", ".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}
_TOML_LINE = re.compile(r"""\[{1,2}[\w."' -]+\]{1,2}\s*(#.*)?|[\w."'-]+\s*=""")
_PATH = re.compile(r'(?:^|\.)(?P<name>[^.\[\]"]+|"[^"]*")|\[(?P<index>\d+)\]')


def read(name: str) -> tuple[str, bytes]:
    """What to call the input in errors, and its bytes. Raises InvalidInput."""
    if name == "-":
        return "standard input", sys.stdin.buffer.read()
    try:
        with open(name, "rb") as file:
            return name, file.read()
    except OSError as error:
        raise InvalidInput(name, f"can't be read: {error.strerror}", "a YAML, TOML or JSON file, or `-`") from None


def decode(source: str, data: bytes) -> dict[str, Any]:
    """The job in a file's bytes. Raises InvalidInput, naming ``source`` and the line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(source, f"is not UTF-8 text (at byte {error.start})", "a YAML, TOML or JSON file") from None
    form = _FORMATS.get(_suffix(source)) or _guess(text)
    value = {"JSON": _json, "TOML": _toml, "YAML": _yaml}[form](source, text)
    if not isinstance(value, dict):
        what = "is empty" if value is None else f"is a {type(value).__name__}, not a job"
        raise InvalidInput(source, what, "a mapping such as `kind: steps` with `steps: [{name: hi, run: [echo, hi]}]`")
    for key in value:
        if not isinstance(key, str):
            raise InvalidInput(source, f"the key {key!r} is not text", "keys such as `kind`, `steps`")
    return value


def apply(job: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The job with each ``path=value`` set. Raises InvalidInput that names the path."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise InvalidInput(f"--set {setting}", "has no value", "path=value, such as repository.commit=main")
        _put(job, _steps(path), _yaml(f"--set {path}", text) if text else "", f"--set {path}")
    return job


def _suffix(source: str) -> str:
    return os.path.splitext(source)[1].lower()


def _guess(text: str) -> str:
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("{"):
            return "JSON"
        return "TOML" if _TOML_LINE.match(line) else "YAML"
    return "YAML"


def _json(source: str, text: str) -> Any:
    import json

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InvalidInput(source, f"the key {key!r} is there twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        if _suffix(source) != ".json" and text.lstrip().startswith("{"):
            # `{kind: steps, …}` is YAML too.
            try:
                return _yaml(source, text)
            except InvalidInput:
                pass
        raise InvalidInput(source, f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise InvalidInput(source, "is nested too deeply") from None


def _toml(source: str, text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(source, f"is not TOML: {error}") from None


def _yaml(source: str, text: str) -> Any:
    import yaml

    from supervisor.cli.yaml_core import load

    try:
        return load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise InvalidInput(source, f"is not YAML: {error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise InvalidInput(source, f"is not YAML: {error}") from None
    except RecursionError:
        raise InvalidInput(source, "is nested too deeply") from None


def _steps(path: str) -> list[str | int]:
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        match = _PATH.match(path, at)
        if match is None:
            break
        if match["index"] is not None:
            steps.append(int(match["index"]))
        else:
            steps.append(match["name"].strip('"'))
        at = match.end()
    if not steps or at < len(path) or isinstance(steps[0], int):
        raise InvalidInput(f"--set {path}", "is not a path of keys", 'such as priority, steps[0].run or files."a.txt"')
    return steps


def _put(job: dict[str, Any], steps: list[str | int], value: Any, where: str) -> None:
    target: Any = job
    for step, following in itertools.pairwise(steps):
        target = _into(target, step, [] if isinstance(following, int) else {}, where)
    last = steps[-1]
    if isinstance(last, int):
        if not isinstance(target, list) or last > len(target):
            raise InvalidInput(where, f"there is no place [{last}]", "an index of an existing list, or its end")
        target[last:] = [value, *target[last + 1 :]]
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise InvalidInput(where, f"{last!r} is not below a mapping")


def _into(target: Any, step: str | int, empty: Any, where: str) -> Any:
    if isinstance(step, int):
        if not isinstance(target, list) or step >= len(target):
            raise InvalidInput(where, f"there is no [{step}]", "an index of an existing list")
        return target[step]
    if not isinstance(target, dict):
        raise InvalidInput(where, f"{step!r} is not below a mapping")
    if target.get(step) is None:
        target[step] = empty
    return target[step]
