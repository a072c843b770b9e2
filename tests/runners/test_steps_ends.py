"""How the runner reads an end off the files, whatever the shepherd says: with one that only writes files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from steps_bench import Ends, lease_of

from supervisor.model.errors import HandleLost, RunnerError
from supervisor.model.job import Lease
from supervisor.runners import handles
from supervisor.runners.handles import Closed, Exit, Started, boot_id, write_json_atomic
from supervisor.runners.run_files import VERSION, StepsSettings
from supervisor.runners.shepherd_client import Hint, Refused
from supervisor.runners.steps import StepsRunner

pytestmark = pytest.mark.anyio


def own_start_time() -> int:
    stat = Path("/proc/self/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[19])


class FileShepherd:
    """Claims and starts; ends come when the test writes them. ``process`` is what ``started`` says."""

    def __init__(self) -> None:
        self.process: Started | None = Started(
            pid=os.getpid(), start_time=own_start_time(), boot_id=boot_id(), at=time.time(), at_boot=0.0
        )
        self.fails = False
        self.live: list[dict[str, object]] = []
        self.hint: Hint | None = None
        self.starts = 0
        self.stops: list[bool] = []
        """What stops are answered with, one after the other: whether something of the run lives."""

    def on_hint(self, tell: Hint) -> None:
        self.hint = tell

    async def prepare(self, run_dir: Path, files: Mapping[str, str], workspace: str, uid: int | None) -> None:
        for name, text in files.items():
            (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_text(text)

    async def start_step(self, step_dir: Path) -> float | None:
        self.starts += 1
        (step_dir / "claim").touch()
        if self.process is not None:
            write_json_atomic(step_dir / "started", self.process)
        if self.fails:
            raise RunnerError("the shepherd did not answer")
        return None

    async def stop_run(self, run_dir: Path, grace: float, kill: bool) -> bool:
        return self.stops.pop(0) if self.stops else True

    async def make_workspace(self, path: Path, uid: int | None) -> None:
        await anyio.Path(path).mkdir(parents=True, exist_ok=True)

    async def own(self, path: Path, uid: int | None) -> None: ...

    async def give_back(self, path: Path) -> None: ...

    async def remove(self, *paths: Path) -> None: ...

    async def status(self) -> dict[str, object]:
        return {"live": self.live}


class Scene:
    """One lease of one step, prepared."""

    def __init__(self, state: Path, **options: Any) -> None:
        self.shepherd = FileShepherd()
        self.runner = StepsRunner(state, self.shepherd, StepsSettings(), **options)
        self.lease: Lease = lease_of({"kind": "steps", "steps": [{"name": "a", "run": "x"}]})
        self.step = state / "runs" / str(self.lease.id) / "0"
        self.ends = Ends()

    async def start(self) -> None:
        await self.runner.prepare(self.lease)
        await self.runner.start(self.lease.id, 0, self.ends.tell)

    def exits(self, code: int = 0) -> None:
        write_json_atomic(self.step / "exit", Exit(exit_code=code, signal=None, at=time.time()))

    def closes(self, gone: bool = False) -> None:
        write_json_atomic(self.step / "closed", Closed(at=time.time(), gone=gone))

    async def quiet(self) -> None:
        """Every hint there can be, and a turn of the loop: nothing may be told of it."""
        assert self.shepherd.hint is not None
        for kind in ("exited", "closed"):
            self.shepherd.hint(kind, self.step)
        self.shepherd.hint("reconnected", None)
        await anyio.lowlevel.checkpoint()
        assert self.ends.told == []


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_exited_and_closed_are_two_facts(scene: Scene) -> None:
    await scene.start()
    await scene.quiet()
    scene.exits(3)
    await scene.quiet()
    scene.closes()
    assert (await scene.ends.of(0)).exit_code == 3


async def test_no_hint_is_needed(scene: Scene) -> None:
    await scene.start()
    scene.exits()
    scene.closes()
    assert (await scene.ends.of(0)).exit_code == 0


async def test_output_that_stays_open_holds_up_an_end_only_so_long(tmp_path: Path) -> None:
    scene = Scene(tmp_path, close_wait=0.0)
    await scene.start()
    scene.exits(4)
    assert (await scene.ends.of(0)).exit_code == 4
    scene.closes()
    assert len(scene.ends.told) == 1


async def test_closed_without_an_exit_is_a_loss(scene: Scene) -> None:
    await scene.start()
    scene.closes(gone=True)
    assert (await scene.ends.of(0)).cause == "gone"


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another"}, {"pid": 2**22 + 1}])
async def test_a_process_that_is_gone_without_an_exit_is_a_loss(scene: Scene, change: dict[str, Any]) -> None:
    """A pid that another process has now, one of another boot, or one that nobody has."""
    process = {"pid": os.getpid(), "start_time": own_start_time(), "boot_id": boot_id(), "at": 1.0, "at_boot": 0.0}
    scene.shepherd.process = Started(**{**process, **change})
    await scene.start()
    end = await scene.ends.of(0)
    assert (end.cause, end.exit_code, end.signal) == ("gone", None, None)


async def test_an_exit_of_the_boot_before_counts_though_nothing_closed_its_output(scene: Scene) -> None:
    scene.shepherd.process = Started(pid=1, start_time=1, boot_id="another", at=1.0, at_boot=0.0)
    await scene.runner.prepare(scene.lease)
    await scene.shepherd.start_step(scene.step)
    scene.exits(5)
    taken = await scene.runner.adopt(scene.lease.id, scene.ends.tell)
    assert taken is not None
    assert taken[0].end is not None
    assert taken[0].end.exit_code == 5


async def test_a_start_that_was_claimed_but_not_answered_is_not_an_error(scene: Scene) -> None:
    """It may have run: from the claim on, only the files say what became of it."""
    scene.shepherd.fails = True
    await scene.start()
    await scene.quiet()
    scene.exits(6)
    scene.closes()
    assert (await scene.ends.of(0)).exit_code == 6


@pytest.mark.parametrize("known", [True, False])
async def test_a_claim_without_a_start_is_for_the_shepherd_to_know(scene: Scene, known: bool) -> None:
    await scene.runner.prepare(scene.lease)
    (scene.step / "claim").touch()
    scene.shepherd.live = [{"dir": str(scene.step), "pid": 1}] if known else []
    taken = await scene.runner.adopt(scene.lease.id, scene.ends.tell)
    assert taken is not None
    assert (taken[0].end is None) == known
    if known:
        scene.exits()
        scene.closes()
        await scene.ends.of(0)
    else:
        assert taken[0].end is not None
        assert taken[0].end.cause == "gone"


@pytest.mark.parametrize("garbage", [b"{", b"", b"\0" * 100, b'{"error": "\xff"}', b"[]"])
async def test_damaged_files_are_a_loss_and_say_so(scene: Scene, garbage: bytes) -> None:
    await scene.start()
    (scene.step / "exit").write_bytes(garbage)
    await scene.quiet()  # its process lives: nobody may be told that it does not
    scene.closes()
    end = await scene.ends.of(0)
    assert end.cause == "gone"
    assert "is damaged" in (end.error or "")


async def test_a_damaged_start_hides_no_true_end(scene: Scene) -> None:
    await scene.start()
    (scene.step / "started").write_text("{")
    await scene.quiet()
    scene.exits(3)
    (scene.step / "closed").write_text("{")
    assert (await scene.ends.of(0)).exit_code == 3


async def test_files_that_cant_be_read_now_are_no_loss(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say: the step runs, and a loss would let another host begin it."""
    await scene.start()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as short_of_descriptors:
        short_of_descriptors.setattr(handles, "open", refuse, raising=False)
        with pytest.raises(RunnerError, match="Too many open files"):
            handles.read_exit(scene.step)
        await scene.quiet()
    scene.exits(3)
    scene.closes()
    assert (await scene.ends.of(0)).exit_code == 3


async def test_a_dead_process_whose_exit_the_shepherd_cant_write_yet_is_no_loss(scene: Scene) -> None:
    """A full disk: the shepherd has reaped it and keeps trying to write how it ended."""
    scene.shepherd.process = Started(pid=2**22 + 1, start_time=1, boot_id=boot_id(), at=1.0, at_boot=0.0)
    scene.shepherd.live = [{"dir": str(scene.step), "pid": None}]
    await scene.start()
    for _ in range(3):
        await scene.quiet()
    taken = await scene.runner.adopt(scene.lease.id, scene.ends.tell)
    assert taken is not None
    assert taken[0].end is None
    scene.exits(3)
    scene.closes()
    assert (await scene.ends.of(0)).exit_code == 3


@pytest.mark.parametrize("how", ["cut off", "not UTF-8", "newer"])
async def test_of_a_run_whose_spec_is_damaged_all_is_ended(scene: Scene, how: str) -> None:
    await scene.start()
    spec = scene.step.parent / "spec"
    said = spec.read_bytes()
    newer = json.dumps({**json.loads(said), "version": VERSION + 1}).encode()
    spec.write_bytes({"cut off": said[:-1], "not UTF-8": said.replace(b"/", b"\xff"), "newer": newer}[how])
    scene.shepherd.stops = [True, False]
    with pytest.raises(RunnerError, match="is being ended"):  # it is tried again: something may run still
        await scene.runner.adopt(scene.lease.id, scene.ends.tell)
    with pytest.raises(HandleLost):
        await scene.runner.adopt(scene.lease.id, scene.ends.tell)
    assert scene.shepherd.stops == []


async def test_after_close_nothing_is_told(scene: Scene) -> None:
    await scene.start()
    scene.runner.close()
    scene.exits()
    scene.closes()
    await scene.quiet()


async def test_a_start_that_the_fence_forbids_is_the_host_s_fault(short_tmp: Path) -> None:
    """It ends like work that the fence ended, not as a command that can't be started: the job's budget is its own."""

    class Fenced(FileShepherd):
        async def start_step(self, step_dir: Path) -> float | None:
            raise Refused("fence", "the fence has passed")

    runner = StepsRunner(short_tmp, Fenced(), StepsSettings())
    lease = lease_of({"kind": "steps", "steps": [{"name": "a", "run": ["true"]}]})
    await runner.prepare(lease)
    ends = Ends()
    await runner.start(lease.id, 0, ends.tell)
    assert ends.told == [], "the end is never told before the start"
    assert (await ends.of(0)).cause == "fence"
