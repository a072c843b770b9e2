"""All live steps of the host: starts them, reaps, watches the fence, and keeps uids apart. Standard library only.

Called by ``server`` with requests, and by the loop. Small trees are removed at once; work on whole ones (removing,
giving away) is done in forked workers: it may take seconds, and nothing here may wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from supervisor.shepherd import kill, linux
from supervisor.shepherd.fence import Fence, boot_id
from supervisor.shepherd.files import Refusal, StateDirectory, TooLarge, chown_tree, exists, remove_tree, say
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.spares import Spares
from supervisor.shepherd.spawn import Spawner, fork_quietly, reset_signals
from supervisor.shepherd.spec import Policy, is_uid_range, read_spec
from supervisor.shepherd.step import Place, Step
from supervisor.shepherd.uids import UidRanges

_WORKERS = 4
_REAP_TURN = 500
_HAUNT_RETRY = 1.0
_FENCE_RETRY = 0.05
_GUARD_LOOK = 0.5
_REMOVED_AT_ONCE = 64

Answer = Callable[[str | None], None]


@dataclass
class _Work:
    """A worker's task on a tree; ``answer`` gets None, or what went wrong."""

    top: str
    name: str
    run: Callable[[], None]
    answer: Answer
    report: int = field(default=-1)


class Host:
    """``on_event`` is called with ``exited`` or ``closed`` and the step's path, when that is on disk."""

    def __init__(
        self,
        loop: Loop,
        state: StateDirectory,
        policy: Policy,
        uids: UidRanges,
        *,
        file_limit: tuple[int, int],
        tmp_problem: str | None,
    ) -> None:
        self.loop = loop
        self.state = state
        self.policy = policy
        self._uids = uids
        self.spawner = Spawner(state.fd, file_limit)
        self.boot_id = boot_id()
        self._spares = Spares(state)
        self.fence = Fence(state)
        self._tmp_problem = tmp_problem
        self.on_event: Callable[[str, str], None] = lambda *_: None
        self._live: dict[tuple[str, str], Step] = {}
        self._haunted: list[Step] = []
        self._mains: dict[int, Step] = {}
        self._workers: dict[int, _Work] = {}
        self._waiting_work: deque[_Work] = deque()
        self._fence_timer = False
        self.ending = False
        self._guard()

    @property
    def is_idle(self) -> bool:
        return not (self._live or self._haunted or self._workers or self._waiting_work or self._guards)

    # --- requests ---

    def start(self, path: object) -> dict[str, Any]:
        """Starts the step at most once: its claim is made exclusively. Raises Refusal when it wasn't, and never ran."""
        run, index = self.state.names(path, "runs", 2)
        directory = self.state.open("runs", run, index)
        step: Step | None = None
        try:
            if exists(directory, "claim"):
                return {"again": True}
            step = self._start(Place(str(path), run, index, directory))
        finally:
            if step is None:
                os.close(directory)
        return {"pid": step.pid, "at": step.started_at}

    def _start(self, place: Place) -> Step:
        if self.ending:
            raise Refusal("failed", "the shepherd is ending")
        self.fence.check_start()
        step = self._admit(place)
        try:
            self.state.claim(place.directory)
        except OSError as error:
            raise Refusal("failed", f"claim: {error.strerror}") from error
        try:
            step.start()
        except Refusal:
            os.unlink("claim", dir_fd=place.directory)
            raise
        self._live[place.run, place.index] = step
        if step.pid is not None:
            self._mains[step.pid] = step
        self._watch_fence()
        return step

    def _admit(self, place: Place) -> Step:
        spec = read_spec(self.state, self.policy, place.directory)
        if spec.private_tmp and self._tmp_problem is not None:
            spec = replace(spec, private_tmp=False)
        if spec.own_uid and spec.ids is not None:
            for other in (*self._live.values(), *self._haunted):
                # Of the same run too: to start a process is to have its uid for a moment, and one that lives could
                # signal whoever has it. What is being closed was sent SIGKILL already.
                if other.own_uid == spec.ids[0] and (other.place.run != place.run or other.pid is not None):
                    raise Refusal("busy", f"uid {spec.ids[0]} is used by {other.place.run}/{other.place.index}")
        os.close(self.state.open("work", *spec.workspace))
        return Step(self, place, spec)

    def stop(self, path: object, grace: float, at_once: bool) -> bool:
        """Stops what runs of a run; False if nothing does."""
        (run,) = self.state.names(path, "runs", 1)
        steps = [step for step in self._live.values() if step.place.run == run]
        for step in steps:
            step.stop("stop", grace, at_once=at_once)
        return bool(steps)

    def make_workspace(self, path: object, uid: object) -> None:
        """Idempotent. Raises Refusal."""
        (name,) = self.state.names(path, "work", 1)
        owner = self._owner(uid)
        try:
            top = self.state.open("work")
            try:
                _make_directory(top, name, owner)
            finally:
                os.close(top)
            within = self.state.open("work", name)
            try:
                for part in ("src", "tmp", "home"):
                    _make_directory(within, part, owner)
            finally:
                os.close(within)
        except OSError as error:
            raise Refusal("failed", f"{path}: {error.strerror}") from error

    def remove(self, paths: object, answer: Answer) -> None:
        """Removes workspaces and handles, in a worker if they are large. Idempotent. Raises Refusal while something of
        them runs."""
        if not isinstance(paths, list):
            paths = [paths]
        trees = [self._tree(path) for path in paths]
        left = [tree for tree in trees if not self._remove_at_once(*tree)]
        if not left:
            answer(None)
            return

        def run() -> None:
            for top, name in left:
                _remove(self.state, top, name)

        self._submit(_Work(*left[0], run, answer))

    def _remove_at_once(self, top: str, name: str) -> bool:
        if top == "runs" and self._spares.keep(name):
            return True
        try:
            _remove(self.state, top, name, _REMOVED_AT_ONCE)
        except (TooLarge, OSError):
            return False  # for a worker, which says what is wrong
        return True

    def own(self, path: object, uid: object, answer: Answer) -> None:
        """Gives a workspace to a job's uid (None: the shepherd's own), in a worker: what a checkout made there."""
        (name,) = self.state.names(path, "work", 1)
        self._tree(path)
        owner = self._owner(uid) or (os.geteuid(), os.getegid())
        self._give("work", name, owner, answer)

    def give_back(self, path: object, answer: Answer) -> None:
        """Gives a workspace to the daemon's uid, in a worker."""
        (name,) = self.state.names(path, "work", 1)
        self._tree(path)
        self._give("work", name, self.policy.service, answer)

    def _give(self, top: str, name: str, owner: tuple[int, int], answer: Answer) -> None:
        def run() -> None:
            chown_tree(self.state.open(top, name), *owner)

        self._submit(_Work(top, name, run, answer))

    def _owner(self, uid: object) -> tuple[int, int] | None:
        if uid is None:
            return self.policy.owner
        if isinstance(uid, bool) or not isinstance(uid, int) or not self.policy.allows(uid):
            raise Refusal("policy", f"uid: {uid} is not one this host gives to jobs")
        return (self.policy.real(uid),) * 2

    def set_uids(self, base: object, count: object) -> None:
        """The daemon's config was changed. Raises Refusal where the shepherd has rights that the daemon has not: only
        who could as well have started it may say so."""
        if self.policy.owner is not None:
            raise Refusal("policy", "the uids of this host's jobs are set where the shepherd is started")
        if not (isinstance(base, int) and isinstance(count, int) and is_uid_range(base, count)):
            raise Refusal("spec", "uid_base and uid_count must make a range of uids above 0")
        shift = self._uids.take(base, count, self.policy.service[0]) if self.policy.is_root and count else 0
        self.policy = replace(self.policy, uid_base=base, uid_count=count, uid_shift=shift)

    def live(self) -> list[dict[str, Any]]:
        steps = [(step, step.state) for step in self._live.values()] + [(step, "haunted") for step in self._haunted]
        return [
            {
                "dir": step.place.path,
                "pid": step.pid,
                "uid": step.spec.ids[0] if step.spec.ids else None,
                "state": state,
                "cause": step.cause,
                "since": step.started_at,
            }
            for step, state in steps
        ]

    def isolation(self) -> dict[str, str]:
        """What holds jobs apart on this host, in words."""
        policy, tmp = self.policy, self._tmp_problem
        if policy.gives_uids:
            first = policy.real(policy.uid_base)
            users = f"each job a uid of its own, {first} to {first + policy.uid_count - 1}"
        else:
            users = "absent: no uids are set aside" if policy.is_root else "absent: not root, all jobs share one uid"
        return {
            "users": users,
            "tmp": "each job a /tmp of its own" if tmp is None else f"absent: {tmp}; TMPDIR only",
            "processes": "ended by uid" if policy.gives_uids else "ended by process group, subreaper and environment",
            "privileges": "no new privileges",
        }

    def end(self) -> None:
        """The shepherd is told to end: all is killed, as losses. ``server`` calls it, and leaves when all is closed."""
        self.ending = True
        for step in list(self._live.values()):
            step.abandon()

    # --- what the steps ask (Ground) ---

    def orphans_of(self, step: Step) -> set[int]:
        orphans = {pid for pid in kill.children(os.getpid()) if pid not in self._mains and pid not in self._workers}
        orphans = {pid for pid in orphans if not kill.is_dead(pid)}
        if not orphans:
            return orphans
        if step.own_uid is not None:
            return {pid for pid in orphans if step.own_uid in kill.uids(pid)}
        others = {other.own_uid for other in (*self._live.values(), *self._haunted)}
        orphans = {pid for pid in orphans if not others & kill.uids(pid)}
        mine = {pid for pid in orphans if step.marks(pid)}
        sharing = [other for other in self._live.values() if other.own_uid is None]
        if all(other.state == "closing" for other in sharing):
            # It lost every mark, but nothing that is to go on could have started it.
            return orphans
        return mine

    def tell(self, event: str, step: Step) -> None:
        self.on_event(event, step.place.path)

    def closed(self, step: Step, remains: bool) -> None:
        del self._live[step.place.run, step.place.index]
        if remains and step.own_uid is not None:
            # In uninterruptible sleep, say: its uid goes to no other run before it is dead.
            say(f"{step.place.path}: processes of uid {step.own_uid} outlive SIGKILL")
            self._haunted.append(step)
            self.loop.at(now() + _HAUNT_RETRY, self._exorcise)

    def _exorcise(self) -> None:
        self._haunted = [step for step in self._haunted if self.orphans_of(step)]
        for step in self._haunted:
            if step.own_uid is not None:
                kill.send_uid(step.own_uid, (signal.SIGKILL,))
        if self._haunted:
            self.loop.at(now() + _HAUNT_RETRY, self._exorcise)

    # --- children ---

    def reap(self) -> None:
        """Dead children: main processes leave their exit on disk first; orphans of jobs just go.

        A job that forks as fast as they are reaped must not keep this from killing it: the rest comes in the next turn.
        """
        for _ in range(_REAP_TURN):
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if info is None:
                break
            step = self._mains.get(info.si_pid)
            if step is not None:
                step.exited(info)
            os.waitpid(info.si_pid, 0)
            if step is not None:
                del self._mains[info.si_pid]
                step.reaped()
            elif info.si_pid in self._workers:
                self._worker_ended(self._workers.pop(info.si_pid))
        else:
            self.loop.at(now(), self.reap)
        for step in list(self._live.values()):
            if step.state == "closing":
                step.close()

    # --- the fence ---

    def _watch_fence(self) -> None:
        if not self._fence_timer and self._live and self.fence.at is not None:
            self._fence_timer = True
            self.loop.at(max(self.fence.at, now() + _FENCE_RETRY), self._on_fence)

    def _on_fence(self) -> None:
        self._fence_timer = False
        if self.fence.has_passed:
            running = [step for step in self._live.values() if step.pid is not None and step.cause != "fence"]
            if running:
                say(f"the fence has passed: killing {len(running)} steps")
            for step in running:
                step.stop("fence", 0.0, at_once=True)
        self._watch_fence()

    def _guard(self) -> None:
        """Kills a daemon that has jobs of its own and doesn't say in time that it has ended them."""
        at = self.fence.overdue_at()
        daemon = self.fence.guarded
        if daemon is not None and at is not None and now() > at and daemon.lives:
            say(f"the fence has passed and the daemon {daemon.pid} doesn't confirm that its jobs ended: killing it")
            daemon.kill(self.policy.service[0])
        look = now() + _GUARD_LOOK
        self.loop.at(look if at is None or at <= now() else min(look, at), self._guard)

    @property
    def _guards(self) -> bool:
        daemon = self.fence.guarded
        return daemon is not None and self.fence.overdue_at() is not None and daemon.lives

    # --- workers ---

    def _tree(self, path: object) -> tuple[str, str]:
        try:
            top, (name,) = "runs", self.state.names(path, "runs", 1)
        except Refusal:
            top, (name,) = "work", self.state.names(path, "work", 1)
        for step in (*self._live.values(), *self._haunted):
            if name == (step.place.run if top == "runs" else step.spec.workspace[0]):
                raise Refusal("busy", f"{path} is in use by {step.place.path}")
        return top, name

    def _submit(self, work: _Work) -> None:
        self._waiting_work.append(work)
        self._start_workers()

    def _start_workers(self) -> None:
        while self._waiting_work and len(self._workers) < _WORKERS:
            work = self._waiting_work.popleft()
            work.report, write = os.pipe2(os.O_CLOEXEC)
            try:
                pid = fork_quietly()
            except OSError as error:
                os.close(write)
                os.close(work.report)
                work.answer(f"no process to do it: {error.strerror}")
                continue
            if pid == 0:
                _do_work(work, write)
            os.close(write)
            self._workers[pid] = work

    def _worker_ended(self, work: _Work) -> None:
        with open(work.report, "rb") as file:
            said = file.read(4096).decode(errors="replace")
        work.answer(None if said == "done" else said or "the worker died")
        self._start_workers()


def _do_work(work: _Work, report: int) -> None:
    try:
        reset_signals()
        # It has the shepherd's lock open: one that outlived it would keep the next from beginning.
        linux.die_with_parent(signal.SIGKILL)
        work.run()
        os.write(report, b"done")
    except OSError as error:
        os.write(report, f"{work.top}/{work.name}: {error.strerror}: {error.filename}".encode(errors="replace")[:4096])
    except BaseException as error:
        os.write(report, f"{work.top}/{work.name}: {error}".encode(errors="replace")[:4096])
    finally:
        os._exit(0)


def _make_directory(parent: int, name: str, owner: tuple[int, int] | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        if owner:
            os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise NotADirectoryError(20, "is there and not a directory", name)


def _remove(state: StateDirectory, top: str, name: str, most: int | None = None) -> None:
    """By descriptors, so that no symlink leads it out."""
    parent = state.open(top)
    try:
        remove_tree(parent, name, most)
    finally:
        os.close(parent)
