"""Settings: what a file may say, what is said of one that may not, and that config/bsup.toml is the defaults."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.settings import HostFacts, Settings, decode, keys_of, resolve, section_types

FILE = Path(__file__).parents[2] / "config/bsup.toml"
ROOT = HostFacts(hostname="h1", cpus=8, root=True, runtime_dir="/run/user/0", state_home="/root/.local/state")


def refused(text: str) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        decode(text.encode())
    return caught.value


def test_the_file_in_config_is_the_defaults() -> None:
    assert decode(FILE.read_bytes()) == Settings() == decode(b"")


def test_the_file_in_config_lists_every_key_with_its_reason() -> None:
    """Each key has a comment above it that says its default."""
    listed = tomllib.loads(FILE.read_text())
    known = {name: set(keys_of(section)) for name, section in section_types().items()}
    assert {name: set(table) for name, table in listed.items()} == known
    comment: list[str] = []
    for line in FILE.read_text().splitlines():
        if line.startswith("#"):
            comment.append(line)
        elif " = " in line:
            assert "Default" in " ".join(comment), line
            comment = []
        else:
            comment = []


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("[lese]\n", "lese", ["unknown section", "'lease'"]),
        ("[lease]\ntrem = 3\n", "lease.trem", ["unknown key", "'term'", "renew"]),
        ("lease = 3\n", "lease", ["the number 3", "section"]),
        ("[lease]\nterm = true\n", "lease.term", ["true", "duration"]),
        ('[lease]\nterm = "soon"\n', "lease.term", ['"soon"', "duration"]),
        ('[lease]\nterm = "2h"\n', "lease.term", ["out of range", "1h"]),
        ("[lease]\nterm = nan\n", "lease.term", ["lease.term"]),
        ("[lease]\nterm = inf\n", "lease.term", ["lease.term"]),
        ("[lease]\nrenew = -1\n", "lease.renew", ["-1"]),
        ("[lease]\nterm = 59\n", "lease.term", ["6 × lease.renew", "60s"]),
        ("[lease]\nmargin = 90\n", "lease.margin", ["half of lease.term"]),
        ("[host]\nslots = 0\n", "host.slots", ["out of range", "1 to 10000"]),
        ("[host]\nslots = 1.5\n", "host.slots", ["1.5"]),
        ('[host]\nslots = "many"\n', "host.slots", ['"many"', '"auto"']),
        ("[host]\nname = 5\n", "host.name", ["the number 5"]),
        ('[host]\nname = ""\n', "host.name", ["empty"]),
        ('[host]\nlabels = "docker"\n', "host.labels", ["list of labels"]),
        ('[host]\nlabels = ["a b"]\n', "host.labels[0]", ["label"]),
        ("[host]\nlabels = [1]\n", "host.labels", ["list of labels"]),
        ('[host]\nmemory = "12 bananas"\n', "host.memory", ["bananas"]),
        ('[shutdown]\non_term = "wait"\n', "shutdown.on_term", ['"wait"', '"detach"']),
        ('[state]\ndir = "state"\n', "state.dir", ["absolute"]),
        (f'[control]\nsocket = "/{"x" * 120}"\n', "control.socket", ["107"]),
        ("[database]\nmigrate = 1\n", "database.migrate", ["true or false"]),
        ("[roles]\nadmin = [1.5]\n", "roles.admin", ["uids"]),
        ('[logs]\nmax_database = "2GiB"\n', "logs.max_database", ["logs.max_disk"]),
        ("[host]\nslots = 9\n[jobs]\nuid_count = 8\n", "jobs.uid_count", ["host.slots"]),
        ('[redact]\nvalues_env = ["A-B"]\n', "redact.values_env[0]", ["A-B"]),
        ('[git]\ncredentials = [{url = "https://x/"}]\n', "git.credentials[0].username", ["missing"]),
        ('[git]\ncredentials = [{url = "https://x/", user = "y"}]\n', "git.credentials[0].user", ["'username'"]),
        ("[git]\ncredentials = [1]\n", "git.credentials[0]", ["the number 1"]),
        ("[lease\n", "file", ["not TOML", "line 1"]),
        ("[lease]\nterm = 200\nterm = 300\n", "file", ["not TOML"]),
    ],
)
def test_what_is_wrong_is_said_with_key_and_what_is_allowed(text: str, field: str, words: list[str]) -> None:
    error = refused(text)
    assert error.field == field
    for word in words:
        assert word in str(error)


def test_a_dsn_is_not_quoted_in_an_error() -> None:
    error = refused('[database]\ndsn = ["postgresql://u:hunter2@h/d"]\n')
    assert error.field == "database.dsn"
    assert "hunter2" not in str(error)


def test_not_text_is_not_toml() -> None:
    with pytest.raises(InvalidInput, match="UTF-8"):
        decode(b"\xff")


def test_the_least_term_is_taken_also_where_a_product_is_rounded_up() -> None:
    assert decode(b"[lease]\nrenew = 0.4\nterm = 2.4\nmargin = 0.8\n").lease.term == 2.4


def test_units_and_words() -> None:
    settings = decode(
        b'[lease]\nterm = "1m30s"\n[host]\nmemory = "2GiB"\ncpu = 3\nslots = "auto"\n'
        b'[retention]\nfinished = "none"\n[control]\nmax_frame = 8192\n[roles]\nadmin = ["alice", "@ops", 1000]\n'
    )
    assert (settings.lease.term, settings.host.memory, settings.host.cpu, settings.host.slots) == (
        90.0,
        2 << 30,
        3.0,
        0,
    )
    assert (settings.retention.finished, settings.control.max_frame) == (None, 8192)
    assert settings.roles.admin == ("alice", "@ops", 1000)


def test_auto_is_resolved_from_the_host() -> None:
    settings = resolve(Settings(), ROOT)
    assert (settings.host.name, settings.host.slots, settings.jobs.uid_count) == ("h1", 8, 32)
    assert (settings.state.dir, settings.control.socket) == ("/var/lib/bsup", "/run/bsup/control.sock")
    user = resolve(Settings(), msgspec.structs.replace(ROOT, root=False, runtime_dir="/run/user/7", state_home="/h/s"))
    assert (user.state.dir, user.control.socket) == ("/h/s/bsup", "/run/user/7/bsup/control.sock")
    assert resolve(settings, msgspec.structs.replace(ROOT, hostname="other", cpus=1)) == settings


TOML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_of_any_key_is_taken_or_refused_by_its_name(data: st.DataObject) -> None:
    """No value of any type gets past its key's check with another exception than InvalidInput."""
    from supervisor.model import settings as module

    section = data.draw(st.sampled_from(sorted(section_types())))
    key = data.draw(st.sampled_from(sorted(keys_of(section_types()[section]))))
    value: Any = data.draw(TOML_VALUES.filter(lambda value: value is not None))
    try:
        made = module._section(section, section_types()[section], {key: value})
        module.check(Settings(**{section: made}))  # type: ignore[arg-type]  # by name
    except InvalidInput as error:
        # A check of two keys together may name the other one, of the same section.
        assert error.field.startswith(section)
