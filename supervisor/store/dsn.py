"""Connection strings of PostgreSQL: read as libpq reads them, written as asyncpg wants them, shown without secrets.

Both forms are read, the URL and ``key=value``; both may name several hosts with ``target_session_attrs``. asyncpg takes
only URLs, and takes a keyword it doesn't know for a setting of the server: libpq's other keywords are taken out here.
May import ``model.errors``; used by the store's connections, and by whoever shows a DSN.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

import msgspec

from supervisor.model.errors import InvalidInput

FIELD = "database.dsn"
SECRET = frozenset({"password", "sslpassword"})
SESSION_ATTRS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
# Meant for asyncpg itself, or passed on to the server.
KEPT = frozenset(
    {
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "sslpassword",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "sslnegotiation",
        "passfile",
        "service",
        "servicefile",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "application_name",
        "options",
        "client_encoding",
    }
)
# Known to libpq; asyncpg has no use for them. ``connect_timeout`` and those of ``liveness`` are honoured by whoever
# connects.
DROPPED = frozenset(
    {
        "connect_timeout",
        "fallback_application_name",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "gssdelegation",
        "load_balance_hosts",
        "sslcompression",
        "sslcertmode",
        "sslsni",
        "hostaddr",
        "min_protocol_version",
        "max_protocol_version",
    }
)
# What asyncpg would not enforce is refused rather than passed over, but for the values that ask for nothing.
UNENFORCED = {
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "replication": ("false", "off", "no", "0"),
    "require_auth": (),
    "requirepeer": (),
    "sslcrldir": (),
}
NUMBERS = {
    "connect_timeout": "whole seconds",
    "keepalives": "0 or 1",
    "keepalives_idle": "whole seconds",
    "keepalives_interval": "whole seconds",
    "keepalives_count": "a whole number",
    "tcp_user_timeout": "whole milliseconds",
}
SYNONYMS = {"database": "dbname", "username": "user"}


class Host(msgspec.Struct, frozen=True):
    """One server: a name, an address, or the directory of a Unix socket. ``port`` None: the default."""

    name: str
    port: int | None = None

    @property
    def is_socket(self) -> bool:
        return self.name.startswith(("/", "@"))

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name and not self.is_socket else self.name
        return name if self.port is None else f"{name}:{self.port}"


class Dsn(msgspec.Struct, frozen=True):
    """A connection string taken apart. ``options`` holds what is neither host, user, password nor database."""

    hosts: tuple[Host, ...]
    user: str | None
    password: str | None
    database: str | None
    options: dict[str, str]

    def __repr__(self) -> str:
        return f"Dsn({self.safe()})"

    @property
    def connect_timeout(self) -> float | None:
        """Seconds, for one host; None or 0: not limited by the DSN."""
        value = float(self.options.get("connect_timeout", "0"))
        return value if value > 0 else None

    @property
    def session_attrs(self) -> str:
        return self.options.get("target_session_attrs", "any")

    def url(self) -> str:
        """The URL for asyncpg, with the password if there is one."""
        return self._url(self.password, {key: value for key, value in self.options.items() if key in KEPT})

    def safe(self) -> str:
        """The URL for people: no password, nor the mark of one."""
        return self._url(None, {key: value for key, value in self.options.items() if key not in SECRET})

    def _url(self, password: str | None, options: dict[str, str]) -> str:
        who = quote(self.user or "", safe="")
        if password is not None:
            who += ":" + quote(password, safe="")
        # A path can't stand where a host stands, so hosts go into the query as soon as one is a socket.
        query = dict(options)
        where = ",".join(str(host) for host in self.hosts)
        if any(host.is_socket for host in self.hosts):
            where = ""
            query["host"] = ",".join(host.name for host in self.hosts)
            if any(host.port is not None for host in self.hosts):
                query["port"] = ",".join(str(host.port or 5432) for host in self.hosts)
        tail = "&".join(f"{key}={quote(value, safe='/,')}" for key, value in sorted(query.items()))
        url = f"postgresql://{who}@{where}" if who else f"postgresql://{where}"
        url += "/" + quote(self.database or "", safe="")
        return f"{url}?{tail}" if tail else url


def parse(text: str, field: str = FIELD) -> Dsn:
    """Takes a DSN apart. Raises InvalidInput, which names ``field`` and never holds a password."""
    try:
        return _parse(text)
    except InvalidInput as error:
        raise InvalidInput(field, error.problem, error.allowed) from None


def _parse(text: str) -> Dsn:
    stripped = text.strip()
    values = _from_url(stripped) if stripped.startswith(("postgresql://", "postgres://")) else _from_words(stripped)
    for keyword, harmless in UNENFORCED.items():
        if values.pop(keyword, None) not in (None, "", *harmless):
            raise InvalidInput(FIELD, f"{keyword} is not supported", ", ".join(harmless) or "leave it out")
    unknown = sorted(set(values) - KEPT - DROPPED - {"host", "port", "user", "password", "dbname"})
    if unknown:
        raise InvalidInput(FIELD, f"unknown keyword {unknown[0]!r}", "the keywords of libpq")
    options = {key: value for key, value in values.items() if key in KEPT | DROPPED}
    attrs = options.get("target_session_attrs", "any")
    if attrs not in SESSION_ATTRS:
        raise InvalidInput(FIELD, f"target_session_attrs={attrs!r}", ", ".join(SESSION_ATTRS))
    for keyword, allowed in NUMBERS.items():
        number = options.get(keyword, "0")
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise InvalidInput(FIELD, f"{keyword}={number!r}", allowed)
    return Dsn(
        hosts=_hosts(values.get("host", ""), values.get("port", "")),
        user=values.get("user") or None,
        password=values.get("password") or None,
        database=values.get("dbname") or None,
        options=options,
    )


def safe_dsn(text: str) -> str:
    """``text`` fit to be shown: without its password. What can't be read is not shown, as a secret may be in it."""
    try:
        return parse(text).safe()
    except InvalidInput:
        return "(a DSN that can't be read)"


def _hosts(names: str, ports: str) -> tuple[Host, ...]:
    if not names and not ports:
        return ()
    listed = names.split(",")
    numbers = [_port(port) for port in ports.split(",")] if ports else [None]
    if len(numbers) == 1:
        numbers *= len(listed)
    if len(numbers) != len(listed):
        raise InvalidInput(FIELD, f"{len(listed)} hosts and {len(numbers)} ports", "one port for all, or one each")
    return tuple(Host(name or "localhost", port) for name, port in zip(listed, numbers, strict=True))


def _port(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise InvalidInput(FIELD, "a port is not a number", "1 to 65535")
    return int(text)


# --- postgresql://user:password@host:port,host:port/dbname?keyword=value ----------------------------------------


def _from_url(text: str) -> dict[str, str]:
    rest = text.partition("://")[2]
    rest, _, query = rest.partition("?")
    authority, slash, database = rest.partition("/")
    values: dict[str, str] = {}
    who, at, where = authority.rpartition("@")
    if at:
        user, colon, password = who.partition(":")
        values["user"] = _decoded(user)
        if colon:
            values["password"] = _decoded(password)
    if where:
        names, ports = zip(*(_host_and_port(part) for part in where.split(",")), strict=True)
        values["host"] = ",".join(names)
        if any(ports):
            values["port"] = ",".join(ports)
    if slash and database:
        values["dbname"] = _decoded(database)
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(FIELD, "a parameter after '?' has no '='", "keyword=value")
        key = _decoded(key)
        if (key, value) == ("ssl", "true"):
            key, value = "sslmode", "require"
        values[SYNONYMS.get(key, key)] = _decoded(value)
    return values


def _host_and_port(text: str) -> tuple[str, str]:
    if text.startswith("["):
        address, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise InvalidInput(FIELD, "an IPv6 address is not closed", "[address]:port")
        return address, port[1:]
    name, _, port = text.partition(":")
    return _decoded(name), port


def _decoded(text: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise InvalidInput(FIELD, "a percent-encoded part is not UTF-8") from None
    if "\0" in decoded:
        raise InvalidInput(FIELD, "holds a zero byte")
    return decoded


# --- keyword=value keyword='value with spaces' -------------------------------------------------------------------


def _from_words(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    at = 0
    while at < len(text):
        key, equals, _ = text[at:].partition("=")
        name = key.strip()
        if not equals or not name or any(c.isspace() for c in name):
            raise InvalidInput(FIELD, "not a connection string", "postgresql://… or keyword=value …")
        at += len(key) + 1
        while at < len(text) and text[at].isspace():
            at += 1
        value, at = _value(text, at)
        values[SYNONYMS.get(name, name)] = value
        while at < len(text) and text[at].isspace():
            at += 1
    if not values:
        raise InvalidInput(FIELD, "is empty", "embedded, postgresql://… or keyword=value …")
    return values


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at ``at``, and its end: to the next space, or quoted; a backslash takes what follows."""
    quoted = at < len(text) and text[at] == "'"
    at += quoted
    out: list[str] = []
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            out.append(text[at + 1])
            at += 2
            continue
        if quoted and char == "'":
            return "".join(out), at + 1
        if not quoted and char.isspace():
            break
        out.append(char)
        at += 1
    if quoted:
        raise InvalidInput(FIELD, "a quote is not closed", "keyword='value'")
    return "".join(out), at
