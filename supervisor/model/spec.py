"""A job's spec: what a job file holds, checked and made canonical. No I/O.

May import msgspec and this floor. ``normalize`` is called where a job comes in (the command line, the control socket,
the client), ``split_secrets`` where it is stored, ``decode_spec`` where a stored one is run. Jobs of other kinds than
``steps`` are those of ``spec_task``.

The canonical form is a plain dict with the job file's own keys: durations are seconds, sizes bytes, lists sorted where
order means nothing, defaults left out. ``normalize(normalize(x)) == normalize(x)``. Whatever the input, the only
exception is ``InvalidInput``; it names the field by its path and never holds a value that may be secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.model.spec_checks import (
    DEFAULT_ATTEMPTS,
    DEFAULT_BACKOFF,
    DEFAULT_PRIORITY,
    check_credential,
    check_env,
    check_files,
    check_filter,
    check_labels,
    check_names,
    check_plain,
    check_ranges,
    check_redact,
    check_revision,
    check_secrets,
    explain,
    keys_of,
    known_only,
    read_units,
    relative_dir,
)
from supervisor.model.spec_task import TaskSpec, decode_task, normalize_task
from supervisor.model.units import parse_duration
from supervisor.model.urls import check_url

KIND = "steps"
CHECKOUT = "checkout"
MAX_STEPS = 256


class CredentialSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who to be at the repository's server: ``secret`` names one of the job's secrets, a password or token."""

    secret: str
    username: str = "git"


class RepositorySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to check out. ``commit`` is anything git can resolve: a commit's id, a branch, a tag, a full ref."""

    url: str
    commit: str
    depth: int | None = None
    filter: str | None = None
    sparse: tuple[str, ...] = ()
    submodules: bool | Literal["recursive"] = False
    credential: CredentialSpec | None = None


class StepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One step: ``run`` is an argument vector, or a text for ``sh -c``; ``dir`` is relative to the checkout."""

    name: str
    run: str | tuple[str, ...]
    dir: str = ""
    env: dict[str, str] = {}
    timeout: float | None = None
    always: bool = False


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A job of kind ``steps``. ``secrets``: environment name → value, or None where the value is kept elsewhere."""

    kind: Literal["steps"]
    name: str
    steps: tuple[StepSpec, ...]
    repository: RepositorySpec | None = None
    files: dict[str, str] = {}
    labels: tuple[str, ...] = ()
    priority: int = DEFAULT_PRIORITY
    timeout: float | None = None
    attempts: int = DEFAULT_ATTEMPTS
    backoff: float = DEFAULT_BACKOFF
    secrets: dict[str, str | None] = {}
    redact: dict[str, str] = {}
    cpu: float = 0.0
    memory: int = 0
    keep_workspace: bool = False

    @property
    def has_checkout(self) -> bool:
        """Whether bsup's own ``checkout`` step comes first."""
        return self.repository is not None or bool(self.files)


def normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical dict of a job as a user gives it, with the values of its secrets. Raises InvalidInput.

    A kind other than ``steps`` may turn out not to exist: the database says so.
    """
    kind = raw.get("kind") if _is_mapping(raw) else None
    if isinstance(kind, str) and kind != KIND:
        check_plain(raw)
        return normalize_task(raw)
    return _builtins(_read(raw, stored=False))


def decode_spec(data: bytes | msgspec.Raw) -> JobSpec:
    """The spec of a stored job of kind ``steps``. Raises InvalidInput.

    Checked in full again, as SQL's ``bsup.submit`` checks less.
    ``secrets`` may be a list of names, or a map of which the values don't count.
    """
    try:
        raw = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidInput("spec", f"is not JSON: {error}") from None
    return _read(raw, stored=True)


def split_secrets(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """A canonical dict apart: what may be stored and shown (names of secrets only), secrets, and redactions."""
    shown = {key: value for key, value in spec.items() if key not in ("secrets", "redact")}
    secrets = dict(spec.get("secrets") or {})
    if secrets:
        shown["secrets"] = sorted(secrets)
    return shown, secrets, dict(spec.get("redact") or {})


def _is_mapping(raw: object) -> bool:
    return isinstance(raw, Mapping)


def _builtins(spec: JobSpec) -> dict[str, Any]:
    # By way of JSON: tuples come back as lists, as they do from PostgreSQL, and the dict can be compared.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(spec))
    return {"kind": plain.pop("kind"), **plain}


def _read(raw: object, *, stored: bool) -> JobSpec:
    if not isinstance(raw, Mapping):
        raise InvalidInput("job", "is not a mapping of keys to values", keys_of(JobSpec))
    check_plain(raw)
    job = dict(raw)
    kind = job.get("kind")
    if kind is None:
        raise InvalidInput("kind", "is missing", KIND)
    if isinstance(kind, str) and kind != KIND:
        raise InvalidInput("kind", f"is {kind[:64]!r}, which has no steps", KIND)
    # Every key that may be a secret's value is read before msgspec sees it: its messages may quote what they refuse.
    job["secrets"] = check_secrets(job.get("secrets"), stored=stored)
    job["redact"] = check_redact(None if stored else job.get("redact"))
    job["files"] = check_files(job.get("files"))
    read_units(job)
    job["steps"] = _steps(job.get("steps"))
    job["repository"] = _repository(job.get("repository"))
    if job.get("name") is None:
        job["name"] = _default_name(job)
    try:
        spec = msgspec.convert(known_only(JobSpec, job), JobSpec)
    except msgspec.ValidationError as error:
        raise explain(str(error), {"": JobSpec, "steps[]": StepSpec, "repository": RepositorySpec}) from None
    return _checked(spec)


def _steps(raw: object) -> object:
    if raw is None:
        raise InvalidInput("steps", "is missing", "a list of steps, each with `name` and `run`")
    if not isinstance(raw, list | tuple):
        raise InvalidInput("steps", "is not a list", "a list of steps, each with `name` and `run`")
    if not raw:
        raise InvalidInput("steps", "is empty", "at least one step")
    if len(raw) > MAX_STEPS:
        raise InvalidInput("steps", f"has {len(raw)} steps", f"at most {MAX_STEPS}")
    steps = []
    for index, item in enumerate(raw):
        field = f"steps[{index}]"
        if not isinstance(item, Mapping):
            raise InvalidInput(field, "is not a mapping", keys_of(StepSpec))
        step = dict(item)
        if "image" in step:
            raise InvalidInput(
                f"{field}.image",
                "container steps are not supported by this version",
                "remove `image` to run the step as a process",
            )
        for key in ("name", "run"):
            if step.get(key) is None:
                raise InvalidInput(f"{field}.{key}", "is missing", "every step has `name` and `run`")
        step["env"] = check_env(step.get("env"), f"{field}.env")
        if step.get("timeout") is not None:
            step["timeout"] = parse_duration(step["timeout"], f"{field}.timeout", zero=False)
        steps.append(known_only(StepSpec, step))
    return steps


def _repository(raw: object) -> object:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InvalidInput("repository", "is not a mapping", keys_of(RepositorySpec))
    repository = dict(raw)
    if repository.get("url") is None:
        raise InvalidInput("repository.url", "is missing", "a git URL or an absolute path")
    if repository.get("commit") is None:
        raise InvalidInput("repository.commit", "is missing", "a commit's id, a branch or a tag")
    credential = repository.get("credential")
    if credential is not None:
        repository["credential"] = check_credential(credential)
    return known_only(RepositorySpec, repository)


def _default_name(job: Mapping[str, Any]) -> object:
    """The repository's last part, else the first step's name: what a reader of ``ps`` would call the job."""
    repository = job.get("repository")
    url = repository.get("url") if isinstance(repository, Mapping) else None
    if isinstance(url, str):
        tail = url.rstrip("/").replace(":", "/").rpartition("/")[2].removesuffix(".git").strip()
        if tail and tail.isprintable():
            return tail[:64].strip()
    return job["steps"][0]["name"]


def _checked(spec: JobSpec) -> JobSpec:
    """What types alone can't say; returns the spec with its paths, lists and names made canonical."""
    check_ranges(spec.priority, spec.attempts, spec.backoff, spec.cpu)
    check_names([step.name for step in spec.steps], "steps[{}].name")
    check_names([spec.name], "name")
    if spec.has_checkout:
        for index, step in enumerate(spec.steps):
            if step.name == CHECKOUT:
                raise InvalidInput(
                    f"steps[{index}].name", f"{CHECKOUT!r} is bsup's own first step of this job", "another name"
                )
    return msgspec.structs.replace(
        spec,
        name=spec.name.strip(),
        steps=tuple(_checked_step(step, f"steps[{index}]") for index, step in enumerate(spec.steps)),
        repository=_checked_repository(spec),
        labels=check_labels(spec.labels),
    )


def _checked_step(step: StepSpec, field: str) -> StepSpec:
    words = (step.run,) if isinstance(step.run, str) else step.run
    if not words or not words[0].strip():
        raise InvalidInput(f"{field}.run", "is empty", 'a list like ["echo", "hi"], or a text for sh -c')
    return msgspec.structs.replace(step, name=step.name.strip(), dir=relative_dir(step.dir, f"{field}.dir"))


def _checked_repository(spec: JobSpec) -> RepositorySpec | None:
    repository = spec.repository
    if repository is None:
        return None
    scheme = check_url(repository.url, "repository.url")
    check_revision(repository.commit, "repository.commit")
    if repository.depth is not None and not 1 <= repository.depth <= 2**31 - 1:
        raise InvalidInput("repository.depth", "is out of range", "1 or more commits")
    if repository.filter is not None:
        check_filter(repository.filter, "repository.filter")
    credential = repository.credential
    if credential is not None:
        if scheme not in ("http", "https"):
            raise InvalidInput("repository.credential", "needs an http or https URL", "http://…, https://…")
        if credential.secret not in spec.secrets:
            known = ", ".join(sorted(spec.secrets)) or "no secret is defined: add it to `secrets`"
            raise InvalidInput("repository.credential.secret", "is not the name of one of the job's secrets", known)
    sparse = {relative_dir(path, f"repository.sparse[{index}]") for index, path in enumerate(repository.sparse)}
    return msgspec.structs.replace(repository, sparse=tuple(sorted(sparse - {""})))


__all__ = [
    "CHECKOUT",
    "DEFAULT_ATTEMPTS",
    "DEFAULT_BACKOFF",
    "DEFAULT_PRIORITY",
    "KIND",
    "CredentialSpec",
    "JobSpec",
    "RepositorySpec",
    "StepSpec",
    "TaskSpec",
    "decode_spec",
    "decode_task",
    "normalize",
    "split_secrets",
]
