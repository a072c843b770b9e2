"""Commands against a daemon: what they ask, what they print in a pipe, and with which code they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Done, FakeDaemon, HangUp, attempt, end, job, listing, piece, shown, status

from supervisor.framing import CallTimeout, InternalError
from supervisor.model.errors import (
    BsupError,
    Busy,
    InvalidInput,
    PermissionDenied,
    StoreUnavailable,
    UnknownJob,
    WrongState,
)
from supervisor.model.job import EventRow, State
from supervisor.protocol import (
    AttemptsReply,
    DeleteReply,
    DrainReply,
    EventsReply,
    JobReply,
    ListReply,
    LogsReply,
    LogStream,
    ReloadReply,
    StopReply,
    SubmitReply,
    VersionReply,
)

Bsup = Callable[..., Done]

HI = {"kind": "steps", "steps": [{"name": "hi", "run": ["echo", "hi"]}]}


def replies(*items: Any) -> Callable[[Any], list[Any]]:
    return lambda params: list(items)


def fails(error: Exception) -> Callable[[Any], list[Any]]:
    def answer(params: Any) -> list[Any]:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownJob(7), 4),
        (PermissionDenied("viewer may not stop"), 5),
        (WrongState(7, "running", "only final jobs can be deleted"), 7),
        (StoreUnavailable("the database is away"), 1),
        (Busy("too many"), 1),
        (InvalidInput("id", "is 0", "1 or more"), 2),
        (InternalError("see log 12"), 1),
    ],
)
def test_each_error_of_the_daemon_has_its_exit_code(
    bsup: Bsup, daemon: FakeDaemon, error: BsupError, code: int
) -> None:
    """The codes of the contract; the sentence goes to standard error, nothing to standard output."""
    daemon.answers["Show"] = fails(error)
    done = bsup("show", 7)
    assert (done.code, done.out) == (code, "")
    assert str(error) in done.err
    assert done.err.startswith("bsup: error: ")


@pytest.mark.parametrize(
    "words", [["status"], ["ps"], ["show", "1"], ["logs", "1", "-f"], ["wait", "1"], ["stop", "1"]]
)
def test_no_daemon_is_exit_6_and_says_what_to_do(bsup: Bsup, short_tmp: Path, words: list[str]) -> None:
    done = bsup(*words, "--socket", short_tmp / "none")
    assert done.code == 6
    assert "no daemon at" in done.err
    assert "--socket" in done.err


def test_what_listens_may_not_be_bsup(bsup: Bsup, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDaemon, "_answer", lambda self, connection, call: connection.sendall(b"220 smtp\0"))
    done = bsup("status")
    assert done.code == 6
    assert "does not speak io.bsup.Supervisor" in done.err


def test_submit_prints_the_id_alone(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=12))
    file = tmp_path / "job.yaml"
    file.write_text("kind: steps\nsteps: [{name: hi, run: [echo, hi]}]\n")
    done = bsup("submit", file, "--set", "priority=200", "steps[0].env.A=no", "--after", "3", "4", "--key", "k")
    assert done == Done(0, "12\n", "")
    (asked,) = daemon.asked("Submit")
    assert (asked.key, asked.after, asked.spec["priority"]) == ("k", [3, 4], 200)
    assert asked.spec["steps"][0]["env"] == {"A": "no"}


def test_a_flag_that_takes_several_does_not_swallow_the_file(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=1))
    file = tmp_path / "job.json"
    file.write_text(json.dumps(HI))
    assert bsup("submit", "--after", "3", "4", file).code == 0
    assert bsup("submit", "--set", "name=x", file).code == 0
    assert [(asked.after, asked.spec.get("name")) for asked in daemon.asked("Submit")] == [([3, 4], None), ([], "x")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: steps\nsteps: [{name: a, run: 5}]", ["steps[0].run"]),
        ("kind: steps\nsteps: [{name: a, run: x}]\nlables: [x]", ["lables", "labels"]),
        ("kind: [", ["is not YAML", "line 1"]),
        ("", ["is empty"]),
        ("- a\n- b\n", ["list"]),
        ("kind: steps\nkind: steps\n", ["'kind'", "twice", "line 2"]),
    ],
)
def test_a_bad_job_names_file_and_field_and_is_not_sent(
    bsup: Bsup, daemon: FakeDaemon, tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    done = bsup("submit", file)
    assert (done.code, done.out, daemon.calls) == (2, "", [])
    for word in ["bad.yaml", *words]:
        assert word in done.err


def test_too_large_a_job_is_refused_before_it_is_sent(bsup: Bsup, daemon: FakeDaemon) -> None:
    done = bsup("submit", "-", stdin=json.dumps({**HI, "files": {"big": "x" * (1 << 20)}}).encode())
    assert (done.code, daemon.calls) == (2, [])
    assert "1,048,576" in done.err


def test_a_secret_on_the_command_line_is_warned_of(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=1))
    done = bsup("submit", "-", "--set", "secrets.TOKEN=hunter2", stdin=json.dumps(HI).encode())
    assert (done.code, done.out) == (0, "1\n")
    assert "warning" in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize(
    ("view", "code"),
    [
        (job(7), 0),
        (job(7, State.FAILED), 5),
        (job(7, State.FAILED, exit_code=143, signal=15), 143),
        (job(7, State.FAILED, exit_code=None, signal=9), 137),
        (job(7, State.FAILED, exit_code=None), 1),
        (job(7, State.CANCELED, exit_code=0), 1),
    ],
)
def test_follow_prints_the_log_and_mirrors_the_exit_code(bsup: Bsup, daemon: FakeDaemon, view: Any, code: int) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=7))
    daemon.answers["Logs"] = replies(
        LogsReply(record=piece(b"one\n", 0)),
        LogsReply(record=piece(b"two\xff\n", 4, step=1, stream=LogStream.ERR)),
        LogsReply(end=end(9, view.state)),
    )
    daemon.answers["Wait"] = replies(JobReply(job=view))
    done = bsup("submit", "-", "--follow", stdin=json.dumps(HI).encode())
    assert (done.code, done.out) == (code, "7\none\ntwo\udcff\n")
    assert (done.err == "") == (code == 0)
    assert daemon.asked("Logs")[0].follow


def test_submit_wait_mirrors_too(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=7))
    daemon.answers["Wait"] = replies(JobReply(job=job(7, State.FAILED)))
    assert bsup("submit", "-", "--wait", stdin=json.dumps(HI).encode()).code == 5
    done = bsup("submit", "-", "--wait", "--json", stdin=json.dumps(HI).encode())
    first, last = done.objects
    assert first == {"id": 7}
    assert (last["id"], last["state"], last["exit_code"]) == (7, "failed", 5)


def test_logs_go_on_where_they_were_when_the_daemon_restarts(bsup: Bsup, daemon: FakeDaemon) -> None:
    """A view survives an upgrade of the daemon: it asks again from the next byte, of the attempt it was at."""

    def answer(params: Any) -> Any:
        if params.offset == 0:
            yield LogsReply(record=piece(b"abc", 0))
            raise HangUp
        yield LogsReply(record=piece(b"def\n", params.offset))
        yield LogsReply(end=end(7))

    daemon.answers["Logs"] = answer
    done = bsup("logs", 7, "-f", "--raw")
    assert (done.code, done.out) == (0, "abcdef\n")
    assert [(asked.attempt, asked.offset) for asked in daemon.asked("Logs")] == [(None, 0), (1, 3)]
    assert "waiting for it to come back" in done.err


def test_logs_without_follow_do_not_try_again(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Logs"] = fails(HangUp())
    assert bsup("logs", 7).code == 6


def test_raw_leaves_notes_out_and_plain_keeps_them(bsup: Bsup, daemon: FakeDaemon) -> None:
    note = b"[bsup: stored log cut here]\n"
    daemon.answers["Logs"] = replies(
        LogsReply(record=piece(b"a\0b\n", 0)),
        LogsReply(record=piece(note, 4, stream=LogStream.NOTE)),
        LogsReply(end=end(4 + len(note))),
    )
    assert bsup("logs", 7, "--raw").out == "a\0b\n"
    assert bsup("logs", 7).out == "a\0b\n" + note.decode()
    lines = bsup("logs", 7, "--json").objects
    assert [line.get("text") for line in lines] == ["a\0b\n", note.decode(), None]
    bsup("logs", 7, "--step", "test", "--stream", "err", "--attempt", 2, "--since-offset", 10)
    asked = daemon.asked("Logs")[-1]
    assert (asked.step, asked.stream, asked.attempt, asked.offset) == ("test", "err", 2, 10)


@pytest.mark.parametrize(("typed", "sent"), [("1", "0"), ("3", "2"), ("2024", "2024"), ("build", "build")])
def test_a_steps_number_is_the_one_that_lists_show(bsup: Bsup, daemon: FakeDaemon, typed: str, sent: str) -> None:
    """Lists count steps from 1, the protocol from 0; a step that is called like a number goes by its name."""
    spec = {"repository": {"url": "/r", "commit": "c0"}, "steps": [{"name": "build"}, {"name": "2024"}]}
    daemon.answers["Show"] = replies(shown(job(7), spec=spec))
    daemon.answers["Logs"] = replies(LogsReply(end=end(0)))
    assert bsup("logs", 7, "--step", typed).code == 0
    assert daemon.asked("Logs")[-1].step == sent
    for beyond in ("0", "4"):
        assert bsup("logs", 7, "--step", beyond).code == 2


def test_a_database_that_is_away_is_not_taken_for_the_daemons_socket(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Show"] = fails(StoreUnavailable("connect: [Errno 111] Connection refused"))
    done = bsup("show", 7)
    assert done.code == 1
    assert "error: the database is away: connect:" in done.err


def test_a_steps_number_is_known_without_the_database(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Show"] = fails(StoreUnavailable("away"))
    daemon.answers["Logs"] = replies(LogsReply(end=end(0)))
    assert bsup("logs", 7, "--step", "2").code == 0
    assert daemon.asked("Logs")[-1].step == "1"


def test_wait_ends_as_the_first_in_order_that_failed(bsup: Bsup, daemon: FakeDaemon) -> None:
    over = [job(9, State.FAILED, exit_code=3), job(7), job(8, State.FAILED, exit_code=4)]
    daemon.answers["Wait"] = replies(*(JobReply(job=one) for one in over))
    done = bsup("wait", 7, 8, 9)
    assert (done.code, len(done.out.splitlines())) == (4, 3)
    assert bsup("wait", 7, 8, 9, "--any").code == 3


def test_wait_times_out_with_124(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Wait"] = fails(CallTimeout("not over"))
    done = bsup("wait", 7, "--timeout", "200ms")
    assert done.code == 124
    assert daemon.asked("Wait")[0].timeout == pytest.approx(0.2, abs=0.1)


def test_ps_in_a_pipe_is_whole_and_plain(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = listing(job(7, State.RUNNING, name="x" * 200), job(8, State.READY, labels=["docker"]))
    done = bsup("ps", "--state", "running,ready", "--kind", "steps", "--label", "docker", "--limit", 5)
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "x" * 200 in done.out
    assert "2/5 test" in done.out
    asked = daemon.asked("List")[0]
    assert (asked.states, asked.kinds, asked.labels, asked.limit) == (["running", "ready"], ["steps"], ["docker"], 5)
    for line in bsup("ps", "--json").objects:
        assert {"id", "state", "kind", "exit_code"} <= line.keys()


def test_ps_tells_when_it_is_not_all(bsup: Bsup, daemon: FakeDaemon) -> None:
    notice = "the database is away: only jobs that run on this host"
    daemon.answers["List"] = replies(ListReply(job=job(7, State.RUNNING), partial=True, notice=notice))
    done = bsup("ps")
    assert done.code == 0
    assert notice in done.err


def test_show_is_one_object_with_the_job_on_top(bsup: Bsup, daemon: FakeDaemon) -> None:
    view = job(7, State.FAILED, error="step build: exit code 5", losses=1, failures=1)
    daemon.answers["Show"] = replies(shown(view, attempts=[attempt(1), attempt(2)], parents=[3]))
    (line,) = bsup("show", 7, "--json").objects
    assert (line["id"], line["state"], line["exit_code"], line["attempts"]) == (7, "failed", 5, 1)
    assert [one["attempt"] for one in line["attempt_list"]] == [1, 2]
    text = bsup("show", 7).out
    for words in (
        "step build: exit code 5",
        "1 lost host",
        "/r at c0",
        "checkout",
        "skipped",
        "attempt 2 failed",
        "1m02s",
    ):
        assert words in text


def test_attempts(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Attempts"] = replies(AttemptsReply(attempt=attempt(1)), AttemptsReply(attempt=attempt(2, None)))
    lines = bsup("attempts", 7, "--json").objects
    assert [(line["id"], line["attempt"], line["outcome"]) for line in lines] == [(7, 1, "failed"), (7, 2, None)]
    assert "attempt 2 running on build1" in bsup("attempts", 7).out


def test_stop_says_what_it_did(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Stop"] = replies(StopReply(id=7, did="stopping"), StopReply(id=8, did="canceled", is_over=True))
    done = bsup("stop", 7, 8, "--grace", "1m", "--kill")
    assert (done.code, done.out) == (0, "7 stopping\n8 was over already: canceled\n")
    asked = daemon.asked("Stop")[0]
    assert (asked.ids, asked.grace, asked.kill) == ([7, 8], 60.0, True)


def test_stop_of_what_is_over_is_exit_3(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Stop"] = replies(StopReply(id=8, did="canceled", is_over=True))
    assert bsup("stop", 8).code == 3


def test_stop_that_reached_nobody_is_an_error(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Stop"] = replies(StopReply(id=8, did="unavailable", recorded=False))
    assert bsup("stop", 8).code == 1


def test_filters_show_what_would_be_hit_and_need_yes(bsup: Bsup, daemon: FakeDaemon) -> None:
    """Nothing is done before a yes; what the verb can't be done to is not meant."""
    daemon.answers["List"] = listing(job(7, State.RUNNING), job(8), job(9, State.FAILED))
    daemon.answers["Stop"] = lambda params: [StopReply(id=one, did="stopping") for one in params.ids]
    daemon.answers["Retry"] = lambda params: [JobReply(job=job(one, State.READY)) for one in params.ids]
    daemon.answers["Delete"] = lambda params: [DeleteReply(deleted=len(params.ids))]
    done = bsup("stop", "--all")
    assert done.code == 2
    assert "job-7" in done.err
    assert "--yes" in done.err
    assert daemon.asked("Stop") == []
    assert bsup("stop", "--all", "--yes").code == 0
    assert daemon.asked("Stop")[0].ids == [7]
    assert bsup("retry", "--all", "-y").out == "9 ready\n"
    assert bsup("delete", "--state", "succeeded,failed", "-y").out == "deleted 2 jobs\n"
    assert bsup("delete", "--state", "running", "-y").code == 3


def test_filters_that_match_nothing_are_exit_3(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = listing()
    assert bsup("stop", "--label", "x", "--yes").code == 3


@pytest.mark.parametrize(
    "words",
    [
        ["stop"],
        ["stop", "7", "--all"],
        ["show"],
        ["show", "x"],
        ["show", "0"],
        ["ps", "--state", "runing"],
        ["ps", "--limit", "0"],
        ["nonsense"],
        ["wait", "7", "--timeout", "soon"],
        ["logs", "7", "--stream", "both"],
        ["--nonsense", "ps"],
        ["submit"],
        ["submit", "--after", "1", "2"],
        ["config", "look"],
    ],
)
def test_usage_is_exit_2(bsup: Bsup, daemon: FakeDaemon, words: list[str]) -> None:
    done = bsup(*words)
    assert (done.code, done.out) == (2, "")
    assert "error: " in done.err


def test_status_says_in_words_what_is_wrong(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = replies(status())
    done = bsup("status")
    assert done.out.splitlines()[0] == "build1: all is well"
    assert "2 jobs of 4 slots" in done.out
    daemon.answers["Status"] = replies(status("the database has been away for 12 s", available=False))
    done = bsup("status")
    assert done.code == 0
    assert done.out.splitlines()[:2] == ["build1: 1 thing is wrong", "  ! the database has been away for 12 s"]
    assert "away since" in done.out
    (line,) = bsup("status", "--json").objects
    assert (line["ok"], line["database"]["available"]) == (False, False)


def test_global_flags_stand_anywhere(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = replies(status())
    for words in (["--json", "status"], ["status", "--json"], ["--socket", daemon.path, "status", "--json"]):
        assert bsup(*words).objects[0]["host"] == "build1"
    assert bsup(f"--socket={daemon.path}", "--json", "status").objects[0]["host"] == "build1"


def test_the_socket_of_the_environment_and_of_the_file(
    bsup: Bsup, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    daemon.answers["Status"] = replies(status())
    from supervisor.cli.entry import main

    monkeypatch.setenv("BSUP_SOCKET", str(daemon.path))
    assert main(["status"]) == 0
    monkeypatch.delenv("BSUP_SOCKET")
    file = tmp_path / "bsup.toml"
    file.write_text(f'[control]\nsocket = "{daemon.path}"\n')
    monkeypatch.setenv("BSUP_CONFIG", str(file))
    assert main(["status"]) == 0
    monkeypatch.setenv("BSUP_CONFIG", str(tmp_path / "none.toml"))
    assert main(["status", "--config", str(file)]) == 0


def test_drain_resume_reload(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["Drain"] = lambda params: [DrainReply(running=0 if params.wait else 2)]
    daemon.answers["Reload"] = replies(ReloadReply(changed={"log.level": "debug"}))
    assert "2 jobs still running" in bsup("drain", "--deadline", "10m").out
    assert daemon.asked("Drain")[0].deadline == 600
    assert "drained" in bsup("drain", "--wait").out
    assert bsup("reload").out == "log.level: debug\n"


def test_events_follow_goes_on_after_what_was_shown(bsup: Bsup, daemon: FakeDaemon) -> None:
    def answer(params: Any) -> list[Any]:
        from cli_world import AT

        row = EventRow(id=4 if params.follow else 3, at=AT, job=7, type="lost", detail={"host": "b"})
        return [EventsReply(event=row)]

    daemon.answers["Events"] = answer
    assert [line["id"] for line in bsup("events", "--json").objects] == [3]
    assert [line["id"] for line in bsup("events", "-f", "--json").objects] == [3, 4]
    assert daemon.asked("Events")[-1].after == 3
    assert "job 7 lost host=b" in bsup("events").out


def test_version_needs_no_daemon(bsup: Bsup, daemon: FakeDaemon, short_tmp: Path) -> None:
    daemon.answers["Version"] = replies(VersionReply(version="9.9.9", interface="io.bsup.Supervisor", python="3.11"))
    done = bsup("version")
    assert "daemon 9.9.9" in done.out
    assert "another version" in done.err
    assert bsup("version", "--socket", short_tmp / "none").code == 0
    assert bsup("--version", "--json").objects[0]["daemon"] == "9.9.9"


def test_a_reader_that_goes_away_is_not_an_error_to_speak_of(
    daemon: FakeDaemon,
) -> None:
    import subprocess
    import sys

    daemon.answers["List"] = listing(*(job(n, name="x" * 2000) for n in range(1, 500)))
    bsup = f"{sys.executable} -m supervisor ps --all --socket {daemon.path}"
    done = subprocess.run(["bash", "-c", f"{bsup} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"
