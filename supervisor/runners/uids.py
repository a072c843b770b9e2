"""Users of the jobs: which uid of the host's range belongs to which lease. No I/O.

Called by ``steps``. The pool lives in memory; its truth is the ``uid`` in each run's ``spec``, from which it is filled.
"""

from __future__ import annotations

from collections import deque

from supervisor.model.errors import RunnerError
from supervisor.model.job import LeaseId


class UidPool:
    """``count`` uids from ``base``; with none, jobs run as one user and ``take`` gives None.

    The uid that was free longest is taken next: should anything of its last job still live, the shepherd sees it first.
    """

    def __init__(self, base: int, count: int) -> None:
        self._free = deque(range(base, base + count))
        self._taken: dict[LeaseId, int] = {}
        self._count = count

    def take(self, lease: LeaseId) -> int | None:
        """The lease's uid; asked again, the same. Raises RunnerError when none is free."""
        if not self._count:
            return None
        if lease not in self._taken:
            if not self._free:
                raise RunnerError(
                    f"all {self._count} users for jobs are taken: raise jobs.uid_count, or lower host.slots"
                )
            self._taken[lease] = self._free.popleft()
        return self._taken[lease]

    def hold(self, lease: LeaseId, uid: int) -> None:
        """Notes that a run found on disk has this uid."""
        if uid in self._free:
            self._free.remove(uid)
            self._taken[lease] = uid

    def give_back(self, lease: LeaseId) -> None:
        """Only once nothing of the lease runs, and nothing on disk is its user's. Idempotent."""
        uid = self._taken.pop(lease, None)
        if uid is not None:
            self._free.append(uid)

    def __len__(self) -> int:
        return self._count
