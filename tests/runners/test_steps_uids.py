"""Users of the jobs: no two leases share one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import RunnerError
from supervisor.model.job import LeaseId
from supervisor.runners.uids import UidPool


@given(st.lists(st.tuples(st.sampled_from(["take", "back"]), st.integers(0, 5))))
def test_no_two_leases_share_a_uid(story: list[tuple[str, int]]) -> None:
    pool, taken = UidPool(1000, 3), {}
    for what, number in story:
        lease = LeaseId("s", number)
        if what == "back":
            pool.give_back(lease)
            taken.pop(lease, None)
        elif lease not in taken and len(taken) == 3:
            with pytest.raises(RunnerError, match="all 3 users"):
                pool.take(lease)
        else:
            uid = pool.take(lease)
            assert taken.setdefault(lease, uid) == uid
            assert uid in (1000, 1001, 1002)
        assert len(set(taken.values())) == len(taken)


def test_the_one_that_was_free_longest_goes_next() -> None:
    pool = UidPool(1000, 2)
    first = LeaseId("s", 1)
    assert pool.take(first) == 1000
    pool.give_back(first)
    assert pool.take(LeaseId("s", 2)) == 1001


def test_what_a_run_on_disk_holds_is_taken() -> None:
    pool = UidPool(1000, 2)
    pool.hold(LeaseId("s", 1), 1000)
    pool.hold(LeaseId("s", 2), 99)  # of another range, from a config of before
    assert pool.take(LeaseId("s", 3)) == 1001
    assert pool.take(LeaseId("s", 1)) == 1000


def test_without_a_range_there_are_none() -> None:
    assert UidPool(1000, 0).take(LeaseId("s", 1)) is None
