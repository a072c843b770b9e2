"""Files that a host can't go on without are written into room that is kept for them, also when the disk is full."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.model.errors import RunnerError
from supervisor.runners.handles import ROOM, write_json_atomic, write_json_in_room


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "bsup-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_is_written_again_and_again_in_turns(tmp_path: Path) -> None:
    file = tmp_path / "f"
    for number in range(5):
        write_json_in_room(file, {"n": "x" * (100 - 20 * number)}, durable=number % 2 == 0)
        assert json.loads(file.read_text()) == {"n": "x" * (100 - 20 * number)}
        assert names(tmp_path) == [".f.spare", "f"]
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.root
def test_a_disk_that_is_full_does_not_refuse_it(small: Path) -> None:
    file = small / "f"
    write_json_in_room(file, 0)
    with (small / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(b"x" * 4096)
    with pytest.raises(RunnerError, match="No space"):
        write_json_atomic(small / "g", "y" * 100)
    for number in range(1, 5):
        write_json_in_room(file, {"n": number, "x": "x" * 1000}, durable=True)
        assert json.loads(file.read_text())["n"] == number


@pytest.mark.parametrize("at", [".f.spare", ".f.kept"])
def test_what_a_death_in_the_middle_left_is_no_hindrance(tmp_path: Path, at: str) -> None:
    file = tmp_path / "f"
    write_json_in_room(file, "before")
    if at == ".f.spare":
        (tmp_path / at).write_bytes(b"\0 half of it")
    else:
        os.link(file, tmp_path / at)
    write_json_in_room(file, "after")
    assert json.loads(file.read_text()) == "after"
    assert names(tmp_path) == [".f.spare", "f"]


def test_a_copy_made_of_links_shares_no_room(tmp_path: Path) -> None:
    original, copy = tmp_path / "a", tmp_path / "b"
    original.mkdir()
    for number in range(3):
        write_json_in_room(original / "f", f"of a {number}")
    subprocess.run(["cp", "-al", str(original), str(copy)], check=True)
    for number in range(3):
        write_json_in_room(copy / "f", f"of b {number}")
        assert json.loads((original / "f").read_text()) == "of a 2"
    write_json_in_room(original / "f", "of a again")
    assert json.loads((copy / "f").read_text()) == "of b 2"


def test_more_than_the_room_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_json_in_room(file, "before")
    with pytest.raises(RunnerError, match="too large"):
        write_json_in_room(file, "x" * ROOM)
    assert json.loads(file.read_text()) == "before"
