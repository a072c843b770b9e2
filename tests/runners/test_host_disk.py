"""What outlives jobs on a host's disk stays within its bounds: mirrors by size and last use, kept workspaces by age."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checkout_world import World
from steps_bench import Bench, lease_of

from supervisor.runners import host_disk
from supervisor.runners.git import Git
from supervisor.runners.host_disk import KEPT_MARK, mark_kept
from supervisor.runners.mirrors import Wanted, lock_of, opened
from supervisor.runners.run_files import StepsSettings

MIB = 1 << 20


def mirror_of(mirrors: Path, name: str, *, size: int = MIB, unused_for: float = 0.0) -> Path:
    path = mirrors / f"{name}.git"
    path.mkdir(parents=True)
    (path / "pack").write_bytes(os.urandom(size))
    lock_of(path).touch()
    at = time.time() - unused_for
    os.utime(lock_of(path), (at, at))
    return path


def names(mirrors: Path) -> set[str]:
    return {path.name for path in mirrors.iterdir()}


def test_the_longest_unused_mirrors_go_until_the_rest_fits(tmp_path: Path) -> None:
    for age in (1, 3, 2):
        mirror_of(tmp_path, f"m{age}", unused_for=age * 1000)
    said = host_disk.trim_mirrors(tmp_path, 2 * MIB + 2 * MIB // 3)
    assert names(tmp_path) == {"m1.git", "m1.lock", "m2.git", "m2.lock"}
    assert len(said) == 1
    assert "m3.git (1 MiB)" in said[0]


def test_mirrors_within_the_bound_stay(tmp_path: Path) -> None:
    mirror_of(tmp_path, "old", unused_for=1e7)
    assert host_disk.trim_mirrors(tmp_path, 2 * MIB) == []
    assert names(tmp_path) == {"old.git", "old.lock"}
    assert host_disk.trim_mirrors(tmp_path / "none yet", 0) == []


@pytest.mark.parametrize("how", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["reads", "fetches"])
def test_a_mirror_in_use_stays_however_long_unused(tmp_path: Path, how: int) -> None:
    mirror_of(tmp_path, "used", unused_for=1e6)
    mirror_of(tmp_path, "idle")
    with lock_of(tmp_path / "used.git").open() as held:
        fcntl.flock(held, how)
        host_disk.trim_mirrors(tmp_path, 0)
        assert names(tmp_path) == {"used.git", "used.lock"}
    host_disk.trim_mirrors(tmp_path, 0)
    assert names(tmp_path) == set()


def test_what_an_unfinished_sweep_or_a_failed_fetch_left_goes(tmp_path: Path) -> None:
    mirror_of(tmp_path, "well")
    (tmp_path / "half.doomed").mkdir()
    (tmp_path / "never.lock").touch()
    host_disk.trim_mirrors(tmp_path, 10 * MIB)
    assert names(tmp_path) == {"well.git", "well.lock"}


def test_a_checkout_makes_its_mirror_used_and_anew_where_it_was_removed(world: World) -> None:
    origin = world.repository()
    mirrors = world.root / "mirrors"
    world.good({"url": str(origin), "commit": "main"})
    (lock,) = mirrors.glob("*.lock")
    os.utime(lock, (1, 1))
    world.good({"url": str(origin), "commit": "main"})
    assert lock.stat().st_mtime > 1
    assert len(host_disk.trim_mirrors(mirrors, 0)) == 1
    assert names(mirrors) == set()
    assert world.good({"url": str(origin), "commit": "main"}).tree() == {"README", "lib/a.txt", "doc/b.txt"}


def test_a_checkout_that_waited_for_a_lock_that_is_gone_takes_the_new_one(world: World) -> None:
    """A lock on a file without a name would hold nothing: the next checkout would lock another."""
    origin = world.repository()
    mirrors = world.root / "mirrors"
    mirrors.mkdir()
    wanted = Wanted(str(origin), "main")
    waits = threading.Event()
    entered: list[bool] = []
    (world.root / "scratch").mkdir()
    git = Git(world.root / "scratch", [])
    with opened(git, mirrors, wanted, print):
        (lock,) = mirrors.glob("*.lock")
    held = lock.open()
    fcntl.flock(held, fcntl.LOCK_EX)

    def check_out() -> None:
        with opened(git, mirrors, wanted, lambda _: waits.set()):
            entered.append(lock.exists() and not _is_free(lock))

    thread = threading.Thread(target=check_out)
    thread.start()
    assert waits.wait(60)
    lock.unlink()
    held.close()
    thread.join(60)
    assert entered == [True]


def test_what_was_set_aside_goes_too(tmp_path: Path) -> None:
    (tmp_path / "foreign.0" / "runs").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    assert host_disk.remove_foreign(tmp_path, time.time() - 3600) == []
    assert len(host_disk.remove_foreign(tmp_path, time.time() + 3600)) == 1
    assert names(tmp_path) == {"runs"}


def _is_free(lock: Path) -> bool:
    with lock.open() as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.root, id="uids"), pytest.param(0, id="shared")])
async def bench(request: pytest.FixtureRequest, short_tmp: Path) -> AsyncIterator[Bench]:
    settings = StepsSettings(grace=0.2, keep_workspace=True, keep_workspace_for=3600.0, mirrors_max=0)
    bench = Bench(short_tmp, uids=request.param, settings=settings)
    await bench.open()
    yield bench
    await bench.close()


@pytest.mark.anyio
async def test_a_sweep_removes_workspaces_that_were_kept_long_enough(bench: Bench) -> None:
    """By the time since the job's end; never one of a run that is still here, whatever mark the job has made."""
    command = "mkdir -p d/d && touch -d @1000 ../.bsup-kept"
    old, fresh, unended = (
        lease_of({"kind": "steps", "steps": [{"name": "a", "run": command}]}, number) for number in (1, 2, 3)
    )
    for lease, discarded in ((old, True), (fresh, True), (unended, False)):
        run = await bench.attempt(lease)
        assert run.codes == {"a": 0}
        if discarded:
            await bench.runner.discard(lease.id)
    os.utime(bench.workspace(old) / host_disk.KEPT_MARK, (1, 1))
    mirror_of(bench.state / "mirrors", "unused")
    said = await bench.runner.sweep()
    assert not bench.workspace(old).exists()
    assert bench.workspace(fresh).exists()
    assert bench.workspace(unended).exists()
    assert names(bench.state / "mirrors") == set()
    assert [sentence.split()[1:3] for sentence in said] == [["the", "workspace"], ["the", "git"]]


def test_a_mark_that_the_job_made_itself_is_neither_followed_nor_trusted(tmp_path: Path) -> None:
    """The daemon may be root: through a job's symlink it would make files anywhere."""
    elsewhere = tmp_path / "elsewhere"
    for number, make in enumerate((lambda mark: mark.symlink_to(elsewhere), Path.mkdir, os.mkfifo)):
        workspace = tmp_path / str(number)
        workspace.mkdir()
        mark = workspace / KEPT_MARK
        make(mark)
        os.utime(mark, (1.0, 1.0), follow_symlinks=False)
        mark_kept(workspace)
        assert not elsewhere.exists()
        assert mark.lstat().st_mtime > 1.0
