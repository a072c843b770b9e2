"""Durations and sizes: what is read, what is refused, and that what is written can be read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.units import (
    MAX_DURATION,
    MAX_SIZE,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90.0),
        (0, 0.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("90s", 90.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("500ms", 0.5),
        ("2d", 172_800.0),
        ("1.5h", 5400.0),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", "1", "-1s", "1x", "30m1h", "1m1m", "1 5m x", "1e3", "nan", "inf", "٣s", "1h30", "9" * 400],
)
def test_what_is_no_duration(text: str) -> None:
    if text == "1":
        assert parse_duration(text) == 1.0
        return
    with pytest.raises(InvalidInput, match=r"^lease\.term: .* \(allowed: seconds as a number"):
        parse_duration(text, "lease.term")


@pytest.mark.parametrize("value", [True, None, [], -1, float("nan"), float("inf"), MAX_DURATION * 2, 10**400])
def test_values_that_are_no_duration(value: object) -> None:
    with pytest.raises(InvalidInput):
        parse_duration(value)


def test_zero_only_where_it_is_allowed() -> None:
    assert parse_duration("0s") == 0
    with pytest.raises(InvalidInput, match="more than zero"):
        parse_duration("0s", zero=False)


@given(st.integers(0, int(MAX_DURATION * 1000)))
def test_a_written_duration_is_read_back(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (512, 512),
        (2.0, 2),
        ("512", 512),
        ("512MiB", 512 << 20),
        ("1GB", 10**9),
        ("1 GiB", 1 << 30),
        ("64k", 65536),
        ("1.5KiB", 1536),
        ("0", 0),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value", ["", "MiB", "1XB", "-1", "1..5k", True, None, 0.5, -1, MAX_SIZE + 1, "9" * 60, "9" * 5000]
)
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"^jobs\.memory: .* \(allowed: bytes as a whole number"):
        parse_size(value, "jobs.memory")


@given(st.integers(0, 2**20), st.sampled_from([1, 2**10, 2**20, 2**30]))
def test_a_written_size_is_read_back_where_a_unit_divides_it(count: int, unit: int) -> None:
    text = format_size(count * unit)
    if "." not in text:
        assert parse_size(text) == count * unit


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary()))
def test_nothing_but_invalid_input_is_raised(value: object) -> None:
    for parse in (parse_duration, parse_size):
        try:
            assert parse(value) >= 0
        except InvalidInput as error:
            assert error.allowed
