"""Directories of runs that are over are used again, and nothing of one job reaches the next."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from yard import Ended, Yard, end, open_files, until


def prepare(yard: Yard, command: str, run: str, number: int = 0, files: dict[str, str] | None = None) -> Path:
    """As the daemon does: the shepherd makes it all."""
    step = yard.step_spec(command, run=run, number=number)
    answer = yard.link.ask(
        do="prepare",
        dir=str(yard.state / "runs" / run),
        files=files or {"spec": '{"run": 1}', "0/spec": json.dumps(step)},
        workspace=step["workspace"],
        uid=yard.uid(number),
    )
    assert answer["ok"], answer
    return yard.state / "runs" / run / "0"


def run(yard: Yard, command: str, run: str, number: int = 0) -> Ended:
    step = prepare(yard, command, run, number)
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    return yard.ended(step)


def remove(yard: Yard, run: str) -> None:
    until(lambda: "fifo.out" not in " ".join(open_files(yard.guardian)), "the guardian has let go of its output")
    paths = [str(yard.state / "work" / run), str(yard.state / "runs" / run)]
    assert yard.link.ask(do="remove", path=paths)["ok"]
    assert not (yard.state / "work" / run).exists() and not (yard.state / "runs" / run).exists()


def spares(yard: Yard, prefix: str) -> list[str]:
    return [name for name in os.listdir(yard.state / "spare") if name.startswith(prefix)]


def inodes(*paths: Path) -> set[int]:
    return {found.stat().st_ino for path in paths for found in (path, *path.rglob("*"))}


def test_a_run_is_prepared_by_one_request_and_only_once(yard: Yard) -> None:
    step = prepare(yard, "echo first", "p-1")
    assert (step.parent / "spec").read_text() == '{"run": 1}'
    assert {stat.S_IMODE(path.stat().st_mode) for path in (step.parent, step)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (step / "spec", step.parent / "spec")} == {0o600}
    prepare(yard, "echo second", "p-1")
    yard.link.ask(do="start", dir=str(step))
    assert yard.ended(step).out == b"first\n"


@pytest.mark.parametrize(
    "files",
    [None, [], {"../x": ""}, {"claim": ""}, {"0/exit": ""}, {"1/plan.json": ""}, {"spec": 1}, {"spec": "\ud800"}],
)
def test_nothing_but_specs_is_written_for_the_daemon(shared_yard: Yard, files: object) -> None:
    answer = shared_yard.link.ask(
        do="prepare",
        dir=str(shared_yard.state / "runs" / "p-1"),
        files=files,
        workspace=str(shared_yard.state / "work" / "p-1"),
        uid=None,
    )
    assert (answer["ok"], answer["code"]) == (False, "spec")
    assert not (shared_yard.state / "work" / "p-1").exists()


def test_directories_are_used_again_under_another_lease_and_uid(yard: Yard) -> None:
    run(yard, "true", "a-1")
    before = inodes(yard.state / "runs" / "a-1", yard.state / "work" / "a-1")
    remove(yard, "a-1")
    ended = run(yard, "echo hi > file; cat file; exit 3", "a-2", number=1)
    assert (ended.out, ended.how) == (b"hi\n", (3, None, None))
    assert before <= inodes(yard.state / "runs" / "a-2", yard.state / "work" / "a-2")
    workspace = yard.state / "work" / "a-2"
    for each in (workspace, *(workspace / part for part in ("src", "tmp", "home"))):
        assert (each.stat().st_uid, stat.S_IMODE(each.stat().st_mode)) == (yard.real_uid(1), 0o700)


def test_nothing_of_a_run_is_left_in_what_is_kept_of_it(yard: Yard) -> None:
    """Its output and its secrets are gone, and no name that says anything of a step is there."""
    ended = run(yard, "echo s3cret; echo s3cret >&2; exit 3", "a-1")
    (ended.step.parent / "redaction").write_text("s3cret")
    spec = json.loads((ended.step / "spec").read_text())
    remove(yard, "a-1")
    (name,) = spares(yard, "r")
    kept = yard.state / "spare" / name
    for path in kept.rglob("*"):
        assert path.name.startswith(".") or path.name in ("0", "fifo.out", "fifo.err")
        assert not path.is_file() or (
            b"s3cret" not in path.read_bytes() and spec["token"].encode() not in path.read_bytes()
        )
    step = prepare(yard, "true", "a-2")
    assert sorted(path.name for path in step.iterdir() if not path.name.startswith(".")) == [
        "fifo.err",
        "fifo.out",
        "spec",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "touch file",
        "mkdir ../more",
        "rmdir ../home",
        "chmod 0755 .",
        "chmod 0711 ..",
        'python3 -c \'import os; os.setxattr(".", "user.x", b"1")\'',
        'setfacl -m u:12345:rwx . || python3 -c \'import os; os.setxattr(".", "user.x", b"1")\'',
        "chattr +d . || touch file",
    ],
)
def test_a_workspace_that_is_not_as_it_was_made_is_not_used_again(yard: Yard, command: str) -> None:
    run(yard, command, "a-1")
    remove(yard, "a-1")
    assert spares(yard, "w") == []


def test_a_fifo_that_somebody_reads_is_not_used_again(yard: Yard) -> None:
    ended = run(yard, "true", "a-1")
    reader = os.open(ended.step / "fifo.out", os.O_RDONLY | os.O_NONBLOCK)
    held = os.fstat(reader).st_ino
    remove(yard, "a-1")
    step = prepare(yard, "echo private", "a-2")
    assert yard.link.ask(do="start", dir=str(step))["ok"]
    yard.ended(step)
    assert os.stat(step / "fifo.out").st_ino != held
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_a_claim_of_a_run_before_claims_nothing(yard: Yard) -> None:
    run(yard, "true", "a-1")
    remove(yard, "a-1")
    step = prepare(yard, "echo again >> ../times; exit 4", "a-2")
    assert not (step / "claim").exists()
    assert yard.link.ask(do="start", dir=str(step)).get("again") is None
    assert yard.ended(step).how == (4, None, None)
    assert yard.link.ask(do="start", dir=str(step))["again"] is True


def test_what_a_killed_shepherd_kept_or_had_half_undone_is_removed_by_the_next(make_yard: Callable[..., Yard]) -> None:
    yard = make_yard()
    yard.launch()
    run(yard, "true", "a-1")
    remove(yard, "a-1")
    assert spares(yard, "r") and spares(yard, "w")
    (yard.state / "spare" / ".rhalf" / "0").mkdir(parents=True)
    (yard.state / "spare" / ".rhalf" / "0" / "exit").write_text("{}")
    yard.link.close()
    killed = yard.pid
    end(killed, signal.SIGKILL)
    until(lambda: yard.pid != killed, "the guardian begins another")
    yard.launch()
    assert os.listdir(yard.state / "spare") == []
    assert run(yard, "echo hi", "a-2").out == b"hi\n"


def test_a_large_run_is_removed_and_not_kept(yard: Yard) -> None:
    run(yard, "head -c 9000000 /dev/zero", "a-1")
    remove(yard, "a-1")
    assert spares(yard, "r") == []
