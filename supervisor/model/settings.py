"""What a host's ``bsup.toml`` may say: every key, its type, its range and its default; decoded once, at the edge.

No I/O: ``decode`` takes the file's bytes, ``resolve`` takes what was found out of the host. May import msgspec and
this floor. ``cli.configuration`` reads the file and calls both; everything else is handed the finished
``Settings``.

Durations are seconds and sizes bytes once decoded; in the file they may be written ``"90s"`` or ``"512MiB"``. TOML
has no null, so the words ``"auto"`` and ``"none"`` stand for "find it out" and "no limit". Unknown keys are
refused, never ignored: a misspelt ``termm`` that silently keeps the default would be found out at the first outage.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from supervisor.model.errors import InvalidInput
from supervisor.model.spec_checks import check_labels
from supervisor.model.units import parse_duration, parse_size

Unit = Literal["plain", "duration", "size"]

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KIND_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Key(msgspec.Struct, frozen=True):
    """What a key may hold beyond its Python type. ``allowed`` completes "allowed: …" in an error.

    ``words`` are the strings that stand for a value of another type; ``secret`` keeps the value out of errors and
    ``show``.
    """

    allowed: str
    unit: Unit = "plain"
    low: float | None = None
    high: float | None = None
    words: tuple[tuple[str, int | float | str | None], ...] = ()
    items: type[msgspec.Struct] | None = None
    secret: bool = False


def _duration(allowed: str, low: float, high: float, none: bool = False) -> Key:
    return Key(allowed, unit="duration", low=low, high=high, words=(("none", None),) if none else ())


def _size(allowed: str, low: int, high: int, none: bool = False) -> Key:
    return Key(allowed, unit="size", low=low, high=high, words=(("none", None),) if none else ())


_KIB, _MIB, _TIB = 1 << 10, 1 << 20, 1 << 40
_DAY = 86_400.0
_PRINCIPALS = Key('a list of user names ("alice"), groups ("@builders") and uids (1000)')


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Root of the tables of the file."""


class Host(Section, frozen=True):
    """Who this host is and how much it takes. Empty ``name`` and 0 ``slots`` are "auto" until ``resolve``."""

    name: Annotated[
        str, Key('"auto" (the machine\'s hostname), or 1–253 printable characters', words=(("auto", ""),))
    ] = ""
    labels: Annotated[tuple[str, ...], Key('a list of labels such as "docker" or "arch=amd64"')] = ()
    slots: Annotated[
        int, Key('"auto" (the number of CPUs), or 1 to 10000 jobs at a time', low=1, high=10_000, words=(("auto", 0),))
    ] = 0
    cpu: Annotated[
        float | None, Key('"none", or a number of CPUs above 0', low=0.001, high=100_000, words=(("none", None),))
    ] = None
    memory: Annotated[int | None, _size('"none", or a size of 1MiB or more', _MIB, 1 << 50, none=True)] = None


class Database(Section, frozen=True):
    """Where the jobs are. ``embedded`` runs PostgreSQL below the state directory. Empty ``listen_dsn`` is ``dsn``."""

    dsn: Annotated[
        str,
        Key(
            '"embedded", or a libpq DSN such as "postgresql://bsup@db1,db2/bsup?target_session_attrs=read-write"',
            secret=True,
        ),
    ] = "embedded"
    listen_dsn: Annotated[
        str, Key('"auto" (database.dsn), or a libpq DSN of the same database', words=(("auto", ""),), secret=True)
    ] = ""
    migrate: Annotated[bool, Key("true or false")] = True
    connect_timeout: Annotated[float, _duration('a duration of "1s" to "5m"', 1.0, 300.0)] = 10.0
    poll: Annotated[float, _duration('a duration of "50ms" to "1m"', 0.05, 60.0)] = 1.0


class LeaseTerms(Section, frozen=True):
    """The terms of a session; checked together (see ``_check``)."""

    renew: Annotated[float, _duration('a duration of "100ms" to "10m"', 0.1, 600.0)] = 10.0
    term: Annotated[float, _duration('a duration of "1s" to "1h", at least 6 × lease.renew', 1.0, 3600.0)] = 180.0
    margin: Annotated[float, _duration('a duration of "100ms" or more, below half of lease.term', 0.1, 1800.0)] = 15.0


class Shutdown(Section, frozen=True):
    """What SIGTERM does to the jobs that run."""

    on_term: Annotated[Literal["auto", "drain", "detach"], Key('"auto", "drain" or "detach"')] = "auto"
    drain: Annotated[float, _duration('a duration of "0s" to "7d"', 0.0, 7 * _DAY)] = 600.0


class Supervision(Section, frozen=True):
    """When the daemon is given up by itself, for the next one to take over."""

    blocked_after: Annotated[
        float | None, _duration('"none", or a duration of "1s" to "1h"', 1.0, 3600.0, none=True)
    ] = 60.0


class StateDirectory(Section, frozen=True):
    """What outlives the daemon on this host. Empty is "auto" until ``resolve``."""

    dir: Annotated[str, Key('"auto", or an absolute path', words=(("auto", ""),))] = ""
    min_free: Annotated[int, _size('a size of "0" to "1024TiB"', 0, 1 << 50)] = 512 * _MIB


class Control(Section, frozen=True):
    """The Unix socket that commands come in on. Empty ``socket`` is "auto" until ``resolve``."""

    socket: Annotated[str, Key('"auto", or an absolute path of at most 107 bytes', words=(("auto", ""),))] = ""
    max_frame: Annotated[int, _size('a size of "4KiB" to "64MiB"', 4 * _KIB, 64 * _MIB)] = _MIB
    idle_timeout: Annotated[float, _duration('a duration of "1s" to "1d"', 1.0, _DAY)] = 300.0
    slow_timeout: Annotated[float, _duration('a duration of "100ms" to "10m"', 0.1, 600.0)] = 30.0
    max_connections_per_uid: Annotated[int, Key("1 to 10000 connections", low=1, high=10_000)] = 64


class Roles(Section, frozen=True):
    """Who may do what on the socket. root and the daemon's own user are always admins."""

    admin: Annotated[tuple[str | int, ...], _PRINCIPALS] = ()
    operator: Annotated[tuple[str | int, ...], _PRINCIPALS] = ()
    viewer: Annotated[tuple[str | int, ...], _PRINCIPALS] = ()


class Jobs(Section, frozen=True):
    """What holds for every job on this host. 0 ``uid_count`` is "auto" until ``resolve``."""

    grace: Annotated[float, _duration('a duration of "0s" to "1h"', 0.0, 3600.0)] = 10.0
    timeout: Annotated[
        float | None, _duration('"none", or a duration of "1s" to "365d"', 1.0, 365 * _DAY, none=True)
    ] = None
    keep_workspace: Annotated[bool, Key("true or false")] = False
    keep_workspace_for: Annotated[
        float | None, _duration('"none", or a duration of "0s" to "3650d"', 0.0, 3650 * _DAY, none=True)
    ] = 7 * _DAY
    pass_env: Annotated[tuple[str, ...], Key("a list of names of environment variables")] = ()
    kinds: Annotated[dict[str, str], Key('a table of kinds, such as { noop = "supervisor.kinds:noop" }')] = (
        msgspec.field(default_factory=lambda: {"noop": "supervisor.kinds:noop"})
    )
    uids: Annotated[Literal["auto", "off"], Key('"auto" or "off"')] = "auto"
    uid_base: Annotated[int, Key("a uid of 1000 to 4294900000", low=1000, high=4_294_900_000)] = 200_000
    uid_count: Annotated[
        int, Key('"auto" (four for each slot), or 1 to 65536 uids', low=1, high=65_536, words=(("auto", 0),))
    ] = 0


class Logs(Section, frozen=True):
    """How much of a step's output is kept, and where."""

    max_disk: Annotated[int, _size('a size of "4KiB" to "1TiB"', 4 * _KIB, _TIB)] = 1 << 30
    max_database: Annotated[int, _size('a size of "4KiB" to "1TiB", at most logs.max_disk', 4 * _KIB, _TIB)] = 64 * _MIB
    keep_local: Annotated[int, _size('a size of "0" to "1024TiB"', 0, 1 << 50)] = 10 << 30


class Redact(Section, frozen=True):
    """The host's own secrets, which must not appear in any job's log."""

    values_env: Annotated[tuple[str, ...], Key("a list of names of environment variables")] = ()
    values_file: Annotated[str | None, Key('"none", or an absolute path', words=(("none", None),))] = None


class GitCredential(Section, frozen=True):
    """A credential of the host for repositories whose URL begins with ``url``."""

    url: Annotated[str, Key('the beginning of a URL, such as "https://git.example.org/team/"')]
    username: Annotated[str, Key("a user name")]
    password_file: Annotated[str, Key("an absolute path of a file that holds the password or token")]


class Git(Section, frozen=True):
    """Which repositories a job may name, and how they are fetched."""

    allow: Annotated[tuple[str, ...], Key('a list of patterns of URLs, such as "https://git.example.org/*"')] = ("*",)
    mirrors: Annotated[bool, Key("true or false")] = True
    mirrors_max: Annotated[int, _size('a size of "0" to "1024TiB"', 0, 1 << 50)] = 20 << 30
    credentials: Annotated[
        tuple[GitCredential, ...], Key("a list of tables with url, username and password_file", items=GitCredential)
    ] = ()


class Retention(Section, frozen=True):
    """How long what has ended stays in the database."""

    finished: Annotated[
        float | None, _duration('"none", or a duration of "1m" to "3650d"', 60.0, 3650 * _DAY, none=True)
    ] = 30 * _DAY


class Log(Section, frozen=True):
    """The daemon's own log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Key('"debug", "info", "warning" or "error"')] = (
        "info"
    )
    format: Annotated[Literal["auto", "human", "json"], Key('"auto", "human" or "json"')] = "auto"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``Settings()`` is what holds without one."""

    host: Host = Host()
    database: Database = Database()
    lease: LeaseTerms = LeaseTerms()
    shutdown: Shutdown = Shutdown()
    supervision: Supervision = Supervision()
    state: StateDirectory = StateDirectory()
    control: Control = Control()
    roles: Roles = Roles()
    jobs: Jobs = Jobs()
    logs: Logs = Logs()
    redact: Redact = Redact()
    git: Git = Git()
    retention: Retention = Retention()
    log: Log = Log()


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What "auto" is resolved from; gathered by the caller. ``runtime_dir`` and ``state_home`` are the user's own."""

    hostname: str
    cpus: int
    root: bool
    runtime_dir: str
    state_home: str


def decode(data: bytes) -> Settings:
    """Settings from the bytes of a TOML file. Raises InvalidInput that names the key, what was wrong and what is
    allowed.
    """
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInput("file", f"is not UTF-8 text (at byte {error.start})", "a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("file", f"is not TOML: {error}", "lines such as `slots = 4` below `[host]`") from None
    sections: dict[str, msgspec.Struct] = {}
    known = section_types()
    for name, value in table.items():
        if name not in known:
            raise InvalidInput(name, _unknown("section", name, known), ", ".join(known))
        if not isinstance(value, dict):
            raise InvalidInput(name, f"is {_shown(value)}, but it is a section", f"[{name}] with keys below it")
        sections[name] = _section(name, known[name], value)
    settings = Settings(**sections)  # type: ignore[arg-type]  # built by name from this struct's own field types
    check(settings)
    return settings


def section_types() -> dict[str, type[msgspec.Struct]]:
    """The file's sections by name, in order."""
    return {name: type_ for name, type_ in get_type_hints(Settings).items() if name in Settings.__struct_fields__}


def keys_of(section: type[msgspec.Struct]) -> dict[str, tuple[Any, Key]]:
    """Each key of a section: its Python type and its ``Key``."""
    hints = get_type_hints(section, include_extras=True)
    found: dict[str, tuple[Any, Key]] = {}
    for name in section.__struct_fields__:
        type_, key = get_args(hints[name])
        found[name] = (type_, key)
    return found


def resolve(settings: Settings, facts: HostFacts) -> Settings:
    """The settings with every "auto" replaced by what holds on this host."""
    slots = settings.host.slots or max(1, facts.cpus)
    state = settings.state.dir or ("/var/lib/bsup" if facts.root else f"{facts.state_home}/bsup")
    runtime = "/run" if facts.root else facts.runtime_dir
    resolved = msgspec.structs.replace(
        settings,
        host=msgspec.structs.replace(settings.host, name=settings.host.name or facts.hostname, slots=slots),
        state=msgspec.structs.replace(settings.state, dir=state),
        control=msgspec.structs.replace(
            settings.control, socket=settings.control.socket or f"{runtime}/bsup/control.sock"
        ),
        # A uid is given again only when all that its last job left is gone, which takes a moment: so more than slots.
        jobs=msgspec.structs.replace(settings.jobs, uid_count=settings.jobs.uid_count or min(65_536, 4 * slots)),
    )
    check(resolved)
    return resolved


def check(settings: Settings) -> None:
    """What no key can check alone. Raises InvalidInput."""
    lease, jobs, host = settings.lease, settings.jobs, settings.host
    if lease.term < 6 * lease.renew and not math.isclose(lease.term, 6 * lease.renew):  # 6 * 0.4 is more than 2.4
        raise InvalidInput(
            "lease.term",
            f"{lease.term:g}s is less than 6 × lease.renew ({lease.renew:g}s): "
            "a few slow renewals would end the session's jobs",
            f"{6 * lease.renew:g}s or more, or a smaller lease.renew",
        )
    if lease.margin >= lease.term / 2:
        raise InvalidInput(
            "lease.margin",
            f"{lease.margin:g}s is not below half of lease.term ({lease.term:g}s): "
            "the fence would fall too soon after a renewal",
            f"below {lease.term / 2:g}s",
        )
    if settings.logs.max_database > settings.logs.max_disk:
        raise InvalidInput(
            "logs.max_database",
            f"{settings.logs.max_database} bytes is more than logs.max_disk ({settings.logs.max_disk}): "
            "the database is fed from disk",
            "at most logs.max_disk",
        )
    if jobs.uids == "auto" and jobs.uid_count and host.slots and jobs.uid_count < host.slots:
        raise InvalidInput(
            "jobs.uid_count",
            f"{jobs.uid_count} is less than host.slots ({host.slots}): every running job has a uid of its own",
            f'{host.slots} or more, or jobs.uids = "off"',
        )
    if len(settings.control.socket.encode()) > 107:
        raise InvalidInput(
            "control.socket", "is longer than a Unix socket's path can be", "an absolute path of at most 107 bytes"
        )
    for path, value in (("state.dir", settings.state.dir), ("control.socket", settings.control.socket)):
        _absolute(path, value)
    _absolute("redact.values_file", settings.redact.values_file or "")
    for number, credential in enumerate(settings.git.credentials):
        _absolute(f"git.credentials[{number}].password_file", credential.password_file or "(empty)")
    try:
        check_labels(host.labels)
    except InvalidInput as error:
        raise InvalidInput(f"host.{error.field}", error.problem, error.allowed) from None
    for key, names in (("redact.values_env", settings.redact.values_env), ("jobs.pass_env", jobs.pass_env)):
        for number, name in enumerate(names):
            if not _ENV_NAME.fullmatch(name):
                raise InvalidInput(f"{key}[{number}]", f"{name!r} is not a variable's name", "letters, digits and _")
    for kind, function in jobs.kinds.items():
        if not _KIND_NAME.fullmatch(kind) or kind == "steps":
            raise InvalidInput(
                f"jobs.kinds.{kind[:64]}",
                "is not a name for an in-process kind",
                "a small letter, then small letters, digits and _ . -, at most 64; not `steps`",
            )
        if not _FUNCTION.fullmatch(function):
            raise InvalidInput(f"jobs.kinds.{kind}", f"is {_shown(function)}", "module:function")
    if len(host.name) > 253 or not host.name.isprintable():
        raise InvalidInput("host.name", "is not a host's name", "1–253 printable characters")


def _section(path: str, section: type[msgspec.Struct], table: Mapping[str, Any]) -> msgspec.Struct:
    known = keys_of(section)
    values: dict[str, Any] = {}
    for name, raw in table.items():
        if name not in known:
            raise InvalidInput(f"{path}.{name}", _unknown("key", name, known), ", ".join(known))
        type_, key = known[name]
        values[name] = _value(f"{path}.{name}", type_, key, raw)
    for field in msgspec.structs.fields(section):
        if field.required and field.name not in values:
            raise InvalidInput(f"{path}.{field.name}", "is missing", known[field.name][1].allowed)
    return section(**values)


def _value(path: str, type_: Any, key: Key, raw: object) -> Any:
    for word, stands_for in key.words:
        if raw == word:
            return stands_for
    if key.items is not None and isinstance(raw, list):
        return tuple(_item(f"{path}[{number}]", key, value) for number, value in enumerate(raw))
    wrong = InvalidInput(path, "has a value of the wrong type" if key.secret else f"is {_shown(raw)}", key.allowed)
    value: Any
    if key.unit == "plain":
        try:
            value = msgspec.convert(raw, type_, strict=True)
        except msgspec.ValidationError:
            raise wrong from None
    else:
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            raise wrong
        try:
            value = parse_duration(raw) if key.unit == "duration" else parse_size(raw)
        except (InvalidInput, ValueError):
            raise wrong from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        # `not (low <= value)` and not `value < low`: TOML knows nan.
        if (key.low is not None and not value >= key.low) or (key.high is not None and not value <= key.high):
            raise InvalidInput(path, f"is {_shown(raw)}, which is out of range", key.allowed)
    elif value == "" and get_origin(type_) is None:
        raise InvalidInput(path, "is empty", key.allowed)
    return value


def _item(path: str, key: Key, value: object) -> msgspec.Struct:
    assert key.items is not None
    if not isinstance(value, dict):
        raise InvalidInput(path, f"is {_shown(value)}", key.allowed)
    return _section(path, key.items, value)


def _absolute(path: str, value: str) -> None:
    if value and not value.startswith("/"):
        raise InvalidInput(path, f"{value!r} is not an absolute path", "a path that begins with /")


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    import difflib  # only for this sentence: every command that reads the file would pay for it

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown {what}" + (f"; did you mean {near[0]!r}?" if near else "")


def _shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f'"{value[:40]}…"' if len(value) > 41 else f'"{value}"'
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case dict():
            return "a table"
        case _:
            return f"a {type(value).__name__}"
