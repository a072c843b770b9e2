"""All live steps of the host: starts them, reaps, watches the fence, and keeps uids apart. Standard library only.

Called by ``server`` with requests, and by the loop.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from supervisor.shepherd import kill
from supervisor.shepherd.bond import Bond, Estate, Names
from supervisor.shepherd.fence import Fence, boot_id
from supervisor.shepherd.files import Refusal, StateDirectory, exists, say
from supervisor.shepherd.heirs import Heirs
from supervisor.shepherd.launcher import LAUNCHER, Charter, Launcher
from supervisor.shepherd.loop import Loop, now
from supervisor.shepherd.spawn import Order
from supervisor.shepherd.spec import Policy, is_uid_range, read_spec
from supervisor.shepherd.step import Place, Step
from supervisor.shepherd.trees import Trees
from supervisor.shepherd.uids import UidRanges

_REAP_TURN = 500
_HAUNT_RETRY = 1.0
_FENCE_RETRY = 0.05
_GUARD_LOOK = 0.5


class Host:
    """``on_event`` is called with ``exited`` or ``closed`` and the step's path, when that is on disk."""

    def __init__(
        self,
        loop: Loop,
        state: StateDirectory,
        policy: Policy,
        uids: UidRanges,
        bond: Bond,
        *,
        charter: Charter,
        tmp_problem: str | None,
    ) -> None:
        self.loop = loop
        self.state = state
        self.policy = policy
        self.bond = bond
        self._uids = uids
        self._set_uids = bond.estate.uids
        self.launcher = Launcher(loop, state, charter, self._on_exit, self._find_begun, bond.flush)
        self._heirs = Heirs(self, bond)
        self.boot_id = boot_id()
        self.trees = Trees(state, policy, self._user_of)
        self.fence = Fence(state)
        self._tmp_problem = tmp_problem
        self.on_event: Callable[[str, str], None] = lambda *_: None
        self._live: dict[tuple[str, str], Step] = {}
        self._haunted: list[Step] = []
        self._mains: dict[int, Step] = {}
        self._fence_timer = False
        self.ending = False
        self._guard()

    @property
    def is_idle(self) -> bool:
        return not (self._live or self._haunted or self.trees.is_busy or self._guards)

    # --- one shepherd after the other ---

    def take_up(self) -> set[Names]:
        """The steps of the shepherd before that go on."""
        for step in self._heirs.take_up(self.policy):
            self._live[step.place.run, step.place.index] = step
        self.launcher.note_steps(len(self._live))
        self._watch_fence()
        return set(self._live)

    def on_news(self) -> None:
        """Of the guardian."""
        if self.bond.is_lost:
            say("the guardian is gone: its place is taken, and another shepherd goes on")
            self.loop.running = False
        else:
            self._heirs.look()

    def hand_over(self) -> Estate:
        """What the next shepherd needs to go on. This one does nothing more."""
        self.launcher.close()
        self.trees.close()
        self._heirs.close()
        return Estate({names: step.hand_over() for names, step in self._live.items()}, self._set_uids)

    # --- requests ---

    def start(self, path: object, answer: Callable[[dict[str, Any]], None]) -> None:
        """Starts the step at most once: its claim is made exclusively. Raises Refusal, or answers with one, when it
        wasn't, and never ran."""
        run, index = self.state.names(path, "runs", 2)
        directory = self.state.open("runs", run, index)
        step: Step | None = None
        try:
            if exists(directory, "claim"):
                answer({"ok": True, "again": True})
            else:
                step = self._start(Place(str(path), run, index, directory), answer)
        finally:
            if step is None:
                os.close(directory)

    def _start(self, place: Place, answer: Callable[[dict[str, Any]], None]) -> Step:
        def begun(problem: str | None) -> None:
            if problem is None:
                answer({"ok": True, "pid": step.pid, "at": None if step.abandoned else step.started_at})
                return
            del self._live[place.run, place.index]
            self.launcher.note_steps(len(self._live))
            os.unlink("claim", dir_fd=place.directory)
            os.close(place.directory)
            answer({"ok": False, "code": "failed", "error": problem})

        if self.ending:
            raise Refusal("failed", "the shepherd is ending")
        self.fence.check_start()
        step = self._admit(place)
        self.trees.begin(step.spec.workspace[0])
        try:
            self.state.claim(place.directory)
        except OSError as error:
            raise Refusal("failed", f"claim: {error.strerror}") from error
        try:
            step.start(begun)
        except Refusal:
            os.unlink("claim", dir_fd=place.directory)
            raise
        self._live[place.run, place.index] = step
        self.launcher.note_steps(len(self._live))
        self._watch_fence()
        return step

    def _admit(self, place: Place) -> Step:
        spec = read_spec(self.state, self.policy, place.directory)
        if spec.private_tmp and self._tmp_problem is not None:
            spec = replace(spec, private_tmp=False)
        if spec.own_uid and spec.ids is not None:
            for other in (*self._live.values(), *self._haunted):
                if other.own_uid == spec.ids[0] and other.place.run != place.run:
                    raise Refusal("busy", f"uid {spec.ids[0]} is used by run {other.place.run}")
        os.close(self.state.open("work", *spec.workspace))
        return Step(self, place, spec)

    def stop(self, path: object, grace: float, at_once: bool) -> bool:
        """Stops what runs of a run; False if nothing does."""
        (run,) = self.state.names(path, "runs", 1)
        steps = [step for step in self._live.values() if step.place.run == run]
        for step in steps:
            step.stop("stop", grace, at_once=at_once)
        return bool(steps)

    def set_uids(self, base: object, count: object) -> None:
        """The daemon's config was changed. Raises Refusal where the shepherd has rights that the daemon has not: only
        who could as well have started it may say so."""
        if self.policy.owner is not None:
            raise Refusal("policy", "the uids of this host's jobs are set where the shepherd is started")
        if not (isinstance(base, int) and isinstance(count, int) and is_uid_range(base, count)):
            raise Refusal("spec", "uid_base and uid_count must make a range of uids above 0")
        shift = self._uids.take(base, count, self.policy.service[0]) if self.policy.is_root and count else 0
        self.policy = replace(self.policy, uid_base=base, uid_count=count, uid_shift=shift)
        self._set_uids = base, count
        self.bond.set_uids(base, count)
        self.trees.policy = self.policy

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

    def _user_of(self, top: str, name: str) -> str | None:
        """The step that is using a run's directory or a workspace."""
        for step in (*self._live.values(), *self._haunted):
            if name == (step.place.run if top == "runs" else step.spec.workspace[0]):
                return step.place.path
        return None

    # --- what the steps ask (Ground) ---

    def orphans_of(self, step: Step) -> set[int]:
        own = {self.launcher.pid, *self.trees.workers}
        orphans = {pid for pid in kill.children(os.getpid()) if pid not in self._mains and pid not in own}
        orphans |= self._heirs.strays()
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

    def begun(self, step: Step) -> None:
        assert step.pid is not None
        self._mains[step.pid] = step

    def closed(self, step: Step, remains: bool) -> None:
        del self._live[step.place.run, step.place.index]
        self.launcher.note_steps(len(self._live))
        if not remains:
            self._heirs.closed(step)
        if remains and step.own_uid is not None:
            # In uninterruptible sleep, say: its uid goes to no other run before it is dead.
            say(f"{step.place.path}: processes of uid {step.own_uid} outlive SIGKILL")
            self._haunted.append(step)
            self.loop.at(now() + _HAUNT_RETRY, self._exorcise)

    def _exorcise(self) -> None:
        still = [step for step in self._haunted if self.orphans_of(step)]
        for step in set(self._haunted) - set(still):
            self._heirs.closed(step)
        self._haunted = still
        for step in self._haunted:
            if step.own_uid is not None:
                kill.send_uid(step.own_uid, (signal.SIGKILL,))
        if self._haunted:
            self.loop.at(now() + _HAUNT_RETRY, self._exorcise)

    # --- children ---

    def reap(self) -> None:
        """Dead children: orphans of jobs just go. A main process is the launcher's child, and so one of these only
        when that died: its exit is on disk first all the same.

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
            if step is None and self.launcher.has_died:
                # Before its children: what it said of them last tells whose they are.
                self.launcher.ended()
                continue
            if step is not None:
                step.exited(info.si_code, info.si_status)
            os.waitpid(info.si_pid, 0)
            if step is not None:
                del self._mains[info.si_pid]
                step.reaped()
            else:
                self.trees.worker_ended(info.si_pid)
        else:
            self.loop.at(now(), self.reap)
        for step in list(self._live.values()):
            if step.state == "closing":
                step.close()

    def _on_exit(self, pid: int, code: int, status: int) -> None:
        """The launcher says that a main process is dead, and keeps it until it is told to reap it."""
        step = self._mains.pop(pid, None)
        if step is not None:
            step.exited(code, status)
        self.launcher.reap(pid)
        if step is not None:
            step.reaped()

    def _find_begun(self, order: Order) -> int | None:
        """The process of an order whose launcher died before it could tell: the job itself may have killed it. It began
        a session, and is the first of its job's. What has the launcher's name yet will never be more than that."""
        step = self._live[order[0]]
        found = []
        for pid in kill.children(os.getpid()) - {*self._mains, *self.trees.workers, self.launcher.pid}:
            is_own = kill.carries(pid, step.spec.token) if step.own_uid is None else step.own_uid in kill.uids(pid)
            if is_own and kill.session(pid) == pid and kill.name_of(pid) != LAUNCHER:
                found.append((kill.start_time(pid), pid))
        return min(found)[1] if found else None

    # --- the fence ---

    def _watch_fence(self) -> None:
        if not self._fence_timer and self._live and self.fence.at is not None:
            self._fence_timer = True
            self.loop.at(max(self.fence.at, now() + _FENCE_RETRY), self._on_fence)

    def _on_fence(self) -> None:
        self._fence_timer = False
        self._keep_fence()
        self._watch_fence()

    def _keep_fence(self) -> None:
        if self._live and self.fence.has_passed:
            running = [step for step in self._live.values() if step.state != "closing" and step.cause != "fence"]
            if running:
                say(f"the fence has passed: killing {len(running)} steps")
            for step in running:
                step.stop("fence", 0.0, at_once=True)

    def _guard(self) -> None:
        """Kills a daemon that has jobs of its own and doesn't say in time that it has ended them. And looks at the
        fence whatever its timer says: a daemon with a shorter term writes an earlier one than that was set for."""
        self._keep_fence()
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
