"""What users do, end to end: submit, follow, stop, wait; two daemons share the work."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BSUP, Daemon, alive, steps, until

from supervisor.client import Client
from supervisor.model.job import State

Start = Callable[..., Daemon]


def test_a_job_runs_and_its_log_is_its_bytes(daemons: Start) -> None:
    """Invariant 5: the stored log is what the job wrote, in order; the exit code is the first failed step's."""
    cli = daemons().cli
    job = cli.submit(steps(r"printf 'one\0two\377\n'; echo warn >&2", ["sh", "-c", "exit 7"], "echo never"))
    assert cli.wait(job) == 7
    assert cli.raw(job, "--stream", "out") == b"one\0two\xff\n"
    assert cli.raw(job, "--stream", "err") == b"warn\n"
    shown = cli.show(job)
    assert (shown["state"], shown["exit_code"], shown["kind"], shown["id"]) == ("failed", 7, "steps", job)
    (attempt,) = cli.attempts(job)
    assert [step["state"] for step in attempt["steps"]] == ["succeeded", "failed", "skipped"]


def test_an_always_step_runs_after_a_failure(daemons: Start) -> None:
    """``always`` steps clean up; they do not turn a failure into a success."""
    cli = daemons().cli
    job = cli.submit(
        {
            "kind": "steps",
            "steps": [{"name": "bad", "run": "exit 3"}, {"name": "tidy", "run": "echo tidy", "always": True}],
        }
    )
    assert cli.wait(job) == 3
    assert cli.raw(job) == b"tidy\n"


def test_after_waits_and_a_failed_parent_cancels(daemons: Start) -> None:
    """A job ``after`` others runs when all succeeded, and is canceled, reason upstream, when one did not."""
    cli = daemons().cli
    first = cli.submit(steps("true"))
    second = cli.submit(steps("echo second"), "--after", str(first))
    bad = cli.submit(steps("exit 1"))
    never = cli.submit(steps("echo never"), "--after", str(bad))
    assert cli.wait(first, second) == 0
    cli.wait(bad, never)
    assert cli.state(never) == "canceled"
    assert cli.show(never)["reason"] == "upstream"


def test_secrets_reach_the_job_and_nothing_else(daemons: Start) -> None:
    """Invariant 6: the value is in the step's environment, and in no log, no ``show``, no file left on the host."""
    daemon = daemons()
    cli = daemon.cli
    secret = "s3cr3t-Value-77"
    job = cli.submit(
        steps(
            'printf "%s" "$TOKEN" | wc -c; echo "tok=$TOKEN"; echo abcSWAPMEdef',
            secrets={"TOKEN": secret},
            redact={"SWAPME": "-"},
        )
    )
    assert cli.wait(job) == 0
    raw = cli.raw(job)
    assert raw.split(b"\n")[0].strip() == str(len(secret)).encode()
    assert secret.encode() not in raw and b"abc-def" in raw
    assert secret not in cli.run("show", str(job), "--json").stdout.decode()
    assert secret not in cli.run("events", "--json").stdout.decode()
    assert secret not in daemon.tail()
    until(lambda: not list((daemon.state / "runs").iterdir()), "the handle is removed")
    left = subprocess.run(["grep", "-rl", secret, str(daemon.state)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_stop_ends_everything_a_step_started(daemons: Start, short_dir: Path) -> None:
    """A step that ignores SIGTERM and has a double-forked child in a session of its own is all gone; state canceled."""
    cli = daemons().cli
    pids = short_dir / "pids"
    pids.mkdir()
    pids.chmod(0o1777)
    script = f"""
        trap '' TERM
        (setsid sh -c 'trap "" TERM; (sh -c "echo \\$\\$ > {pids}/deep; exec sleep 1000") &' &)
        echo $$ > {pids}/top
        echo up
        while :; do sleep 1; done
    """
    job = cli.submit(steps(script))
    until(lambda: (pids / "deep").exists() and (pids / "deep").read_text().strip(), "the grandchild runs")
    top, deep = int((pids / "top").read_text()), int((pids / "deep").read_text())
    assert alive(top) and alive(deep)
    cli.run("stop", str(job), "--grace", "1")
    cli.wait(job)
    assert cli.state(job) == "canceled"
    assert not alive(top) and not alive(deep)


@pytest.mark.anyio
async def test_two_daemons_share_the_work_and_never_a_job(daemons: Start, short_dir: Path) -> None:
    """Invariants 1 and 2: 200 jobs, 200 attempts, both daemons at work, no job run twice, by the jobs' own stamps."""
    one, two = (daemons(name, config="slots = 4\n") for name in ("a", "b"))
    stamps = short_dir / "stamps"
    stamps.mkdir()
    stamps.chmod(0o1777)
    run = (
        f"f={stamps}/$BSUP_JOB_ID.$BSUP_ATTEMPT; date +%s.%N > $f; sleep 0.2; date +%s.%N >> $f; echo $BSUP_LEASE >> $f"
    )
    async with Client(str(one.socket)) as a, Client(str(two.socket)) as b:
        jobs = [await (a, b)[number % 2].submit(steps(run)) for number in range(200)]
        ended = {job.id: job async for job in a.wait(jobs)}
        attempts = [attempt for job in jobs async for attempt in b.attempts(job)]
    assert sorted(ended) == sorted(jobs)
    assert {job.state for job in ended.values()} == {State.SUCCEEDED}
    assert len(attempts) == 200
    share = Counter(attempt.host for attempt in attempts)
    assert min(share["a"], share["b"]) >= 50, share
    files = {file.name: file.read_text().split() for file in stamps.iterdir()}
    assert sorted(files) == sorted(f"{job}.1" for job in jobs)
    assert len({lease for _, _, lease in files.values()}) == 200, "a lease id was used twice"
    assert all(float(begun) < float(over) for begun, over, _ in files.values())


def test_follow_streams_live_and_mirrors_the_exit_code(daemons: Start, short_dir: Path) -> None:
    """``submit --follow`` shows a line while the step still runs, on this host and on another one; it ends as the
    job.
    """
    one = daemons("a")
    two = daemons("b", config='labels = ["elsewhere"]\n[lease]\nrenew = 1\nterm = 6\nmargin = 1.5\n')
    gate = short_dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o666)
    job = {**steps(f"echo first; read x < {gate}; echo second; exit 5"), "labels": ["elsewhere"]}
    follow = subprocess.Popen(
        [*BSUP, "submit", "-", "--follow", "--socket", str(one.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert follow.stdin is not None and follow.stdout is not None
    follow.stdin.write(json.dumps(job).encode())
    follow.stdin.close()
    seen = b""
    while b"first" not in seen:
        piece = os.read(follow.stdout.fileno(), 65536)
        assert piece, f"the log ended early: {seen!r}"
        seen += piece
    assert b"second" not in seen
    gate.write_text("go\n")
    rest = follow.stdout.read()
    assert b"second" in rest
    assert follow.wait(30) == 5
    assert two.process is not None


@pytest.mark.slow
def test_a_gigabyte_in_odd_shapes(daemons: Start) -> None:
    """A 100 MB line, NUL bytes, invalid UTF-8 and more than the cap: exact bytes up to it, flat memory, status
    answers.
    """
    daemon = daemons(config=f"[logs]\nmax_disk = {1 << 30}\n")
    cli = daemon.cli
    cli.wait(cli.submit(steps("true")))
    before = daemon.rss()
    line = cli.submit(steps("head -c 100000000 /dev/zero | tr '\\0' x; printf '\\n\\377\\000end\\n'"))
    big = cli.submit(steps("head -c 1200000000 /dev/zero"))
    peak = before
    while not all(row["state"] in ("succeeded", "failed", "canceled") for row in (cli.show(line), cli.show(big))):
        assert cli.run("status", "--json").returncode == 0
        peak = max(peak, daemon.rss())
    assert cli.state(line) == cli.state(big) == "succeeded"
    raw = cli.raw(line)
    assert raw == b"x" * 100_000_000 + b"\n\xff\x00end\n"
    got = cli.raw(big)
    assert len(got) == 1 << 30 and not got.strip(b"\0")
    assert b"cut here" in cli.run("logs", str(big)).stdout[-4096:]
    assert peak - before < 64 << 20, f"grew by {(peak - before) >> 20} MiB"
