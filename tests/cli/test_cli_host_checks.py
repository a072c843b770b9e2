"""``doctor`` and ``migrate`` on a real PostgreSQL and on this machine, whatever it has; the pieces of ``demo``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import Done, FakeDaemon, status

from supervisor.cli import demo_build, doctor_database, doctor_host
from supervisor.cli.configuration import facts
from supervisor.cli.findings import Level
from supervisor.model.settings import Database, Jobs, Settings, StateDirectory, resolve
from supervisor.store.examination import ServerFacts, Standby

Bsup = Callable[..., Done]


def findings(done: Done) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for line in done.objects:
        assert line.keys() == {"check", "level", "text", "mend"}
        assert line["mend"] or line["level"] == "ok", line
        found.setdefault(line["check"], []).append((line["level"], line["text"]))
    return found


def test_doctor_before_and_after_migrate(bsup: Bsup, daemon: FakeDaemon, dsn: str, tmp_path: Path) -> None:
    daemon.answers["Status"] = lambda params: [status()]
    words = ("--dsn", dsn, "--state", tmp_path / "state", "--json")
    before = findings(bsup("doctor", *words))
    assert set(before) == {
        "config",
        "database",
        "docker",
        "git",
        "cgroups",
        "isolation",
        "disk",
        "clock",
        "journald",
        "socket",
    }
    assert any("the schema is not there yet" in text for _, text in before["database"])
    assert before["socket"][0][0] == "ok"
    done = bsup("migrate", "--dsn", dsn)
    assert done.code == 0
    assert "applied 0001_schema" in done.out
    assert bsup("migrate", "--dsn", dsn, "--json").objects == [{"applied": []}]
    after = findings(bsup("doctor", *words))
    assert {level for level, _ in after["database"]} == {"ok"}
    assert any("the schema is there" in text for _, text in after["database"])


def test_doctor_fails_for_what_the_daemon_cannot_do_without(bsup: Bsup, daemon: FakeDaemon, tmp_path: Path) -> None:
    done = bsup("doctor", "--dsn", "postgresql://u:hunter2@127.0.0.1:1,127.0.0.1:2/x", "--state", tmp_path, "--json")
    assert done.code == 1
    found = findings(done)["database"]
    assert [level for level, _ in found] == ["fail"] * 2
    assert "127.0.0.1:2: connection refused" in found[1][1].lower()
    assert "hunter2" not in done.out
    config = tmp_path / "bsup.toml"
    config.write_text("[lease]\ntrem = 1\n")
    done = bsup("doctor", "--config", config)
    assert done.code == 1
    assert "lease.trem" in done.out


def server(address: str, **more: object) -> ServerFacts:
    fields: dict[str, object] = {
        "version": "18.1",
        "version_number": 180_001,
        "user": "bsup",
        "database": "bsup",
        "max_connections": 100,
        "migrated": True,
        "reads": True,
        "writes": True,
        "roles": {"bsup_submitter": True, "bsup_host": True, "bsup_reader": True},
    }
    return ServerFacts(address=address, **{**fields, **more})  # type: ignore[arg-type]  # by name


SYNC = [Standby("db2", "streaming", "sync", 0.01)]
ASYNC = [Standby("db2", "streaming", "async", 0.01)]


@pytest.mark.parametrize(
    ("servers", "attrs", "level", "words"),
    [
        (
            [server("db1", standbys=SYNC), server("db2", in_recovery=True)],
            "read-write",
            Level.OK,
            "synchronous standby",
        ),
        ([server("db1", standbys=ASYNC), server("db2", in_recovery=True)], "read-write", Level.WARN, "no standby is"),
        ([server("db1"), server("db2", in_recovery=True)], "read-write", Level.WARN, "no standby streams"),
        ([server("db1", synchronous_names="*"), server("db2", error="x")], "read-write", Level.FAIL, "every commit"),
        ([server("db1"), server("db2")], "read-write", Level.FAIL, "two databases"),
        ([server("db1", standbys=SYNC), server("db2", in_recovery=True)], "any", Level.FAIL, "target_session_attrs"),
        ([server("db1", in_recovery=True)], "any", Level.FAIL, "takes writes"),
        ([server("db1", writes=False)], "any", Level.FAIL, "GRANT bsup_host"),
        ([server("db1", roles={})], "any", Level.WARN, "bsup_submitter"),
        ([server("db1", version_number=140_000)], "any", Level.FAIL, "too old"),
        ([server("db1", skew=-20.0)], "any", Level.WARN, "20.0 s behind"),
        ([server("db1", connections=95)], "any", Level.WARN, "95 of 100"),
        ([server("db1", migrated=False, may_migrate=False)], "any", Level.FAIL, "bsup migrate"),
        ([server("db1", standbys=SYNC), server("db2", error="no answer")], "read-write", Level.WARN, "db2: no answer"),
    ],
)
def test_what_the_servers_say(servers: list[ServerFacts], attrs: str, level: Level, words: str) -> None:
    found = doctor_database.judge(servers, attrs, Settings())
    hits = [one for one in found if words in f"{one.text} {one.mend}"]
    assert [one.level for one in hits] == [level], found
    if level is Level.OK:
        assert {one.level for one in found} == {Level.OK}


def test_servers_that_can_not_be_reached_are_not_called_standbys() -> None:
    found = doctor_database.judge([server("db1", error="connection refused")], "any", Settings())
    assert [(one.level, one.text) for one in found] == [(Level.FAIL, "db1: connection refused")]


def test_isolation_minds_what_the_jobs_uids_could_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve(Settings(state=StateDirectory(dir=str(tmp_path / "state"))), facts())
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert doctor_host.isolation(settings)[0].level is Level.WARN
    monkeypatch.setattr("os.geteuid", lambda: 0)
    tmp_path.chmod(0o700)
    (finding,) = doctor_host.isolation(settings)
    assert (finding.level, "can't reach" in finding.text) == (Level.FAIL, True)
    off = Settings(jobs=Jobs(uids="off"), database=Database())
    assert doctor_host.isolation(off)[0].level is Level.WARN


def test_pip_settings_go_along_and_passwords_become_secrets() -> None:
    listing = (
        "global.cert='/etc/ssl/ca.crt'\nglobal.extra-index-url='\\nfile:///a\\nfile:///b'\n"
        "install.no-binary='x'\nglobal.cache-dir='/root/.cache'\n:env:.cert='/x'\nnonsense\n"
    )
    config = dict(demo_build._pip_variables(listing))
    assert config["PIP_EXTRA_INDEX_URL"] == "file:///a file:///b"
    environ = {
        "PIP_INDEX_URL": "https://me:hunter2@host/simple",
        "PIP_CERT": "/other",
        "https_proxy": "p",
        "HOME": "/h",
    }
    env, secrets = demo_build.surroundings(environ, config)
    assert secrets == {"PIP_INDEX_URL": "https://me:hunter2@host/simple"}
    assert env == {
        "PIP_CERT": "/other",
        "PIP_EXTRA_INDEX_URL": "file:///a file:///b",
        "PIP_NO_BINARY": "x",
        "https_proxy": "p",
    }


def test_a_python_below_a_closed_directory_is_not_for_other_users(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").touch(mode=0o755)
    assert not demo_build._open_to_others(closed / "python3")
    closed.chmod(0o711)
    for parent in closed.parents:
        if not parent.stat().st_mode & 0o001:
            return
    assert demo_build._open_to_others(closed / "python3")


@pytest.mark.slow
def test_demo_builds_a_sample_where_there_is_no_checkout(tmp_path: Path) -> None:
    """From nothing to a summary, and nothing is left: no process, no directory."""
    code = (
        "import sys, tempfile; from supervisor.cli import demo_build; demo_build.checkout = lambda: None; "
        "make = tempfile.mkdtemp; "
        "tempfile.mkdtemp = lambda **how: (made := make(**how), print('made', made, file=sys.stderr))[0]; "
        "from supervisor.cli.entry import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("This file was written by bsup", "test_it_names_whom_it_greets", "removed what was built", "summary"):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith("job 1 greeting: succeeded")
    (state,) = [
        line.removeprefix("made ") for line in done.stderr.splitlines() if line.startswith("made /tmp/bsup-demo-")
    ]
    assert not Path(state).exists()
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            running.append(path.read_bytes())
    assert not [line for line in running if state.encode() in line]
