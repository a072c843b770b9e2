"""Turns a lease into a run's files: the run's ``spec``, one ``spec`` a step, and the checkout's plan. The shepherd
writes them: what holds the state directory of a host with thousands of short jobs up is the making of files, and it
has some to take up again.

May import msgspec, ``model`` and its neighbour ``handles``. Called by ``steps``.
A step's ``spec`` and the plan hold secrets: all of it is 0600 below a directory of mode 0700.
"""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

import supervisor
from supervisor.model.errors import InvalidInput, RunnerError
from supervisor.model.job import Lease
from supervisor.model.spec import CHECKOUT, JobSpec, StepSpec, decode_spec
from supervisor.ports import Plan, StepPlan
from supervisor.runners.git import PASSED_ON
from supervisor.runners.handles import UNREADABLE, Damaged, StepFile

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLAN_FILE = "plan.json"
_SMALL_SPEC = 4096
# With PYTHONPATH and without site-packages: it starts in a few hundredths of a second, installed or not.
_CHECKOUT = (sys.executable, "-S", "-s", "-P", "-m", "supervisor.runners.checkout")


class HostCredential(msgspec.Struct, frozen=True):
    """A credential of the host's own for repositories whose URL begins with ``url``."""

    url: str
    username: str
    password_file: str


class StepsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the host's config says to this runner. ``grace`` in seconds, ``max_output`` in bytes a step.

    ``timeout``: seconds that a job may run which names no timeout of its own (None: no limit).
    ``mirrors``: whether repositories are cached; ``allow``: patterns of their URLs (``model.urls.is_allowed``);
    ``pass_env``: names of the daemon's environment variables that every step gets. ``keep_workspace_for``: seconds
    after which a kept workspace goes (None: never); ``mirrors_max``: bytes on disk of all mirrors together.
    """

    grace: float = 10.0
    timeout: float | None = None
    max_output: int = 1 << 30
    keep_workspace: bool = False
    keep_workspace_for: float | None = None
    allow: tuple[str, ...] = ("*",)
    mirrors: bool = True
    mirrors_max: int = 20 << 30
    credentials: tuple[HostCredential, ...] = ()
    pass_env: tuple[str, ...] = ()


VERSION = 1
"""Of ``RunFile``. It rises when an older daemon would misread it, not for a field that it may pass over."""


class RunFile(msgspec.Struct, kw_only=True, frozen=True):
    """``runs/<lease>/spec``: all that a restarted daemon needs to go on with the run. Holds no secret."""

    lease: str
    job: int
    attempt: int
    uid: int | None
    workspace: str
    token: str
    has_checkout: bool
    keep_workspace: bool
    plan: Plan
    created_at: float
    version: int = VERSION


def read_run(run_dir: Path) -> RunFile | None:
    """The run's ``spec``; None if the run was never wholly prepared. Raises RunnerError, ``Damaged`` if it is."""
    path = run_dir / "spec"
    try:
        run = msgspec.json.decode(path.read_bytes(), type=RunFile)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunnerError(f"{path}: can't be read: {error}") from error
    except UNREADABLE as error:
        raise Damaged(f"{path}: is damaged: {error}") from error
    if run.version > VERSION:
        raise Damaged(f"{path}: is of version {run.version}, a newer bsup's; this one knows {VERSION}")
    return run


class Intent(msgspec.Struct, frozen=True):
    """What is to be on disk before anything of a run starts: ``files`` are names below the run's directory, with what
    they hold; the run's own ``spec`` goes last: where it is, all is there."""

    run: RunFile
    files: dict[str, str]


class RunPlanner:
    """Plans the files of one run."""

    def __init__(self, state: str, lease: Lease, settings: StepsSettings) -> None:
        """Raises InvalidInput where the job's spec can't be run."""
        self._state = state
        self._lease = lease
        self._settings = settings
        self._spec = _spec(bytes(lease.spec))
        self._id = str(lease.id)
        self._workspace = f"{state}/work/{self._id}"
        missing = sorted(set(self._spec.secrets) - set(lease.secrets))
        if missing:
            raise InvalidInput("secrets", f"the values of {', '.join(missing)} are gone", "submit the job again")

    def plan(self, uid: int | None, now: float) -> Intent:
        """``now`` in unix seconds."""
        spec, first = self._spec, int(self._spec.has_checkout)
        token = secrets.token_hex(16)
        common = self._common_environment()
        files: dict[str, str] = {}
        plan: list[StepPlan] = []
        if spec.has_checkout:
            plan.append(StepPlan(index=0, name=CHECKOUT))
            files[f"0/{PLAN_FILE}"] = _json(self._checkout_plan(spec))
            files["0/spec"] = _json(self._checkout_step(token))
        for index, step in enumerate(spec.steps, start=first):
            plan.append(StepPlan(index=index, name=step.name, always=step.always, timeout=step.timeout))
            files[f"{index}/spec"] = _json(self._step_file(index, step, uid, token, common))
        run = RunFile(
            lease=self._id,
            job=self._lease.job,
            attempt=self._lease.attempt,
            uid=uid,
            workspace=self._workspace,
            token=token,
            has_checkout=spec.has_checkout,
            keep_workspace=spec.keep_workspace,
            plan=Plan(steps=tuple(plan), timeout=self._settings.timeout if spec.timeout is None else spec.timeout),
            created_at=now,
        )
        files["spec"] = _json(run)
        return Intent(run, files)

    def _step_file(self, index: int, step: StepSpec, uid: int | None, token: str, common: dict[str, str]) -> StepFile:
        return StepFile(
            argv=("/bin/sh", "-c", step.run) if isinstance(step.run, str) else step.run,
            workspace=self._workspace,
            cwd=f"src/{step.dir}" if step.dir else "src",
            env={**common, "BSUP_STEP": step.name, "BSUP_STEP_INDEX": str(index), **self._secrets(), **step.env},
            uid=uid,
            gid=uid,
            timeout=step.timeout,
            grace=self._settings.grace,
            max_output=self._settings.max_output,
            token=token,
        )

    def _common_environment(self) -> dict[str, str]:
        """A clean one: nothing of the daemon's but what the host's config passes on. Secrets and the step's own go
        last.

        HOME, TMPDIR and BSUP_RUN are the shepherd's to set.
        """
        lease = self._lease
        return {
            "PATH": DEFAULT_PATH,
            "LANG": "C.UTF-8",
            "SHELL": "/bin/sh",
            "USER": "bsup",
            "LOGNAME": "bsup",
            "CI": "true",
            **_passed(self._settings.pass_env),
            "BSUP": "1",
            "BSUP_JOB_ID": str(lease.job),
            "BSUP_JOB_NAME": lease.name,
            "BSUP_ATTEMPT": str(lease.attempt),
            "BSUP_LEASE": self._id,
            "BSUP_WORKSPACE": f"{self._workspace}/src",
        }

    def _secrets(self) -> dict[str, str]:
        return {name: self._lease.secrets[name] for name in self._spec.secrets}

    def _checkout_step(self, token: str) -> StepFile:
        return StepFile(
            argv=(*_CHECKOUT, f"{self._state}/runs/{self._id}/0/{PLAN_FILE}"),
            workspace=self._workspace,
            env={
                "PATH": DEFAULT_PATH,
                **_passed(PASSED_ON),
                "LANG": "C.UTF-8",
                "USER": _own_name(),
                "PYTHONPATH": str(Path(supervisor.__file__).parents[1]),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            grace=self._settings.grace,
            max_output=self._settings.max_output,
            token=token,
            private_tmp=False,
            as_service=True,
        )

    def _checkout_plan(self, spec: JobSpec) -> dict[str, object]:
        """As ``checkout.Plan`` reads it."""
        repository = spec.repository
        credentials: list[dict[str, str]] = []
        if repository is not None and repository.credential is not None:
            credentials.append(
                {
                    "url": _server(repository.url),
                    "username": repository.credential.username,
                    "password": self._lease.secrets[repository.credential.secret],
                }
            )
        credentials += [msgspec.to_builtins(credential) for credential in self._settings.credentials]
        return {
            "src": f"{self._workspace}/src",
            "allow": self._settings.allow,
            "mirrors": f"{self._state}/mirrors" if self._settings.mirrors else None,
            "repository": repository,
            "files": spec.files or None,
            "credentials": credentials,
        }


def _spec(data: bytes) -> JobSpec:
    """Of many jobs that are alike, as a loop or an array submits them, it is checked once."""
    return _known_spec(data) if len(data) <= _SMALL_SPEC else decode_spec(data)


_known_spec = functools.lru_cache(maxsize=256)(decode_spec)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _passed(names: tuple[str, ...], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {name: environ[name] for name in names if name in environ}


def _server(url: str) -> str:
    """``https://host:port`` of a URL: submodules from the same server get the job's credential, other servers never."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
