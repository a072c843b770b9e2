"""A step's ``spec`` file, checked against the host's policy: users, paths, types. Standard library only; called by
``host``."""

from __future__ import annotations

import math
import os
import pwd
from dataclasses import dataclass, field
from typing import Any

from supervisor.shepherd.files import Refusal, StateDirectory, read_json

_LONGEST = 10 * 365 * 86400.0


@dataclass(frozen=True)
class Policy:
    """What the host allows. ``service``: (uid, gid) of the daemon, whose requests are taken and as whom checkouts run.

    Requests name uids ``uid_base`` to ``uid_base + uid_count - 1`` for jobs; ``uid_shift`` is added to them (``uids``
    says why). With none, or without root, jobs run as the shepherd itself.
    """

    service: tuple[int, int]
    uid_base: int = 0
    uid_count: int = 0
    uid_shift: int = 0

    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    @property
    def gives_uids(self) -> bool:
        return self.is_root and self.uid_count > 0

    def allows(self, uid: int) -> bool:
        return self.gives_uids and self.uid_base <= uid < self.uid_base + self.uid_count

    def real(self, uid: int) -> int:
        """The uid that a process gets for one that a request named and the policy allows."""
        return uid + self.uid_shift

    @property
    def owner(self) -> tuple[int, int] | None:
        """Whom files are given to; None if that is the shepherd itself."""
        return self.service if self.is_root and self.service[0] != 0 else None


def is_uid_range(base: int, count: int) -> bool:
    return base >= 1 and count >= 0 and base + count < 0xFFFFFFF0


def service_ids(uid: int) -> tuple[int, int]:
    try:
        return uid, pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid, uid


@dataclass(frozen=True)
class StepSpec:
    """A step as it will be run. ``ids``: (uid, gid) to change to, None: the shepherd's own. ``own_uid``: the job's
    alone."""

    argv: list[str]
    cwd: str
    env: dict[str, str]
    ids: tuple[int, int] | None
    own_uid: bool
    workspace: tuple[str, ...]
    timeout: float | None
    grace: float
    max_output: int
    token: str
    private_tmp: bool


def read_spec(state: StateDirectory, policy: Policy, directory: int) -> StepSpec:
    """Raises Refusal (spec or policy)."""
    try:
        raw = read_json(directory, "spec")
    except (OSError, ValueError) as error:
        raise Refusal("spec", f"spec: can't be read: {error}") from error
    if raw is None:
        raise Refusal("spec", "spec: there is none")
    fields = _Fields(raw)
    workspace = state.names(raw.get("workspace"), "work", 1)
    ids, own_uid = _ids(policy, fields)
    return StepSpec(
        argv=fields.strings("argv"),
        cwd=fields.text("cwd"),
        env=fields.environment(),
        ids=ids,
        own_uid=own_uid,
        workspace=workspace,
        timeout=fields.seconds("timeout"),
        grace=fields.seconds("grace") or 0.0,
        max_output=fields.whole("max_output") or 0,
        token=fields.text("token"),
        private_tmp=fields.flag("private_tmp"),
    )


def _ids(policy: Policy, fields: _Fields) -> tuple[tuple[int, int] | None, bool]:
    uid = fields.whole("uid")
    gid = fields.whole("gid")
    if fields.flag("as_service"):
        return (policy.service if policy.owner else None), False
    if uid is None:
        if policy.gives_uids:
            raise Refusal("policy", "uid: none is given, but on this host every job has one of its own")
        return (policy.service if policy.owner else None), False
    if not policy.allows(uid):
        raise Refusal("policy", f"uid: {uid} is not one this host gives to jobs")
    if gid is not None and not policy.allows(gid):
        raise Refusal("policy", f"gid: {gid} is not one this host gives to jobs")
    return (policy.real(uid), policy.real(uid if gid is None else gid)), True


class _Fields:
    """Typed access to a decoded object; the wrong type is a Refusal that names the field."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw

    def text(self, name: str) -> str:
        value = self._raw.get(name)
        if not isinstance(value, str) or "\0" in value:
            raise Refusal("spec", f"{name}: must be a text without NUL")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._raw.get(name)
        if not isinstance(value, list) or not value or any(not isinstance(v, str) or "\0" in v for v in value):
            raise Refusal("spec", f"{name}: must be a list of texts without NUL, at least one")
        return value

    def environment(self) -> dict[str, str]:
        value = self._raw.get("env", {})
        if not isinstance(value, dict):
            raise Refusal("spec", "env: must be an object")
        for name, text in value.items():
            if not name or "=" in name or "\0" in name or not isinstance(text, str) or "\0" in text:
                raise Refusal("spec", f"env: {name!r} is not a variable with a text without NUL")
        return value

    def flag(self, name: str) -> bool:
        value = self._raw.get(name, False)
        if not isinstance(value, bool):
            raise Refusal("spec", f"{name}: must be true or false")
        return value

    def whole(self, name: str) -> int | None:
        value = self._raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
            raise Refusal("spec", f"{name}: must be a whole number, 0 or more")
        return value

    def seconds(self, name: str) -> float | None:
        return seconds(self._raw.get(name), name)


def seconds(value: object, name: str) -> float | None:
    """A duration out of a file or a request. Raises Refusal."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Refusal("spec", f"{name}: must be a number of seconds, 0 or more")
    return min(float(value), _LONGEST)
