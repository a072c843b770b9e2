"""Git URLs: which are valid, which a host allows, and what a submodule's relative one means. No I/O.

Imports only ``errors`` and the standard library: the checkout, a process of its own that must start fast, uses it too.
Called by ``spec`` and ``runners.checkout``. A URL that may hold a password is never quoted in an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from supervisor.model.errors import InvalidInput

URL_FORM = "http://, https://, ssh://, git:// or file:// URLs, user@host:path, absolute paths"
SCHEMES = frozenset({"http", "https", "ssh", "git", "file"})
MAX_URL = 2048

_FULL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)", re.ASCII | re.DOTALL)
_SCP_LIKE = re.compile(r"(?:([A-Za-z0-9._-]+)@)?([A-Za-z0-9][A-Za-z0-9.-]*):(?!//)(.+)", re.ASCII | re.DOTALL)


def check_url(url: str, field: str) -> str:
    """The URL's scheme: http, https, ssh, git, file, or "path". Raises InvalidInput without quoting the URL."""
    if not url or len(url) > MAX_URL or url.startswith("-") or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise InvalidInput(field, "is not a git URL", URL_FORM)
    if re.search(r"(^|[/:])(\.|%2[eE]){2}(/|$)", url):
        raise InvalidInput(field, "holds `..`", URL_FORM)
    if url.startswith("/"):
        return "path"
    if match := _FULL.fullmatch(url):
        return _check_full(match[1].lower(), url, field)
    # `transport::address` names a remote helper, of which `ext::` runs any command.
    if "::" not in url and _SCP_LIKE.fullmatch(url):
        return "ssh"
    raise InvalidInput(field, "is not a git URL", URL_FORM)


def _check_full(scheme: str, url: str, field: str) -> str:
    if scheme not in SCHEMES:
        raise InvalidInput(field, f"has the scheme {scheme[:20]!r}", URL_FORM)
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError where the port is no number
    except ValueError:
        raise InvalidInput(field, "is not a git URL", URL_FORM) from None
    if parts.password is not None or (scheme in ("http", "https") and "@" in parts.netloc):
        raise InvalidInput(
            field,
            "holds a user or password",
            "put the password in `secrets` and name it in `repository.credential`",
        )
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise InvalidInput(field, "is not the URL of a local path", "file:///path")
    elif not parts.hostname or parts.hostname.startswith("-"):
        raise InvalidInput(field, "names no host", URL_FORM)
    elif len(parts.path) < 2:
        raise InvalidInput(field, "names no repository", URL_FORM)
    return scheme


def is_allowed(url: str, patterns: Sequence[str]) -> bool:
    """Whether one of the host's patterns matches the whole URL.

    ``*`` alone allows everything. In the host's part ``*`` stops at ``/``, so that ``https://*.example.org/*`` does not
    allow ``https://evil.test/.example.org/x``; in the path it crosses it. ``user@host:path`` is compared as
    ``ssh://host/path``, a path as itself and as ``file://``; users and a port's absence count for nothing.
    """
    forms = _forms(url)
    return any(pattern == "*" or any(_pattern(pattern).fullmatch(form) for form in forms) for pattern in patterns)


def _forms(url: str) -> list[str]:
    if url.startswith("/"):
        return [url, f"file://{url}"]
    if full := _FULL.fullmatch(url):
        scheme, rest = full[1].lower(), full[2]
        host, slash, path = rest.partition("/")
        if scheme == "file":
            return [f"file:///{path}", f"/{path}"]
        return [f"{scheme}://{host.rpartition('@')[2].lower()}{slash}{path}"]
    if scp := _SCP_LIKE.fullmatch(url):
        return [f"ssh://{scp[2].lower()}/{scp[3].lstrip('/')}"]
    return [url]


def _pattern(pattern: str) -> re.Pattern[str]:
    if scp := re.fullmatch(r"(?:[^@/]+@)?([^:/]+):(?!//)(.+)", pattern):
        pattern = f"ssh://{scp[1]}/{scp[2].lstrip('/')}"
    scheme, separator, rest = pattern.partition("://")
    if not separator:
        return re.compile(_translate(pattern, ".*"), re.DOTALL)
    host, slash, path = rest.partition("/")
    # A pattern without a path allows the whole host.
    tail = slash + _translate(path, ".*") if slash else "/.*"
    start = _translate(scheme, "[a-z]*") + "://" + _translate(host.lower(), "[^/]*")
    return re.compile(start + tail, re.DOTALL)


def _translate(text: str, star: str) -> str:
    return star.join(re.escape(part) for part in text.split("*"))


def resolve_submodule_url(url: str, parent: str) -> str:
    """What the URL in a ``.gitmodules`` means: ``./x`` and ``../x`` are relative to the parent repository's URL.

    As ``git submodule`` has it: each ``../`` takes a part off the parent's URL, at a ``/``, or at the ``:`` of
    ``host:path``. Raises InvalidInput where there is none left.
    """
    if not url.startswith(("./", "../")):
        return url
    base, separator, rest = parent.rstrip("/"), "/", url
    while rest.startswith(("./", "../")):
        if rest.startswith("./"):
            rest = rest[2:]
            continue
        rest = rest[3:]
        head, slash, _ = base.rpartition("/")
        if slash and ("://" not in base or not head.endswith(("/", ":"))):
            base = head
        elif not slash and ":" in base:
            base, separator = base.rpartition(":")[0], ":"
        else:
            raise InvalidInput("submodule", "has a relative URL that leaves its parent's", URL_FORM)
    return base + separator + rest
