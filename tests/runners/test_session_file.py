"""session.json and the lock of a state directory, on a real disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from supervisor.model.job import Me
from supervisor.runners.session_file import StateDirectoryTaken, StateSessionFile, lock_state

pytestmark = pytest.mark.anyio

ME = Me("a" * 32, "b" * 32, 3)


async def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    file = StateSessionFile(tmp_path, "machine", "boot")
    assert await file.load() is None
    await file.save(ME)
    found = await file.load()
    assert found is not None
    assert (found.session, found.incarnation, found.epoch, found.next_incarnation) == (*_fields(ME), None)
    assert found.same_boot
    assert (tmp_path / "session.json").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["session.json"]


async def test_another_boot_is_told_until_the_take_up_is_done(tmp_path: Path) -> None:
    """A daemon that dies in the middle of the take-up must not make the next one believe that nothing was booted."""
    await StateSessionFile(tmp_path, "machine", "boot 1").save(ME)
    file = StateSessionFile(tmp_path, "machine", "boot 2")
    for _ in range(2):
        found = await file.load()
        assert found is not None and not found.same_boot
        await file.save(ME, next_incarnation="c" * 32)
    await file.save(ME)
    found = await file.load()
    assert found is not None and found.same_boot and found.next_incarnation is None


async def test_which_leases_are_of_another_boot_is_told_until_there_is_another_session(tmp_path: Path) -> None:
    file = StateSessionFile(tmp_path, "machine", "boot")
    await file.save(ME, next_incarnation="c" * 32, boot_epoch=2)
    found = await file.load()
    assert found is not None and found.boot_epoch == 2


async def test_state_of_another_machine_is_set_aside(tmp_path: Path) -> None:
    await StateSessionFile(tmp_path, "machine", "boot").save(ME)
    other = StateSessionFile(tmp_path, "clone", "boot")
    assert await other.load() is None
    assert names(tmp_path) == ["session.foreign.0.json"]
    await StateSessionFile(tmp_path, "machine", "boot").save(ME)
    assert await other.load() is None
    assert names(tmp_path) == ["session.foreign.0.json", "session.foreign.1.json"]


async def test_a_copied_directory_is_foreign_too(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    await StateSessionFile(first, "machine", "boot").save(ME)
    shutil.copytree(first, tmp_path / "copy")
    assert await StateSessionFile(tmp_path / "copy", "machine", "boot").load() is None
    assert await StateSessionFile(first, "machine", "boot").load() is not None


async def test_the_runs_of_a_copied_directory_are_set_aside_with_its_session(tmp_path: Path) -> None:
    """The shepherd of the copy would take the original's processes for remains of its own, and end them."""
    first, copy = tmp_path / "first", tmp_path / "copy"
    (first / "runs" / "a-1").mkdir(parents=True)
    (first / "mirrors").mkdir()
    file = StateSessionFile(first, "machine", "boot")
    await file.save(ME)
    assert file.set_aside_foreign() is None
    for number in range(2):
        shutil.copytree(first, copy, dirs_exist_ok=True)
        assert StateSessionFile(copy, "machine", "boot").set_aside_foreign() == copy / f"foreign.{number}"
        assert names(copy / f"foreign.{number}") == ["runs", "session.json"]
        assert await StateSessionFile(copy, "machine", "boot").load() is None
    assert names(copy) == ["foreign.0", "foreign.1", "mirrors"]
    assert names(first) == ["mirrors", "runs", "session.json"]


@pytest.mark.parametrize(
    "garbage", [b"{", b"", b"\0" * 200, b'{"session": "\xff"}', b"[" * 100_000, b"null", b'{"a": 1}']
)
async def test_garbage_is_set_aside(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "session.json").write_bytes(garbage)
    file = StateSessionFile(tmp_path, "machine", "boot")
    assert file.set_aside_foreign() is None
    assert await file.load() is None
    assert names(tmp_path) == ["session.unreadable.0.json"]
    await file.save(ME)
    assert await file.load() is not None


async def test_what_a_newer_bsup_has_written_is_set_aside_but_for_fields_to_pass_over(tmp_path: Path) -> None:
    file = StateSessionFile(tmp_path, "machine", "boot")
    await file.save(ME)
    stored = json.loads((tmp_path / "session.json").read_text())
    (tmp_path / "session.json").write_text(json.dumps({**stored, "more": [1]}))
    assert await file.load() is not None
    (tmp_path / "session.json").write_text(json.dumps({**stored, "version": 2}))
    assert file.set_aside_foreign() is None
    assert await file.load() is None
    assert names(tmp_path) == ["session.newer.0.json"]


def test_one_daemon_a_state_directory(tmp_path: Path) -> None:
    lock = lock_state(tmp_path)
    with pytest.raises(StateDirectoryTaken, match="another bsup daemon"):
        lock_state(tmp_path)
    lock.release()
    lock.release()
    lock_state(tmp_path).release()


def test_no_child_inherits_the_lock(tmp_path: Path) -> None:
    lock = lock_state(tmp_path)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        lock.release()
        lock_state(tmp_path).release()
        child.kill()
    assert os.path.exists(tmp_path / "lock")


def names(directory: Path) -> list[str]:
    """But for the room that is kept for the next write."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def _fields(me: Me) -> tuple[str, str, int]:
    return me.session, me.incarnation, me.epoch
