"""How steps begin and end by themselves: exit codes, signals, what a step is given, and what can't be executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from yard import Yard


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("exit 0", (0, None, None)),
        ("exit 3", (3, None, None)),
        ("exit 255", (255, None, None)),
        ("kill -TERM $$", (None, 15, None)),
        ("kill -SEGV $$", (None, 11, None)),
    ],
)
def test_how_it_ended_is_on_disk(yard: Yard, command: str, how: tuple[int | None, int | None, str | None]) -> None:
    ended = yard.run(command)
    assert ended.how == how
    assert ended.exit is not None and ended.exit["output_closed"] and ended.closed["output_closed"]
    assert not ended.closed["gone"]


def test_started_names_the_process_and_the_boot(yard: Yard) -> None:
    ended = yard.run("echo $$")
    started = json.loads((ended.step / "started").read_text())
    assert started["pid"] == int(ended.out)
    assert started["start_time"] > 0
    assert started["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert ended.exit is not None and started["at"] <= ended.exit["at"] <= ended.closed["at"]


def test_a_step_is_a_session_of_its_own_with_clean_signals_umask_and_files(yard: Yard) -> None:
    ended = yard.run(
        "cut -d' ' -f6 /proc/$$/stat; echo $$; umask; grep -E 'Sig(Blk|Ign)' /proc/self/status;"
        "readlink /proc/self/fd/0; ls /proc/$$/fd"
    )
    session, pid, umask, blocked, ignored, stdin, *files = ended.out.decode().splitlines()
    assert session == pid
    assert umask == "0022"
    # 32 and 33 are the C library's own (threads): no program can set them, and make hands them on ignored.
    own = 0b11 << 31
    assert int(blocked.split()[1], 16) & ~own == 0
    assert int(ignored.split()[1], 16) & ~own == 0
    assert stdin == "/dev/null"
    assert files == ["0", "1", "2"]


def test_the_environment_is_the_specs_and_no_other(yard: Yard) -> None:
    ended = yard.run(["env"], env={"A": "1", "BSUP_RUN": "a lie"})
    workspace = yard.state / "work" / "r-1"
    found = dict(line.split("=", 1) for line in ended.out.decode().splitlines())
    assert found.pop("PATH").startswith("/usr/local/sbin:")
    assert found == {
        "A": "1",
        "BSUP_RUN": f"{yard.token}-r-1-0",
        "HOME": f"{workspace}/home",
        "TMPDIR": f"{workspace}/tmp",
    }


def test_no_privilege_can_be_gained(yard: Yard) -> None:
    assert b"NoNewPrivs:\t1" in yard.run("grep NoNewPrivs /proc/self/status").out


@pytest.mark.root
def test_it_runs_as_its_own_uid_in_its_own_workspace(uid_yard: Yard) -> None:
    ended = uid_yard.run("id -u; id -g; id -G; pwd; touch file; stat -c %a:%u .. file")
    workspace = uid_yard.state / "work" / "r-1"
    uid = str(uid_yard.real_uid())
    assert ended.out.decode().split() == [uid, uid, uid, f"{workspace}/src", f"700:{uid}", f"644:{uid}"]


@pytest.mark.root
def test_tmp_is_private_and_gone_with_the_workspace(uid_yard: Yard) -> None:
    first = uid_yard.run("echo secret > /tmp/x-$BSUP_RUN && ls /tmp | grep x-; pwd", private_tmp=True)
    assert first.out.decode().splitlines()[0] == f"x-{uid_yard.token}-r-1-0"
    assert first.out.decode().splitlines()[1] == f"{uid_yard.state}/work/r-1/src"
    assert not Path(f"/tmp/x-{uid_yard.token}-r-1-0").exists()
    assert json.loads((first.step / "started").read_text())["private_tmp"] is True
    second = uid_yard.run("ls -A /tmp | grep x-; echo $TMPDIR", run="r-2", number=1, private_tmp=True)
    assert second.out == b"/tmp\n"


@pytest.mark.root
def test_own_gives_the_tree_to_the_job_but_no_file_with_another_name(uid_yard: Yard) -> None:
    """A clone may hard-link a mirror's objects; symlinks may lead anywhere."""
    workspace = uid_yard.state / "work" / "r-1"
    uid_yard.link.ask(do="workspace", path=str(workspace), uid=None)
    src = workspace / "src"
    (src / "deep").mkdir()
    (src / "deep" / "file").write_text("x")
    mirrored = uid_yard.state / "mirrored"
    mirrored.write_text("shared")
    (src / "linked").hardlink_to(mirrored)
    (src / "out").symlink_to(mirrored)
    (src / "outdir").symlink_to(uid_yard.state / "runs")
    assert uid_yard.link.ask(do="own", path=str(workspace), uid=uid_yard.uid())["ok"]
    ended = uid_yard.run("cat linked; touch deep/new")
    assert ended.how == (0, None, None)
    assert ended.out == b"shared"
    assert {path.lstat().st_uid for path in (workspace, src, src / "deep" / "file", src / "out", src / "outdir")} == {
        uid_yard.real_uid()
    }
    assert mirrored.stat().st_uid == 0
    assert (uid_yard.state / "runs").stat().st_uid == 0


@pytest.mark.root
def test_a_service_step_runs_as_the_daemon(uid_yard: Yard) -> None:
    assert uid_yard.run("id -u", as_service=True).out == b"0\n"


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (["no-such-command"], 127, "command not found: no-such-command"),
        (["./no-such"], 127, "command not found: ./no-such"),
        (["./not-executable"], 126, "permission denied: ./not-executable"),
        (["./bad-interpreter"], 127, "interpreter of ./bad-interpreter not found"),
        (["./binary"], 126, "./binary: Exec format error"),
        (["/etc/passwd/x"], 127, "command not found: /etc/passwd/x"),
        (["true", "x" * 200_000], 126, "argument list too long"),
    ],
)
def test_what_cant_be_executed_says_so_in_words(yard: Yard, argv: list[str], code: int, error: str) -> None:
    src = yard.workspace() / "src"
    (src / "not-executable").write_text("echo hi")
    (src / "bad-interpreter").write_text("#!/no/such/interpreter\n")
    (src / "binary").write_bytes(b"\0\1\2")
    for name, mode in (("not-executable", 0o644), ("bad-interpreter", 0o755), ("binary", 0o755)):
        (src / name).chmod(mode)
    ended = yard.run(argv)
    assert ended.how == (code, None, "exec")
    assert ended.exit is not None and error in ended.exit["error"]


@pytest.mark.parametrize(
    ("cwd", "code", "error"),
    [
        ("src/none", 127, "directory not found: src/none"),
        ("src/file", 126, "not a directory: src/file"),
        ("..", 126, "leads out of the workspace"),
        ("src/../../..", 126, "leads out of the workspace"),
        ("/etc", 126, "leads out of the workspace"),
        ("src/link", 126, "leads out of the workspace"),
        ("src/deep/link/link", 126, "leads out of the workspace"),
    ],
)
def test_a_directory_outside_the_workspace_is_refused(yard: Yard, cwd: str, code: int, error: str) -> None:
    src = yard.workspace() / "src"
    (src / "file").write_text("")
    (src / "link").symlink_to("/usr")
    (src / "deep").mkdir(mode=0o755)
    (src / "deep" / "link").symlink_to("..")
    ended = yard.run("pwd", cwd=cwd)
    assert ended.how == (code, None, "exec"), ended.out
    assert ended.exit is not None and error in ended.exit["error"]
    assert ended.out == b""


def test_a_link_that_stays_inside_is_followed(yard: Yard) -> None:
    (yard.workspace() / "src" / "link").symlink_to("../home")
    ended = yard.run("pwd -P", cwd="src/link")
    assert ended.out.decode().strip() == str(yard.state / "work" / "r-1" / "home")


@pytest.mark.root
def test_a_state_directory_that_jobs_cant_reach_is_named(uid_yard: Yard) -> None:
    uid_yard.workspace()
    uid_yard.state.chmod(0o700)
    ended = uid_yard.run("true")
    assert ended.how == (126, None, "exec")
    assert ended.exit is not None and f"may not pass {uid_yard.state}" in ended.exit["error"]


def test_steps_of_a_run_follow_one_another_and_share_the_workspace(yard: Yard) -> None:
    yard.run("echo 1 > file")
    assert yard.run("cat file", index=1).out == b"1\n"


def test_many_steps_run_at_once(shared_yard: Yard) -> None:
    command = "echo up > $WORDS; read x < $GO; echo done"
    steps = [shared_yard.start(command, index=index) for index in range(40)]
    for _ in steps:
        shared_yard.word()
    assert len(shared_yard.link.ask(do="status")["live"]) == 40
    shared_yard.go(40)
    for step in steps:
        assert shared_yard.ended(step).out == b"done\n"
