"""Repositories behind HTTP: credentials go to the server that asks for them, and are seen nowhere else."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkout_world import GIT_ENV, World, git

TOKEN = "t0ken-%2F/@:é that-must-not-be-seen"


class GitServer(ThreadingHTTPServer):
    """``git http-backend`` behind basic authentication; ``seen``: every request's path and what it authorised with."""

    daemon_threads = True

    def __init__(self, root: Path, token: str | None) -> None:
        super().__init__(("127.0.0.1", 0), GitHandler)
        self.root = root
        self.token = token
        self.redirect: str | None = None
        self.seen: list[tuple[str, str | None]] = []
        self.process_lists: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class GitHandler(BaseHTTPRequestHandler):
    server: GitServer

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _serve(self, body: bytes) -> None:
        given = self.headers.get("Authorization")
        self.server.seen.append((self.path, given))
        self.server.process_lists.append(process_list())
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect + self.path)
            self.end_headers()
            return
        if self.server.token is not None:
            wanted = "Basic " + base64.b64encode(f"me:{self.server.token}".encode()).decode()
            if given != wanted:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
                self.end_headers()
                return
        self._backend(body)

    def _backend(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        env = GIT_ENV | {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
        }
        answer = subprocess.run(["git", "http-backend"], env=env, input=body, capture_output=True, check=False).stdout
        head, _, content = answer.partition(b"\r\n\r\n")
        status = re.search(rb"^Status: (\d+)", head, re.MULTILINE)
        self.send_response(int(status[1]) if status else 200)
        for line in head.decode().splitlines():
            name, _, value = line.partition(": ")
            if name != "Status":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def process_list() -> str:
    """Arguments and environment of every process that runs now, as far as may be read."""
    texts = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try:
                texts.append(Path("/proc", pid, name).read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return "\n".join(texts)


def has_backend() -> bool:
    exec_path = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True).stdout.strip()
    return shutil.which("git-http-backend", path=exec_path) is not None


pytestmark = pytest.mark.skipif(not has_backend(), reason="git has no http-backend here")


@pytest.fixture
def server(world: World) -> Iterator[GitServer]:
    world.repository()
    with GitServer(world.root, TOKEN) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def credential(server: GitServer, password: str = TOKEN) -> dict[str, str]:
    return {"url": server.url, "username": "me", "password": password}


def test_a_credential_opens_the_repository_and_is_seen_nowhere(world: World, server: GitServer) -> None:
    repository = {"url": f"{server.url}/origin/.git", "commit": "main"}
    result = world.good(repository, credentials=[credential(server)])
    assert result.tree() == {"README", "lib/a.txt", "doc/b.txt"}
    again = world.good(repository | {"depth": 1}, credentials=[credential(server)])
    assert again.tree() == result.tree()

    encoded = base64.b64encode(f"me:{TOKEN}".encode()).decode()
    secret = [TOKEN, "t0ken", encoded]
    assert any(given == f"Basic {encoded}" for _, given in server.seen)
    places = [result.out, result.err, *server.process_lists]
    for root in (result.src, world.root / "mirrors"):
        places += [path.read_bytes().decode(errors="replace") for path in root.rglob("*") if path.is_file()]
    for place in places:
        assert not [text for text in secret if text in place]


def test_a_password_file_of_the_host_s_by_prefix(world: World, server: GitServer) -> None:
    """The host's credential is for URLs that begin with its own, and no others."""
    password_file = world.root / "password"
    password_file.write_text(f"{TOKEN}\n")
    of_host = {"username": "me", "password_file": str(password_file)}
    repository = {"url": f"{server.url}/origin/.git", "commit": "main"}
    world.good(repository, credentials=[{"url": f"{server.url}/origin/", **of_host}])
    world.bad(repository, credentials=[{"url": f"{server.url}/other/", **of_host}])
    missing = world.checkout(repository, credentials=[{"url": server.url, "username": "me", "password_file": "/none"}])
    assert missing.code == 2
    assert "git.credentials: /none can't be read" in missing.err


@pytest.mark.parametrize("password", [None, "wrong"])
def test_without_the_right_credential_it_ends_at_once(world: World, server: GitServer, password: str | None) -> None:
    """Never a prompt: the error says what to do."""
    credentials = [credential(server, password)] if password else []
    line = world.bad({"url": f"{server.url}/origin/.git", "commit": "main"}, credentials=credentials)
    assert "asks for a credential, or refuses the one given" in line
    assert "repository.credential" in line


def test_a_secret_with_a_line_break_is_refused(world: World, server: GitServer) -> None:
    line = world.bad({"url": f"{server.url}/origin/.git", "commit": "main"}, credentials=[credential(server, "a\nb")])
    assert "line break" in line


def test_a_credential_is_never_sent_to_another_server(world: World, server: GitServer) -> None:
    """Neither by a redirect nor for a submodule that lies elsewhere; and a redirect doesn't get around git.allow."""
    with GitServer(world.root, TOKEN) as other:
        thread = threading.Thread(target=other.serve_forever, daemon=True)
        thread.start()
        server.token, server.redirect = None, other.url
        repository = {"url": f"{server.url}/origin/.git", "commit": "main"}
        world.bad(repository, credentials=[credential(server)])
        assert other.seen
        assert {given for _, given in other.seen} == {None}
        other.seen.clear()
        world.bad(repository, allow=[f"{server.url}/*"])
        assert not other.seen
        other.shutdown()
        thread.join()


def test_repository_and_commit_that_are_not_there(world: World, server: GitServer) -> None:
    server.token = None
    line = world.bad({"url": f"{server.url}/none.git", "commit": "main"})
    assert "the repository doesn't exist" in line
    line = world.bad({"url": f"{server.url}/origin/.git", "commit": "1" * 40, "depth": 1})
    assert "is not found" in line


def test_partial_over_http(world: World, server: GitServer) -> None:
    git(world.root / "origin", "config", "uploadpack.allowFilter", "true")
    result = world.good(
        {"url": f"{server.url}/origin/.git", "commit": "main", "filter": "blob:none", "sparse": ["lib"]},
        credentials=[credential(server)],
    )
    assert result.tree() == {"README", "lib/a.txt"}
