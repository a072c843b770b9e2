"""Directories of runs, and workspaces: made, given away and removed. Standard library only; ``host`` has it.

What is small is removed at once; work on whole trees is done in forked workers: it may take seconds, and nothing here
may wait.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from supervisor.shepherd import linux
from supervisor.shepherd.files import (
    PromisedFile,
    Refusal,
    StateDirectory,
    TooLarge,
    chown_tree,
    exists,
    remove_tree,
)
from supervisor.shepherd.spares import PARTS, SpareRuns, SpareWorkspaces
from supervisor.shepherd.spawn import fork_quietly, reset_signals
from supervisor.shepherd.spec import Policy

_WORKERS = 4
_REMOVED_AT_ONCE = 64
_INTENT = re.compile(r"(?:[0-9]{1,6}/)?spec|0/plan\.json")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Answer = Callable[[str | None], None]


@dataclass
class _Work:
    """A worker's task on a tree; ``answer`` gets None, or what went wrong."""

    top: str
    name: str
    run: Callable[[], None]
    answer: Answer
    report: int = field(default=-1)


class Trees:
    """``policy`` may be replaced. ``user_of`` names the step that is using ``runs/<name>`` or ``work/<name>``."""

    def __init__(self, state: StateDirectory, policy: Policy, user_of: Callable[[str, str], str | None]) -> None:
        self.policy = policy
        self._state = state
        self._user_of = user_of
        self._spare_runs = SpareRuns(state)
        self._spare_workspaces = SpareWorkspaces(state)
        self._workers: dict[int, _Work] = {}
        self._waiting: deque[_Work] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._workers or self._waiting)

    @property
    def workers(self) -> Collection[int]:
        return self._workers.keys()

    def close(self) -> None:
        """Ends what is being done: whoever asked for it asks the next shepherd again."""
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for work in self._workers.values():
            os.close(work.report)
        self._spare_runs.close()
        self._spare_workspaces.close()

    # --- making ---

    def prepare(self, path: object, files: object, workspace: object, uid: object) -> None:
        """Writes a run's files, its own ``spec`` last, and makes its workspace. What was prepared before is left as it
        is. Raises Refusal."""
        (run,) = self._state.names(path, "runs", 1)
        if not isinstance(files, dict) or not all(
            isinstance(name, str) and _INTENT.fullmatch(name) and isinstance(text, str) for name, text in files.items()
        ):
            raise Refusal("spec", "files: must be the texts of spec files, by name")
        try:
            directory, is_new = self._run_directory(run)
            try:
                if is_new or not exists(directory, "spec"):
                    for name in sorted(files, key="spec".__eq__):
                        self._write(directory, name, files[name].encode())
            finally:
                os.close(directory)
        except OSError as error:
            raise Refusal("failed", f"{path}: {error.strerror}") from error
        except UnicodeError as error:
            raise Refusal("spec", f"files: {error}") from error
        self.make_workspace(workspace, uid)

    def _run_directory(self, run: str) -> tuple[int, bool]:
        runs = self._state.open("runs")
        try:
            is_new = not exists(runs, run)
            if is_new and not self._spare_runs.take(runs, run):
                self._make(runs, run, self.policy.owner)
            return os.open(run, _DIRECTORY, dir_fd=runs), is_new
        finally:
            os.close(runs)

    def _write(self, run: int, name: str, text: bytes) -> None:
        step, _, name = name.rpartition("/")
        directory = run
        if step:
            self._make(run, step, self.policy.owner)
            directory = os.open(step, _DIRECTORY, dir_fd=run)
        try:
            file = PromisedFile(self._state, directory, name)
            file.reserve()
            file.write_bytes(text)
        finally:
            if directory != run:
                os.close(directory)

    def begin(self, workspace: str) -> None:
        """Something of a job is about to start in it."""
        self._spare_workspaces.begin(workspace)

    def make_workspace(self, path: object, uid: object) -> None:
        """Idempotent. Raises Refusal."""
        (name,) = self._state.names(path, "work", 1)
        owner = self._owner(uid)
        try:
            work = self._state.open("work")
            try:
                is_spare = not exists(work, name) and self._spare_workspaces.take(work, name)
                if not is_spare:
                    self._make(work, name, owner)
                within = os.open(name, _DIRECTORY, dir_fd=work)
            finally:
                os.close(work)
            try:
                if is_spare:
                    _chown(within, *(owner or (os.geteuid(), os.getegid())))
                    self._spare_workspaces.note(name, within)
                for part in () if is_spare else PARTS:
                    self._make(within, part, owner)
            finally:
                os.close(within)
        except OSError as error:
            raise Refusal("failed", f"{path}: {error.strerror}") from error

    @staticmethod
    def _make(parent: int, name: str, owner: tuple[int, int] | None) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise NotADirectoryError(20, "is there and not a directory", name) from None
        else:
            if owner:
                os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)

    def _owner(self, uid: object) -> tuple[int, int] | None:
        if uid is None:
            return self.policy.owner
        if isinstance(uid, bool) or not isinstance(uid, int) or not self.policy.allows(uid):
            raise Refusal("policy", f"uid: {uid} is not one this host gives to jobs")
        return (self.policy.real(uid),) * 2

    # --- giving away ---

    def own(self, path: object, uid: object, answer: Answer) -> None:
        """Gives a workspace to a job's uid (None: the daemon's), in a worker: what a checkout made there."""
        self._give(path, self._owner(uid) or (os.geteuid(), os.getegid()), answer)

    def give_back(self, path: object, answer: Answer) -> None:
        """Gives a workspace to the daemon's uid, in a worker."""
        self._give(path, self.policy.service, answer)

    def _give(self, path: object, owner: tuple[int, int], answer: Answer) -> None:
        (name,) = self._state.names(path, "work", 1)
        self._check_unused("work", name)

        def run() -> None:
            chown_tree(self._state.open("work", name), *owner)

        self._submit(_Work("work", name, run, answer))

    # --- removing ---

    def remove(self, paths: object, answer: Answer) -> None:
        """Removes workspaces and runs, in a worker where they are large. Idempotent. Raises Refusal while something of
        them runs."""
        trees = [self._tree(path) for path in (paths if isinstance(paths, list) else [paths])]
        for top, name in trees:
            self._check_unused(top, name)
        left = [tree for tree in trees if not self._remove_at_once(*tree)]
        if not left:
            answer(None)
            return

        def run() -> None:
            for top, name in left:
                self._remove(top, name)

        self._submit(_Work(*left[0], run, answer))

    def _remove_at_once(self, top: str, name: str) -> bool:
        try:
            if not (self._spare_runs if top == "runs" else self._spare_workspaces).keep(name):
                self._remove(top, name, _REMOVED_AT_ONCE)
        except (TooLarge, OSError):
            return False  # for a worker, which says what is wrong
        return True

    def _remove(self, top: str, name: str, most: int | None = None) -> None:
        """By descriptors, so that no symlink leads it out."""
        parent = self._state.open(top)
        try:
            remove_tree(parent, name, most)
        finally:
            os.close(parent)

    def _tree(self, path: object) -> tuple[str, str]:
        try:
            (name,) = self._state.names(path, "runs", 1)
        except Refusal:
            (name,) = self._state.names(path, "work", 1)
            return "work", name
        return "runs", name

    def _check_unused(self, top: str, name: str) -> None:
        if (user := self._user_of(top, name)) is not None:
            raise Refusal("busy", f"{top}/{name} is in use by {user}")

    # --- workers ---

    def _submit(self, work: _Work) -> None:
        self._waiting.append(work)
        self._start_workers()

    def _start_workers(self) -> None:
        while self._waiting and len(self._workers) < _WORKERS:
            work = self._waiting.popleft()
            work.report, write = os.pipe2(os.O_CLOEXEC)
            try:
                pid = fork_quietly()
            except OSError as error:
                os.close(write)
                os.close(work.report)
                work.answer(f"no process to do it: {error.strerror}")
                continue
            if pid == 0:
                _do(work, write)
            os.close(write)
            self._workers[pid] = work

    def worker_ended(self, pid: int) -> None:
        """Any child that was reaped and is no step's may be one."""
        work = self._workers.pop(pid, None)
        if work is None:
            return
        with open(work.report, "rb") as file:
            said = file.read(4096).decode(errors="replace")
        work.answer(None if said == "done" else said or "the worker died")
        self._start_workers()


def _chown(workspace: int, uid: int, gid: int) -> None:
    for part in PARTS:
        os.chown(part, uid, gid, dir_fd=workspace, follow_symlinks=False)
    os.fchown(workspace, uid, gid)


def _do(work: _Work, report: int) -> None:
    try:
        reset_signals()
        # It has the shepherd's lock open: one that outlived it would keep the next from beginning.
        linux.die_with_parent(signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            try:
                work.run()
                os.write(report, b"done")
            except OSError as error:
                said = f"{work.top}/{work.name}: {error.strerror}: {error.filename}"
                os.write(report, said.encode(errors="replace")[:4096])
            except Exception as error:
                os.write(report, f"{work.top}/{work.name}: {error}".encode(errors="replace")[:4096])
    finally:
        os._exit(0)
