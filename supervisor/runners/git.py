"""Runs git so that it neither prompts, nor reads the host's configuration, nor shows a credential.

Standard library only. Called by ``checkout`` and ``mirrors``, in the checkout's own process.

All of git's configuration is one generated file in a scratch directory of mode 0700. Passwords lie in files of mode
0600 beside it that git's own ``credential-store`` reads: never in an argument, an environment, a repository's config or
output.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

PASSED_ON = (
    "PATH",
    "SSH_AUTH_SOCK",
    "http_proxy",
    "https_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "all_proxy",
    "ALL_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
)
"""What git needs to know of the host's network. Everything else of the environment is left behind."""

# `hooksPath`, `templateDir`: nothing of the host's runs. `uploadpack`: a mirror or path gives any commit it has.
# `lowSpeed`: a server that stalls ends the fetch instead of holding the job until its timeout.
_CONFIG = """\
[safe]
\tdirectory = *
[core]
\thooksPath = /dev/null
\tfsmonitor = false
\tattributesFile = /dev/null
\texcludesFile = /dev/null
[init]
\tdefaultBranch = main
\ttemplateDir =
[advice]
\tdetachedHead = false
[gc]
\tauto = 0
[maintenance]
\tauto = false
[fetch]
\twriteCommitGraph = false
[submodule]
\trecurse = false
[uploadpack]
\tallowFilter = true
\tallowAnySHA1InWant = true
[http]
\tlowSpeedLimit = 100
\tlowSpeedTime = 120
\tfollowRedirects = {redirects}
[protocol]
\tallow = never
[protocol "ext"]
\tallow = never
[protocol "file"]
\tallow = always
[protocol "git"]
\tallow = always
[protocol "http"]
\tallow = always
[protocol "https"]
\tallow = always
[protocol "ssh"]
\tallow = always
"""


class CheckoutError(Exception):
    """The checkout can't be made; in words for the user. ``code``: 1 the job's fault, 2 the host's."""

    def __init__(self, problem: str, code: int = 1) -> None:
        self.code = code
        super().__init__(problem)


class GitFailed(Exception):
    """A git command ended with an error: what it wrote to stderr."""

    def __init__(self, stderr: str) -> None:
        self.stderr = stderr
        super().__init__(stderr.strip()[-500:])


@dataclass(frozen=True)
class Credential:
    """Who to be where a URL begins with ``url``."""

    url: str
    username: str
    password: str


class Git:
    """git with a configuration of its own. ``scratch`` must be a directory of mode 0700 of this uid."""

    def __init__(
        self,
        scratch: Path,
        credentials: Iterable[Credential] = (),
        *,
        follow_redirects: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        config = _CONFIG.format(redirects="initial" if follow_redirects else "false")
        for number, credential in enumerate(credentials):
            store = scratch / f"credential-{number}"
            _write_private(store, _store_line(credential))
            config += f'[credential "{_origin(credential.url)}"]\n\thelper = store --file={_quoted(store)}\n'
        _write_private(scratch / "gitconfig", config)
        self._env = {name: environ[name] for name in PASSED_ON if name in environ}
        self._env.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
        self._env |= {
            "HOME": str(scratch),
            "XDG_CONFIG_HOME": str(scratch),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": str(scratch / "gitconfig"),
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
            "SSH_ASKPASS_REQUIRE": "never",
            "GIT_NO_REPLACE_OBJECTS": "1",
        }

    def run(self, where: Path, *args: str, feed: bytes | None = None) -> str:
        """What git writes to stdout. Raises GitFailed, or CheckoutError where there is no git."""
        try:
            done = subprocess.run(
                ["git", "-C", str(where), *args],
                # Never go up from a damaged repository into one that happens to hold the state directory.
                env=self._env | {"GIT_CEILING_DIRECTORIES": str(where.parent)},
                input=feed if feed is not None else b"",
                capture_output=True,
                check=False,
            )
        except OSError as error:
            raise CheckoutError(f"git can't be run on this host: {error.strerror}", 2) from error
        if done.returncode != 0:
            raise GitFailed(done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="surrogateescape")

    def try_run(self, where: Path, *args: str) -> str | None:
        """As ``run``, but None where git says no."""
        try:
            return self.run(where, *args)
        except GitFailed:
            return None

    def commit_id(self, where: Path, revision: str) -> str | None:
        """The full id of the commit that a revision names in a repository, if it is there."""
        found = self.try_run(where, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        return found.strip() if found else None


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _store_line(credential: Credential) -> str:
    parts = urlsplit(credential.url)
    user, password = quote(credential.username, safe=""), quote(credential.password, safe="")
    return f"{parts.scheme}://{user}:{password}@{parts.netloc.rpartition('@')[2]}\n"


def _origin(url: str) -> str:
    return re.sub(r'["\\\n]', "", url)


def _quoted(path: Path) -> str:
    """A path inside a config value that a shell reads: git runs helpers through ``sh -c``."""
    shell = "'" + str(path).replace("'", "'\\''") + "'"
    return '"' + shell.replace("\\", "\\\\").replace('"', '\\"') + '"' if "\\" in shell or '"' in shell else shell


_REFUSED = re.compile(
    r"could not read Username|could not read Password|terminal prompts disabled|Authentication failed"
    r"|HTTP Basic: Access denied|returned error: 40[13]|Permission denied|Host key verification failed",
    re.IGNORECASE,
)
_NO_REPOSITORY = re.compile(
    r"does not appear to be a git repository|repository '.*' (not found|does not exist)|Repository not found"
    r"|returned error: 404|not a git repository|No such file or directory|access denied or repository not exported",
    re.IGNORECASE,
)
_NO_COMMIT = re.compile(
    r"couldn't find remote ref|not our ref|unadvertised object|no such remote ref|Server does not allow request"
    r"|upload-pack: not our ref",
    re.IGNORECASE,
)
_UNREACHABLE = re.compile(
    r"Could not resolve host|Failed to connect|Couldn't connect|Connection (refused|timed out|reset)|unable to connect"
    r"|Network is unreachable|Name or service not known|Operation too slow|early EOF|hung up unexpectedly|timed out",
    re.IGNORECASE,
)


def says_no_commit(failure: GitFailed) -> bool:
    """Whether the server lacks what was asked for by name or id, or won't give it by id."""
    return _NO_COMMIT.search(failure.stderr) is not None


def explain_remote(failure: GitFailed, url: str) -> CheckoutError:
    """The failure of a command that talked with a repository, in words that say what to do."""
    text = failure.stderr
    # The order counts: git says "Could not read from remote repository … and the repository exists" after most of them.
    if _REFUSED.search(text):
        return CheckoutError(
            f"{url}: the server asks for a credential, or refuses the one given; name a secret that holds one in "
            f"repository.credential, or set git.credentials in the host's config ({last_line(text)})"
        )
    if _NO_COMMIT.search(text):
        return CheckoutError(f"{url}: the commit is not found ({last_line(text)})")
    if _UNREACHABLE.search(text):
        return CheckoutError(f"{url}: the server can't be reached ({last_line(text)})")
    if _NO_REPOSITORY.search(text):
        return CheckoutError(
            f"{url}: the repository doesn't exist, or may not be read by this host ({last_line(text)})"
        )
    return CheckoutError(f"{url}: {last_line(text)}")


def last_line(stderr: str) -> str:
    """The line of git's that says most: the first ``fatal:`` or ``error:``, else the last one; printable, bounded."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for prefix in ("fatal: ", "error: ", "remote: "):
        for line in lines:
            if line.startswith(prefix):
                return printable(line.removeprefix(prefix))
    return printable(lines[-1]) if lines else "git gave no reason"


def printable(text: str, limit: int = 300) -> str:
    """One line of text from elsewhere, safe to print: no control characters, no half characters, bounded."""
    clean = text.encode(errors="replace").decode()
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in clean)[:limit]
