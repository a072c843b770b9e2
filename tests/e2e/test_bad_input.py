"""Bad input: a clear error that names the field, what was wrong and what is allowed; nothing else happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, steps

Start = Callable[..., Daemon]

HI = {"name": "hi", "run": ["echo", "hi"]}

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"kind": "steps", "steps": [HI], "stepz": 1}, ["stepz"]),
    "unknown key of a step": ({"kind": "steps", "steps": [{**HI, "enviroment": {}}]}, ["steps[0]", "enviroment"]),
    "wrong type": ({"kind": "steps", "steps": [{"name": "a", "run": 5}]}, ["steps[0].run"]),
    "wrong duration": ({"kind": "steps", "steps": [HI], "timeout": "soon"}, ["timeout", "soon"]),
    "missing commit": ({"kind": "steps", "steps": [HI], "repository": {"url": "/x"}}, ["repository", "commit"]),
    "parent path": ({"kind": "steps", "steps": [HI], "files": {"../x": "y"}}, ["files", "../x"]),
    "absolute path": ({"kind": "steps", "steps": [HI], "files": {"/etc/x": "y"}}, ["files", "/etc/x"]),
    "container step": ({"kind": "steps", "steps": [{**HI, "image": "debian"}]}, ["steps[0].image", "container"]),
    "no steps": ({"kind": "steps", "steps": []}, ["steps"]),
    "unknown kind": ({"kind": "stepps", "steps": [HI]}, ["kind", "stepps"]),
}


@pytest.fixture
def daemon(daemons: Start) -> Daemon:
    return daemons()


def test_bad_jobs_are_refused_whole(daemon: Daemon) -> None:
    """Each names its field; none leaves a job behind."""
    for what, (job, words) in BAD.items():
        done = daemon.cli.run("submit", "-", stdin=json.dumps(job), check=False)
        text = done.stderr.decode()
        assert done.returncode in (1, 2), what
        assert done.stdout == b"", what
        for word in words:
            assert word in text, f"{what}: {word!r} not in {text!r}"
    assert daemon.cli.lines("ps", "--all") == []


def test_bad_ids_and_states(daemon: Daemon) -> None:
    """Exit 4 for an id that does not exist, 7 for a state that does not allow it."""
    job = daemon.cli.submit(steps("true"))
    assert daemon.cli.wait(job) == 0
    assert daemon.cli.run("show", "999999", check=False).returncode == 4
    assert daemon.cli.run("logs", "999999", check=False).returncode == 4
    running = daemon.cli.submit(steps("sleep 1000"))
    assert daemon.cli.run("delete", str(running), "--yes", check=False).returncode == 7
    assert daemon.cli.run("retry", str(running), "--yes", check=False).returncode == 7
    assert daemon.cli.run("wait", str(running), "--timeout", "0.2", check=False).returncode == 124
    daemon.cli.run("stop", str(running), "--kill")


def test_what_only_the_host_can_find_out(daemon: Daemon, short_dir: Path) -> None:
    """Repository that is not there, command not found, file through a symlink: the job fails and says why."""
    repo = short_dir / "repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(repo)]
    subprocess.run([*git, "init", "-q"], check=True)
    (repo / "out").symlink_to("/tmp")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    cases = [
        ({"kind": "steps", "steps": [HI], "repository": {"url": str(short_dir / "none"), "commit": "HEAD"}}, "none"),
        ({"kind": "steps", "steps": [HI], "repository": {"url": str(repo), "commit": "f" * 40}}, "ffff"),
        (steps(["no-such-command-here"]), "no-such-command-here"),
        (
            {
                "kind": "steps",
                "steps": [HI],
                "repository": {"url": str(repo), "commit": "HEAD"},
                "files": {"out/x": "y"},
            },
            "out/x",
        ),
        ({"kind": "steps", "steps": [{**HI, "dir": "out"}], "repository": {"url": str(repo), "commit": "HEAD"}}, "out"),
    ]
    for job, word in cases:
        number = daemon.cli.submit(job)
        assert daemon.cli.wait(number) != 0, job
        shown = daemon.cli.show(number)
        assert shown["state"] == "failed"
        assert word in (shown["error"] or ""), shown
    assert not Path("/tmp/x").exists()


def test_garbage_on_the_socket_harms_nobody(daemon: Daemon) -> None:
    """Too large a frame, garbage, a client that reads nothing: dropped, and the others are served."""
    for payload in (b"x" * (2 << 20), b"\xff\xfe{{{\0", b"[]\0", b'{"method":5}\0'):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(20)
            s.connect(str(daemon.socket))
            try:
                s.sendall(payload)
                s.recv(65536)
            except OSError:
                pass
        assert daemon.cli.run("status").returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_viewer_cannot_stop_and_a_stranger_cannot_look(daemons: Start) -> None:
    """Exit 5 and nothing changed for a call beyond the peer's role."""
    daemon = daemons("a", config="[roles]\nviewer = [65534]\n")
    job = daemon.cli.submit(steps("sleep 1000"))

    def as_uid(uid: int, *args: str) -> subprocess.CompletedProcess[bytes]:
        """The command as another user. The interpreter may be out of that user's reach: the same words are said once as
        root, for an id that nothing has, so that all is loaded before the user is changed."""
        words = [*args, "--socket", str(daemon.socket)]
        first = [word.replace(str(job), "999999") if word == str(job) else word for word in words]
        code = (
            "import os, sys; from supervisor.cli.entry import main; sys.stdout = open(os.devnull, 'w')\n"
            f"main({first!r}); sys.stdout = sys.__stdout__\n"
            f"os.setgroups([]); os.setgid({uid}); os.setuid({uid}); sys.exit(main({words!r}))"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    looked = as_uid(65534, "status")
    stopped = as_uid(65534, "stop", str(job))
    stranger = as_uid(65533, "status")
    assert stopped.returncode == 5, stopped.stderr
    assert stranger.returncode == 5, stranger.stderr
    assert looked.returncode == 0, looked.stderr
    assert daemon.cli.state(job) in ("ready", "running")
    assert daemon.cli.show(job).get("stop_asked_at") is None
    daemon.cli.run("stop", str(job), "--kill")
