"""What the shepherd does on request, what it refuses, and that no client can hold it up."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from yard import UID_BASE, UID_COUNT, Link, Yard, children, end


def test_a_second_start_is_answered_and_starts_nothing(yard: Yard) -> None:
    step = yard.start("echo once >> log; read x < $GO")
    again = yard.link.ask(do="start", dir=str(step))
    assert (again["ok"], again["again"]) == (True, True)
    yard.go()
    yard.ended(step)
    assert yard.link.ask(do="start", dir=str(step))["again"] is True
    assert (yard.state / "work" / "r-1" / "src" / "log").read_text() == "once\n"


@pytest.mark.root
def test_a_uid_is_one_runs_alone_while_it_lives(uid_yard: Yard) -> None:
    first = uid_yard.start("read x < $GO")
    uid_yard.workspace("r-2")
    second = uid_yard.write_step("true", run="r-2")
    answer = uid_yard.link.ask(do="start", dir=str(second))
    assert (answer["ok"], answer["code"]) == (False, "busy")
    uid_yard.go()
    uid_yard.ended(first)
    assert uid_yard.link.ask(do="start", dir=str(second))["ok"]
    uid_yard.ended(second)


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 1, "one below", "one above", None, -1, True, "0", 1.5])
def test_only_the_hosts_uids_are_given(uid_yard: Yard, uid: object) -> None:
    if uid == "one below":
        uid = uid_yard.uid_base - 1
    elif uid == "one above":
        uid = uid_yard.uid_base + UID_COUNT
    uid_yard.workspace()
    step = uid_yard.write_step("true", **{"uid": uid})
    answer = uid_yard.link.ask(do="start", dir=str(step))
    assert not answer["ok"] and answer["code"] in ("policy", "spec") and answer["error"].startswith("uid: ")
    assert not (step / "claim").exists()
    if uid is not None:
        assert not uid_yard.link.ask(do="workspace", path=str(uid_yard.state / "work" / "r-9"), uid=uid)["ok"]
        assert not (uid_yard.state / "work" / "r-9").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("argv", []),
        ("argv", "echo"),
        ("argv", ["a\0b"]),
        ("argv", [1]),
        ("cwd", None),
        ("env", {"A=B": "1"}),
        ("env", {"A": 1}),
        ("env", []),
        ("timeout", -1),
        ("timeout", "1"),
        ("grace", float("inf")),
        ("max_output", -1),
        ("max_output", 1.5),
        ("token", None),
        ("workspace", None),
        ("private_tmp", "yes"),
    ],
)
def test_a_wrong_spec_is_refused_by_field(shared_yard: Yard, field: str, value: object) -> None:
    shared_yard.workspace()
    step = shared_yard.write_step("true", **{field: value})
    answer = shared_yard.link.ask(do="start", dir=str(step))
    assert (answer["ok"], answer["code"]) == (False, "spec")
    assert answer["error"].startswith(f"{field}: ") or "workspace" in field
    assert sorted(path.name for path in step.iterdir()) == ["spec"]


@pytest.mark.parametrize(
    "path", ["/etc", "runs", "runs/r-1", "runs/../runs/r-1/0", "runs/r-1/0/..", "runs//0", "runs/.x/0", 7]
)
def test_only_steps_below_the_state_directory_are_started(shared_yard: Yard, path: object) -> None:
    named = str(shared_yard.state / path) if isinstance(path, str) else path
    assert shared_yard.link.ask(do="start", dir=named)["code"] in ("policy", "spec")


def test_no_symlink_is_followed_to_a_step_or_a_workspace(shared_yard: Yard) -> None:
    shared_yard.workspace()
    step = shared_yard.write_step("true")
    link = shared_yard.state / "runs" / "r-2"
    link.symlink_to(step.parent)
    assert shared_yard.link.ask(do="start", dir=str(link / "0"))["code"] == "policy"
    (shared_yard.state / "work" / "w-2").symlink_to("/")
    other = shared_yard.write_step("true", index=1, workspace=str(shared_yard.state / "work" / "w-2"))
    assert shared_yard.link.ask(do="start", dir=str(other))["code"] == "policy"
    assert shared_yard.link.ask(do="workspace", path=str(shared_yard.state / "work" / "w-2"), uid=None)["ok"] is False


def test_a_start_without_a_spec_is_refused(shared_yard: Yard) -> None:
    step = shared_yard.state / "runs" / "r-1" / "0"
    step.mkdir(parents=True)
    assert shared_yard.link.ask(do="start", dir=str(step))["error"] == "spec: there is none"


def test_a_workspace_is_the_jobs_alone_and_made_once(yard: Yard) -> None:
    path = yard.workspace()
    (path / "src" / "kept").write_text("")
    yard.workspace()
    for each in (path, path / "src", path / "tmp", path / "home"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
        assert each.stat().st_uid == yard.real_uid()
    assert (path / "src" / "kept").exists()


def test_remove_takes_everything_and_follows_nothing(yard: Yard) -> None:
    outside = yard.state / "outside"
    outside.mkdir()
    (outside / "file").write_text("")
    ended = yard.run(
        f"mkdir -p a/b/c shut && touch a/b/c/d shut/x && ln -s {outside} link && ln -s {outside}/file a/flink"
        " && chmod 0 shut a/b && mkfifo fifo"
    )
    assert ended.how == (0, None, None)
    workspace = yard.state / "work" / "r-1"
    for path in (workspace, ended.step.parent):
        assert yard.link.ask(do="remove", path=str(path)) == {"id": 1, "ok": True}
        assert not path.exists()
        assert yard.link.ask(do="remove", path=str(path))["ok"], "removing is idempotent"
    assert (outside / "file").exists()


_DEEP = ["python3", "-c", "import os\nfor _ in range(3000): os.mkdir('d'); open('f', 'w').close(); os.chdir('d')"]


def test_remove_takes_a_tree_deeper_than_descriptors_or_recursion_go(yard: Yard) -> None:
    """A job can make one, and what can't be removed would keep its uid for ever."""
    yard.run(_DEEP)
    workspace = yard.state / "work" / "r-1"
    assert yard.link.ask(do="remove", path=str(workspace))["ok"]
    assert not workspace.exists()


@pytest.mark.root
def test_a_tree_deeper_than_recursion_goes_is_given_back(uid_yard: Yard) -> None:
    uid_yard.run(_DEEP)
    workspace = uid_yard.state / "work" / "r-1"
    assert uid_yard.link.ask(do="give_back", path=str(workspace))["ok"]
    at = os.open(workspace / "src", os.O_RDONLY)
    for _ in range(3000):
        below = os.open("d", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=at)
        os.close(at)
        at = below
    assert os.fstat(at).st_uid == os.geteuid()
    os.close(at)
    uid_yard.link.ask(do="remove", path=str(workspace))


def test_remove_of_what_is_in_use_is_refused(yard: Yard) -> None:
    step = yard.start("read x < $GO")
    for path in (step.parent, yard.state / "work" / "r-1"):
        assert yard.link.ask(do="remove", path=str(path))["code"] == "busy"
    yard.go()
    yard.ended(step)


@pytest.mark.parametrize("path", ["", "runs", "work", "work/..", "work/r/src", "mirrors/x", "../x"])
def test_remove_of_anything_else_is_refused(shared_yard: Yard, path: str) -> None:
    assert shared_yard.link.ask(do="remove", path=f"{shared_yard.state}/{path}")["code"] == "policy"


@pytest.mark.root
def test_a_workspace_that_is_kept_goes_back_to_the_daemon(uid_yard: Yard) -> None:
    uid_yard.run("mkdir d; touch d/f; ln -s /etc l")
    workspace = uid_yard.state / "work" / "r-1"
    assert uid_yard.link.ask(do="give_back", path=str(workspace))["ok"]
    assert {path.lstat().st_uid for path in (workspace, *workspace.rglob("*"))} == {os.geteuid()}


def test_status_says_what_runs_and_what_is_absent(yard: Yard) -> None:
    step = yard.start("echo $$ > $WORDS; read x < $GO")
    pid = int(yard.word())
    status = yard.link.ask(do="status")
    assert status["protocol"] == 2 and status["pid"] == yard.pid
    (live,) = status["live"]
    assert (live["dir"], live["pid"], live["state"], live["uid"]) == (
        str(step),
        pid,
        "running",
        yard.real_uid() if yard.with_uids else None,
    )
    assert status["isolation"]["users"].startswith("each job" if yard.with_uids else "absent")
    yard.go()
    yard.ended(step)


@pytest.mark.root
def test_the_uids_can_be_set_anew_by_who_started_it(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard(with_uids=True)
    yard.launch()
    assert not yard.link.ask(do="uids", uid_base=0, uid_count=5)["ok"]
    assert yard.link.ask(do="uids", uid_base=yard.uid_base + 1000, uid_count=UID_COUNT)["ok"]
    assert yard.link.ask(do="status")["uid_base"] == yard.uid_base + 1000
    yard.link.ask(do="workspace", path=str(yard.state / "work" / "r-1"), uid=yard.uid_base + 1000)
    assert yard.run("id -u", **{"uid": yard.uid_base + 1000}).out == f"{yard.real_uid()}\n".encode()


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"do":"dance"}\n', b"{}\n", b"\xff\xfe\n", b"\n", b"[" * 5000 + b"\n"]
)
def test_a_line_of_garbage_is_answered(shared_yard: Yard, line: bytes) -> None:
    link = shared_yard.link.connect()
    link.sendall(line)
    assert shared_yard.link.read()["ok"] is False
    assert shared_yard.link.ask(do="status")["ok"]


def test_a_line_without_end_is_cut_off(shared_yard: Yard) -> None:
    link = Link(shared_yard.state)
    connection = link.connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(b"x" * (17 << 20))
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    link.close()
    assert shared_yard.link.ask(do="status")["ok"]


def test_a_client_that_reads_nothing_holds_nothing_up(shared_yard: Yard) -> None:
    deaf = Link(shared_yard.state)
    connection = deaf.connect()
    connection.setblocking(False)
    request = json.dumps({"do": "status", "id": "x" * 30_000}).encode() + b"\n"
    left = request * 400
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        while left:
            left = left[connection.send(left) :]
    assert shared_yard.run("echo hi").out == b"hi\n"
    resident = int(Path(f"/proc/{shared_yard.pid}/statm").read_text().split()[1]) * 4096
    assert resident < 100 << 20
    deaf.close()
    shared_yard.link.close()
    shared_yard.link.connect()


def test_a_clients_death_changes_nothing_for_the_job(yard: Yard) -> None:
    """The daemon is killed while a step runs; the next one finds the end on disk."""
    step = yard.start("echo up > $WORDS; read x < $GO; echo after; exit 8")
    yard.word()
    yard.link.close()
    yard.go()
    yard.link = Link(yard.state)
    ended = yard.ended(step)
    assert ended.how == (8, None, None)
    assert ended.out == b"after\n"


@pytest.mark.root
def test_another_uid_is_not_talked_to(uid_yard: Yard) -> None:
    (uid_yard.state / "shepherd.sock").chmod(0o777)
    link = socket.socket(socket.AF_UNIX)
    os.seteuid(UID_BASE)
    try:
        link.connect(str(uid_yard.state / "shepherd.sock"))
    finally:
        os.seteuid(0)
    link.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        assert link.recv(100) == b""
    link.close()


def test_there_is_one_shepherd_a_directory(yard: Yard) -> None:
    first = yard.pid
    assert yard.launch() == first
    assert yard.link.ask(do="status")["pid"] == first


def test_it_leaves_when_nobody_needs_it(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard(linger=0.2)
    shepherd = yard.launch()
    step = yard.start("echo up > $WORDS; read x < $GO")
    yard.word()
    yard.link.close()
    # Longer than it lingers: a live step keeps it, without any client.
    ended = yard.start("sleep 0.5", index=1)
    yard.ended(ended)
    yard.link.close()
    assert children(shepherd) != []
    yard.go()
    end(shepherd)
    assert (step / "closed").exists()
    assert not (yard.state / "shepherd.sock").exists()
