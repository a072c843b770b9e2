"""The daemon's side, against the real shepherd: it starts one, outlives it, finds it again, and reads the files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from supervisor.model.errors import RunnerError
from supervisor.runners import handles
from supervisor.runners.fence import FenceFile
from supervisor.runners.handles import StepFile
from supervisor.runners.shepherd_client import HintKind, Refused, ShepherdClient

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


class Ground:
    """A state directory with a fence and clients; keeps the hints of the client in use."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.workspace = state / "work" / "s-1"
        self.run = state / "runs" / "s-1"
        self.client = self.new_client()
        self._hinted = asyncio.Event()
        self.hints: list[tuple[HintKind, Path | None]] = []

    def new_client(self, patience: float = PATIENCE) -> ShepherdClient:
        client = ShepherdClient(self.state, uid_count=0, linger=0.3, patience=patience)
        client.on_hint(self._on_hint)
        return client

    def _on_hint(self, kind: HintKind, step_dir: Path | None) -> None:
        self.hints.append((kind, step_dir))
        self._hinted.set()

    def step(self, command: str, index: int = 0) -> Path:
        step_dir = self.run / str(index)
        spec = StepFile(
            argv=("sh", "-c", command), workspace=str(self.workspace), token=f"s-1-{index}", private_tmp=False
        )
        handles.write_step(step_dir, spec)
        return step_dir

    async def until(self, what: Callable[[], bool]) -> None:
        """Looks again after each hint."""
        async with asyncio.timeout(PATIENCE):
            while not what():
                self._hinted.clear()
                await self._hinted.wait()

    async def closed(self, step_dir: Path) -> None:
        await self.until(lambda: handles.is_closed(step_dir))


@pytest.fixture
async def ground(short_tmp: Path) -> AsyncIterator[Ground]:
    ground = Ground(short_tmp)
    fence = FenceFile(short_tmp)
    await fence.write(fence.now() + 3600)
    await ground.client.connect()
    await ground.client.make_workspace(ground.workspace, None)
    yield ground
    await ground.client.connect()
    pid = (await ground.client.status())["pid"]
    await ground.client.aclose()
    await gone(pid)


async def gone(pid: int) -> None:
    """Waits for the end of a process that is not our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def test_a_step_from_start_to_end(ground: Ground) -> None:
    step = ground.step("echo hi; exit 3")
    await ground.client.start_step(step)
    started = handles.read_started(step)
    assert started is not None and started.boot_id == handles.boot_id() and started.pid > 0
    await ground.closed(step)
    assert not handles.is_running(started)
    ended, closed = handles.read_exit(step), handles.read_closed(step)
    assert ended is not None and (ended.exit_code, ended.signal, ended.cause) == (3, None, None)
    assert closed is not None and (closed.gone, closed.out_bytes, closed.err_bytes) == (False, 3, 0)
    assert (step / "out").read_bytes() == b"hi\n"
    # The file may be there before its hint is.
    await ground.until(lambda: ("closed", step) in ground.hints)
    assert [hint for hint in ground.hints if hint[1] == step] == [("exited", step), ("closed", step)]


async def test_the_files_of_a_step_that_never_started_say_nothing(ground: Ground) -> None:
    step = ground.step("true")
    assert not handles.is_claimed(step) and not handles.is_closed(step)
    assert handles.read_started(step) is handles.read_exit(step) is handles.read_closed(step) is None


async def test_a_command_that_isnt_there_is_the_steps_end_and_no_error_here(ground: Ground) -> None:
    step = ground.step("")
    handles.write_step(step, StepFile(argv=("nope",), workspace=str(ground.workspace), token="t", private_tmp=False))
    await ground.client.start_step(step)
    await ground.closed(step)
    ended = handles.read_exit(step)
    assert ended is not None and (ended.exit_code, ended.cause, ended.error) == (127, "exec", "command not found: nope")


async def test_stop_and_remove(ground: Ground) -> None:
    step = ground.step("while :; do sleep 1000; done")
    await ground.client.start_step(step)
    with pytest.raises(Refused) as refused:
        await ground.client.remove(ground.workspace)
    assert refused.value.code == "busy"
    assert await ground.client.stop_run(ground.run, 1000, True) is True
    await ground.closed(step)
    ended = handles.read_exit(step)
    assert ended is not None and (ended.signal, ended.cause) == (9, "stop")
    assert await ground.client.stop_run(ground.run, 0.1, False) is False
    await ground.client.give_back(ground.workspace)
    await ground.client.remove(ground.workspace)
    await ground.client.remove(ground.run)
    assert not ground.workspace.exists() and not ground.run.exists()


async def test_a_passed_fence_refuses_by_its_code(ground: Ground) -> None:
    fence = FenceFile(ground.state)
    await fence.write(fence.now() - 1)
    with pytest.raises(Refused) as refused:
        await ground.client.start_step(ground.step("true"))
    assert refused.value.code == "fence"


async def test_another_client_takes_a_running_step_up_again(ground: Ground) -> None:
    """The daemon dies while a step runs, and comes back after it has ended."""
    step = ground.step("read x < go; echo done; exit 4")
    go = ground.workspace / "src" / "go"
    os.mkfifo(go)
    await ground.client.start_step(step)
    before = (await ground.client.status())["pid"]
    await ground.client.aclose()
    opened = os.open(go, os.O_RDWR)
    os.write(opened, b"x\n")
    ground.client = ground.new_client()
    await ground.client.connect()
    await ground.client.start_step(step)
    await ground.closed(step)
    os.close(opened)
    ended = handles.read_exit(step)
    assert ended is not None and ended.exit_code == 4
    assert (step / "out").read_bytes() == b"done\n"
    assert (await ground.client.status())["pid"] == before


async def test_a_killed_shepherd_is_replaced_and_its_steps_go_on(ground: Ground) -> None:
    step = ground.step("sleep 1000")
    await ground.client.start_step(step)
    started = handles.read_started(step)
    assert started is not None and handles.is_running(started)
    shepherd = (await ground.client.status())["pid"]
    os.kill(shepherd, signal.SIGKILL)
    await ground.until(lambda: ("reconnected", None) in ground.hints)
    assert handles.is_running(started)
    status = await ground.client.status()
    assert status["pid"] != shepherd
    assert [live["dir"] for live in status["live"]] == [str(step)]
    assert await ground.client.stop_run(ground.run, 0.0, True) is True
    await ground.closed(step)


async def test_with_its_guardian_its_steps_are_gone(ground: Ground) -> None:
    step = ground.step("sleep 1000")
    await ground.client.start_step(step)
    started = handles.read_started(step)
    assert started is not None
    status = await ground.client.status()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (status["pid"], status["guardian"]):
            os.kill(pid, number)
    await ground.until(lambda: ("reconnected", None) in ground.hints)
    closed = handles.read_closed(step)
    assert closed is not None and closed.gone
    assert handles.read_exit(step) is None
    assert not handles.is_running(started)
    assert (await ground.client.status())["pid"] != status["pid"]


async def test_requests_that_lose_their_connection_are_asked_again(ground: Ground) -> None:
    shepherd = (await ground.client.status())["pid"]
    os.kill(shepherd, signal.SIGSTOP)
    asking = asyncio.create_task(ground.client.status())
    # One pass of the event loop: the request is on its way to a shepherd that will never read it.
    await asyncio.sleep(0)
    os.kill(shepherd, signal.SIGKILL)
    assert (await asking)["pid"] != shepherd


async def test_many_requests_at_once(ground: Ground) -> None:
    steps = [ground.step(f"echo {index}", index) for index in range(50)]
    await asyncio.gather(*(ground.client.start_step(step) for step in steps))
    for index, step in enumerate(steps):
        await ground.closed(step)
        assert (step / "out").read_bytes() == f"{index}\n".encode()


async def test_a_shepherd_of_another_config_is_told_the_uids(ground: Ground) -> None:
    other = ShepherdClient(ground.state, uid_base=300_000, uid_count=5)
    await other.connect()
    status = await other.status()
    await other.aclose()
    assert (status["uid_base"], status["uid_count"]) == (300_000, 5)


async def test_a_state_directory_with_a_long_name_is_no_problem(short_tmp: Path) -> None:
    state = short_tmp / ("x" * 120)
    state.mkdir()
    client = ShepherdClient(state, linger=0.1)
    await client.connect()
    pid = (await client.status())["pid"]
    await client.aclose()
    await gone(pid)


async def test_where_no_shepherd_can_start_the_reason_is_said(short_tmp: Path) -> None:
    client = ShepherdClient(short_tmp / "missing", patience=1.0)
    with pytest.raises(RunnerError, match=r"no shepherd answers in .*No such file"):
        await client.connect()
    await client.aclose()
    with pytest.raises(RunnerError, match="closed"):
        await client.status()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    handles.write_json_atomic(path, {"a": 1}, durable=True)
    with pytest.raises(TypeError):
        handles.write_json_atomic(path, object())
    assert path.read_text() == '{"a":1}'
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunnerError, match="can't be written"):
        handles.write_json_atomic(tmp_path / "none" / "file", {})


def test_a_damaged_file_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "exit").write_text('{"exit_code": "zero"}')
    with pytest.raises(RunnerError, match="damaged"):
        handles.read_exit(tmp_path)


async def test_the_fence_names_a_guarded_daemon_and_says_what_was_confirmed(short_tmp: Path) -> None:
    """A confirmation is of the fence as last written: the next one voids it by being later."""
    fence = FenceFile(short_tmp, guard_patience=0.5)
    await fence.guard(True)
    assert not (short_tmp / "fence").exists()
    await fence.write(5.0)
    said = json.loads((short_tmp / "fence").read_text())
    assert (said["fence_at"], said["daemon"]["pid"], said["daemon"]["patience"]) == (5.0, os.getpid(), 0.5)
    assert "confirmed_at" not in said
    await fence.confirm()
    await fence.guard(False)
    said = json.loads((short_tmp / "fence").read_text())
    assert said == {"fence_at": 5.0, "boot_id": handles.boot_id(), "confirmed_at": 5.0}
    assert not fence.is_guarded
