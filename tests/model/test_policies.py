"""Decisions with a reason."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.job import Lease, LeaseId
from supervisor.model.policies import (
    BACKOFF_CAP,
    Capacity,
    Intensity,
    Taken,
    decide_restart,
    decide_retry,
    fence_time,
    jittered,
    patience,
    room_left,
    serves,
)

seeds = st.integers(0, 1 << 32)


def lease(*, cpu: float = 0.0, memory: int = 0, alone: bool = False) -> Lease:
    return Lease(
        id=LeaseId("0" * 32, 1),
        job=1,
        attempt=1,
        kind="steps",
        name="j",
        spec=msgspec.Raw(b"{}"),
        secrets={},
        redact={},
        attempts=1,
        failures=0,
        losses=0,
        leased_at=datetime(2024, 1, 1, tzinfo=UTC),
        cpu=cpu,
        memory=memory,
        alone=alone,
    )


@given(seeds, st.integers(0, 50), st.integers(1, 50), st.floats(0.1, 600))
def test_retries_are_bounded_by_the_budget_and_the_cap(seed: int, failures: int, attempts: int, backoff: float) -> None:
    decision = decide_retry(failures=failures, attempts=attempts, backoff=backoff, rng=Random(seed))
    if failures + 1 >= attempts:
        assert decision.delay is None
    else:
        assert decision.delay is not None
        full = min(BACKOFF_CAP, backoff * 2.0**failures)
        assert 0.75 * full <= decision.delay <= full
    assert decision.reason == f"attempt {failures + 1} of {attempts}"


def test_what_would_not_help_is_not_retried() -> None:
    assert decide_retry(failures=0, attempts=9, backoff=1, rng=Random(0), may_retry=False).delay is None


@given(seeds, st.integers(1, 10_000))
def test_patience_grows_is_never_zero_and_never_beyond_its_cap(seed: int, tries: int) -> None:
    waited = patience(tries, Random(seed), base=0.25, cap=5.0)
    assert 0.125 <= waited <= 5.0


@given(seeds)
def test_jitter_stays_within_its_spread(seed: int) -> None:
    assert 8.0 <= jittered(10.0, Random(seed)) <= 12.0


def test_restarts_beyond_the_intensity_escalate_and_old_ones_are_forgotten() -> None:
    intensity = Intensity(restarts=2, period=10.0)
    first = decide_restart((), 0.0, intensity, Random(0))
    second = decide_restart(first.history, 1.0, intensity, Random(0))
    third = decide_restart(second.history, 2.0, intensity, Random(0))
    assert (first.delay, third.delay) == (0.0, None)
    assert second.delay is not None and second.delay > 0
    later = decide_restart(second.history, 10.5, intensity, Random(0))
    assert later.delay is not None and later.history == (1.0, 10.5)


@given(st.floats(0, 1e9), st.floats(0, 100), st.floats(-1e6, 1e6))
def test_the_fence_falls_before_the_database_can_expire_the_lease(sent: float, travel: float, offset: float) -> None:
    """Whatever the offset of the two clocks and however long the renewal travelled: the database counts the term from
    when it arrived, so its expiry, seen on this host's clock, is at least the margin after the fence."""
    arrived_by_database = sent + travel + offset
    expiry_on_this_host = arrived_by_database + 180.0 - offset
    assert fence_time(sent, 180.0, 15.0) <= expiry_on_this_host - 15.0 + 1e-3


def test_room_is_what_the_working_jobs_leave() -> None:
    capacity = Capacity(slots=4, cpu=8.0, memory=100)
    free = room_left(capacity, Taken([lease(cpu=3.0, memory=60), lease(cpu=1.0)]))
    assert (free.slots, free.cpu, free.memory) == (2, 4.0, 40)
    assert room_left(capacity, Taken([lease(alone=True)])).slots == 0
    crowded = room_left(capacity, Taken([lease(cpu=9.0, memory=200, alone=True), lease()]))
    assert (crowded.slots, crowded.cpu, crowded.memory) == (0, 0.0, 0)
    assert room_left(Capacity(slots=1), Taken()).cpu is None


def test_a_host_serves_a_kind_it_knows_with_labels_it_has() -> None:
    labels, kinds = frozenset({"docker", "arch=amd64"}), frozenset({"steps"})
    assert serves(labels, kinds, kind="steps", needed=["docker"])
    assert not serves(labels, kinds, kind="steps", needed=["docker", "gpu"])
    assert not serves(labels, kinds, kind="other", needed=[])
