"""``config`` and what flags, environment and file together make of the settings."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import Done

from supervisor.cli.configuration import facts, load
from supervisor.cli.toml_text import to_toml
from supervisor.model.settings import Git, GitCredential, Settings, decode

Bsup = Callable[..., Done]


def test_check_says_what_is_wrong_with_the_file(bsup: Bsup, tmp_path: Path) -> None:
    file = tmp_path / "bsup.toml"
    file.write_text("[lease]\ntrem = 5\n")
    done = bsup("config", "check", file)
    assert (done.code, done.out) == (2, "")
    assert f"{file}: lease.trem: unknown key; did you mean 'term'?" in done.err
    file.write_text("[lease]\nterm = 200\n")
    assert bsup("config", "check", "--config", file).out == f"{file}: ok\n"
    file.write_text('[redact]\nvalues_file = "/nonexistent/values"\n')
    assert bsup("config", "check", file).code == 2
    assert bsup("config", "check", tmp_path / "none.toml").code == 2
    file.write_text('[jobs.kinds]\nmail = "no_such_module:send"\n')
    done = bsup("config", "check", file)
    assert (done.code, done.out) == (2, "")
    assert f"{file}: jobs.kinds.mail: no_such_module:send can't be loaded" in done.err


def test_show_reads_back_and_hides_passwords(bsup: Bsup, tmp_path: Path) -> None:
    file = tmp_path / "bsup.toml"
    file.write_text('[database]\ndsn = "postgresql://bsup:hunter2@db1,db2/x?target_session_attrs=read-write"\n')
    done = bsup("config", "show", "--config", file)
    assert done.code == 0
    assert "hunter2" not in done.out
    shown = decode(done.out.encode())
    assert shown.database.dsn == "postgresql://bsup@db1,db2/x?target_session_attrs=read-write"
    run = "/run" if os.getuid() == 0 else facts().runtime_dir
    assert (shown.host.slots > 0, shown.control.socket) == (True, f"{run}/bsup/control.sock")
    (line,) = bsup("config", "show", "--config", file, "--json").objects
    assert line["lease"] == {"renew": 10.0, "term": 180.0, "margin": 15.0}


def test_what_is_written_is_read_back() -> None:
    credential = GitCredential(url="https://x/", username='a "b" é\n', password_file="/p")
    for settings in (Settings(), Settings(git=Git(allow=(), credentials=(credential,)))):
        assert decode(to_toml(settings).encode()) == settings


def test_flags_beat_environment_beats_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "bsup.toml"
    file.write_text(
        '[database]\ndsn = "postgresql://file/x"\n[state]\ndir = "/file"\n[control]\nsocket = "/file.sock"\n'
    )
    monkeypatch.setenv("BSUP_CONFIG", str(file))
    assert load(Namespace()).database.dsn == "postgresql://file/x"
    monkeypatch.setenv("BSUP_DSN", "postgresql://environment/x")
    monkeypatch.setenv("BSUP_SOCKET", "/environment.sock")
    settings = load(Namespace())
    assert (settings.database.dsn, settings.control.socket) == ("postgresql://environment/x", "/environment.sock")
    args = Namespace(dsn="postgresql://flag/x", state="relative", socket="/flag.sock", on_term="detach")
    settings = load(args)
    assert (settings.database.dsn, settings.control.socket) == ("postgresql://flag/x", "/flag.sock")
    assert (settings.state.dir, settings.shutdown.on_term) == (str(Path.cwd() / "relative"), "detach")
