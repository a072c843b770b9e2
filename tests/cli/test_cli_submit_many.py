"""``submit --many`` and ``submit --kind``: what is sent, and what is said of it, whatever goes wrong in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_world import Done, FakeDaemon, HangUp

from supervisor.cli import submit_many
from supervisor.model.errors import BsupError, InvalidInput, PermissionDenied, StoreUnavailable
from supervisor.protocol import SubmitManyParams, SubmitManyReply, SubmitReply

Bsup = Callable[..., Done]


@pytest.fixture(autouse=True)
def three_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_many, "AT_ONCE", 3)


def replies(*items: Any) -> Any:
    return lambda params: items


def fails(error: BsupError) -> Any:
    def answer(params: Any) -> Any:
        raise error

    return answer


def counting(first: int = 11) -> Any:
    """An answer that gives out ids in order."""
    following = first

    def answer(params: SubmitManyParams) -> Iterator[SubmitManyReply]:
        nonlocal following
        following += len(params.jobs)
        yield SubmitManyReply(ids=list(range(following - len(params.jobs), following)))

    return answer


def one_by_one(*answers: Any) -> Any:
    """Each call gets the next answer."""
    left = iter(answers)
    return lambda params: next(left)(params)


def lines(path: Path, jobs: Iterable[Any]) -> Path:
    path.write_text("".join(job if isinstance(job, str) else json.dumps(job) + "\n" for job in jobs))
    return path


def noops(count: int) -> list[dict[str, Any]]:
    return [{"kind": "noop", "args": {"n": n}} for n in range(1, count + 1)]


def test_jobs_go_in_chunks_each_with_a_key_of_its_own(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["SubmitMany"] = counting()
    file = lines(tmp_path / "jobs", [*noops(4), "\n", *noops(1)])
    assert bsup("submit", "--many", file, "--key", "k") == Done(0, "5 jobs submitted, ids 11 to 15\n", "")
    sent = daemon.asked("SubmitMany")
    assert [(one.key, len(one.jobs)) for one in sent] == [("k:1", 3), ("k:4", 2)]
    assert [msgspec.json.decode(job) for one in sent for job in one.jobs] == [*noops(4), *noops(1)]


def test_standard_input_and_json(bsup: Bsup, daemon: FakeDaemon) -> None:
    daemon.answers["SubmitMany"] = counting()
    done = bsup("submit", "--many", "-", "--json", stdin="".join(json.dumps(job) + "\n" for job in noops(4)).encode())
    assert done.objects == [{"first_line": 1, "ids": [11, 12, 13]}, {"first_line": 4, "ids": [14]}]
    assert [one.key for one in daemon.asked("SubmitMany")] == [None, None]


def test_no_chunk_is_larger_than_what_the_daemon_takes(
    bsup: Bsup, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_many, "max_frame", lambda args: 3_000)
    daemon.answers["SubmitMany"] = counting()
    jobs = [{"kind": "noop", "args": {"text": "x" * size}} for size in (900, 900, 900, 10)]
    assert bsup("submit", "--many", lines(tmp_path / "jobs", jobs)).code == 0
    assert [len(one.jobs) for one in daemon.asked("SubmitMany")] == [2, 2]
    jobs[3]["args"] = {"text": "x" * 2_000}
    done = bsup("submit", "--many", lines(tmp_path / "jobs", jobs))
    assert done.code == 2 and "line 4: is 2," in done.err and "lines 1 to 2 are submitted" in done.err


@pytest.mark.parametrize("bad", ["{", "[1]", '{"kind": "noop"}}', '"noop"'])
def test_a_line_that_is_no_job_is_named_and_its_chunk_stays_behind(
    bsup: Bsup, daemon: FakeDaemon, tmp_path: Path, bad: str
) -> None:
    """Mended, the file makes the same chunks, so that a key goes on where it was."""
    daemon.answers["SubmitMany"] = counting()
    done = bsup("submit", "--many", lines(tmp_path / "jobs", [*noops(4), bad + "\n", *noops(1)]), "--key", "k")
    assert (done.code, done.out) == (2, "")
    assert "line 5: is not an object of JSON" in done.err
    assert "lines 1 to 3 are submitted (3 jobs), the others not" in done.err
    assert "the same command again submits the rest" in done.err
    daemon.calls.clear()
    bsup("submit", "--many", lines(tmp_path / "jobs", [*noops(6)]), "--key", "k")
    assert [(one.key, len(one.jobs)) for one in daemon.asked("SubmitMany")] == [("k:1", 3), ("k:4", 3)]


def test_a_job_that_the_daemon_refuses_is_named_by_its_line(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    refusal = fails(InvalidInput("jobs[1].priority", "is 300", "0 to 255"))
    daemon.answers["SubmitMany"] = one_by_one(counting(), refusal)
    file = lines(tmp_path / "jobs", ["\n", *noops(6)])
    done = bsup("submit", "--many", file)
    assert (done.code, done.out) == (2, "")
    assert f"{file}: line 6: priority: is 300" in done.err and "0 to 255" in done.err
    assert "lines 1 to 4 are submitted (3 jobs), the others not; with --key, the same command" in done.err


def test_what_is_not_known_is_said(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    def hang_up(params: SubmitManyParams) -> Iterator[SubmitManyReply]:
        raise HangUp

    file = lines(tmp_path / "jobs", noops(5))
    for answer, code in ((hang_up, 6), (fails(StoreUnavailable("no answer")), 1)):
        daemon.answers["SubmitMany"] = one_by_one(counting(), answer)
        done = bsup("submit", "--many", file, "--key", "k")
        assert (done.code, done.out) == (code, "")
        assert "lines 1 to 3 are submitted (3 jobs); of lines 4 to 5 it is not known" in done.err
    daemon.answers["SubmitMany"] = fails(PermissionDenied("no"))
    done = bsup("submit", "--many", file)
    assert done.code == 5 and "no job is submitted" in done.err and "--key" not in done.err


@pytest.mark.parametrize("words", [["x.yaml"], ["--set", "a=1"], ["--after", "3"], ["-f"], ["-w"], ["--kind", "noop"]])
def test_many_takes_nothing_that_is_for_one(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path, words: list[str]) -> None:
    assert bsup("submit", "--many", lines(tmp_path / "jobs", noops(1)), *words).code == 2
    assert daemon.calls == []


def test_an_empty_file_and_one_that_is_not_there(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    assert bsup("submit", "--many", lines(tmp_path / "none", ["\n"])).code == 3
    done = bsup("submit", "--many", tmp_path / "away")
    assert done.code == 2 and "can't be read" in done.err


def test_a_kind_and_its_args_from_the_command_line(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["Submit"] = replies(SubmitReply(id=12))
    assert bsup("submit", "--kind", "noop", "--set", "args.sleep=1.5", "name=nap", "--key", "k") == Done(0, "12\n", "")
    (asked,) = daemon.asked("Submit")
    assert (asked.spec, asked.key) == ({"kind": "noop", "args": {"sleep": 1.5}, "name": "nap"}, "k")
    bad = bsup("submit", "--kind", "noop", "--set", "steps=[]")
    assert bad.code == 2 and "the command line: steps" in bad.err
    assert bsup("submit", "--kind", "noop", lines(tmp_path / "job.json", noops(1))).code == 2
    assert len(daemon.calls) == 1
