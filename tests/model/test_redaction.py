"""The redactor: the leftmost longest secret is replaced, the same at any chunk border; nothing else is held back."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.redaction import (
    MASK,
    MAX_REPLACEMENT,
    MAX_VALUE,
    Redactor,
    SecretSet,
    redact_text,
    secret_values,
)

# Few letters and short values, so that secrets overlap, contain and prefix one another.
letters = st.lists(st.sampled_from(b"abn\n"), max_size=60).map(bytes)
values = st.lists(st.sampled_from(b"abn\n"), min_size=1, max_size=9).map(bytes)
secrets = st.dictionaries(values, st.sampled_from([b"***", b"", b"<x>"]), max_size=6)


def reference(text: bytes, secrets: Mapping[bytes, bytes]) -> bytes:
    """The rule, position by position."""
    out = bytearray()
    position = 0
    while position < len(text):
        here = [value for value in secrets if text.startswith(value, position)]
        if here:
            longest = max(here, key=len)
            out += secrets[longest]
            position += len(longest)
        else:
            out.append(text[position])
            position += 1
    return bytes(out)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@given(letters, secrets, st.lists(st.integers(0, 1000), max_size=12))
@example(b"abab", {b"aba": b"***", b"ab": b"<x>", b"b": b""}, [1, 2, 3])
def test_any_chunking_gives_what_the_rule_gives(text: bytes, secrets: dict[bytes, bytes], places: list[int]) -> None:
    redactor = Redactor(secrets)
    out = b"".join([redactor.feed(chunk) for chunk in cut(text, places)]) + redactor.finish()
    assert out == reference(text, secrets)


@given(letters, secrets)
def test_only_a_true_prefix_of_a_secret_is_held_back(text: bytes, secrets: dict[bytes, bytes]) -> None:
    redactor = Redactor(secrets)
    redactor.feed(text)
    tail = text[len(text) - redactor.pending :]
    assert not tail or any(value.startswith(tail) and value != tail for value in secrets)


@given(letters, secrets, st.integers(0, 60))
def test_a_stream_goes_on_from_before_what_was_held_back(text: bytes, secrets: dict[bytes, bytes], place: int) -> None:
    first = Redactor(secrets)
    out = first.feed(text[:place])
    second = Redactor(secrets)
    at = min(place, len(text)) - first.pending
    assert out + second.feed(text[at:]) + second.finish() == reference(text, secrets)


@pytest.mark.parametrize(
    "text", [b"a" * 5000 + b"c", b"a" * 2999, b"b" + b"a" * 2999, b"ab" * 1500, b"a" * 2998 + b"ba"]
)
@pytest.mark.parametrize("value", [b"a" * 3000, b"a" * 2999 + b"b", b"ab" * 1500, b"aaaab" * 600])
def test_long_repetitive_secrets_are_held_back_like_short_ones(text: bytes, value: bytes) -> None:
    redactor = Redactor({value: b"***"})
    redactor.feed(text)
    longest = max(n for n in range(min(len(value) - 1, len(text)) + 1) if text.endswith(value[:n]))
    if value not in text:
        assert redactor.pending == longest


def test_an_ordinary_line_is_not_late() -> None:
    redactor = Redactor({"s3cret": "***", "line": "***"})
    assert redactor.feed(b"a normal s3 bucket\n") == b"a normal s3 bucket\n"
    assert redactor.feed(b"it is s3cre") == b"it is "
    assert redactor.feed(b"t!") == b"***!"


def test_a_secret_that_was_begun_where_the_output_was_cut_is_replaced() -> None:
    redactor = Redactor({"s3cret": "***"})
    assert redactor.feed(b"x s3cr") == b"x "
    assert redactor.finish(cut=True) == b"***"
    assert redactor.feed(b"s3cr") + redactor.finish() == b"s3cr"


def test_every_form_of_a_value_is_replaced() -> None:
    found = SecretSet(secret_values({"KEY": "line 1\nl/2\n"}, {}, {}))
    for form in ("line 1\nl/2\n", "line 1\nl/2", "line 1\r\nl/2", "line%201%0Al%2F2"):
        assert found.text(f"<{form}>") == "<***>", form


def test_what_a_job_says_of_a_value_wins_unless_it_holds_a_secret_itself() -> None:
    values = secret_values(
        {"A": "alpha", "B": "beta"}, {"alpha": "[the first]", "gamma": "a beta"}, {"H": "host", "N": ""}
    )
    assert values == {b"alpha": b"[the first]", b"beta": MASK, b"gamma": MASK, b"host": MASK}


def test_overlong_values_and_replacements_are_bounded() -> None:
    values = secret_values({"A": "x" * (MAX_VALUE + 5)}, {"y": "z" * 100}, {})
    assert max(map(len, values)) == MAX_VALUE
    assert len(values[b"y"]) == MAX_REPLACEMENT
    SecretSet(values)


@pytest.mark.parametrize("values", [{"": "x"}, {"v" * (MAX_VALUE + 1): "x"}, {"hush": "r" * (MAX_REPLACEMENT + 1)}])
def test_a_refusal_holds_no_secret(values: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as refused:
        SecretSet(values)
    assert "vvv" not in str(refused.value) and "hush" not in str(refused.value)


@given(st.text(max_size=40), st.dictionaries(st.text(min_size=1, max_size=5), st.just("***"), max_size=4))
def test_texts_are_redacted_whole(text: str, values: dict[str, str]) -> None:
    plain = {value.encode("utf-8", "surrogateescape"): b"***" for value in values}
    assert redact_text(text, values) == reference(text.encode(), plain).decode("utf-8", "replace")


def test_any_text_can_be_redacted() -> None:
    assert redact_text("\ud800 hush \udcff", {"hush": "***"}).split() == ["\ufffd" * 3, "***", "\ufffd" * 3]
